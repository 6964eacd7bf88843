"""A model for ONNX Runtime, for any batch size.

ONNX knows no selective scan. Its form there is that of the two-phase scan: exponentials and drives of all tokens at
once, one Scan node for h_t = a_t h_(t-1) + b_t, whose body is a multiplication and an addition, then all outputs by one
matrix product. Memory: two tensors of (tokens, batch, d_inner, d_state) a scan.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba.errors import ConfigError
from mamba.ops.scan import scans_by

OPSET = 18
EXTRA = "pip install -e '.[onnx]'"


@torch.library.custom_op("mamba_forge::recurrence", mutates_args=())
def recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = decay_t h_(t-1) + drive_t along the first axis, from 0."""
    states = drive.clone()
    for t in range(1, len(states)):
        states[t].addcmul_(decay[t], states[t - 1])
    return states


@recurrence.register_fake
def _(decay: Tensor, drive: Tensor) -> Tensor:
    return torch.empty_like(drive)


def scan_for_onnx(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """Arguments as in `mamba.ops.scan.selective_scan`; float32, and without the last state."""
    assert not return_last_state
    u, delta, B, C = (t.permute(2, 0, 1).float() for t in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.float()
    if delta_softplus:
        delta = F.softplus(delta)
    states = recurrence((delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None, :])
    y = (states @ C[..., None]).squeeze(-1)
    if D is not None:
        y = y + u * D
    y = y.permute(1, 2, 0)
    return y if z is None else y * F.silu(z.float())


def require_onnx() -> None:
    """Raises ConfigError where the optional packages are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}, which is not installed: {EXTRA}") from None


def write_onnx(model: nn.Module, side: int, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float32 model on the CPU: images (batch, 3, side, side) -> logits (batch, classes).

    Raises:
        ConfigError: the optional packages are not installed.
    """
    require_onnx()
    import onnx

    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with scans_by(scan_for_onnx), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                model,
                (torch.zeros(2, 3, side, side),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table={torch.ops.mamba_forge.recurrence.default: _scan_node()},
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def run_onnx(path: Path, threads: int) -> Any:
    """A function (n, 3, side, side) array -> (n, classes) array, by ONNX Runtime on the CPU."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _scan_node() -> Any:
    """What the operator `recurrence` becomes."""
    import onnx_ir as ir
    from onnxscript import opset18 as op
    from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

    numbers = itertools.count()

    def translate(decay: Any, drive: Any) -> Any:
        number, kind, shape = next(numbers), ir.TensorType(ir.DataType.FLOAT), ir.Shape(drive.shape[1:])
        first = op.Gather(drive, op.Constant(value_int=0), axis=0)
        begin = op.Sub(first, first)
        state, a, b = (
            ir.Value(name=f"{name}_{number}", type=kind, shape=shape) for name in ("state", "decay", "drive")
        )
        product = ir.Node("", "Mul", [a, state])
        total = ir.Node("", "Add", [product.outputs[0], b])
        seen = ir.Node("", "Identity", [total.outputs[0]])
        nodes = (product, total, seen)
        for name, node in zip(("product", "next", "seen"), nodes, strict=True):
            out = node.outputs[0]
            out.name, out.type, out.shape = f"{name}_{number}", kind, shape
        body = ir.Graph([state, a, b], [total.outputs[0], seen.outputs[0]], nodes=nodes, name=f"step_{number}")
        return call_op("Scan", begin, decay, drive, _num_outputs=2, body=body, num_scan_inputs=2)[1]

    return translate

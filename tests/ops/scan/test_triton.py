"""The Triton scan: on a GPU against the float64 reference, in the interpreter without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba.ops.scan import BACKENDS, selective_scan

ROOT = Path(__file__).parents[3]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs a CUDA device and triton")
ALL = {"delta_softplus": True, "return_last_state": True}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_inputs(batch, d_inner, length, d_state, dtype=torch.float32, device="cuda", mixed=False, seed=0):
    """Inputs as the model gives them: (batch, length, channel) tensors transposed; `mixed`: parameters in float32."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    def sequence(channels, scale=1.0):
        return (rand(batch, length, channels) * scale).to(device, dtype).transpose(1, 2)

    kind = torch.float32 if mixed else dtype
    return {
        "u": sequence(d_inner),
        "delta": sequence(d_inner, 0.5),
        "A": -rand(d_inner, d_state).exp().to(device, kind),
        "B": sequence(d_state),
        "C": sequence(d_state),
        "D": rand(d_inner).to(device, kind),
        "z": sequence(d_inner),
        "delta_bias": (rand(d_inner) * 0.5).to(device, kind),
    }


def outputs_and_gradients(tensors, flags, backend, seed=1):
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = selective_scan(**leaves, **flags, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(seed)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device)).sum() for o in outs)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip([*(f"out{i}" for i in range(len(outs))), *leaves], [*outs, *grads], strict=True))


def assert_equal_to_reference(tensors, flags, tolerance):
    got = outputs_and_gradients(tensors, flags, "triton")
    want = outputs_and_gradients({k: v.double() for k, v in tensors.items()}, flags, "reference")
    for name, b in want.items():
        if name in tensors:
            assert got[name].dtype == tensors[name].dtype
        error = (got[name].double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


GROWING = [(2, -3.5, -2.0, False), (1, 6.0, 1.0, False), (5, 8.0, 1.0, True), (21, 2.0, 1.0, True)]
"""length, delta, A, softplus: states that grow so fast that they overflow within the rest of a chunk of 16 tokens."""


def growing(length, delta, A, softplus, device):
    """Tensors and flags. What the kernels compute past the end must not spoil the sums over tokens."""
    tensors = make_inputs(1, 3, length, 2, device=device)
    given = {
        "u": tensors["u"],
        "delta": torch.full_like(tensors["delta"], delta),
        "A": torch.full_like(tensors["A"], A),
    }
    return given | {"B": tensors["B"], "C": tensors["C"]}, {"delta_softplus": softplus}


# ---------------------------------------------------------------- without a GPU


def test_scan_works_where_triton_is_missing():
    code = """
import sys; sys.modules["triton"] = None
import torch; from mamba.ops.scan import BACKENDS, selective_scan
assert "triton" not in BACKENDS
x = torch.ones(1, 2, 3); selective_scan(x, x, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@needs_triton
def test_float64_is_refused():
    tensors = make_inputs(1, 2, 3, 2, torch.float64, device="cpu")
    with pytest.raises(TypeError, match="float64"):
        selective_scan(**tensors, backend="triton")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_and_auto_avoids_them():
    tensors = make_inputs(1, 2, 3, 2, device="cpu")
    with pytest.raises(ValueError, match="on a GPU"):
        selective_scan(**tensors, backend="triton")
    assert torch.equal(selective_scan(**tensors), selective_scan(**tensors, backend="cpu"))


@needs_triton
def test_wide_loads_only_where_every_row_is_aligned():
    from mamba.ops.scan.inputs import ScanInputs
    from mamba.ops.scan.triton import _aligned

    def sequence(channels, row, batch=2, length=3):
        return torch.zeros(batch, length, row)[..., :channels].transpose(1, 2)

    def aligned(channels, row, *more):
        u = sequence(channels, row)
        return _aligned(ScanInputs(u, u, *[torch.zeros(1)] * 3, None, None, None), *more)

    assert aligned(40, 40) == aligned(40, 48) == aligned(40, 40, sequence(40, 40)) == 8
    assert aligned(33, 40) == aligned(40, 41) == aligned(40, 40, sequence(40, 41)) == 1
    assert aligned(40, 40, torch.zeros(()).expand(2, 40, 3)) == 8  # strides of 0


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
def test_kernels_in_the_interpreter(in_the_interpreter):
    """Two chunks, a channel block that is not full, every option: the arithmetic, not the compiler."""
    in_the_interpreter("""
import torch; from tests.ops.scan.test_triton import ALL, GROWING, assert_equal_to_reference, growing, make_inputs
assert_equal_to_reference(make_inputs(1, 3, 18, 2, device="cpu"), ALL, 1e-5)
tensors = make_inputs(1, 3, 5, 2, device="cpu")
assert_equal_to_reference({k: v for k, v in tensors.items() if k not in ("D", "z", "delta_bias")}, {}, 1e-5)
for case in GROWING:
    assert_equal_to_reference(*growing(*case, device="cpu"), 1e-5)
tensors = make_inputs(1, 8, 17, 2, device="cpu")
for name in ("u", "delta", "z"):  # what lies around the sequence must not be read, or not matter
    around = torch.full((1, 40, 8), float("nan"))
    around[:, 3:20] = tensors[name].transpose(1, 2)
    tensors[name] = around[:, 3:20].transpose(1, 2)
assert_equal_to_reference(tensors, ALL, 1e-5)
""")


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("keep", [False, True])
def test_operator_contract(keep):
    from mamba.ops.scan.inputs import pack
    from mamba.ops.scan.triton import _selective_scan

    tensors = [v.requires_grad_() for v in make_inputs(2, 40, 37, 7, torch.bfloat16, mixed=True).values()]
    torch.library.opcheck(_selective_scan, (*pack(tensors), True, keep, True), atol=2e-2, rtol=2e-2)
    first = [*tensors[:5], None, None, None]
    first[1] = tensors[1].detach().abs().requires_grad_()  # without softplus a negative step makes the state grow
    second = [None if t is None else t.detach().clone().requires_grad_() for t in first]
    torch.library.opcheck(_selective_scan, (*pack(first, second), False, keep, False), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@needs_gpu
def test_compiles_in_one_graph_with_autocast():
    tensors = make_inputs(2, 64, 37, 16)
    project = torch.nn.Linear(64, 128, device="cuda")
    x = torch.randn(2, 37, 64, device="cuda")

    def layer(x, tensors):
        with torch.autocast("cuda", torch.bfloat16):
            u, z = project(x).transpose(1, 2).chunk(2, dim=1)
            out = selective_scan(**{**tensors, "u": u, "z": z}, delta_softplus=True)
            return out.float().square().mean()

    leaves = {k: v.requires_grad_() for k, v in tensors.items() if k in ("A", "D", "delta_bias", "B")}
    parameters = [*leaves.values(), *project.parameters()]
    plain = layer(x, {**tensors, **leaves})
    want = torch.autograd.grad(plain, parameters)
    compiled = torch.compile(layer, fullgraph=True)(x, {**tensors, **leaves})
    got = torch.autograd.grad(compiled, parameters)
    torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-3)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.gpu
@needs_gpu
def test_deterministic():
    tensors = make_inputs(8, 200, 100, 16, torch.bfloat16)
    first = outputs_and_gradients(tensors, ALL, "triton")
    for _ in range(3):
        again = outputs_and_gradients(tensors, ALL, "triton")
        assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 3, 1, 4), (1, 4, 5, 1), (3, 6, 64, 16), (4, 100, 33, 13), (2, 40, 17, 256), (2, 64, 196, 16)],
    ids=str,
)
def test_shapes(shape):
    assert_equal_to_reference(make_inputs(*shape), ALL, 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision(dtype, mixed):
    for shape in [(3, 6, 64, 16), (4, 100, 33, 13), (2, 64, 196, 16)]:
        assert_equal_to_reference(make_inputs(*shape, dtype, mixed=mixed), ALL, TOLERANCE[dtype])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", GROWING, ids=str)
def test_states_that_grow(case):
    assert_equal_to_reference(*growing(*case, device="cuda"), 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_wide_rows_of_other_strides():
    """Aligned rows of dout, and not: a slice of a wider tensor."""
    tensors = make_inputs(2, 40, 37, 4)
    for row in (40, 41, 48):
        grad = torch.randn(2, 37, row, device="cuda")[..., :40].transpose(1, 2)
        results = []
        for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = {k: v.detach().to(kind).requires_grad_() for k, v in tensors.items()}
            out = selective_scan(**leaves, delta_softplus=True, backend=backend)
            results.append(torch.autograd.grad(out, list(leaves.values()), grad.to(kind)))
        for a, b in zip(*results, strict=True):
            assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.gpu
@needs_gpu
def test_long_sequence():
    assert_equal_to_reference(make_inputs(1, 33, 4096, 8), ALL, 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "missing, flags",
    [
        ((), {}),
        (("D",), {"delta_softplus": True}),
        (("z",), {"return_last_state": True}),
        (("delta_bias",), {"delta_softplus": True}),
        (("D", "z", "delta_bias"), {}),
    ],
    ids=str,
)
def test_options(missing, flags):
    tensors = {k: v for k, v in make_inputs(2, 40, 37, 7).items() if k not in missing}
    if "delta_softplus" not in flags:
        tensors["delta"] = tensors["delta"].abs() + 1.0  # the recurrence is stable for positive steps only
    assert_equal_to_reference(tensors, flags, 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_any_strides():
    wide = make_inputs(2, 20, 40, 6)
    every_second = {k: v[:, ::2] if k in ("u", "delta", "z") else v for k, v in wide.items()}
    every_second |= {k: wide[k][::2] for k in ("A", "D", "delta_bias")}
    assert_equal_to_reference(every_second, ALL, 1e-5)
    time_last = {k: v.contiguous() for k, v in wide.items()}
    assert_equal_to_reference(time_last, ALL, 1e-5)
    expanded = {**wide, "B": wide["B"][:, :1].expand(-1, 6, -1), "u": wide["u"][:1].expand(2, -1, -1)}
    assert_equal_to_reference(expanded, ALL, 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_inference_equals_training_and_auto_picks_triton():
    tensors = make_inputs(2, 40, 37, 7, torch.bfloat16)
    with torch.no_grad():
        out = selective_scan(**tensors, delta_softplus=True)
    trained = selective_scan(**{k: v.requires_grad_() for k, v in tensors.items()}, delta_softplus=True)
    assert torch.equal(out, trained)
    assert "selective_scan" in type(trained.grad_fn).__name__.lower()


@pytest.mark.gpu
@needs_gpu
def test_faster_than_the_reference():
    """A ratio within one run, never a time: it holds on any device."""
    tensors = [v.requires_grad_() for v in make_inputs(64, 384, 64, 16, torch.bfloat16).values()]

    def milliseconds(backend):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for repeat in range(5):
            if repeat == 2:
                start.record()
            torch.autograd.grad(selective_scan(*tensors, delta_softplus=True, backend=backend).sum(), tensors)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    assert "triton" in BACKENDS
    assert milliseconds("triton") * 3 < milliseconds("reference")

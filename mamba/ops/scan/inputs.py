"""The tensors of a scan by their names, and the one form in which operators of every backend take them.

torch gives an operator's list of tensors gradients only if none of them is None, so an operator takes the tensors that
are there, and a list of booleans that says which ones those are: of one scan, or of two that go opposite ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """In the order of `mamba.ops.scan.selective_scan`, with its shapes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


def pack(*scans: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors that are there, scan after scan, and which ones they are. Gradients are packed alike."""
    tensors = [t for scan in scans for t in scan]
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


def unpack(tensors: Iterable[Tensor], given: Sequence[bool]) -> list[ScanInputs]:
    """The scans, one or two, that `pack` packed."""
    rest, size = iter(tensors), len(ScanInputs._fields)
    places = [next(rest) if there else None for there in given]
    return [ScanInputs(*places[i : i + size]) for i in range(0, len(places), size)]  # type: ignore[arg-type]


def make_differentiable(forward: Any, backward: Any) -> None:
    """Register `backward` as the gradient of `forward`, two operators of a backend.

        forward(tensors, given, delta_softplus, keep, last_state) -> out, out2, last, *kept
        backward(dout, dout2, d_last, tensors, given, kept, delta_softplus) -> gradients of `tensors`, in their order

    out2 is empty without a second scan, last (the last state of the first) unless `last_state`; `kept` serves backward,
    and is whole where `keep` is set. Gradients of what is empty are passed as None.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.given, ctx.delta_softplus, ctx.keep, ctx.last_state = inputs
        kept = output[3:]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *kept)

    def run_backward(ctx: Any, dout: Tensor, dout2: Tensor, d_last: Tensor, *_: Tensor) -> tuple[Any, ...]:
        there = sum(ctx.given)
        tensors, kept = list(ctx.saved_tensors[:there]), list(ctx.saved_tensors[there:])
        if not ctx.keep:  # run forward again for what backward needs
            kept = list(forward(tensors, ctx.given, ctx.delta_softplus, True, False)[3:])
        two_way = len(ctx.given) > len(ScanInputs._fields)
        outputs = (dout, dout2 if two_way else None, d_last if ctx.last_state else None)
        grads = backward(*outputs, tensors, ctx.given, kept, ctx.delta_softplus)
        return grads, None, None, None, None

    forward.register_autograd(run_backward, setup_context=setup_context)

"""The selective scan: one function, several backends, and a table that says which are there.

`reference` is the oracle; every other entry of `BACKENDS` must equal it in output and in every gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba.ops.scan.cpu import bidirectional_scan_cpu, selective_scan_cpu
from mamba.ops.scan.forms import groups_of, has_constants, is_plain, parts, scan_in_any_form
from mamba.ops.scan.inputs import ScanInputs
from mamba.ops.scan.reference import bidirectional_scan_by_flips, selective_scan_reference
from mamba.ops.scan.two_phase import selective_scan_two_phase

__all__ = [
    "BACKENDS",
    "Pair",
    "bidirectional_scan",
    "is_replaced",
    "scans_by",
    "selective_scan",
    "selective_scan_reference",
]

Pair = Tensor | tuple[Tensor, Tensor]  # of the forward and the reversed sequence; one tensor serves both


def selective_scan(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space scan of Mamba (https://arxiv.org/abs/2312.00752, Algorithm 2).

    With delta' = delta + delta_bias, through softplus if asked:

        h_t = exp(delta'_t A) h_(t-1) + delta'_t B_t u_t,   y_t = C_t h_t + D u_t,   out = y silu(z)

    The layout and the meaning are those of mamba-ssm's `selective_scan_fn`. Any strides are taken as they are: a
    (batch, length, channel) tensor is passed as `x.transpose(1, 2)`. The state is kept in float32 (float64 for
    float64 inputs) whatever the input type.

    Args:
        u: (batch, d_inner, length), the input sequence.
        delta: (batch, d_inner, length), the time step.
        A: (d_inner, d_state), negative for a stable recurrence.
        B: (batch, d_state, length) for all channels; (batch, groups, d_state, length), one for each of so many groups
            of neighbouring channels; or (d_inner, d_state), constant over time. The last two are put into the first
            form before a backend sees them, at the cost that `mamba.ops.scan.forms` says.
        C: as B, in a form of its own.
        D: (d_inner,), the skip connection.
        z: (batch, d_inner, length), the gate.
        delta_bias: (d_inner,), added to delta before the softplus.
        delta_softplus: pass delta through softplus.
        return_last_state: also return h at the last step.
        backend: one of `BACKENDS`, or "auto": triton on a GPU, cpu (C++) on a CPU, two_phase for float64 and elsewhere.

    Returns:
        out, (batch, d_inner, length) in the type of u; with `return_last_state` also the last state,
        (batch, d_inner, d_state) in the working precision.

    Raises:
        TypeError: a tensor is complex or holds integers.
        ValueError: a shape does not fit, or the backend is unknown.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    _check_inputs(*inputs)
    backend = _chosen(backend, u)
    scan = _instead[-1] if _instead else BACKENDS[backend]
    with torch.autocast(u.device.type, enabled=False):  # the backends choose their own precision
        if is_plain(inputs) or (backend == "reference" and not _instead):
            return scan(*inputs, delta_softplus, return_last_state)
        return scan_in_any_form(scan, inputs, delta_softplus, return_last_state)


def bidirectional_scan(
    u: Pair,
    delta: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    z: Pair | None = None,
    delta_bias: Pair | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Two selective scans of the same sizes at once, the second from the last token to the first.

    Arguments are those of `selective_scan`, each a pair (forward, reversed) or one tensor that both directions use: Vim
    (https://arxiv.org/abs/2401.09417) shares z alone, two separate mixers share nothing. All sequences, those of the
    reversed scan too, are in the order of the tokens: nothing is flipped in memory. Equal to, but faster than,

        selective_scan(*forward), selective_scan(*(x.flip(-1) for x in reversed)).flip(-1)

    On a GPU both directions run in one launch, on a CPU in the threads of one parallel loop. For the GPU the tensors of
    a pair should have the same type and strides, else the second is converted or both are copied.

    Returns:
        out of the forward and of the reversed scan, (batch, d_inner, length) each, in the type of u.

    Raises:
        ValueError: a shape does not fit, or the backend is unknown.
    """
    given = (u, delta, A, B, C, D, z, delta_bias)
    forward, backward = (ScanInputs(*(x[i] if isinstance(x, tuple) else x for x in given)) for i in (0, 1))  # type: ignore[arg-type]
    for scan in (forward, backward):
        _check_inputs(*scan)
    for name, a, b in zip(ScanInputs._fields, forward, backward, strict=True):
        if (a is None) != (b is None):
            raise ValueError(f"{name} must be given for both directions or for none")
    if forward.u.shape != backward.u.shape or forward.A.shape != backward.A.shape:
        raise ValueError(
            f"both directions must have the same sizes, got u {tuple(forward.u.shape)} and {tuple(backward.u.shape)}, "
            f"A {tuple(forward.A.shape)} and {tuple(backward.A.shape)}"
        )
    if _instead:
        instead = partial(_scan_of_fields, _instead[-1])
        return bidirectional_scan_by_flips(instead, forward, backward, delta_softplus)
    backend = _chosen(backend, forward.u)
    with torch.autocast(forward.u.device.type, enabled=False):
        if backend == "reference" or (is_plain(forward) and is_plain(backward)):
            return _both(backend, forward, backward, delta_softplus)
        if has_constants(forward) or has_constants(backward):
            by_backend = partial(_scan_of_fields, BACKENDS[backend])
            return bidirectional_scan_by_flips(by_backend, forward, backward, delta_softplus)
        count = groups_of(forward, backward)
        found = [
            _both(backend, one, two, delta_softplus)
            for one, two in zip(parts(forward, count), parts(backward, count), strict=True)
        ]
        return torch.cat([one for one, _ in found], 1), torch.cat([two for _, two in found], 1)


def _both(backend: str, forward: ScanInputs, backward: ScanInputs, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from mamba.ops.scan.triton import bidirectional_scan_triton

        return bidirectional_scan_triton(forward, backward, delta_softplus)
    if backend == "cpu":
        return bidirectional_scan_cpu(forward, backward, delta_softplus)
    return bidirectional_scan_by_flips(BACKENDS[backend], forward, backward, delta_softplus)


def _scan_of_fields(backend: Callable[..., Any], *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`scan_in_any_form` with a scan's tensors one by one, as a backend takes them."""
    size = len(ScanInputs._fields)
    return scan_in_any_form(backend, ScanInputs(*arguments[:size]), *arguments[size:])


_instead: list[Callable[..., Tensor | tuple[Tensor, Tensor]]] = []


@contextmanager
def scans_by(scan: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every scan inside is made by this function of `BACKENDS`' kind, whatever the device: for exporters, which need
    operators that the other side knows."""
    _instead.append(scan)
    try:
        yield
    finally:
        _instead.pop()


def is_replaced() -> bool:
    """Whether scans are made by another function at the moment: `scans_by`."""
    return bool(_instead)


def _chosen(backend: str, u: Tensor) -> str:
    if backend == "auto":
        use_triton = "triton" in BACKENDS and u.is_cuda and u.dtype != torch.float64
        return "triton" if use_triton else "cpu" if u.device.type == "cpu" else "two_phase"
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend '{backend}'; valid: auto, {', '.join(BACKENDS)}")
    return backend


def _check_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, d_inner, length), got {tuple(u.shape)}")
    if A.ndim != 2:
        raise ValueError(f"A must be (d_inner, d_state), got {tuple(A.shape)}")
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    if length == 0:
        raise ValueError("the sequence is empty: length must be at least 1")
    wanted = {
        "u": (u, (batch, d_inner, length)),
        "delta": (delta, (batch, d_inner, length)),
        "A": (A, (d_inner, d_state)),
        "B": (B, _form(B, batch, d_inner, d_state, length)),
        "C": (C, _form(C, batch, d_inner, d_state, length)),
        "D": (D, (d_inner,)),
        "z": (z, (batch, d_inner, length)),
        "delta_bias": (delta_bias, (d_inner,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; the scan takes real floating-point tensors only")
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to match u {tuple(u.shape)}, got {tuple(tensor.shape)}")


def _form(t: Tensor, batch: int, d_inner: int, d_state: int, length: int) -> tuple[int, ...]:
    """The shape that B or C of its number of dimensions must have; of groups as many as it has, if they can be."""
    if t.ndim == 2:
        return (d_inner, d_state)
    if t.ndim == 4 and t.shape[1] > 0 and d_inner % t.shape[1] == 0:
        return (batch, t.shape[1], d_state, length)
    return (batch, d_state, length)


def _selective_scan_triton(*args: Any) -> Tensor | tuple[Tensor, Tensor]:
    from mamba.ops.scan.triton import selective_scan_triton  # on first use: not every machine has triton

    return selective_scan_triton(*args)


BACKENDS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "reference": selective_scan_reference,
    "two_phase": selective_scan_two_phase,
    "cpu": selective_scan_cpu,  # takes two_phase itself for float64, and where there is no compiler
}
if importlib.util.find_spec("triton") is not None:
    BACKENDS["triton"] = _selective_scan_triton

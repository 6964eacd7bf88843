"""The selective scan on a CPU: a C++ kernel, built on first use, behind a torch operator.

`cpu_kernel.cpp` says how it computes; this file builds it, keeps it, and makes it known to torch. What is measured:
docs/cpu-scan-notes.md.

The kernel is plain C++ with a C interface, called through ctypes with pointers and strides. It includes nothing of
torch, so it compiles in one to three seconds, needs no ninja, and cannot break on torch's ABI. Its OpenMP runtime is
the one that torch has loaded, where that is visible, and it uses `torch.get_num_threads()` threads.

The library lies in the cache folder (`mamba.cache`), under a name that is a hash of everything it depends on. Where it
cannot be built there is one warning, and `two_phase` takes over; float64 always goes there.

Deterministic: the same inputs give the same bits, whatever the number of threads. Differentiable once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import Parameter

from mamba.cache import cache_folder
from mamba.ops.scan.inputs import ScanInputs, make_differentiable, pack, unpack
from mamba.ops.scan.reference import bidirectional_scan_by_flips
from mamba.ops.scan.two_phase import selective_scan_two_phase

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
CHUNK = 16  # tokens between two checkpoints
LANES = 16  # channels of the widest vector
COMPILE = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-w", "-c"]
BUILD_SECONDS = 120  # a compiler that takes longer has failed

# ---------------------------------------------------------------- build and load


class _Scan(ctypes.Structure):
    """`struct Scan` of the kernel, in its order."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "d_inner", "length", "d_state", "chunk", "group")),
        *((n, ctypes.c_int64) for n in ("threads", "softplus", "reversed")),
        *((n, ctypes.c_void_p) for n in ("u", "delta", "A", "B", "C", "D", "z", "bias", "dout", "d_last")),
        *((f"{n}_{axis}", ctypes.c_int64) for n in ("u", "delta", "B", "C", "z", "dout") for axis in "bt"),
        *((n, ctypes.c_void_p) for n in ("out", "states", "last", "du", "ddelta", "dz", "parameters", "dB", "dC")),
    ]


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("no C++ compiler found (c++, g++, clang++ or $CXX)")


def _processor() -> str:
    """What `-march=native` depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))
    return platform.processor()


def _link_flags() -> list[str]:
    """Link an OpenMP runtime only if torch's own is not visible to all libraries: two would each have their threads."""
    return ["-shared"] if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ["-shared", "-fopenmp"]


def _build(compiler: str, link: list[str], source: Path, target: Path) -> None:
    """Compile in a folder of its own, then rename: a reader sees the whole library or none."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        compiled, library = f"{folder}/scan.o", f"{folder}/scan.so"
        for command in ([*COMPILE, str(source), "-o", compiled], [*link, compiled, "-o", library]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        os.replace(library, target)


def load(source: Path) -> ctypes.CDLL:
    """The library of one C++ file from the cache, built if it is not there or does not load."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS).stdout
    link = _link_flags()
    parts = [
        source.read_text(),
        torch.__version__,
        _processor(),
        platform.machine(),
        compiler,
        version,
        *COMPILE,
        *link,
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder()
    target = folder / f"{source.stem}_{key}.so"
    with FileLock(folder / f"{source.stem}_{key}.lock"):
        if target.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(target))
            target.unlink()
        _build(compiler, link, source, target)
    return ctypes.CDLL(str(target))


_library: ctypes.CDLL | None = None
_tried = False
_lock = threading.Lock()


def _kernel() -> ctypes.CDLL | None:
    """The loaded library; None, after one warning, where it cannot be had."""
    global _library, _tried
    with _lock:
        if not _tried:
            try:
                _library = load(SOURCE)
            except Exception as error:  # whatever is wrong with this machine's compiler, the scan still works
                detail = (error.stderr or "") if isinstance(error, subprocess.CalledProcessError) else ""
                reason = detail.strip().splitlines()[0] if detail.strip() else str(error)
                warnings.warn(
                    f"the C++ scan could not be built, the slower two_phase scan is used on CPU: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _tried = True
    return _library


def available() -> bool:
    """Whether the kernel can be used here; builds it on the first call. A constant to torch.compile."""
    return _kernel() is not None


available._dynamo_marked_constant = True  # type: ignore[attr-defined]
# what torch.compiler.assume_constant_result does, which imports all of torch.compile first: 1.6 s in every process


# ---------------------------------------------------------------- operators


def _rows(t: Tensor | None) -> Tensor | None:
    """(batch, channels, length) -> float32 (batch, length, channels) with contiguous channels; a view if it can be."""
    if t is None:
        return None
    t = t.transpose(1, 2).float()
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _like(t: Tensor) -> Tensor:
    """An empty (batch, channels, length) tensor like t whose channels are contiguous."""
    return t.new_empty((t.shape[0], t.shape[2], t.shape[1])).transpose(1, 2)


def _group(batch: int, d_inner: int) -> int:
    """Channels of one task: few enough tasks to share work, enough to keep threads busy; a function of shape alone."""
    blocks = -(-d_inner // LANES)
    return LANES * max(2, min(8, batch * blocks // 32))


def _states_shape(p: ScanInputs, directions: int, keep: bool) -> tuple[int, int, int, int, int]:
    slots = (p.u.shape[2] + CHUNK - 1) // CHUNK - 1
    return (directions, p.u.shape[0], slots if keep else 0, p.A.shape[1], p.A.shape[0])


def _last_shape(p: ScanInputs, last_state: bool) -> tuple[int, int, int]:
    return (p.u.shape[0] if last_state else 0, p.A.shape[1], p.A.shape[0])


def _inputs(p: ScanInputs) -> dict[str, Tensor | None]:
    """What the kernel reads, by its names; the caller must keep it alive until the kernel is done."""
    sequences = {name: _rows(getattr(p, name)) for name in ("u", "delta", "B", "C", "z")}
    return {**sequences, "A": _vector(p.A.t()), "D": _vector(p.D), "bias": _vector(p.delta_bias)}


def _call(name: str, p: ScanInputs, softplus: bool, directions: Sequence[dict[str, Tensor | None]]) -> None:
    """Run one function of the library on one direction or both. Tensors are float32, named as in `struct Scan`."""
    library = _kernel()
    if library is None:
        raise RuntimeError("the C++ scan is not available in this process")
    batch, d_inner, length = p.u.shape
    sizes = (batch, d_inner, length, p.A.shape[1], CHUNK, _group(batch, d_inner), torch.get_num_threads(), softplus)
    scans = (_Scan * len(directions))()
    for i, tensors in enumerate(directions):
        scan = _Scan(*sizes, i)
        for key, t in tensors.items():
            if t is not None:
                setattr(scan, key, t.data_ptr())
                if hasattr(scan, f"{key}_b"):
                    setattr(scan, f"{key}_b", t.stride(0))
                    setattr(scan, f"{key}_t", t.stride(1))
        scans[i] = scan
    getattr(library, name)(scans, ctypes.c_int64(len(directions)))


def _forward(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One problem, or two: the second is scanned from the last token to the first. A list of tensors that may be None
    would have no gradients in torch.

    Returns out, out2 (empty without a second direction), the last state (empty unless `last_state`) and the checkpoints
    (no slots unless `keep`).
    """
    scans = unpack(tensors, given)
    p = scans[0]
    u = p.u
    batch, d_inner, length = u.shape
    outs = [u.new_empty((batch, length, d_inner), dtype=torch.float32) for _ in scans]
    states = u.new_empty(_states_shape(p, len(scans), keep), dtype=torch.float32)
    last = u.new_empty(_last_shape(p, last_state), dtype=torch.float32)
    directions = [_inputs(q) | {"out": out} for q, out in zip(scans, outs, strict=True)]
    for direction, checkpoints in zip(directions, states, strict=True):
        direction["states"] = checkpoints if keep else None
    directions[0]["last"] = last if last_state else None
    _call("mamba_forge_scan_forward", p, delta_softplus, directions)
    out, out2 = (*(out.transpose(1, 2).to(u.dtype) for out in outs), u.new_empty(0))[:2]
    return out, out2, last.transpose(1, 2), states


_NAME = "mamba_forge::selective_scan_cpu"
_selective_scan = torch.library.custom_op(_NAME, mutates_args=(), device_types="cpu")(_forward)


@_selective_scan.register_fake
def _(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scans = unpack(tensors, given)
    p = scans[0]
    states = p.u.new_empty(_states_shape(p, len(scans), keep), dtype=torch.float32)
    last = p.u.new_empty(_last_shape(p, last_state), dtype=torch.float32)
    out, out2 = (*(_like(q.u) for q in scans), p.u.new_empty(0))[:2]
    return out, out2, last.transpose(1, 2), states


@torch.library.custom_op("mamba_forge::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _selective_scan_backward(
    dout: Tensor,
    dout2: Tensor | None,
    d_last: Tensor | None,
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    kept: Sequence[Tensor],
    delta_softplus: bool,
) -> list[Tensor]:
    """The gradients of the tensors that are there, in their order and types."""
    scans = unpack(tensors, given)
    u = scans[0].u
    batch, d_inner, length = u.shape
    d_state = scans[0].A.shape[1]
    groups = -(-d_inner // _group(batch, d_inner))

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    directions = []
    for q, dy, checkpoints in zip(scans, (dout, dout2), kept[0], strict=False):
        assert dy is not None
        directions.append(
            _inputs(q)
            | {name: empty(batch, length, d_inner) for name in ("du", "ddelta")}
            | {name: empty(batch, groups, length, d_state) for name in ("dB", "dC")}
            | {"dout": _rows(dy), "states": checkpoints, "parameters": empty(batch, d_state + 2, d_inner)}
            | {"dz": None if q.z is None else empty(batch, length, d_inner)}
        )
    directions[0]["d_last"] = None if d_last is None else _vector(d_last.transpose(1, 2))
    _call("mamba_forge_scan_backward", scans[0], delta_softplus, directions)
    return pack(*(_gradients(q, results) for q, results in zip(scans, directions, strict=True)))[0]


def _gradients(p: ScanInputs, results: dict[str, Any]) -> ScanInputs:
    """Partial sums added up, in the types and layouts of the interface."""
    shares = results["parameters"].sum(0)
    d_state = p.A.shape[1]
    return ScanInputs(
        results["du"].transpose(1, 2).to(p.u.dtype),
        results["ddelta"].transpose(1, 2).to(p.delta.dtype),
        shares[:d_state].t().to(p.A.dtype, copy=True),
        results["dB"].sum(1).transpose(1, 2).to(p.B.dtype),
        results["dC"].sum(1).transpose(1, 2).to(p.C.dtype),
        None if p.D is None else shares[d_state].to(p.D.dtype, copy=True),
        None if p.z is None else results["dz"].transpose(1, 2).to(p.z.dtype),
        None if p.delta_bias is None else shares[d_state + 1].to(p.delta_bias.dtype, copy=True),
    )


@_selective_scan_backward.register_fake
def _(
    dout: Tensor,
    dout2: Tensor | None,
    d_last: Tensor | None,
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    kept: Sequence[Tensor],
    delta_softplus: bool,
) -> list[Tensor]:
    grads: list[Tensor] = []
    for p in unpack(tensors, given):
        A_rows = p.A.new_empty((p.A.shape[1], p.A.shape[0])).t()
        shapes = (_like(p.u), _like(p.delta), A_rows, _like(p.B), _like(p.C))
        optional = (
            None if p.D is None else p.D.new_empty(p.D.shape),
            None if p.z is None else _like(p.z),
            None if p.delta_bias is None else p.delta_bias.new_empty(p.delta_bias.shape),
        )
        grads += [*shapes, *(t for t in optional if t is not None)]
    return grads


make_differentiable(_selective_scan, _selective_scan_backward)


def _takes(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernel can do it, or two_phase must."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            raise ValueError(f"the C++ scan needs tensors on a CPU, got {t.device}: use backend='auto'")
    return not any(t is not None and t.dtype == torch.float64 for t in tensors) and available()


def _scan(tensors: Sequence[Tensor | None], softplus: bool, last_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator; it keeps checkpoints where there will be gradients. Else, and uncompiled, its function does: an
    operator imports torch._dynamo when it is first called, which takes more than a second."""
    there, given = pack(tensors)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in there)
    plain = not keep and not torch.compiler.is_compiling() and all(type(t) in (Tensor, Parameter) for t in there)
    return (_forward if plain else _selective_scan)(there, given, softplus, keep, last_state)


def selective_scan_cpu(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments as in `mamba.ops.scan.selective_scan`; tensors may differ in type, as under autocast.

    float32 inputs are read in place when channels (states, for B and C) are contiguous, that is for (batch, length,
    channel) tensors transposed; others are copied. bfloat16 and float16 are converted to float32 and back. float64
    inputs, and machines without a compiler, take the `two_phase` scan. Without gradients nothing is kept.

    Raises:
        ValueError: the tensors are not on a CPU.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if not _takes(tensors):
        return selective_scan_two_phase(*tensors, delta_softplus, return_last_state)
    out, _, last, _ = _scan(tensors, delta_softplus, return_last_state)
    return (out, last) if return_last_state else out


def bidirectional_scan_cpu(forward: ScanInputs, backward: ScanInputs, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Both directions side by side on the threads of one call. Else as `selective_scan_cpu`."""
    tensors = (*forward, *backward)
    if not _takes(tensors):
        return bidirectional_scan_by_flips(selective_scan_two_phase, forward, backward, delta_softplus)
    out, out2, *_ = _scan(tensors, delta_softplus, False)
    return out, out2

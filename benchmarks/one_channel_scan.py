"""A baseline for benchmarks/scan.py: the scan in C++, one channel at a time, on torch's threads. Forward only."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from mamba.ops.scan import cpu


@functools.cache
def _library() -> ctypes.CDLL:
    return cpu.load(Path(__file__).with_suffix(".cpp"))


@torch.no_grad()
def one_channel_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """As `mamba.ops.scan.selective_scan`: float32, softplus on, memory (batch, length, channel)."""
    batch, d_inner, length = u.shape
    u, delta, B, C, z = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z))
    out = torch.empty_like(u)
    sizes = (ctypes.c_int64(n) for n in (batch, d_inner, length, A.shape[1], torch.get_num_threads()))
    tensors = (u, delta, A.contiguous(), B, C, D.contiguous(), z, delta_bias.contiguous(), out)
    if any(t.dtype != torch.float32 for t in tensors):
        raise TypeError("the scan of one channel at a time takes float32 tensors only")
    _library().one_channel_scan(*sizes, *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
    return out.transpose(1, 2)

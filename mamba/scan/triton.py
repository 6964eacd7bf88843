"""The selective scan as Triton kernels: forward and backward, for sequences of 1 to some thousands of tokens.

The recurrence is that of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752, Algorithm 2); `reference.py` says
what is computed, this file only how. How fast, and what was tried: docs/scan-notes.md.

The plan
--------
One program is one warp. It owns one batch entry and 32 channels, one a lane, walks over time in chunks of `CHUNK`
tokens and, inside a chunk, over the states:

    for chunk:  load u, delta, z, dout                      # tiles (CHUNK, 32)
        for n in range(d_state):
            a = exp2(delta A_n log2 e);  x = delta u B_n    # tiles again
            h = scan(a, x), y += C_n h                      # CHUNK fused multiply-adds, all inside one thread

A tile's time axis lies in the registers of one thread, so the recurrence needs no other thread, the decay `a` is
computed once for both recurrences of backward, any d_state is a plain loop count, and d_inner and length only need
masks. Between chunks the state goes through memory, one state of 32 channels at a time: those are the checkpoints from
which backward recomputes everything else. Without gradients one slot is reused and nothing is kept.

Gradients with respect to B and C sum over channels, that is over lanes: see `_lane_sums`. Programs write partial sums,
which a second kernel adds in a fixed order; the parameters' gradients are summed over the batch by torch. There are no
atomics: **the same inputs give the same bits every time.**

B and C (d_state rows that all channels share) are first copied to float32 as (batch, chunk, d_state, 2, CHUNK), zero
past the end, so that the inner loop reads them as aligned vectors without masks. u, delta, z and dout, the large
tensors, are read in place whatever their strides; lanes run along the channels, so the (batch, length, channel) memory
order is the fast one. Outputs have it.

Kept from forward to backward besides the inputs: batch x d_inner x d_state x (ceil(length / CHUNK) - 1) float32.

Deviations: exp2 and 1 / x are the hardware's approximations (2 ulp, denormals flushed); float64 is not supported. On
AMD, and in Triton's interpreter, the few lines of PTX are replaced; only NVIDIA has been measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # tokens a program keeps in registers; also the distance of the checkpoints. Half of LANES: see _lane_sums
LANES = 32
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_NVIDIA = not _INTERPRETED and torch.version.hip is None
FORWARD_OPTIONS = {"maxnreg": 128} if _NVIDIA else {}  # twice the warps: measured faster than the 150 it would take

_CHUNK = tl.constexpr(CHUNK)
_LANES = tl.constexpr(LANES)
_SECTOR = tl.constexpr(8)  # float32 numbers that a cache moves at once
_PTX = tl.constexpr(_NVIDIA)
_LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- tiles whose rows are registers
# (rows, columns) tiles keep rows in registers and columns across lanes; taking them apart and putting them together
# by rows costs no instruction. The recursion is unrolled at compile time: shapes are constants.


@triton.jit
def _halves(v):
    """(2 r, c) -> the first and the last r rows."""
    return tl.split(v.reshape(2, v.shape[0] // 2, v.shape[1]).permute(1, 2, 0))


@triton.jit
def _stack(first, last):
    """Two (r, c) -> (2 r, c)."""
    return tl.join(first, last).permute(2, 0, 1).reshape(2 * first.shape[0], first.shape[1])


@triton.jit
def _scan(a, x, h):
    """h_t = a_t h_(t-1) + x_t down the rows, from h (1, c). Returns h_t, a_t h_(t-1) and the last row of h."""
    if a.shape[0] == 1:
        carried = a * h
        h_all = x + carried
        end = h_all
    else:
        a0, a1 = _halves(a)
        x0, x1 = _halves(x)
        h0, carried0, middle = _scan(a0, x0, h)
        h1, carried1, end = _scan(a1, x1, middle)
        h_all = _stack(h0, h1)
        carried = _stack(carried0, carried1)
    return h_all, carried, end


@triton.jit
def _scan_back(a, v, a_next, g):
    """g_t = v_t + a_(t+1) g_(t+1) up the rows, from a_next, g (1, c). Returns g_t and the first rows of a and g."""
    if a.shape[0] == 1:
        g_all = v + a_next * g
        a_first = a
        g_first = g_all
    else:
        a0, a1 = _halves(a)
        v0, v1 = _halves(v)
        g1, a_middle, g_middle = _scan_back(a1, v1, a_next, g)
        g0, a_first, g_first = _scan_back(a0, v0, a_middle, g_middle)
        g_all = _stack(g0, g1)
    return g_all, a_first, g_first


@triton.jit
def _swap_lanes(v, distance: tl.constexpr):
    """Each lane's value from the lane whose number differs in the bit `distance`."""
    partner = (tl.arange(0, _LANES) ^ distance)[None, :].broadcast_to(v.shape)
    return tl.gather(v, partner, 1)


@triton.jit
def _exchange(first, last, distance: tl.constexpr):
    """Add lanes in pairs: the lower lane of a pair gets the sum of `first`, the upper lane that of `last`."""
    upper = ((tl.arange(0, _LANES) & distance) != 0)[None, :]
    kept = tl.where(upper, last, first)
    given = tl.where(upper, first, last)
    return kept + _swap_lanes(given, distance)


@triton.jit
def _lane_sums(v):
    """(r, 32) -> (1, 32): the sum of row i over the lanes, short of one addition over the other bits of the lane.

    Lane i modulo r holds row i. Each step hands half of the rows to a partner lane and keeps the other half, so
    r - 1 shuffles do for r rows; a butterfly for each row would take 5 r.
    """
    if v.shape[0] == 1:
        sums = v
    else:
        first, last = _halves(v)
        sums = _lane_sums(_exchange(first, last, v.shape[0] // 2))
    return sums


# ---------------------------------------------------------------- element functions


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1, in one instruction where there is one (1 ulp)."""
    if _PTX:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + _exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + e^x) to float32 accuracy also where e^x is tiny: max(x, 0) + 2 atanh(s), s = e / (2 + e), e = e^-|x|."""
    e = _exp(-tl.abs(x))
    s = e * _reciprocal(2.0 + e)
    q = s * s  # at most 1/9: eight terms of the series do
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)


# ---------------------------------------------------------------- memory


@triton.jit
def _tile(pointer, near, stride_t, inside):
    """A (CHUNK, channels) tile as float32 from one pointer a channel, zero for channels that are not inside.

    near: the rows, counted from the pointer's token and clamped to those that exist, so that tokens need no mask;
    what comes from beyond the end is cleared by the caller where it would count.
    """
    return tl.load(pointer[None, :] + (near * stride_t)[:, None], mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _prefetch(pointer):
    """Bring what the pointers point at to the L2 cache; changes no result."""
    if _PTX:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _prefetch_tile(pointer, near, stride_t, stride_d, d0, d_inner):
    """The tile whose first channel is d0; pointer is that of channel 0."""
    channel = tl.minimum(d0 + 16 * tl.arange(0, 2), d_inner - 1).to(tl.int64)  # 32 bytes hold 16 two-byte numbers
    _prefetch(pointer + (near * stride_t)[:, None] + (channel * stride_d)[None, :])


@triton.jit
def _prefetch_rows(row, d_state):
    """What the loop over the states of another chunk will read: its rows of B and C."""
    if _PTX:
        parts: tl.constexpr = _LANES // _SECTOR
        for first in range(0, d_state * parts, _LANES):
            _prefetch(row + tl.minimum(first + tl.arange(0, _LANES), d_state * parts - 1) * _SECTOR)


@triton.jit
def _warm(row, A, states, carry, parameters, c, d0, d_inner, d_state, WIDTH: tl.constexpr):
    """Load one number of each sector that the loop over the states will read, to have it in the L1 cache.

    Loads there are broadcasts of one row at a time, each too late to wait for L2. Returns a sum that must not be
    dropped, or the compiler drops the loads: see `_keep`. What is None is left out.
    """
    parts: tl.constexpr = _LANES // _SECTOR
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, d_state * parts, WIDTH):
        i = tl.minimum(first + tl.arange(0, WIDTH), d_state * parts - 1)
        channel = d0 + (i % parts) * _SECTOR
        offset = (i // parts) * d_inner + channel
        total += tl.load(row + i * _SECTOR)
        if A is not None:
            total += tl.load(A + offset, mask=channel < d_inner, other=0.0)
        total += tl.load(states + offset, mask=channel < tl.where(c > 0, d_inner, 0), other=0.0)
        if carry is not None:
            total += tl.load(carry + offset, mask=channel < d_inner, other=0.0)
            total += tl.load(parameters + offset, mask=channel < d_inner, other=0.0)
    return total


@triton.jit
def _keep(pointer, total, length, WIDTH: tl.constexpr):
    """A store that never happens: length is positive, which the compiler cannot know."""
    i = tl.arange(0, WIDTH)
    tl.store(pointer + i, total, mask=i < -length)


@triton.jit
def _time_step(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """The step size, zero outside the mask: there the state passes unchanged (a = 1, x = 0)."""
    step = delta + bias[None, :]
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(mask, step, 0.0)


# ---------------------------------------------------------------- kernels

_SIZES = ["d_inner", "d_state", "length", "chunks", "blocks"]


@triton.jit(do_not_specialize=[*_SIZES, "B_b", "B_t", "C_b", "C_t"])
def _pack_kernel(
    B, C, packed, d_state, length, chunks,
    B_b, B_n, B_t, C_b, C_n, C_t,
    T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """B and C, (batch, d_state, length), to float32 (batch, chunk, d_state, 2, T), zero past the end."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    t = tl.arange(0, T)
    token = c * T + t
    for start in range(0, d_state, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < d_state)[:, None] & (token < length)[None, :]
        rows_B = tl.load(B + b * B_b + n[:, None] * B_n + token[None, :].to(tl.int64) * B_t, mask=mask, other=0.0)
        rows_C = tl.load(C + b * C_b + n[:, None] * C_n + token[None, :].to(tl.int64) * C_t, mask=mask, other=0.0)
        to = packed + (b * chunks + c) * d_state * (2 * T) + n[:, None] * (2 * T) + t[None, :]
        tl.store(to, rows_B.to(tl.float32), mask=(n < d_state)[:, None])
        tl.store(to + T, rows_C.to(tl.float32), mask=(n < d_state)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _unpack_kernel(
    partial, dB, dC, d_state, length, chunks, blocks,
    T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add partial (batch, chunk, d_state, blocks, 2, T) over the channel blocks: dB, dC (batch, length, d_state)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    t = tl.arange(0, T)
    token = c * T + t
    for start in range(0, d_state, ROWS):
        n = start + tl.arange(0, ROWS)
        inside = (n < d_state)[:, None]
        sum_B = tl.zeros([ROWS, T], tl.float32)
        sum_C = tl.zeros([ROWS, T], tl.float32)
        row = partial + (b * chunks + c) * d_state * blocks * (2 * T)
        offsets = n[:, None] * blocks * (2 * T) + t[None, :]
        for k in range(blocks):
            sum_B += tl.load(row + offsets + k * (2 * T), mask=inside, other=0.0)
            sum_C += tl.load(row + offsets + k * (2 * T) + T, mask=inside, other=0.0)
        to = b * length * d_state + token[None, :] * d_state + n[:, None]
        mask = inside & (token < length)[None, :]
        tl.store(dB + to, sum_B.to(dB.dtype.element_ty), mask=mask)
        tl.store(dC + to, sum_C.to(dC.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_SIZES, "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t"])
def _forward_kernel(
    u, delta, A, packed, D, z, bias, out, states, last,
    d_inner, d_state, length, chunks,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One batch entry, 32 channels. A is (d_state, d_inner); D, z, bias and last may be None.

    states: (batch, chunks - 1, d_state, d_inner), the state after every chunk but the last; without KEEP one slot.
    """
    blocks = tl.cdiv(d_inner, _LANES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d0 = (tl.program_id(0) % blocks) * _LANES
    d = d0 + tl.arange(0, _LANES)
    wide = d.to(tl.int64)
    inside = d < d_inner
    t = tl.arange(0, _CHUNK)
    skip = tl.zeros([_LANES], tl.float32)
    shift = tl.zeros([_LANES], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    slot = d_state * d_inner
    u += b * u_b
    delta += b * delta_b
    if z is not None:
        z += b * z_b
    out += b * length * d_inner
    packed += b * chunks * d_state * _LANES
    states += b * slot * ((chunks - 1) if KEEP else 1)
    if last is not None:
        last += b * slot
    touched = tl.zeros([_LANES], tl.float32)

    for i in range(chunks):
        c = i + tl.zeros([], tl.int32)  # a tensor also in the interpreter
        start = (c * _CHUNK).to(tl.int64)
        rest = length - c * _CHUNK  # tokens from here to the end
        near = tl.minimum(t, rest - 1)
        mask = (t < rest)[:, None] & inside[None, :]
        row = packed + c.to(tl.int64) * d_state * _LANES
        before = states + (c - 1).to(tl.int64) * (slot if KEEP else 0)
        after = states + c.to(tl.int64) * (slot if KEEP else 0)
        earlier = d < tl.where(c > 0, d_inner, 0)
        later = d < tl.where(c < chunks - 1, d_inner, 0)
        final = d < tl.where(c == chunks - 1, d_inner, 0)
        touched += _warm(row, None, before, None, None, c, d0, d_inner, d_state, _LANES)
        u_tile = _tile(u + start * u_t + wide * u_d, near, u_t, inside)
        delta_tile = _tile(delta + start * delta_t + wide * delta_d, near, delta_t, inside)
        if z is not None:
            _prefetch_tile(z + start * z_t, near, z_t, z_d, d0, d_inner)
        if c < chunks - 1:
            begin = start + _CHUNK
            ahead = tl.minimum(t, rest - _CHUNK - 1)
            _prefetch_tile(u + begin * u_t, ahead, u_t, u_d, d0, d_inner)
            _prefetch_tile(delta + begin * delta_t, ahead, delta_t, delta_d, d0, d_inner)
            _prefetch_rows(row + d_state * _LANES, d_state)
        step = _time_step(delta_tile, shift, mask, SOFTPLUS)
        y = skip[None, :] * u_tile
        drive = step * u_tile
        for n in range(d_state):
            h = tl.load(before + n * d_inner + d, mask=earlier, other=0.0)[None, :]
            A_n = tl.load(A + n * d_inner + d, mask=inside, other=0.0)[None, :]
            B_n = tl.load(row + n * _LANES + t)[:, None]
            C_n = tl.load(row + n * _LANES + _CHUNK + t)[:, None]
            a = tl.exp2(step * (A_n * _LOG2E))
            h, _carried, end = _scan(a, drive * B_n, h)
            y += h * C_n
            end = end.reshape(_LANES)
            tl.store(after + n * d_inner + d, end, mask=later)
            if last is not None:
                tl.store(last + n * d_inner + d, end, mask=final)
        if z is not None:
            gate = _tile(z + start * z_t + wide * z_d, near, z_t, inside)
            y *= gate * _sigmoid(gate)
        to = (out + start * d_inner + d)[None, :] + (near * d_inner)[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next chunk reads the states written here
    _keep(packed, touched, length, _LANES)


@triton.jit(do_not_specialize=[*_SIZES, "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t", "dout_b", "dout_t"])
def _backward_kernel(
    u, delta, A, packed, D, z, bias, states, dout, carry,
    du, ddelta, dz, parameters, partial,
    d_inner, d_state, length, chunks,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t, dout_b, dout_d, dout_t,
    SOFTPLUS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The same program backwards: chunks from the last to the first, states recomputed inside each from `states`.

    carry: (batch, d_state, d_inner), a_t dLoss/dh_t at a chunk's start, handed to the chunk before; with LAST it comes
    filled with the gradient of the last state. parameters: (batch, d_state + 2, d_inner), the batch entry's share of
    dA (by rows), dD and dbias. partial: (batch, chunks, d_state, blocks, 2, CHUNK), the program's share of dB and dC.
    """
    blocks = tl.cdiv(d_inner, _LANES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    d0 = block * _LANES
    lane = tl.arange(0, _LANES)
    d = d0 + lane
    wide = d.to(tl.int64)
    inside = d < d_inner
    t = tl.arange(0, _CHUNK)
    skip = tl.zeros([_LANES], tl.float32)
    shift = tl.zeros([_LANES], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    slot = d_state * d_inner
    u += b * u_b
    delta += b * delta_b
    dout += b * dout_b
    flat = b * length * d_inner
    du += flat
    ddelta += flat
    if z is not None:
        z += b * z_b
        dz += flat
    packed += b * chunks * d_state * _LANES
    partial += b * chunks * d_state * blocks * _LANES + block * _LANES
    states += b * (chunks - 1) * slot
    carry += b * slot
    parameters += b * (slot + 2 * d_inner)
    touched = tl.zeros([2 * _LANES], tl.float32)
    sum_D = tl.zeros([_LANES], tl.float32)
    sum_bias = tl.zeros([_LANES], tl.float32)
    one = tl.full([1, _LANES], 1.0, tl.float32)
    zero = tl.program_id(1)  # the grid has one axis

    for i in range(chunks):
        c = chunks - 1 - i
        start = (c * _CHUNK).to(tl.int64)
        rest = length - c * _CHUNK
        near = tl.minimum(t, rest - 1)
        mask = (t < rest)[:, None] & inside[None, :]
        row = packed + c.to(tl.int64) * d_state * _LANES
        before = states + (c - 1).to(tl.int64) * slot
        sums = partial + c.to(tl.int64) * d_state * blocks * _LANES
        earlier = d < tl.where(c > 0, d_inner, 0)
        later = d < tl.where(c < chunks - 1, d_inner, 0)
        resumed = inside if LAST else later
        u_tile = _tile(u + start * u_t + wide * u_d, near, u_t, inside)
        delta_tile = _tile(delta + start * delta_t + wide * delta_d, near, delta_t, inside)
        dy = _tile(dout + start * dout_t + wide * dout_d, near, dout_t, inside)
        if z is not None:
            gate = _tile(z + start * z_t + wide * z_d, near, z_t, inside)
            dy *= gate * _sigmoid(gate)
        touched += _warm(row, A, before, carry, parameters, c, d0, d_inner, d_state, 2 * _LANES)
        step = _time_step(delta_tile, shift, mask, SOFTPLUS)
        dy = tl.where(mask, dy, 0.0)
        drive = step * u_tile
        y = skip[None, :] * u_tile
        d_drive = tl.zeros([_CHUNK, _LANES], tl.float32)  # with respect to step * u
        d_step = tl.zeros([_CHUNK, _LANES], tl.float32)  # with respect to step, through the decay alone
        for n in range(d_state):
            h = tl.load(before + n * d_inner + d, mask=earlier, other=0.0)[None, :]
            ag = tl.load(carry + n * d_inner + d, mask=resumed, other=0.0)[None, :]
            dA = tl.load(parameters + n * d_inner + d, mask=later, other=0.0)
            A_n = tl.load(A + n * d_inner + d, mask=inside, other=0.0)[None, :]
            B_n = tl.load(row + n * _LANES + t)[:, None]
            C_n = tl.load(row + n * _LANES + _CHUNK + t)[:, None]
            a = tl.exp2(step * (A_n * _LOG2E))
            h, carried, _end = _scan(a, drive * B_n, h)
            if z is not None:
                y += h * C_n
            share_C = _lane_sums(dy * h)
            g, a_first, g_first = _scan_back(a, dy * C_n, one, ag)
            tl.store(carry + n * d_inner + d, (a_first * g_first).reshape(_LANES), mask=inside)
            d_drive += g * B_n
            d_exponent = g * carried
            d_step += d_exponent * A_n
            dA += tl.sum(d_exponent * step, 0)
            tl.store(parameters + n * d_inner + d, dA, mask=inside)
            shares = _exchange(_lane_sums(g * drive), share_C, _CHUNK)
            tl.store(sums + n * blocks * _LANES + lane, shares.reshape(_LANES))

        # The registers were needed for other things: read the inputs again, from the cache. Their addresses too are
        # computed again, which the compiler would not do (it would spill them) if it knew that `zero` is zero.
        again = tl.minimum(t, rest - 1 + zero)
        u_tile = _tile(u + start * u_t + wide * u_d, again, u_t, inside)
        d_delta = d_step + d_drive * u_tile
        if SOFTPLUS:
            delta_tile = _tile(delta + start * delta_t + wide * delta_d, again, delta_t, inside)
        to = (again * d_inner)[:, None] + (start * d_inner + d)[None, :]
        if z is not None:
            gate = _tile(z + start * z_t + wide * z_d, again, z_t, inside)
            grad = _tile(dout + start * dout_t + wide * dout_d, again, dout_t, inside)
            sigmoid = _sigmoid(gate)
            d_gate = grad * y * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(dz + to, d_gate.to(dz.dtype.element_ty), mask=mask)
        if SOFTPLUS:
            d_delta *= _sigmoid(delta_tile + shift[None, :])
        tl.store(ddelta + to, d_delta.to(ddelta.dtype.element_ty), mask=mask)
        tl.store(du + to, (d_drive * step + skip[None, :] * dy).to(du.dtype.element_ty), mask=mask)
        sum_D += tl.sum(dy * u_tile, 0)
        sum_bias += tl.sum(tl.where(mask, d_delta, 0.0), 0)
        tl.debug_barrier()  # the next chunk reads carry and parameters

    tl.store(parameters + slot + d, sum_D, mask=inside)
    tl.store(parameters + slot + d_inner + d, sum_bias, mask=inside)
    _keep(packed, touched, length, 2 * _LANES)


# ---------------------------------------------------------------- operators


def _device_of(u: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(u.device) if u.is_cuda else nullcontext()


def _rows(d_state: int) -> int:
    return max(2, min(16, triton.next_power_of_2(d_state)))


def _prepare(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, int]:
    """A as float32 (d_state, d_inner); B and C packed; the number of chunks."""
    batch, _, length = u.shape
    d_state = A.shape[1]
    chunks = triton.cdiv(length, CHUNK)
    packed = u.new_empty((batch, chunks, d_state, 2, CHUNK), dtype=torch.float32)
    _pack_kernel[(batch * chunks,)](
        B, C, packed, d_state, length, chunks, *B.stride(), *C.stride(),
        T=CHUNK, ROWS=_rows(d_state), num_warps=1,
    )  # fmt: skip
    return A.t().to(torch.float32).contiguous(), packed, chunks


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _channels_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (batch, d_inner, length) tensor whose channels are contiguous."""
    batch, d_inner, length = like.shape
    return like.new_empty((batch, length, d_inner), dtype=dtype).transpose(1, 2)


def _states_shape(u: Tensor, A: Tensor, keep: bool) -> tuple[int, int, int, int]:
    slots = (u.shape[2] + CHUNK - 1) // CHUNK - 1
    return (u.shape[0], slots if keep else 0, A.shape[1], A.shape[0])


@torch.library.custom_op("mamba_forge::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the checkpoints (no slots unless `keep`) and the last state (empty unless `last_state`)."""
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    out = _channels_last(u)
    states = u.new_empty(_states_shape(u, A, keep), dtype=torch.float32)
    last = u.new_empty((batch if last_state else 0, d_state, d_inner), dtype=torch.float32)
    with _device_of(u):
        A_rows, packed, chunks = _prepare(u, A, B, C)
        slots = states if keep else u.new_empty((batch if chunks > 1 else 0, d_state, d_inner), dtype=torch.float32)
        _forward_kernel[(batch * triton.cdiv(d_inner, LANES),)](
            u, delta, A_rows, packed, _vector(D), z, _vector(delta_bias), out, slots, last if last_state else None,
            d_inner, d_state, length, chunks,
            *u.stride(), *delta.stride(), *_strides(z),
            SOFTPLUS=delta_softplus, KEEP=keep, num_warps=1, enable_fp_fusion=True, **FORWARD_OPTIONS,
        )  # fmt: skip
    return out, states, last.transpose(1, 2)


@_selective_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    states = u.new_empty(_states_shape(u, A, keep), dtype=torch.float32)
    last = u.new_empty((u.shape[0] if last_state else 0, A.shape[1], A.shape[0]), dtype=torch.float32)
    return _channels_last(u), states, last.transpose(1, 2)


@torch.library.custom_op("mamba_forge::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    dout: Tensor,
    d_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, each in its tensor's type; empty where there is none."""
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    blocks = triton.cdiv(d_inner, LANES)
    du, ddelta = _channels_last(u), _channels_last(u, delta.dtype)
    dz = u.new_empty(0) if z is None else _channels_last(u, z.dtype)
    dB = B.new_empty((batch, length, d_state))
    dC = C.new_empty((batch, length, d_state))
    with _device_of(u):
        A_rows, packed, chunks = _prepare(u, A, B, C)
        carry = u.new_empty((batch, d_state, d_inner), dtype=torch.float32)
        if d_last is not None:
            carry.copy_(d_last.transpose(1, 2))
        parameters = u.new_empty((batch, d_state + 2, d_inner), dtype=torch.float32)
        partial = u.new_empty((batch, chunks, d_state, blocks, 2, CHUNK), dtype=torch.float32)
        _backward_kernel[(batch * blocks,)](
            u, delta, A_rows, packed, _vector(D), z, _vector(delta_bias), states, dout, carry,
            du, ddelta, None if z is None else dz, parameters, partial,
            d_inner, d_state, length, chunks,
            *u.stride(), *delta.stride(), *_strides(z), *dout.stride(),
            SOFTPLUS=delta_softplus, LAST=d_last is not None, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        _unpack_kernel[(batch * chunks,)](
            partial, dB, dC, d_state, length, chunks, blocks, T=CHUNK, ROWS=_rows(d_state), num_warps=4
        )
    shares = parameters.sum(0)
    dA = shares[:d_state].t().to(A.dtype, copy=True)
    dD = u.new_empty(0) if D is None else shares[d_state].to(D.dtype, copy=True)
    dbias = u.new_empty(0) if delta_bias is None else shares[d_state + 1].to(delta_bias.dtype, copy=True)
    return du, ddelta, dA, dB.transpose(1, 2), dC.transpose(1, 2), dD, dz, dbias


@_selective_scan_backward.register_fake
def _(
    dout: Tensor,
    d_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_inner, d_state = A.shape
    return (
        _channels_last(u),
        _channels_last(u, delta.dtype),
        A.new_empty((d_state, d_inner)).t(),
        _channels_last(B),
        _channels_last(C),
        u.new_empty(0) if D is None else D.new_empty(d_inner),
        u.new_empty(0) if z is None else _channels_last(u, z.dtype),
        u.new_empty(0) if delta_bias is None else delta_bias.new_empty(d_inner),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.keep, ctx.last_state = inputs
    _, states, _ = output
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)


def _backward(ctx: Any, dout: Tensor, _: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if not ctx.keep:  # no checkpoints were asked for: run forward again for them
        states = _selective_scan(*tensors, ctx.delta_softplus, True, False)[1]
    grads = _selective_scan_backward(dout, d_last if ctx.last_state else None, *tensors, states, ctx.delta_softplus)
    given = [grad if t is not None else None for grad, t in zip(grads, tensors, strict=True)]
    return (*given, None, None, None)


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan_triton(
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
    """Arguments as in `mamba.scan.selective_scan`; tensors may differ in type, as under autocast.

    Differentiable once in every tensor, also through the last state. Deterministic. One graph node under
    `torch.compile`, forward and backward. Without gradients nothing is kept.

    Raises:
        TypeError: an input is not float32, bfloat16 or float16.
        ValueError: the tensors are not on a GPU.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    for t in tensors:
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"the triton scan takes float32, bfloat16 and float16, got {t.dtype}: use backend='auto'")
    if not (u.is_cuda or _INTERPRETED):
        raise ValueError(f"the triton scan needs tensors on a GPU, got {u.device}: use backend='auto'")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, _, last = _selective_scan(*tensors, delta_softplus, keep, return_last_state)
    return (out, last) if return_last_state else out

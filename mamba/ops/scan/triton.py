"""The selective scan as Triton kernels: forward and backward, for sequences of 1 to some thousands of tokens.

The recurrence is that of Mamba (Gu & Dao 2023, https://arxiv.org/abs/2312.00752, Algorithm 2); `reference.py` says
what is computed, this file only how. How fast, and what was tried: docs/scan-notes.md.

The plan
--------
One program owns one batch entry and 32 channels, one a lane, walks over time in chunks of `CHUNK` tokens and, inside a
chunk, over the states:

    for chunk:  load u, delta, z, dout                      # tiles (CHUNK, 32)
        for n in range(d_state):
            a = exp2(delta A_n log2 e);  x = delta u B_n    # tiles again
            h = scan(a, x), y += C_n h                      # CHUNK fused multiply-adds, all inside one thread

A tile's time axis lies in the registers of one thread, so the recurrence needs no other thread, the decay `a` is
computed once for both recurrences of backward, any d_state is a plain loop count, and d_inner and length only need
masks. Between chunks the state goes through memory, one state of 32 channels at a time: those are the checkpoints from
which backward recomputes everything else. Without gradients one slot is reused and nothing is kept.

A program is one warp, or two that share the states (GROUPS): each does what is done once a token for half of the tokens
and the recurrence for half of the states, and they exchange through shared memory once before and once after the loop
over the states. That keeps more warps busy where programs are few; `_groups` chooses.

Gradients with respect to B and C sum over channels, that is over lanes: by shuffles (`_lane_sums`), or, if B and C have
16 bits, mostly on the matrix units (`_lane_sums_by_matrix`). Programs write partial sums, which `_finish_kernel` adds
in a fixed order. There are no atomics: **the same inputs give the same bits every time** on the same kind of device.

`_prepare_kernel` first copies B and C (d_state rows that all channels share) to float32 as (batch, chunk, d_state, 2,
CHUNK), zero past the end, so that the inner loop reads them as aligned vectors without masks, and A, D and the bias to
rows of channels. u, delta, z and dout, the large tensors, are read in place whatever their strides; lanes run along the
channels, so the (batch, length, channel) memory order is the fast one, and outputs have it. Where its rows begin at
multiples of eight elements (ALIGNED), a lane reads 16 bytes at once and the tile is handed to the lanes of its channels
through shared memory. What limits these kernels is waiting, for memory and for dependent arithmetic, not the number of
instructions: a chunk's tiles are asked for while the chunk before it is finished, all loads come before the first
hand-over, and what nobody waits for (a state's share of dB and dC) is stored a state later.

Both directions of a bidirectional scan are one launch of the same kernels: axis 1 of the grid is the direction.

Kept from forward to backward besides the inputs: batch x d_inner x d_state x (ceil(length / CHUNK) - 1) float32, and
two float32 for each number of B.

Deviations: exp2 and 1 / x are the hardware's approximations (2 ulp, denormals flushed: `mamba.ops.triton_math`);
float64 is not supported. On AMD, and in Triton's interpreter, the few lines of PTX are replaced; only NVIDIA has been
measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba.ops.scan.inputs import ScanInputs, make_differentiable, pack, unpack
from mamba.ops.triton_math import INTERPRETED, LOG2E, NVIDIA, device_of, sigmoid, softplus

CHUNK = 16  # tokens a program keeps in registers; also the distance of the checkpoints. Half of LANES
LANES = 32
WARMED = 16  # states whose sectors one call of `_warm` in backward reaches
FORWARD_OPTIONS = {"maxnreg": 128} if NVIDIA else {}  # twice the warps: measured faster than the 150 it would take

_CHUNK = tl.constexpr(CHUNK)
_LANES = tl.constexpr(LANES)
_SHARES = tl.constexpr(CHUNK // 4)  # rows that `_lane_sums_by_matrix` leaves
_SECTOR = tl.constexpr(8)  # float32 numbers that a cache moves at once
_PTX = tl.constexpr(NVIDIA)


# ---------------------------------------------------------------- tiles whose rows are registers
# (rows, groups, 32) tiles keep rows in registers, a group in a warp, columns across its lanes; taking them apart and
# putting them together by rows costs no instruction. The recursion is unrolled at compile time: shapes are constants.


@triton.jit
def _halves(v):
    """(2 r, groups, c) -> the first and the last r rows."""
    return tl.split(v.reshape(2, v.shape[0] // 2, v.shape[1], v.shape[2]).permute(1, 2, 3, 0))


@triton.jit
def _stack(first, last):
    """Two (r, groups, c) -> (2 r, groups, c)."""
    return tl.join(first, last).permute(3, 0, 1, 2).reshape(2 * first.shape[0], first.shape[1], first.shape[2])


@triton.jit
def _scan(a, x, h, CARRIED: tl.constexpr):
    """h_t = a_t h_(t-1) + x_t down the rows, from h (one row). Returns h_t, a_t h_(t-1) and the last row of h.

    Without CARRIED nobody asks for the second, and one operation a token lies between h and the next h. With it two do
    (x, a product, becomes part of the second), but the three take fewer instructions: measured faster in backward.
    """
    if a.shape[0] == 1:
        carried = a * h
        h_all = x + carried if CARRIED else tl.fma(a, h, x)
        end = h_all
    else:
        a0, a1 = _halves(a)
        x0, x1 = _halves(x)
        h0, carried0, middle = _scan(a0, x0, h, CARRIED)
        h1, carried1, end = _scan(a1, x1, middle, CARRIED)
        h_all = _stack(h0, h1)
        carried = _stack(carried0, carried1)
    return h_all, carried, end


@triton.jit
def _scan_back(a, v, a_next, g):
    """g_t = v_t + a_(t+1) g_(t+1) up the rows, from a_next, g (one row). Returns g_t and the first rows of a and g."""
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
def _upper(bit: tl.constexpr):
    """(1, 1, 32): whether the lane's number has this bit."""
    return ((tl.arange(0, _LANES) & bit) != 0)[None, None, :]


@triton.jit
def _exchange(first, last, distance: tl.constexpr):
    """Add lanes in pairs: the lower lane of a pair gets the sum of `first`, the upper lane that of `last`."""
    upper = _upper(distance)
    kept = tl.where(upper, last, first)
    given = tl.where(upper, first, last)
    partner = (tl.arange(0, _LANES) ^ distance)[None, None, :].broadcast_to(given.shape)
    return kept + tl.gather(given, partner, 2)


@triton.jit
def _lane_sums(v, nearest: tl.constexpr):
    """(r, groups, 32) -> (1, groups, 32): the sum of row i over lanes whose numbers differ in r's bits times nearest.

    The lane with number i there holds row i. Each step hands half of the rows to a partner lane and keeps the other
    half, so r - 1 shuffles do for r rows; a butterfly for each row would take r times as many steps.
    """
    if v.shape[0] == 1:
        sums = v
    else:
        first, last = _halves(v)
        sums = _lane_sums(_exchange(first, last, v.shape[0] // 2 * nearest), nearest)
    return sums


def _quad_sums() -> str:
    """PTX of `_lane_sums_by_matrix`: four products, each added to the one before."""
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $2, $1, $3}, "
    lines = [".reg .f32 o;", "mov.f32 o, 0f00000000;"]
    for q in range(4):
        rows = ", ".join(f"${4 + 4 * q + k}" for k in range(4))
        added = "o, o, o, o" if q == 0 else "$0, $2, $1, $3"
        lines.append(product + f"{{{rows}}}, {{${20 + 2 * q}, ${21 + 2 * q}}}, {{{added}}};")
    return "{ " + " ".join(lines) + " }"


_QUAD_SUMS = tl.constexpr(_quad_sums())


@triton.jit
def _quarters(v):
    """(4 r, groups, c) -> its four parts of r rows."""
    first, last = _halves(v)
    v0, v1 = _halves(first)
    v2, v3 = _halves(last)
    return v0, v1, v2, v3


@triton.jit
def _selector(column: tl.constexpr, GROUPS: tl.constexpr):
    """The bits of 1.0 in the four lanes that hold this column of a product's second operand, else 0."""
    one = tl.full([1, GROUPS, _LANES], 1.0, tl.float32)
    return tl.where((tl.arange(0, _LANES) // 4 == column)[None, None, :], one, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _selectors(GROUPS: tl.constexpr):
    """What `_lane_sums_by_matrix` multiplies with, to be made once."""
    return (
        _selector(0, GROUPS), _selector(1, GROUPS), _selector(2, GROUPS), _selector(3, GROUPS),
        _selector(4, GROUPS), _selector(5, GROUPS), _selector(6, GROUPS), _selector(7, GROUPS),
    )  # fmt: skip


@triton.jit
def _lane_sums_by_matrix(v, selectors):
    """(16, groups, 32) -> (4, groups, 32): row k of lane 4 i + q is the sum of row 4 q + k over lanes 4 i to 4 i + 3.

    By the matrix units, which round to tf32. Lane and register of a number say where it is in the first operand of
    m16n8k8: registers 0 and 2 are row lane / 4, columns lane % 4 and lane % 4 + 4; 1 and 3 the same eight rows below.
    The second operand of product q has ones in the first four rows of column 2 q and in the last four of 2 q + 1, so
    that its sums come to lie in the lanes 4 i + q, and adding up the four products puts them side by side.
    """
    first, second, third, fourth = _quarters(v.to(tl.int32, bitcast=True))
    v0, v1, v2, v3 = _quarters(first)
    v4, v5, v6, v7 = _quarters(second)
    v8, v9, v10, v11 = _quarters(third)
    v12, v13, v14, v15 = _quarters(fourth)
    c0, c1, c2, c3, c4, c5, c6, c7 = selectors
    s0, s1, s2, s3 = tl.inline_asm_elementwise(
        _QUAD_SUMS, "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, c0, c1, c2, c3, c4, c5, c6, c7],
        (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
    )  # fmt: skip
    return _stack(_stack(s0, s1), _stack(s2, s3))


@triton.jit
def _once(v, GROUPS: tl.constexpr):
    """v, (r, c), of which each of several groups computes a part of the rows.

    The maximum over one number changes nothing, but it is where the compiler stops: it would rather let every group
    compute all rows again than exchange them.
    """
    if GROUPS > 1:
        v = tl.max(v[:, :, None], 2)
    return v


@triton.jit
def _to_groups(v, GROUPS: tl.constexpr):
    """(r, c) -> (r, groups, c), handed to all groups once, for the same reason."""
    v = v[:, None, :]
    if GROUPS > 1:
        v = tl.max(v.broadcast_to(v.shape[0], GROUPS, v.shape[2])[:, :, :, None], 3)
    return v


@triton.jit
def _over_groups(v):
    """(r, groups, c) -> (r, c), the sum over the groups."""
    if v.shape[1] == 1:
        total = v.reshape(v.shape[0], v.shape[2])
    else:
        first, last = tl.split(v.reshape(v.shape[0], v.shape[1] // 2, 2, v.shape[2]).permute(0, 1, 3, 2))
        total = _over_groups(first + last)
    return total


# ---------------------------------------------------------------- memory


@triton.jit
def _at(first, steps, stride, ALIGNED: tl.constexpr):
    """first + steps x stride; if ALIGNED, the stride is a multiple of so many elements, which makes loads wide."""
    return first + tl.multiple_of(steps * stride, ALIGNED)


@triton.jit
def _tile(pointer, start, near, stride_t, columns, inside, ALIGNED: tl.constexpr, other: tl.constexpr = 0.0):
    """A (CHUNK, channels) tile, `other` where it is not inside (channels, or both). columns: the channels' offsets.

    near: the rows, counted from token start and clamped to those that exist, so that tokens need no mask; what comes
    from beyond the end is cleared by the caller where it would count. If ALIGNED, a lane reads 16 bytes of a row at
    once; the tile then goes through shared memory to where it is needed.
    """
    rows = tl.multiple_of(near * stride_t, ALIGNED)
    pointers = (_at(pointer, start, stride_t, ALIGNED) + columns)[None, :] + rows[:, None]
    return tl.load(pointers, mask=inside if len(inside.shape) == 2 else inside[None, :], other=other)


@triton.jit
def _places(start, near, stride_t, d, ALIGNED: tl.constexpr):
    """The offsets of a (CHUNK, channels) tile that is written; arguments as in `_tile`."""
    return tl.multiple_of(near * stride_t, ALIGNED)[:, None] + _at(d, start, stride_t, ALIGNED)[None, :]


@triton.jit
def _by_lanes(tile):
    """The tile as float32, handed over to the lanes of its channels here.

    The maximum over one number changes nothing: it is where the compiler stops, see `_once`. It would rather compute
    with the tile where it lies, and exchange much more later.
    """
    return tl.max(tile[:, :, None], 2).to(tl.float32)


@triton.jit
def _prefetch(pointer):
    """Bring what the pointers point at to the L2 cache; changes no result."""
    if _PTX:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _prefetch_rows(row, d_state):
    """What the loop over the states of another chunk will read: its rows of B and C."""
    if _PTX:
        parts: tl.constexpr = _LANES // _SECTOR
        for first in range(0, d_state * parts, _LANES):
            _prefetch(row + tl.minimum(first + tl.arange(0, _LANES), d_state * parts - 1) * _SECTOR)


@triton.jit
def _sectors(first, d0, d_inner, d_state, WIDTH: tl.constexpr):
    """Of WIDTH sectors that the loop over the states will read, from number `first` on: where they begin in the rows of
    B and C, where in rows of channels, and the channel there. The last ones are repeated."""
    parts: tl.constexpr = _LANES // _SECTOR
    i = tl.minimum(first + tl.arange(0, WIDTH), d_state * parts - 1)
    channel = d0 + (i % parts) * _SECTOR
    return i * _SECTOR, (i // parts) * d_inner + channel, channel


@triton.jit
def _warm(first, row, states, A, carry, parameters, c, d0, d_inner, d_state, WIDTH: tl.constexpr):
    """Load one number of each of these sectors, to have it in the L1 cache.

    Loads in the loop are broadcasts of one row at a time, each too late to wait for L2. Returns a sum that must not be
    dropped, or the compiler drops the loads: see `_keep`. What is None is left out.
    """
    at, offset, channel = _sectors(first, d0, d_inner, d_state, WIDTH)
    total = tl.load(row + at) + tl.load(states + offset, mask=channel < tl.where(c > 0, d_inner, 0), other=0.0)
    if carry is not None:
        inside = channel < d_inner
        total += tl.load(A + offset, mask=inside, other=0.0) + tl.load(carry + offset, mask=inside, other=0.0)
        total += tl.load(parameters + offset, mask=inside, other=0.0)
    return total


@triton.jit
def _keep(pointer, total, length, WIDTH: tl.constexpr):
    """A store that never happens: length is positive, which the compiler cannot know."""
    i = tl.arange(0, WIDTH)
    tl.store(pointer + i, total, mask=i < -length)


@triton.jit
def _gradient(
    pointer, pointer2, stride_b, stride_t, b, d_inner, length, BOTH: tl.constexpr, ALIGNED: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Pointer and stride that walk through a gradient of this batch entry in the order of the scan; DENSE: without the
    strides."""
    pointer = _one_of(pointer, pointer2, BOTH)
    if DENSE:
        pointer = _at(pointer, b * length, d_inner, ALIGNED)
        stride_t = d_inner
    else:
        pointer = _at(pointer, b, stride_b, ALIGNED)
    return _from_start(pointer, stride_t, length, BOTH, ALIGNED)


@triton.jit
def _time_step(delta, bias, mask, SOFTPLUS: tl.constexpr, STOP: tl.constexpr):
    """The step size; with STOP, zero outside the mask: there the state passes unchanged (a = 1, x = 0)."""
    step = delta + bias[None, :]
    if SOFTPLUS:
        step = softplus(step)
    if STOP:
        step = tl.where(mask, step, 0.0)
    return step


# ---------------------------------------------------------------- kernels
# Axis 1 of every grid is the direction, if there are BOTH. A reversed scan is the same code with negative time strides,
# counted from the last token: `packed`, `states` and everything between the kernels are in the order of the scan.
# Names with a 2 are the reversed scan's.

_SIZES = ["batch", "d_inner", "d_state", "length", "chunks", "blocks"]


@triton.jit
def _direction(BOTH: tl.constexpr):
    """0, or 1 for a reversed scan: known at compile time where there is one direction, which saves registers."""
    direction = 0
    if BOTH:
        direction = tl.program_id(1)
    return direction


@triton.jit
def _one_of(forward, backward, BOTH: tl.constexpr):
    """The pointer of this program's direction."""
    pointer = forward
    if BOTH:
        pointer = tl.where(tl.program_id(1) == 0, forward, backward)
    return pointer


@triton.jit
def _from_start(pointer, stride_t, length, BOTH: tl.constexpr, ALIGNED: tl.constexpr = 1):
    """Pointer and stride that walk through time from the first token of the scan."""
    if BOTH:
        direction = tl.program_id(1)
        pointer = _at(pointer, direction * (length - 1).to(tl.int64), stride_t, ALIGNED)
        stride_t *= 1 - 2 * direction
    return pointer, stride_t


@triton.jit(do_not_specialize=[*_SIZES, "A_d", "A_n", "B_b", "B_t", "C_b", "C_t"])
def _prepare_kernel(
    A, A2, B, B2, C, C2, D, D2, bias, bias2, packed, rows,
    batch, d_inner, d_state, length, chunks,
    A_d, A_n, B_b, B_n, B_t, C_b, C_n, C_t,
    T: tl.constexpr, ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """What all programs of a scan share, as float32 in the order in which they read it.

    packed: (direction, batch, chunk, d_state, 2, T), B and C, zero past the end.
    rows: (direction, d_state + 2, d_inner), the columns of A, then D and bias, zero where there is none.
    """
    direction = _direction(BOTH)
    program = tl.program_id(0)
    if program < batch * chunks:
        first_B, step_B = _from_start(_one_of(B, B2, BOTH), B_t, length, BOTH)
        first_C, step_C = _from_start(_one_of(C, C2, BOTH), C_t, length, BOTH)
        b = (program // chunks).to(tl.int64)
        c = program % chunks
        t = tl.arange(0, T)
        token = c * T + t
        base = packed + ((direction * batch + b) * chunks + c) * d_state * (2 * T)
        for start in range(0, d_state, ROWS):
            n = start + tl.arange(0, ROWS)
            mask = (n < d_state)[:, None] & (token < length)[None, :]
            from_B = first_B + b * B_b + n[:, None] * B_n + token[None, :].to(tl.int64) * step_B
            from_C = first_C + b * C_b + n[:, None] * C_n + token[None, :].to(tl.int64) * step_C
            to = base + n[:, None] * (2 * T) + t[None, :]
            tl.store(to, tl.load(from_B, mask=mask, other=0.0).to(tl.float32), mask=(n < d_state)[:, None])
            tl.store(to + T, tl.load(from_C, mask=mask, other=0.0).to(tl.float32), mask=(n < d_state)[:, None])
    else:
        d = (program - batch * chunks) * _LANES + tl.arange(0, _LANES)
        inside = d < d_inner
        column = _one_of(A, A2, BOTH) + d * A_d
        to = rows + direction * (d_state + 2) * d_inner + d
        for n in range(d_state):
            tl.store(to + n * d_inner, tl.load(column + n * A_n, mask=inside, other=0.0), mask=inside)
        skip = tl.zeros([_LANES], tl.float32)
        shift = tl.zeros([_LANES], tl.float32)
        if D is not None:
            skip = tl.load(_one_of(D, D2, BOTH) + d, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            shift = tl.load(_one_of(bias, bias2, BOTH) + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(to + d_state * d_inner, skip, mask=inside)
        tl.store(to + (d_state + 1) * d_inner, shift, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "dB_b", "dB_t", "dC_b", "dC_t"])
def _finish_kernel(
    partial, parameters, dA, dA2, dB, dB2, dC, dC2, dD, dD2, dbias, dbias2,
    batch, d_inner, d_state, length, chunks, blocks, dB_b, dB_t, dC_b, dC_t,
    T: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr, MATRIX: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Add what the programs of backward left, in a fixed order.

    parameters (direction, batch, d_state + 2, d_inner) over the batch: dA (d_inner, d_state), dD, dbias (d_inner,).
    partial (direction, batch, chunk, d_state, blocks, 2, T) over the blocks: dB, dC (batch, length, d_state), whose
    states lie next to each other.
    """
    direction = _direction(BOTH)
    sums = (d_state + 2) * blocks  # programs that add parameters; they are the slow ones, so they come first
    program = tl.program_id(0)
    if program < sums:
        n = program // blocks
        d = (program % blocks) * _LANES + tl.arange(0, _LANES)
        inside = d < d_inner
        entry = tl.arange(0, ENTRIES)
        slot = (d_state + 2) * d_inner
        share = parameters + direction * batch.to(tl.int64) * slot + n * d_inner
        total = tl.zeros([ENTRIES, _LANES], tl.float32)
        for start in range(0, batch, ENTRIES):
            b = start + entry
            mask = (b < batch)[:, None] & inside[None, :]
            total += tl.load(share + (b.to(tl.int64) * slot)[:, None] + d[None, :], mask=mask, other=0.0)
        shares = tl.sum(total, 0)
        if n < d_state:
            tl.store(_one_of(dA, dA2, BOTH) + d * d_state + n, shares, mask=inside)
        if dD is not None:
            tl.store(_one_of(dD, dD2, BOTH) + d, shares, mask=d < tl.where(n == d_state, d_inner, 0))
        if dbias is not None:
            tl.store(_one_of(dbias, dbias2, BOTH) + d, shares, mask=d < tl.where(n == d_state + 1, d_inner, 0))
    else:
        b = ((program - sums) // chunks).to(tl.int64)
        c = (program - sums) % chunks
        column = tl.arange(0, 2 * T)
        row = column % T  # of the tile whose sum is in this column
        if MATRIX:
            row = column % 4 * 4 + column // 4 % 4
        token = c * T + row
        time = tl.where(direction == 0, token, length - 1 - token)
        first = partial + ((direction * batch + b) * chunks + c) * d_state * blocks * (2 * T)
        dB = _one_of(dB, dB2, BOTH) + b * dB_b
        dC = _one_of(dC, dC2, BOTH) + b * dC_b
        for start in range(0, d_state, ROWS):
            n = start + tl.arange(0, ROWS)
            inside = (n < d_state)[:, None]
            total = tl.zeros([ROWS, 2 * T], tl.float32)
            for k in range(blocks):
                offset = (n[:, None] * blocks + k) * (2 * T) + column[None, :]
                total += tl.load(first + offset, mask=inside, other=0.0)
            mask = inside & (token < length)[None, :]
            to_B, to_C = time[None, :] * dB_t + n[:, None], time[None, :] * dC_t + n[:, None]
            tl.store(dB + to_B, total.to(dB.dtype.element_ty), mask=mask & (column < T)[None, :])
            tl.store(dC + to_C, total.to(dC.dtype.element_ty), mask=mask & (column >= T)[None, :])


@triton.jit(do_not_specialize=[*_SIZES, "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t"])
def _forward_kernel(
    u, u2, delta, delta2, z, z2, out, out2, packed, rows, states, last,
    batch, d_inner, d_state, length, chunks,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, BOTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One batch entry, 32 channels, one warp for each of GROUPS equal shares of the states. z and last may be None.

    states: (direction, batch, chunks - 1, d_state, d_inner), the state after every chunk but the last; without KEEP
    one slot.
    """
    blocks = tl.cdiv(d_inner, _LANES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    direction = _direction(BOTH)
    entry = direction * batch + b
    d0 = (tl.program_id(0) % blocks) * _LANES
    zero = tl.program_id(2)  # the grid has two axes, which the compiler does not know: see `limit`
    d = d0 + tl.arange(0, _LANES)
    wide = d.to(tl.int64)
    limit = tl.multiple_of(d_inner + zero, ALIGNED)  # a hint on an argument is ignored, on a sum it is not
    inside = d < limit
    t = tl.arange(0, _CHUNK)
    slot = d_state * d_inner
    rows += direction * (slot + 2 * d_inner)
    skip = tl.load(rows + slot + d, mask=inside, other=0.0)
    shift = tl.load(rows + slot + d_inner + d, mask=inside, other=0.0)
    u, u_t = _from_start(_at(_one_of(u, u2, BOTH), b, u_b, ALIGNED), u_t, length, BOTH, ALIGNED)
    delta, delta_t = _from_start(_at(_one_of(delta, delta2, BOTH), b, delta_b, ALIGNED), delta_t, length, BOTH, ALIGNED)
    if z is not None:
        z, z_t = _from_start(_at(_one_of(z, z2, BOTH), b, z_b, ALIGNED), z_t, length, BOTH, ALIGNED)
    out = _at(_one_of(out, out2, BOTH), b * length, d_inner, ALIGNED)
    out, out_t = _from_start(out, d_inner, length, BOTH, ALIGNED)
    packed += entry * chunks * d_state * _LANES
    states += entry * slot * ((chunks - 1) if KEEP else 1)
    if last is not None:
        last += entry * slot
    touched = tl.zeros([_LANES], tl.float32)
    group = tl.arange(0, GROUPS)
    shares = d_state // GROUPS

    near = tl.minimum(t, length - 1)
    u_next = _tile(u, 0, near, u_t, wide * u_d, inside, ALIGNED)
    delta_next = _tile(delta, 0, near, delta_t, wide * delta_d, inside, ALIGNED)

    for i in range(chunks):
        c = i + tl.zeros([], tl.int32)  # a tensor also in the interpreter
        start = (c * _CHUNK).to(tl.int64)
        rest = length - c * _CHUNK  # tokens from here to the end
        near = tl.minimum(t, rest - 1)
        mask = (t < rest)[:, None] & inside[None, :]
        row = packed + c.to(tl.int64) * d_state * _LANES
        before = states + (c - 1).to(tl.int64) * (slot if KEEP else 0)
        after = states + c.to(tl.int64) * (slot if KEEP else 0)
        earlier = d < tl.where(c > 0, limit, 0)
        later = d < tl.where(c < chunks - 1, limit, 0)
        final = d < tl.where(c == chunks - 1, d_inner, 0)
        for first in range(0, d_state * (_LANES // _SECTOR), _LANES):
            touched += _warm(first, row, before, None, None, None, c, d0, d_inner, d_state, _LANES)
        u_tile = u_next.to(tl.float32)  # where they lie: both warps exchange the steps, not the tiles, see `_once`
        delta_tile = delta_next.to(tl.float32)
        if z is not None:
            gate = _tile(z, start, near, z_t, wide * z_d, inside, ALIGNED)
        if c < chunks - 1:
            _prefetch_rows(row + d_state * _LANES, d_state)
        # Asked for now, waited for in the next chunk.
        ahead = tl.minimum(t, rest - _CHUNK - 1)
        u_next = _tile(u, start + _CHUNK, ahead, u_t, wide * u_d, later, ALIGNED)
        delta_next = _tile(delta, start + _CHUNK, ahead, delta_t, wide * delta_d, later, ALIGNED)
        step = _once(_time_step(delta_tile, shift, mask, SOFTPLUS, last is not None), GROUPS)
        drive = _to_groups(step * u_tile, GROUPS)
        exponent = _to_groups(step, GROUPS)
        y = tl.zeros([_CHUNK, GROUPS, _LANES], tl.float32)
        for k in range(shares):
            n = k + group * shares
            at = (n * d_inner)[:, None] + d[None, :]
            h = tl.load(before + at, mask=earlier[None, :], other=0.0)[None, :, :]
            A_n = tl.load(rows + at, mask=inside[None, :], other=0.0)[None, :, :]
            B_n = tl.load(row + t[:, None] + (n * _LANES)[None, :])[:, :, None]
            C_n = tl.load(row + _CHUNK + t[:, None] + (n * _LANES)[None, :])[:, :, None]
            a = tl.exp2(exponent * (A_n * LOG2E))
            h, _carried, end = _scan(a, drive * B_n, h, False)
            y += h * C_n
            end = end.reshape(GROUPS, _LANES)
            tl.store(after + at, end, mask=later[None, :])
            if last is not None:
                tl.store(last + at, end, mask=final[None, :])
        y = _over_groups(y) + skip[None, :] * u_tile
        if z is not None:
            gate = gate.to(tl.float32)
            y *= gate * sigmoid(gate)
        to = (_at(out, start, out_t, ALIGNED) + d)[None, :] + tl.multiple_of(near * out_t, ALIGNED)[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next chunk reads the states written here
    _keep(packed, touched, length, _LANES)


@triton.jit
def _store_shares(sums, n, share_B, share_C, blocks):
    """A program's share of row n (groups,) of dB and dC, from the lanes' sums. After `_lane_sums` one row is left.

    A row may be stored twice, in order: each group stores its own rows only, so always from the same warp.
    """
    to = (n * blocks * _LANES)[:, None] + tl.arange(0, _LANES)[None, :]
    shares = _lane_sums(_exchange(share_B, share_C, _CHUNK), 4)
    tl.store(sums + to, shares.reshape(shares.shape[1], _LANES))


_GRADIENTS = ["ddelta_b", "ddelta_t", "dz_b", "dz_t"]


@triton.jit(
    do_not_specialize=[*_SIZES, "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t", "dout_b", "dout_t", *_GRADIENTS]
)
def _backward_kernel(
    u, u2, delta, delta2, z, z2, dout, dout2, du, du2, ddelta, ddelta2, dz, dz2,
    packed, rows, states, carry, parameters, partial,
    batch, d_inner, d_state, length, chunks,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, z_b, z_d, z_t, dout_b, dout_d, dout_t,
    ddelta_b, ddelta_t, dz_b, dz_t,
    SOFTPLUS: tl.constexpr, LAST: tl.constexpr, MATRIX: tl.constexpr, GROUPS: tl.constexpr, BOTH: tl.constexpr,
    ALIGNED: tl.constexpr, MANY: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """The same program backwards: chunks from the last to the first, states recomputed inside each from `states`.

    carry: (direction, batch, d_state, d_inner), a_t dLoss/dh_t at a chunk's start, handed to the chunk before; with
    LAST it comes filled with the gradient of the last state. parameters: (direction, batch, d_state + 2, d_inner), the
    batch entry's share of dA (by rows), dD and dbias. partial: (direction, batch, chunks, d_state, blocks, 2, CHUNK),
    the program's share of dB and dC. MATRIX: see `_lane_sums_by_matrix`. MANY: there are more states than one call of
    `_warm` reaches; without it, it is no loop, and the tiles are made ready while its loads are under way. ALIKE:
    ddelta and dz are dense, as du is, so that all three lie alike; else their strides count.
    """
    blocks = tl.cdiv(d_inner, _LANES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    direction = _direction(BOTH)
    entry = direction * batch + b
    block = tl.program_id(0) % blocks
    d0 = block * _LANES
    zero = tl.program_id(2)  # the grid has two axes, which the compiler does not know: see `limit`, `again`
    d = d0 + tl.arange(0, _LANES)
    wide = d.to(tl.int64)
    limit = tl.multiple_of(d_inner + zero, ALIGNED)  # a hint on an argument is ignored, on a sum it is not
    inside = d < limit
    t = tl.arange(0, _CHUNK)
    slot = d_state * d_inner
    rows += direction * (slot + 2 * d_inner)
    skip = tl.load(rows + slot + d, mask=inside, other=0.0)
    shift = tl.load(rows + slot + d_inner + d, mask=inside, other=0.0)
    u, u_t = _from_start(_at(_one_of(u, u2, BOTH), b, u_b, ALIGNED), u_t, length, BOTH, ALIGNED)
    delta, delta_t = _from_start(_at(_one_of(delta, delta2, BOTH), b, delta_b, ALIGNED), delta_t, length, BOTH, ALIGNED)
    dout, dout_t = _from_start(_at(_one_of(dout, dout2, BOTH), b, dout_b, ALIGNED), dout_t, length, BOTH, ALIGNED)
    du, du_t = _gradient(du, du2, 0, 0, b, d_inner, length, BOTH, ALIGNED, True)
    ddelta, ddelta_t = _gradient(ddelta, ddelta2, ddelta_b, ddelta_t, b, d_inner, length, BOTH, ALIGNED, ALIKE)
    if z is not None:
        z, z_t = _from_start(_at(_one_of(z, z2, BOTH), b, z_b, ALIGNED), z_t, length, BOTH, ALIGNED)
        dz, dz_t = _gradient(dz, dz2, dz_b, dz_t, b, d_inner, length, BOTH, ALIGNED, ALIKE)
    packed += entry * chunks * d_state * _LANES
    partial += entry * chunks * d_state * blocks * _LANES + block * _LANES
    states += entry * (chunks - 1) * slot
    carry += entry * slot
    parameters += entry * (slot + 2 * d_inner)
    touched = tl.zeros([2 * _LANES], tl.float32)
    sum_D = tl.zeros([_LANES], tl.float32)
    sum_bias = tl.zeros([_LANES], tl.float32)
    one = tl.full([1, GROUPS, _LANES], 1.0, tl.float32)
    selectors = _selectors(GROUPS)
    group = tl.arange(0, GROUPS)
    shares = d_state // GROUPS

    # Past the end a step must be 0: with another, h could overflow there and make NaN of the sums over tokens. softplus
    # of -inf is 0; without softplus `_time_step` masks. The other chunks are full.
    start = ((chunks - 1) * _CHUNK).to(tl.int64)
    rest = length - (chunks - 1) * _CHUNK
    near = tl.minimum(t, rest - 1)
    tokens = (t < rest)[:, None] & inside[None, :]
    u_next = _tile(u, start, near, u_t, wide * u_d, inside, ALIGNED)
    delta_next = _tile(delta, start, near, delta_t, wide * delta_d, tokens, ALIGNED, float("-inf") if SOFTPLUS else 0.0)
    dout_next = _tile(dout, start, near, dout_t, wide * dout_d, inside, ALIGNED)
    if z is not None:
        z_next = _tile(z, start, near, z_t, wide * z_d, inside, ALIGNED)

    for i in range(chunks):
        c = chunks - 1 - i
        start = (c * _CHUNK).to(tl.int64)
        rest = length - c * _CHUNK
        mask = (t < rest)[:, None] & inside[None, :]
        row = packed + c.to(tl.int64) * d_state * _LANES
        before = states + (c - 1).to(tl.int64) * slot
        sums = partial + c.to(tl.int64) * d_state * blocks * _LANES
        earlier = d < tl.where(c > 0, limit, 0)
        later = d < tl.where(c < chunks - 1, limit, 0)
        resumed = inside if LAST else later
        u_tile = _by_lanes(u_next)
        delta_tile = _by_lanes(delta_next)
        dy = _by_lanes(dout_next)
        if z is not None:
            gate = _by_lanes(z_next)
            dy *= gate * sigmoid(gate)
        warm = _warm(0, row, before, rows, carry, parameters, c, d0, d_inner, d_state, 2 * _LANES)
        step = _once(_time_step(delta_tile, shift, mask, SOFTPLUS, not SOFTPLUS), GROUPS)
        dy = _once(tl.where(mask, dy, 0.0), GROUPS)
        drive = _to_groups(step * u_tile, GROUPS)
        exponent = _to_groups(step, GROUPS)
        d_out = _to_groups(dy, GROUPS)
        y = tl.zeros([_CHUNK, GROUPS, _LANES], tl.float32)
        d_drive = tl.zeros([_CHUNK, GROUPS, _LANES], tl.float32)  # with respect to step * u
        d_step = tl.zeros([_CHUNK, GROUPS, _LANES], tl.float32)  # with respect to step, through the decay alone
        share_B = tl.zeros([_SHARES if MATRIX else 1, GROUPS, _LANES], tl.float32)
        share_C = share_B
        touched += warm
        if MANY:
            for first in range(2 * _LANES, d_state * (_LANES // _SECTOR), 2 * _LANES):
                touched += _warm(first, row, before, rows, carry, parameters, c, d0, d_inner, d_state, 2 * _LANES)
        for k in range(shares):
            n = k + group * shares
            at = (n * d_inner)[:, None] + d[None, :]
            h = tl.load(before + at, mask=earlier[None, :], other=0.0)[None, :, :]
            ag = tl.load(carry + at, mask=resumed[None, :], other=0.0)[None, :, :]
            dA = tl.load(parameters + at, mask=later[None, :], other=0.0)
            A_n = tl.load(rows + at, mask=inside[None, :], other=0.0)[None, :, :]
            B_n = tl.load(row + t[:, None] + (n * _LANES)[None, :])[:, :, None]
            C_n = tl.load(row + _CHUNK + t[:, None] + (n * _LANES)[None, :])[:, :, None]
            a = tl.exp2(exponent * (A_n * LOG2E))
            # The state before: these exchanges take long and nothing waits for them.
            _store_shares(sums, tl.maximum(k - 1, 0) + group * shares, share_B, share_C, blocks)
            h, carried, _end = _scan(a, drive * B_n, h, True)
            if z is not None:
                y += h * C_n
            share_C = _lane_sums_by_matrix(d_out * h, selectors) if MATRIX else _lane_sums(d_out * h, 1)
            g, a_first, g_first = _scan_back(a, d_out * C_n, one, ag)
            tl.store(carry + at, (a_first * g_first).reshape(GROUPS, _LANES), mask=inside[None, :])
            d_drive += g * B_n
            d_exponent = g * carried
            d_step += d_exponent * A_n
            dA += tl.sum(d_exponent * exponent, 0)
            tl.store(parameters + at, dA, mask=inside[None, :])
            share_B = _lane_sums_by_matrix(g * drive, selectors) if MATRIX else _lane_sums(g * drive, 1)
        _store_shares(sums, shares - 1 + group * shares, share_B, share_C, blocks)

        # The registers were needed for other things: read the inputs again, from the cache. Their addresses too are
        # computed again, which the compiler would not do (it would spill them) if it knew that `zero` is zero.
        again = tl.minimum(t, rest - 1 + zero)
        u_tile = _tile(u, start, again, u_t, wide * u_d, inside, ALIGNED)
        if SOFTPLUS:
            delta_tile = _tile(delta, start, again, delta_t, wide * delta_d, inside, ALIGNED)
        if z is not None:
            gate = _tile(z, start, again, z_t, wide * z_d, inside, ALIGNED)
            grad = _tile(dout, start, again, dout_t, wide * dout_d, inside, ALIGNED)
        # Those of the next chunk are asked for now and waited for there.
        begin = tl.maximum(start - _CHUNK, 0)
        u_next = _tile(u, begin, t, u_t, wide * u_d, earlier, ALIGNED)
        delta_next = _tile(delta, begin, t, delta_t, wide * delta_d, earlier, ALIGNED)
        dout_next = _tile(dout, begin, t, dout_t, wide * dout_d, earlier, ALIGNED)
        if z is not None:
            z_next = _tile(z, begin, t, z_t, wide * z_d, earlier, ALIGNED)
        u_tile = _by_lanes(u_tile)  # after all loads: each of these waits for its own
        d_drive_tile = _over_groups(d_drive)
        d_delta = _over_groups(d_step) + d_drive_tile * u_tile
        to = _places(start, again, du_t, d, ALIGNED)
        if z is not None:
            gate = _by_lanes(gate)
            grad = _by_lanes(grad)
            opened = sigmoid(gate)
            y_tile = _over_groups(y) + skip[None, :] * u_tile
            d_gate = grad * y_tile * opened * (1.0 + gate * (1.0 - opened))
            to_z = to if ALIKE else _places(start, again, dz_t, d, ALIGNED)
            tl.store(dz + to_z, d_gate.to(dz.dtype.element_ty), mask=mask)
        if SOFTPLUS:
            d_delta *= sigmoid(_by_lanes(delta_tile) + shift[None, :])
        to_delta = to if ALIKE else _places(start, again, ddelta_t, d, ALIGNED)
        tl.store(ddelta + to_delta, d_delta.to(ddelta.dtype.element_ty), mask=mask)
        tl.store(du + to, (d_drive_tile * step + skip[None, :] * dy).to(du.dtype.element_ty), mask=mask)
        sum_D += tl.sum(dy * u_tile, 0)
        if LAST:  # else it is zero there: no gradient comes from beyond the end, and the states are finite
            d_delta = tl.where(mask, d_delta, 0.0)
        sum_bias += tl.sum(d_delta, 0)
        tl.debug_barrier()  # the next chunk reads carry and parameters

    tl.store(parameters + slot + d, sum_D, mask=inside)
    tl.store(parameters + slot + d_inner + d, sum_bias, mask=inside)
    _keep(packed, touched, length, 2 * _LANES)


# ---------------------------------------------------------------- operators


def _rows(d_state: int) -> int:
    return max(2, min(16, triton.next_power_of_2(d_state)))


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _rows_of(t: Tensor | None) -> tuple[int, int]:
    """Of a gradient with contiguous channels: the strides of the batch and of time."""
    return (0, 0) if t is None else (t.stride(0), t.stride(2))


def _dense_rows(*gradients: Tensor | None) -> bool:
    """Whether these (batch, channels, length) tensors with contiguous channels have nothing between their rows."""
    return all(t is None or t.transpose(1, 2).is_contiguous() for t in gradients)


def _channels_last(like: Tensor) -> Tensor:
    """An empty (batch, channels, length) tensor of the same type whose channels are contiguous."""
    batch, channels, length = like.shape
    return like.new_empty((batch, length, channels)).transpose(1, 2)


def _dense(t: Tensor) -> Tensor:
    """With contiguous channels."""
    return _channels_last(t).copy_(t) if t.ndim == 3 else t.contiguous()


def _aligned(p: ScanInputs, *more: Tensor | None) -> int:
    """8 if rows of every sequence start at multiples of so many elements (16 bytes, or more), else 1."""
    sequences = (p.u, p.delta, p.z, *more)
    strides = (p.u.shape[1], *(s for t in sequences if t is not None for s in (t.stride(0), t.stride(2))))
    return 1 if any(s % 8 for s in strides) else 8


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    return NVIDIA and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _schedulers(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _groups(programs: int, d_state: int, device: torch.device) -> tuple[int, int]:
    """Warps for each program of forward and of backward, as measured (docs/scan-notes.md).

    Two cost forward nothing. Backward is slower with two, unless it has the chip to itself.
    """
    if d_state % 2:
        return 1, 1
    return 2, 2 if programs <= _schedulers(device) else 1


def _pair(tensors: Sequence[Tensor], given: Sequence[bool]) -> tuple[ScanInputs, ScanInputs, int]:
    """The forward scan, the reversed one with the same strides, and how many there are.

    Without a reversed scan the forward one stands in for it; nothing looks at it.
    """
    scans = unpack(tensors, given)
    one, two, directions = scans[0], scans[-1], len(scans)
    for name in ScanInputs._fields:
        a, b = getattr(one, name), getattr(two, name)
        if a is not None and (a.stride() != b.stride() or a.ndim == 1):
            one, two = one._replace(**{name: _dense(a)}), two._replace(**{name: _dense(b)})
    return one, two, directions


def _sizes(p: ScanInputs) -> tuple[int, int, int, int, int]:
    """batch, d_inner, d_state, length and the number of chunks."""
    batch, d_inner, length = p.u.shape
    return batch, d_inner, p.A.shape[1], length, (length + CHUNK - 1) // CHUNK


def _states_shape(p: ScanInputs, directions: int, keep: bool) -> tuple[int, int, int, int, int]:
    batch, d_inner, d_state, _, chunks = _sizes(p)
    return directions, batch, chunks - 1 if keep else 0, d_state, d_inner


def _last_shape(p: ScanInputs, last_state: bool) -> tuple[int, int, int]:
    return p.u.shape[0] if last_state else 0, p.A.shape[1], p.A.shape[0]


def _shared_shapes(p: ScanInputs, directions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `packed` and `rows`."""
    batch, d_inner, d_state, _, chunks = _sizes(p)
    return (directions, batch, chunks, d_state, 2, CHUNK), (directions, d_state + 2, d_inner)


@torch.library.custom_op("mamba_forge::selective_scan", mutates_args=())
def _selective_scan(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One scan, or two: the second goes from the last token to the first.

    Returns out, out2 (empty without a second direction), the last state (empty unless `last_state`) and what backward
    needs: the checkpoints (no slots unless `keep`), `packed` and `rows`.
    """
    return launch_forward(*_pair(tensors, given), delta_softplus, keep, last_state)


def launch_forward(
    p: ScanInputs, q: ScanInputs, directions: int, delta_softplus: bool, keep: bool, last_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_selective_scan`, for operators that a scan is a part of. q: the reversed scan, or p again."""
    u = p.u
    batch, d_inner, d_state, length, chunks = _sizes(p)
    blocks = triton.cdiv(d_inner, LANES)
    out = _channels_last(u)
    out2 = _channels_last(u) if directions == 2 else u.new_empty(0)
    states, packed, rows = empty_kept(p, directions, keep)
    last = u.new_empty(_last_shape(p, last_state), dtype=torch.float32)
    slots = states if keep else u.new_empty((directions, batch, d_state, d_inner), dtype=torch.float32)
    with device_of(u):
        _prepare_kernel[(batch * chunks + blocks, directions)](
            p.A, q.A, p.B, q.B, p.C, q.C, p.D, q.D, p.delta_bias, q.delta_bias, packed, rows,
            batch, d_inner, d_state, length, chunks,
            *p.A.stride(), *p.B.stride(), *p.C.stride(),
            T=CHUNK, ROWS=_rows(d_state), BOTH=directions == 2, num_warps=1,
        )  # fmt: skip
        groups, _ = _groups(batch * blocks * directions, d_state, u.device)
        _forward_kernel[(batch * blocks, directions)](
            p.u, q.u, p.delta, q.delta, p.z, q.z, out, out2 if directions == 2 else out,
            packed, rows, slots, last if last_state else None,
            batch, d_inner, d_state, length, chunks,
            *p.u.stride(), *p.delta.stride(), *_strides(p.z),
            SOFTPLUS=delta_softplus, KEEP=keep, GROUPS=groups, BOTH=directions == 2,
            ALIGNED=_aligned(p), num_warps=groups, enable_fp_fusion=True, **FORWARD_OPTIONS,
        )  # fmt: skip
    return out, out2, last.transpose(1, 2), states, packed, rows


@_selective_scan.register_fake
def _(
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    delta_softplus: bool,
    keep: bool,
    last_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scans = unpack(tensors, given)
    p, directions = scans[0], len(scans)
    last = p.u.new_empty(_last_shape(p, last_state), dtype=torch.float32)
    out2 = _channels_last(p.u) if directions == 2 else p.u.new_empty(0)
    return _channels_last(p.u), out2, last.transpose(1, 2), *empty_kept(p, directions, keep)


def empty_kept(p: ScanInputs, directions: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what is kept for backward: states, packed, rows."""
    shapes = (_states_shape(p, directions, keep), *_shared_shapes(p, directions))
    states, packed, rows = (p.u.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return states, packed, rows


def _gradients(p: ScanInputs) -> ScanInputs:
    """Empty tensors for the gradients of one direction, each in its tensor's type."""
    return ScanInputs(
        _channels_last(p.u),
        _channels_last(p.delta),
        p.A.new_empty(p.A.shape),
        _channels_last(p.B),
        _channels_last(p.C),
        None if p.D is None else p.D.new_empty(p.D.shape),
        None if p.z is None else _channels_last(p.z),
        None if p.delta_bias is None else p.delta_bias.new_empty(p.delta_bias.shape),
    )


@torch.library.custom_op("mamba_forge::selective_scan_backward", mutates_args=())
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
    p, q, directions = _pair(tensors, given)
    grads = [_gradients(one) for one in (p, q)[:directions]]
    launch_backward(dout, dout2, d_last, p, q, kept, delta_softplus, grads)
    return pack(*grads)[0]


def launch_backward(
    dout: Tensor,
    dout2: Tensor | None,
    d_last: Tensor | None,
    p: ScanInputs,
    q: ScanInputs,
    kept: Sequence[Tensor],
    delta_softplus: bool,
    gradients: Sequence[ScanInputs],
) -> None:
    """Write the gradients of the scans, one or two, for operators that a scan is a part of.

    Each is a tensor or part of a larger one: those of u are (batch, d_inner, length) with dense rows of channels, those
    of delta, z, B and C the same with rows at any distance, which is one for both directions.
    """
    directions, grads, grads2 = len(gradients), gradients[0], gradients[-1]
    u, (states, packed, rows) = p.u, kept
    batch, d_inner, d_state, length, chunks = _sizes(p)
    blocks = triton.cdiv(d_inner, LANES)
    if dout2 is None:
        dout2 = dout
    elif dout2.stride() != dout.stride():
        dout, dout2 = (_channels_last(t).copy_(t) for t in (dout, dout2))
    carry = u.new_empty((directions, batch, d_state, d_inner), dtype=torch.float32)
    if d_last is not None:
        carry[0].copy_(d_last.transpose(1, 2))
    parameters = u.new_empty((directions, batch, d_state + 2, d_inner), dtype=torch.float32)
    partial = u.new_empty((directions, batch, chunks, d_state, blocks, 2, CHUNK), dtype=torch.float32)
    _, groups = _groups(batch * blocks * directions, d_state, u.device)
    many = d_state > WARMED or directions == 2  # two directions have no registers to spare: measured faster as a loop
    matrix = _has_tf32(u.device) and torch.float32 not in (p.B.dtype, p.C.dtype)
    with device_of(u):
        _backward_kernel[(batch * blocks, directions)](
            p.u, q.u, p.delta, q.delta, p.z, q.z, dout, dout2,
            grads.u, grads2.u, grads.delta, grads2.delta, grads.z, grads2.z,
            packed, rows, states, carry, parameters, partial,
            batch, d_inner, d_state, length, chunks,
            *p.u.stride(), *p.delta.stride(), *_strides(p.z), *dout.stride(),
            *_rows_of(grads.delta), *_rows_of(grads.z),
            SOFTPLUS=delta_softplus, LAST=d_last is not None, MATRIX=matrix, GROUPS=groups, BOTH=directions == 2,
            ALIGNED=_aligned(p, dout, grads.delta, grads.z), MANY=many, ALIKE=_dense_rows(grads.delta, grads.z),
            num_warps=groups, enable_fp_fusion=True,
        )  # fmt: skip
        _finish_kernel[((d_state + 2) * blocks + batch * chunks, directions)](
            partial, parameters, grads.A, grads2.A, grads.B, grads2.B, grads.C, grads2.C,
            grads.D, grads2.D, grads.delta_bias, grads2.delta_bias,
            batch, d_inner, d_state, length, chunks, blocks, *_rows_of(grads.B), *_rows_of(grads.C),
            T=CHUNK, ROWS=_rows(d_state), BOTH=directions == 2, ENTRIES=64, MATRIX=matrix, num_warps=4,
        )  # fmt: skip


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
    return pack(*map(_gradients, unpack(tensors, given)))[0]


make_differentiable(_selective_scan, _selective_scan_backward)


def _check(tensors: Sequence[Tensor | None]) -> bool:
    """Whether gradients are wanted; raises for what the kernels do not take."""
    for t in tensors:
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"the triton scan takes float32, bfloat16 and float16, got {t.dtype}: use backend='auto'")
        if t is not None and not (t.is_cuda or INTERPRETED):
            raise ValueError(f"the triton scan needs tensors on a GPU, got {t.device}: use backend='auto'")
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    """Arguments as in `mamba.ops.scan.selective_scan`; tensors may differ in type, as under autocast.

    Differentiable once in every tensor, also through the last state. Deterministic. One graph node under
    `torch.compile`, forward and backward. Without gradients nothing is kept.

    Raises:
        TypeError: an input is not float32, bfloat16 or float16.
        ValueError: the tensors are not on a GPU.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    keep = _check(tensors)
    out, _, last, *_ = _selective_scan(*pack(tensors), delta_softplus, keep, return_last_state)
    return (out, last) if return_last_state else out


def bidirectional_scan_triton(forward: ScanInputs, backward: ScanInputs, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Both directions in one launch of each kernel. Else as `selective_scan_triton`.

    `backward` takes the types of `forward`; a sequence whose strides differ from those of its partner is copied.
    """
    alike = [b if a is None or b is None else b.to(a.dtype) for a, b in zip(forward, backward, strict=True)]
    keep = _check([*forward, *alike])
    out, out2, *_ = _selective_scan(*pack(forward, alike), delta_softplus, keep, False)
    return out, out2

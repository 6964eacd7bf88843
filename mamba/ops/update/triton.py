"""Clipping, AdamW and the weights' moving average over all parameters in two kernel launches.

torch's fused AdamW takes one learning rate a call, and layer-wise rates make 51 groups of mamba_small; each call fills
a fraction of a GPU for 20 us. Here a table says where every parameter, gradient, moment and average lies and which rate
and decay it has; one program takes `BLOCK` elements of one of them. Rate, norm and verdict are read from device memory,
so the launches can be recorded in a CUDA graph and serve every later step.

The reference is `torch.optim.AdamW`, `clip_grad_norm_` and `Average.update`, which other devices use. The optimizer's
own state is worked on in place: a checkpoint cannot tell the two apart. Muon's matrices are clipped by the same norm
and moved by `MatrixUpdate`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba.ops.update.average import Average
from mamba.ops.update.muon import Muon

BLOCK = 4096


@triton.jit
def _squares_kernel(grads, owner, start, numel, partial, BLOCK: tl.constexpr):
    """The sum of squares of a block of one gradient; 0 where there is no gradient."""
    t = tl.load(owner + tl.program_id(0))
    at = tl.load(start + tl.program_id(0)) + tl.arange(0, BLOCK)
    address = tl.load(grads + t)
    inside = at < tl.where(address != 0, tl.load(numel + t), 0)
    g = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def _update_kernel(
    weights, grads, firsts, seconds, averages, scales, decays, owner, start, numel, scalars, beta1, beta2, eps,
    BLOCK: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    t = tl.load(owner + tl.program_id(0))
    at = tl.load(start + tl.program_id(0)) + tl.arange(0, BLOCK)
    address = tl.load(grads + t)
    inside = at < tl.where(tl.load(scalars) != 0, tl.load(numel + t), 0)
    lr = tl.load(scalars + 1) * tl.load(scales + t)
    clip, correction1, correction2 = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4)

    weight = tl.load(weights + t).to(tl.pointer_type(tl.float32)) + at
    p = tl.load(weight, mask=inside, other=0.0)
    if address != 0:
        first = tl.load(firsts + t).to(tl.pointer_type(tl.float32)) + at
        second = tl.load(seconds + t).to(tl.pointer_type(tl.float32)) + at
        g = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0) * clip
        m = tl.load(first, mask=inside, other=0.0)
        v = tl.load(second, mask=inside, other=0.0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * tl.load(decays + t) * p
        p -= lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
        tl.store(first, m, mask=inside)
        tl.store(second, v, mask=inside)
        tl.store(weight, p, mask=inside)
    if AVERAGE:
        average = tl.load(averages + t).to(tl.pointer_type(tl.float32)) + at
        a = tl.load(average, mask=inside, other=0.0)
        tl.store(average, a + tl.load(scalars + 5) * (p - a), mask=inside)


class FusedUpdate:
    """The optimizer step of `optimizer` and the update of `average`, made for float32 parameters.

    Make it after their state was restored: it keeps the addresses. A step is `norm()`, then `apply()`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, average: Average | None, clip: float | None) -> None:
        self.matrices = optimizer.matrices() if isinstance(optimizer, Muon) else None
        mine: list[Tensor] = []
        scales, decays = [], []
        for group in optimizer.param_groups:
            if not group.get("muon"):
                mine += group["params"]
                scales += [group["lr_scale"]] * len(group["params"])
                decays += [group["weight_decay"]] * len(group["params"])
        self.params = mine + (self.matrices.params if self.matrices else [])  # the norm is that of all
        self.device = self.params[0].device
        self.clip, self.average = clip or math.inf, average
        self.betas, self.eps = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]
        for p in self.params:
            assert p.dtype == torch.float32 and p.is_contiguous()
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        self.steps = [optimizer.state[p]["step"] for p in self.params]
        states = [optimizer.state[p] for p in mine]
        self.firsts, self.seconds = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.averages: list[Tensor] = []
        self.rest: list[tuple[Tensor, Tensor]] = []  # averaged, but not here: buffers, frozen parameters, matrices
        if average:
            of = {theirs.data_ptr(): a for a, theirs in average.averaged}
            self.averages = [of[p.data_ptr()] for p in mine]
            trained = {a.data_ptr() for a in self.averages}
            self.rest = [(a, b) for a, b in average.averaged if a.data_ptr() not in trained]

        blocks = [math.ceil(p.numel() / BLOCK) for p in self.params]
        owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
        start = torch.cat([torch.arange(n) * BLOCK for n in blocks])
        self.owner, self.start = owner.to(self.device, torch.int32), start.to(self.device)
        self.numel = torch.tensor([p.numel() for p in self.params], device=self.device)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=self.device)
        self.decays = torch.tensor(decays, dtype=torch.float32, device=self.device)
        self.blocks = sum(blocks[: len(mine)])  # of AdamW's parameters, which come first
        self.log_betas = torch.tensor(self.betas, dtype=torch.float64, device=self.device).log()
        fixed = (mine, self.firsts, self.seconds, self.averages or mine)
        self.tables = [torch.tensor([t.data_ptr() for t in ts], device=self.device) for ts in fixed]
        self.grads = torch.zeros(len(self.params), dtype=torch.int64, device=self.device)
        self.partial = torch.zeros(len(owner), device=self.device)
        self.recorded: Tensor | None = None

    def norm(self) -> Tensor:
        """The norm of all gradients together."""
        addresses = torch.tensor([_address(p) for p in self.params])
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.recorded = addresses  # in the graph's own memory: `fill_in` writes them when recording is over
        else:
            addresses = addresses.pin_memory() if self.device.type == "cuda" else addresses
            self.grads.copy_(addresses, non_blocking=True)
        grid = (len(self.partial),)
        _squares_kernel[grid](self.grads, self.owner, self.start, self.numel, self.partial, BLOCK=BLOCK, num_warps=4)
        return self.partial.sum().sqrt()

    def fill_in(self) -> None:
        """Before recorded launches run: tell them where their gradients lie. A plain step in between moves them."""
        assert self.recorded is not None
        self.grads.copy_(self.recorded)

    def apply(self, rate: Tensor, norm: Tensor, finite: Tensor) -> None:
        """Clip to the norm, step every parameter at `rate` times its scale and move the average, where `finite`."""
        counts = finite.float()
        torch._foreach_add_(self.steps, [counts] * len(self.steps))  # with a lone tensor, the host would read it
        corrections = -torch.expm1(self.log_betas * self.steps[0].double())
        clip = (self.clip / (norm + 1e-6)).clamp_max(1.0)
        way = 1 - self.average.decay_now() if self.average else counts
        scalars = torch.stack((counts, rate, clip, corrections[0].float(), corrections[1].sqrt().float(), way.float()))
        weights, firsts, seconds, averages = self.tables
        _update_kernel[(self.blocks,)](
            weights, self.grads, firsts, seconds, averages, self.scales, self.decays, self.owner, self.start,
            self.numel, scalars, *self.betas, self.eps, BLOCK=BLOCK, AVERAGE=self.average is not None, num_warps=4,
        )  # fmt: skip
        if self.matrices:
            self.matrices.apply(rate, clip, finite)
        if self.average:
            self.average.move(self.rest, counts)
            self.average.count(counts)


def _address(p: Tensor) -> int:
    """Where a parameter's gradient lies; 0 without one."""
    g = p.grad
    if g is None:
        return 0
    if g.dtype != torch.float32 or not g.is_contiguous():
        raise RuntimeError(f"a gradient is {g.dtype} with strides {g.stride()}, its parameter float32 and contiguous")
    return g.data_ptr()

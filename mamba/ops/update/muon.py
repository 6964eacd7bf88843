"""Muon (https://kellerjordan.github.io/posts/muon/): matrices move by the orthogonal part of their momentum.

Every matrix that a projection fuses (x, z, B, C, ...) is made orthogonal on its own, and matrices of the same shape
together. Rate, clipping and verdict are read from device memory, so a step can be recorded in a CUDA graph.
`torch.optim.Muon` is the reference (tests/ops/test_muon.py); it takes its rate on the host and works on one matrix at a
time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix, (n, rows, columns) -> the same: its singular values come to lie
    between about 0.7 and 1.2, by five Newton-Schulz iterations in the type that is given."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MatrixUpdate:
    """The update of some matrices: their momentum, made orthogonal, at the root mean square that AdamW's updates have
    (0.2, https://arxiv.org/abs/2502.16982), so that both take the same rate and weight decay.

    A weight of exactly 0 whose gradient and momentum are exactly 0 stays: it is masked, and orthogonality would move
    it.

    Args:
        params: (rows, columns) each, float32.
        momenta: likewise, changed in place.
        parts: of each parameter, how many rows its matrices have, in order.
        scales: each one's learning rate over the common one.
        decays: each one's weight decay.
        momentum: of the gradients' average; Nesterov's form.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        momenta: Sequence[Tensor],
        parts: Sequence[Sequence[int]],
        scales: Sequence[float],
        decays: Sequence[float],
        momentum: float,
    ) -> None:
        self.params, self.momentum = list(params), momentum
        self.device = self.params[0].device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else self.params[0].dtype
        views = [p.detach().split(list(rows)) for p, rows in zip(params, parts, strict=True)]
        self.momenta = [m.split(list(rows)) for m, rows in zip(momenta, parts, strict=True)]
        self.weights, self.parts = views, parts
        self.scales, self.decays = list(scales), list(decays)
        self.groups: dict[tuple[bool, ...], list[_Group]] = {}

    @torch.no_grad()
    def apply(self, rate: Tensor, clip: Tensor | float, finite: Tensor) -> None:
        """Move every matrix that has a gradient, times `clip`, at `rate` times its scale, where `finite`."""
        present = tuple(p.grad is not None for p in self.params)
        if present not in self.groups:
            self.groups[present] = self._grouped(present)
        grads = [() if p.grad is None else p.grad.split(list(rows)) for p, rows in zip(self.params, self.parts)]  # noqa: B905
        for group in self.groups[present]:
            gradient = torch.stack([grads[i][j] for i, j in group.members]) * clip
            momentum, weight = torch.stack(group.momenta), torch.stack(group.weights)
            averaged = momentum.lerp(gradient, 1 - self.momentum)
            direction = orthogonalise(gradient.lerp(averaged, self.momentum).to(self.dtype)).to(weight.dtype)
            masked = (weight == 0) & (gradient == 0) & (momentum == 0)
            direction = direction.masked_fill(masked, 0.0)
            moved = weight - rate * (group.scale * direction + group.decay * weight)
            torch._foreach_copy_(group.momenta, list(torch.where(finite, averaged, momentum)))
            torch._foreach_copy_(group.weights, list(torch.where(finite, moved, weight)))

    def _grouped(self, present: Sequence[bool]) -> list[_Group]:
        """Matrices of the same shape together."""
        shapes: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
        for i, views in enumerate(self.weights):
            for j, view in enumerate(views):
                if present[i] and view.numel():
                    shapes[view.shape].append((i, j))
        return [_Group(self, shape, members) for shape, members in shapes.items()]


class _Group:
    """Matrices of one shape: which they are, where they lie, and their rates and decays as (n, 1, 1)."""

    def __init__(self, update: MatrixUpdate, shape: torch.Size, members: list[tuple[int, int]]) -> None:
        self.members = members
        self.weights = [update.weights[i][j] for i, j in members]
        self.momenta = [update.momenta[i][j] for i, j in members]
        size = 0.2 * max(shape) ** 0.5
        scale = torch.tensor([update.scales[i] * size for i, _ in members], device=update.device)
        decay = torch.tensor([update.scales[i] * update.decays[i] for i, _ in members], device=update.device)
        self.scale, self.decay = scale[:, None, None], decay[:, None, None]


class Muon(torch.optim.AdamW):
    """Muon for the groups that say `"muon": True`, AdamW for the others; both skip a step where `found_inf` says so.

    Args:
        groups: each with `lr_scale`, `weight_decay` and `muon`.
        parts: of each parameter of muon groups, how many rows its matrices have; one that is not listed is one matrix.
        lr: of all groups, times their scale.
        betas: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parts: Mapping[Tensor, Sequence[int]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.parts, self.momentum = dict(parts), momentum
        self._matrices: MatrixUpdate | None = None

    def matrix_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"]]

    def matrices(self) -> MatrixUpdate | None:
        """The update of muon's groups, on their state as it is now; None without such groups."""
        params, momenta, scales, decays = [], [], [], []
        for group in self.matrix_groups():
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["momentum_buffer"] = torch.zeros_like(p)
                params.append(p)
                momenta.append(state["momentum_buffer"])
                scales.append(group["lr_scale"])
                decays.append(group["weight_decay"])
        if not params:
            return None
        parts = [self.parts.get(p, (p.shape[0],)) for p in params]
        return MatrixUpdate(params, momenta, parts, scales, decays, self.momentum)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._matrices = None  # it held the momenta that were there before

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("Muon takes no closure")
        matrices = self._matrices = self._matrices or self.matrices()
        groups = self.param_groups
        if matrices is not None:
            found = getattr(self, "found_inf", None)
            device = matrices.device
            finite = torch.ones((), dtype=torch.bool, device=device) if found is None else found == 0
            scale = groups[0]["lr_scale"]
            rate = torch.as_tensor(groups[0]["lr"] / scale, dtype=torch.float32, device=device)
            matrices.apply(rate, 1.0, finite)
            for p in matrices.params:
                if p.grad is not None:
                    self.state[p]["step"] += finite
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            cast(Any, super()).step()
        finally:
            self.param_groups = groups

"""RSST: sparsity of whole units, learned while training, as a penalty or as a decay that grows until the units go.

Two forms. `compute_rsst_loss` adds norms to the loss, with a strength that rises over time (`rsst_schedule_exp`): those
of coupled units (group lasso or L1), or those of single tensors that the project's notes used, so that their strengths
carry over. `GrowingDecay` is growing regularisation (https://arxiv.org/abs/2012.09243): the
units that a refill mask gives up are decayed by a lambda that rises to a stated ceiling, then they are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.errors import ConfigError
from mamba.train.ema import ModelEma
from mamba.train.hooks import TrainHook
from pruning.components import GROUPS, Part, blocks_of, find_all, named_blocks, parts_of
from pruning.masks import MaskHook, Masks

TARGETS: dict[str, tuple[str, ...]] = {"ssm": ("d_inner",), "mlp": ("mlp_hidden",), "both": ("d_inner", "mlp_hidden")}
"""What is regularised and refilled: the groups whose units are whole channels of the mixer or neurons of the MLP."""
SINGLE: dict[str, dict[str, tuple[Part, ...]]] = {
    "mean_l1": {"ssm": (Part("out_proj.weight", 1),), "mlp": (Part("fc1.weight", 0),)},
    "rows": {"ssm": (Part("out_proj.weight", 0),), "mlp": (Part("fc1.weight", 0), Part("fc2.weight", 0))},
}
"""The norms of single tensors: target -> the tensors, and the axis along which a unit is a slice."""
NORMS = ("l1", "group", *SINGLE)
SCHEDULES: Registry[Callable[[int, int, float], float]] = Registry(
    "prune.schedule",
    {
        "linear": lambda epoch, epochs, exponent: epoch / epochs,
        "x2": lambda epoch, epochs, exponent: 2.0 ** (epoch - epochs),
        "x3": lambda epoch, epochs, exponent: 3.0 ** (epoch - epochs),
        "exp": lambda epoch, epochs, exponent: math.expm1(epoch / epochs) / math.expm1(1),
        "power": lambda epoch, epochs, exponent: (epoch / epochs) ** exponent,
    },
)
"""How lambda grows: (epoch from 1, epochs, exponent) -> its share of the ceiling, 1 in the last epoch."""


def groups_of(target: str) -> tuple[str, ...]:
    """The groups of a target; raises ConfigError where there is no such target."""
    if target not in TARGETS:
        raise ConfigError(f"unknown target '{target}'; valid: {', '.join(TARGETS)}")
    return TARGETS[target]


def compute_rsst_loss(model: nn.Module, strength: float | Tensor, target: str = "both", norm: str = "group") -> Tensor:
    """The penalty to add to a training loss: strength times the norms of the target, summed or averaged.

    Args:
        model: a Mamba model.
        strength: weight of the penalty; see `rsst_schedule_exp`.
        target: `ssm` (channels), `mlp` (neurons) or `both`.
        norm: `group`, the L2 norm of each unit's coupled weights (group lasso, Yuan and Lin 2006), or `l1`, the sum of
            their magnitudes, both summed over all units; `mean_l1`, the L1 norms of out_proj's columns and of fc1's
            rows, summed in each tensor, the mean over the tensors; `rows`, the L2 norms of the rows of out_proj, fc1
            and fc2, summed over all.

    Returns:
        a scalar with a gradient. A_log and the time step's bias are left out: their zero is a rate, not absence.

    Raises:
        ConfigError: an unknown target or norm, or a target that the model does not have; not a Mamba model.
    """
    if norm not in NORMS:
        raise ConfigError(f"unknown norm '{norm}'; valid: {', '.join(NORMS)}")
    total: Tensor | None = None
    if norm in SINGLE:
        groups_of(target)
        parts = [part for name in ("ssm", "mlp") if target in (name, "both") for part in SINGLE[norm][name]]
        sums_of = [_single(*found, norm) for block in blocks_of(model) for found in find_all(block, parts)]
        if not sums_of:
            raise ConfigError(f"target '{target}' is nothing that this model has; valid: ssm")
        return strength * (torch.stack(sums_of).mean() if norm == "mean_l1" else torch.stack(sums_of).sum())
    for group in groups_of(target):
        for block in blocks_of(model):
            sums: Tensor | None = None
            for part, tensor, span in parts_of(block, GROUPS[group]):
                if not part.scored:
                    continue
                values = tensor.abs() if norm == "l1" else tensor.square()
                rest = [axis for axis in range(tensor.ndim) if axis != part.axis]
                values = (values.sum(rest) if rest else values)[span]
                sums = values if sums is None else sums + values
            if sums is None:
                continue
            # a unit that is all zero has no gradient of its norm
            norms = sums if norm == "l1" else torch.where(sums > 0, sums, 1.0).sqrt() * (sums > 0)
            total = norms.sum() if total is None else total + norms.sum()
    if total is None:
        raise ConfigError(f"target '{target}' is nothing that this model has; valid: ssm")
    return strength * total


def _single(part: Part, tensor: Tensor, span: slice, norm: str) -> Tensor:
    """The norms of one tensor's units, summed."""
    if norm == "mean_l1":
        return tensor.abs().sum()
    squares = tensor.square().sum([axis for axis in range(tensor.ndim) if axis != part.axis])
    return (torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)).sum()


def rsst_schedule_exp(epoch: int, total: int, base: float, exponent: float = 4.0) -> float:
    """Strength of the penalty in an epoch: base (epoch / total)^exponent; 1e-4, 4, epoch 30 of 160 gives 1.236e-7.

    Raises:
        ConfigError: total below 1, or an epoch outside of 0 to total.
    """
    if total < 1 or not 0 <= epoch <= total:
        raise ConfigError(f"epoch must be in 0 to total and total at least 1, got epoch {epoch} of {total}")
    return base * (epoch / total) ** exponent


def growing_lambda(epoch: int, epochs: int, ceiling: float, schedule: str = "linear", exponent: float = 4.0) -> float:
    """Lambda in epoch `epoch` (from 0) of `epochs` epochs of growth; the last one has the ceiling, whatever the shape.

    With p = (epoch + 1) / epochs: `linear` ceiling p; `x2` and `x3` doubling and tripling each epoch; `exp` ceiling
    (e^p - 1) / (e - 1); `power` ceiling p^exponent.

    Raises:
        ConfigError: an unknown schedule, or an epoch outside of the growth.
    """
    if not 0 <= epoch < epochs:
        raise ConfigError(f"epoch must be in 0 to {epochs - 1}, got {epoch}")
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule '{schedule}'; valid: {', '.join(SCHEDULES)}")
    return ceiling * SCHEDULES[schedule](epoch + 1, epochs, exponent)


class PenaltyHook(TrainHook):
    """Trains with `compute_rsst_loss`, its strength rising by `rsst_schedule_exp`."""

    def __init__(self, base: float, exponent: float, target: str, norm: str) -> None:
        self.base, self.exponent, self.target, self.norm = base, exponent, target, norm

    def attach(self, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.strength = torch.zeros((), device=self.parameters[0].device)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.strength.fill_(rsst_schedule_exp(epoch + 1, epochs, self.base, self.exponent))

    def gradients(self) -> None:
        with torch.enable_grad():
            loss = compute_rsst_loss(self.model, self.strength, self.target, self.norm)
            own = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, own, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        with torch.no_grad():
            norm = compute_rsst_loss(self.model, 1.0, self.target, self.norm)
        return {"prune/penalty_strength": float(self.strength), "prune/penalty_norm": float(norm)}


class GrowingDecay(MaskHook):
    """Decays the units that are to go by a growing lambda, then cuts them.

    What trains while lambda grows is what global pruning left (current) and the units that stay as a whole (refill);
    after the cut it is the latter, as many weights as Refill keeps.

    Args:
        masks: the current masks, as global pruning left them.
        stay: unit masks: which weights are to stay (`pruning.refill`). Weights with refill = 0 and current = 1 get
            lambda w added to their gradient, except in A_log and in the time step's bias, whose zero is no absence.
        ceiling: lambda in the last epoch of growth.
        schedule, exponent: see `growing_lambda`.
        grow_epochs: epochs of growth; the cut comes after them, at the start of the next epoch.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        stay: Mapping[str, Tensor],
        ceiling: float,
        schedule: str,
        exponent: float,
        grow_epochs: int,
    ) -> None:
        growing_lambda(0, grow_epochs, ceiling, schedule, exponent)  # refuses what is unknown
        trained: Masks = {n: keep | masks.get(n, torch.ones_like(keep)) for n, keep in stay.items()}
        super().__init__({**{n: keep for n, keep in masks.items() if n not in stay}, **trained})
        self.stay = dict(stay)
        self.ceiling, self.schedule, self.exponent, self.grow_epochs = ceiling, schedule, exponent, grow_epochs

    def attach(self, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, seed: int) -> None:
        super().attach(model, ema, optimizer, seed)
        parameters = dict(model.named_parameters())
        unscored = {
            prefix + part.tensor
            for prefix, block in named_blocks(model)
            for group in GROUPS.values()
            for part, _, _ in parts_of(block, group)
            if not part.scored
        }
        leaving = {n: self.masks[n] & ~keep for n, keep in self.stay.items() if n not in unscored}
        self.decayed = [(parameters[n], going.to(parameters[n])) for n, going in leaving.items()]
        self.strength = torch.zeros((), device=self.decayed[0][0].device if self.decayed else None)
        self.cut_now = False

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if epoch < self.grow_epochs:
            value = growing_lambda(epoch, self.grow_epochs, self.ceiling, self.schedule, self.exponent)
            self.strength.fill_(value)
            return
        self.strength.zero_()
        if not self.cut_now:
            self.cut(self.stay)
            self.cut_now = True

    @torch.no_grad()
    def gradients(self) -> None:
        for parameter, going in self.decayed:
            if parameter.grad is not None:
                parameter.grad.add_(parameter * going * self.strength)
        super().gradients()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        with torch.no_grad():
            left = sum(float((p * going).float().square().sum()) for p, going in self.decayed)
            count = sum(float(going.sum()) for _, going in self.decayed)
            kept = sum(float(scale.sum()) for _, scale in self.pairs)
            weights = sum(scale.numel() for _, scale in self.pairs)
        return {
            "prune/lambda": float(self.strength),
            "prune/lambda_ceiling": self.ceiling,
            "prune/leaving_rms": math.sqrt(left / max(1.0, count)),
            "prune/cut_percent": 100 * (1 - kept / max(1, weights)),
        }

    def may_be_best(self, epoch: int) -> bool:
        return epoch >= self.grow_epochs

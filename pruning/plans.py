"""Plans of one cut: the three stages of pruning that the project's analysis proposed, as data, and the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mamba.config.schema import CutConfig
from mamba.errors import ConfigError
from mamba.models.model import MambaModel
from pruning.components import covered
from pruning.cut import cut
from pruning.importance import SCORES, Batches
from pruning.lite import build_mamba_lite, record_of_lite, transfer_pruned_weights
from pruning.shrink import Shrunk, Slices, shrink


@dataclass(frozen=True)
class Plan:
    """Cuts by component, or the widths of a rebuilt model."""

    purpose: str
    rates: dict[str, float] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    shrink: bool = True
    lite: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    """The user's rates: a component that the model does not have is refused, not left out."""


PLANS: dict[str, Plan] = {
    "stage1": Plan(
        "70 % of single weights: how much the model can spare, at no gain in speed",
        {"linear_out:element": 0.7, "mlp:element": 0.7, "linear_gate:element": 0.7},
        shrink=False,
    ),
    "stage2": Plan(
        "whole units where that is cheap, single weights in the gate: smaller and faster",
        {"linear_out:channel": 0.5, "mlp:neuron": 0.7, "linear_gate:element": 0.6, "linear_in:expand": 0.25},
        {"scope": "layerwise", "multiple": 8},
    ),
    "stage2_output": Plan(
        "stage2 with linear_out cut by its output channels, which the residual stream keeps, instead of by its inputs",
        {"linear_out:output": 0.5, "mlp:neuron": 0.7, "linear_gate:element": 0.6, "linear_in:expand": 0.25},
        {"scope": "layerwise", "multiple": 8},
    ),
    "stage3": Plan(
        "rebuilt at half of every width and two thirds of the depth, to be fine-tuned",
        lite={"expand": 1.0, "d_conv": 2, "d_state": 8, "mlp_ratio": 2.0},
    ),
}


OWN = "own"
"""The name of the plan that `cut.*` is."""


def get_plan(name: str, told: CutConfig | None = None) -> Plan:
    """The plan of a name; OWN: that of `told`. Raises ConfigError where there is none, or it cuts nothing."""
    if name == OWN and told is not None:
        return own_plan(told)
    if name not in PLANS:
        raise ConfigError(f"unknown plan '{name}'; valid: {', '.join([*PLANS, OWN])}")
    return PLANS[name]


def own_plan(told: CutConfig) -> Plan:
    """The cut that `cut.*` says.

    Raises:
        ConfigError: every rate is 0.
    """
    if not told.rates:
        raise ConfigError("cut.*: nothing is cut; set at least one component's rate above 0")
    what = ", ".join(f"{name} {rate:g}" for name, rate in told.rates.items())
    how = {"scope": told.scope, "score": told.criterion, "layers": None if told.layer is None else [told.layer]}
    units = "whole units" if told.structured else "single weights"
    return Plan(f"{what}: {units} by {told.criterion}", told.rates, how, told.structured, own=True)


def reads_images(plan: Plan, repair: bool) -> bool:
    """Whether a plan needs calibration images."""
    return repair or SCORES[plan.how.get("score", "l1")].calibrated


def apply_plan(
    model: MambaModel,
    name: str,
    score: str = "l1",
    calibration: Batches | None = None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    repair: bool = False,
) -> Shrunk:
    """The model that a plan makes, and the masks that hold it in training; the argument is left as it was. Components
    that the model does not have (a Vision Mamba has no MLP) are left out.

    `masks`: what is cut already and stays cut; `repair`: as in `pruning.cut.How`, with `calibration`.

    Raises:
        ConfigError: an unknown plan, or one that does not fit the model.
    """
    return carry_out(get_plan(name), model, score, calibration, seed, masks, repair)


def carry_out(
    plan: Plan,
    model: MambaModel,
    score: str = "l1",
    calibration: Batches | None = None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    repair: bool = False,
) -> Shrunk:
    """As `apply_plan`, of any plan."""
    if plan.lite:
        if repair:
            raise ConfigError("cut.repair does not go with plan 'stage3', which rebuilds the model; leave it out")
        model = shrink(model, masks or {}).model
        lite = build_mamba_lite(model, **plan.lite)
        taken = transfer_pruned_weights(model, lite, score, calibration)
        return Shrunk(lite, {}, Slices({}), record_of_lite(model, lite, taken))
    there = {what: rate for what, rate in plan.rates.items() if any(covered(model, what.partition(":")[0]))}
    rates = plan.rates if plan.own else there
    how: dict[str, Any] = {"score": score, "calibration": calibration, "seed": seed, "masks": masks, "repair": repair}
    return cut(model, rates, plan.shrink, **{**how, **plan.how})

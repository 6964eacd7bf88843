"""Named plans: the three stages of pruning a Mamba that the project's analysis proposed, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mamba.errors import ConfigError
from mamba.models.model import MambaModel
from pruning.components import covered
from pruning.cut import cut
from pruning.importance import Batches
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


def get_plan(name: str) -> Plan:
    """Raises ConfigError where there is no such plan."""
    if name not in PLANS:
        raise ConfigError(f"unknown plan '{name}'; valid: {', '.join(PLANS)}")
    return PLANS[name]


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
    plan = get_plan(name)
    if plan.lite:
        if repair:
            raise ConfigError(f"cut.repair does not go with plan '{name}', which rebuilds the model; leave it out")
        model = shrink(model, masks or {}).model
        lite = build_mamba_lite(model, **plan.lite)
        taken = transfer_pruned_weights(model, lite, score, calibration)
        return Shrunk(lite, {}, Slices({}), record_of_lite(model, lite, taken))
    rates = {what: rate for what, rate in plan.rates.items() if any(covered(model, what.partition(":")[0]))}
    how: dict[str, Any] = {"score": score, "calibration": calibration, "seed": seed, "masks": masks, "repair": repair}
    return cut(model, rates, plan.shrink, **how, **plan.how)

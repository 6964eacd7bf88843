"""What a score gives is a finite number for each weight and unit, or no score: nothing is ranked by anything else."""

from __future__ import annotations

import pytest
import torch

from mamba.errors import ConfigError
from pruning.cut import cut
from pruning.importance import SCORES, Score
from pruning.refill import REFILL_SCORES, RefillScore, refill_masks
from pruning.store import Masks

RATES = ({"mlp:neuron": 0.5}, {"mlp:element": 0.5}, {"linear_out:channel": 0.5}, {"block": 0.5})


def absolute(model, parameters, calibration, seed):
    return {name: p.detach().abs() for name, p in parameters.items()}


def nan(model, parameters, calibration, seed):
    return {name: torch.full_like(p, torch.nan) for name, p in parameters.items()}


def sums(model, parameters, calibration, seed):
    return {name: p.sum() for name, p in parameters.items()}


def zeroes(model, parameters, calibration, seed):
    found = absolute(model, parameters, calibration, seed)
    for p in parameters.values():
        p.data.zero_()
    return found


@pytest.fixture
def added():
    """Adds a score for this test."""
    names = []

    def add(registry, entry):
        registry["mine"] = entry
        names.append(registry)
        return "mine"

    yield add
    for registry in names:
        del registry["mine"]


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize(
    ("score", "told"),
    [
        (Score(nan), "values of .* are NaN or infinite"),
        (Score(sums), r"the values of .* are \(\); valid: one for each weight"),
        (Score(lambda model, parameters, calibration, seed: {}), "are absent; valid: one for each weight"),
        (Score(lambda model, parameters, calibration, seed: None), "gives a NoneType"),
    ],
)
def test_what_is_no_number_for_each_weight_ranks_nothing(model, added, rates, scope, score, told):
    with pytest.raises(ConfigError, match=f"score 'mine'.*{told}"):
        cut(model, rates, score=added(SCORES, score), scope=scope)


@pytest.mark.parametrize("of_unit", [lambda sums: sums * torch.nan, lambda sums: sums[:1]])
def test_what_is_no_number_for_each_unit_ranks_nothing(model, added, of_unit):
    with pytest.raises(ConfigError, match="score 'mine'.*one finite number a unit"):
        cut(model, {"mlp:neuron": 0.5}, score=added(SCORES, Score(absolute, of_unit=of_unit)), scope="layerwise")


def test_a_score_that_changes_the_model_is_refused(model, added):
    with pytest.raises(ConfigError, match="score 'mine' changes the model"):
        cut(model, {"mlp:neuron": 0.5}, score=added(SCORES, Score(zeroes)))


def test_calibration_that_overflows_is_refused(model):
    """A shipped score too: what has no finite gradient cannot be ranked by it."""
    batch = (torch.full((2, 3, 8, 8), torch.inf, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="score 'taylor': .* are NaN or infinite"):
        cut(model, {"mlp:neuron": 0.5}, score="taylor", calibration=[batch], scope="layerwise")


@pytest.mark.parametrize("of_unit", [lambda values, remain: values.sum(1) * torch.nan, lambda values, remain: values])
def test_a_refill_score_gives_a_number_for_each_unit(model, added, of_unit):
    masks: Masks = {}
    with pytest.raises(ConfigError, match="refill score 'mine'.*one finite number a unit"):
        refill_masks(model, masks, "both", 0.5, added(REFILL_SCORES, RefillScore("l1", of_unit)))

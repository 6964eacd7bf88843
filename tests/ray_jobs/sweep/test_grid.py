"""Each trial has a folder of its own on every file system, and none outside of its experiment's."""

from __future__ import annotations

import re

import pytest

from mamba.errors import ConfigError
from ray_jobs.sweep.grid import LONGEST, check_names, expand, unique_names
from ray_jobs.sweep.space import Space

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def names(*points):
    found = unique_names(points)
    assert len({name.casefold() for name in found}) == len(points), found
    assert all(NAME.fullmatch(name) for name in found), found
    check_names(found)
    return found


def test_names_are_short_where_they_can_be():
    assert names({"cut.mlp": 0.3}, {"cut.layer": 4}, {}) == ["mlp-0.3", "layer-04", "one"]


def test_keys_that_end_alike_are_told_apart():
    assert names({"eval.every": 2}, {"checkpoint.every": 2}) == ["eval.every-2", "checkpoint.every-2"]


@pytest.mark.parametrize(
    "points",
    [
        [{"data.root": "a/b"}, {"data.root": "a-b"}, {"data.root": "../a b"}],
        [{"data.root": "Images"}, {"data.root": "images"}],
        [{"data.root": "x" * 400}, {"data.root": "x" * 400 + "y"}],
        [{"optim.lr": 1e30}, {"optim.lr": 1e-30}],
        [{"data.root": "Ä"}, {"data.root": "ä"}, {"data.root": "ß"}, {"data.root": "ss"}],
        [{"a.b": "1_c-2"}, {"a.b": "1", "a.c": "2"}],
    ],
)
def test_names_stay_apart(points):
    assert all(len(name) <= LONGEST + 11 for name in names(*points))


def test_a_grid_over_two_keys_of_one_last_word_has_all_its_trials():
    """They shared one folder, and half of the trials was never run."""
    grids = [{"eval.every": [1, 2]}, {"checkpoint.every": [1, 2]}]
    trials = expand(Space(question="q", cost="c", kind="train", grids=grids), 2)
    assert len({t.name for t in trials}) == 4


@pytest.mark.parametrize("name", ["../out", "/etc", ".ray", "", "a/b", "baseline", "Report", 3, None])
def test_a_name_that_is_no_folder_of_the_experiment_is_refused(name):
    with pytest.raises(ConfigError, match="a trial's name"):
        check_names([name])


def test_names_that_differ_in_case_alone_are_refused():
    with pytest.raises(ConfigError, match="another's too"):
        check_names(["a", "A"])

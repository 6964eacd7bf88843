"""Some inputs for every target of the fuzzer; `python tests/fuzz.py` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import TARGETS

IN_CI = {"spaces": 120}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_handled(name, tmp_path):
    TARGETS[name].run(IN_CI.get(name, 50), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_else_comes_is_handled(name, tmp_path):
    TARGETS[name].run(300, tmp_path, start=1)

"""Some inputs for every target of the fuzzer; `python tests/fuzz.py` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import TARGETS

IN_CI = {"spaces": 300}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_handled(name, tmp_path):
    TARGETS[name].run(IN_CI.get(name, 100), tmp_path)

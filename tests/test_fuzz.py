"""Some inputs for every target of the fuzzer; `python tests/fuzz.py` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_handled(name, tmp_path):
    TARGETS[name].run(300, tmp_path)

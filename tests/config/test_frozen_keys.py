"""The keys that stored configs, search spaces and command lines of today hold: none goes without being noticed."""

from __future__ import annotations

from pathlib import Path

from mamba.config.keys import RETIRED, dotted_keys

FROZEN = (Path(__file__).parent / "keys.txt").read_text().split()


def test_keys_are_the_listed_ones():
    new = [key for key in dotted_keys() if key not in FROZEN]
    gone = [key for key in FROZEN if key not in dotted_keys()]
    assert not new, f"add to tests/config/keys.txt: {' '.join(new)}"
    assert not gone, f"name in RETIRED of mamba/config/keys.py, and remove from tests/config/keys.txt: {' '.join(gone)}"
    assert len(FROZEN) == len(set(FROZEN)) and not set(FROZEN) & set(RETIRED)


def test_every_key_says_what_it_is():
    for key, group in dotted_keys().items():
        text = group.model_fields[key.rpartition(".")[2]].description
        assert text and text.rstrip().endswith("."), key

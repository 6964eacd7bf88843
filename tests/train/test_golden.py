"""Golden values: the losses of a short seeded run of each preset, so that a change of what training computes is seen.

A refactor leaves them alone. Who changes training on purpose, or adds a preset, writes them anew and says why:

    python -m tests.train.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from mamba.config.presets import PRESETS, get_preset
from mamba.data.images import ImageData
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from tests.conftest import make_small_data

FILE = Path(__file__).parent / "golden.json"
KEPT = ("train/loss", "train/lr", "val/loss")
EPOCHS = 3
SMALL = {
    "data.dataset": "digits",
    "data.img_size": 8,
    "data.batch_size": 24,
    "model.d_model": 12,
    "model.depth": 2,
    "model.d_state": 4,
    "optim.epochs": EPOCHS,
}


def losses(preset: str, data: ImageData, out: Path) -> dict[str, list[float]]:
    """What each epoch of a shrunk preset reports, with the loss of the test at the end."""
    config = get_preset(preset)
    part = EPOCHS / config.optim.epochs
    lengths = {"optim.warmup_epochs": config.optim.warmup_epochs * part}
    lengths["data.mix_off_epochs"] = round(config.data.mix_off_epochs * part)
    small = {**SMALL, **lengths, "optim.lr": 10 * config.optim.lr}  # so short a run has to move
    result = fit(config.with_values({**small, "out": out}).resolve(), local_process(), out, data)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {**{key: [line[key] for line in lines] for key in KEPT}, "test/loss": [result["metrics"]["test/loss"]]}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_as_it_did(preset, small_data, tmp_path):
    golden = json.loads(FILE.read_text())
    assert preset in golden, f"a new preset: write its values with `python -m {__spec__.name}`"
    got = losses(preset, small_data, tmp_path)
    for key, expected in golden[preset].items():
        assert got[key] == pytest.approx(expected, rel=1e-4), key


def test_presets_that_are_gone_leave_no_values():
    assert set(json.loads(FILE.read_text())) == set(PRESETS)


def write() -> None:
    data = make_small_data()
    with tempfile.TemporaryDirectory() as out:
        golden = {preset: losses(preset, data, Path(out) / preset) for preset in PRESETS}
    lines = [f"{json.dumps(preset)}: {json.dumps(values)}" for preset, values in golden.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()

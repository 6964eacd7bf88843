"""Image folders whose files are of any mode, side and ending, whole or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from mamba.config import RunConfig
from mamba.data import load_data
from mamba.errors import DataError
from tests.fuzz import Target, sentence

FULL = {"L": 255, "RGB": 255, "RGBA": 255, "LA": 255, "I;16": 65535, "P": 255, "1": 1, "CMYK": 255}
"""What white is in a mode; CMYK is written from RGB."""
ENDINGS = {"L": ["png", "bmp", "tif"], "RGB": ["png", "bmp", "tif", "webp"], "I;16": ["png", "tif"],
           "1": ["png", "tif"], "RGBA": ["png", "webp"], "LA": ["png"], "P": ["png", "gif"],
           "CMYK": ["tif"]}  # fmt: skip
CLOSE = 4
"""Levels of 256 that a file format may move a grey."""


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    mode = draw(st.sampled_from(sorted(FULL)))
    return {
        "mode": mode,
        "side": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "level": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) if mode != "1" else float(draw(st.booleans())),
        "name": draw(st.sampled_from(["x.", "X.", "ü.", ".x.", "deeper/x.", ".hidden/x."])),
        "ending": draw(st.sampled_from([*ENDINGS[mode], "npy", "txt"])),
        "kept": draw(st.sampled_from([1.0, 1.0, 1.0, 0.0, 0.5, 0.9])),
        "fit": draw(st.sampled_from(["crop", "pad", "stretch"])),
    }


def picture(mode: str, side: tuple[int, int], level: float) -> Image.Image:
    """One grey everywhere, opaque."""
    value = round(level * FULL[mode])
    if mode == "I;16":
        return Image.fromarray(np.full(side[::-1], value, np.uint16))
    if mode == "CMYK":
        return Image.new("RGB", side, (value,) * 3).convert("CMYK")
    if mode == "1":
        return Image.new("1", side, value)
    if mode in ("LA", "RGBA"):
        return Image.new(mode, side, (value,) * (len(mode) - 1) + (255,))
    return Image.new("L", side, value).convert(mode)


def holds(given: dict[str, Any], folder: Path) -> None:
    """Every picture is read as bright as it is, is counted among what was not read, or is refused by its name."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), 100).save(folder / split / label / f"{i}.png")
    kind = given["ending"] if given["ending"] in ENDINGS[given["mode"]] else ENDINGS[given["mode"]][0]
    file = folder / "train" / "a" / (given["name"] + given["ending"])
    file.parent.mkdir(exist_ok=True)
    whole = folder / f"whole.{kind}"
    picture(given["mode"], given["side"], given["level"]).save(whole, **({"lossless": True} if kind == "webp" else {}))
    content = whole.read_bytes()
    file.write_bytes(content[: round(given["kept"] * len(content))])
    values = {"data.dataset": "folder", "data.root": folder, "data.img_size": 8, "data.val_fraction": 0.0}
    refused = ""
    try:
        data = load_data(RunConfig().with_values({**values, "data.fit": given["fit"]}).resolve().data, 0)
    except DataError as error:
        refused = sentence(error)
    if refused:
        assert file.name in refused and given["kept"] < 1, refused
        return
    count = len(data.train)
    if count == 6:
        assert any("left out" in remark for remark in data.remarks()), "left out without a word"
        return
    assert count == 7
    where = [i for i, pixels in enumerate(data.train.images) if not (pixels == 100).all()]
    if given["kept"] == 1 and given["fit"] != "pad":
        level = 255 * (round(given["level"] * FULL[given["mode"]]) / FULL[given["mode"]])
        if abs(level - 100) > CLOSE:
            assert len(where) == 1 and np.abs(data.train.images[where[0]] - level).max() <= CLOSE


TARGET = Target(files(), holds)

"""predict.py from words to files."""

from __future__ import annotations

import csv
import json

import pytest

from mamba.data.held import hashes_of, pack
from mamba.predict.files import find_images
from mamba.runs.files import read_sealed, write_sealed
from ray_jobs.predict import main
from tests.predict.conftest import checkpoint, write_images

FIRST = ("dark", "grey", "bright")


def test_labelled_folders(tmp_path, capsys):
    run, images, out = checkpoint(tmp_path / "run"), write_images(tmp_path / "images"), tmp_path / "new" / "p.csv"
    assert main([str(run), str(images), "--out", str(out), "--batch-size", "5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    with open(out) as file:
        rows = list(csv.DictReader(file))
    right = sum(int(row["correct"]) for row in rows)
    assert len(rows) == 12 and f"({right} of 12 images)" in said and "precision" in said
    tree = json.loads(out.with_suffix(".json").read_text())
    assert tree["accuracy"] == pytest.approx(100 * right / 12) and len(tree["confusion"]) == 3
    page = out.with_suffix(".html").read_text()
    assert page.count("<figure") == 12 - right > 0 and "id=confusion" in page
    assert f"page: {out.with_suffix('.html')}" in said and f"table: {out}" in said


def test_images_without_classes(tmp_path, capsys):
    run, images, out = checkpoint(tmp_path / "run"), write_images(tmp_path / "images"), tmp_path / "p.csv"
    assert main([str(run), f"{images}/*/0.png", "--out", str(out), "--top", "1"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" not in said and "dark/0.png: " in said
    assert not out.with_suffix(".html").exists() and out.read_text().startswith("image,class_1,probability_1\n")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--top", "0"], "--top 0: valid are 1 to 1,000"),
        (["--views", "11"], "--views 11"),
        (["--out", "page.html"], "give a .csv file"),
        (["--device", "cuda:77"], "this machine has"),
        (["--device", "mps"], "device mps: valid are auto, cpu, cuda"),
        (["--device", "meta"], "device meta: valid are auto, cpu, cuda"),
        (["--views", "2"], "--views 2: training showed each image to this model in 1 way that can be averaged"),
    ],
)
def test_bad_words(tmp_path, capsys, words, said):
    assert main([str(checkpoint(tmp_path / "run")), str(write_images(tmp_path / "images")), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_name_that_is_html_stays_text(tmp_path):
    classes = ("<b>dark", "grey", "bright")
    run, images = checkpoint(tmp_path / "run", classes), write_images(tmp_path / "images", classes)
    assert main([str(run), str(images), "--out", str(tmp_path / "p.csv")]) == 0
    assert "<b>dark" not in (tmp_path / "p.html").read_text().replace("<b>&lt;b&gt;dark", "")


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.html"])
def test_files_of_others_are_not_replaced(tmp_path, capsys, name):
    """`--out labels.csv` replaced labels.json, too."""
    run, images, out = checkpoint(tmp_path / "run"), write_images(tmp_path / "images"), tmp_path / "p.csv"
    (tmp_path / name).write_text("what was there")
    assert main([str(run), str(images), "--out", str(out)]) == 2
    assert f"{tmp_path / name} is there and is none of predict.py's" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "what was there"
    (tmp_path / name).unlink()
    assert main([str(run), str(images), "--out", str(out)]) == main([str(run), str(images), "--out", str(out)]) == 0


def test_the_folder_that_a_model_was_trained_on_is_known_again_after_it_has_changed(tmp_path, capsys):
    images = write_images(tmp_path / "images", count=8)
    files = find_images([images], FIRST).files
    held = {"held": pack(hashes_of(files, [8, 9, 17, 18]))}
    run = checkpoint(tmp_path / "run")
    folder = next((run / "checkpoints").iterdir())
    tree = read_sealed(folder / "config.json")
    write_sealed(folder / "config.json", {**tree, "data": {"sets": {"train": {}}, "split": held}})
    (images / "dark" / "0.png").unlink()
    assert main([str(run), str(images), "--out", str(tmp_path / "p.csv")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 3 of the 4 images that the model was validated on are among these, so this is the folder" in said
    for row in (9, 17):
        (images / files.name(row)).unlink()
    assert main([str(run), str(images), "--out", str(tmp_path / "p.csv")]) == 0
    assert "note:" not in capsys.readouterr().out

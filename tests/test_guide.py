"""docs/GUIDE.md: every command of the page, in its order, in an empty folder; and quickly, with less training."""

from __future__ import annotations

import csv
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "GUIDE.md").read_text()
HEREDOC = re.compile(r"^python - <<'END'\n(.*?)^END$", re.M | re.S)
QUICK = {
    "first": "--model.d-model 12 --model.depth 2 --data.batch-size 128 --optim.warmup-epochs 0 --optim.epochs 1",
    "smaller": "--optim.epochs 1",
    "rounds": "--optim.epochs 1",
}
"""Instead of `--optim.epochs N`, by `--trial`."""


def steps():
    """(language, text) of every block that is run, in order; blocks without a language show what files look like."""
    return [(kind, body) for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S) if kind]


def commands(body):
    """The command lines of a block, without heredocs; none is continued on a second line."""
    lines = [line.partition("  #")[0].strip() for line in HEREDOC.sub("", body).splitlines()]
    return [line for line in lines if line]


def quickly(words):
    """A command with less training, and with the one format whose export takes no seconds."""
    trial = words[words.index("--trial") + 1] if "--trial" in words else ""
    if "--optim.epochs" in words:
        at = words.index("--optim.epochs")
        words = [*words[:at], *QUICK[trial].split(), *words[at + 2 :]]
    return ["safetensors" if word in ("onnx", "torch_export") else word for word in words]


def test_every_block_is_understood():
    kinds = [kind for kind, _ in steps()]
    assert set(kinds) == {"bash", "python"} and len(kinds) >= 9
    lines = [line for kind, body in steps() if kind == "bash" for line in commands(body)]
    assert {shlex.split(line)[0] for line in lines} == {"python", "tensorboard"}
    assert all(not line.endswith("\\") for line in lines)
    used = {Path(shlex.split(line)[1]).stem for line in lines if line.startswith("python")}
    assert used == {"train", "prune", "predict", "compare", "export"}


def test_the_page_quickly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, body in steps():
        if kind == "python":
            if "onnxruntime" not in body:
                exec(compile(body, "GUIDE.md", "exec"), {"__name__": "mine"})
            continue
        for script in HEREDOC.findall(body):
            exec(compile(script, "GUIDE.md", "exec"), {"__name__": "mine"})
        for line in commands(body):
            words = shlex.split(line)
            if words[0] == "tensorboard":
                continue
            main = importlib.import_module(f"ray_jobs.{Path(words[1]).stem}").main
            code = main(quickly(words[2:]))
            assert code == 0, f"{line}: {capsys.readouterr().err[-2000:]}"
    check_what_is_left(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_page_to_the_letter(tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    (tmp_path / "ray_jobs").symlink_to(ROOT / "ray_jobs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "RAY_ADDRESS": "local"}
    began = time.monotonic()
    for kind, body in steps():
        if body.startswith("tensorboard"):
            assert_tensorboard_starts(body, tmp_path, env)
            continue
        command = ["bash", "-euc", body] if kind == "bash" else [sys.executable, "-c", body]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if kind == "python":
            assert done.stdout.startswith("3"), done.stdout
        print(f"{time.monotonic() - began:6.1f} s after {body.splitlines()[0][:90]}")
    check_what_is_left(tmp_path)
    with (tmp_path / "smaller.csv").open() as file:
        right = [int(row["correct"]) for row in csv.DictReader(file)]
    assert sum(right) / len(right) > 0.9
    assert (tmp_path / "photos.onnx").exists()


def assert_tensorboard_starts(body, folder, env):
    command = [*shlex.split(body), "--port", "0"]
    server = subprocess.Popen(
        command, cwd=folder, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert any("http://" in line for line in server.stderr), "it ended"
    finally:
        server.terminate()
        server.wait(30)


def check_what_is_left(folder):
    for name in ("predictions.csv", "predictions.html", "smaller.csv", "all.html", "photos.pt2", "photos.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "runs/prune/rounds/round-02/pruned/config.json").exists()
    assert len(list((folder / "photos/test").rglob("*.png"))) == 360

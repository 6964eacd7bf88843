"""A run's folder in which one file was cut, flipped, emptied, replaced or taken away."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from mamba.errors import ForgeError
from mamba.runs import checkpoint as ckpt
from mamba.runs.folder import finished_result, read_config
from mamba.runs.start import prepare_resume
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from ray_jobs.report.collect import collect
from tests.conftest import make_small_config, make_small_data
from tests.fuzz import Target, sentence


@functools.cache
def whole_run() -> Path:
    """A finished run of two epochs; made once a process."""
    out = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    config = make_small_config(out, optim__epochs=2, model__depth=1, name="exp", trial="one")
    folder = out / "exp" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    fit(config, local_process(), folder, make_small_data())
    return folder


damages = st.fixed_dictionaries(
    {
        "file": st.integers(0, 10**6),
        "how": st.sampled_from(["cut", "flip", "empty", "list", "gone", "text"]),
        "where": st.floats(0, 1),
        "bit": st.integers(0, 7),
    }
)


def holds(given: dict[str, Any], folder: Path) -> None:
    """Whatever reads the run says a sentence, or gives what the whole run gives."""
    run = Path(shutil.copytree(whole_run(), folder / "exp" / "one"))
    names = sorted(f for f in run.rglob("*") if f.is_file() and not f.name.startswith((".", "events")))
    file = names[given["file"] % len(names)]
    content = bytearray(file.read_bytes())
    at = min(int(given["where"] * len(content)), len(content) - 1)
    if given["how"] == "flip":
        content[at] ^= 1 << given["bit"]
    others = {"cut": content[:at], "empty": b"", "list": b"[1, 2]", "text": b"no longer\0this"}
    content = others.get(given["how"], content)
    if given["how"] == "gone":
        file.unlink()
    else:
        file.write_bytes(content)

    def attempt(read: Any, *args: Any) -> Any:
        try:
            return read(*args)
        except ForgeError as error:
            sentence(error)
            return None

    loaded = attempt(ckpt.load_model, run)
    if loaded is not None and file.suffix == ".safetensors":
        want = ckpt.load_model(whole_run())[0].state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in loaded[0].state_dict().items())
    attempt(prepare_resume, run)
    attempt(read_config, run)
    attempt(finished_result, run)
    attempt(collect, [folder])


TARGET = Target(damages, holds)

"""Whatever is typed, and whatever a config file holds: a config, or one sentence at once; never a traceback or a hang.

python tests/config/test_fuzz.py 5000     as many inputs as that
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from mamba.config.cli import ABLATE, PRUNE, TRAIN, TUNE, parse
from mamba.config.keys import RETIRED, choices, dotted_keys
from mamba.config.presets import PRESETS, get_preset
from mamba.errors import ForgeError

KEYS = [*dotted_keys(), *RETIRED]
VALUES = [
    *("none", "None", "0", "-1", "1", "1e-3", "1e400", "nan", "inf", "true", "False", "", "a" * 500, "../x", "\0", "ü"),
    *("1_000", "0x10", " 5", "9" * 30, "--", "~nobody/y", "[1]", "{}", "*", "auto", "1.5", "2**32"),
]
ODD = [
    "-",
    "--",
    "---x",
    "-x",
    "--=",
    "--.=3",
    "--optim.=1",
    "--.lr",
    "--trials=x",
    "--checkpoint=x",
    "--rate=0.5",
    "x",
]
YAML = [
    *(b"&a ", b"*a", b"<<: ", b"[", b"{", b"!!python/object:x ", b"? ", b"- ", b"\t", b"'", b'"', b": ", b"# "),
    *(b".nan", b".inf", b"|\n", b"---\n", b"2020-01-01", b"0o7", b"~", b"\0", b"\xff"),
]
JSON = [
    b'{"config": {}}',
    b"[]",
    b'{"config": {"optim": [1]}}',
    b'{"config": {"prune": {"mlp": 0.5}}}',
    b'{"config": 1',
]


def words(rng: random.Random, folder: Path) -> list[str]:
    kind = rng.random()
    if kind < 0.6:
        key = rng.choice(KEYS)
        value = rng.choice([*VALUES, *(choices(key) if key not in RETIRED else ())])
        flag = f"--{key.replace('_', rng.choice('_-'))}"
        return [flag, value] if rng.random() < 0.7 else [f"{flag}={value}"]
    if kind < 0.7:
        return ["--preset", rng.choice([*PRESETS, *VALUES])]
    if kind < 0.8:
        return ["--config", str(folder / "config.yaml")]
    if kind < 0.9:
        return ["--resume", rng.choice([str(folder), "nowhere", str(folder / "config.yaml")])]
    return [rng.choice(ODD)]


def damaged(rng: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(rng.randint(0, 6)):
        place = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.3:
            data[place] = rng.randrange(256)
        elif kind < 0.5:
            del data[place : place + rng.randint(1, 40)]
        elif kind < 0.8:
            data[place:place] = rng.choice(YAML)
        else:
            again = rng.randrange(len(data))
            data[place:place] = data[again : again + 60]
    return bytes(data)


def one(seed: int, folder: Path) -> bool:
    """One input; whether it was accepted. Raises AssertionError, or whatever escaped."""
    rng = random.Random(seed)
    (folder / "config.yaml").write_bytes(damaged(rng, get_preset(rng.choice([*PRESETS])).to_yaml().encode()))
    (folder / "experiment.json").unlink(missing_ok=True)
    if rng.random() < 0.1:
        (folder / "experiment.json").write_bytes(rng.choice(JSON))
    given = [word for _ in range(rng.randint(0, 4)) for word in words(rng, folder)]
    began = time.perf_counter()
    try:
        config = parse(rng.choice([TRAIN, PRUNE, TUNE, ABLATE]), given, "", lambda _: get_preset("v1")).config.resolve()
        config.check_workers(rng.randint(0, 5), rng.random() < 0.5)
        assert type(config).stored(config.model_dump(mode="json"), "") == config
    except ForgeError as error:
        sentence = str(error)
    else:
        sentence = None
    assert time.perf_counter() - began < 10, given
    assert sentence is None or ("\n" not in sentence and len(sentence) < 2000), f"{given}: {sentence}"
    return sentence is None


def test_300_inputs(tmp_path, capsys):
    accepted = sum(one(seed, tmp_path) for seed in range(300))
    assert 20 < accepted < 280, "the inputs are not mixed"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for number in range(int(sys.argv[1])):
            try:
                one(number, Path(name))
            except BaseException:
                print(f"seed {number}")
                raise

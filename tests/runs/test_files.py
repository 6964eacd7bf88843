"""Small files: whole or not at all, no link followed, no NaN in JSON, damage in one sentence."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest

from mamba.errors import FolderError
from mamba.runs import files


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "elsewhere.txt"
    path.write_text("precious")
    return path


def test_no_planted_link_is_followed(tmp_path, victim, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("result.json", ".result.json.partial", f".result.json.{os.getpid()}-0.partial"):
        (run / name).symlink_to(victim)
    files.write_json(run / "result.json", {"a": 1})
    assert victim.read_text() == "precious" and json.loads((run / "result.json").read_text()) == {"a": 1}
    assert not (run / "result.json").is_symlink()
    (run / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(FolderError, match=r"metrics.jsonl could not be written"):
        files.append(run / "metrics.jsonl", "x")
    assert victim.read_text() == "precious"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(
        FolderError, match=r"a.json could not be written: No space left on device \([\d,]+ MiB are free"
    ):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_the_umask_decides_who_reads(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_what_is_not_finite_is_null_in_json_and_nan_in_metrics(tmp_path):
    files.write_json(tmp_path / "a.json", {"metrics": {"a": math.nan, "b": [math.inf, 1.5]}, "t": (1, -math.inf)})
    assert "NaN" not in (tmp_path / "a.json").read_text() and "Inf" not in (tmp_path / "a.json").read_text()
    tree = files.read_json(tmp_path / "a.json")
    assert tree == {"metrics": {"a": None, "b": [None, 1.5]}, "t": [1, None]}
    assert math.isnan(files.as_metrics({"a": None, "b": 2, "c": "text"})["a"])
    assert files.as_metrics({"b": 2, "c": "text"}) == {"b": 2} and files.as_metrics([1]) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b'{"a": \xff\xfe}', b"[" * 100_000])
def test_damage_is_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FolderError, match=r"a.json is damaged \(.*\); remove it") as raised:
        files.read_json(tmp_path / "a.json", "remove it")
    assert len(str(raised.value).splitlines()) == 1


def test_csv(tmp_path):
    files.write_csv(tmp_path / "a.csv", ["a", "b"], [{"a": 1}, {"b": "x, y"}])
    assert (tmp_path / "a.csv").read_bytes() == b'a,b\r\n1,\r\n,"x, y"\r\n'


def test_a_bit_of_a_sealed_file_is_not_taken_for_another(tmp_path):
    path = tmp_path / "a.json"
    tree = {"accuracy": 91.25, "loss": math.nan, "values": {"a": [1, None, "x"]}, "n": 10**17}
    files.write_sealed(path, tree)
    assert files.read_sealed(path) == {**tree, "loss": None}
    files.write_sealed(path, files.read_json(path))  # written again with the old checksum among its keys
    assert files.read_sealed(path) == {**tree, "loss": None}
    whole, noticed = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in (0, 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = files.read_sealed(path)
            except FolderError:
                noticed += 1
            else:  # white space, or the checksum's own name
                assert {key: found[key] for key in tree} == {**tree, "loss": None}
    assert noticed > 1.6 * len(whole)

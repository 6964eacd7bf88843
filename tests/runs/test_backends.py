"""Each backend of `tracking.backends` is told what a run is, goes on after a resume, and needs no network."""

from __future__ import annotations

import csv
import shutil
from importlib.metadata import EntryPoint

import pytest

from mamba.config import trackers
from mamba.config.cli import parse_train_args
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from mamba.runs import remote
from mamba.runs.backends import Backend
from mamba.runs.folder import epochs_of
from mamba.runs.tracking import maker


def without_last_epoch(run, keep=2):
    """The run as it was when its newest checkpoint was that of epoch `keep`."""
    for folder in sorted((run / "checkpoints").glob("step-*"))[keep:]:
        shutil.rmtree(folder)
    (run / "result.json").unlink()


def test_words_come_from_yaml_the_command_line_and_python():
    for value in ("csv,tensorboard", "[csv, tensorboard]", ["csv", "tensorboard"], ("csv", "tensorboard")):
        config = RunConfig().with_values({"tracking.backends": value})
        assert config.tracking.backends == ("csv", "tensorboard")
        assert RunConfig.stored(config.model_dump(mode="json"), "x") == config
    assert parse_train_args(["--tracking.backends", "none"]).config.tracking.backends == ()
    assert RunConfig().tracking.backends == ("tensorboard",)


@pytest.mark.parametrize("words, said", [
    ("tensorbord", "unknown 'tensorbord'; valid: tensorboard, csv, wandb, mlflow"),
    ("csv,csv", "csv is given twice"),
    ("wandb", r"pip install -e '.\[wandb\]'"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_starts(monkeypatch, words, said):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tracking.backends: .*" + said):
        parse_train_args(["--tracking.backends", words]).config.resolve()


def test_csv_has_every_metric_once_after_a_resume(small_fit, tmp_path):
    small_fit(tracking__backends="csv", checkpoint__keep=3)
    run = tmp_path / "run"

    def lines():
        with (run / "metrics.csv").open(newline="") as file:
            return [tuple(line.values()) for line in csv.DictReader(file)]

    before = lines()
    without_last_epoch(run)
    small_fit(tracking__backends="csv", checkpoint__keep=3)
    timed = ("train/images_per_s", "train/data_wait_percent")

    def kept(lines):
        return [line for line in lines if line[1] not in timed and not line[1].startswith("step/")]  # each few seconds

    assert kept(lines()) == kept(before)
    accuracies = [(int(step), float(value)) for step, key, value in before if key == "val/accuracy"]
    assert accuracies == [(4 * e["epoch"], e["val/accuracy"]) for e in epochs_of(run)]
    assert not list(run.glob("events*")), "tensorboard was not asked for"


class Toy(Backend):
    """A backend of a user's package."""

    told: list = []  # noqa: RUF012

    def scalars(self, metrics, step):
        self.told.append((step, sorted(metrics)))

    def image(self, name, picture, step):
        assert picture.shape[0] == 3 and picture.min() >= 0 and picture.max() <= 1
        self.told.append((step, name))

    def finish(self, status):
        self.told.append(status)

    def close(self):
        self.told.append("closed")


def test_a_backend_of_an_installed_package_is_a_word(small_fit, monkeypatch):
    point = EntryPoint("toy", f"{__name__}:Toy", trackers.GROUP)
    monkeypatch.setattr(trackers, "entry_points", lambda group: [point])
    monkeypatch.setattr(EntryPoint, "load", lambda self: Toy)
    trackers.added.cache_clear()
    try:
        small_fit(tracking__backends="toy", optim__epochs=1)
    finally:
        trackers.added.cache_clear()
    told = [entry for entry in Toy.told if isinstance(entry, tuple)]
    assert (0, "train/augmented") in told
    assert any({"val/accuracy", "model/params"} <= set(keys) for _, keys in told if isinstance(keys, list))
    assert Toy.told[-2:] == ["finished", "closed"] or Toy.told[-3:] == ["finished", "closed", "closed"]


def test_one_that_cannot_be_imported_is_a_sentence(monkeypatch):
    point = EntryPoint("broken", "nowhere.at.all:Thing", trackers.GROUP)
    monkeypatch.setattr("mamba.runs.tracking.added", lambda: {"broken": point})
    with pytest.raises(ConfigError, match="tracking.backends: broken cannot be imported"):
        maker("broken")


def test_a_service_that_is_lost_does_not_end_the_run(small_fit, monkeypatch, capsys):
    class Lost(remote.Remote):
        name = "lost"

        def start(self):
            pass

        def scalars(self, metrics, step):
            self.tell(lambda: 1 / 0)

    monkeypatch.setattr("mamba.runs.tracking.open_backends", lambda *a: [Lost(*a)])
    assert small_fit(optim__epochs=1)["status"] == "finished"
    said = capsys.readouterr().err
    assert said.count("tracking: lost stopped (division by zero); the run goes on") == 1


def test_a_service_that_does_not_start_is_a_sentence(small_config, tmp_path):
    class NoLogin(remote.Remote):
        name = "wandb"

        def start(self):
            raise RuntimeError("api_key not configured")

    with pytest.raises(
        ConfigError, match="wandb does not start .api_key not configured.; log in to it, set tracking.off"
    ):
        NoLogin(tmp_path, small_config(), 0)


def test_mlflow_without_a_network_goes_on_with_the_same_run(small_fit, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # offline counts
    values = {"tracking__backends": "mlflow", "tracking__offline": True, "checkpoint__keep": 3, "trial": "t"}
    small_fit(**values)
    run = tmp_path / "run"
    own = remote.remote_id(run, "mlflow")
    without_last_epoch(run)
    small_fit(**values)
    assert remote.remote_id(run, "mlflow") == own
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "runs" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mamba-forge")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == own and found.info.status == "FINISHED" and found.info.run_name == "run/t"
    assert found.data.params["optim.lr"] == "0.005" and found.data.tags["status"] == "finished"
    points = [(p.step, p.value) for p in client.get_metric_history(own, "val/accuracy")]
    assert points == [(4 * e["epoch"], e["val/accuracy"]) for e in epochs_of(run)], "each step once"


def test_wandb_without_a_network_goes_on_with_the_same_run(small_fit, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    values = {"tracking__backends": "wandb", "tracking__offline": True, "checkpoint__keep": 3}
    small_fit(**values)
    run = tmp_path / "run"
    own = remote.remote_id(run, "wandb")
    without_last_epoch(run)
    small_fit(**values)
    assert remote.remote_id(run, "wandb") == own
    kept = sorted((run / "wandb").glob("offline-run-*"))
    assert kept and all(folder.name.endswith(own) for folder in kept), "wandb sync takes them for one run"
    logged = logged_by_wandb(kept)
    expected = {4 * e["epoch"]: e["val/accuracy"] for e in epochs_of(run)}
    assert {step: values["val/accuracy"] for step, values in logged.items() if "val/accuracy" in values} == expected


def logged_by_wandb(folders):
    """Step -> what was logged at it, from wandb's own files."""
    import json

    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found = {}
    for file in (file for folder in folders for file in folder.glob("*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {
                    (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
                }
                step = record.history.step.num
                found.setdefault(step, {}).update(row)
    return found

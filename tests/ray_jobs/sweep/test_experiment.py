"""An experiment's folder: made whole or not at all, read with care; and what is checked before its trials start."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError, ForgeError
from mamba.runs.files import read_sealed
from ray_jobs.launch.cluster import Cluster
from ray_jobs.launch.console import SweepDisplay
from ray_jobs.sweep import experiment
from ray_jobs.sweep.grid import Trial, expand
from ray_jobs.sweep.run import check_data, compared, resources
from ray_jobs.sweep.space import Space, checked, load_space
from ray_jobs.sweep.tuner import EpochASHA, Watcher
from tests.data.helpers import write_folder
from tests.runs.test_tracking import shown_status


def grid_of(tmp_path, **grid):
    keys = {key.replace("__", "."): values for key, values in grid.items()}
    space = checked(Space(question="q", cost="c", kind="train", grids=[keys]))
    config = RunConfig().with_values({"out": tmp_path, "name": "exp", "data.dataset": "digits"})
    trials = expand(space, 2)
    return experiment.Experiment(space, trials, config, None, None, None, len(trials))


def test_what_is_created_is_loaded(tmp_path):
    own = grid_of(tmp_path, optim__lr=[0.1, 0.2])
    assert experiment.load(experiment.create(own, ["tune.py"])) == own
    with pytest.raises(ConfigError, match="holds an experiment already"):
        experiment.create(own, [])


def test_a_full_disk_blocks_no_name(tmp_path, monkeypatch):
    """An empty experiment.json stayed, which neither could be continued nor begun again."""
    real = Path.open

    class Full:
        """A file on a disk without space."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        return Full(file) if mode == "x" else file

    own = grid_of(tmp_path, optim__lr=[0.1, 0.2])
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ConfigError, match="cannot be written: .*No space left"):
        experiment.create(own, [])
    monkeypatch.setattr(Path, "open", real)
    assert experiment.create(own, []) == own.folder


@pytest.mark.parametrize(
    "change",
    [
        {"trials": [["../../out", {}]]},
        {"trials": [["a", {}], ["A", {}]]},
        {"trials": [[1, {}]]},
        {"trials": "many"},
        {"trials": [["a", 3]]},
        {"space": {}},
        {"config": {"optim": {"lrr": 1}}},
        {"count": None},
    ],
)
def test_a_damaged_experiment_is_a_sentence(tmp_path, change):
    folder = experiment.create(grid_of(tmp_path, optim__lr=[0.1, 0.2]), [])
    file = folder / "experiment.json"
    file.write_text(json.dumps({**read_sealed(file), **change}))  # without its checksum, as earlier versions wrote it
    with pytest.raises(ForgeError) as error:
        experiment.load(folder)
    assert "\n" not in str(error.value) and "experiment.json" in str(error.value)


def test_an_experiment_that_was_changed_is_named(tmp_path):
    folder = experiment.create(grid_of(tmp_path, optim__lr=[0.1, 0.2]), [])
    file = folder / "experiment.json"
    file.write_text(file.read_text().replace('"optim.lr": 0.2', '"optim.lr": 0.3'))
    with pytest.raises(ConfigError, match=r"experiment.json is damaged or was changed .* take its checksum out"):
        experiment.load(folder)


def test_trials_that_ask_otherwise_for_the_same_images_are_refused(tmp_path):
    """A folder with a val/ of its own: trials of two data.val_fraction were one and the same, by two names."""
    root = write_folder(tmp_path / "d", splits=("train", "val", "test"))
    own = grid_of(tmp_path, data__val_fraction=[0.1, 0.3], data__dataset=["folder"], data__root=[str(root)],
                  data__img_size=[8], data__batch_size=[4])  # fmt: skip
    with pytest.raises(ConfigError, match=r"differ in data\.val_fraction \(0\.1 and 0\.3\) have the same images"):
        check_data(own)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '"x"'])
def test_an_experiment_that_is_none_is_a_sentence(tmp_path, text):
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ConfigError, match="is damaged"):
        experiment.load(tmp_path)


def test_data_is_checked_for_every_trial_before_any_starts(tmp_path):
    check_data(grid_of(tmp_path, data__val_fraction=[0.1, 0.2]))
    with pytest.raises(ConfigError, match=r"data\.batch_size 2000 is larger than the training set"):
        check_data(grid_of(tmp_path, data__batch_size=[16, 2000]))
    with pytest.raises(ForgeError, match="nowhere"):
        check_data(grid_of(tmp_path, model__checkpoint=[str(tmp_path / "nowhere")]))


def test_concurrent_trials_never_hold_more_than_there_is(small_config):
    def held(cluster, kind="train", workers=0, share=None, cpus=None):
        config = small_config(scaling__num_workers=workers, scaling__cpus_per_worker=cpus)
        space = load_space("quickstart" if kind == "train" else "component_ablation")
        return resources(experiment.Experiment(space, [], config, None, share, None, 1), cluster)

    two = held(Cluster(2, 0, "here"), workers=2, cpus=1)
    assert two.concurrent == 1 and two.cpus == 0, "two nested runs of two workers would wait for each other"
    assert held(Cluster(8, 0, "here"), workers=2, cpus=2).concurrent == 2
    assert held(Cluster(2, 0, "here")).concurrent == 2
    gpu = held(Cluster(32, 2, "there"), kind="measure")
    assert gpu.gpus == 0.25 and gpu.concurrent == 8
    assert held(Cluster(32, 2, "there"), share=0.5).concurrent == 4
    with pytest.raises(ConfigError, match="needs 4 GPUs or CPUs and the cluster has 2"):
        held(Cluster(2, 0, "here"), workers=4, cpus=1)
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        held(Cluster(2, 0, "here"), share=0.5)


def test_compared_keys_are_those_that_differ(tmp_path):
    own = grid_of(tmp_path, optim__lr=[0.1, 0.2], data__batch_size=[16])
    assert compared(own) == ("optim.lr",)


def test_best_follows_the_direction(capsys):
    rows = [{"trial": "a", "status": "finished", "metrics": {"val/loss": 1.0}, "reason": ""},
            {"trial": "b", "status": "finished", "metrics": {"val/loss": 2.0}, "reason": ""},
            {"trial": "c", "status": "failed", "metrics": {"val/loss": 0.1}, "reason": ""}]  # fmt: skip
    for mode, best in (("min", "best val/loss 1"), ("max", "best val/loss 2")):
        display = SweepDisplay(3, rows, "val/loss", mode)
        with display:
            display.changed("d", {"status": "running"})
            assert display.live.tasks[0].fields["now"].endswith(best)


class Ended:
    """A trial as Tune hands it to callbacks."""

    def __init__(self, name, values, last=None):
        self.config = {"trial": name, "values": values}
        self.trial_id = f"id-{name}"
        self.last_result = {"val/accuracy": 50.0} if last is None else last

    def get_error(self):
        return "Traceback\nActorDiedError: gone"


class Search:
    def settled(self, name, result):
        """A grid learns nothing."""


def test_a_trial_that_tune_ended_gets_a_result_and_a_status(shared_of):
    """Stopped early, its process died again and again, or done by itself: the last keeps what it left."""
    from ray_jobs.sweep.trial import run_trial

    shared = shared_of()
    changes = {}
    watcher = Watcher(shared, Search(), changes.__setitem__)
    run_trial(shared, "done", {"cut.mlp": 0.5}, lambda _: None)
    watcher.on_trial_complete(0, [], Ended("done", {"cut.mlp": 0.5}))
    watcher.on_trial_complete(0, [], Ended("stopped", {"optim.lr": 0.1}))
    watcher.on_trial_error(0, [], Ended("dead", {"optim.lr": 0.1, "optim.min_lr": 0.2}))  # not even resolvable
    states = {"done": "finished", "stopped": "stopped early", "dead": "failed"}
    assert {name: result["status"] for name, result in changes.items()} == states
    assert {name: shown_status(shared.folder / name) for name in states} == states


def test_a_trial_that_ends_because_the_sweep_does_is_not_over(shared_of):
    """Ctrl-C ended trials of several workers with an error, and with a result that kept them from going on."""
    shared = shared_of("train")
    watcher = Watcher(shared, Search(), lambda *_: None)
    watcher.on_trial_start(0, [], Ended("a", {}))
    watcher.ending = True
    watcher.on_trial_error(0, [], Ended("a", {}))
    watcher.on_trial_complete(0, [], Ended("a", {}, {"val/accuracy": 1.0}))
    assert not list(shared.folder.glob("*/trial.json")) and watcher.running == {"a"}


def epochs(folder, name, values, done=True):
    (folder / name).mkdir(parents=True)
    lines = [json.dumps({"epoch": i + 1, "val/accuracy": v}) for i, v in enumerate(values)]
    (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if done:
        result = {"status": "finished", "metrics": {"val/accuracy": values[-1]}, "values": {}}
        (folder / name / "trial.json").write_text(json.dumps(result))


def test_rungs_are_epochs_and_outlive_an_interruption(tmp_path):
    """A trial that went on at epoch 9 competed as if that were its first."""
    early = {"grace_epochs": 1, "reduction": 2}
    space = checked(Space(question="q", cost="c", kind="train", search={"optim.lr": {"low": 0.1, "high": 0.2}},
                          objectives={"val/accuracy": "max"}, trials=9, early_stop=early))  # fmt: skip
    epochs(tmp_path, "good", [80.0, 85.0, 90.0, 95.0])
    epochs(tmp_path, "going", [70.0, 75.0], done=False)
    scheduler = EpochASHA(space, tmp_path)
    rungs = dict(scheduler._brackets[0]._rungs)
    assert {at: list(rungs[at].values()) for at in (1, 2, 4)} == {1: [80.0], 2: [85.0], 4: [95.0]}
    going, fresh = Ended("going", {}), Ended("fresh", {})
    for trial in (going, fresh):
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, fresh, {"epoch": 1, "val/accuracy": 60.0}) == "STOP", (
        "no one to compete with"
    )
    assert scheduler.on_trial_result(None, going, {"epoch": 3, "val/accuracy": 76.0}) == "CONTINUE"
    assert rungs[1]["id-going"] == 70.0 and rungs[2]["id-going"] == 75.0, "its first epochs were another's"
    assert scheduler.on_trial_result(None, going, {"epoch": 4, "val/accuracy": 77.0}) == "STOP"


def test_trials_names_are_checked_before_a_folder_is_made(tmp_path):
    own = grid_of(tmp_path, optim__lr=[0.1])
    bad = experiment.Experiment(own.space, [Trial("../x", {})], own.config, None, None, None, 1)
    with pytest.raises(ConfigError, match="a trial's name"):
        experiment.create(bad, [])
    assert not own.folder.exists()

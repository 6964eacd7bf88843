"""--resume: more epochs said clearly, and which command continues what."""

from __future__ import annotations

import json
import shutil

import pytest

from mamba.errors import ConfigError
from mamba.runs.folder import create_run, epochs_of, read_config
from mamba.train.schedule import learning_rate
from ray_jobs.launch.resume import check_run
from ray_jobs.train import main

FAST = [
    *("--model.d-model", "12", "--model.depth", "2", "--model.d-state", "4", "--data.batch-size", "128"),
    *("--optim.warmup-epochs", "1", "--scaling.num-workers", "0", "--trial", "one"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs of digits."""
    out = tmp_path_factory.mktemp("runs")
    assert main([*FAST, "--out", str(out), "--optim.epochs", "2"]) == 0
    return out / "quickstart" / "one"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "one")


def test_a_finished_run_trains_on_with_the_schedule_of_its_new_length(run, capsys):
    first = json.loads((run / "result.json").read_text())
    assert main(["--resume", str(run), "--optim.epochs", "4"]) == 0
    out = capsys.readouterr().out
    assert "extended from 2 to 4 epochs: from epoch 3 on the learning rate follows the schedule of 4 epochs" in out
    assert [row["epoch"] for row in epochs_of(run)] == [1, 2, 3, 4]
    result = json.loads((run / "result.json").read_text())
    assert result["epochs"] == 4 and json.loads((run / "result-2.json").read_text()) == first
    config = read_config(run)
    assert config.optim.epochs == 4
    steps = result["images"]["train"] // 128
    rates = [row["train/lr"] for row in epochs_of(run)]
    assert (
        rates[2] == pytest.approx(learning_rate(config.optim, 3 * steps - 1, steps), rel=1e-6) and rates[2] > rates[1]
    )
    assert main(["--resume", str(run)]) == 0 and "finished already" in capsys.readouterr().out


def test_an_interrupted_run_is_extended_too_and_none_is_shortened(run, capsys):
    assert main(["--resume", str(run), "--optim.epochs", "1"]) == 2
    assert "optim.epochs 1: a run can only be extended, and" in capsys.readouterr().err
    (run / "result.json").unlink()
    assert main(["--resume", str(run), "--optim.epochs", "3"]) == 0
    assert json.loads((run / "result.json").read_text())["epochs"] == 3 and not (run / "result-2.json").exists()


def test_a_finished_run_without_a_training_state_is_not_extended(run, capsys):
    shutil.rmtree(next((run / "checkpoints").glob("step-*")))
    assert main(["--resume", str(run), "--optim.epochs", "4"]) == 2
    assert "keeps no training state to go on from" in capsys.readouterr().err
    assert json.loads((run / "result.json").read_text())["epochs"] == 2 and read_config(run).optim.epochs == 2


def test_a_run_whose_data_has_changed_is_refused_before_anything_of_it_changes(run, small_data, monkeypatch, capsys):
    for module in ("ray_jobs.launch.run", "mamba.train.trainer"):
        monkeypatch.setattr(f"{module}.load_data", lambda config, seed: small_data)
    assert main(["--resume", str(run), "--optim.epochs", "4"]) == 2
    assert "a run resumes on its own data only" in capsys.readouterr().err
    assert json.loads((run / "result.json").read_text())["epochs"] == 2 and read_config(run).optim.epochs == 2


@pytest.mark.parametrize(
    "made, message",
    [
        ({"experiment.json": {"command": "python ray_jobs/ablate.py"}}, "is an experiment: .*ablate.py --resume"),
        ({"experiment.json": {}}, "is an experiment: continue it with python ray_jobs/tune.py --resume"),
        ({"trial.json": {}}, "is a trial of an experiment"),
        ({"result.json": {"status": "finished", "metrics": {}, "values": {}}}, "is a trial of an experiment"),
        ({"../experiment.json": {}}, "is a trial of an experiment: .*tune.py --resume"),
        ({"round-00/config.yaml": {}}, "is a series of pruning rounds: .*prune.py --resume"),
        ({"pruned.json": {}}, "is what a plan left"),
    ],
)
def test_which_command_continues_what(tmp_path, made, message):
    folder = tmp_path / "a" / "one"
    folder.mkdir(parents=True)
    for name, content in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        check_run(folder)


def test_resume_of_an_experiment_by_train_says_which_command(small_config, tmp_path, capsys):
    folder = create_run(small_config(trial="x"))
    tree = {"config": small_config().model_dump(mode="json"), "command": "python ray_jobs/tune.py --space x"}
    (folder / "experiment.json").write_text(json.dumps(tree))
    assert main(["--resume", str(folder)]) == 2
    assert f"continue it with python ray_jobs/tune.py --resume {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["config.yaml", "result.json"])
@pytest.mark.parametrize("content", ["", "[1, 2]", "{"])
def test_damaged_small_files_are_one_sentence(run, capsys, damage, content):
    (run / damage).write_text(content)
    assert main(["--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and damage in err and len(err.splitlines()) == 1


def test_train_log_holds_what_the_console_said(finished, run, capsys):
    log = (finished / "train.log").read_text()
    assert "epoch 2/2  loss" in log and "test accuracy" in log and "training in this process on" in log
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("digits", "folder"))
    (run / "result.json").unlink()
    assert main(["--resume", str(run)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] in (run / "train.log").read_text()

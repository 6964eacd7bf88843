"""Every key counts somewhere; where it does not, typing it is refused."""

from __future__ import annotations

import pytest

from mamba.config.counts import COUNTS, check_given, counts, idle
from mamba.config.keys import dotted_keys
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from ray_jobs.ablate import main as ablate
from ray_jobs.prune import main as prune
from ray_jobs.train import main as train
from ray_jobs.tune import main as tune

NOT_READ = {
    "train": {"prune", "cut"},
    "rounds": {"cut"},
    "plan": {"ema", "distill", "penalty", "checkpoint", "tracking", "prune"},
    "rsst_plan": {"prune"},
    "own_plan": {"ema", "distill", "penalty", "checkpoint", "tracking", "prune"},
    "own_rsst_plan": {"prune"},
    "measure": {"ema", "distill", "penalty", "checkpoint", "prune"},
    "finetune": {"prune"},
}
"""Groups of keys of which nothing is read, by kind of work."""


@pytest.mark.parametrize("work", list(COUNTS))
def test_all_keys_in_all_kinds_of_work(work):
    groups: dict[str, list[bool]] = {}
    for key in dotted_keys():
        groups.setdefault(key.partition(".")[0], []).append(counts(key, work))
        if not counts(key, work):
            with pytest.raises(ConfigError, match=rf"--{key} .* has no effect in .*: it (counts in|is set by)"):
                check_given([work], [key], [RunConfig()])
    assert {name for name, read in groups.items() if not any(read)} == NOT_READ[work]


def test_every_entry_of_the_table_is_a_key_or_a_group():
    known = {*dotted_keys(), *(key.partition(".")[0] for key in dotted_keys())}
    assert all(set(read) <= known for read in COUNTS.values())
    assert [key for key in dotted_keys() if not any(counts(key, work) for work in COUNTS)] == ["prune.round"]


def test_every_idle_key_is_one():
    for work in COUNTS:
        assert set(idle(RunConfig(), work)) <= set(dotted_keys()) and all(idle(RunConfig(), work).values())


@pytest.mark.parametrize(
    "script, words, message",
    [
        (train, ["--cut.mlp", "0.5"], "--cut.mlp 0.5 has no effect in a training (train.py): it counts in a cut of"),
        (train, ["--prune.rate", "0.3", "--dry-run"], "it counts in rounds of pruning (prune.py); leave it out"),
        (train, ["--data.root", "pictures"], "--data.root pictures has no effect: data.dataset is digits; leave it"),
        (train, ["--penalty.strength", "0.1"], "penalty.kind is off"),
        (train, ["--data.mix-prob", "1"], "data.mixup and data.cutmix are 0"),
        (prune, ["--method", "refill", "--cut.mlp", "0.5"], "has no effect in rounds of pruning (prune.py)"),
        (prune, ["--method", "magnitude", "--prune.score", "l1"], "prune.method is magnitude"),
        (prune, ["--method", "refill", "--prune.round", "2"], "it is set by the rounds themselves"),
        (tune, ["--space", "quickstart", "--prune.rate", "0.3"], "--prune.rate 0.3 has no effect in a training"),
        (tune, ["--space", "quickstart", "--cut.mlp", "0.3"], "--cut.mlp 0.3 has no effect in a training"),
        (tune, ["--space", "quickstart", "--trial", "mine"], "trials of a sweep have names of their own"),
        (tune, ["--space", "quickstart", "--optim.decay-epochs", "3"], "optim.schedule is cosine"),
        (ablate, ["--prune.rate", "0.3"], "--prune.rate 0.3 has no effect in cuts of a trained model"),
        (ablate, ["--distill.alpha", "0.3"], "there is no distill.teacher"),
    ],
)
def test_what_is_typed_and_not_used_is_refused_before_anything_starts(tmp_path, capsys, script, words, message):
    """train.py took --cut.mlp and --prune.rate, prune.py --cut.mlp, tune.py both, and each ran as if without them."""
    assert script([*words, "--out", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_file_may_hold_more_than_counts(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(RunConfig().with_values({"data.dataset": "digits", "cut.mlp": 0.5}).to_yaml())
    assert train(["--config", str(file), "--dry-run"]) == 0


def test_a_stem_that_the_checkpoint_brings_is_not_that_of_the_config(tmp_path):
    beside = RunConfig().with_values({"model.checkpoint": tmp_path, "scaling.num_workers": 2})
    check_given(["train"], ["model.sync_batchnorm", "model.new_head"], [beside])
    with pytest.raises(ConfigError, match=r"model\.stem is patch"):
        check_given(["train"], ["model.sync_batchnorm"], [RunConfig()])
    cct = RunConfig().with_values({"model.stem": "cct", "scaling.num_workers": 2})
    with pytest.raises(ConfigError, match=r"model\.stem is cct"):  # its convolutions have no batch norm
        check_given(["train"], ["model.sync_batchnorm"], [cct])


def test_views_that_training_does_not_show_are_refused():
    """Five were asked for, and one was used."""
    plain = RunConfig().with_values({"data.augment": "none", "eval.tta_views": 5, "eval.tta_always": True})
    for key in ("eval.tta_views", "eval.tta_always"):
        with pytest.raises(ConfigError, match=f"--{key} .* has no effect: data.augment is none"):
            check_given(["train"], [key], [plain])
    check_given(["train"], ["eval.tta_views"], [plain.with_values({"data.augment": "basic"})])

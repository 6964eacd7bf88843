"""Before anything starts: what would have no effect, what is the same, what cannot be, what no trial has."""

from __future__ import annotations

import pytest

from mamba.config.presets import get_preset
from mamba.config.schema import DataConfig, ModelConfig, RunConfig
from mamba.errors import ConfigError
from mamba.models.model import Architecture
from ray_jobs.sweep.checks import TRAINING_DATA, check, check_cuts, check_given, check_machine, data_identity
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.space import FOLDER, Space, checked, load_space

ONE = {"optim.lr": {"low": 1e-4, "high": 1e-2}}


def space(kind="train", **parts):
    if "search" in parts:
        parts = {"objectives": {"val/accuracy": "max"}, "trials": 3, **parts}
    return checked(Space(question="q", cost="c", kind=kind, **parts))


def verify(kind="train", config=None, **parts):
    own = space(kind, **parts)
    config = config or RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0})
    check(own, expand(own, 2), config)


@pytest.mark.parametrize("name", sorted(f.stem for f in FOLDER.glob("*.yaml")))
@pytest.mark.parametrize("preset", ["quickstart", "v2"])
def test_what_ships_is_possible(name, preset):
    own = load_space(name)
    check(own, expand(own, 2), get_preset(preset))


@pytest.mark.parametrize(
    "kind, key, value, words",
    [
        ("train", "name", "x", "name is the experiment's own"),
        ("train", "out", "x", "out is the experiment's own"),
        ("train", "trial", "x", "trial is the experiment's own"),
        ("train", "scaling.num_workers", 2, "the same for all trials"),
        ("train", "prune.rate", 0.5, "belongs to rounds of pruning"),
        ("measure", "prune.rate", 0.5, "belongs to rounds of pruning"),
        ("train", "cut.mlp", 0.5, "which only kind measure does"),
        ("measure", "data.val_fraction", 0.5, "decides the data set"),
        ("measure", "data.root", "x", "decides the data set"),
        ("measure", "model.depth", 3, "the checkpoint brings its own"),
        ("measure", "optim.lr", 0.1, "measured at once; set cut.finetune_epochs"),
        ("measure", "data.augment", "none", "measured at once"),
        ("measure", "ema.decay", 0.5, "measured at once"),
        ("measure", "model.checkpoint", "x", "on the command line"),
    ],
)
def test_a_key_without_effect_is_refused_wherever_it_stands(kind, key, value, words):
    cut = {"cut.mlp": [0.1, 0.2]} if kind == "measure" else {"optim.lr": [0.1, 0.2]}
    search = {"cut.mlp": {"low": 0.1, "high": 0.2}} if kind == "measure" else ONE
    for parts in (
        {"set": {key: value}, "grids": [cut]},
        {"grids": [{**cut, key: [value]}]} if key not in cut else {"grids": [{key: [value]}]},
        {"search": {**search, key: {"choices": [value]}}},
    ):
        with pytest.raises(ConfigError, match=words):
            verify(kind, **parts)


def test_fine_tuning_gives_training_keys_an_effect():
    verify("measure", grids=[{"cut.mlp": [0.5], "optim.lr": [0.1, 0.2]}], set={"cut.finetune_epochs": 1})
    with pytest.raises(ConfigError, match=r"optim\.epochs has no effect"):
        verify("measure", grids=[{"cut.mlp": [0.5], "cut.finetune_epochs": [1], "optim.epochs": [2]}])


def test_a_checkpoint_brings_its_own_model(tmp_path):
    """26 trials trained one model under 26 names."""
    config = RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0})
    verify(grids=[{"model.checkpoint": ["a", "b"], "model.drop_path": [0.0, 0.1]}], config=config)
    with pytest.raises(ConfigError, match=r"model\.pos_embed has no effect beside model\.checkpoint"):
        verify(grids=[{"model.pos_embed": ["rope", "none"]}], config=config.with_values({"model.checkpoint": tmp_path}))
    with pytest.raises(ConfigError, match=r"model\.depth has no effect"):
        verify(grids=[{"model.checkpoint": ["a"], "model.depth": [1, 2]}])


@pytest.mark.parametrize(
    "grid, key",
    [
        ({"data.mix_prob": [0.1, 0.9]}, "data.mix_prob"),
        ({"data.mixup": [0.0, 0.8], "data.mix_prob": [0.1, 0.9]}, "data.mix_prob"),
        ({"ema.enabled": [True, False], "ema.decay": [0.9, 0.99]}, "ema.decay"),
        ({"penalty.strength": [0.1, 0.9]}, "penalty.strength"),
        ({"distill.alpha": [0.1, 0.9]}, "distill.alpha"),
        ({"model.sync_batchnorm": [True, False]}, "model.sync_batchnorm"),
        ({"model.stem": ["conv"], "model.sync_batchnorm": [True, False]}, "model.sync_batchnorm"),
        ({"data.mix_prob": [0.0], "data.mixup": [0.1, 0.2]}, "data.mixup"),
        ({"data.fit": ["crop", "pad"]}, "data.fit"),
        ({"data.cache": ["files", "decoded"]}, "data.cache"),
        ({"data.root": ["a", "b"]}, "data.root"),
        ({"data.strict": [True, False]}, "data.strict"),
        ({"data.val_fraction": [0.0], "data.split_seed": [1, 2]}, "data.split_seed"),
        ({"optim.decay_epochs": [1.0, 2.0]}, "optim.decay_epochs"),
        ({"optim.muon_momentum": [0.9, 0.95]}, "optim.muon_momentum"),
        ({"optim.warmup": ["linear", "exponential"]}, "optim.warmup"),
        ({"distill.teacher": ["a"], "distill.alpha": [0.0], "distill.temperature": [1.0, 2.0]}, "distill.temperature"),
        ({"penalty.kind": ["l1"], "penalty.strength": [0.0], "penalty.exponent": [1.0, 2.0]}, "penalty.exponent"),
        ({"eval.tta_always": [True, False]}, "eval.tta_always"),
        ({"eval.batch_size": [64, 128]}, "eval.batch_size"),
        ({"checkpoint.keep": [1, 2]}, "checkpoint.keep"),
        ({"model.rope_grid": [2, 4]}, "model.rope_grid"),
        ({"model.new_head": [True, False]}, "model.new_head"),
        ({"model.new_size": [True, False]}, "model.new_size"),
        ({"model.patch_size": [None, 2]}, "model.patch_size"),
    ],
)
def test_trials_that_differ_in_a_key_without_effect_are_refused(grid, key):
    with pytest.raises(ConfigError, match=f"are the same: {key} has no effect in them"):
        verify(grids=[grid])


def test_measurements_that_are_the_same_are_refused():
    with pytest.raises(ConfigError, match=r"are the same: cut\.scope has no effect"):
        verify("measure", grids=[{"cut.mlp": [0.5], "cut.layer": [0], "cut.scope": ["global", "layerwise"]}])
    with pytest.raises(ConfigError, match=r"trial mlp-0\.0 cuts nothing"):
        verify("measure", grids=[{"cut.mlp": [0.0, 0.5]}])
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs has no effect"):
        verify(
            "measure",
            set={"cut.finetune_epochs": 1},
            grids=[{"cut.mlp": [0.5], "optim.warmup_epochs": [5.0, 10.0]}],
        )


def test_rates_that_no_table_would_name_are_refused():
    """--cut.mlp 0.5 beside a grid over linear_out: each trial cut both, and was listed as linear_out."""
    config = RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0, "cut.mlp": 0.5})
    with pytest.raises(ConfigError, match=r"cut\.mlp 0\.5 of the experiment's config would be in every trial"):
        verify("measure", config=config, grids=[{"cut.linear_out": [0.5]}])
    layer = config.with_values({"cut.mlp": 0.0, "cut.layer": 1})
    with pytest.raises(ConfigError, match=r"cut\.layer 1 of the experiment's config"):
        verify("measure", config=layer, grids=[{"cut.linear_out": [0.5]}])
    verify("measure", config=config, grids=[{"cut.linear_out": [0.5]}], set={"cut.mlp": 0.5})


def test_what_was_typed_counts_or_is_refused():
    """A space's set: came over the command line without a word."""
    typed = RunConfig().with_values({"optim.epochs": 9, "optim.lr": 0.1})
    fixed = space(grids=[{"optim.weight_decay": [0.1, 0.2]}], set={"optim.epochs": 6})
    with pytest.raises(ConfigError, match=r"--optim\.epochs 9 has no effect: the search space sets optim\.epochs 6"):
        check_given(fixed, typed, ["optim.epochs"])
    assert check_given(fixed, typed, ["optim.lr"]) == []
    assert check_given(fixed, RunConfig().with_values({"optim.epochs": 6}), ["optim.epochs"]) == []
    with pytest.raises(ConfigError, match=r"--optim\.lr 0\.1 has no effect: the search space varies optim\.lr"):
        check_given(space(search=ONE), typed, ["optim.lr"])
    some = space(grids=[{"optim.lr": [0.2, 0.3]}, {"optim.weight_decay": [0.1]}])
    assert check_given(some, typed, ["optim.lr"]) == [
        "--optim.lr 0.1 counts in 1 of 2 grids; the others have values of their own"
    ]


def test_what_a_file_says_and_the_space_overrides_is_said():
    config = RunConfig().with_values({"optim.epochs": 9, "optim.lr": 0.1, "seed": 3})
    fixed = space(grids=[{"optim.lr": [0.1, 0.2]}], set={"optim.epochs": 6})
    assert check_given(fixed, config, [], ["optim.epochs", "optim.lr", "seed"]) == [
        "the search space has its own instead of --config's: optim.epochs (6, not 9), optim.lr"
    ]
    assert check_given(fixed, config, [], ["seed"]) == []


def test_what_was_typed_has_an_effect_in_some_trial():
    config = RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0, "data.mix_prob": 0.3})

    def typed(*keys, **parts):
        own = space(**parts)
        check(own, expand(own, 2), config, keys)

    with pytest.raises(ConfigError, match=r"--data\.mix_prob 0\.3 has no effect: data\.mixup and data\.cutmix are 0"):
        typed("data.mix_prob", search=ONE)
    typed("data.mix_prob", grids=[{"data.mixup": [0.0, 0.2]}])
    cuts = [{"cut.mlp": [0.1, 0.2]}]
    with pytest.raises(ConfigError, match=r"--optim\.lr .* has no effect in cuts of a trained model"):
        typed("optim.lr", kind="measure", grids=cuts)
    typed("optim.lr", kind="measure", grids=cuts, set={"cut.finetune_epochs": 1})


def test_cuts_that_a_model_does_not_allow_are_refused_before_trials_start():
    """Each was a failed trial, the last perhaps after hours."""
    own = Architecture.from_config(ModelConfig(d_model=8, depth=2, patch_size=4, mlp_ratio=0.0), 10, 8)
    config = RunConfig().with_values({"data.dataset": "digits"})

    def cuts(**parts):
        one = space("measure", **parts)
        check_cuts(one, expand(one, 2), config, own)

    cuts(grids=[{"cut.linear_out": [0.5], "cut.layer": [0, 1]}])
    cuts(search={"cut.linear_out": {"low": 0.1, "high": 0.5}})
    for parts, words in (
        ({"grids": [{"cut.linear_out": [0.5], "cut.layer": [1, 2]}]}, r"trial layer-02 cannot be: there is no block 2"),
        (
            {"grids": [{"cut.linear_out": [0.1]}, {"cut.stem": [0.5]}]},
            r"stem-0\.5 cannot be: the model's stem has no inner",
        ),
        ({"grids": [{"cut.mlp": [0.5]}]}, r"no block to be cut has a weight of component 'mlp'"),
        ({"grids": [{"cut.block": [0.9]}], "set": {"cut.structured": True}}, r"takes 2 of 2 blocks"),
        ({"search": {"cut.linear_out": {"low": 0.1, "high": 0.5}, "cut.layer": {"low": 0, "high": 2}}}, "cut.layer 2"),
        ({"search": {"cut.stem": {"low": 0.1, "high": 0.5}}}, r"search: cut\.stem 0\.1 cannot be"),
    ):
        with pytest.raises(ConfigError, match=words):
            cuts(**parts)


def test_trials_that_the_machine_cannot_train_are_refused_before_they_start():
    config = RunConfig().with_values({"data.dataset": "digits"})
    grid = space(grids=[{"data.device": ["cpu", "gpu"]}])
    check_machine(grid, expand(grid, 2), config, gpu=True)
    with pytest.raises(ConfigError, match=r"trial device-gpu cannot be: data\.device 'gpu' needs a GPU"):
        check_machine(grid, expand(grid, 2), config, gpu=False)
    drawn = space(search={"data.device": {"choices": ["cpu", "gpu"]}})
    with pytest.raises(ConfigError, match=r"search: data\.device gpu cannot be"):
        check_machine(drawn, [], config, gpu=False)


@pytest.mark.parametrize("key", ["seed", "data.split_seed"])
def test_a_search_does_not_choose_the_luckiest(key):
    with pytest.raises(ConfigError, match=f"search: {key} .*give grids"):
        verify(search={key: {"low": 0, "high": 100}})
    with pytest.raises(ConfigError, match=r"search: data\.val_fraction .*the easiest would win"):
        verify(search={"data.val_fraction": {"low": 0.1, "high": 0.5}})
    verify(grids=[{key: [0, 1]}])


def test_an_early_stop_that_stops_nothing_is_refused():
    epochs = RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0, "optim.epochs": 4})
    for grace in (4, 100):
        with pytest.raises(ConfigError, match=f"grace_epochs {grace} has no effect: trials have 4 epochs"):
            verify(search=ONE, early_stop={"grace_epochs": grace, "reduction": 2}, config=epochs)
    verify(search=ONE, early_stop={"grace_epochs": 3, "reduction": 2}, config=epochs)


def test_model_names_beside_widths_are_one_model():
    config = RunConfig().with_values({"data.dataset": "digits", "model.d_model": 8, "model.depth": 2})
    with pytest.raises(ConfigError, match=r"model\.name has no effect"):
        verify(grids=[{"model.name": ["mamba_tiny", "mamba_small"]}], config=config)
    with pytest.raises(ConfigError, match=r"model\.name has no effect"):
        verify(search={"model.name": {"choices": ["mamba_tiny", "mamba_small"]}}, config=config)
    verify(grids=[{"model.name": ["mamba_tiny", "mamba_small"]}])


def test_seeds_of_a_measurement_without_chance_are_refused():
    with pytest.raises(ConfigError, match="seed has no effect"):
        verify("measure", grids=[{"cut.mlp": [0.5]}], seeds=[0, 1])
    verify("measure", grids=[{"cut.mlp": [0.5], "cut.criterion": ["random"]}], seeds=[0, 1])


def test_a_searched_key_that_never_counts_is_refused():
    with pytest.raises(ConfigError, match=r"data\.mix_prob has no effect"):
        verify(search={"data.mix_prob": {"low": 0.1, "high": 0.9}})
    mix = {"low": 0.1, "high": 0.9, "when": {"data.mixup": {"above": 0}}}
    verify(search={"data.mixup": {"choices": [0.0, 0.8]}, "data.mix_prob": mix})
    with pytest.raises(ConfigError, match=r"data\.mix_prob is never drawn: data\.mixup is 0\.0"):
        verify(search={"data.mix_prob": mix})


def test_trials_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"trial batch_size-7 cannot be: data\.batch_size 7 is not divisible"):
        verify(grids=[{"data.batch_size": [8, 7]}], set={"optim.accumulate": 2})
    with pytest.raises(ConfigError, match=r"none of 16 points that were drawn can be: optim\.min_lr"):
        verify(search=ONE, set={"optim.min_lr": 1.0})


@pytest.mark.parametrize(
    "objective, words",
    [
        ("val/acc", r"val/acc is no metric of these trials; did you mean val/accuracy\?"),
        ("test/accuracy", "what is chosen by the test set"),
        ("bench/images_per_s", "measured after the last trial"),
        ("val/drop", "val/drop is no metric of these trials"),
    ],
)
def test_objectives_are_what_trials_measure(objective, words):
    with pytest.raises(ConfigError, match=words):
        verify(search=ONE, objectives={objective: "max"})


@pytest.mark.parametrize("objective, mode, right", [("val/accuracy", "min", "max"), ("val/loss", "max", "min"),
                                                    ("model/macs", "max", "min")])  # fmt: skip
def test_an_objective_of_the_wrong_direction_is_refused(objective, mode, right):
    """It ran to its end, and the worst model was called the best."""
    keys = {"model.depth": {"low": 1, "high": 4}}
    with pytest.raises(ConfigError, match=f"{objective} {mode} would make the worst trial the best; valid: {right}"):
        verify(search=keys, objectives={objective: mode})
    verify(search=keys, objectives={objective: right})
    verify(search=keys, objectives={"train/lr": mode})


def test_objectives_need_what_they_measure():
    with pytest.raises(ConfigError, match=r"data\.val_fraction 0 leaves no image"):
        verify(search=ONE, set={"data.val_fraction": 0.0})
    with pytest.raises(ConfigError, match=r"ema\.enabled is False in some trials"):
        verify(search=ONE, set={"ema.enabled": False}, objectives={"val/ema_accuracy": "max"})
    with pytest.raises(ConfigError, match="known at the end alone"):
        verify(search={"model.depth": {"low": 1, "high": 4}}, objectives={"model/macs": "min"}, early_stop={})
    verify(
        "measure",
        set={"cut.structured": True},
        search={"cut.mlp": {"low": 0.1, "high": 0.9}},
        objectives={"val/drop": "min", "model/macs": "min"},
    )
    with pytest.raises(ConfigError, match=r"model/macs is the dense model's in every trial"):
        verify("measure", search={"cut.mlp": {"low": 0.1, "high": 0.9}}, objectives={"model/macs": "min"})


def test_trials_on_the_same_images_are_known_by_their_data_keys():
    base = RunConfig().with_values({"data.dataset": "digits"}).resolve()

    def identity(**values):
        return data_identity(base.with_values({f"data.{k}": v for k, v in values.items()}).data)

    assert identity(batch_size=3, augment="none", mixup=0.5, device="cpu") == identity()
    assert len({identity(), identity(img_size=16), identity(val_fraction=0.3), identity(root="elsewhere")}) == 4
    assert {"dataset", "root", "img_size", "val_fraction"}.isdisjoint(TRAINING_DATA)


def test_every_key_of_the_data_says_whether_it_decides_the_images():
    """A new one belongs into TRAINING_DATA, or into this list: else trials that differ in it would be taken for trials
    on other images, or the other way round."""
    images = {"dataset", "root", "img_size", "fit", "cache", "val_fraction", "split_seed", "split_from", "strict"}
    keys = set(DataConfig.model_fields)
    assert keys >= TRAINING_DATA and keys - TRAINING_DATA <= images, keys - TRAINING_DATA - images

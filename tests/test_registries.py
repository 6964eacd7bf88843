"""What a key lists is what its registry has; and a toy of each kind, added from outside, works like what ships."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch

import mamba
import pruning
from mamba.config import choices as config_choices
from mamba.config.choices import PLUGINS, Registry, load_plugins, words_of
from mamba.config.cli import parse_train_args
from mamba.config.counts import idle
from mamba.config.facts import DATASETS as KNOWN_DATASETS
from mamba.config.facts import METHODS as KNOWN_METHODS
from mamba.config.facts import MIXERS as KNOWN_MIXERS
from mamba.config.facts import MethodFacts
from mamba.config.keys import choices, dotted_keys
from mamba.config.presets import PRESETS
from mamba.config.resolve import MODEL_SIZES
from mamba.config.schema import CutConfig, RunConfig
from mamba.data.policies import POLICIES
from mamba.data.registry import DATASETS, Source, describe, load_data
from mamba.errors import CheckpointError, ConfigError
from mamba.models.embed import STEMS, PatchEmbed
from mamba.models.heads import HEADS, MeanPool
from mamba.models.model import Architecture, MambaModel
from mamba.models.ssm import MIXERS, Mixer, ScanPath
from mamba.runs import checkpoint as ckpt
from mamba.runs.metrics import METRICS, Metric, metric
from mamba.train.distributed import Process
from mamba.train.optim import OPTIMIZERS, make_adamw, make_optimizer, parameter_groups
from mamba.train.schedule import SCHEDULES as LR_SCHEDULES
from mamba.train.schedule import learning_rate
from mamba.train.trainer import fit
from pruning.components import COMPONENTS, Component
from pruning.cut import cut, prune_component
from pruning.importance import SCORES, Score
from pruning.masks import Masks
from pruning.penalty import NORMS, SCHEDULES
from pruning.refill import REFILL_SCORES, RefillScore, refill_masks
from pruning.rounds import METHODS, Engine, Method, run_rounds
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.space import load_space


def registries() -> dict[str, Registry]:
    """Every registry of the packages, by the key that chooses from it."""
    found: dict[str, Registry] = {}
    for top in (mamba, pruning):
        for about in pkgutil.walk_packages(top.__path__, f"{top.__name__}."):
            if "triton" in about.name:
                continue
            module: ModuleType = importlib.import_module(about.name)
            found |= {value.key: value for value in vars(module).values() if isinstance(value, Registry)}
    return found


def words(key: str) -> set[str]:
    return set(words_of(dotted_keys()[key].model_fields[key.rpartition(".")[2]].annotation))


def test_keys_list_what_registries_have():
    found = registries()
    assert {
        *("data.dataset", "data.augment", "model.name", "model.stem", "model.mixer", "model.head"),
        *("optim.optimizer", "optim.schedule", "prune.method", "prune.score", "prune.schedule", "cut.criterion"),
    } <= set(found)
    for key, registry in found.items():
        assert set(registry.shipped) | set(registry.besides) == words(key), key
        assert not set(registry.shipped) & set(registry.besides), key


def test_keys_list_what_tables_have():
    assert words("penalty.kind") == {"off", *NORMS}
    ones = {name: 0.5 for name in COMPONENTS if name in CutConfig.model_fields}
    assert CutConfig(**ones).rates == ones and len(ones) >= 9
    assert {name for name, component in COMPONENTS.items() if component.refused is None} <= set(CutConfig.model_fields)
    assert {name: source.facts for name, source in DATASETS.items()} == KNOWN_DATASETS
    facts = {name: MethodFacts(method.choose is not None, method.decays) for name, method in METHODS.items()}
    assert {**facts, "none": MethodFacts(False, False)} == KNOWN_METHODS
    assert {name: mixer.facts for name, mixer in MIXERS.items()} == KNOWN_MIXERS


@dataclass
class Inverted:
    """A toy policy: some images are inverted."""

    slots: int = 1

    def draw(self, rng, n):
        return rng.integers(0, 2, (n, 1)), np.zeros((n, 1))

    def apply(self, images, code, arguments):
        return 255 - images


class ToyHead(MeanPool):
    """The last token."""

    def forward(self, x, norm):
        return norm(x[:, -1])


def signed(model, parameters, calibration, seed):
    return {name: p.detach().float() for name, p in parameters.items()}


def keep_two_thirds(model, masks, target, fillback_rate, score, calibration, seed, among) -> Masks:
    return refill_masks(model, masks, target, 2 / 3, "l2", calibration, seed, among)


@pytest.fixture
def toys(monkeypatch, small_data):
    """A toy of each kind, as a module of a user's would add it; gone after the test."""
    entries = [
        (DATASETS, Source(8, lambda config, seed: small_data, 3)),
        (POLICIES, lambda side, mean, magnitude, deviation: Inverted()),
        (MIXERS, Mixer((ScanPath(), ScanPath("_b", reverse=True), ScanPath("_2", scale=2)))),
        (STEMS, PatchEmbed),
        (HEADS, ToyHead),
        (MODEL_SIZES, (16, 1)),
        (OPTIMIZERS, lambda model, config: make_adamw(model, config)),
        (LR_SCHEDULES, lambda config, step, steps: 0.5),
        (SCORES, Score(signed)),
        (REFILL_SCORES, RefillScore("toy")),
        (SCHEDULES, lambda epoch, epochs, exponent: float(epoch == epochs)),
        (METHODS, Method(keep_two_thirds, shrinks=True)),
    ]
    for registry, entry in entries:
        registry["toy"] = entry
    monkeypatch.setitem(COMPONENTS, "toy", Component(groups={"channel": "d_inner"}, structured="channel"))
    monkeypatch.setitem(METRICS, "val/toy", Metric("val/toy", "toys found", "%", "{:.1f}", "down"))
    monkeypatch.setitem(PRESETS, "toy", lambda: RunConfig(name="toy"))
    yield {registry.key for registry, _ in entries}
    for registry, _ in entries:
        del registry["toy"]


def test_every_registry_takes_a_toy(toys):
    assert toys == set(registries())
    for key in toys:
        assert choices(key)[-1] == "toy"
        assert parse_train_args([f"--{key}", "toy"]).config.flat()[key] == "toy"


def test_toys_train_and_come_back(toys, small_config, tmp_path, recwarn):
    class Launched(Process):
        """A toy launcher's process."""

    seen = []
    told = Launched()
    told.report = lambda metrics, checkpoint: seen.append(metrics)
    config = small_config(
        data__dataset="toy", data__augment="toy", model__mixer="toy", model__stem="toy", model__head="toy",
        model__name="toy", data__img_size=8, optim__epochs=2, optim__optimizer="toy",
        optim__schedule="toy",
    )  # fmt: skip
    assert describe(config.data, 0)[0] == 3
    result = fit(config, told, tmp_path / "run", load_data(config.data, 0))
    assert result["status"] == "finished" and len(seen) == 2
    model, description = ckpt.load_model(tmp_path / "run")
    assert isinstance(model.pool, ToyHead) and model.architecture.blocks[0].mixer == "toy"
    assert description["config"]["model"]["mixer"] == "toy"
    assert not [w for w in recwarn if "serializ" in str(w.message).lower()]
    pruned = cut(model, {"linear_out": 0.5}, score="toy", shrink=True).model
    assert pruned(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_a_toy_component_is_cut(toys):
    architecture = Architecture.from_config(RunConfig().with_values({"model.name": "toy"}).model, 3, 8)
    model = MambaModel(architecture)
    smaller = prune_component(model, "toy", 0.5, shrink=True)
    assert smaller.architecture.blocks[0].d_inner == model.architecture.blocks[0].d_inner // 2


def test_the_rate_of_a_stem_is_a_key():
    config = RunConfig().with_values({"model.stem": "conv", "model.d_model": 16, "model.depth": 1, "cut.stem": 0.5})
    model = MambaModel(Architecture.from_config(config.model, 3, 8))
    smaller = cut(model, config.cut.rates, shrink=True).model
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_toy_method_prunes_in_rounds(toys, small_config, small_data, tmp_path):
    config = small_config(name="toys", prune__method="toy", prune__score="toy", prune__rounds=1, optim__epochs=1)

    def train(own, folder):
        return fit(own, Process(), folder, small_data)

    def measure(own, folder):
        size = float(sum(p.numel() for p in ckpt.load_model(folder)[0].parameters()))
        names = ("model/nonzero", "model/macs", "test/accuracy", "bench/images_per_s", "bench/latency_ms")
        return {"model/params": size, **dict.fromkeys(names, 1.0)}

    folder = tmp_path / "runs" / "toys"
    folder.mkdir(parents=True)
    rows = run_rounds(config, folder, small_data, Engine(train, measure, print))
    assert rows is not None and rows[1]["params"] < rows[0]["params"]


def test_a_toy_preset_and_a_toy_sweep(toys, tmp_path):
    assert parse_train_args(["--preset", "toy"]).config.name == "toy"
    file = tmp_path / "toy.yaml"
    file.write_text(
        "question: Which?\ncost: nothing\nkind: train\ngrids:\n- model.mixer: [forward, toy]\n  data.dataset: [toy]\n"
    )
    assert [t.values["model.mixer"] for t in expand(load_space(file), 1)] == ["forward", "toy"]


def test_a_toy_metric(toys):
    assert metric("val/toy").text(12.34) == "12.3 %" and metric("val/toy").rank(1.0) < metric("val/toy").rank(2.0)
    assert metric("val/unlisted").title == "val/unlisted"


def test_metrics_are_listed_once():
    """By their own keys, each under the name that it is found by."""
    assert all(key == listed.key and "/" in key and listed.label for key, listed in METRICS.items())
    assert len({listed.label for listed in METRICS.values()}) == len(METRICS)


def test_what_is_not_registered_is_refused_with_what_is(toys):
    with pytest.raises(ConfigError, match=r"model.mixer: should be 'forward',.* or '[a-z]*', or 'toy', got 'toi'"):
        RunConfig().with_values({"model.mixer": "toi"})
    with pytest.raises(ConfigError, match="optim.warmup: should be 'linear' or 'exponential', got 'toy'"):
        RunConfig().with_values({"optim.warmup": "toy"})


def test_toys_are_gone():
    with pytest.raises(ConfigError, match="model.mixer: should be"):
        RunConfig().with_values({"model.mixer": "toy"})


def test_a_data_set_without_a_side_asks_for_one(toys):
    config = RunConfig().with_values({"data.dataset": "toy"})
    assert config.resolve().data.img_size == 8
    DATASETS["toy"] = Source(None, DATASETS["toy"].load, 3)
    with pytest.raises(ConfigError, match="data.img_size is needed: data.dataset 'toy' has no side of its own"):
        config.resolve()


def test_what_has_no_effect_follows_from_the_entry(toys):
    """The config knew data sets and methods by their words: of an added one it refused nothing, or all."""

    def refused(work, **values):
        return set(idle(RunConfig().with_values({k.replace("__", "."): v for k, v in values.items()}), work))

    files = {"data.fit", "data.cache", "data.strict", "data.split_from"}
    assert files <= refused("train", data__dataset="toy") and "data.root" not in refused("train", data__dataset="toy")
    DATASETS["toy"] = Source(8, DATASETS["toy"].load, 3, rooted=False, files=True)
    assert not files & refused("train", data__dataset="toy") and "data.root" in refused("train", data__dataset="toy")
    chosen, decayed = {"prune.score", "prune.fillback_rate"}, {"prune.ceiling", "prune.grow_fraction"}
    for method, off in ((Method(), {*chosen, *decayed}), (Method(keep_two_thirds), decayed),
                        (Method(keep_two_thirds, decays=True), set())):  # fmt: skip
        METHODS["toy"] = method
        assert refused("rounds", prune__method="toy") & {*chosen, *decayed} == off
    with pytest.raises(ConfigError, match="prune.grow_fraction 0.9 of optim.epochs 1 leaves no epoch"):
        RunConfig().with_values({"prune.method": "toy", "prune.grow_fraction": 0.9, "optim.epochs": 1,
                                 "optim.warmup_epochs": 0}).resolve()  # fmt: skip
    read = {"data.magnitude", "optim.decay_epochs", "optim.muon_momentum"}
    words = {"data__augment": "toy", "optim__schedule": "toy", "optim__optimizer": "toy"}
    assert not read & refused("train", **words) and read <= refused("train")


def test_help_with_a_toy(toys, capsys):
    for page in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse_train_args(["--data.dataset", "toy", page])
        assert "default: toy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("registry", "name", "entry", "told"),
    [
        (SCORES, "l1", SCORES["l2"], "'l1' is what ships"),
        (METHODS, "none", METHODS["refill"], "'none' is no name"),
        (MIXERS, "", MIXERS["forward"], "'' is no name; valid: letters"),
        (MIXERS, "a b/c", MIXERS["forward"], "'a b/c' is no name"),
        (MIXERS, "five", 5, "'five' is a int; valid: a Mixer"),
        (OPTIMIZERS, "five", 5, "'five' is a int; valid: a function"),
        (MODEL_SIZES, "five", 5, "'five' is a int; valid: a tuple"),
    ],
)
def test_names_and_entries_that_are_none_are_refused(registry, name, entry, told):
    before = dict(registry)
    with pytest.raises(ConfigError, match=f"{registry.key}: {told}"):
        registry[name] = entry
    assert dict(registry) == before


@pytest.mark.parametrize(
    ("paths", "more", "told"),
    [
        ((), {}, r"paths end in \[\]"),
        ((ScanPath("_x"),), {}, "nothing for the first"),
        ((ScanPath(), ScanPath()), {}, "an ending of its own"),
        ((ScanPath(), ScanPath(".b")), {}, "valid: _ and letters"),
        ((ScanPath(), ScanPath("_2", scale=0)), {}, "scale 0; valid: whole numbers from 1"),
        ((ScanPath(),), {"directions": ()}, "valid: some of forward"),
        ((ScanPath(),), {"directions": ("sideways",)}, "valid: some of forward"),
    ],
)
def test_mixers_that_no_block_is_made_of(paths, more, told):
    with pytest.raises(ValueError, match=told):
        Mixer(paths, **more)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m, c: None, "makes a NoneType; valid: a torch.optim.Optimizer"),
        (lambda m, c: torch.optim.SGD(m.parameters(), lr=c.lr), "its groups lack name and lr_scale"),
        (lambda m, c: torch.optim.SGD(parameter_groups(m, 0.0, 1.0)[:1], lr=c.lr), "is in 0 of its groups"),
    ],
)
def test_optimizers_that_do_not_train_every_parameter_once(small_config, make, told):
    OPTIMIZERS["mine"] = make
    try:
        config = small_config(optim__optimizer="mine")
        model = MambaModel(Architecture.from_config(config.model, 3, 8))
        with pytest.raises(ConfigError, match=f"optim.optimizer 'mine'.*{told}"):
            make_optimizer(model, config.optim)
    finally:
        del OPTIMIZERS["mine"]


def test_heads_and_stems_that_make_another_shape(small_config):
    class AllTokens(MeanPool):
        def forward(self, x, norm):
            return norm(x)

    class OneToken(PatchEmbed):
        def forward(self, images):
            return super().forward(images)[:, :1]

    of_head = r"model.head 'mine' makes \(2, 16, 12\) of tokens .*\(batch, 12\)"
    of_stem = r"model.stem 'mine' makes \(2, 1, 12\) of .*\(batch, 16, 12\)"
    for registry, entry, told in ((HEADS, AllTokens, of_head), (STEMS, OneToken, of_stem)):
        registry["mine"] = entry
        try:
            config = small_config(**{registry.key.replace(".", "__"): "mine", "model__pos_embed": "none"})
            model = MambaModel(Architecture.from_config(config.model, 3, 8))
            with pytest.raises(ConfigError, match=told):
                model(torch.zeros(2, 3, 8, 8))
        finally:
            del registry["mine"]


@pytest.mark.parametrize("share", [float("nan"), -1.0, 1.5, "x", None])
def test_schedules_that_give_no_share(small_config, share):
    LR_SCHEDULES["mine"] = lambda config, step, steps: share
    try:
        with pytest.raises(ConfigError, match="optim.schedule 'mine' gives .* at step 9; valid: a number from 0"):
            learning_rate(small_config(optim__schedule="mine").optim, 9, 5)
    finally:
        del LR_SCHEDULES["mine"]


def test_a_mixer_that_is_another_by_now_is_not_taken_for_that_of_a_model(small_config, tmp_path):
    """The name alone says nothing: the same weights, read from the other end, would be another model."""
    MIXERS["mine"] = Mixer((ScanPath(), ScanPath("_b", reverse=True)))
    try:
        model = MambaModel(Architecture.from_config(small_config(model__mixer="mine").model, 3, 8))
        folder = ckpt.save_checkpoint(tmp_path / "best-00001", model, None, {}, None)
        assert ckpt.load_model(folder)[0].architecture == model.architecture
        MIXERS["mine"] = Mixer((ScanPath(), ScanPath("_b")))
        with pytest.raises(CheckpointError, match="trained with another mixer 'mine' than is added now"):
            ckpt.load_model(folder)
    finally:
        del MIXERS["mine"]
    with pytest.raises(CheckpointError, match="is of model.mixer 'mine', which is none of forward, .*MAMBA_FORGE_PL"):
        ckpt.load_model(folder)


def test_two_plugins_that_add_one_name(tmp_path, monkeypatch):
    for name in ("one_of_two", "two_of_two"):
        (tmp_path / f"{name}.py").write_text("from pruning.importance import SCORES\nSCORES['both'] = SCORES['l1']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(PLUGINS, "one_of_two,two_of_two")
    load_plugins.cache_clear()
    try:
        with pytest.raises(ConfigError, match="'both' is added by the plug-in one_of_two and by the plug-in two_of_t"):
            RunConfig()
    finally:
        load_plugins.cache_clear()
        if "both" in SCORES:
            del SCORES["both"]
        for name in ("one_of_two", "two_of_two"):
            sys.modules.pop(name, None)


def test_plugins_are_imported_before_a_config_is_made(tmp_path, monkeypatch):
    (tmp_path / "my_toys.py").write_text(
        "from pruning.importance import SCORES\nSCORES['from_a_plugin'] = SCORES['l1']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(PLUGINS, "my_toys")
    load_plugins.cache_clear()
    try:
        assert parse_train_args(["--cut.criterion", "from_a_plugin"]).config.cut.criterion == "from_a_plugin"
        monkeypatch.setenv(PLUGINS, "my_toys,no_such_module")
        load_plugins.cache_clear()
        with pytest.raises(ConfigError, match="MAMBA_FORGE_PLUGINS: no_such_module cannot be imported"):
            RunConfig()
    finally:
        load_plugins.cache_clear()
        SCORES.pop("from_a_plugin", None)
        config_choices._added.get("cut.criterion", []).clear()
        sys.modules.pop("my_toys", None)

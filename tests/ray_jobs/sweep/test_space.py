"""Search spaces: what ships is valid and expands to what it says; what is wrong is named."""

from __future__ import annotations

import pytest
import yaml
from optuna.distributions import FloatDistribution, IntDistribution

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from ray_jobs.sweep.grid import expand
from ray_jobs.sweep.space import FOLDER, Space, load_space

SHIPPED = sorted(f.stem for f in FOLDER.glob("*.yaml"))


def test_what_ships():
    names = "component_ablation joint_pruning layer_sensitivity model_family pruning quickstart recipe repair"
    assert [*names.split(), "rounds_70", "rounds_quick", "stage_a", "stage_b", "stages"] == SHIPPED
    for name in SHIPPED:
        space = load_space(name)
        assert space.question and ("series" if space.kind == "rounds" else "trial") in space.cost


def test_the_component_grid_is_the_documented_one():
    trials = expand(load_space("component_ablation"), 24)
    components = ("linear_out", "mlp", "linear_gate", "linear_in", "conv1d", "linear_B_C", "linear_delta")
    assert {tuple(t.values.items()) for t in trials} == {
        ((f"cut.{name}", rate),) for name in components for rate in (0.3, 0.5, 0.7, 0.9)
    }
    assert len(trials) == 28 and trials[0].name == "linear_out-0.3"


def test_the_layer_grid_takes_every_block_alone():
    trials = expand(load_space("layer_sensitivity"), 24)
    assert [t.values["cut.layer"] for t in trials] == list(range(24))
    assert [t.name for t in trials[:2]] == ["layer-00", "layer-01"]


def test_the_joint_grid():
    rates = [
        {k.removeprefix("cut."): v for k, v in t.values.items() if k != "cut.structured"}
        for t in expand(load_space("joint_pruning"), 24)
    ]
    assert rates == [
        {"linear_out": 0.7, "mlp": 0.7},
        {"linear_out": 0.7, "mlp": 0.7, "linear_gate": 0.5, "gate_elements": True},
        {"linear_out": 0.8, "mlp": 0.8, "linear_in": 0.3},
    ]


def test_grids_multiply_and_repeat_over_seeds(tmp_path):
    space = write(tmp_path, grids=[{"cut.mlp": [0.1, 0.2], "cut.conv1d": [0.3, 0.4]}], seeds=[0, 1])
    trials = expand(load_space(space), 4)
    assert len(trials) == 8 and len({t.name for t in trials}) == 8
    assert trials[1].values == {"cut.mlp": 0.1, "cut.conv1d": 0.3, "seed": 1}
    assert trials[1].name == "mlp-0.1_conv1d-0.3-seed1"


def test_one_minus_turns_a_log_scale_towards_one():
    where = load_space("recipe").search["ema.decay"]
    assert where.value(1e-5) == pytest.approx(0.99999) and where.distribution().log
    assert [where.place(end) for end in where.ends()] == pytest.approx([0, 1])
    assert where.place(1 - 10**-3.5) == pytest.approx(0.5), "half way on the scale that it is drawn on"


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("question: q\ncost: c\nkind: train\ngrids:\n  - optim.lr: [0.1]\n    optim.lr: [0.2]\n")
    with pytest.raises(ConfigError, match=r"optim\.lr is given twice"):
        load_space(path)


def write(tmp_path, **parts):
    tree = {"question": "?", "cost": "no trial", "kind": "measure", **parts}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


SEARCH = {"objectives": {"val/accuracy": "max"}, "trials": 3}


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"grids": [{"cut.mlpp": [0.1]}]}, "unknown key 'cut.mlpp'; valid in cut"),
        ({"grids": [{"cut.mlp": [1.5]}]}, "cut.mlp: should be less than 1"),
        ({"grids": [{"cut.mlp": []}]}, "cut.mlp lists no value"),
        ({"grids": [{}]}, "an empty grid"),
        ({"grids": []}, "either grids or search"),
        ({"grids": [{"cut.mlp": "all"}]}, "only cut.layer takes all"),
        ({"grids": [{"cut.mlp": [0.1]}], "set": {"optim.lrr": 1}}, "unknown key 'optim.lrr'"),
        ({"search": {"optim.lr": {"low": 1.0, "high": 0.1}}, **SEARCH}, "needs low < high"),
        ({"search": {"optim.lr": {"low": -1.0, "high": 0.1}}, **SEARCH}, "optim.lr: should be greater than 0"),
        ({"search": {"optim.lr": {"low": 0.1}}, **SEARCH}, "needs low and high, or choices"),
        ({"search": {"optim.lr": {"low": 0.1, "high": 0.2, "step": 3}}, **SEARCH}, "search.optim.lr.step"),
        ({"search": {"optim.lr": {"low": 0.1, "high": 0.2}}}, "needs objectives and a number of trials"),
        ({"search": {"optim.lr": {"low": 0.1, "high": 0.2}}, **SEARCH, "early_stop": {}}, "needs kind train"),
        ({"search": {"optim.lr": {"low": 0.1, "high": 0.2}}, **SEARCH, "seeds": [0, 1]}, "no effect on a search"),
        ({"search": {"data.batch_size": {"low": 16.5, "high": 64}}, **SEARCH}, "data.batch_size takes whole numbers"),
        ({"search": {"data.augment": {"low": 1, "high": 2}}, **SEARCH}, "data.augment is no number and needs choices"),
        ({"search": {"optim.lr": {"low": 0.1, "high": float("inf")}}, **SEARCH}, "between -2^53 and 2^53"),
        ({"search": {"optim.lr": {"choices": [0.1, 0.1]}}, **SEARCH}, "lists a choice twice"),
        ({"search": {"optim.lr": {"choices": [0.1], "log": True}}, **SEARCH}, "have no effect"),
        (
            {"search": {"optim.lr": {"low": 0.1, "high": 0.2}}, "set": {"optim.lr": 0.1}, **SEARCH},
            "optim.lr varies too",
        ),
        ({"search": {"optim.lr": {"low": 0.1, "high": 0.2, "when": {"optim.lrr": 1}}}, **SEARCH}, "unknown key"),
        (
            {
                "search": {
                    "optim.lr": {"low": 0.1, "high": 0.2, "when": {"data.mixup": 0.8}},
                    "data.mixup": {"choices": [0.0, 0.8]},
                },
                **SEARCH,
            },
            "depends on data.mixup, which has to stand before it",
        ),
        ({"grids": [{"cut.mlp": [0.1]}], "objectives": {"val/accuracy": "max"}}, "objectives is of a search"),
        ({"grids": [{"cut.mlp": [0.1]}], "trials": 3}, "trials is of a search"),
        ({"grids": [{"cut.mlp": [0.1, 0.1]}]}, "cut.mlp lists a value twice"),
        ({"grids": [{"cut.mlp": [0.1]}], "seeds": [-1]}, "seed: should be greater than or equal to 0"),
        ({"grids": [{"cut.mlp": [0.1]}], "seeds": [1, 1]}, "seeds: one is given twice"),
        ({"grids": [{"cut.mlp": [0.1], "seed": [1]}], "seeds": [1]}, "seed is given as a key too"),
        (
            {"grids": [{f"cut.{n}": [i / 200 for i in range(200)] for n in ("mlp", "conv1d", "linear_in")}]},
            "8,000,000 trials, and at most 10,000 can be run",
        ),
        ({"grid": [{"cut.mlp": [0.1]}]}, "valid keys: question, cost, kind, preset, set, grids"),
        ({"kind": "guess", "grids": [{"cut.mlp": [0.1]}]}, "kind: Input should be 'measure', 'train' or 'rounds'"),
    ],
)
def test_bad_spaces_are_refused_by_name(tmp_path, parts, words):
    with pytest.raises(ConfigError) as error:
        load_space(write(tmp_path, **parts))
    assert words in str(error.value) and "space.yaml" in str(error.value)


def test_ranges_have_the_type_of_their_key(tmp_path):
    def drawn(key, **where):
        return load_space(write(tmp_path, kind="train", search={key: where}, **SEARCH)).search[key].distribution()

    assert isinstance(drawn("optim.weight_decay", low=0, high=1), FloatDistribution)
    assert isinstance(drawn("optim.lr", low="1e-4", high="1e-2", log=True), FloatDistribution)
    batch = drawn("data.batch_size", low=16.0, high=64.0)
    assert isinstance(batch, IntDistribution) and (batch.low, batch.high) == (16, 64)
    assert drawn("optim.compile", choices=["auto", True]).choices == ("auto", True)
    assert drawn("model.drop_path", choices=["1e-1", 0]).choices == (0.1, 0.0), "as the config reads them"


def test_grids_are_typed_and_hold_each_point_once(tmp_path):
    trials = expand(
        load_space(write(tmp_path, kind="train", grids=[{"optim.lr": ["1e-3", 1]}, {"optim.lr": [0.001]}])), 4
    )
    assert [t.values for t in trials] == [{"optim.lr": 0.001}, {"optim.lr": 1.0}]


def test_conditions_say_when_a_key_is_drawn(tmp_path):
    search = {
        "data.mixup": {"choices": [0.0, 0.8]},
        "data.mix_prob": {"low": 0.1, "high": 1.0, "when": {"data.mixup": {"above": 0}}},
        "model.pos_embed": {
            "choices": ["rope", "none"],
            "when": {"model.class_token": ["none", None], "data.mixup": 0.8},
        },
    }
    where = load_space(write(tmp_path, kind="train", search=search, **SEARCH)).search
    assert not where["data.mix_prob"].holds({"data.mixup": 0.0}) and where["data.mix_prob"].holds({"data.mixup": 0.8})
    assert where["model.pos_embed"].holds({"data.mixup": 0.8, "model.class_token": None})
    assert not where["model.pos_embed"].holds({"data.mixup": 0.8, "model.class_token": "middle"})
    assert Space.model_validate_json(load_space(write(tmp_path, kind="train", search=search, **SEARCH)).model_dump_json(
        by_alias=True)).search == where  # fmt: skip


def test_a_missing_space_lists_those_that_ship():
    with pytest.raises(ConfigError, match=r"no search space nowhere.*component_ablation.*recipe"):
        load_space("nowhere")


@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "layer_sensitivity"])
def test_every_point_of_what_ships_is_a_config(name):
    space = load_space(name)
    points = [t.values for t in expand(space, 4)]
    points += [{**space.fixed, **{k: w.extremes()[i] for k, w in space.search.items()}} for i in (0, 1) if space.search]
    for values in points:
        RunConfig().with_values(values).resolve()


def test_spaces_of_an_earlier_version_are_read(tmp_path):
    """Their keys of one cut were prune.*."""
    old = {"set": {"prune.structured": True}, "grids": [{"prune.layer": "all", "prune.mlp": [0.5]}]}
    trials = expand(load_space(write(tmp_path, **old)), 2)
    assert [t.values for t in trials] == [{"cut.structured": True, "cut.layer": i, "cut.mlp": 0.5} for i in range(2)]

"""Search spaces, legal ones and others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from hypothesis import strategies as st

from mamba.config.keys import dotted_keys
from mamba.config.schema import RunConfig
from mamba.errors import ForgeError
from ray_jobs.sweep.checks import EVERY_EPOCH, MEASURED, SIZES, VALIDATED, check
from ray_jobs.sweep.experiment import Experiment, outline
from ray_jobs.sweep.grid import check_names, expand
from ray_jobs.sweep.space import Space, load_space
from tests.fuzz import Target, sentence

KEYS = sorted(dotted_keys())
USUAL = ["optim.lr", "data.batch_size", "model.depth", "data.mixup", "data.mix_prob", "ema.decay", "cut.mlp",
         "seed", "cut.layer", "cut.structured", "model.drop_path", "data.img_size", "eval.every",
         "checkpoint.every"]  # fmt: skip
BASE = RunConfig().with_values({"data.dataset": "digits", "optim.warmup_epochs": 0})


def numbers() -> st.SearchStrategy[Any]:
    small = st.integers(-2, 70)
    shares = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0, 1e-4, 1e-2, 3.5])
    return st.one_of(small, shares, st.floats(), st.integers())


def scalars() -> st.SearchStrategy[Any]:
    words = st.one_of(
        st.sampled_from(["a/b", "../x", "A", "a", "1e-4", "none", "all", "", "x" * 300]), st.text(max_size=8)
    )
    return st.one_of(numbers(), words, st.booleans(), st.none())


def field_of(key: str) -> Any:
    return dotted_keys()[key].model_fields[key.rpartition(".")[2]]


def legal(key: str) -> st.SearchStrategy[Any]:
    """Values of a key within its own bounds."""
    annotation = field_of(key).annotation
    parts = (annotation, *get_args(annotation))
    words = [word for part in parts for word in get_args(part) if isinstance(word, str)]
    words += [word for word in get_args(annotation) if isinstance(word, str)]
    if words:
        return st.sampled_from(words)
    if bool in parts:
        return st.booleans()
    bounds = {name: getattr(part, name) for part in field_of(key).metadata for name in ("ge", "gt", "le", "lt")
              if hasattr(part, name)}  # fmt: skip
    low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 8))
    if int in parts:
        return st.integers(low + ("gt" in bounds), min(64, high - ("lt" in bounds)))
    if float in parts:
        inside = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds, "allow_subnormal": False}
        return st.floats(low, high, **inside)
    return st.sampled_from(["a/b", "A", "a", "x" * 200])


def values_of(key: str, wild: bool = True) -> st.SearchStrategy[Any]:
    if key not in dotted_keys():
        return scalars()
    return st.one_of(legal(key), scalars()) if wild else legal(key)


def keys(kind: str, wild: bool) -> st.SearchStrategy[str]:
    if wild:
        return st.one_of(st.sampled_from(USUAL), st.sampled_from(KEYS), st.just("optim.lrr"))
    if kind == "measure":
        return st.sampled_from([key for key in KEYS if key.startswith("cut.")] + ["seed"])
    groups = ("data.", "model.", "optim.", "ema.", "eval.", "penalty.", "checkpoint.")
    files = ("data.dataset", "data.root", "model.checkpoint", "data.img_size")
    trained = [key for key in KEYS if key.startswith(groups) and key not in files] + ["seed"]
    return st.one_of(st.sampled_from(trained), st.sampled_from([key for key in USUAL if key in trained]))


@st.composite
def ranges(draw: st.DrawFn, key: str, others: list[str], wild: bool) -> Any:
    number = key in dotted_keys() and {int, float} & {field_of(key).annotation, *get_args(field_of(key).annotation)}
    where: dict[str, Any] = {}
    if wild and draw(st.booleans()):
        where |= {"low": draw(numbers()), "high": draw(numbers())}
        where |= {flag: True for flag in ("log", "one_minus") if not draw(st.integers(0, 4))}
    elif number and draw(st.booleans()):
        low, high = sorted(draw(st.tuples(values_of(key, wild), values_of(key, wild)).filter(
            lambda ends: all(isinstance(end, int | float) for end in ends))))  # fmt: skip
        where |= {"low": low, "high": high, **({"log": True} if low > 0 and draw(st.booleans()) else {})}
    else:
        where["choices"] = draw(st.lists(values_of(key, wild), min_size=0 if wild else 1, max_size=3, unique_by=repr))
    if others and not draw(st.integers(0, 3)):
        other = draw(st.sampled_from(others))
        above = st.fixed_dictionaries({"above": numbers()})
        values = values_of(other, wild)
        where["when"] = {other: draw(st.one_of(values, st.lists(values, max_size=2), above))}
    return where


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """The tree of a space's file: of four, three whose keys and values could be; what they are together is open."""
    wild = not draw(st.integers(0, 3))
    least = 0 if wild else 1
    kind = draw(st.sampled_from(["train", "measure"]))
    tree: dict[str, Any] = {"question": "q", "cost": "c", "kind": kind}

    def some(most: int, free: int = 0) -> list[str]:
        return draw(st.lists(keys(kind, wild), min_size=free, max_size=most, unique=True))

    if not draw(st.integers(0, 2)):
        tree["set"] = {key: draw(values_of(key, wild)) for key in some(2)}
    if draw(st.booleans()):
        tree["grids"] = [
            {
                key: "all"
                if key == "cut.layer" and draw(st.booleans())
                else draw(st.lists(values_of(key, wild), min_size=least, max_size=3, unique_by=repr))
                for key in some(3, least)
            }
            for _ in range(draw(st.integers(least, 2)))
        ]
        if not draw(st.integers(0, 3)):
            tree["seeds"] = draw(st.lists(st.integers(least - 1, 3), max_size=3, unique=not wild))
    else:
        chosen = some(3, least)
        tree["search"] = {key: draw(ranges(key, chosen[:i], wild)) for i, key in enumerate(chosen)}
        metrics = [*VALIDATED, *EVERY_EPOCH, *SIZES] if kind == "train" else list(MEASURED)
        metrics += ["val/acc", "test/accuracy"] if wild else []
        modes = st.sampled_from(["max", "min"])
        tree["objectives"] = draw(st.dictionaries(st.sampled_from(metrics), modes, min_size=least, max_size=2))
        tree["trials"] = draw(st.integers(2 * least - 1, 5))
        if not draw(st.integers(0, 4)):
            early = st.integers(least, 3), st.integers(least + 1, 3)
            tree["early_stop"] = {"grace_epochs": draw(early[0]), "reduction": draw(early[1])}
    return tree


def holds(tree: dict[str, Any], folder: Path) -> None:
    """A space is refused in a sentence, or is whole: each trial once, in a folder of its own, and a config that is."""
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    try:
        space = load_space(file)
        trials = expand(space, 3) if space.grids else []
        check(space, trials, BASE)
    except ForgeError as error:
        sentence(error)
        return
    assert Space.model_validate_json(space.model_dump_json(by_alias=True)) == space, "not as it was after a resume"
    check_names(trial.name for trial in trials)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", trial.name) for trial in trials)
    assert len({str(sorted(trial.values.items())) for trial in trials}) == len(trials)
    for trial in trials:
        BASE.with_values(trial.values).resolve()
    for where in space.search.values():
        where.distribution()
        assert all(0 <= where.place(value) <= 1 for value in where.ends())
    outline(Experiment(space, trials, BASE, None, None, None, max(1, len(trials))))


TARGET = Target(spaces(), holds)

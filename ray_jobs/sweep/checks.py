"""What an experiment cannot be asked: keys that would have no effect, trials that are the same or cannot be, objectives
that no trial has. Everything here is found before anything starts."""

from __future__ import annotations

import difflib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from mamba.config.counts import BESIDE_CHECKPOINT, TRAINING_DATA, Work, idle
from mamba.config.counts import check_given as check_typed
from mamba.config.keys import dotted_keys, unknown_key
from mamba.config.schema import DataConfig, RunConfig
from mamba.errors import ConfigError, ForgeError
from mamba.models.model import Architecture, MambaModel
from mamba.runs.metrics import metric
from pruning.cut import check_cut
from pruning.rounds import check_rounds
from ray_jobs.sweep.grid import Trial
from ray_jobs.sweep.space import Range, Space

COMPARED_ON = ("data.dataset", "data.root", "data.val_fraction", "data.split_seed", "data.split_from")
"""Keys that decide which images trials are validated on: a search over them would choose the easiest images."""
NO_RESULT = ("checkpoint.every", "checkpoint.keep", "data.strict", "eval.batch_size")
"""Keys that change no figure of a trial."""
MODEL = ("model.checkpoint", *BESIDE_CHECKPOINT)
"""Keys of model.* that count where there is a checkpoint."""
DRAWS, TRIED, TRIED_OF_KEY = 512, 16, 8
"""Points of a search that are drawn before it starts, how many of them are tried in any case, and how many of those
that have a certain key, which its conditions can make rare."""

EVERY_EPOCH = ("train/loss", "train/lr", "train/images_per_s", "train/data_wait_percent", "train/skipped_steps")
VALIDATED = ("val/loss", "val/accuracy", "val/best_accuracy")
SIZES = ("model/params", "model/macs")
MEASURED = (*VALIDATED, "val/drop", *SIZES, "model/nonzero", "model/sparsity")


def check(
    space: Space,
    trials: Sequence[Trial],
    config: RunConfig,
    given: Sequence[str] = (),
    baseline: bool = False,
) -> None:
    """Refuse an experiment in which something asked for would have no effect or cannot be.

    Args:
        space: as `load_space` gives it.
        trials: of its grids; none for a search.
        config: of the experiment, before it is resolved.
        given: keys that were typed.
        baseline: whether the model that is cut is trained first, by the experiment's config.

    Raises:
        ConfigError: the key or the trial, what is wrong, what is valid.
    """
    _check_keys(space, config)
    varied = {*space.fixed, *(key for grid in space.grids for key in grid), *space.search}
    beside = [f"cut.{name.partition(':')[0]}" for name in config.cut.rates]
    beside += ["cut.layer"] * (config.cut.layer is not None)
    if space.kind == "measure" and (more := [key for key in beside if key not in varied]):
        raise ConfigError(
            f"{more[0]} {config.flat()[more[0]]} of the experiment's config would be in every trial, and tables name "
            f"what the space says: leave it out, or set it in the space (set: {{{more[0]}: ...}})"
        )
    points = [t.values for t in trials] if trials else _drawn(space, config)
    configs: list[RunConfig] = []
    series = space.kind == "rounds"
    refusal: ForgeError | None = None
    for i, values in enumerate(points):
        try:
            configs.append(config.with_values(values).resolve())
            if series:
                check_rounds(configs[-1])
        except ForgeError as error:
            if trials:
                raise ConfigError(f"grids: trial {trials[i].name} cannot be: {error}") from None
            refusal = error
    if refusal and not configs:
        raise ConfigError(f"search: none of {len(points)} points that were drawn can be: {refusal}")
    _check_typed(space, config, configs, given, baseline)
    if trials:
        for trial, own in zip(trials, configs, strict=True):
            if space.kind == "measure" and not own.cut.rates:
                raise ConfigError(f"grids: trial {trial.name} cuts nothing: set a component's rate (cut.*) above 0")
        _check_different(space, trials, configs)
    else:
        _check_effects(space, config, points)
    if space.early_stop and all(space.early_stop.grace_epochs >= c.optim.epochs for c in configs):
        most = max(c.optim.epochs for c in configs)
        raise ConfigError(
            f"early_stop: grace_epochs {space.early_stop.grace_epochs} has no effect: trials have {most} epochs; give "
            "fewer"
        )
    _check_objectives(space, config, configs)


def check_given(space: Space, config: RunConfig, given: Sequence[str], over: Collection[str] = ()) -> list[str]:
    """See that what was typed counts: a space's own values come over those of the command line.

    Args:
        space: of the experiment.
        config: with the values that were typed.
        given: their keys.
        over: these, and the keys of the file of --config.

    Returns:
        what should be said of keys that count in some trials only, or not at all where they are a file's, a sentence
        each.

    Raises:
        ConfigError: a key that the space sets or varies in all trials, with what to do.
    """
    said, flat = [], config.flat()
    for key in given:
        if key in space.fixed and space.fixed[key] != flat[key]:
            raise ConfigError(
                f"--{key} {flat[key]} has no effect: the search space sets {key} {space.fixed[key]} for all trials; "
                "leave one of both out"
            )
        varied = [grid for grid in space.grids if key in grid and grid[key] != [flat[key]]]
        if (space.grids and len(varied) == len(space.grids)) or (key in space.search and not space.search[key].when):
            raise ConfigError(f"--{key} {flat[key]} has no effect: the search space varies {key}; leave it out")
        if varied:
            said.append(f"--{key} {flat[key]} counts in {len(space.grids) - len(varied)} of {len(space.grids)} grids; "
                        "the others have values of their own")  # fmt: skip
    own = [f"{key} ({value}, not {flat[key]})" for key, value in space.fixed.items()
           if key in over and key not in given and value != flat[key]]  # fmt: skip
    own += [key for key in dict.fromkeys([*(k for grid in space.grids for k in grid), *space.search])
            if key in over and key not in given]  # fmt: skip
    if own:
        more = f" and {len(own) - 5} more" if len(own) > 5 else ""
        said.append(f"the search space has its own instead of --config's: {', '.join(own[:5])}{more}")
    return said


def _check_typed(
    space: Space, config: RunConfig, configs: Sequence[RunConfig], given: Sequence[str], baseline: bool
) -> None:
    """What was typed counts in some trial, or in the baseline's training."""
    if "trial" in given:
        raise ConfigError(f"--trial {config.trial} has no effect: the trials of a sweep have names of their own")
    if config.scaling.min_workers is not None and {"scaling.min_workers", "scaling.num_workers"} & set(given):
        raise ConfigError(
            "--scaling.min_workers, and a range of --scaling.num_workers, have no effect in a sweep: a trial keeps the "
            "workers it began with"
        )
    works: list[Work] = [space.kind]
    if space.kind == "measure" and any(c.cut.finetune_epochs for c in configs):
        works = ["finetune"]
    if baseline:
        works.append("train")
    check_typed(works, given, configs)


def without_effect(config: RunConfig, kind: Work) -> set[str]:
    """Keys that change no figure of a trial with the other keys as they are."""
    alone = {"model.sync_batchnorm"} if (config.scaling.num_workers or 1) == 1 else set()
    return {*NO_RESULT, *alone, *idle(config, kind)}


def _check_keys(space: Space, config: RunConfig) -> None:
    """Every key of a space by itself: whether it can vary, or be set, in a trial of this kind."""
    possible = _possible(space, config, "cut.finetune_epochs")
    finetuned = space.kind == "measure" and any(possible)
    checkpoint = space.kind != "measure" and any(_possible(space, config, "model.checkpoint"))
    parts: list[tuple[str, Iterable[str]]] = [("set", space.fixed), ("search", space.search)]
    for part, keys in [*parts, *(("grids", grid) for grid in space.grids)]:
        for key in keys:
            if key == "preset":
                continue
            reason = _reason(key, space.kind, finetuned, checkpoint)
            if not reason and part == "search" and (key == "seed" or key in COMPARED_ON):
                reason = (
                    "would make the luckiest trial the best: give grids with seeds"
                    if key == "seed"
                    else "decides which images trials are validated on, and the easiest would win: give grids"
                )
            if reason:
                raise ConfigError(f"{part}: {key} {reason}")
    for key, where in space.search.items():
        for other in where.when:
            if other not in space.search and not _can_hold(where, other, _possible(space, config, other)):
                raise ConfigError(f"search: {key} is never drawn: {other} is {config.flat()[other]}")


def _reason(key: str, kind: str, finetuned: bool, checkpoint: bool) -> str | None:
    """Why a key has no place in a space of this kind; None: it has."""
    if key not in dotted_keys():
        raise unknown_key(key)
    group, _, leaf = key.partition(".")
    if key in ("name", "out", "trial"):
        return "is the experiment's own: give it on the command line"
    if group == "scaling":
        return "is the same for all trials: give it on the command line"
    if key == "prune.round":
        return "is set by the rounds themselves"
    if group == "prune" and kind != "rounds":
        return f"belongs to rounds of pruning and has no effect with kind {kind}; valid: kind rounds"
    if kind != "measure":
        if group == "cut":
            return "cuts a trained model, which only kind measure does"
        if group == "model" and checkpoint and key not in MODEL:
            return f"has no effect beside model.checkpoint, which brings its own; valid: {', '.join(MODEL)}"
        return None
    if group == "data" and leaf not in TRAINING_DATA:
        return "decides the data set, and a trained model is measured on its own"
    if key == "model.checkpoint":
        return "is the model that all trials cut: give it on the command line"
    if group == "model" and key not in MODEL:
        return "has no effect: the checkpoint brings its own"
    if key == "optim.epochs":
        return "has no effect: cut.finetune_epochs says how long a cut model is trained"
    if finetuned or group == "cut" or key in ("seed", "optim.amp", "eval.batch_size"):
        return None
    return "has no effect: a cut model is measured at once; set cut.finetune_epochs above 0 to train it"


def _possible(space: Space, config: RunConfig, key: str) -> list[Any]:
    """The values that a key has in an experiment's trials, of ranges the ends."""
    if key in space.search:
        ends = space.search[key].extremes()
        return [*ends, config.flat()[key]] if space.search[key].when else ends
    if key in space.fixed:
        return [space.fixed[key]]
    own = config.flat()[key]
    found = [grid.get(key, [own]) for grid in space.grids] or [[own]]
    return [value for values in found for value in values]


def _can_hold(where: Range, key: str, values: Iterable[Any]) -> bool:
    alone = where.model_copy(update={"when": {key: where.when[key]}})
    return any(alone.holds({key: value}) for value in values)


def _drawn(space: Space, config: RunConfig) -> list[dict[str, Any]]:
    """Points of a search, as its study could draw them, the same each time."""
    rng = random.Random(0)
    flat = config.flat()
    points = []
    left = dict.fromkeys(space.search, TRIED_OF_KEY)
    for i in range(DRAWS):
        values = dict(space.fixed)
        for key, where in space.search.items():
            if not where.holds({**flat, **values}):
                continue
            if where.choices is not None:
                values[key] = rng.choice(where.choices)
            else:
                assert where.low is not None and where.high is not None
                share = rng.random()
                low, high = where.low, where.high
                at = low * (high / low) ** share if where.log else low + (high - low) * share
                at = min(max(at, low), high)
                values[key] = where.value(round(at) if isinstance(low, int) else at)
        if i < TRIED or any(left.get(key) for key in values):
            points.append(values)
            left.update({key: max(0, left[key] - 1) for key in values if key in left})
    return points


def _check_effects(space: Space, config: RunConfig, points: Sequence[Mapping[str, Any]]) -> None:
    """Of a search: every key is drawn in some trial where it counts."""
    counts: set[str] = set()
    for values in points:
        try:
            counts |= values.keys() - without_effect(config.with_values(dict(values)), space.kind)
        except ConfigError:
            continue
    for key in space.search:
        if key not in counts:
            raise ConfigError(f"search: {key} has no effect with the other keys as they are; leave it out")
    if "model.name" in space.search and config.model.d_model is not None and config.model.depth is not None:
        raise ConfigError("search: model.name has no effect beside model.d_model and model.depth")


def _check_different(space: Space, trials: Sequence[Trial], configs: Sequence[RunConfig]) -> None:
    """Of grids: no two trials are the same but for keys that have no effect in them."""
    seen: dict[str, tuple[Trial, RunConfig]] = {}
    for trial, config in zip(trials, configs, strict=True):
        flat = config.flat()
        flat["model.name"] = config.model.is_vim  # the widths that it stands for are filled in
        unused = without_effect(config, space.kind) & flat.keys()
        counted = str({key: value for key, value in flat.items() if key not in unused})
        other, others = seen.setdefault(counted, (trial, config))
        if others != config or (other is not trial and other.values.keys() == trial.values.keys()):
            keys = [k for k in {**other.values, **trial.values} if other.values.get(k, ...) != trial.values.get(k, ...)]
            raise ConfigError(
                f"grids: trials {other.name} and {trial.name} are the same: {', '.join(keys)} has no effect in them; "
                "list what makes sense in a grid of its own"
            )


def corners(space: Space, trials: Sequence[Trial], config: RunConfig) -> list[tuple[str, RunConfig]]:
    """What an experiment's trials are going to be, and how to call it: each trial of its grids; of a search each end of
    a range and each choice by itself, over the experiment's config."""
    if trials:
        points = [(f"grids: trial {trial.name}", trial.values) for trial in trials]
    else:
        ends = [(key, value) for key, where in space.search.items() for value in where.extremes()]
        points = [(f"search: {key} {value}", {**space.fixed, key: value}) for key, value in ends]
    found = []
    for words, values in points:
        with suppress(ConfigError):  # of a search: what goes with other values alone
            found.append((words, config.with_values(dict(values)).resolve()))
    return found


def check_cuts(space: Space, trials: Sequence[Trial], config: RunConfig, architecture: Architecture) -> None:
    """Refuse a cut that a model of this architecture does not allow: a block or a part that it has not, a rate that
    leaves nothing.

    Raises:
        ConfigError: the trial, or the key of a search, and what is wrong.
    """
    with torch.device("meta"):
        model = MambaModel(architecture)
    seen: set[str] = set()
    for words, own in corners(space, trials, config):
        cut = own.cut
        said = f"{cut.rates} {cut.structured} {cut.scope} {cut.layer}"
        if said in seen:
            continue
        seen.add(said)
        try:
            layers = None if cut.layer is None else [cut.layer]
            check_cut(model, cut.rates, cut.structured, scope=cut.scope, layers=layers)
        except ConfigError as error:
            raise ConfigError(f"{words} cannot be: {error}") from None


def check_machine(space: Space, trials: Sequence[Trial], config: RunConfig, gpu: bool) -> None:
    """Refuse trials that this cluster cannot train.

    Raises:
        ConfigError: the trial, or the key of a search, and what is wrong.
    """
    for words, own in corners(space, trials, config):
        if space.kind == "measure" and not own.cut.finetune_epochs:
            continue
        try:
            own.check_workers(own.scaling.num_workers or 1, gpu)
        except ConfigError as error:
            raise ConfigError(f"{words} cannot be: {error}") from None


def configs_of(space: Space, trials: Sequence[Trial], config: RunConfig) -> list[RunConfig]:
    """The resolved configs of an experiment's trials; of a search, of those points of a few drawn that can be."""
    found = []
    for values in [t.values for t in trials] if trials else _drawn(space, config):
        with suppress(ConfigError):
            found.append(config.with_values(dict(values)).resolve())
    return found


def metrics_of(space: Space, config: RunConfig, configs: Sequence[RunConfig]) -> tuple[str, ...]:
    """The metrics that every finished trial of an experiment will have, and that may be an objective."""
    if space.kind == "measure":
        finetuned = all(c.cut.finetune_epochs for c in configs) and bool(configs)
        return (*MEASURED, *(EVERY_EPOCH if finetuned else ()))
    validated = all(c.data.val_fraction != 0 for c in configs or [config])
    averaged = validated and all(c.ema.enabled for c in configs or [config])
    return (*(VALIDATED if validated else ()), *(["val/ema_accuracy"] if averaged else ()), *EVERY_EPOCH, *SIZES)


def _check_objectives(space: Space, config: RunConfig, configs: Sequence[RunConfig]) -> None:
    valid = metrics_of(space, config, configs)
    for objective, mode in space.objectives.items():
        if objective.startswith("test/"):
            raise ConfigError(
                f"objectives: {objective}: what is chosen by the test set cannot be tested on it any more; "
                f"valid: {', '.join(valid)}"
            )
        if objective.startswith("bench/"):
            raise ConfigError(
                f"objectives: {objective} is measured after the last trial, since trials side by side would measure "
                f"each other; valid: {', '.join(valid)}"
            )
        if space.kind == "measure" and objective in SIZES and not any(c.cut.structured for c in configs):
            raise ConfigError(
                f"objectives: {objective} is the dense model's in every trial: only cut.structured True removes "
                "anything; model/nonzero counts the weights that are left"
            )
        if objective.startswith("val/") and objective in (*VALIDATED, "val/ema_accuracy") and objective not in valid:
            why = (
                "ema.enabled is False in some trials"
                if "val/loss" in valid
                else "data.val_fraction 0 leaves no image to validate on"
            )
            raise ConfigError(f"objectives: {objective}: {why}; valid: {', '.join(valid)}")
        if objective not in valid:
            near = difflib.get_close_matches(objective, valid, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"objectives: {objective} is no metric of these trials{hint} (valid: {', '.join(valid)})")
        right = {"up": "max", "down": "min"}.get(metric(objective).better or "", mode)
        if mode != right:
            raise ConfigError(f"objectives: {objective} {mode} would make the worst trial the best; valid: {right}")
        if space.early_stop and objective not in (*VALIDATED, "val/ema_accuracy", *EVERY_EPOCH):
            raise ConfigError(f"early_stop: {objective} is known at the end alone, and nothing can be stopped by it")


def data_identity(data: DataConfig) -> DataConfig:
    """A data config without what does not decide which images there are: equal for trials on the same data."""
    defaults = {key: field.default for key, field in DataConfig.model_fields.items() if key in TRAINING_DATA}
    return data.model_copy(update=defaults)

"""Everything that finished under some folders, as rows that can be compared: runs, trials, plans; read whatever version
wrote them; what cannot be read is left out by name.

Rows are those of `ray_jobs.report.rows`, with more: `experiment` (its folder's name, or ""), `group` (data and split,
in words), `images` of the validation split (0: not recorded), `path`, `config` (dotted key -> value; empty where
not recorded).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mamba.config.facts import DATASETS
from mamba.config.schema import RunConfig
from mamba.data.fingerprint import UNKNOWN
from mamba.data.split import VAL_FRACTION
from mamba.errors import CheckpointError, ConfigError, FolderError, ForgeError
from mamba.runs.checkpoint import best_checkpoint, find_checkpoint, read_description
from mamba.runs.files import SEAL, as_metrics, read_json, read_sealed
from mamba.runs.folder import epochs_of, finished_result
from mamba.runs.inputs import INPUTS
from mamba.runs.metrics import SCORE, best_accuracy
from mamba.runs.unchanged import changed
from pruning.report import Trained
from ray_jobs.report.noise import IMAGES, standard_error
from ray_jobs.report.rows import finite, measured, over_seeds, score
from ray_jobs.sweep import experiment
from ray_jobs.sweep.results import BASELINE, TRIAL, baseline_of, checked_trial, refused

PLAN = "pruned.json"
OWN = ("out", "name", "trial")
"""Keys that say where a run is, not what it is."""


@dataclass
class Found:
    """What lies under some folders."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """A sentence for each thing that could not be read."""


def collect(folders: Iterable[Path]) -> Found:
    """Read every finished run, trial and plan, however deep.

    Raises:
        ConfigError: there is no such folder.
    """
    found = Found()
    first: dict[tuple[str, ...], Path] = {}
    copies: Counter[tuple[Path, Path]] = Counter()
    done: set[Path] = set()
    _experiment.cache_clear()
    for given in folders:
        if not given.is_dir():
            raise ConfigError(f"there is no folder {given}")
        here = given.resolve()
        paths = {p.parent for name in (TRIAL, "result.json", PLAN, experiment.FILE) for p in here.rglob(name)}
        for path in sorted(paths):
            if ".ray" in path.parts:  # Tune's own
                continue
            other = first.setdefault(_identity(path) or (str(path),), path)
            if other != path:
                copies[path.parent, other.parent] += 1
            if other != path or path in done:
                continue
            done.add(path)
            name = here.name if path == here else f"{here.name}/{path.relative_to(here)}"
            try:
                found.rows += _rows(path, name)
                if (path / experiment.FILE).exists():
                    experiment.load(path)
                    found.experiments.append(path)
                    found.skipped += [sentence for sentence in refused(path) if str(path / BASELINE) in sentence]
            except (ForgeError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                found.skipped.append(_reason(path, error))
    for (here, there), n in copies.items():
        of = "copies of those" if n > 1 else "a copy of that"
        found.skipped.append(f"{n} result{'s' * (n > 1)} in {here}: {of} in {there}")
    _split_by_files(found.rows)
    return found


def _identity(path: Path) -> tuple[str, ...]:
    """The checksums of a folder's results, which hold times to the millisecond; empty where it has none (earlier
    versions). Of two folders with the same, one is a copy: as a repeat it would be evidence that there is not."""
    seals = []
    for name in (TRIAL, "result.json", PLAN, experiment.FILE):
        try:
            seals.append(read_json(path / name).get(SEAL))
        except (OSError, FolderError):  # whoever reads it says so
            continue
    return tuple(f"{seal}" for seal in seals if seal)


def _reason(path: Path, error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if str(path) in words else f"{path}: {words or type(error).__name__}"


def _rows(path: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    if (path / experiment.FILE).exists() and baseline_of(path):
        told = experiment.load(path)
        flat = told.config.flat()
        rows.append(_row(f"{name} (baseline)", path, {"status": "baseline", "metrics": baseline_of(path)}, {}, flat))
    if (path / PLAN).exists():
        rows += _plan(path, name)
    if (path / TRIAL).exists() or (path / "result.json").exists():
        rows.append(_one(path, name))
    for row in rows:
        row["images"] = int(measured(row, IMAGES) or row["images"])
    return rows


def _one(path: Path, name: str) -> dict[str, Any]:
    """A trial's or a run's row."""
    trial = checked_trial(path)
    if trial is not None:
        told = _experiment(path.parent)
        flat = {**told.config.flat(), **trial["values"]} if told else _config(path)
        if told and flat.get("data.split_seed") is None:  # seeds of trials vary everything but the split
            flat["data.split_seed"] = told.config.seed
        row = _row(name, path, trial, trial["values"], flat)
        row["experiment"] = path.parent.name
        images = finite(baseline_of(path.parent).get(IMAGES)) if told else None
        row["images"] = int(images or row["images"])
        if told and told.space.kind == "measure" and score(row) is not None:
            row["metrics"].setdefault(SCORE, row["metrics"].get("val/accuracy"))
        return row
    result = finished_result(path)
    if result is None:
        raise ConfigError(f"{path / 'result.json'} is damaged")
    flat, defaults = _config(path), RunConfig().flat()
    trained = result.get("config")
    if isinstance(trained, dict) and (other := changed(flat, trained)):
        raise FolderError(f"{path / 'config.yaml'} was changed since: {other}")
    whose = [str(trained[key]) for key in ("name", "trial") if trained.get(key)] if isinstance(trained, dict) else []
    if len(whose) == 2 and flat and whose != [flat["name"], flat["trial"]]:
        raise FolderError(f"{path / 'result.json'} is that of run {'/'.join(whose)}: a copy")
    values = {key: value for key, value in flat.items() if value != defaults.get(key) and key not in OWN}
    row = _row(name, path, result, {**values, **({"seed": flat["seed"]} if flat else {})}, flat)
    kept = _kept(path, result)
    if math.isfinite(kept) and kept >= 0:
        row["metrics"][SCORE] = kept
    else:
        row["metrics"].pop(SCORE, None)
    return row


def _plan(path: Path, name: str) -> list[dict[str, Any]]:
    """What a plan left, before any training, and what it was made of."""
    report, flat = read_sealed(path / PLAN), _config(path)
    rows = []
    trained = Trained.from_dict(report.get("trained"))
    names = ("before", str(report["plan"]))
    if trained is not None:
        names = (f"before {trained.words}", f"{trained.words}, then {report['plan']}")
    for words, key, status in ((names[0], "before", "baseline"), (names[1], "after", "pruned")):
        row = _row(f"{name} ({words})", path, {"status": status, "metrics": as_metrics(report[key])}, {}, flat)
        if score(row) is not None:
            row["metrics"][SCORE] = score(row)
        rows.append(row)
    return rows


def _row(
    name: str, path: Path, result: Mapping[str, Any], values: Mapping[str, Any], flat: Mapping[str, Any]
) -> dict[str, Any]:
    facts = _data_of(path)
    row = {
        "trial": name,
        "status": result["status"],
        "reason": result.get("reason", ""),
        "seconds": result.get("seconds"),
        "values": dict(values),
        "metrics": dict(result["metrics"]),
        "experiment": "",
        "path": path,
        "group": _group(flat),
        "config": dict(flat),
        "data": facts,
        "images": int(facts.get("val") or finite((result.get("images") or {}).get("val")) or 0),
    }
    if row["status"] == "baseline" and score(row) is not None:
        row["metrics"][SCORE] = score(row)
    return row


def _kept(folder: Path, result: Mapping[str, Any]) -> float:
    """Validation accuracy of the weights that a run keeps; NaN where nothing was validated. Runs from before it stood
    in the result have it in the epoch that was tested, or in the best checkpoint's description."""
    best = finite(result["metrics"].get(SCORE))
    if best is not None:
        return best
    epochs, tested = epochs_of(folder), result.get("tested")
    tested = tested if isinstance(tested, dict) else {}
    key = "val/ema_accuracy" if tested.get("weights") == "ema" else "val/accuracy"
    for epoch in epochs:
        if epoch["epoch"] == tested.get("epoch") and finite(epoch.get(key)) is not None:
            return epoch[key]
    checkpoint = best_checkpoint(folder)
    if checkpoint is not None:
        description = read_description(checkpoint)
        key = "val/ema_accuracy" if description.get("weights") == "ema" else "val/accuracy"
        value = finite(as_metrics(description.get("metrics")).get(key))
        if value is not None:
            return value
    known = [v for v in map(best_accuracy, [*epochs, result["metrics"]]) if math.isfinite(v)]
    return max(known, default=math.nan)


@cache
def _experiment(folder: Path) -> experiment.Experiment | None:
    return experiment.load(folder) if (folder / experiment.FILE).exists() else None


def _config(path: Path) -> dict[str, Any]:
    """The config of a run's folder, dotted key -> value; empty where there is none."""
    return RunConfig.from_yaml(path / "config.yaml").flat() if (path / "config.yaml").exists() else {}


# --- what was measured on --------------------------------------------------------------------------------------------


def _rooted(flat: Mapping[str, Any]) -> bool:
    """Whether a data set is another one in another folder."""
    known = DATASETS.get(str(flat.get("data.dataset")))
    return known is not None and known.files


def _group(flat: Mapping[str, Any]) -> str:
    """Data set and split in words: only what has the same is ranked together."""
    if not flat:
        return "data not recorded"
    root = f" {Path(str(flat['data.root'])).name}" if _rooted(flat) else ""
    if flat.get("data.split_from"):
        return f"{flat['data.dataset']}{root}, validation images of {Path(str(flat['data.split_from'])).name}"
    fraction = finite(flat.get("data.val_fraction"))
    fraction = VAL_FRACTION if fraction is None else fraction
    if fraction == 0:
        return f"{flat['data.dataset']}{root}, no validation split"
    seed = flat.get("data.split_seed")
    seed = flat.get("seed", 0) if seed is None else seed
    return f"{flat['data.dataset']}{root}, {100 * fraction:g} % to validate, split {seed}"


def _data_of(path: Path) -> dict[str, Any]:
    """What a folder with checkpoints says of its data, else what its experiment was begun with: digests of the `files`
    to train and validate on with the split, of the `test` set, of all `pixels` at their `side`, and the number of `val`
    images; empty where nothing says so."""
    try:
        data = _fingerprint_of(path)
        split, sets = data["split"], data["sets"]
        held = split["val"] or sum(int(str(words).split()[0]) for words in sets.get("val", {}).values())
        words = {name: {label: str(line).split() for label, line in own.items()} for name, own in sets.items()}
        known = all(line[2] != UNKNOWN for own in words.values() for line in own.values())
        names = {name: sorted((label, *line[:2]) for label, line in own.items()) for name, own in words.items()}
        return {
            "files": f"{split['digest']} {[names[name] for name in sorted(names) if name != 'test']}",
            "test": str(names.get("test", "")),
            "pixels": str(sorted(sets.items())) if known else "",
            "side": data.get("side"),
            "val": int(held),
        }
    except (ForgeError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}


def _fingerprint_of(path: Path) -> dict[str, Any]:
    """Raises ForgeError, or ValueError where nothing is known."""
    try:
        found = read_description(find_checkpoint(path)).get("data")
    except CheckpointError:  # a trial that keeps no model, or the experiment itself
        folder = path if (path / experiment.FILE).exists() else path.parent
        try:
            (found,) = read_sealed(folder / INPUTS)["data"].values()
        except FileNotFoundError as error:
            raise ValueError from error
    if not isinstance(found, dict):
        raise ValueError
    return found


def _split_by_files(rows: Sequence[dict[str, Any]]) -> None:
    """Rows whose configs say the same data and whose fingerprints say otherwise belong to groups of their own: other
    files, or another test set, or other pixels at the same side."""
    for group in {row["group"] for row in rows}:
        some = [row for row in rows if row["group"] == group]
        for key, words, alike in (
            ("files", "files", ()),
            ("test", "test set", ()),
            ("pixels", "pixels", ("side", "data.fit")),
        ):
            _told_apart(some, key, words, alike)


def _told_apart(rows: Sequence[dict[str, Any]], key: str, words: str, alike: Sequence[str]) -> None:
    """Those of a group that differ in a fact get groups of their own; `alike`: as far as they do not differ in these,
    which are what is compared."""
    apart: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        which = [row["data"].get(k) if k in row["data"] else row["config"].get(k) for k in alike]
        apart.setdefault((row["group"], *which), []).append(row)
    for some in apart.values():
        prints = sorted({row["data"].get(key, "") for row in some} - {""})
        if len(prints) > 1:
            for row in some:
                found = row["data"].get(key, "")
                row["group"] += (
                    f", {words} {prints.index(found) + 1} of {len(prints)}" if found else (f", {words} not recorded")
                )


# --- repeats ---------------------------------------------------------------------------------------------------------


def merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, those that differ in their seed alone as one with their means; `error` is the standard deviation over
    seeds, of a single one the standard error that its images give."""
    result, gone = [], set()
    for name, some in over_seeds(rows).items():
        scores = [value for row in some if (value := score(row)) is not None]
        if len({row["values"]["seed"] for row in some}) < len(some) or len(scores) < len(some):
            continue
        keys = [key for key in some[0]["metrics"] if all(measured(row, key) is not None for row in some)]
        metrics = {key: statistics.fmean(row["metrics"][key] for row in some) for key in keys}
        values = {key: value for key, value in some[0]["values"].items() if key != "seed"}
        one = {**some[0], "trial": f"{name} ({len(some)} seeds)", "metrics": metrics, "values": values}
        result.append({**one, "error": statistics.stdev(scores), "seeds": len(some)})
        gone |= {id(row) for row in some}
    for row in rows:
        if id(row) not in gone:
            value = score(row)
            error = standard_error(value, row["images"]) if value is not None and row["images"] else None
            result.append({**row, "error": error, "seeds": 1})
    return result

"""Lines of TensorBoard's HPARAMS tab: what a run was told, how it ended, and which columns come first."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from mamba.config.keys import may_be_none
from mamba.config.schema import RunConfig
from mamba.runs.files import replacing
from mamba.runs.folder import CONFIG
from mamba.runs.metrics import METRICS

EVERY_RUN_HAS = ("val/best_accuracy", "val/accuracy", "val/loss", "model/params", "model/macs")
"""The first metrics: those that TensorBoard shows unasked, five in all. Its parallel coordinates leave out every run
that lacks one of them, so they are what trainings and cuts both have."""
HPARAM_METRICS = (*EVERY_RUN_HAS, *(k for k, metric in METRICS.items() if metric.hparams and k not in EVERY_RUN_HAS))
"""Columns of the HPARAMS tab."""
FIRST_HPARAMS = ("optim.lr", "model.name", "model.drop_path", "data.augment")
"""Columns that TensorBoard shows before the others where too few differ; with the status five in all, the rest is one
click away."""
MANY = 4
LOOKED_AT = 100
"""Runs, the newest, that a run is compared with."""
STATUSES = {
    "finished": Status.STATUS_SUCCESS,
    "stopped early": Status.STATUS_SUCCESS,
    "failed": Status.STATUS_FAILURE,
    "interrupted": Status.STATUS_UNKNOWN,
}
"""What the HPARAMS tab's column `status` says of a run, and the word that TensorBoard itself has for it."""
HPARAMS_FILE = "events.out.tfevents.0.hparams"
NOT_COMPARED = {
    *("trial", "out", "data.root", "data.loader_workers", "eval.batch_size", "checkpoint.every", "checkpoint.keep"),
    *("scaling.cpus_per_worker", "scaling.max_failures", "name", "tracking.backends", "tracking.project"),
    *("tracking.offline", "data.prefetch_factor"),
}


def write_hparams(folder: Path, config: RunConfig, status: str, first: Collection[str] = ()) -> None:
    """A run's line in TensorBoard's HPARAMS tab, with a status to filter and sort by; replaces the one before. Nothing
    for a run that does not write for TensorBoard.

    Written when a run has ended: a TensorBoard that is open keeps the first entry that it reads of a run. Every run of
    ours has the same keys, so each can carry the same experiment summary, whichever TensorBoard reads: one table with
    every run under `--logdir`, whatever was or was not searched.

    Args:
        folder: of the run.
        config: of the run.
        status: one of STATUSES.
        first: the hyperparameters whose columns come first, filled up if they are few; none: those in which the runs
            under `out` differ most.
    """
    if "tensorboard" not in config.tracking.backends:
        return
    shown = comparable(config.flat())
    first = filled(first) if first else most_different([shown, *neighbours(config.out, folder)])
    path = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:6]
    name = f"{config.trial or folder.name} {config.name} {path}"  # the trial first: the table cuts it
    write_line(folder, {"status": status, **shown}, status, ["status", *first], HPARAM_METRICS, name)


def write_line(
    folder: Path, values: Mapping[str, Any], status: str, first: Collection[str], metrics: Sequence[str], name: str
) -> None:
    """The HPARAMS entry of the run in a folder of TensorBoard's.

    Args:
        values: numbers and texts; the same keys in every run under a `--logdir`, and of one type.
        first: keys whose columns come first.
        metrics: tags of scalars, in the order of their columns.
        name: what the table calls the run; of runs of one name it shows the mean.
    """
    experiment, start, end = hparams(dict(values), dict.fromkeys(metrics, 0.0), {"status": list(STATUSES)})
    with _content(experiment) as content:
        for info in content.experiment.hparam_infos:  # TensorBoard sorts first what differs between runs
            info.differs = info.name in first
    with _content(start) as content:
        content.session_start_info.group_name = name
    with _content(end) as content:
        content.session_end_info.status = STATUSES[status]
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    events += [Event(wall_time=now, summary=part) for part in (experiment, start, end)]
    with replacing(folder / HPARAMS_FILE) as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def comparable(flat: Mapping[str, Any]) -> dict[str, float | str]:
    """The keys of a config that say what a run is; a key's values have one type in every run."""
    return {
        key: value
        if isinstance(value, int | float) and not isinstance(value, bool) and not may_be_none(key)
        else str(value)
        for key, value in flat.items()
        if key not in NOT_COMPARED
    }


def neighbours(out: Path, folder: Path) -> Iterator[dict[str, float | str]]:
    """What other runs under `out` were told, as far as it can be read; the newest ones."""
    files = []
    for path in out.glob(f"*/*/{CONFIG}"):
        with suppress(OSError):
            files.append((path.stat().st_mtime, path))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for _, path in sorted(files, reverse=True)[:LOOKED_AT]:
        if path.parent == folder:
            continue
        with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, RecursionError):
            tree = yaml.load(path.read_bytes(), loader)
            flat = {
                f"{k}.{leaf}": v for k, group in tree.items() if isinstance(group, dict) for leaf, v in group.items()
            }
            known = {key: value for key, value in {**tree, **flat}.items() if key in _keys()}
            yield comparable(known)


def _keys() -> Collection[str]:
    from mamba.config.keys import dotted_keys

    return dotted_keys()


def most_different(runs: Iterable[Mapping[str, Any]], many: int = MANY) -> list[str]:
    """The keys in which most runs are not like the others, most first; FIRST_HPARAMS where too few differ."""
    told = list(runs)
    others: dict[str, int] = {}
    for key in dict.fromkeys(key for values in told for key in values):
        counts = Counter(str(values[key]) for values in told if key in values)
        others[key] = sum(counts.values()) - max(counts.values())
    differ = sorted((key for key in others if others[key]), key=lambda key: -others[key])
    return filled(differ, [key for key in FIRST_HPARAMS if key in others], many)


def filled(first: Iterable[str], others: Iterable[str] = FIRST_HPARAMS, many: int = MANY) -> list[str]:
    """The keys whose columns come first, with others where they are too few: TensorBoard would take any."""
    return list(dict.fromkeys([*first, *others]))[:many]


@contextmanager
def _content(summary: Any) -> Iterator[Any]:
    """What a summary says to the HPARAMS tab, to be changed."""
    data = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    yield content
    data.content = content.SerializeToString()

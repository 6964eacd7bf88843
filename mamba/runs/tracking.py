"""What TensorBoard, metrics.jsonl, progress.json and result.json are told while a run goes on. Only rank 0 writes.

TensorBoard: scalars, images, config as text; the HPARAMS entry in a file of its own. A resumed run drops what was
logged after the checkpoint that it continues from.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mamba.config.keys import may_be_none
from mamba.config.schema import RunConfig
from mamba.config.versions import FORMAT
from mamba.runs.files import append, replacing, to_json, unwritable, write_json, write_text
from mamba.runs.folder import METRICS_LOG, PROGRESS, RESULT, logged_epochs
from mamba.runs.metrics import METRICS

HPARAM_METRICS = tuple(key for key, metric in METRICS.items() if metric.hparams)
"""Columns of the HPARAMS tab."""
FIRST_HPARAMS = frozenset({"data.augment", "model.drop_path", "model.name", "optim.lr"})
"""Columns that TensorBoard shows before the others, with the status: five in all; the rest is one click away."""
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
    *("scaling.cpus_per_worker", "scaling.max_failures"),
}


class Tracker:
    """Writes a run's folder as it goes. Made on rank 0 only."""

    def __init__(self, folder: Path, config: RunConfig, epochs_done: int, steps_done: int) -> None:
        self.folder, self.config = folder, config
        try:
            self._drop_after(epochs_done)
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if any(folder.glob("events*")) else None)
            if steps_done == 0:
                lines = [f"    {line}" for line in config.to_yaml().splitlines()]
                self.writer.add_text("config", "\n".join(lines))
            self.writer.flush()
        except OSError as error:
            raise unwritable(folder, error) from None

    def _drop_after(self, epochs_done: int) -> None:
        path = self.folder / METRICS_LOG
        if path.is_symlink() or path.exists():
            kept = [line for line, row in logged_epochs(self.folder).items() if row["epoch"] <= epochs_done]
            write_text(path, "".join(line + "\n" for line in kept))

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of one optimizer step, under tags of their own (`step/*`)."""
        self.scalars({f"step/{name}": value for name, value in metrics.items()}, global_step)

    def epoch(self, epoch: int, global_step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Scalars at the end of the epoch-th epoch; learning rates by group under `lr/*`. Like every scalar they are
        drawn against the optimizer step, the one axis on which a resumed run can drop what it is going to repeat."""
        self.scalars({**metrics, **{f"lr/{name}": value for name, value in rates.items()}}, global_step)
        with self._writing():
            self.writer.flush()
        append(self.folder / METRICS_LOG, to_json({"epoch": epoch, **metrics}) + "\n")

    def scalars(self, metrics: Mapping[str, float], global_step: int) -> None:
        """Scalars by their tags; what has no epochs needs no more than this."""
        with self._writing():
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, global_step)

    def samples(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """A grid of the first training batch as the model sees it, normalisation undone."""
        from torchvision.utils import make_grid  # not above: a slow import

        shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
        pictures = (images[:32].detach().float().cpu() * scale + shift).clamp(0, 1)
        factor = max(1, 64 // pictures.shape[-1])
        pictures = pictures.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
        with self._writing():
            self.writer.add_image("train/augmented", make_grid(pictures, nrow=8), 0)

    def progress(self, **position: Any) -> None:
        write_json(self.folder / PROGRESS, position)

    def finish(self, result: Mapping[str, Any], global_step: int) -> None:
        """The final scalars, the HPARAMS entry's status, and result.json."""
        final = {name: v for name, v in result["metrics"].items() if name.split("/")[0] in ("test", "model")}
        self.scalars(final, global_step)
        with self._writing():
            self.writer.close()
        write_hparams(self.folder, self.config, "finished")
        write_json(self.folder / RESULT, {"format": FORMAT, **result})

    def close(self) -> None:
        self.writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """TensorBoard's writer says what went wrong with an earlier event at a later one, or at the end."""
        try:
            yield
        except OSError as error:
            raise unwritable(self.folder, error) from None


def write_hparams(folder: Path, config: RunConfig, status: str, first: Collection[str] = FIRST_HPARAMS) -> None:
    """A run's line in TensorBoard's HPARAMS tab, with a status to filter and sort by; replaces the one before.

    Written when a run has ended: a TensorBoard that is open keeps the first entry that it reads of a run. Every run of
    ours has the same keys, so each can carry the same experiment summary, whichever TensorBoard reads: one table with
    every run under `--logdir`, whatever was or was not searched.

    Args:
        folder: of the run.
        config: of the run.
        status: one of STATUSES.
        first: the hyperparameters whose columns come first.
    """
    shown = {
        key: value
        if isinstance(value, int | float) and not isinstance(value, bool) and not may_be_none(key)
        else str(value)
        for key, value in config.flat().items()
        if key not in NOT_COMPARED
    }
    metrics = dict.fromkeys(HPARAM_METRICS, 0.0)
    experiment, start, end = hparams({"status": status, **shown}, metrics, {"status": list(STATUSES)})
    with _content(experiment) as content:
        for info in content.experiment.hparam_infos:  # TensorBoard sorts first what differs between runs
            info.differs = info.name == "status" or info.name in first
    with _content(end) as content:
        content.session_end_info.status = STATUSES[status]
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    events += [Event(wall_time=now, summary=part) for part in (experiment, start, end)]
    with replacing(folder / HPARAMS_FILE) as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


@contextmanager
def _content(summary: Any) -> Iterator[Any]:
    """What a summary says to the HPARAMS tab, to be changed."""
    data = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    yield content
    data.content = content.SerializeToString()

"""TensorBoard: a run's events, the layout of its custom scalars, and the link that pins the cards that count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MarginChartContent,
    MultilineChartContent,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mamba.config.schema import RunConfig
from mamba.runs.backends import Backend
from mamba.runs.files import unwritable

PINNED = ("val/accuracy", "val/best_accuracy", "train/loss")
"""Cards that come before all others."""
RATE, LOWEST_RATE = "train/lr", "train/lr_lowest"
"""The head's learning rate, and the lowest of any group of parameters: the others lie between the two."""
LINES = {
    "accuracy": {
        "validation accuracy, raw and averaged weights": r"^val/(accuracy|ema_accuracy)$",
        "validation accuracy of the kept weights": r"^val/best_accuracy$",
    },
    "loss": {"loss": r"^(train|val)/loss$"},
    "training": {"speed, images/s": r"^train/images_per_s$"},
}
"""Custom scalars: category -> title -> tags."""


class TensorBoard(Backend):
    """The events of a run. What a resumed run repeats is dropped from what is shown."""

    def __init__(self, folder: Path, config: RunConfig, steps_done: int) -> None:
        super().__init__(folder, config, steps_done)
        before = any(folder.glob("events*"))
        with self._writing():
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if before else None)
            if steps_done == 0:
                self.writer.add_text("config", "\n".join(f"    {line}" for line in config.to_yaml().splitlines()))
                self.writer._get_file_writer().add_summary(layout_summary())
            self.writer.flush()

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        with self._writing():
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        with self._writing():
            self.writer.add_image(name, picture, step)

    def flush(self) -> None:
        with self._writing():
            self.writer.flush()

    def close(self) -> None:
        with self._writing():
            self.writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """TensorBoard's writer says what went wrong with an earlier event at a later one, or at the end."""
        try:
            yield
        except OSError as error:
            raise unwritable(self.folder, error) from None


def layout() -> Layout:
    """The tab CUSTOM SCALARS: what counts first, and all learning rates as one band."""
    categories = [
        Category(
            title=title,
            chart=[Chart(title=words, multiline=MultilineChartContent(tag=[tag])) for words, tag in charts.items()],
        )
        for title, charts in LINES.items()
    ]
    band = MarginChartContent(series=[MarginChartContent.Series(value=RATE, lower=LOWEST_RATE, upper=RATE)])
    categories[-1].chart.append(Chart(title="learning rates, from the lowest to the head's", margin=band))
    return Layout(category=categories)


def layout_summary() -> Summary:
    """The layout as TensorBoard looks for it; the same in every run counts once."""
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=TensorProto(dtype=DT_STRING, string_val=[layout().SerializeToString()]),
    )
    return Summary(value=[value])


def pinned_link(port: int = 6006) -> str:
    """The address under which TensorBoard opens with the cards that count pinned above all others."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    return f"http://localhost:{port}/?pinnedCards={quote(cards)}#timeseries"

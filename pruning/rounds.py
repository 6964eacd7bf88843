"""Rounds: train, prune a share of what survives, rewind, train again (the lottery ticket's iterative pruning,
https://arxiv.org/abs/1803.03635), with Refill or RSST deciding which whole units go.

A folder of rounds holds everything, so that a killed series goes on where it was:

    config.yaml            the series' config
    start/                 the dense weights that round 0 trains from
    rewind/                the dense weights that later rounds start from, where that is a later epoch's
    round-00/ ...          one run each: config, metrics, checkpoints, result.json; from round 1 on also
    round-01/start/          what it starts from: rewound weights (smaller already under refill), masks of single
                             weights (masks), the units that stay (stay, for rsst), and both in the dense model's
                             coordinates (survivors, units)
    round-01/pruned/         its best model, as small as its masks allow
    round-01/row.json        its line of the table
    rounds.csv rounds.png    the table and the figure

Knows nothing of Ray: how a run is trained and measured is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba.config.choices import Registry
from mamba.config.facts import METHODS as KNOWN
from mamba.config.facts import MethodFacts
from mamba.config.schema import PruneConfig, RunConfig
from mamba.data.fingerprint import fingerprint
from mamba.data.images import ImageData
from mamba.data.loader import eval_batches
from mamba.errors import CheckpointError, ConfigError, FolderError
from mamba.models.model import Architecture, MambaModel
from mamba.runs import checkpoint as ckpt
from mamba.runs.files import read_sealed, write_csv, write_sealed
from mamba.runs.folder import write_config
from mamba.runs.inputs import keep_inputs
from mamba.runs.provenance import describe_data
from mamba.runs.start import start_of
from mamba.train.ema import ModelEma
from mamba.train.hooks import TrainHook
from pruning.importance import Batches
from pruning.masks import FILE as MASKS
from pruning.masks import MaskHook, Masks, load_masks
from pruning.penalty import GrowingDecay, PenaltyHook
from pruning.record import load_record, save_record
from pruning.refill import REFILL_SCORES, prune_survivors, record_of_round, refill_masks, targets_of
from pruning.show import PICTURE, cut_picture
from pruning.shrink import Slices, shrink
from pruning.store import load_smaller, masks_of, save_pruned

STAY, SURVIVORS, UNITS = "stay.safetensors", "survivors.safetensors", "units.safetensors"
COLUMNS = (
    *("round", "density", "params", "nonzero", "macs", "val_accuracy", "test_accuracy"),
    *("images_per_s", "latency_ms", "seconds"),
)
"""Of a row. The test accuracy is the last round's alone, so that no round is chosen by it; without a validation split
it is every round's."""
CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Method:
    """What a round does with the weights that global magnitude pruning gives up."""

    choose: Callable[..., Masks] | None = None
    """Which whole units stay, called as `pruning.refill.refill_masks` is; None: weights go one by one."""
    shrinks: bool = False
    """The other units are removed before the round trains."""
    decays: bool = False
    """The other units are decayed while it trains, then cut."""

    @property
    def file(self) -> str:
        """Where a round keeps its units."""
        return STAY if self.decays else UNITS


METHODS = Registry(
    "prune.method",
    {
        "magnitude": Method(),
        "refill": Method(refill_masks, shrinks=True),
        "rsst": Method(refill_masks, decays=True),
    },
    besides=("none",),
    facts=KNOWN,
    fact=lambda method: MethodFacts(method.choose is not None, method.decays),
)


@dataclass(frozen=True)
class Engine:
    """How a series of rounds gets its work done."""

    train: Callable[[RunConfig, Path], dict[str, Any]]
    """Train a resolved config in a folder, from its newest checkpoint if there is one -> its result."""
    measure: Callable[[RunConfig, Path], dict[str, float]]
    """Size and accuracy, and speed where it is measured now, of a checkpoint or run folder's best model, its masks'
    units removed."""
    say: Callable[[str], None]


def run_rounds(config: RunConfig, folder: Path, data: ImageData, engine: Engine) -> list[dict[str, Any]] | None:
    """Run what is left of a series of rounds in its folder.

    Returns:
        a row for each round (COLUMNS); None where a run was interrupted: call again to go on.

    Raises:
        ForgeError: of a run, or a folder that cannot be written or read.
    """
    check_series(folder, config)
    keep_inputs(folder, {"data": fingerprint(data)}, config=config.flat())
    if not (folder / "start").exists():
        _make_start(config, folder, data)
    rows = []
    for number in range(config.prune.rounds + 1):
        here = folder / f"round-{number:02d}"
        if not (here / "row.json").exists():
            here.mkdir(exist_ok=True)
            if number and not (here / "start").exists():
                _prepare(config, folder, number, data)
            row = _run_round(config, folder, number, engine)
            if row is None:
                return None
            write_sealed(here / "row.json", row)
        rows.append(_read_row(here / "row.json"))
        write_csv(folder / "rounds.csv", COLUMNS, rows)
        row = rows[-1]
        accuracy, words = accuracy_of(row)
        speed = f", {row['images_per_s']:,.0f} images/s" if row["images_per_s"] else ""
        engine.say(
            f"round {number}: density {row['density']:.4f}, {row['params']:,} parameters, "
            f"{accuracy:.2f} % {words}{speed}"
        )
    return rows


def accuracy_of(row: Mapping[str, Any]) -> tuple[float, str]:
    """A round's accuracy to choose by, and what it is: validation, or test where there is no validation split (and in
    series of before validation was measured)."""
    value = row.get("val_accuracy")
    if value is not None:
        return value, "validation"
    value = row.get("test_accuracy")
    return math.nan if value is None else value, "test"


def check_rounds(config: RunConfig) -> None:
    """What a series of rounds cannot be; raises ConfigError or CheckpointError before anything is written."""
    prune, start = config.prune, config.model.checkpoint
    if prune.method == "none":
        raise ConfigError(f"prune.method 'none' prunes nothing; valid here: {', '.join(METHODS)}")
    if start is not None and prune.rewind_epoch:
        raise ConfigError(
            f"prune.rewind_epoch {prune.rewind_epoch} does not go with a trained model (model.checkpoint): rounds "
            "rewind to that model; give one of both"
        )
    if start is not None and masks_of(start) and load_smaller(start)[0].masks:
        raise ConfigError(
            f"model.checkpoint {start} holds masks of single weights, which rounds would not keep; start from a "
            "dense model, or one that only lost whole units"
        )


def round_folders(series: Path) -> list[Path]:
    """The folders of a series' rounds that are over, in order."""
    return sorted(row.parent for row in series.glob("round-*/row.json"))


def check_series(folder: Path, config: RunConfig) -> None:
    """Raises ConfigError where a folder is no series of rounds: a plan's, or one of a series' own runs."""
    if config.prune.method == "none" or config.prune.round or (folder / "pruned.json").exists():
        raise ConfigError(f"{folder} is no series of rounds, but one run or what a plan left; nothing to continue")


def hooks_for(config: RunConfig, rank: int = 0, folder: Path | None = None) -> list[TrainHook]:
    """What pruning adds to a run, by its config and the checkpoint that it starts from: its folder's own copy, where
    there is one.

    Raises:
        CheckpointError: masks that cannot be read.
    """
    hooks: list[TrainHook] = []
    prune, penalty = config.prune, config.penalty
    if penalty.kind != "off":
        hooks.append(PenaltyHook(penalty.strength, penalty.exponent, penalty.target, penalty.kind))
    source = config.model.checkpoint if folder is None else start_of(config, folder)
    if source is not None:
        start = ckpt.find_checkpoint(source)
        method = METHODS[prune.method] if prune.round > 0 else None
        masks = load_masks(start / MASKS) if method and not method.shrinks else masks_of(start)
        if (method and method.decays) or (start / STAY).exists():
            stay = load_masks(start / STAY)
            hooks.append(GrowingDecay(masks, stay, prune.ceiling, prune.schedule, prune.exponent, config.grow_epochs()))
        elif masks:
            hooks.append(MaskHook(masks))
    if folder is not None and rank == 0 and prune.round > 0:
        hooks.append(ShowCut(folder))
    if prune.method != "none" and prune.round == 0 and prune.rewind_epoch and rank == 0:
        series = config.out / config.name
        hooks.append(KeepEpoch(series / "rewind", prune.rewind_epoch))
    return hooks


class ShowCut(TrainHook):
    """Shows a run's backends what its round was cut to, layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pictures(self) -> dict[str, Tensor]:
        record = load_record(self.folder)
        return {} if record is None else {PICTURE: cut_picture(record)}


class KeepEpoch(TrainHook):
    """Writes the weights after a certain epoch, once."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder, self.epochs = folder, epochs

    def attach(self, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, seed: int) -> None:
        assert isinstance(model, MambaModel)
        self.model = model

    def end_epoch(self, epoch: int) -> dict[str, float]:
        if epoch + 1 == self.epochs and not self.folder.exists():
            ckpt.save_checkpoint(self.folder, self.model, None, {"epoch": epoch + 1}, None)
        return {}


def _make_start(config: RunConfig, folder: Path, data: ImageData) -> None:
    """The dense weights of round 0: a checkpoint's, or new ones, the same that a run with this seed would draw."""
    if config.model.checkpoint is not None:
        dense, description = load_smaller(config.model.checkpoint, drop_path=config.model.drop_path)
        save_pruned(folder / "start", dense.model, dense.masks, description)  # no masks are left: see check_rounds
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        side = data.side
        model = MambaModel(Architecture.from_config(config.model, len(data.classes), side))
    ckpt.save_checkpoint(folder / "start", model, None, describe_data(data), None)


def _run_round(config: RunConfig, folder: Path, number: int, engine: Engine) -> dict[str, Any] | None:
    here = folder / f"round-{number:02d}"
    start = folder / "start" if number == 0 else here / "start"
    own = config.with_values(
        {
            "model.checkpoint": start,
            "prune.round": number,
            "out": folder.parent,
            "name": folder.name,
            "trial": here.name,
        }
    ).resolve()
    if number == 0 and config.model.checkpoint is not None:  # trained already
        measured, seconds = engine.measure(own, start), 0.0
    else:
        write_config(here, own)
        result = engine.train(own, here)
        stop = here / "STOP"
        if result["status"] != "finished" or stop.exists():  # asked for after the last step: the next call goes on
            stop.unlink(missing_ok=True)
            return None
        measured, seconds = engine.measure(own, _keep_smaller(here)), result["seconds"]
        if number == config.prune.rounds:
            measured = {"test/accuracy": result["metrics"]["test/accuracy"], **measured}
    return {
        "round": number,
        "density": _density(config, folder, number),
        "params": int(measured["model/params"]),
        "nonzero": int(measured["model/nonzero"]),
        "macs": int(measured["model/macs"]),
        "val_accuracy": measured.get("val/accuracy"),
        "test_accuracy": measured.get("test/accuracy"),
        "images_per_s": measured.get("bench/images_per_s"),
        "latency_ms": measured.get("bench/latency_ms"),
        "seconds": seconds,
    }


def _keep_smaller(here: Path) -> Path:
    """A round's best model without the units that its masks take whole: round-NN/pruned, to use and to train on."""
    smaller, description = load_smaller(here)
    return save_pruned(here / "pruned", smaller.model, smaller.masks, description)


def _density(config: RunConfig, folder: Path, number: int) -> float:
    """Share of the target's weights that survives."""
    if number == 0:
        return 1.0
    survivors = load_masks(folder / f"round-{number:02d}" / "start" / SURVIVORS)
    return sum(int(m.sum()) for m in survivors.values()) / sum(m.numel() for m in survivors.values())


def _prepare(config: RunConfig, folder: Path, number: int, data: ImageData) -> None:
    """Prune the round before, rewind, and write what this round starts from."""
    prune, method = config.prune, METHODS[config.prune.method]
    trained, earlier = _trained(config, folder, number - 1)
    survivors = survivors_of_round(trained, earlier, prune, number)
    rewind = folder / ("rewind" if prune.rewind_epoch and config.model.checkpoint is None else "start")
    dense, description = ckpt.load_model(rewind, weights="raw", drop_path=config.model.drop_path)
    units: Masks = {}
    if method.choose is not None:
        batches = calibration_batches(data, config.seed) if REFILL_SCORES[prune.score].calibrated else None
        before = folder / f"round-{number - 1:02d}" / "start" / method.file
        among = load_masks(before) if number > 1 else None
        seed = config.seed + number
        units = method.choose(trained, survivors, prune.target, prune.fillback_rate, prune.score, batches, seed, among)
    apart = prune.ssm_rate is not None or prune.mlp_rate is not None
    record = record_of_round(trained, dense, earlier, survivors, units, prune.target, apart)
    save_record(folder / f"round-{number:02d}", record)
    extra: dict[str, dict[str, Tensor]] = {SURVIVORS: survivors}
    model = dense
    if units:
        extra[method.file] = units
    if method.shrinks:
        model = shrink(dense, units).model
    else:
        extra[MASKS] = survivors
    ckpt.save_checkpoint(folder / f"round-{number:02d}" / "start", model, None, {**description}, None, extra)


def survivors_of_round(model: MambaModel, masks: Masks, prune: PruneConfig, number: int) -> Masks:
    """Which of the target's weights survive round `number`: ranked all together at one rate, or channels' and neurons'
    each among themselves where one of both has a rate of its own."""
    if prune.ssm_rate is None and prune.mlp_rate is None:
        return prune_survivors(model, masks, prune.target, (1 - prune.rate) ** number)
    rates = {"ssm": prune.ssm_rate, "mlp": prune.mlp_rate}
    left: Masks = {}
    for part in targets_of(model, prune.target):
        own = rates[part]
        left |= prune_survivors(model, masks, part, (1 - (prune.rate if own is None else own)) ** number)
    return left


def _trained(config: RunConfig, folder: Path, number: int) -> tuple[MambaModel, Masks]:
    """A round's trained weights at their places in the dense model, zero where a unit is gone, and its survivors."""
    here = folder / f"round-{number:02d}"
    newest = ckpt.newest_checkpoint(here)
    if number == 0 and config.model.checkpoint is not None:  # trained already
        return ckpt.load_model(folder / "start", weights="raw")[0], {}
    if newest is None:
        raise CheckpointError(f"{here / 'checkpoints'} is missing: the next round is pruned by its weights")
    model, _ = ckpt.load_model(newest, weights="raw")
    if number == 0:
        return model, {}
    survivors = load_masks(here / "start" / SURVIVORS)
    if not METHODS[config.prune.method].shrinks:
        return model, survivors
    dense, _ = ckpt.load_model(folder / "start", weights="raw")
    slices = shrink(dense, load_masks(here / "start" / UNITS)).slices
    return expand(model, dense, slices), survivors


@torch.no_grad()
def expand(model: MambaModel, dense: MambaModel, slices: Slices) -> MambaModel:
    """A smaller model's weights at their places in the dense model's shape (which is overwritten), zeros elsewhere."""
    state = {name: torch.zeros_like(tensor) for name, tensor in dense.state_dict().items()}
    for name, tensor in model.state_dict().items():
        old = slices.entries[name][0]
        slices.put(name, tensor, state[old])
    dense.load_state_dict(state)
    return dense


def calibration_batches(data: ImageData, seed: int) -> Batches:
    """A fixed random part of the training images, normalised, not augmented."""
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
    part = type(data.train)(data.train.images, data.train.labels, data.train.index[rows.numpy()])
    return list(eval_batches(data, part, 128, 0, 1, torch.device("cpu")))


def _read_row(path: Path) -> dict[str, Any]:
    """A round's row; raises FolderError where it is damaged, or that of another round or model."""
    remedy = "remove it to measure that round again"
    row, here = read_sealed(path, remedy), path.parent
    missing = [
        key for key in ("round", "density", "params", "nonzero", "macs") if not isinstance(row.get(key), int | float)
    ]
    if missing:
        raise FolderError(f"{path} is damaged (it holds no {missing[0]}); {remedy}")
    if row["round"] != int(here.name.partition("-")[2]):
        raise FolderError(f"{path} is that of round {row['round']}: a copy; {remedy}")
    if (here / "pruned").exists() and (found := ckpt.parameters_in(here / "pruned")) != row["params"]:
        raise FolderError(
            f"{path} is of a model of {row['params']:,} parameters, and that of {here / 'pruned'} has {found:,}; "
            f"{remedy}"
        )
    return row

"""What a training state holds, each thing declared once: how it is read, and how it is put back.

With the weights this is all that changes while training, so a run that continues from it goes on as if it had not been
interrupted: same order, same random numbers, same bits on a deterministic device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mamba.runs import checkpoint as ckpt
from mamba.runs.metrics import SCORE
from mamba.runs.provenance import check_resume, describe_data
from mamba.runs.unchanged import changed
from mamba.train.distributed import Process
from mamba.train.writer import Copies

if TYPE_CHECKING:
    from mamba.train.trainer import Trainer

POSITION = ("epoch", "step", "seconds", "best", "metrics", "unvalidated")
"""Attributes of the trainer that are plain values."""
NEW = {"unvalidated"}
"""What states of earlier versions do not have: it stays as a run begins with it."""


class Saved(NamedTuple):
    """One thing of a training state: plain containers and tensors only."""

    read: Callable[[], Any]
    restore: Callable[[Any], object]


def saved(trainer: Trainer) -> dict[str, Saved]:
    """Name -> how a thing is read and put back, in the order in which they are put back."""
    step, ema, process = trainer.optimizer_step, trainer.ema, trainer.process
    things = {
        "train_images": Saved(lambda: len(trainer.data.train), partial(_same_images, trainer)),
        "optimizer": Saved(trainer.optimizer.state_dict, trainer.optimizer.load_state_dict),
        "scaler": Saved(step.scaler.state_dict, step.scaler.load_state_dict),
        "totals": Saved(lambda: process.sum(step.totals.clone()) / process.world_size, step.totals.copy_),
        "skipped": Saved(lambda: step.skipped, step.skipped.copy_),
        "rng": Saved(partial(_random_states, process), partial(_restore_random_state, process)),
    }
    if ema:
        things["ema_updates"] = Saved(lambda: int(ema.updates.item()), ema.updates.fill_)
    return things | {n: Saved(partial(getattr, trainer, n), partial(setattr, trainer, n)) for n in POSITION}


def save(trainer: Trainer) -> Path:
    """Have the whole training state written; every rank calls it. `finish_writing` waits for it."""
    trainer.alive.enter("saving a checkpoint")
    state = {name: thing.read() for name, thing in saved(trainer).items()}
    folder = write_checkpoint(trainer, f"step-{trainer.global_step:08d}", state)
    if trainer.process.rank == 0:  # a best is dropped only once no training state can lead back to before the next
        keep = trainer.config.checkpoint.keep
        trainer.writer.submit(lambda: ckpt.remove_old(trainer.folder, "step-*", keep))
        trainer.writer.submit(lambda: ckpt.remove_old(trainer.folder, "best-*", 1))
    return folder


def write_checkpoint(trainer: Trainer, name: str, state: dict[str, Any] | None) -> Path:
    """Rank 0 has it written, as everything is now; all ranks learn whether those before it could be, so that they end
    together."""
    agree(trainer, trainer.writer.failure() if trainer.process.rank == 0 else None)
    folder = trainer.folder / "checkpoints" / name
    if trainer.process.rank == 0:
        description = {
            "epoch": trainer.epoch,
            "metrics": trainer.metrics,
            "weights": trainer.best["weights"],
            **describe_data(trainer.data),
            "config": trainer.config.model_dump(mode="json"),
        }
        extra = {file: tensors for hook in trainer.hooks for file, tensors in hook.files().items()}
        average = trainer.ema.model if trainer.ema else None
        copies = Copies()
        content = ckpt.Content(*copies.of(tuple(ckpt.content_of(trainer.model, average, description, state, extra))))
        copies.begun()

        def write() -> None:
            copies.wait()
            ckpt.write_content(folder, content)

        trainer.writer.submit(write)
    return folder


def finish_writing(trainer: Trainer) -> None:
    """Wait until every checkpoint is written; every rank calls it."""
    trainer.alive.enter("writing the last checkpoint")
    agree(trainer, trainer.writer.finish() if trainer.process.rank == 0 else None)


def agree(trainer: Trainer, failure: str | None) -> None:
    """Raises CheckpointError on every rank where rank 0 has a failure to tell."""
    failure = trainer.process.broadcast(failure)
    if failure:
        raise ckpt.CheckpointError(failure, every_rank=True)


def restore(trainer: Trainer) -> None:
    """Continue from the newest checkpoint of the run's folder, if there is one; every rank calls it."""
    folder = ckpt.newest_checkpoint(trainer.folder)
    if folder is None:
        return
    check_resume(folder, trainer.data)
    ckpt.load_weights(trainer.model, folder)
    if trainer.ema:
        ckpt.load_weights(trainer.ema.model, folder, ckpt.EMA_WEIGHTS)
    state = ckpt.load_training_state(folder)
    things = saved(trainer)
    missing = sorted(things.keys() - state.keys() - NEW)
    if missing:
        raise ckpt.CheckpointError(f"{folder / ckpt.STATE} lacks {', '.join(missing)}; {ckpt.ADVICE}", every_rank=True)
    for name, thing in things.items():
        if name in state:
            thing.restore(state[name])
    if trainer.best["epoch"] and own_best(trainer) is None:
        warnings.warn(f"{_best_folder(trainer)} is gone or not this run's: the best is looked for anew", stacklevel=2)
        forget_best(trainer)
    if trainer.process.rank == 0:
        ckpt.remove_best_after(trainer.folder, trainer.epoch)


def own_best(trainer: Trainer) -> Path | None:
    """The checkpoint of the weights that validated best, where it is there and what this run wrote: their accuracy is
    the run's figure, and is that of no others."""
    folder, best = _best_folder(trainer), trainer.best
    if not best["epoch"] or folder.is_symlink() or not (folder / ckpt.DESCRIPTION).exists():
        return None
    about = ckpt.read_description(folder)  # of earlier versions it says less
    known = {"epoch": about.get("epoch"), "accuracy": about.get("metrics", {}).get(SCORE)}
    config = about.get("config")
    if any(value not in (None, best[key]) for key, value in known.items()):
        return None
    trained = type(trainer.config).stored(config, folder).flat() if isinstance(config, dict) else {}
    return None if changed(trainer.config.flat(), trained, ("optim.epochs",)) else folder


def forget_best(trainer: Trainer) -> None:
    """As before anything was validated."""
    trainer.best = {"accuracy": -math.inf, "epoch": 0, "weights": "ema" if trainer.ema else "raw"}
    trainer.metrics.pop(SCORE, None)


def _best_folder(trainer: Trainer) -> Path:
    return trainer.folder / ckpt.FOLDER / f"best-{trainer.best['epoch']:05d}"


def _same_images(trainer: Trainer, before: int) -> None:
    if before != len(trainer.data.train):
        raise ckpt.CheckpointError(
            f"{ckpt.newest_checkpoint(trainer.folder)} was trained on {before} images and the training set now has "
            f"{len(trainer.data.train)}: a run resumes on its own data only"
        )


def _random_states(process: Process) -> list[dict[str, Any]]:
    """Of every rank: only drop path draws from them."""
    cuda = torch.cuda.get_rng_state(process.device) if process.device.type == "cuda" else None
    return process.gather({"cpu": torch.get_rng_state(), "cuda": cuda})


def _restore_random_state(process: Process, states: list[dict[str, Any]]) -> None:
    if len(states) != process.world_size:  # drop path goes on from a fresh seed
        return
    own = states[process.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and process.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], process.device)

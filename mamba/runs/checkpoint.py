"""Checkpoints as folders: weights as safetensors, the training state without pickled code, the description as JSON.

    model.safetensors       the weights
    ema.safetensors         their moving average, if the run keeps one
    training_state.pt       optimizer, scaler, RNG of every rank, position, best metric (torch.load, weights_only)
    config.json             architecture with every block's actual widths, classes, statistics, metrics, and a checksum
                            of each other file and of itself

A folder is written under a temporary name, synced, then renamed: a name that exists is complete. A checkpoint that is
replaced keeps its old content under a second name until the new one is in its place, and gets it back if that was cut
short. A model is rebuilt from its folder alone; a folder without training_state.pt (the best of a run) cannot be
resumed, only loaded. In `checkpoints/` of a run only what is called exactly step-N or best-N is the run's: copies and
whatever else lies there are left alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mamba.config.choices import PLUGINS, load_plugins
from mamba.config.versions import FORMAT, check_format
from mamba.data.transform import transform_of
from mamba.errors import CheckpointError, ConfigError, FolderError
from mamba.models.embed import STEMS
from mamba.models.heads import HEADS
from mamba.models.model import Architecture, MambaModel, count_parameters
from mamba.models.ssm import MIXERS
from mamba.runs.files import (
    SEAL,
    as_metrics,
    check_seal,
    checksum,
    create,
    read_json,
    sealed,
    sync,
    to_json,
    unwritable,
)

ADVICE = "remove that folder to go on from an earlier checkpoint, if there is one, or from the start"
WEIGHTS, EMA_WEIGHTS, STATE, DESCRIPTION = "model.safetensors", "ema.safetensors", "training_state.pt", "config.json"
FOLDER = "checkpoints"


class Content(NamedTuple):
    """What a checkpoint folder will hold: safetensors files by name, the training state, a description in JSON."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    training_state: dict[str, Any] | None
    description: Mapping[str, Any]


def content_of(
    model: MambaModel,
    ema: MambaModel | None,
    description: Mapping[str, Any],
    training_state: dict[str, Any] | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Content:
    """The content of `save_checkpoint`, its tensors the model's own."""
    tensors = {WEIGHTS: model.state_dict(), **({EMA_WEIGHTS: ema.state_dict()} if ema else {}), **(extra or {})}
    own = {key: value for key, value in description.items() if key not in ("format", "transform", SEAL)}
    tree = {"format": FORMAT, **own, "architecture": model.architecture.to_dict(), **_added_mixers(model.architecture)}
    return Content(tensors, training_state, tree)


def _added_mixers(architecture: Architecture) -> dict[str, Any]:
    """What a model's mixers are that do not ship: their names alone say nothing, since code can change."""
    names = sorted({block.mixer for block in architecture.blocks} - set(MIXERS.shipped))
    return {"mixers": json.loads(json.dumps({name: asdict(MIXERS[name]) for name in names}))} if names else {}


def save_checkpoint(
    folder: Path,
    model: MambaModel,
    ema: MambaModel | None,
    description: Mapping[str, Any],
    training_state: dict[str, Any] | None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint folder atomically. `description` is JSON; architecture, format and checksums are added to it.
    `extra` holds more safetensors files by name (masks).

    Raises:
        CheckpointError: the folder cannot be written (no space left, no permission).
    """
    return write_content(folder, content_of(model, ema, description, training_state, extra))


def write_content(folder: Path, content: Content) -> Path:
    """`save_checkpoint` of a content."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _own(folder.parent)
        _discard(partial)
        partial.mkdir(parents=True)
        for name, own in content.tensors.items():
            with create(partial / name) as file:
                file.write(save({key: value.detach().cpu().contiguous() for key, value in own.items()}))
        if content.training_state is not None:
            with create(partial / STATE) as file:
                torch.save(content.training_state, file)
        checksums = {file.name: checksum(file) for file in sorted(partial.iterdir())}
        with create(partial / DESCRIPTION) as file:
            file.write(to_json(sealed({**content.description, "checksums": checksums}), indent=1).encode())
        put_in_place(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors wrap a full disk
        _discard(partial)
        raise CheckpointError(
            f"the checkpoint {unwritable(folder, error, 'earlier checkpoints are untouched')}"
        ) from None
    return folder


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a complete folder its name, in the place of what had it. Whenever this is cut short, `recover` finds the old
    content or the new.

    Raises:
        OSError: the folder cannot be written, or the name is that of a link.
    """
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, which is not followed")
    old = _old(folder)
    recover(folder)
    if folder.exists():
        _discard(old)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    _discard(old)


def recover(folder: Path) -> None:
    """Give a checkpoint its content back, if replacing it was cut short between the two renames."""
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        with suppress(OSError):
            old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _own(parent: Path) -> None:
    """Raises OSError where a run's folder of checkpoints is a link: to another run's, perhaps."""
    if parent.name == FOLDER and parent.is_symlink():
        raise OSError(f"{parent} is a link, which is not followed")


def load_model(
    path: str | Path,
    weights: Literal["best", "raw", "ema"] = "best",
    device: str | torch.device = "cpu",
    drop_path: float | None = None,
) -> tuple[MambaModel, dict[str, Any]]:
    """Rebuild a model from a checkpoint folder, or from a run's folder (its best checkpoint, else its newest).

    Args:
        path: the folder.
        weights: raw, ema, or the one of both that validated best (ema, if kept, where nothing was validated).
        device: where the model is put.
        drop_path: another rate of stochastic depth than the one it was trained with.

    Returns:
        the model in eval mode, and the checkpoint's description: classes, mean, std, metrics, and `transform`, which
        makes of images what the model reads (`mamba.data.transform.Transform`; None where mean and std are not known).

    Raises:
        CheckpointError: no checkpoint there, a file missing, damaged or truncated, no average kept, or a weight that
            is not finite.
    """
    folder = find_checkpoint(Path(path))
    description = read_description(folder)
    architecture = architecture_in(folder, description)
    if drop_path is not None:
        architecture = replace(architecture, drop_path=drop_path)
    model = build(architecture, folder)
    load_weights(model, folder, weights_file(description, weights))
    check_finite(model.state_dict(), str(folder))
    side = architecture.img_size
    return model.to(device).eval(), {**description, "transform": transform_of(description, side)}


def architecture_in(folder: Path, description: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a checkpoint folder's model; raises CheckpointError where it is none of ours."""
    load_plugins()
    tree = read_description(folder) if description is None else description
    own = tree.get("architecture")
    if isinstance(own, dict):
        blocks = own.get("blocks")
        mixers = [b.get("mixer") for b in blocks if isinstance(b, dict)] if isinstance(blocks, list | tuple) else []
        for registry, names in ((MIXERS, mixers), (STEMS, [own.get("stem")]), (HEADS, [own.get("head")])):
            unknown = [name for name in names if isinstance(name, str) and name not in registry]
            if unknown:
                raise CheckpointError(
                    f"{folder} is of {registry.key} '{unknown[0]}', which is none of {', '.join(registry)}; where a "
                    f"module of yours adds it, name that module in {PLUGINS}"
                )
    try:
        found = Architecture.from_dict(tree["architecture"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} does not describe a model of ours: {error}") from None
    before = tree.get("mixers", {})
    for name, now in _added_mixers(found).get("mixers", {}).items():
        if name in before and before[name] != now:
            raise CheckpointError(
                f"{folder} was trained with another mixer '{name}' than is added now: its weights would be read in "
                f"another way ({before[name]}, now {now})"
            )
    return found


def build(architecture: Architecture, folder: Path) -> MambaModel:
    """A model without its weights; raises CheckpointError where the description describes none."""
    try:
        return MambaModel(architecture)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} does not describe a model of ours: {error}") from None


def weights_file(description: Mapping[str, Any], weights: Literal["best", "raw", "ema"]) -> str:
    """Which file holds the weights that are asked for; raises ConfigError for a word that names none."""
    if weights not in ("best", "raw", "ema"):
        raise ConfigError(f"weights {weights!r}: valid are best, raw, ema")
    use_ema = weights == "ema" or (weights == "best" and description.get("weights") == "ema")
    return EMA_WEIGHTS if use_ema else WEIGHTS


def parameters_in(path: Path) -> int:
    """How many parameters the model of a checkpoint or run has, without loading its weights."""
    folder = find_checkpoint(path)
    with torch.device("meta"):
        return count_parameters(build(architecture_in(folder), folder))


def load_weights(model: nn.Module, folder: Path, file: str = WEIGHTS) -> None:
    """Load one weights file of a checkpoint into a model of the same shape.

    Raises:
        CheckpointError: missing, truncated, damaged, or of another architecture (the first difference is named).
    """
    load_tensors(model, read_tensors(folder / file), str(folder / file))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint folder, its content compared with the folder's checksum.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """
    check_content(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {_listing(path.parent)}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {ADVICE}") from None


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict whose names and shapes are all the model's; `where` says whence it is, for the error.

    Raises:
        CheckpointError: of another architecture (the first difference is named).
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            ours = tuple(own[name].shape) if name in own else "absent"
            theirs = tuple(tensors[name].shape) if name in tensors else "absent"
            raise CheckpointError(
                f"{where} is of another architecture: {name} is {theirs} there and {ours} in this run's model"
            )
    model.load_state_dict(tensors)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError where a tensor holds NaN or an infinity, by its name: no figure of such a model counts."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{where}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")


def load_training_state(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError where it is missing, truncated or damaged."""
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: this checkpoint can be loaded, but a run cannot resume from it")
    check_content(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {ADVICE}") from None
    if not isinstance(state, dict) or "optimizer" not in state or "train_images" not in state:
        raise CheckpointError(f"{path} does not hold a training state of ours; {ADVICE}")
    return state


def check_content(path: Path) -> None:
    """Compare a checkpoint's file with the checksum that its folder keeps of it, where it keeps one (version 1: none).

    Raises:
        CheckpointError: other bytes than were written.
    """
    try:
        sums = read_json(path.parent / DESCRIPTION).get("checksums")
        expected = sums.get(path.name) if isinstance(sums, dict) else None
        if expected is None or checksum(path) == expected:
            return
    except (OSError, FolderError):  # whoever reads these files says so
        return
    raise CheckpointError(f"{path} is truncated or damaged (its checksum is not that of what was written); {ADVICE}")


def read_description(folder: Path) -> dict[str, Any]:
    """The checkpoint's JSON; raises CheckpointError where it is missing, damaged, or of a newer version."""
    path = folder / DESCRIPTION
    try:
        tree = read_json(path, ADVICE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {_listing(folder)}") from None
    except FolderError as error:
        raise CheckpointError(str(error)) from None
    check_format(tree, path, CheckpointError)
    try:
        check_seal(tree, path, ADVICE)
    except FolderError as error:
        raise CheckpointError(str(error)) from None
    return {**tree, "metrics": as_metrics(tree["metrics"])} if "metrics" in tree else tree


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder: `path` itself, or, of a run's folder, its best, else its newest.

    Raises:
        CheckpointError: there is none.
    """
    recover(path)
    if (path / DESCRIPTION).exists():
        return path
    found = best_checkpoint(path) or newest_checkpoint(path)
    if found is None:
        where = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        if not path.exists():
            raise CheckpointError(f"there is no {path}{where}; give a checkpoint's folder, or that of a run")
        raise CheckpointError(
            f"{path}{where} is neither a checkpoint (with {DESCRIPTION} and {WEIGHTS}) nor a run with {FOLDER}/ in "
            f"it{_meant(path)}"
        )
    return found


def _meant(path: Path) -> str:
    """What may have been meant by a folder that is no checkpoint and no run."""
    rounds = max(path.glob("round-*/pruned"), default=None)
    if rounds:
        return f"; it holds rounds of pruning: did you mean {rounds}?"
    if (path / "trial.json").exists():
        return (
            "; it is a trial that keeps no model: where it cut and measured one, cut.finetune_epochs trains it on and "
            "keeps it"
        )
    inside = [place for place in path.glob("*") if (place / FOLDER).is_dir() or any(place.glob("round-*/pruned"))]
    if not inside:
        return ""
    newest = max(inside, key=lambda place: (place.stat().st_mtime, place.name))
    return f"; {len(inside)} of its folders hold models: did you mean {newest}?"


def newest_checkpoint(run: Path) -> Path | None:
    """The last complete training state of a run."""
    return max(_named(run, "step-*"), default=None, key=number_of)


def best_checkpoint(run: Path) -> Path | None:
    """The weights that validated best."""
    return max(_named(run, "best-*"), default=None, key=number_of)


def remove_old(run: Path, pattern: Literal["step-*", "best-*"], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a kind, and what writing of one left when it was cut short."""
    for folder in sorted(_named(run, pattern), key=number_of)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
    for rest in (run / FOLDER).glob(".*-*.partial"):
        if re.fullmatch(r"\.(step|best)-\d+\.partial", rest.name):
            _discard(rest)


def remove_best_after(run: Path, epoch: int) -> None:
    """Delete the best checkpoints of epochs that a resumed run is going to repeat."""
    for folder in _named(run, "best-*"):
        if number_of(folder) > epoch:
            shutil.rmtree(folder, ignore_errors=True)


def number_of(folder: Path) -> int:
    """N of a folder named step-N or best-N."""
    return int(folder.name.partition("-")[2])


def _named(run: Path, pattern: str) -> list[Path]:
    """A run's checkpoints of one kind: real folders with exactly such a name, `*` being a number."""
    parent = run / FOLDER
    kind = pattern.removesuffix("*")
    if parent.is_symlink():
        raise CheckpointError(f"{parent} is a link, which is not followed: a run's checkpoints lie in its own folder")
    for old in parent.glob(f".{kind}*.old"):
        recover(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    exact = re.compile(re.escape(kind) + r"[0-9]+")
    return [f for f in parent.glob(pattern) if exact.fullmatch(f.name) and f.is_dir() and not f.is_symlink()]


def _listing(folder: Path) -> str:
    return ", ".join(sorted(f.name for f in folder.iterdir())) if folder.is_dir() else "nothing (it does not exist)"

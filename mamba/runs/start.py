"""What a run begins from: new weights, or a trained model's, of which it keeps a copy of its own.

`start/` in a run's folder is a checkpoint of the weights, masks and whatever else lay beside them, so that the run goes
on where the place that they came from has moved or is gone. A trained model goes to other classes (`model.new_head`) or
to another image size (`model.new_size`) only where that is asked for.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mamba.config.resolve import CONV_STEMS, MODEL_SIZES
from mamba.config.schema import RunConfig
from mamba.config.versions import FORMAT
from mamba.data.images import ImageData
from mamba.errors import CheckpointError, ConfigError
from mamba.models.embed import resize_positions
from mamba.models.model import Architecture, MambaModel
from mamba.runs.checkpoint import (
    DESCRIPTION,
    EMA_WEIGHTS,
    WEIGHTS,
    architecture_in,
    check_content,
    check_finite,
    find_checkpoint,
    load_model,
    load_tensors,
    load_training_state,
    newest_checkpoint,
    put_in_place,
    read_description,
    read_tensors,
    recover,
    weights_file,
)
from mamba.runs.files import checksum, create, sealed, to_json, unwritable
from mamba.runs.folder import CONFIG, forget_stop, read_config
from mamba.runs.provenance import check_data
from mamba.runs.unchanged import changed

START = "start"


def check_start(
    path: Path,
    num_classes: int,
    img_size: int,
    key: str = "model.checkpoint",
    new_head: bool = False,
    new_size: bool = False,
) -> None:
    """See that a run on data of so many classes and pixels can start from a checkpoint, or use it as `key` says.

    Raises:
        CheckpointError: there is none, or its model is for other data.
    """
    try:
        own = architecture_in(find_checkpoint(path))
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}", every_rank=error.every_rank) from None
    fits_classes, fits_size = new_head or own.num_classes == num_classes, new_size or own.img_size == img_size
    if not fits_classes or not fits_size:
        ways = [f"model.new_head for a head of {num_classes} classes"] if not fits_classes else []
        ways += [f"model.new_size to take it to {img_size} pixels"] if not fits_size else []
        remedy = f"; set {' and '.join(ways)}" if key == "model.checkpoint" else ""
        raise CheckpointError(
            f"{key} {path} is for {own.num_classes} classes at {own.img_size} pixels, and the data has {num_classes} "
            f"classes at {img_size} pixels{remedy}",
            every_rank=True,
        )


def check_models(config: RunConfig, data: ImageData, start: Path | None) -> list[str]:
    """See that a run may use the trained models that its config names with this data: what it starts from, and its
    teacher.

    Args:
        config: of the run, resolved.
        data: that it is going to use.
        start: what it starts from (`start_of`), or None.

    Returns:
        what the user should know although nothing is wrong, a sentence each.

    Raises:
        CheckpointError: names the key and the first difference.
    """
    own, notes = config.model, []
    for path, key, new_head, new_size in (
        (start, "model.checkpoint", own.new_head, own.new_size),
        (config.distill.teacher, "distill.teacher", False, False),
    ):
        if path is not None:
            check_start(path, len(data.classes), data.side, key, new_head, new_size)
            notes.append(check_data(path, data, key, new_head))
    return [note for note in notes if note]


def start_of(config: RunConfig, folder: Path) -> Path | None:
    """What a run in this folder starts from: its own copy, else what its config names; None: new weights. Where that is
    gone, its newest training state, which it goes on from anyway (runs of version 1 have no copy)."""
    source, own = config.model.checkpoint, folder / START
    if source is None:
        return None
    recover(own)
    if (own / DESCRIPTION).exists():
        return own
    return source if source.exists() else newest_checkpoint(folder) or source


def keep_start(config: RunConfig, folder: Path) -> None:
    """Copy what a run starts from into its folder, once; rounds of pruning have their own.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or holds values that are not finite, or the copy
            cannot be written.
    """
    source = start_of(config, folder)
    if source is None or source == folder / START or config.prune.method != "none" or newest_checkpoint(folder):
        return
    copy_checkpoint(find_checkpoint(source), folder / START)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the weights that `load_model` would take, and what else lies beside them, but for the training state.

    Raises:
        CheckpointError: as of `keep_start`.
    """
    description = read_description(source)
    weights = weights_file(description, "best")
    check_finite(read_tensors(source / weights), str(source / weights))
    partial = target.with_name(f".{target.name}.partial")
    beside = [f for f in sorted(source.glob("*.safetensors")) if f.name not in (WEIGHTS, EMA_WEIGHTS)]
    for file in beside:
        check_content(file)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, name in [(source / weights, WEIGHTS), *((f, f.name) for f in beside)]:
            shutil.copyfile(file, partial / name)
        tree = {
            **description,
            "format": FORMAT,
            "weights": "raw",
            "started_from": str(source),
            "checksums": {file.name: checksum(file) for file in sorted(partial.iterdir())},
        }
        with create(partial / DESCRIPTION) as out:
            out.write(to_json(sealed(tree), indent=1).encode())
        put_in_place(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the copy {unwritable(target, error)}") from None


def first_weights(config: RunConfig, folder: Path, num_classes: int, img_size: int) -> MambaModel:
    """New weights, or those of what the run starts from, with its widths.

    Raises:
        CheckpointError: it is missing, damaged, or for other data.
    """
    start, own = start_of(config, folder), config.model
    if start is None:
        return MambaModel(Architecture.from_config(own, num_classes, img_size))
    check_start(start, num_classes, img_size, new_head=own.new_head, new_size=own.new_size)
    model, _ = load_model(start, drop_path=own.drop_path)
    return fitted(model, num_classes, img_size, own.new_head, start)


def fitted(model: MambaModel, num_classes: int, img_size: int, new_head: bool, where: Path) -> MambaModel:
    """A model for other images and classes: learned positions interpolated over the new grid, rotary ones stretched
    (as in https://arxiv.org/abs/2010.11929), with `new_head` a head of new weights. The same model where nothing
    changes.

    Raises:
        CheckpointError: images that its patches do not fill.
    """
    old = model.architecture
    if old.img_size == img_size and not new_head:
        return model
    try:
        classes = num_classes if new_head else old.num_classes
        new = replace(old, img_size=img_size, num_classes=classes)
        if new.grid != old.grid:  # rotary positions stretch, as learned ones are interpolated
            new = replace(new, rope_grid=old.rope_grid or old.grid)
        other = MambaModel(new)
    except ValueError as error:
        raise CheckpointError(
            f"model.new_size: {where} does not go with these images: {error}", every_rank=True
        ) from None
    state = model.state_dict()
    if new_head:
        state |= {name: tensor for name, tensor in other.state_dict().items() if name.startswith("head.")}
    if "pos_embed" in state and other.architecture.grid != old.grid:
        state["pos_embed"] = resize_positions(state["pos_embed"], other.architecture.grid, old.class_token)
    load_tensors(other, state, str(where))
    return other


def described(config: RunConfig) -> RunConfig:
    """A config whose model.* says what the model is that it starts from. Where a pruned model's blocks differ, widths
    are their mean and counts their largest; each block's own are in the checkpoint's config.json.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if config.model.checkpoint is None:
        return config
    folder = find_checkpoint(config.model.checkpoint)
    a = architecture_in(folder)
    trained = read_description(folder).get("config", {})
    name = trained.get("model", {}).get("name") if isinstance(trained, dict) else None
    values: dict[str, Any] = {
        "d_model": a.d_model,
        "depth": len(a.blocks),
        "patch_size": a.patch_size,
        "stride": a.stride or a.patch_size,
        "stem": a.stem,
        "stem_layers": len(a.stem_channels or ()) + 1 if a.stem in CONV_STEMS else None,
        "head": a.head,
        "dropout": a.dropout,
        "layer_shuffle": a.layer_shuffle,
        "rope_grid": a.rope_grid,
        "class_token": a.class_token,
        "pos_embed": a.pos_embed,
        "scan_order": a.scan_order,
    }
    if name in MODEL_SIZES:
        values["name"] = name
    if a.blocks:
        values |= {
            "mixer": a.blocks[0].mixer,
            "expand": sum(b.d_inner for b in a.blocks) / len(a.blocks) / a.d_model,
            "mlp_ratio": sum(b.mlp_hidden for b in a.blocks) / len(a.blocks) / a.d_model,
            "d_state": max(b.d_state for b in a.blocks),
            "d_conv": max(b.d_conv for b in a.blocks),
        }
    # what pruning took whole has no key that could say so
    return config.with_values({f"model.{k}": v for k, v in values.items() if v is not None})


def prepare_resume(folder: Path) -> None:
    """Forget an earlier request to stop, and read the newest checkpoint as a trainer would, so that a damaged one is
    found before workers start.

    Raises:
        ConfigError: the folder cannot be written to, or its config is not what was trained with.
        CheckpointError: the file, and what is wrong with it.
    """
    forget_stop(folder)
    newest = newest_checkpoint(folder)
    if newest is None:
        return
    tree = read_description(newest).get("config")
    if isinstance(tree, dict) and (folder / CONFIG).exists():
        told = changed(read_config(folder).flat(), RunConfig.stored(tree, newest).flat(), besides=("optim.epochs",))
        if told:
            raise ConfigError(
                f"{folder / CONFIG} was changed since the run trained ({newest.name}): {told}; a run goes on as it "
                "was: undo that, or begin another with --config"
            )
    load_training_state(newest)
    load_model(newest, weights="raw")
    if (newest / EMA_WEIGHTS).exists():
        load_model(newest, weights="ema")

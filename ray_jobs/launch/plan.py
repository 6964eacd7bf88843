"""One pruning plan from the command line: applied once to a trained model, and measured before and after. With a
penalty (`penalty.kind`) the model is trained under it first, as the notes' RSST is: then comes the plan's cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from mamba.config.cli import PruneArgs
from mamba.config.counts import trains_first
from mamba.config.schema import RunConfig
from mamba.data import load_data
from mamba.data.registry import describe as describe_data
from mamba.errors import ConfigError
from mamba.runs import checkpoint as ckpt
from mamba.runs.files import write_sealed
from mamba.runs.folder import create_run, exclusive, finished_result, write_config
from mamba.runs.provenance import with_split
from mamba.runs.start import check_start
from mamba.runs.tracking import Tracker
from pruning.lite import describe
from pruning.plans import carry_out, get_plan, reads_images
from pruning.record import save_record
from pruning.report import Trained, before_after_table
from pruning.rounds import calibration_batches
from pruning.show import PICTURE, cut_picture, print_cut
from pruning.store import masks_of, of_cut, save_pruned
from ray_jobs.launch.cluster import connected_if
from ray_jobs.launch.console import Display, stop_on_signal
from ray_jobs.launch.ending import continued_by
from ray_jobs.launch.measure import compare
from ray_jobs.launch.recipe import train_on
from ray_jobs.launch.run import preflight, run


def run_plan(args: PruneArgs) -> int:
    """Cut a trained model by a plan, after training under a penalty where there is one, write it as a run, and print
    what it cost and bought; returns 0, or 130 where the training was interrupted.

    Raises:
        ForgeError: with a sentence for the user.
    """
    assert args.plan is not None
    config = args.config.resolve()
    plan = get_plan(args.plan, config.cut)
    if config.model.checkpoint is None:
        raise ConfigError("--plan prunes a trained model: give --checkpoint, a run's folder or a checkpoint's")
    config = with_split(config)
    assert config.model.checkpoint is not None
    given = config.model.checkpoint
    model, description = ckpt.load_model(given)
    classes, _ = describe_data(config.data, config.seed)
    assert config.data.img_size is not None  # resolved
    check_start(given, classes, config.data.img_size, "--checkpoint")
    preflight(config)
    repair, images = config.cut.repair, None
    if reads_images(plan, repair):
        images = calibration_batches(load_data(config.data, config.seed), config.seed)
    how: dict[str, Any] = {"calibration": images, "seed": config.seed, "repair": repair}
    pruned = carry_out(plan, model, masks=masks_of(given), **how)  # what does not fit is refused before a folder
    kept = config.with_values({"prune.method": "none", "penalty.kind": "off"})
    folder = create_run(kept)
    trained: Trained | None = None
    with exclusive(folder):
        if trains_first(config, args.given):
            start = _train_under_penalty(config, folder)
            if start is None:
                return 130
            model, description = ckpt.load_model(start, weights="raw")
            trained = _trained(config, folder)
            pruned = carry_out(plan, model, masks=masks_of(start), **how)
        description = {**of_cut(description), "plan": args.plan}
        path = save_pruned(folder / "checkpoints" / "best-00000", pruned.model, pruned.masks, description)
        assert pruned.record is not None
        save_record(folder, pruned.record)
        tracker = Tracker(folder, config, 0, 0)
        tracker.pictures({PICTURE: cut_picture(pruned.record)}, 0)
        tracker.close()
        console = Console(highlight=False, soft_wrap=True)
        with connected_if(config.scaling.num_workers != 0, lambda text: console.print(text, markup=False)):
            before, after = compare(config, [config.model.checkpoint, path])
        told = {"plan": args.plan, "before": before, "after": after}
        write_sealed(folder / "pruned.json", told | ({} if trained is None else {"trained": trained.to_dict()}))
    console.print(f"{args.plan}: {plan.purpose}", markup=False)
    console.print(
        f"before: {describe(model.architecture)}\nafter:  {describe(pruned.model.architecture)}", markup=False
    )
    print_cut(pruned.record, folder)
    console.print(before_after_table(before, after, trained))
    if trained is not None:
        console.print(trained.sentence, markup=False)
    if "test/accuracy" in before:
        console.print("no validation split: accuracies are the test set's, by which no plan should be chosen")
    console.print(f"pruned model: {path}", markup=False)
    console.print(f"fine-tune it: {train_on(folder, path, kept)}", markup=False)
    return 0


def _trained(config: RunConfig, folder: Path) -> Trained:
    result = finished_result(folder / "penalty")
    accuracy = None if result is None else result["metrics"].get("val/accuracy")
    return Trained(config.penalty.kind, config.optim.epochs, accuracy)


def _train_under_penalty(config: RunConfig, folder: Path) -> Path | None:
    """Train the model under its penalty, as a run of its own within the folder; returns the checkpoint of the last
    step, where the penalty has had its whole effect, or None where it was interrupted."""
    here = folder / "penalty"
    own = config.with_values({"prune.method": "none", "out": folder.parent, "name": folder.name, "trial": here.name})
    here.mkdir()
    write_config(here, own.resolve())
    again = f"python ray_jobs/train.py --resume {here}"
    with continued_by(again), Display(here) as display, stop_on_signal(here, display):
        result = run(own.resolve(), here, lambda text: display.say(f"{here.name}: {text}"))
    newest = ckpt.newest_checkpoint(here)
    if result["status"] != "finished" or newest is None:
        print(
            f"interrupted; continue the training with\n  {again}\nand cut its last "
            f"step, where the penalty has had its whole effect, with --plan and --checkpoint {here}/checkpoints/step-*"
        )
        return None
    return newest

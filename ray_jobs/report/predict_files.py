"""predict.py's work: from a run and images to predictions.csv, and for labelled images to a page."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from mamba.errors import ConfigError, reason
from mamba.predict.files import find_images, of_training_folder, seen_in_training
from mamba.predict.outcome import predict_found, write_predictions
from mamba.predict.predictor import load
from ray_jobs.report.predictions import show_outcome, write_outcome


def predict_files(args: Namespace) -> int:
    """Predict, write, and say what was written; returns 0. `args`: of ray_jobs/predict.py.

    Raises:
        ForgeError: with a sentence for the user.
    """
    check_options(args)
    console = Console(highlight=False, soft_wrap=True)
    predictor = load(args.run, args.weights, args.device, args.views)
    if predictor.views.count < args.views:
        raise ConfigError(
            f"--views {args.views}: training showed each image to this model in {predictor.views.count} "
            f"way{'s' * (predictor.views.count > 1)} that can be averaged; valid: 1 to {predictor.views.count}"
        )
    found = find_images(args.images, predictor.classes, args.unlabelled)
    began = time.perf_counter()
    outcome = predict_found(predictor, found, args.top, args.batch_size)
    seconds = time.perf_counter() - began
    write_predictions(args.out, outcome.lines)
    n, views = len(outcome.lines), f", {predictor.views.count} views each" if predictor.views.count > 1 else ""
    console.print(f"{n:,} images in {seconds:.1f} s on {predictor.device}{views}", markup=False)
    if outcome.confusion is not None:
        seen = seen_in_training(found, predictor.classes, predictor.description)
        note = f"these are the images that the model was trained on ({_classes(seen)})" if seen else ""
        here, held = of_training_folder(found, predictor.description)
        if not seen and 2 * here > held:
            note = (
                f"{here} of the {held} images that the model was validated on are among these, so this is the folder "
                "that it was trained on, changed since"
            )
        show_outcome(console, outcome.confusion)
        if note:
            console.print(f"note: {note}: on others it is right less often", markup=False)
        about = {"model": str(args.run), "images from": " ".join(map(str, args.images)), "note": note}
        console.print(f"page: {write_outcome(args.out, outcome, about)}", markup=False)
    elif n <= 5:
        for line in outcome.lines:
            console.print(
                f"{line['image']}: {line['class_1']} ({100 * float(line['probability_1']):.1f} %)", markup=False
            )
    console.print(f"table: {args.out}", markup=False)
    return 0


def check_options(args: Namespace) -> None:
    """Raises ConfigError for numbers out of bounds, and for a table that cannot be written, before anything is read."""
    for name, low, high in (("top", 1, 1000), ("batch_size", 1, 100_000), ("views", 1, 10)):
        value = getattr(args, name)
        if not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: valid are {low} to {high:,}")
    out: Path = args.out
    if out.suffix in (".html", ".json") or out.is_dir():
        raise ConfigError(f"--out {out}: give a .csv file; the page of labelled images lies beside it")
    for own in (out, out.with_suffix(".json"), out.with_suffix(".html")):
        if own.is_file() and not _ours(own):
            raise ConfigError(f"--out {out}: {own} is there and is none of predict.py's; choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made ({reason(error)})") from None


def _ours(path: Path) -> bool:
    """Whether a file is what an earlier call left, which a new one replaces."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    marks = {".json": b'"images from"', ".html": b"Predictions of"}
    return not start or (marks[path.suffix] in start if path.suffix in marks else start.startswith(b"image,"))


def _classes(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"class{'es' if len(names) > 1 else ''} {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"

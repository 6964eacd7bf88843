"""A model to cut, where none is given: trained first, in the experiment's own folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mamba.config.schema import RunConfig
from mamba.errors import ConfigError
from mamba.runs.folder import CONFIG, finished_result, read_config, write_config
from mamba.runs.start import prepare_resume
from mamba.runs.unchanged import differs
from ray_jobs.launch.console import Display, stop_on_signal
from ray_jobs.launch.ending import continued_by
from ray_jobs.launch.run import preflight, run


def trained_baseline(config: RunConfig, folder: Path) -> Path:
    """Train a model with the config given, or continue it if it was begun, and return its folder.

    Raises:
        ConfigError: it was interrupted, or begun with another config.
    """
    own = config.with_values({"out": folder.parent, "name": folder.name, "trial": "baseline"}).resolve()
    here = folder / "baseline"
    if (here / CONFIG).exists():
        begun, asked = read_config(here).flat(), own.flat()
        if key := differs(begun, asked, ("out", "scaling", "tracking")):
            raise ConfigError(
                f"{here} was trained with {key} {begun[key]}, and {asked[key]} is asked for: choose "
                f"another --name, or give --checkpoint {here}"
            )
    if finished_result(here) is None:
        preflight(own)
        here.mkdir(parents=True, exist_ok=True)
        write_config(here, own)
        prepare_resume(here)
        again = f"python {shlex.join(sys.argv)}"
        with continued_by(again), Display(here) as display, stop_on_signal(here, display):
            display.say(f"no --checkpoint: training a baseline in {here}")
            result = run(own, here, display.say)
        if result["status"] != "finished":
            raise ConfigError(f"the baseline's training was interrupted; the same command continues it in {here}")
    return here

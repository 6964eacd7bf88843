"""Operators that compute what they should and whose speed nobody has measured yet: off unless the environment names
them.

    MAMBA_FORGE_CANDIDATES=mixer,mlp python benchmarks/train_step.py --batches 1024 128

mixer: `mamba.ops.mixer`; mlp: `mamba.ops.mlp`. A candidate that was measured becomes the way on a GPU, or goes.
"""

from __future__ import annotations

import os

from mamba.errors import ConfigError

VARIABLE = "MAMBA_FORGE_CANDIDATES"
NAMES = ("mixer", "mlp")


def named(value: str) -> set[str]:
    """The candidates of the variable's value, names with commas between.

    Raises:
        ConfigError: one of them is unknown.
    """
    wanted = {name for name in value.replace(" ", "").split(",") if name}
    if wanted - set(NAMES):
        raise ConfigError(f"{VARIABLE}: unknown '{min(wanted - set(NAMES))}'; valid: {', '.join(NAMES)}")
    return wanted


ON = named(os.environ.get(VARIABLE, ""))
"""Those that this process uses on a GPU."""

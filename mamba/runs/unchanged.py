"""Whether a config says what its run was trained with: config.yaml is a file, and may have been edited since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

ELSEWHERE = frozenset(
    {
        *("out", "name", "trial", "scaling", "tracking", "checkpoint"),
        *("data.root", "data.cache", "data.split_from", "model.checkpoint", "distill.teacher"),
        *("data.device", "data.loader_workers", "data.prefetch_factor", "eval.batch_size"),
        *("optim.compile", "optim.cuda_graph", "optim.max_skipped"),
    }
)
"""Keys, and groups of keys, that say where a run is and how it is computed, and not what."""


def changed(says: Mapping[str, Any], trained: Mapping[str, Any], besides: tuple[str, ...] = ()) -> str | None:
    """The first key in which a config differs from what was trained with, as half a sentence; None: in none.

    Args:
        says: dotted key -> value, of the config.
        trained: likewise, as a checkpoint, a result or a series keeps it; what it does not have is not compared.
        besides: keys that may differ too.
    """
    key = differs(says, trained, {*ELSEWHERE, *besides})
    return None if key is None else f"it says {key} {says[key]}, and it was {trained[key]}"


def differs(says: Mapping[str, Any], trained: Mapping[str, Any], free: Collection[str]) -> str | None:
    """The first key of what was trained with that a config gives another value; None: there is none.

    Args:
        says, trained: as in `changed`.
        free: keys, and groups of keys, that may differ.
    """
    for key, value in trained.items():
        if key not in free and key.partition(".")[0] not in free and key in says and says[key] != value:
            return key
    return None

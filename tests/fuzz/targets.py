"""Every target by its name."""

from __future__ import annotations

from tests.fuzz import Target, spaces

TARGETS: dict[str, Target] = {"spaces": spaces.TARGET}

"""Every target by its name."""

from __future__ import annotations

from tests.fuzz import Target, damage, images, spaces

TARGETS: dict[str, Target] = {"spaces": spaces.TARGET, "images": images.TARGET, "damage": damage.TARGET}

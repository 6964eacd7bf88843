"""YAML files as plain trees, read so that no file can hang, expand or surprise: bounded, without aliases, keys once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mamba.errors import ConfigError, reason

LARGEST = 256 * 1024
"""Bytes of a file that is read; a run's config has 5,000."""


class _Loader(yaml.SafeLoader):
    """Plain values only. An alias repeats what its anchor holds: ten of them in ten lines are ten billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: merge keys (<<) are not read")
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {name} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """The tree that a YAML file holds.

    Args:
        path: of the file.
        what: a user would call it, for the error.

    Raises:
        ConfigError: the file is missing, unreadable, too large, or no YAML; or it repeats a key or holds an alias.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ConfigError(f"{path} cannot be read as {what}: it is larger than {LARGEST // 1024} KiB")
        return yaml.load(data.decode(), _Loader)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as {what}: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = reason(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(f"{path} cannot be read as {what}: {why}") from None

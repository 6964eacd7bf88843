"""YAML files as plain trees, read so that no file can hang, expand or surprise: bounded, without aliases, keys once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mamba.errors import ConfigError, reason

LARGEST = 256 * 1024
"""Bytes of a file that is read; a run's config has 5,000."""
DEEPEST = 50
"""Mappings and lists within each other that are read; a search space has 5."""
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


class _Loader(_Base):
    """Plain values only, each key once."""

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

    def construct_number(self, node: Any) -> Any:
        """YAML 1.1 reads 1:30 as 90, 010 as 8 and 1_0 as 10."""
        if not _NUMBER.fullmatch(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.value} is no decimal number; write it as one")
        if node.tag.endswith(":int"):
            return int(node.value)
        return float(re.sub(r"\.(?=[a-z])", "", node.value.lower()))  # .inf and .nan are YAML's


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
_FLOAT = r"([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_NUMBER = re.compile(rf"[-+]?(0|[1-9][0-9]*|{_FLOAT})")


def _check(text: str) -> None:
    """Raises YAMLError where a text is nested too deeply or holds an alias, which repeats what its anchor holds: ten of
    them in ten lines are ten billion values."""
    depth = 0
    for event in yaml.parse(text, _Base):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"{_line(event)}: aliases (*{event.anchor}) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"{_line(event)}: it is nested too deeply")


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark else "its text"


def to_yaml(tree: Any) -> str:
    """A tree of plain values as YAML, its keys in their order."""
    return str(yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False))


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
        text = data.decode()
        _check(text)
        return yaml.load(text, _Loader)
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = reason(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(f"{path} cannot be read as {what}: {why}") from None

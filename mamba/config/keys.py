"""Values addressed by dotted keys: looked up, replaced, flattened; an error about one of them is one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mamba.errors import ConfigError


class Group(BaseModel):
    """Keys that belong together. Frozen, complete, finite; a bad value is a ConfigError with dotted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error, type(self))) from None


RETIRED: dict[str, str | None] = {
    **{
        f"prune.{name}": f"cut.{name}"
        for name in (
            *("linear_out", "mlp", "linear_gate", "linear_in", "conv1d", "linear_B_C", "linear_delta", "block"),
            *("layer", "structured", "criterion", "scope", "finetune_epochs"),
        )
    },
    "prune.penalty": "penalty.kind",
    "prune.penalty_strength": "penalty.strength",
}
"""Keys of earlier versions: what each is called now; None: it is left out. What was stored is read by this table."""

SHARED = {"prune.penalty": {"prune.target": "penalty.target", "prune.exponent": "penalty.exponent"}}
"""Of a retired key: keys that counted for it too, and where they went besides staying."""

_said: set[str] = set()


def current(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Dotted keys and their values, by the names of today; says once in a process that it translated.

    Raises:
        ConfigError: a key stands there by its old and by its new name; `where` says where.
    """
    old = [key for key in values if key in RETIRED]
    found = {RETIRED.get(key, key): value for key, value in values.items()}
    for key in old:
        if RETIRED[key] in values:
            raise ConfigError(f"{where}: {key} is called {RETIRED[key]} now, and both are given; leave one out")
        for source, target in SHARED.get(key, {}).items():
            if source in values:
                found.setdefault(target, values[source])
    if old and not _said.intersection(old):
        more = f" (and {len(old) - 1} more keys)" if len(old) > 1 else ""
        fate = f"read as {RETIRED[old[0]]}" if RETIRED[old[0]] else "left out"
        print(f"note: {where} is of an earlier version: {old[0]} is {fate}{more}", file=sys.stderr)
        _said.update(RETIRED)
    return {key: value for key, value in found.items() if key is not None}


class Keyed(Group):
    """A group of groups, whose values have dotted keys: `optim.lr`, or `seed`."""

    @classmethod
    def stored(cls, tree: object, where: object) -> Self:
        """A config that was stored, perhaps by an earlier version; `where` is said in errors.

        Raises:
            ConfigError: no mapping of keys, an unknown key, or a bad value.
        """
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ConfigError(f"{where} does not hold a run config (a mapping of keys)")
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
        now: dict[str, Any] = {}
        for key, value in current(flat, where).items():
            group, _, leaf = key.partition(".")
            if leaf:
                now.setdefault(group, {})[leaf] = value
            else:
                now[key] = value
        return cls(**now)

    def with_values(self, values: dict[str, Any]) -> Self:
        """A copy with the given dotted keys replaced, checked like everything else.

        Raises:
            ConfigError: an unknown key, a wrong type, a value out of bounds.
        """
        tree = self.model_dump()
        known = dotted_keys()
        for key, value in values.items():
            if key not in known:
                raise unknown_key(key)
            *groups, leaf = key.split(".")
            node = tree
            for group in groups:
                node = node[group]
            node[leaf] = value
        return type(self)(**tree)

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, in order of declaration; paths as text."""
        tree = self.model_dump(mode="json")
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
        return flat

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read what `to_yaml` wrote.

        Raises:
            ConfigError: the file is missing or unreadable, or holds an unknown key or a bad value.
        """
        try:
            tree = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as a run config: {' '.join(str(error).split())}") from None
        return cls.stored(tree, path)


def dotted_keys() -> dict[str, type[Group]]:
    """Every dotted key of a run config, with the group that owns it."""
    from mamba.config.schema import RunConfig  # which is made of this module's groups

    keys: dict[str, type[Group]] = {}
    for name, field in RunConfig.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, Group):
            keys |= {f"{name}.{leaf}": group for leaf in group.model_fields}
        else:
            keys[name] = RunConfig
    return keys


def may_be_none(key: str) -> bool:
    """Whether a dotted key takes None."""
    field = dotted_keys()[key].model_fields[key.rpartition(".")[2]]
    return type(None) in getattr(field.annotation, "__args__", ())


def unknown_key(key: str) -> ConfigError:
    """The error for a key that is none: its new name, its group's keys, or the groups where there is no such group."""
    if key in RETIRED:
        return ConfigError(f"unknown key '{key}': " + (f"it is {RETIRED[key]} now" if RETIRED[key] else "retired"))
    known = dotted_keys()
    group = key.split(".")[0]
    siblings = [k for k in known if k.startswith(group + ".")]
    if siblings:
        return ConfigError(f"unknown key '{key}'; valid in {group}: {', '.join(siblings)}")
    groups = sorted({k.split(".")[0] + ".*" for k in known if "." in k})
    plain = [k for k in known if "." not in k]
    return ConfigError(f"unknown key '{key}'; valid: {', '.join(plain + groups)}")


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """All findings of one validation as a sentence, with dotted keys and without pydantic's own vocabulary."""
    from mamba.config.schema import RunConfig

    group = next((k for k, f in RunConfig.model_fields.items() if f.annotation is model), None)
    findings: dict[str, str] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # raised by a nested group, already complete
            findings[str(inner)] = str(inner)
            continue
        # a union's location ends in the name of the member that was tried
        path = [str(p) for p in item["loc"] if not re.fullmatch(r"int|float|none|str|bool|literal\[.*\]", str(p))]
        key = ".".join(([group] if group else []) + path)
        if item["type"] == "extra_forbidden":
            findings[key] = str(unknown_key(key))
        elif item["type"] == "literal_error" and item["loc"][-1] != path[-1]:  # the other member is a boolean
            findings[key] = f"{key}: {_lower_first(item['msg'])}, True or False, got {item['input']!r}"
        else:
            findings.setdefault(key, f"{key}: {_lower_first(item['msg'])}, got {item['input']!r}")
    return "; ".join(findings.values())


def _lower_first(text: str) -> str:
    text = text.removeprefix("Input ")
    return text[:1].lower() + text[1:]

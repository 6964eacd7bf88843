"""Values addressed by dotted keys: looked up, replaced, flattened; an error about one of them is one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Any, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from mamba.config.choices import added, load_plugins, words_of
from mamba.config.files import read_yaml, to_yaml
from mamba.config.versions import check_format
from mamba.errors import ConfigError


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))


class Group(BaseModel):
    """Keys that belong together. Frozen, complete, finite; a bad value is a ConfigError with dotted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error, type(self))) from None

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_added(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """A word that was added from outside is as good as one that is listed."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"{value} is no number and no word")  # pydantic would take True for 1
        try:
            return check(value)
        except ValidationError:
            if isinstance(value, str) and value in added(_key(cls, info.field_name or "")):
                return value
            raise

    def model_dump(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As pydantic's, which would warn of words that were added from outside."""
        return super().model_dump(*args, **{"warnings": False, **kwargs})


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


ROOT: list[type[Keyed]] = []
"""The run config, `mamba.config.schema.RunConfig`, whose keys this module knows by name; it enters itself."""


class Keyed(Group):
    """A group of groups, whose values have dotted keys: `optim.lr`, or `seed`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ROOT.append(cls)

    def __init__(self, **values: Any) -> None:
        load_plugins()
        super().__init__(**values)

    @classmethod
    def stored(cls, tree: object, where: object) -> Self:
        """A config that was stored, perhaps by an earlier version; `where` is said in errors.

        Raises:
            ConfigError: no mapping of keys, an unknown key, or a bad value.
        """
        return cls().with_values(stored_values(tree, where))

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
        return to_yaml(self.model_dump(mode="json"))

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read what `to_yaml` wrote.

        Raises:
            ConfigError: the file is missing or unreadable, or holds an unknown key or a bad value.
        """
        return cls.stored(read_yaml(path, "a run config"), path)


def stored_values(tree: object, where: object) -> dict[str, Any]:
    """Dotted keys and values of a tree that was stored, whole or in part, perhaps by an earlier version.

    Raises:
        ConfigError: no mapping of keys, or one of them twice; `where` says where.
    """
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{where} does not hold a run config (a mapping of keys)")
    check_format(tree, where)
    tree = {key: value for key, value in tree.items() if key != "format"}
    flat: dict[str, Any] = {}
    groups = {key.partition(".")[0] for key in dotted_keys() if "." in key}
    for key, value in tree.items():
        if key in groups and not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} holds {_brief(value)}; valid: keys of {key}.* and their values")
        found = {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
        for dotted, inner in found.items():
            if dotted in flat:
                raise ConfigError(f"{where}: {dotted} is given twice")
            flat[dotted] = inner
    return current(flat, where)


@cache
def dotted_keys() -> Mapping[str, type[Group]]:
    """Every dotted key of a run config, with the group that owns it."""
    root = ROOT[0]
    keys: dict[str, type[Group]] = {}
    for name, field in root.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, Group):
            keys |= {f"{name}.{leaf}": group for leaf in group.model_fields}
        else:
            keys[name] = root
    return MappingProxyType(keys)


def may_be_none(key: str) -> bool:
    """Whether a dotted key takes None."""
    return type(None) in get_args(_annotation(key))


def choices(key: str) -> tuple[str, ...]:
    """The words that a dotted key takes, those that were added from outside included; () where it takes others."""
    return words_of(_annotation(key)) + added(key)


def _annotation(key: str) -> Any:
    return dotted_keys()[key].model_fields[key.rpartition(".")[2]].annotation


def _key(group: type[BaseModel], leaf: str) -> str:
    """The dotted key of a group's field."""
    names = [name for name, field in ROOT[0].model_fields.items() if field.annotation is group]
    return ".".join([*names, leaf])


def unknown_key(key: str) -> ConfigError:
    """The error for a key that is none: its new name, its group's keys, or the groups where there is no such group."""
    if key in RETIRED:
        return ConfigError(f"unknown key '{key}': " + (f"it is {RETIRED[key]} now" if RETIRED[key] else "retired"))
    known = dotted_keys()
    group = key.split(".")[0]
    siblings = [k for k in known if k.startswith(group + ".")]
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]] or get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if siblings:
        return ConfigError(f"unknown key '{key}'; valid in {group}: {', '.join(siblings)}{hint}")
    groups = sorted({k.split(".")[0] + ".*" for k in known if "." in k})
    plain = [k for k in known if "." not in k]
    return ConfigError(f"unknown key '{key}'; valid: {', '.join(plain + groups)}{hint}")


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """All findings of one validation as a sentence, with dotted keys and without pydantic's own vocabulary."""
    findings: dict[str, str] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # raised by a nested group, already complete
            findings[str(inner)] = str(inner)
            continue
        # a union's location ends in the name of the member that was tried
        path = [str(p) for p in item["loc"] if not re.fullmatch(r"int|float|none|str|bool|literal\[.*\]", str(p))]
        key = _key(model, ".".join(path))
        says, got = _lower_first(item["msg"]), _brief(item["input"])
        if item["type"] == "extra_forbidden":
            findings[key] = str(unknown_key(key))
        elif item["type"] == "literal_error" and item["loc"][-1] != path[-1]:  # the other member is a boolean
            findings[key] = f"{key}: {says}, True or False, got {got}"
        elif item["type"] == "literal_error":
            more = "".join(f", or '{word}'" for word in added(key))
            findings.setdefault(key, f"{key}: {says}{more}, got {got}")
        elif item["type"] == "string_pattern_mismatch":  # of names, which become folders
            says = "should be of letters, digits, '.', '_' and '-', the first a letter or a digit"
            findings[key] = f"{key}: {says}, got {got}"
        else:
            findings.setdefault(key, f"{key}: {says}, got {got}")
    told = list(findings.values())
    return "; ".join(told if len(told) < 5 else [*told[:3], f"and {len(told) - 3} more"])


def _brief(value: object) -> str:
    """A value as it is written, cut where it is long."""
    short = Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def _lower_first(text: str) -> str:
    text = text.removeprefix("Input ")
    return text[:1].lower() + text[1:]

"""Help pages and shell completion, which tyro writes from the config's own types and descriptions."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from operator import attrgetter
from typing import Annotated, Any, NoReturn

import tyro

from mamba.config.keys import dotted_keys
from mamba.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


First = Mapping[str, Sequence[str]]


def show_help(kind: type, args: Any, prog: str, description: str, first: First | None) -> NoReturn:
    """Print the help page of a command and exit.

    Args:
        kind: a dataclass, whose field `config` is the run's config.
        args: one of it, whose values are shown as the defaults.
        prog: what the command is called.
        description: of the command.
        first: heading -> dotted keys that are shown; None: all of them.
    """
    last = "Every key: --help-all." if first else "The keys that people use first: --help."
    last += f' Completed by the shell: eval "$({installed(prog)} --completion bash)" (or zsh, fish).'
    if first is not None:
        kind, args = _shortened(kind, args, first)
    page = io.BytesIO()
    text = io.TextIOWrapper(page, encoding=sys.stdout.encoding or "utf-8", errors="replace")
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit), warnings.catch_warnings(action="ignore"):
        tyro.cli(kind, args=["--help"], default=args, prog=prog, description=description)
    text.flush()
    with quiet_pipe():
        print(f"{page.getvalue().decode(text.encoding).rstrip()}\n\n{last}")
    sys.exit(0)


def show_completion(kind: type, args: Any, prog: str, shell: str) -> NoReturn:
    """Print the script with which a shell completes the installed command, its keys and their choices, and exit.

    Raises:
        ConfigError: no shell that it is written for.
    """
    if shell not in SHELLS:
        raise ConfigError(f"--completion {shell[:80]}: there is none for it; valid: {', '.join(SHELLS)}")
    with quiet_pipe():
        tyro.cli(kind, args=["--tyro-print-completion", shell], default=args, prog=installed(prog))
    sys.exit(0)


def installed(prog: str) -> str:
    """The command that is installed for a script: a shell completes commands, and `python script` is none."""
    return f"mamba-{prog.removesuffix('.py')}" if prog.endswith(".py") else prog


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """What is printed inside ends quietly where its reader (`head`, `less`) has had enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit has to go somewhere


def _shortened(kind: type, args: Any, first: First) -> tuple[type, Any]:
    """A command's dataclass, and one of it, with a few keys under headings in place of the whole config."""
    known = dotted_keys()
    groups: list[tuple[str, Any, Any]] = []
    for heading, keys in first.items():
        members: list[tuple[str, Any, Any]] = []
        for key in keys:
            about = known[key].model_fields[key.rpartition(".")[2]]
            text = " ".join((about.description or "").split()).partition(". ")[0].rstrip(".") + "."
            named = tyro.conf.arg(name=key.replace("_", "-"), prefix_name=False, help=text)
            value = attrgetter(key)(args.config)
            members.append((key.replace(".", "_"), Annotated[about.annotation, named], field(default=value)))
        group = make_dataclass(heading.title(), members)
        group.__doc__ = ""
        groups.append((heading, group, field(default_factory=group)))
    config = make_dataclass("Keys", groups)
    config.__doc__ = ""
    shown: Any = Annotated[config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    short = make_dataclass(kind.__name__, [("config", shown)], bases=(kind,), frozen=True)
    own = {name: getattr(args, name) for name in kind.__dataclass_fields__ if name != "config"}  # type: ignore[attr-defined]
    return short, short(config=config(), **own)

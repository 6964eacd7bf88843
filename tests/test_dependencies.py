"""The order of the rooms: what stands higher knows what stands lower, never back; and what every room keeps to."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("mamba", "pruning", "ray_jobs")
ORDER = (
    ("mamba.errors", "mamba.cache"),
    ("mamba.config", "mamba.ops"),
    ("mamba.models",),
    ("mamba.data",),
    ("mamba.runs",),
    ("mamba.train",),
    ("mamba.predict",),
    ("mamba",),  # its __init__ alone: the public names
    ("pruning",),
    ("ray_jobs.launch",),
    ("ray_jobs.sweep",),
    ("ray_jobs.report",),
    ("ray_jobs",),  # the commands
)
"""From the lowest to the highest; rooms of one line do not know each other."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LONGEST = 500
"""Lines of a file."""
LONGER = {"mamba/ops/scan/triton.py"}
ONLY_COMMANDS_KNOW = {"ray", "optuna"}
FILES = sorted(file for top in OURS for file in (ROOT / top).rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Every module, or name of one, that a file imports: inside functions and for type checkers too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                found.append(str(node.args[0].value))
    return tuple(dict.fromkeys(found))


def room_of(module: str) -> str | None:
    """The room that a module of ours is in."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVEL), None)


def arrows(file: Path) -> Iterator[str]:
    """The imports of a file that point up, or to a neighbour's room."""
    own = room_of(name_of(file))
    assert own is not None, f"{file} is in no room of ORDER"
    for module in imports(file):
        other = room_of(module)
        # `from mamba import x` is of x's room, if it is one, which is listed besides
        if other is None or other == own or module in OURS:
            continue
        if LEVEL[other] >= LEVEL[own]:
            yield f"{name_of(file)} -> {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    assert not list(arrows(file))


def circle(known: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that need each other, the first as the last; [] where there is no circle."""
    done: set[str] = set()

    def found(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(known.get(module, ())):
            if loop := found(other, [*way, module]):
                return loop
        done.add(module)
        return []

    return next((loop for module in known if (loop := found(module, []))), [])


def needed(file: Path, modules: Collection[str]) -> set[str]:
    """The modules of ours that a file needs when it runs, inside of functions too; not those that only types name."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(modules) or {node.module}
    return found & set(modules)


def test_no_two_files_need_each_other():
    modules = {name_of(file): file for file in FILES}
    assert not circle({name: needed(file, modules) for name, file in modules.items()})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_order_names_every_room():
    rooms = {name_of(p.parent) for p in FILES if p.name == "__init__.py"}
    top = {room for room in rooms if room.count(".") == 1} - {room for room in rooms if room.startswith("pruning.")}
    assert top | {"mamba", "pruning", "ray_jobs"} <= set(LEVEL)


def test_the_rule_looks_at_something(monkeypatch, tmp_path):
    """Each kind of import that would break the order is seen."""
    assert len(FILES) > 70 and "ray" in imports(ROOT / "ray_jobs" / "launch" / "cluster.py")
    folder = tmp_path / "mamba" / "config"
    folder.mkdir(parents=True)
    for number, line in enumerate(
        [
            "import mamba.runs.checkpoint",
            "from mamba.runs import checkpoint",
            "from mamba import runs",
            "from mamba.ops.scan import selective_scan",
            "def f():\n    from pruning.cut import cut",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ray_jobs.launch import run",
            "import importlib\nimportlib.import_module('mamba.models.model')",
        ]
    ):
        file = folder / f"toy{number}.py"
        file.write_text(line)
        monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
        assert list(arrows(file)), line
    fine = folder / "fine.py"
    fine.write_text("import json\nfrom mamba.errors import ForgeError\nfrom mamba.config.keys import current")
    assert not list(arrows(fine))


def test_only_ray_jobs_knows_ray_and_optuna():
    for file in FILES:
        if file.relative_to(ROOT).parts[0] != "ray_jobs":
            assert not {module.split(".")[0] for module in imports(file)} & ONLY_COMMANDS_KNOW, file


def test_no_package_knows_tests_or_benchmarks():
    for file in FILES:
        assert not {module.split(".")[0] for module in imports(file)} & {"tests", "benchmarks"}, file


def test_config_and_errors_know_nothing_heavy():
    """Not even inside of functions: a help page, or an error, comes at once."""
    for file in FILES:
        if room_of(name_of(file)) in ("mamba.config", "mamba.errors"):
            outside = {module.split(".")[0] for module in imports(file)} - {"mamba", *sys.stdlib_module_names}
            assert outside <= {"pydantic", "yaml", "tyro"}, file


def test_commands_wire():
    """At the root of ray_jobs lie commands alone, short ones, none of which is made of another."""
    for file in (ROOT / "ray_jobs").glob("*.py"):
        if file.name != "__init__.py":
            text = file.read_text()
            assert len(text.splitlines()) < 100, file
            assert not [module for module in imports(file) if room_of(module) == "ray_jobs" and module != "ray_jobs"]
            assert "def main(argv: Sequence[str] | None = None) -> int:" in text and "sys.exit(main())" in text, file


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_a_file_is_read_in_one_sitting():
    long = {str(f.relative_to(ROOT)) for f in FILES if lines(f) > LONGEST}
    assert long <= LONGER


def test_sweeps_start_without_what_only_compiling_needs():
    """torch._dynamo takes more than a second to import, in the driver and in every process of a sweep."""
    code = "import sys, ray_jobs.report.outcome, ray_jobs.sweep.trial; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

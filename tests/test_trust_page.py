"""docs/TRUST.md names tests and files that there are."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "TRUST.md"
NAMED = re.compile(r"(tests/[\w/.-]+\.py)((?:::\w+)*)(\[)?")


@cache
def names_in(source: str) -> set[str]:
    """The names that pytest collects from a file, parametrised ones once: `test_x`, `TestY`, `TestY::test_x`."""

    def of(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                found.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                found |= {prefix + node.name} | of(node.body, f"{prefix}{node.name}::")
        return found

    return of(ast.parse(source).body, "")


def missing(text: str) -> list[str]:
    """What of a text's `tests/...py::name` is no test, or is spelled so that this would not notice."""
    gone = []
    for file, names, case in NAMED.findall(text):
        path = ROOT / file
        name = names.removeprefix("::")
        if not path.is_file() or (name and name not in names_in(path.read_text())) or case:
            gone.append(f"{file}{names}{case}")
    return gone


def test_every_test_of_the_page_is_there():
    text = PAGE.read_text()
    assert len(NAMED.findall(text)) > 80 and missing(text) == []
    assert text.count("::test_") == sum("::test_" in names for _, names, _ in NAMED.findall(text)), (
        "names without a file"
    )


def test_every_row_of_a_table_names_its_test():
    for line in PAGE.read_text().splitlines():
        head = line.startswith("|---") or line.rstrip(" |").endswith("Test")
        assert not line.startswith("|") or head or "::test_" in line, line


def test_every_link_of_the_page_resolves():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGE.read_text())]
    inside = [link for link in links if link and "://" not in link]
    assert inside and [link for link in inside if not (PAGE.parent / link).exists()] == []


def test_the_page_is_one_page():
    assert len(PAGE.read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "named, gone",
    [
        ("tests/test_trust_page.py::test_the_page_is_one_page", False),
        ("tests/test_trust_page.py", False),
        ("tests/test_trust_page.py::test_nothing", True),
        ("tests/test_trust_page.py::missing", True),
        ("tests/nowhere.py::test_x", True),
        ("tests/nowhere.py", True),
    ],
)
def test_what_is_gone_is_noticed(named, gone):
    assert missing(f"| x | `{named}`, y |") == ([named] if gone else [])


def test_they_are_found_in_classes_too():
    source = "@mark\ndef test_a(): ...\ndef helper(): ...\nclass TestB:\n    async def test_c(self): ...\n"
    assert names_in(source) == {"test_a", "TestB", "TestB::test_c"}

"""docs/SEEDS.md names tests, files, keys and commands that there are, and its counts are right."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pkgutil import resolve_name

import pytest
import torch

import mamba
import pruning
from benchmarks.registry import BENCHMARKS
from mamba.config.keys import dotted_keys
from mamba.config.presets import PRESETS
from mamba.models.model import MambaModel, count_parameters, mamba_small
from pruning.components import COMPONENTS, covered
from ray_jobs.ablate import GRIDS
from tests.test_trust_page import NAMED, ROOT, missing

PAGE = ROOT / "docs" / "SEEDS.md"
TEXT = PAGE.read_text()
CODE = re.findall(r"`([^`\n]+)`", TEXT)
ROWS = [[cell.strip() for cell in line.split(" | ")] for line in TEXT.splitlines() if re.match(r"\| \d\.\d+ \|", line)]
VERDICTS = ("works", "better", "partly", "differs", "missing")
WHOLE = 16_488_394
"""Parameters of mamba_small."""


def test_every_test_of_the_page_is_there():
    assert len(NAMED.findall(TEXT)) > 200 and missing(TEXT) == []
    assert TEXT.count("::test_") == sum("::test_" in names for _, names, _ in NAMED.findall(TEXT))


def test_every_row_has_a_place_and_a_verdict():
    assert len(ROWS) >= 240 and all(len(row) == 5 for row in ROWS)
    assert [row for row in ROWS if row[4].removesuffix(" |").split(";")[0] not in VERDICTS] == []
    told = [row for row in ROWS if row[4].startswith(("works", "better"))]
    assert [row for row in told if "`" not in row[2] + row[3] and ";" not in row[4]] == [], "shown by nothing"


def test_the_verdicts_are_counted():
    table = {line.split(" | ")[0].strip("| "): line for line in TEXT.splitlines() if re.match(r"\| (\d\. |all )", line)}
    for number in range(1, 6):
        mine = [row[4].removesuffix(" |").split(";")[0] for row in ROWS if row[0].startswith(f"| {number}.")]
        (line,) = (line for name, line in table.items() if name.startswith(f"{number}. "))
        assert [int(n) for n in re.findall(r"\| (\d+)", line)[-6:]] == [len(mine), *map(mine.count, VERDICTS)]
    whole = [row[4].removesuffix(" |").split(";")[0] for row in ROWS]
    assert [int(n) for n in re.findall(r"\| (\d+)", table["all"])] == [len(whole), *map(whole.count, VERDICTS)]


def test_files_and_folders_are_there():
    named = [re.sub(r"::.*", "", word) for code in CODE for word in code.split()]
    paths = [w for w in named if re.fullmatch(r"(?:[\w-]+/)+[\w.-]+", w)]
    assert len(paths) > 100 and [p for p in paths if not (ROOT / p).exists()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXT)]
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
    assert not re.search(r"/work|/home|\.\./shared", TEXT)


def test_keys_names_and_targets_are_there():
    keys = set(dotted_keys())
    groups = {key.partition(".")[0] for key in keys if "." in key}
    for code in CODE:
        for word in re.findall(r"(?<![\w/.-])(?:--)?([a-z]+\.[a-z][\w-]*)", code):
            group, _, name = word.partition(".")
            if group in groups:
                assert f"{group}.{name.replace('-', '_')}" in keys, code
            elif group in ("mamba", "pruning") and not code.endswith(".py"):
                assert resolve_name(code), code
        if re.fullmatch(r"\w+:\w+", code):
            component, _, granularity = code.partition(":")
            assert granularity in COMPONENTS[component].granularities, code


def test_commands_are_there():
    for code in CODE:
        for flag, known in (
            ("--preset", PRESETS),
            ("--plan", pruning.PLANS),
            ("--grid", GRIDS),
            ("--space", {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")}),
        ):
            for name in re.findall(rf"{flag} (\w+)", code):
                assert name in known, code
        for name in re.findall(r"benchmarks/run\.py (\w+)", code):
            assert name in BENCHMARKS, code
        for script in re.findall(r"python (\S+\.py)", code):
            assert (ROOT / script).exists(), code
    for words, known in ((r"presets? `(\w+)`", PRESETS), (r"plans? `(\w+)`", pruning.PLANS)):
        named = re.findall(words, TEXT)
        assert named and set(named) <= set(known)


# --- what the documents say wrongly, counted -------------------------------------------------------------------------


@cache
def dense(**shape: int) -> MambaModel:
    """mamba_small, or one of these widths, without values: only its sizes are read."""
    with torch.device("meta"):
        whole = mamba_small()
        own = whole.architecture
        return MambaModel(replace(own, blocks=tuple(replace(b, **shape) for b in own.blocks))) if shape else whole


def gone(**shape: int) -> tuple[float, float]:
    """Percent of the parameters and of the multiply-accumulates that go with widths of all blocks (that cuts leave
    these is tests/pruning's)."""
    smaller = dense(**shape)
    macs = smaller.architecture.macs() / dense().architecture.macs()
    return 100 * (1 - count_parameters(smaller) / WHOLE), 100 * (1 - macs)


def share(component: str) -> float:
    return 100 * sum(p[rows].numel() for _, p, rows in covered(dense(), component)) / WHOLE


def said(row: str) -> list[float]:
    """The figures of the last column of a row of the table of wrong statements."""
    (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| {row} |"))
    return [float(n) for n in re.findall(r"(\d+\.\d+) %", line.split(" | ")[2])]


@pytest.mark.parametrize(
    "row, component",
    [
        ("share of out_proj", "linear_out"),
        ("share of the MLP", "mlp"),
        ("share of the gate", "linear_gate"),
        ("share of the input projection", "linear_in"),
        ("share of the convolution", "conv1d"),
        ("share of B and C", "linear_B_C"),
        ("share of delta", "linear_delta"),
    ],
)
def test_shares_of_the_parameters(row, component):
    assert said(row)[0] == round(share(component), 1)


def test_shares_that_the_documents_give_wrongly():
    neurons, channels = 768 - round(0.7 * 768), 384 - round(0.7 * 384)
    assert said("70 % of the neurons") == [round(x, 1) for x in gone(mlp_hidden=neurons)] == [30.1, 29.6]
    both, _ = gone(d_inner=channels, mlp_hidden=neurons)
    assert said("70 % of channels and neurons")[0] == round(both, 1) == 74.4
    assert said("expand 2 to 1.5")[0] == round(gone(d_inner=288)[0], 1)
    assert said("d_conv 4 to 2")[0] == round(gone(d_conv=2)[1], 1)
    zeroed = 0.7 * (share("linear_out") + share("mlp") + share("linear_gate"))
    assert said("stage 1, 70 % of single weights")[0] == round(zeroed, 1)
    # widths as the plans round them to 8 (tests/pruning/test_lite_and_plans.py)
    plans = [gone(d_inner=192, mlp_hidden=232)[1], gone(d_inner=288, mlp_hidden=232, out_channels=96)[1]]
    assert said("stage 2") == [round(macs, 1) for macs in plans]
    with torch.device("meta"):
        lite = pruning.build_mamba_lite(dense())
        wider = [count_parameters(mamba_small(mixer=mixer)) for mixer in ("bidirectional", "multiscale")]
    assert round(100 * (1 - count_parameters(lite) / WHOLE), 1) == 70.6 and "70.6 %" in TEXT
    assert said("bidirectional, multiscale mixer") == [round(100 * (n / WHOLE - 1), 1) for n in wider]


def test_the_figures_of_the_test_report():
    assert count_parameters(dense()) == WHOLE and round(gone(mlp_hidden=384)[0], 2) == 21.52
    assert mamba_small(depth=1)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_larger_time_step_forgets_faster():
    """A state of A = -1 that one token wrote, ten tokens later."""
    left = []
    for delta in (0.1, 1.0):
        u = torch.zeros(1, 1, 11)
        u[..., 0] = 1 / delta  # the same state at first
        ones = torch.ones(1, 1, 11)
        y = mamba.selective_scan(u, delta * ones, -torch.ones(1, 1), ones, ones)
        left.append(float(y[0, 0, 10] / y[0, 0, 0]))
    assert left == pytest.approx([0.3679, 4.54e-5], rel=1e-3)
    assert "37 % at delta 0.1 and 0.005 % at delta 1" in TEXT

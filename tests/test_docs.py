"""Pages: their links, their places in the navigation, what they name, their translations, and the examples on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import util
from pathlib import Path

import pytest
import yaml

import mamba
import pruning
from mamba.config.keys import dotted_keys
from mamba.data.registry import DATASETS, load_data
from mamba.models.ssm import MIXERS
from mamba.train.distributed import local_process
from mamba.train.trainer import fit
from pruning.cut import cut
from pruning.importance import SCORES

ROOT = Path(__file__).parent.parent
OURS = ("mamba", "pruning", "ray_jobs")
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
HEADING = re.compile(r"^(#+) (.+)$", re.M)


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and mkdocs make them where they have no signs but these."""
    texts = [re.sub(r"[^\w\- ]", "", text).strip().lower() for _, text in HEADING.findall(prose(page))]
    return {re.sub(r"\s+", "-", text) for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_the_map_names_every_file():
    """docs/DESIGN.md, by room: what a newcomer cannot place by its name has a word beside it there."""
    text = (DOCS / "DESIGN.md").read_text().split("## The house")[1].split("## Contracts")[0]
    ours = {file for top in OURS for file in (ROOT / top).rglob("*.py")}
    there = {file.name for file in ours} | {"registry.py", "test_dependencies.py"}
    assert set(re.findall(r"\b[a-z_]+\.py\b", text)) <= there
    for part in re.split(r"^(?=(?:mamba|pruning|ray_jobs)/)", text, flags=re.M):
        room = ROOT / part.split()[0] if part[:1].isalpha() else ROOT
        if room.is_dir() and room != ROOT:
            files = {file.name for file in room.glob("*.py")} - {"__init__.py"}
            assert not {file for file in files if not re.search(rf"\b{re.escape(file)}", part)}, room


def test_every_page_is_in_the_navigation():
    def pages(part):
        return [part] if isinstance(part, str) else [p for entry in part for v in entry.values() for p in pages(v)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    outside = {"index.md", "README.zh.md", "CONTRIBUTING.md"}
    assert set(listed) == {page.name for page in DOCS.glob("*.md")} | outside, (
        "each page of docs/ has a line in the nav of mkdocs.yml"
    )


def test_every_extra_that_is_named_can_be_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [*PAGES, *(p for top in ("mamba", "pruning", "ray_jobs") for p in (ROOT / top).rglob("*.py"))]
    named = {word for p in sources for word in re.findall(r"pip install[^\n`]*\[(\w+)\]", p.read_text())}
    assert {"onnx", "mlflow", "wandb"} <= named <= set(extras)
    assert "mamba-forge[" not in "".join(p.read_text() for p in sources), "it is on no package index"


def test_the_reference_lists_what_is_public():
    named = re.findall(r"^::: (\w+)[\w.]*\.(\w+)$", (DOCS / "API.md").read_text(), re.M)
    for package in (mamba, pruning):
        assert sorted(n for top, n in named if top == package.__name__) == sorted(package.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_gives_is_one(page):
    """`--group.key` anywhere on a page, but in the log, which tells of older ones."""
    if page.name == "LOG.md":
        pytest.skip("tells of the past")
    groups = {key.partition(".")[0] for key in dotted_keys() if "." in key}
    keys = {key.replace("_", "-") for key in dotted_keys()}
    for key in re.findall(r"--([a-z]+\.[a-z][a-z0-9_.-]*[a-z0-9])", page.read_text()):
        known = key.partition(".")[0] in groups
        assert not known or key.replace("_", "-") in keys, f"{page.name}: --{key}"


@pytest.mark.parametrize("name", ["README", "docs/PRUNING"])
def test_a_translation_has_the_headings_and_the_commands_of_its_original(name):
    ours, theirs = ROOT / f"{name}.md", ROOT / f"{name}.zh.md"
    assert [len(marks) for marks, _ in HEADING.findall(prose(ours))] == [
        len(marks) for marks, _ in HEADING.findall(prose(theirs))
    ]
    for one, other in zip(FENCED.findall(ours.read_text()), FENCED.findall(theirs.read_text()), strict=True):
        assert one == other, f"{theirs.name}: a block is not that of {ours.name}"
    code = re.compile(r"`[^`\n]+`")
    gone = set(code.findall(prose(theirs))) - set(code.findall(prose(ours)))
    assert not gone, f"{theirs.name} names {gone}, which {ours.name} does not"
    images = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
    assert images.findall(theirs.read_text()) == images.findall(ours.read_text())


def test_scores_are_the_same_in_both_languages():
    def numbers(page):
        part = page.read_text().partition("<!-- scores")[2].partition("<!-- end of scores")[0]
        return sorted(re.findall(r"\d+(?:[,.]\d+)*", re.sub(r"\]\([^)]*\)", "", part)))

    ours = numbers(ROOT / "README.md")
    assert len(ours) > 10 and ours == numbers(ROOT / "README.zh.md")


def test_errors_of_the_faq_are_errors_of_the_code():
    text = (DOCS / "FAQ.md").read_text().partition("## Questions")[0]
    named = re.findall(r"^### `([^`]+)`$", text, re.M)
    sources = [f.read_text() for top in ("mamba", "ray_jobs", "pruning") for f in (ROOT / top).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a sentence over several lines
    code = code.replace("worker {rank} failed", "worker 0 failed")
    assert len(named) >= 10 and [error for error in named if error not in code] == []


def test_the_examples_of_extending_work_as_they_stand(small_config, tmp_path):
    before = [(registry, set(registry)) for registry in (SCORES, MIXERS, DATASETS)]
    blocks = [body for kind, body in FENCED.findall((DOCS / "EXTEND.md").read_text()) if kind == "python"]
    try:
        for body in blocks:
            exec(compile(body, "EXTEND.md", "exec"), {"__name__": "mine"})
        score, mixer, source = (next(iter(set(registry) - was)) for registry, was in before)
        config = small_config(data__dataset=source, data__img_size=16, model__mixer=mixer, optim__epochs=1)
        data = load_data(config.data, 0)
        assert data.classes == ("up", "across") and len(data.train) == 360
        (tmp_path / "run").mkdir()
        result = fit(config, local_process(), tmp_path / "run", data)
        assert result["status"] == "finished"
        model, _ = mamba.load_model(tmp_path / "run")
        smaller = cut(model, {"linear_out": 0.5}, score=score, shrink=True).model
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    finally:
        for registry, was in before:
            for name in set(registry) - was:
                del registry[name]


def test_links_out_of_the_pages_become_words():
    spec = util.spec_from_file_location("docs_site", DOCS / "site.py")
    site = util.module_from_spec(spec)
    spec.loader.exec_module(site)
    assert site.in_docs("[a](docs/DATA.md#x) [b](Makefile) [c](CONTRIBUTING.md)", "README.md") == (
        "[a](DATA.md#x) b [c](CONTRIBUTING.md)"
    )
    assert site.in_docs("[a](../README.md) ![p](images/block.svg) [c](https://x.y)", "docs/DATA.md") == (
        "[a](index.md) ![p](images/block.svg) [c](https://x.y)"
    )


@pytest.mark.long
def test_all_pages_build(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "API.html").read_text()
    assert "selective_scan" in page and "prune_mamba_structured" in page
    assert "fonts.googleapis" not in page

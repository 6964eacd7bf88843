"""What `make docs` does to pages: those of the repository's folder become pages too, and links that lead out of docs/,
to what is no page, become plain words."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "index.md", "README.zh.md": "README.zh.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Pages of the repository's folder, and what they are called among those of docs/."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def in_docs(text: str, page: str) -> str:
    """A page's text with its links as seen from docs/. `page`: its path from the repository's folder."""

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if there in OUTSIDE:
            there = f"docs/{OUTSIDE[there]}"
        elif not there.startswith("docs/") or not (ROOT / there).is_file() or _left_out(there):
            return words
        return f"[{words}]({there.removeprefix('docs/')}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, text).replace("](docs/", "](")


def _left_out(there: str) -> bool:
    return there.startswith("docs/results/") and there.endswith((".md", ".html"))


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / page).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    homes = {there: here for here, there in OUTSIDE.items()}
    return in_docs(markdown, homes.get(name, f"docs/{name}"))

"""Nav - a hook of mkdocs: adds the generated pages and the decision records to the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.exceptions import Abort

FOLDERS = {"Methods": "methods", "Reference": "reference", "Decisions": "adr"}
"""Entry of the navigation -> the folder whose pages it lists; index.md comes first."""


def on_config(config: Any) -> Any:
    """Called once, before the pages are read."""
    docs = Path(config.docs_dir)
    if not (docs / "map.md").is_file():
        raise Abort("The generated pages are missing: run 'python -m docs.build' first.")
    config.nav = [_listed(entry, docs) for entry in config.nav]
    return config


def _listed(entry: Any, docs: Path) -> Any:
    (title,) = entry
    if title not in FOLDERS:
        return entry
    folder = docs / FOLDERS[title]
    pages = sorted(folder.glob("*.md"), key=lambda page: (page.name != "index.md", page.name))
    return {title: [str(page.relative_to(docs)) for page in pages]}

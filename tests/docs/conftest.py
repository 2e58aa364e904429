"""The built pages, in a copy of docs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from docs.build import build
from docs.markers import DOCS, ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's README and docs with every generated page, made now."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__", "methods", "reference"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, root / name)
    build(root / "docs")
    return root

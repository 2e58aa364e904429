"""A cache of their own for tests that read files, and the real data sets where they are at hand."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets`, empty, in the test's folder."""
    import datasets

    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Iterable[dict]], str]:
    """Writes rows as JSON lines (gzip where the name ends in .gz) and returns the path."""

    def write(name: str, rows: Iterable[dict]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


@pytest.fixture
def shared() -> Callable[[str], str]:
    """The path of a real data set; skips where the folder is absent."""
    beside = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ["FEDLLM_SHARED"]) / "data" if os.environ.get("FEDLLM_SHARED") else beside

    def shared(name: str) -> str:
        if not (folder / name).is_file():
            pytest.skip(f"{name} is not in the folder of shared data sets (set FEDLLM_SHARED)")
        return str(folder / name)

    return shared

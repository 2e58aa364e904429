"""Rows of the shared public data sets; a test is skipped where they are absent."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest


def shared_rows(name: str) -> list[dict[str, Any]]:
    """All rows of a file in FEDLLM_SHARED/data, or in `shared/data` beside the checkout."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ["FEDLLM_SHARED"]) / "data" if os.environ.get("FEDLLM_SHARED") else beside
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in the folder of shared data sets (set FEDLLM_SHARED)")
    with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]

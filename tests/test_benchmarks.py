"""Benchmarks that the machine of a test cannot answer start, at least."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_benchmark_of_a_gpu_can_be_tried_anywhere() -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--try", "--repeats", "1"]
    found = subprocess.run(line, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "| tiny | 8 | 8 x 1 x 32 |" in found.stdout

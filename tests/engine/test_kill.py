"""kill -9 at any moment, then resume: the same bits as a run never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = {
    "name": "kill", "rounds": 12, "method": "scaffold", "train": {"steps": 3, "batch_size": 2}, "cohort": 2,
    "model": {"name": "toy:llama"}, "adapter": {"rank": 2}, "task": {"max_length": 48},
    "evaluation": {"every": 3, "against": ["local"]},
    "data": {"partition": {"by": "natural", "column": "who"}, "evaluation": {"fraction": 0.3}},
}  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    code = "import sys; from fedllm.cli.main import main; sys.argv = ['fedllm', *sys.argv[1:]]; main()"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet
    )  # type: ignore[call-overload]


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error.decode()


@pytest.mark.slow
def test_kill_and_resume(tmp_path: Path) -> None:
    rows = [
        {"who": f"c{i % 3}", "instruction": f"say {i} and {i * 7 % 5}", "response": f"it is {i * 7 % 5}"}
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {**RECIPE, "data": {**RECIPE["data"], "path": "rows.jsonl"}}  # type: ignore[dict-item]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    finish(start(tmp_path, "run", "recipe.yaml", "--folder", "whole"))
    process = start(tmp_path, "run", "recipe.yaml", "--folder", "cut")
    for wait in (2, 5, 3):  # after round 2 of the federation, after 5 more rounds, then in the middle of the last legs
        _after(tmp_path / "cut" / "metrics.jsonl", wait, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = start(tmp_path, "resume", "cut")
    finish(process)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    whole, cut = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut"))
    assert whole["rows"] == cut["rows"] and whole["bytes"] == cut["bytes"] and whole["tokens"] == cut["tokens"]


def _after(metrics: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many more rounds are logged (or the process ends)."""
    limit, begun = time.monotonic() + 120, _count(metrics)
    while _count(metrics) < begun + lines and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.005)


def _count(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

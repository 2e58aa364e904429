"""Command lines for the tests: in this process or in one of their own; and a small recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from typer.testing import CliRunner

from fedllm.cli.main import app

MAIN = [sys.executable, "-c", "import sys; sys.argv[0] = 'fedllm'; from fedllm.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Place:
    """A folder with data, a recipe, and a finished run."""

    folder: Path
    recipe: Path
    rows: Path
    run: Path


def invoke(*args, **options):
    """A command line, in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def ok(*args, **options):
    """As `invoke`, for a command that must succeed."""
    result = invoke(*args, **options)
    assert result.exit_code == 0, result.output
    return result


def as_json(*args):
    """The one JSON document that a command writes to stdout."""
    return json.loads(ok(*args, "--json").stdout)


def outside(*args, **options):
    """A command line in a process of its own."""
    given = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 120, **options}
    return subprocess.run([*MAIN, *map(str, args)], **given)


def write_recipe(folder: Path, **changes) -> Path:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        sites = ("north", "south", "west")
        lines = [
            {"instruction": f"Say the number {n} of {sites[n % 3]}.", "response": f"It is {n}.", "site": sites[n % 3]}
            for n in range(36)
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "about": "Three sites with twelve sentences each.",
        "rounds": 2,
        "cohort_width": 3,
        "runs": str(folder / "runs"),
        "model": {"name": "toy:llama"},
        "task": {"max_length": 96},
        "train": {"steps": 2, "batch_size": 2},
        "data": {"path": str(rows), "partition": {"by": "natural", "column": "site"}},
        "evaluation": {"against": ["base", "local"]},
        **changes,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file

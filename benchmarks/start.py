"""Start - how long a user waits: for `fedllm --help`, and for the first round of `fedllm run quickstart`.

Beside them stands what no command that trains can be faster than: importing torch and the model's class.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.show import main

QUESTION = "How long does a user wait for help, and for the first round of the quickstart?"
HEAD = ("command", "until", "wall s", "CPU s", "repeats", "goal (s)", "verdict")
NOTE = (
    "Every command is a process of its own, and runs once before it is measured, so that files lie in memory and "
    "Python has compiled them: median (lowest-highest). CPU seconds are those of the process; on an idle machine, and "
    "with one thread, wall is near to them. The run is stopped after its first round. The imports are those of "
    "`import torch; from transformers import LlamaForCausalLM`, without anything of fedllm's."
)
REPEATS, QUICK = 5, 2
HELP, FIRST = 0.5, 10.0
"""Goals in seconds."""
LIMIT = 300.0
"""Seconds after which a command has failed."""
LOOK = 0.01
"""Seconds between two looks at the run folder."""
IMPORTS = [sys.executable, "-c", "import torch; from transformers import LlamaForCausalLM"]
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Python keeps what it has compiled, as it does for a user."""


def command() -> list[str]:
    """The installed command, or the module where it lies beside no script."""
    script = Path(sys.executable).with_name("fedllm.exe" if os.name == "nt" else "fedllm")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "fedllm"]


@contextmanager
def started(arguments: list[str], place: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process in the folder `place`, with its errors in the file `errors`; ended when it is not needed any more."""
    with (place / "errors").open("wb") as errors:
        process = subprocess.Popen(arguments, cwd=place, env=COMPILED, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def failed(place: Path, arguments: list[str]) -> SystemExit:
    """What a command said before it failed."""
    said = (place / "errors").read_text(encoding="utf-8", errors="replace")
    return SystemExit(f"{' '.join(arguments)} did not get there:\n{said[-2000:]}")


def shown(place: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `fedllm --help`."""
    return to_its_end([*command(), "--help"], place)


def imported(place: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the imports alone."""
    return to_its_end(IMPORTS, place)


def to_its_end(arguments: list[str], place: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before, begun = os.times(), time.perf_counter()
    with started(arguments, place) as process:
        if process.wait(LIMIT):
            raise failed(place, arguments)
        wall = time.perf_counter() - begun
    after = os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def first_round(place: Path) -> tuple[float, float]:
    """Wall and CPU seconds from the command until the first round lies in metrics.jsonl."""
    asked = [*command(), "run", "quickstart", "--quiet", "--folder", str(place / "run")]
    before, begun = os.times(), time.perf_counter()
    with started(asked, place) as process:
        while not round_done(place / "run" / "metrics.jsonl"):
            if process.poll() is not None or time.perf_counter() - begun > LIMIT:
                raise failed(place, asked)
            time.sleep(LOOK)
        wall = time.perf_counter() - begun
    after = os.times()  # CPU seconds of children count when they have ended
    return wall, sum(after[2:4]) - sum(before[2:4])


def round_done(metrics: Path) -> bool:
    """Whether a whole line of metrics.jsonl tells of a round."""
    if not metrics.is_file():
        return False
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return any(json.loads(line)["event"] == "round" for line in lines)


def repeated(work: Callable[[Path], tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """`count` measurements after one that does not count, each in an empty folder."""
    found = []
    for _ in range(count + 1):
        with tempfile.TemporaryDirectory() as place:
            found.append(work(Path(place)))
    return found[1:]


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per command."""
    count, rows = QUICK if quick else REPEATS, []
    for name, until, work, goal in (
        ("fedllm --help", "its end", shown, HELP),
        ("imports alone", "its end", imported, None),
        ("fedllm run quickstart", "its first round is done", first_round, FIRST),
    ):
        found = repeated(work, count)
        cells = []
        for values in zip(*found, strict=True):
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        reached = goal is not None and statistics.median(wall for wall, _ in found) < goal
        verdict = ("", "") if goal is None else (f"{goal:g}", "reached" if reached else "missed")
        rows.append((name, until, *cells, str(count), *verdict))
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

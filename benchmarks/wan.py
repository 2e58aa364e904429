"""Wan - whether rounds over slow lines take the bytes and the time that are forecast before the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.across.line import HUB, Namespace, lines, received
from benchmarks.across.network import Net, network, tidy
from benchmarks.show import main
from docs.markers import ROOT
from fedllm.core.errors import ConfigError, RunError
from fedllm.engine.nvflare.forecast import Line, carried, round_seconds

QUESTION = "Do rounds over slow lines take the bytes and the time that are forecast?"
HEAD = (
    "adapter",
    "rounds",
    "MB a site, down and up: forecast",
    "on the line",
    "s a round: forecast",
    "measured",
    "bytes within 20 %",
    "time within 20 %",
)
LINE = Line(rate=20e6, delay=0.05)
"""The line of every site: bits per second each way, seconds one way."""
NOTE = (
    "A server and three sites, each in a network namespace of its own with a line of 20 Mbit/s and 50 ms each way that "
    "delays every packet; real runs of fedavg on the toy model, one step a round, of which the first round does not "
    "count. The forecast is that of `fedllm doctor --line 20mbit,50ms` before the run; bytes are measured at the ends "
    "of the lines, with TLS, TCP/IP and FLARE's questions for work in them. Medians (lowest-highest) of rounds."
)
SERVER = "hub.bench"
SITES = ("site-1", "site-2", "site-3")
WITHIN = 0.2
"""Goal: how far a forecast may be off."""
ISOLATED = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Everything inside ends with its first process, devices and mounts with it."""
RANKS, ROUNDS, QUICK = (2, 2048), 8, 3
ROWS, ALONE = 8, {"by": "iid", "clients": 1}
"""Of each site, and that they are one client's."""
LOOK = 0.02
"""Seconds between two looks at the rounds."""


@dataclass(frozen=True)
class Forecast:
    """What a round takes: bytes of one client down and up, and seconds without a line."""

    down: int
    up: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """One round as it was: seconds, and bytes down and up of the site with most of them."""

    seconds: float
    down: int
    up: int


def impossible() -> str | None:
    """Why there can be no slow lines on this machine; None where there can."""
    missing = [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    tried = subprocess.run([*_isolated(), "ip", "tuntap", "add", "try", "mode", "tun"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"namespaces or their devices are not allowed ({tried.stderr.strip()})"


def _isolated() -> list[str]:
    """What starts a command in namespaces; a user without rights is root inside."""
    return [*ISOLATED, *(["--map-root-user"] if os.geteuid() else [])]


def recipe(rank: int, rounds: int) -> dict[str, Any]:
    """What is run."""
    return {
        "name": "wan", "rounds": rounds, "method": "fedavg", "train": {"steps": 1, "batch_size": 1}, "cohort": "all",
        "cohort_width": 1, "seed": 0, "model": {"name": "toy:llama", "device": "cpu"}, "adapter": {"rank": rank},
        "task": {"max_length": 64, "template": "plain"}, "evaluation": {"against": []},
    }  # fmt: skip


def rows(folder: Path) -> dict[str, Any]:
    """Write every site's rows; gives the `data` section of all together."""
    made = {s: [{"site": s, "instruction": f"spell {n}", "response": str(n)} for n in range(ROWS)] for s in SITES}
    every = [row for own in made.values() for row in own]
    for name, some in {**made, "all": every}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return {"path": str(folder / "all.jsonl"), "partition": {"by": "natural", "column": "site"}}


def forecast(folder: Path, rank: int) -> Forecast:
    """What `fedllm doctor` finds before the run."""
    from fedllm.cli.doctor import try_rounds
    from fedllm.recipe import load_recipe
    from fedllm.run import prepare

    tried = asyncio.run(try_rounds(prepare(load_recipe({**recipe(rank, 1), "data": rows(folder)}))))
    if tried.failed is not None:
        raise RunError(f"The trial failed: {tried.failed}.")
    return Forecast(tried.down, tried.up, tried.fixed + tried.step)


def over_line(expected: Forecast) -> float:
    """Seconds of a round of a site, as `fedllm doctor --line` finds them."""
    return round_seconds(LINE, expected.down, expected.up, expected.seconds)


def played(net: Net, places: Mapping[str, Namespace], rank: int, rounds: int) -> list[Round]:
    """Play a run; its rounds but the first."""
    from fedllm.recipe import load_recipe

    name, asked = f"rank-{rank}", load_recipe(recipe(rank, rounds)).model_dump(mode="json")
    metrics = net.kits[SERVER] / "fedllm" / "runs" / name / "metrics.jsonl"
    seen, found = _counted(places), list[Round]()
    with net.submitted(name, asked) as over:
        while len(found) < rounds:
            now = _rounds(metrics)
            if len(now) > len(found):
                counted = _counted(places)
                gone = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(counted, seen, strict=True)]
                found.append(Round(now[len(found)], *(max(way) for way in zip(*gone, strict=True))))
                seen = counted
            elif over():
                raise RunError(f"The run {name} ended after {len(found)} rounds.", net.said())
            time.sleep(LOOK)
    return found[1:]


def _rounds(metrics: Path) -> list[float]:
    """Seconds of the rounds that are over; a line that is being written is left out."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
    return [one["seconds"] for one in map(json.loads, lines) if one["event"] == "round"]


def _counted(places: Mapping[str, Namespace]) -> list[tuple[int, int]]:
    """Bytes that went to and came from every site so far, as the devices at the end of a line count them."""
    here = received("self")
    return [(received(place.pid)["hub"], here[f"site{n}"]) for n, place in enumerate(places.values(), 1)]


@contextlib.contextmanager
def resolved(folder: Path) -> Generator[None]:
    """In this process's own mounts, the server's name has its address."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{HUB} {SERVER}\n", encoding="utf-8")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/etc/hosts"], check=True)


def inside(folder: Path, quick: bool) -> None:
    """The part that runs in namespaces of its own, and ends with the process that started it; rounds go to a file."""
    threading.Thread(target=_end, daemon=True).start()
    near: dict[str, Any] = {"device": "cpu", "threads": 1}
    facts = {
        site: {"data": {"path": str(folder / f"{site}.jsonl"), "partition": ALONE}, "client": site, **near}
        for site in SITES
    }
    with resolved(folder), lines(LINE, SITES) as places:

        def place(name: str) -> Any:
            return places[name].entered() if name in places else contextlib.nullcontext()

        with network(folder, SITES, server=SERVER, facts=facts, place=place) as net:
            found = {rank: played(net, places, rank, QUICK if quick else ROUNDS) for rank in RANKS}
    told = {rank: [asdict(one) for one in some] for rank, some in found.items()}
    (folder / "found.json").write_text(json.dumps(told), encoding="utf-8")


def _end() -> None:
    """End this process, and so all in its namespaces, when the one that started it is gone or has enough."""
    os.read(0, 1)  # not sys.stdin: reading holds a lock that a forked process waits for
    os._exit(1)


def row(rank: int, expected: Forecast, found: Sequence[Round]) -> tuple[str, ...]:
    """One line of the table."""
    foreseen = (carried(expected.down) + carried(expected.up)) / 1e6, over_line(expected)
    moved = [(one.down + one.up) / 1e6 for one in found], [one.seconds for one in found]
    off = [statistics.median(values) / value - 1 for values, value in zip(moved, foreseen, strict=True)]
    cells = []
    for value, values in zip(foreseen, moved, strict=True):
        cells += [f"{value:.2f}", f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"]
    verdicts = [f"{'reached' if abs(one) <= WITHIN else 'missed'}, {one:+.0%}" for one in off]
    return f"LoRA of rank {rank}", str(len(found)), *cells, *verdicts


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per size of adapter."""
    reason = impossible()
    if reason is not None:
        raise ConfigError(f"No slow lines can be made here: {reason}.", action="Ask on a Linux machine as root.")
    with tidy(), tempfile.TemporaryDirectory(prefix="fedllm-wan-") as place:
        expected = {rank: forecast(Path(place), rank) for rank in RANKS}
        words = [sys.executable, "-m", "benchmarks.wan", "--inside", place, *(["--quick"] if quick else [])]
        inner = subprocess.Popen([*_isolated(), *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=sys.stderr)
        try:
            failed = inner.wait()
        finally:
            inner.communicate()  # its end is ours
        if failed:
            raise RunError("The rounds over slow lines failed; their reasons stand above.")
        found = json.loads((Path(place) / "found.json").read_text(encoding="utf-8"))
    return [row(rank, expected[rank], [Round(**one) for one in found[str(rank)]]) for rank in RANKS]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), "--quick" in sys.argv)
    else:
        main(sys.modules[__name__])

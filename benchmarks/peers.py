"""Peers - fedllm, pfl, Flower and the structures of FlowerTune and OpenFedLLM, each beside a plain loop.

    OMP_NUM_THREADS=1 python -m benchmarks.peers [--quick]

Every engine plays in a process of its own, where a plain PyTorch loop does the same optimiser steps right after each
round: a ratio compares seconds of one process within a minute. CPU seconds are those of the engine's whole process
tree. The adapters that the engines end with are compared, too, and the benchmark stops where one differs: the same
steps on the same batches give the same adapter. The loops are in :mod:`benchmarks.peer_loops`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.ground import SIZES, PlainLoop, batches, texts
from benchmarks.peer_loops import ENGINES, NEEDS, RANK, Case, Work, play, put
from benchmarks.show import main
from benchmarks.tokens import DATA
from fedllm.core.tensors import Tensors
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import CausalLM

QUESTION = "Against peers: same model, data, cohort and optimiser steps - what does each engine cost?"
HEAD = (
    "workload", "engine", "CPU over plain", "over fedllm's", "CPU s per client turn over plain", "wall over plain",
    "peak over plain (MiB)", "loss, before and after",
)  # fmt: skip
NOTE = (
    "Ratios to the plain loop: the median of the measurements, with the lowest and the highest; the first round of "
    "each engine (imports, actors, pfl's evaluation) is not counted. Below 1: clients share passes, or less is "
    "computed (rows of like lengths in a pass, no mask for padding, logits and the last feed-forward part at labels "
    "alone). `over fedllm's`: this median over fedllm's. Flower has one Ray actor. OpenFedLLM's and FlowerTune's "
    "structures are written with trl's SFTTrainer, without their gradient checkpointing. Peak: of two rounds without "
    "the plain loop beside them, less that of two rounds of the plain loop alone; a process tree's own memory and the "
    "mapped files of its largest process. The adapters that the engines end with are equal to a thousandth of the way "
    "they have come."
)
INSTALL = "see benchmarks/peers.txt"
LETTERS = (
    Case("4 of 20 clients", "3.4 M", 20, 4, 10, 16, 128),
    Case("4 of 20 clients", "3.4 M", 20, 4, 1, 16, 128, 2),
    Case("16 of 100 clients", "3.4 M", 100, 16, 2, 1, 128, 2),
    Case("16 of 100 clients", "0.3 M", 100, 16, 1, 2, 32, 4),
)
TASKS = tuple(Case("T0, 4 of 20 tasks, response only", size, 20, 4, 2, 8, 512) for size in ("3.4 M", "4.3 M"))
"""The larger one has a vocabulary that takes as much of its weights as it does in models that people train."""
PEERS = tuple(engine for engine in ENGINES if engine != "plain")
SHORT = 3
"""Local steps of the longest case where it must be quick."""
WARM, REPEATS, QUICK = 1, 5, 3
"""Rounds before the first measurement, and measurements."""
SAME = 1e-3
"""How far an engine's last adapter may be from fedllm's, as a share of how far fedllm's has come."""
ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing is sent anywhere."""


@dataclass(frozen=True)
class Measured:
    """One measurement: seconds of an engine, and of the plain loop beside it."""

    cpu: float
    wall: float
    plain_cpu: float
    plain_wall: float


@dataclass(frozen=True)
class Told:
    """What an engine told of itself.

    Attributes:
        measured: its measurements.
        last: its last adapter.
        note: how it ran.
        peak: peak memory of two rounds in bytes; None where this system does not tell.
    """

    measured: list[Measured]
    last: Tensors
    note: str
    peak: int | None


def rows_of(case: Case) -> dict[str, list[dict[str, str]]] | None:
    """The clients' rows, equally many each; None where the T0 tasks are not there."""
    if case not in TASKS:
        count = case.batch * 4
        return {f"c{k:03d}": texts(count, case.length, k) for k in range(case.clients)}
    if not DATA.is_file():
        return None
    task = CausalLM(TaskSettings(max_length=case.length, template="plain"), toy_tokenizer("llama"))
    found: dict[str, list[dict[str, str]]] = {}
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            kept = found.setdefault(row["task"], [])
            asked = {name: row[name] for name in ("instruction", "response")}
            if len(kept) < 4 * case.batch and sum(example.tokens < case.length for example in task.prepare([asked])):
                kept.append(asked)
    full = sorted(name for name, kept in found.items() if len(kept) == 4 * case.batch)
    return {name: found[name] for name in full[:: len(full) // case.clients][: case.clients]}


def missing(engine: str) -> list[str]:
    """Libraries that an engine needs and that are not installed."""
    return [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]


def begun(folder: str, engine: str, rounds: int, beside: bool) -> subprocess.Popen[bytes]:
    """Start an engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", "--one", folder, engine, str(rounds), str(int(beside))]
    before = os.environ.get("PYTHONPATH")
    path = str(ROOT) if not before else f"{ROOT}{os.pathsep}{before}"
    env = {**os.environ, **QUIET, "PYTHONPATH": path, "FLWR_HOME": f"{folder}/flwr"}
    with Path(folder, "said.txt").open("wb") as said:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[bytes], folder: str, engine: str) -> None:
    """Wait for an engine; RuntimeError with the last line that it wrote where it failed."""
    if process.wait():
        said = Path(folder, "said.txt").read_text(encoding="utf-8", errors="replace").strip()
        print(f"{engine} failed:\n{said[-3000:]}", file=sys.stderr)
        raise RuntimeError(f"failed: {said.splitlines()[-1][:200] if said else process.returncode}")


def asked(work: Work, engine: str, repeats: int) -> Told:
    """Play an engine twice: beside the plain loop for its seconds, and without it for its memory."""
    case, folder = work.case, work.folder
    ended(begun(folder, engine, WARM + repeats * case.often, True), folder, engine)
    told = json.loads(Path(folder, "told.json").read_text(encoding="utf-8"))
    costs, last = told["costs"][WARM:], load_file(Path(folder, "last.safetensors"))
    groups = [costs[at : at + case.often] for at in range(0, len(costs), case.often)]
    measured = [Measured(*map(sum, zip(*group, strict=True))) for group in groups]
    return Told(measured, last, told["note"], peak(folder, engine))


def peak(folder: str, engine: str) -> int | None:
    """Peak memory of an engine's process tree over two rounds, looked at every 20 ms."""
    process, highest = begun(folder, engine, 2, False), 0
    while process.poll() is None:
        highest = max(highest, resident(process.pid) or 0)
        time.sleep(0.02)
    ended(process, folder, engine)
    return highest or None


def resident(pid: int) -> int | None:
    """Bytes of a process tree: what belongs to its processes, shared pages once, and the mapped files of one of them.

    Files that several processes map (torch's library) lie in memory once; the proportional set size would hang on
    which other programs of the machine map them as well. Linux only.
    """
    own, files = 0, 0
    try:
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return None
    for one in tree:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue  # it ended, or this is not Linux
        size = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        own += size.get("Pss_Anon", 0) + size.get("Pss_Shmem", 0)
        files = max(files, size.get("Rss", 0) - size.get("Anonymous", 0) - size.get("Pss_Shmem", 0))
    return own + files or None


def distance(last: Tensors, to: Tensors, first: Tensors) -> float:
    """How far `last` is from `to`, as a share of how far `to` is from `first`."""
    apart = sum(float((last[name] - to[name]).square().sum()) for name in to)
    come = sum(float((to[name] - first[name]).square().sum()) for name in to)
    return (apart / come) ** 0.5


def loss(work: Work, loop: PlainLoop, adapter: Tensors) -> float:
    """The mean loss of an adapter over some rows of every client."""
    put(loop.model, adapter)
    some = [example for held in work.examples.values() for example in held[:2]]
    with torch.no_grad():
        found = [float(loop.model(**batch).loss) for batch in batches(some, 10)]
    return statistics.mean(found)


def spread(values: Sequence[float]) -> str:
    """Median (lowest-highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def row(case: Case, engine: str, found: dict[str, Told], least: int | None, losses: str) -> tuple[str, ...]:
    """One engine's row; `least` is the plain loop's peak."""
    told = found[engine]
    over = {name: statistics.median(m.cpu / m.plain_cpu for m in one.measured) for name, one in found.items()}
    each = statistics.median((m.cpu - m.plain_cpu) / (case.cohort * case.often) for m in told.measured)
    beyond = "not measured here" if told.peak is None or least is None else f"{(told.peak - least) / 2**20:+.0f}"
    return (
        workload(case),
        engine + (f" ({told.note})" if told.note else ""),
        spread([m.cpu / m.plain_cpu for m in told.measured]),
        f"{over[engine] / over['fedllm']:.2f}",
        f"{each:+.4f}",
        spread([m.wall / m.plain_wall for m in told.measured]),
        beyond,
        losses,
    )


def workload(case: Case) -> str:
    """A case in words."""
    length = f"up to {case.length}" if case in TASKS else str(case.length)
    steps = f"{case.steps} local step{'s' if case.steps > 1 else ''}"
    return f"{case.name}, {case.size}, {case.batch} x {length} tokens, {steps}"


def answered(case: Case, rows: dict[str, list[dict[str, str]]], repeats: int) -> list[tuple[str, ...]]:
    """One row per engine for a case."""
    with tempfile.TemporaryDirectory(prefix="fedllm-peers-") as folder:
        work = Work.written(case, rows, folder)
        found: dict[str, Told] = {}
        absent: dict[str, str] = {}
        for engine in PEERS:
            if lacks := missing(engine):
                absent[engine] = f"{', '.join(lacks)} not installed: {INSTALL}"
                continue
            try:
                found[engine] = asked(work, engine, repeats)
            except RuntimeError as fault:
                absent[engine] = str(fault)
        if "fedllm" in absent:
            raise SystemExit(f"fedllm on '{workload(case)}': {absent['fedllm']}")
        losses = compared(work, found)
        least = peak(folder, "plain")
    blank = ("",) * (len(HEAD) - 3)
    return [
        row(case, engine, found, least, losses[engine])
        if engine in found
        else (workload(case), engine, absent[engine], *blank)
        for engine in PEERS
    ]


def compared(work: Work, found: dict[str, Told]) -> dict[str, str]:
    """Losses before and after, by engine; stops where an engine's adapter is not fedllm's."""
    loop, own = PlainLoop(SIZES[work.case.size], RANK, []), found["fedllm"].last
    before = loss(work, loop, work.first)
    losses = {engine: f"{before:.4f}, {loss(work, loop, told.last):.4f}" for engine, told in found.items()}
    for engine, told in found.items():
        apart = distance(told.last, own, work.first)
        if not apart <= SAME:
            raise SystemExit(
                f"{engine} did other steps than fedllm on '{workload(work.case)}': the adapters are {apart:.1e} apart, "
                f"losses {losses[engine]} and {losses['fedllm']}."
            )
        print(f"{workload(work.case)}: {engine} {apart:.1e} from fedllm's adapter", file=sys.stderr, flush=True)
    return losses


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per workload and engine."""
    found: list[tuple[str, ...]] = []
    for case in (*LETTERS, *TASKS):
        rows = rows_of(case)
        if rows is None:
            found.append((workload(case), "", f"skipped: {DATA} is not there", *("",) * (len(HEAD) - 3)))
            continue
        shorter = replace(case, steps=SHORT) if quick and case.steps > SHORT and case not in TASKS else case
        found += answered(shorter, rows, QUICK if quick else REPEATS)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        play(sys.argv[2], sys.argv[3], int(sys.argv[4]), bool(int(sys.argv[5])))
    else:
        main(sys.modules[__name__])

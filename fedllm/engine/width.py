"""Width - how many clients share a pass, and why.

Sharing pays where one client's own step leaves the hardware idle: short steps on a CPU, most steps on a GPU. How far it
pays depends on the model, the texts and the machine, so "auto" tries: passes of 1, 2, 4, ... clients are timed until a
wider one gains nothing or memory is short. What was found is kept in the user's cache folder, so that the next run of
the same kind on this machine cuts its passes alike and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedllm.core.tensors import Tensors, size_in_bytes
from fedllm.core.train import Train
from fedllm.core.work import Example, Learner, Rows
from fedllm.engine.passes import Passes

LOOK = 8
"""Clients whose rows are looked at to judge the length of a step."""
STACK = 64
"""The most clients whose adapters are stacked at a time."""
STACK_BYTES = 512 * 2**20
"""Bytes that stacked adapters may take, with gradients and the optimiser's memory."""
COPIES = 6
"""Tensors of an adapter's size while it trains: start, value, gradient, two moments, one for what is computed."""
WIDEST = 64
"""The widest pass that is tried."""
GAIN = 0.98
"""A wider pass must take at most this share of the time per client."""
WORTH = 1.1
"""Sharing must take so many times less than one by one, or clients take turns: less is what a clock misjudges."""
PATIENCE = 1.5
"""Seconds after which nothing wider is tried."""
ROOM = 0.6
"""The share of free memory that passes may take."""


@dataclass(frozen=True)
class Width:
    """What was chosen, and why, for the user.

    Attributes:
        clients: the most clients of a pass.
        why: the reason, a part of a sentence.
        stack: clients that train side by side; their rows are cut into passes. At least `clients`.
        passes: what a pass costs.
    """

    clients: int
    why: str
    stack: int = 0
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack", max(self.stack, self.clients))


def choose(wanted: int | str, learner: Learner, rows: Rows, train: Train, cohort: int, processes: int = 1) -> Width:
    """The width of a run: the one wanted, or the best of those that were tried.

    Args:
        wanted: a number or "auto".
        learner: its `width_limit` and device bound the choice.
        rows: a few clients' rows are looked at.
        train: batch size.
        cohort: clients per round.
        processes: those that share a cohort.
    """
    limit, cohort, beside = learner.width_limit, -(-cohort // processes), sharing(learner.device, processes)
    if wanted != "auto" and limit != 1:
        return Width(max(1, min(int(wanted), cohort)), "as the recipe says")
    batches = [
        examples
        for client in rows.client_ids[:LOOK]
        if (examples := learner.prepare(list(rows.rows(client))[: train.batch_size]))
    ]
    if not batches:
        return Width(1, "no rows to judge by")
    if limit == 1:
        return Width(1, "this adapter trains weights inside the model, so clients take turns")
    with part_of_threads(processes):
        timed = _remembered(learner, batches, min(cohort, WIDEST), beside)
    start = learner.initial()
    stack = max(1, min(cohort, STACK, STACK_BYTES // beside // max(1, COPIES * size_in_bytes(start))))
    tokens = _tokens(batches[0])
    best = timed["best"]
    reason = f"a step of {tokens} tokens for each of {best} takes {timed['gain']:.1f} times less than one by one"
    if best == 1:
        reason = f"a step of {tokens} tokens fills this {learner.device.type}"
    if best < cohort:
        reason += f", and {timed['stopped']}"
    wide = timed["limit"] if best < min(cohort, WIDEST) else None
    return Width(min(best, stack), reason, stack, Passes(timed["fixed"], wide))


def sharing(device: torch.device, processes: int) -> int:
    """How many of some processes have their models in the same memory: each has a GPU where there are enough."""
    return -(-processes // max(1, torch.cuda.device_count())) if device.type == "cuda" else processes


@contextmanager
def part_of_threads(processes: int) -> Generator[int]:
    """A context in which torch has one process's part of its threads: so many."""
    before = torch.get_num_threads()
    part = max(1, before // processes)
    torch.set_num_threads(part)
    try:
        yield part
    finally:
        torch.set_num_threads(before)


def _tokens(batch: Sequence[Example]) -> int:
    """Tokens that a batch takes, padding counted."""
    return len(batch) * max(example.tokens for example in batch)


def _remembered(learner: Learner, batches: Sequence[Sequence[Example]], widest: int, beside: int) -> dict[str, Any]:
    """What was measured for work of this kind on this machine, now or earlier."""
    key = _key(learner, batches, widest, beside)
    file = _folder() / "width" / f"{key}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = _measure(learner, batches, widest, beside)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        passing = file.with_suffix(f".{os.getpid()}")
        passing.write_text(json.dumps(found), encoding="utf-8")
        passing.replace(file)
    except OSError:
        pass  # nothing is lost but the time of the next measurement
    return found


def _folder() -> Path:
    """The user's cache folder of fedllm."""
    given = os.environ.get("FEDLLM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedllm"


def _key(learner: Learner, batches: Sequence[Sequence[Example]], widest: int, beside: int) -> str:
    """Names the kind of work: device, threads, versions, trainable shapes, model and step."""
    shapes = {name: list(tensor.shape) for name, tensor in learner.initial().items()}
    model = getattr(getattr(learner, "loaded", None), "model", None)
    weights = None if model is None else [type(model).__name__, sum(p.numel() for p in model.parameters())]
    place = torch.cuda.get_device_name(learner.device) if learner.device.type == "cuda" else _processor()
    steps = [[example.tokens for example in batch] for batch in batches]
    programs = version("fedllm"), torch.__version__
    facts = [place, torch.get_num_threads(), programs, shapes, weights, steps, widest, beside, GAIN, WORTH]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _processor() -> str:
    """What the processor calls itself, and how many there are."""
    return f"{platform.machine()} {platform.processor()} {os.cpu_count()}"


def _measure(learner: Learner, batches: Sequence[Sequence[Example]], widest: int, beside: int = 1) -> dict[str, Any]:
    """Time passes of 1, 2, 4, ... clients, each with a batch of equal lengths; `beside` processes share the memory."""
    start, begun = learner.initial(), time.perf_counter()
    room = _room(learner.device)
    times: dict[int, float] = {}
    best, width, stopped = 1, 1, "wider ones were not tried"
    while True:
        groups = [batches[0]] * width
        before = room()
        times[width] = _timed(lambda groups=groups: _pass(learner, start, groups), learner.device)
        used = before - room()
        if width > 1 and times[width] / width > GAIN * times[best] / best:
            stopped = "more gains nothing"
            break
        best = width
        if used > 0 and 2 * used * beside > ROOM * before:
            stopped = "more would not fit into memory"
            break
        if width == widest or time.perf_counter() - begun > PATIENCE:
            break
        width = min(2 * width, widest)
    if best > 1 and times[1] * best < WORTH * times[best]:
        best, stopped = 1, "more gains next to nothing"
    tokens = _tokens(batches[0])
    last = max(times)
    each = max((times[last] - times[1]) / (last - 1), 1e-9) if last > 1 else times[1]
    fixed = max(times[1] - each, 0.0) / each * tokens
    return {
        "best": best,
        "gain": times[1] * best / times[best],
        "fixed": int(2 ** round(math.log2(min(max(fixed, 32.0), 4096.0)))),
        "limit": best * tokens,
        "stopped": stopped,
        "seconds": {str(n): t for n, t in times.items()},
    }


def _pass(learner: Learner, start: Tensors, groups: Sequence[Sequence[Example]]) -> None:
    """One forward and backward pass; nothing is kept of it."""
    own = {n: t.to(learner.device).expand(len(groups), *t.shape).clone().requires_grad_() for n, t in start.items()}
    with torch.inference_mode(False), torch.enable_grad(), learner.using(own):
        torch.autograd.grad(learner.losses(groups).sum(), list(own.values()), allow_unused=True)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """The shortest of three runs after a first one, in seconds."""
    found = []
    for _ in range(4):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def _room(device: torch.device) -> Callable[[], float]:
    """How to ask for the bytes that were free at the last pass's highest point."""
    if device.type != "cuda":
        import psutil

        own = psutil.Process()
        return lambda: float(psutil.virtual_memory().available + own.memory_info().rss - _peak())

    def free() -> float:
        peak = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.mem_get_info(device)[0] - peak

    return free


def _peak() -> float:
    """The most memory that this process ever held, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024))

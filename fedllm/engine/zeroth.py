"""Zeroth order - answers probes: slopes of the loss along seeded directions, from forward passes alone.

Small trainable tensors (LoRA, prompts) of several clients are stacked and moved out of place, so nothing drifts. The
weights of a whole model are moved inside the model, one client at a time: no second copy of them lies in memory. What
they were is kept in an unnamed file, because adding and taking away the same numbers does not give back the same bits,
and they are read back after every turn, whatever happened in it. The last start that was replayed from seeds is kept
in a second one: the next client of the round reads it instead of computing it again.
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import IO, cast
from weakref import WeakKeyDictionary

import torch

from fedllm.blocks.zeroth import noise, replay, replay_, shift_
from fedllm.core.errors import RoundFailed, RunError
from fedllm.core.tensors import Tensors, finite, subtract
from fedllm.core.work import Directions, Example, Learner, Lending, Probe, ProbeReport, Score, ScoreReport
from fedllm.engine.fit import steps_of
from fedllm.engine.job import Job, Result, no_data
from fedllm.engine.together import run_together

Window = list[list[list[Example]]]
"""The examples of one probe: batch by batch, client by client."""


def probe(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    """Answer alike probes, in place where the learner lends its weights, else in one pass over stacked tensors."""
    requests = [cast(Probe, job.request) for job in jobs]
    own = all(r.start is None and r.fixed is None for r in requests)
    lent = learner.weights() if own and isinstance(learner, Lending) else None
    with torch.no_grad():
        if lent is None:
            return _answer(_Stacked(learner, jobs, requests), learner, jobs, requests)
        results: list[Result] = []
        for job, request in zip(jobs, requests, strict=True):
            with _borrowed(learner, lent, request.replay):
                results += _answer(_Lent(lent), learner, [job], [request])
        return results


class _Theta(ABC):
    """The tensors that are moved: `aim` chooses a direction for each client, `go` walks so far along it."""

    @abstractmethod
    def using(self) -> Tensors | None:
        """What the model is to run with."""

    @abstractmethod
    def aim(self, seeds: Sequence[int]) -> None:
        """From where it stands now, look along z(seeds[k]) for client k."""

    @abstractmethod
    def go(self, to: Sequence[float]) -> None:
        """Stand at `to[k]` times the direction from where `aim` was called."""

    @abstractmethod
    def shrink(self, factors: Sequence[float]) -> None:
        """Weight decay: multiply tensors of two or more dimensions."""

    @abstractmethod
    def params(self, k: int) -> Tensors:
        """Client k's tensors; none where they are the model's own."""


class _Stacked(_Theta):
    """Tensors of K clients on a leading axis; every position is computed from the last `aim`, so none drifts."""

    def __init__(self, learner: Learner, jobs: Sequence[Job], requests: Sequence[Probe]) -> None:
        starts = [_start(learner, request) for request in requests]
        self.starts, self.device = starts, learner.device
        self.now = {n: torch.stack([_float(s[n]).to(self.device) for s in starts]) for n in starts[0]}
        rest = jobs[0].frozen or {n: t for n, t in learner.initial().items() if n not in self.now}
        spread = {n: t.to(self.device).expand(len(jobs), *t.shape) for n, t in rest.items()}
        fixed = {
            n: torch.stack([(r.fixed or {})[n].to(self.device) for r in requests]) for n in requests[0].fixed or ()
        }
        self.others = {**spread, **fixed}
        self.moving = {n for n, t in self.now.items() if t.is_floating_point()}
        self.base, self.z = self.now, {}

    def using(self) -> Tensors:
        return {**self.others, **self.now}

    def aim(self, seeds: Sequence[int]) -> None:
        self.base = self.now
        self.z = {
            n: noise(seeds, n, 0, t[0].numel(), self.device).view(t.shape).to(t.dtype)
            for n, t in self.base.items()
            if n in self.moving
        }

    def go(self, to: Sequence[float]) -> None:
        far = torch.tensor(to, dtype=torch.float64)
        self.now = {n: t + self.z[n] * _by_client(far, t) if n in self.moving else t for n, t in self.base.items()}

    def shrink(self, factors: Sequence[float]) -> None:
        by = torch.tensor(factors, dtype=torch.float64)
        self.now = {n: t * _by_client(by, t) if n in self.moving and t.dim() > 2 else t for n, t in self.now.items()}

    def params(self, k: int) -> Tensors:
        return {n: t[k].cpu() for n, t in self.now.items()}


class _Lent(_Theta):
    """One client's weights, inside the model."""

    def __init__(self, weights: Tensors) -> None:
        self.weights, self.seed, self.at = weights, 0, 0.0

    def using(self) -> None:
        return None

    def aim(self, seeds: Sequence[int]) -> None:
        self.seed, self.at = seeds[0], 0.0

    def go(self, to: Sequence[float]) -> None:
        if to[0] != self.at:
            shift_(self.weights, self.seed, to[0] - self.at)
        self.at = to[0]

    def shrink(self, factors: Sequence[float]) -> None:
        for tensor in self.weights.values():
            if tensor.dim() > 1:
                tensor.mul_(factors[0])

    def params(self, k: int) -> Tensors:
        return {}


@dataclass
class _Spent:
    """What one client's probes found and took."""

    slopes: list[float] = field(default_factory=list)
    loss: float = 0.0
    targets: int = 0
    examples: int = 0
    tokens: int = 0


def _answer(theta: _Theta, learner: Learner, jobs: Sequence[Job], requests: Sequence[Probe]) -> list[Result]:
    first, spent = requests[0], [_Spent() for _ in jobs]
    if first.measure:
        return _measured(theta, learner, jobs, first.split)
    windows = _windows(jobs, first)
    window = next(windows)
    for step in range(len(first.seeds)):
        window = next(windows) if step and first.lr is not None else window
        theta.aim([r.seeds[step] for r in requests])
        theta.go([first.eps] * len(jobs))
        above = _losses(theta, learner, window)
        theta.go([-first.eps] * len(jobs))
        below = _losses(theta, learner, window)
        moves, decays = [0.0] * len(jobs), [1.0] * len(jobs)
        for k, request in enumerate(requests):
            slope = _note(spent[k], [e for batch in window for e in batch[k]], above[k], below[k], request)
            if request.lr is not None and slope is not None:
                moves[k], decays[k] = -request.lr * slope, 1.0 - request.lr * request.decay
        theta.go(moves)
        if first.lr is not None and any(decay != 1.0 for decay in decays):
            theta.shrink(decays)
    return [_report(theta, job, r, s, k) for k, (job, r, s) in enumerate(zip(jobs, requests, spent, strict=True))]


def _windows(jobs: Sequence[Job], request: Probe) -> Iterator[Window]:
    """The examples of each probe; those of a round are the same whenever it is asked."""
    held = [job.examples(request.split) for job in jobs]
    for job, examples in zip(jobs, held, strict=True):
        if not examples:
            raise no_data(job.client, request.split)
    streams = [
        steps_of(len(examples), request.train, job.seed, job.client, job.round)
        for examples, job in zip(held, jobs, strict=True)
    ]
    while True:
        taken = [next(stream) for stream in streams]
        yield [
            [[held[k][i] for i in batch] for k, batch in enumerate(turn)] for turn in zip_longest(*taken, fillvalue=())
        ]


def _losses(theta: _Theta, learner: Learner, window: Window) -> list[float]:
    """The sum of each client's losses over a window."""
    with learner.using(theta.using()):
        return torch.stack([learner.losses(groups).double().cpu() for groups in window]).sum(0).tolist()


def _note(spent: _Spent, seen: Sequence[Example], above: float, below: float, request: Probe) -> float | None:
    """Record one probe; its slope as it travels (float32), or None where the seed is skipped."""
    targets = sum(e.targets for e in seen)
    gap = torch.tensor((above - below) / max(targets, 1), dtype=torch.float64)
    slope = (gap / (2 * request.eps)).float()
    spent.examples += len(seen)
    spent.tokens += sum(e.tokens for e in seen)
    if not bool(torch.isfinite(slope)) or (request.limit is not None and abs(float(gap)) > request.limit):
        spent.slopes.append(float("nan"))
        return None
    spent.slopes.append(float(slope))
    spent.loss += (above + below) / 2
    spent.targets += targets
    return float(slope)


def _report(theta: _Theta, job: Job, request: Probe, spent: _Spent, k: int) -> Result:
    params = theta.params(k) if request.lr is not None else {}
    skipped = sum(slope != slope for slope in spent.slopes)
    if (skipped and skipped == len(spent.slopes)) or finite(params) is not None:
        return RoundFailed(
            f"{skipped} of {len(spent.slopes)} probes of '{job.client}' gave no usable loss in round {job.round}.",
            "A loss must be finite, and the two of a probe no further apart than the limit.",
            action="Lower train.lr or the perturbation, or look at that client's data.",
        )
    delta = subtract(params, theta.starts[k]) if params and isinstance(theta, _Stacked) else {}
    steps = len(spent.slopes)
    rates = (request.lr or 0.0) * (steps - skipped)
    slopes = torch.tensor(spent.slopes, dtype=torch.float32)
    loss = spent.loss, float(spent.targets)
    return ProbeReport(params, delta, steps, rates, loss, spent.examples, spent.tokens, None, slopes)


def _measured(theta: _Theta, learner: Learner, jobs: Sequence[Job], split: str) -> list[Result]:
    own = theta.using() is None
    found = run_together(
        learner, [replace(job, request=Score(None if own else theta.params(k), split)) for k, job in enumerate(jobs)]
    )
    empty = {}, {}, 0, 0.0, (0.0, 0.0), 0, 0
    return [ProbeReport(*empty, score=score) if isinstance(score, ScoreReport) else score for score in found]


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """float32 or better; integers stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _by_client(factors: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return factors.to(tensor.device, tensor.dtype).view(-1, *([1] * (tensor.dim() - 1)))


# ---------------------------------------------------------------------------------------------------------------------
# where a turn starts


@dataclass
class _Known:
    """What is remembered of a learner: its own weights on disk, and the last start made from directions."""

    weights: _Disk | None = None
    moved: _Disk | None = None
    key: str = ""
    start: tuple[str, Tensors] | None = None


_KNOWN: WeakKeyDictionary[Learner, _Known] = WeakKeyDictionary()


def _start(learner: Learner, request: Probe) -> Tensors:
    """The tensors a client starts from, with its directions added."""
    if request.start is not None:
        return request.start if request.replay is None else _moved(request.start, request.replay)
    first = learner.initial() if request.first is None else request.first()
    if request.replay is None:
        return first
    known, key = _KNOWN.setdefault(learner, _Known()), _key(first, request.replay)
    if known.start is None or known.start[0] != key:
        known.start = key, _moved(first, request.replay)
    return known.start[1]


def _moved(start: Tensors, directions: Directions) -> Tensors:
    return replay({n: _float(t) for n, t in start.items()}, directions.seeds, directions.values, directions.scale)


@contextmanager
def _borrowed(learner: Learner, weights: Tensors, directions: Directions | None) -> Generator[None]:
    """The weights with `directions` added; afterwards they have the bits they had before."""
    known = _KNOWN.setdefault(learner, _Known())
    if known.weights is None:
        disk = _Disk()
        disk.write(weights)
        known.weights = disk
    try:
        if directions is not None and bool(torch.count_nonzero(directions.values)):
            key = _key(weights, directions)
            if known.moved is not None and known.key == key:
                known.moved.read(weights)
            else:
                replay_(weights, directions.seeds, directions.values, directions.scale)
                known.key, known.moved = "", known.moved or _Disk()
                known.moved.write(weights)
                known.key = key
        yield
    finally:
        known.weights.read(weights)


def _key(tensors: Mapping[str, torch.Tensor], directions: Directions) -> str:
    """A digest of the names and shapes of tensors and of directions, but not of the tensors' entries."""
    values = directions.values.detach().double().cpu().contiguous()
    facts = [(n, tuple(t.shape)) for n, t in tensors.items()], list(directions.seeds), directions.scale
    return hashlib.sha256(repr(facts).encode() + values.numpy().tobytes()).hexdigest()


class _Disk:
    """Tensors as raw bytes in a file without a name, which is gone when the process is."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the model)

    def write(self, tensors: Tensors) -> None:
        """Keep the bytes of `tensors`."""
        try:
            self.file.seek(0)
            for tensor in tensors.values():
                self.file.write(tensor.cpu().contiguous().numpy().data)
            self.file.flush()
        except OSError as fault:
            raise RunError(
                f"The model's weights cannot be kept on disk while they are moved: {fault.strerror}.",
                f"{sum(t.nbytes for t in tensors.values())} bytes are needed in {tempfile.gettempdir()}.",
                action="Free some space there, or set TMPDIR to another folder.",
            ) from fault

    def read(self, tensors: Tensors) -> None:
        """Put the bytes back into `tensors`."""
        self.file.seek(0)
        for tensor in tensors.values():
            direct = tensor.device.type == "cpu" and tensor.is_contiguous()
            place = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
            if self.file.readinto(place.numpy().reshape(-1).view("uint8")) != tensor.nbytes:  # type: ignore[attr-defined]
                raise RunError("The model's weights cannot be read back from disk.", action="Start the run again.")
            if not direct:
                tensor.copy_(place)

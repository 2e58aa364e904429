"""Crew - several processes of this machine that share the passes of a cohort.

Only requests for the model go to the others: each has the base model and answers jobs as this process does. Client
halves, private stores, guards, codecs and the server stay here, so that nothing is said to a method or an attacker that
one process would not say. Which jobs go where follows from their number alone, and results come in the order of the
jobs. The processes pickle what they say to each other: the pipe between them has no name, and what came from elsewhere
was decoded before (see :mod:`fedllm.core.wire`).
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import pickle
import signal
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fedllm.core.errors import ConfigError, FedLLMError, RunError
from fedllm.core.guard import PrivateFit
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example, Learner, Probe, Request
from fedllm.engine.driver import answered
from fedllm.engine.job import Job
from fedllm.engine.passes import Passes
from fedllm.engine.width import part_of_threads

Build = Callable[[int], Mapping[str, Learner]]
"""Makes the learners of process number 1, 2, ...: name -> learner. It is pickled, so it must be found by its name."""
HELD_TOKENS = 20_000_000
"""Prepared tokens that each of the others keeps; those not asked for the longest are sent again."""


@dataclass(frozen=True)
class Order:
    """What travels of a job.

    Attributes:
        request: the request.
        place: client, seed, round, rounds.
        held: the number of the examples that it reads; None where it reads none.
        frozen: the names of :attr:`fedllm.engine.job.Job.frozen`; every learner has the same first values.
        moves: the names of the tensors that a probe without a start moves.
        passes: how the rows of a step are cut into passes.
        noised: how single examples are kept private.
    """

    request: Request
    place: tuple[str, int, int, int]
    held: int | None
    frozen: tuple[str, ...]
    moves: tuple[str, ...] | None
    passes: Passes
    noised: PrivateFit | None


@dataclass(frozen=True)
class Letter:
    """Orders for one learner, and the examples that come and go with them."""

    learner: str
    orders: list[Order]
    given: dict[int, list[Example]]
    gone: list[int]


class Crew:
    """The other processes; they are started when there is something to share, and end with this object.

    Args:
        build: makes the learners of another process.
        processes: all processes, this one among them; while they work, each has its part of this one's threads.
        learners: the learners of this process, by the names that `build` gives.
    """

    def __init__(self, build: Build, processes: int, learners: Mapping[str, Learner]) -> None:
        if processes < 1:
            raise ConfigError(f"processes={processes} cannot work.", "At least 1.", "1")
        self.build, self.processes = build, processes
        self.names = {id(learner): name for name, learner in learners.items()}
        self.on_cpu = any(learner.device.type == "cpu" for learner in learners.values())
        self.mates: list[_Mate] = []

    def run(self, learner: Learner, jobs: list[Job]) -> Iterator[Any]:
        """The results of alike jobs in their order: those of the first share while the others work on theirs."""
        if self.processes == 1 or len(jobs) == 1:
            yield from answered(learner, jobs)
            return
        first, *rest = _cut(jobs, self.processes)
        with part_of_threads(self.processes) as threads:
            for number in range(len(self.mates) + 1, len(rest) + 1):
                self.mates.append(_Mate(self.build, number, threads))
            asked = list(zip(self.mates, rest, strict=False))
            for mate, share in asked:
                mate.ask(self.names[id(learner)], share)
            found = answered(learner, first)
        yield from found
        for mate, _ in asked:
            yield from mate.answer()

    def notes(self, cohort: int) -> list[str]:
        """What a user should know of processes without work, or without a thread of their own."""
        given, found = f"processes={self.processes} was given, more than", list[str]()
        if cohort < self.processes:
            found.append(f"{given} the clients of a round ({cohort}): the others have nothing to do.")
        if self.on_cpu and (threads := torch.get_num_threads()) < self.processes:
            found.append(f"{given} the threads that there are ({threads}): they wait for each other.")
        return found

    def close(self) -> None:
        """End the other processes; the next work to share starts new ones."""
        for mate in self.mates:
            mate.close()
        self.mates = []


class _Mate:
    """One of the other processes, as seen from here."""

    def __init__(self, build: Build, number: int, threads: int) -> None:
        self.number, self.asked, self.busy = number, 0, False
        self.faults: dict[int, Exception] = {}
        context = multiprocessing.get_context("spawn")
        self.end, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, number, threads), daemon=True)
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as fault:
            raise _unknown_there("The model's recipe", fault) from fault
        theirs.close()
        self.held: OrderedDict[int, tuple[int, list[Example], int]] = OrderedDict()
        self.gone: list[int] = []
        self.named = 0
        self._ended = weakref.finalize(self, _end, self.end, self.process)

    def ask(self, learner: str, jobs: Sequence[Job]) -> None:
        """Send jobs; the process works on them while this one goes on."""
        if self.busy:  # nobody took the last answer: it is in the way
            self._receive()
        given: dict[int, list[Example]] = {}
        orders: list[Order] = []
        self.asked, self.faults = len(jobs), {}
        for place, job in enumerate(jobs):
            try:
                orders.append(self._order(job, given))
            except Exception as fault:  # its rows cannot be read: that is this client's alone
                self.faults[place] = fault
        self._forget({order.held for order in orders})
        try:
            letter = _dumps(Letter(learner, orders, given, self.gone))
        except (pickle.PicklingError, AttributeError, TypeError) as fault:
            self.held = OrderedDict((key, held) for key, held in self.held.items() if held[0] not in given)
            raise _unknown_there(f"What the client half of '{jobs[0].client}' asks for", fault) from fault
        try:
            self.end.send_bytes(letter)
        except OSError as fault:
            raise self._dead() from fault
        self.gone, self.busy = [], True

    def answer(self) -> list[Any]:
        """The results of the last jobs; raises what kept the process from working on them."""
        found = self._receive()
        if isinstance(found, BaseException):
            raise found
        results = iter(found)
        return [self.faults[place] if place in self.faults else next(results) for place in range(self.asked)]

    def close(self) -> None:
        """End the process."""
        self._ended()

    def _receive(self) -> Any:
        try:
            found = _loads(self.end.recv_bytes())
        except (EOFError, OSError) as fault:
            raise self._dead() from fault
        self.busy = False
        return found

    def _order(self, job: Job, given: dict[int, list[Example]]) -> Order:
        request, moves = job.request, None
        if isinstance(request, Probe):
            if request.start is None and request.first is not None:
                moves = tuple(request.first())
            request = replace(request, first=None)
        place = job.client, job.seed, job.round, job.rounds
        return Order(request, place, self._number(job, given), tuple(job.frozen), moves, job.passes, job.noised)

    def _number(self, job: Job, given: dict[int, list[Example]]) -> int | None:
        """The number under which the process holds a job's examples; they are given where it does not."""
        split = getattr(job.request, "split", None)
        if split is None or getattr(job.request, "rows", None) is not None:
            return None
        examples = job.examples(split)
        if id(examples) not in self.held:
            self.named += 1
            self.held[id(examples)] = self.named, examples, sum(example.tokens for example in examples)
            given[self.named] = examples
        self.held.move_to_end(id(examples))
        return self.held[id(examples)][0]

    def _forget(self, used: set[int | None]) -> None:
        """Have the process forget examples that are too many: not those that are used now."""
        tokens = sum(tokens for _, _, tokens in self.held.values())
        for key, (number, _, own) in list(self.held.items()):
            if tokens <= HELD_TOKENS or number in used:
                break
            del self.held[key]
            self.gone.append(number)
            tokens -= own

    def _dead(self) -> RunError:
        self.process.join(1.0)
        code = self.process.exitcode
        how = f"ended with {code}" if code is not None else "does not answer"
        if code is not None and code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return RunError(
            f"Process {self.number} of this run {how}.",
            "Memory may have been short: every process holds the model.",
            action="Lower 'processes' in recipe.yaml of the run's folder, then 'fedllm resume' it; a script that "
            "starts a run needs its call under: if __name__ == '__main__'.",
        )


def _cut(jobs: list[Job], parts: int) -> list[list[Job]]:
    """Jobs in at most `parts` shares, side by side, whose lengths differ by at most one; the first is the largest."""
    parts, stream = min(parts, len(jobs)), iter(jobs)
    size, more = divmod(len(jobs), parts)
    return [list(itertools.islice(stream, size + (number < more))) for number in range(parts)]


def _unknown_there(what: str, fault: BaseException) -> ConfigError:
    return ConfigError(
        f"{what} cannot be sent to another process: {fault}.",
        "Functions and classes are sent by their names: those at the top of a module can be found there.",
        action="Move it to the top of a module, or set processes=1.",
    )


def _end(end: Connection, process: BaseProcess) -> None:
    """The process sees that nobody is there any more, and ends; one in the middle of a pass is not waited for."""
    end.close()
    process.join(0.5)
    if process.is_alive():
        process.terminate()
        process.join(5.0)


# ---------------------------------------------------------------------------------------------------------------------
# the other process


def _serve(end: Connection, build: Build, number: int, threads: int) -> None:
    """Answer letters until the first process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what an interruption means
    torch.set_num_threads(threads)
    desk: _Desk | None = None
    while True:
        try:
            letter = end.recv_bytes()
            try:
                desk = _Desk(build(number)) if desk is None else desk
                found: Any = desk.answer(_loads(letter))
            except Exception as fault:
                found = _sendable(fault)
            end.send_bytes(_dumps(found))
        except (EOFError, OSError):
            return


class _Desk:
    """What the other process holds, and how it answers."""

    def __init__(self, learners: Mapping[str, Learner]) -> None:
        self.learners = learners
        self.held: dict[int, list[Example]] = {}
        self.frozen: dict[tuple[str, tuple[str, ...]], Tensors] = {}

    def answer(self, letter: Letter) -> list[Any]:
        """One result for each order."""
        for number in letter.gone:
            del self.held[number]
        self.held.update(letter.given)
        jobs = [self._job(letter.learner, order) for order in letter.orders]
        return [_sendable(result) for result in answered(self.learners[letter.learner], jobs)] if jobs else []

    def _job(self, name: str, order: Order) -> Job:
        request, examples = order.request, [] if order.held is None else self.held[order.held]
        if isinstance(request, Probe) and order.moves is not None:
            request = replace(request, first=partial(_first, self.learners[name], order.moves))
        key = name, order.frozen
        if key not in self.frozen:
            self.frozen[key] = _first(self.learners[name], order.frozen) if order.frozen else {}
        return Job(request, *order.place, lambda split: examples, self.frozen[key], order.passes, order.noised)


def _first(learner: Learner, names: Sequence[str]) -> Tensors:
    """The first values of some tensors."""
    first = learner.initial()
    return {name: first[name] for name in names}


def _sendable(result: Any) -> Any:
    """A result, or an error, that comes through whole: errors of ours do, of others the name and the text."""
    if isinstance(result, BaseException) and not isinstance(result, FedLLMError):
        return Foreign(type(result).__name__, str(result))
    return result


class Foreign(Exception):
    """An error that is not ours; at the other end it is one of the same name and text."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _foreign, self.args


def _foreign(kind: str, text: str) -> Exception:
    return type(kind, (Exception,), {})(text)


# ---------------------------------------------------------------------------------------------------------------------
# what travels


class _Pickler(pickle.Pickler):
    """Tensors travel as their bytes: torch's own way takes a tenth of a millisecond for each."""

    def reducer_override(self, value: Any) -> Any:
        """See :class:`pickle.Pickler`."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        held = value.detach().cpu().contiguous()
        data = pickle.PickleBuffer(held.reshape(-1).view(torch.uint8).numpy().data)
        return _tensor, (data, held.dtype, tuple(held.shape))


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()


def _loads(data: bytes) -> Any:
    return pickle.loads(data)

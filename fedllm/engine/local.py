"""Local engine - the default: every client in this process, a cohort in one pass over one frozen base model."""

from __future__ import annotations

import itertools
import time
import traceback
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy
import torch

from fedllm.core.errors import ConfigError, DataError, FedLLMError
from fedllm.core.guard import Guard
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method
from fedllm.core.protocol import Protocol
from fedllm.core.roster import ALL, SERVER, Group
from fedllm.core.server import Reply, Request
from fedllm.core.split import halves
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode, encode
from fedllm.core.work import Embed, Example, Exchange, Generate, Learner, Outputs, Rows, Score
from fedllm.core.work import Request as Work
from fedllm.engine.client import TurnClient
from fedllm.engine.crew import Crew
from fedllm.engine.driver import Turn, drive
from fedllm.engine.job import Job, bound_names, no_data
from fedllm.engine.private import PrivateStore
from fedllm.engine.width import Width

PUBLIC = "public"
"""The split that is the same for every client: rows that anybody may read."""
CACHE_TOKENS = 20_000_000
"""Prepared tokens kept over all clients; the least recently used client's are dropped beyond it."""


class Coder(Interface):
    """What makes uploads smaller; see :mod:`fedllm.modes.codec`."""

    @property
    def memory_name(self) -> str:
        """The name under which a client's private store keeps what the code lost."""
        ...

    def encode(
        self, upload: Upload, memory: Tensors | None, rng: numpy.random.Generator
    ) -> tuple[Upload, Tensors | None]:
        """The coded upload and the new memory."""
        ...


class LocalWorker:
    """Answers requests for every client whose rows it can read.

    Args:
        learner: the base model with its trainable tensors and its task.
        algorithm: the method or protocol; only its client-side functions can be asked for.
        rows: where clients' rows come from.
        seed: the run's seed.
        private_folder: where private stores are written; None keeps them in memory.
        debug: let an exception inside client code through instead of answering with an error.
        roster: client id -> its group; who is not in it belongs to the group of all.
        learners: models of groups that have one of their own, by the group's name.
        left: trainable tensors of the learner that this algorithm does not know; they stay at their first values.
        coder: codes the uploads of `work`; None leaves them as they are.
        guard: what it does at clients in `work`.

    Attributes:
        width: how the clients of a request share passes; a :class:`LocalEngine` sets it.
        crew: the processes that share the passes; None: this one alone.
        discreet: errors that may quote data are told by their kind alone, and printed here.
    """

    crew: Crew | None = None
    discreet = False

    def __init__(
        self,
        learner: Learner,
        algorithm: Method | Protocol,
        rows: Rows,
        seed: int,
        private_folder: Path | None = None,
        debug: bool = False,
        roster: Mapping[str, Group] | None = None,
        learners: Mapping[str, Learner] | None = None,
        left: Collection[str] = (),
        coder: Coder | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.learner, self.algorithm, self.rows, self.seed = learner, algorithm, rows, seed
        self.debug, self.roster, self.learners, self.left = debug, roster or {}, learners or {}, frozenset(left)
        self.functions = algorithm.client_functions()
        self.guard = guard or Guard()
        self.coder, self.width = coder, Width(1, "nobody asked for more")
        kept = () if coder is None else (coder.memory_name,)
        self.private = PrivateStore((*algorithm.private, *self.guard.private, *kept), private_folder)
        self._examples: OrderedDict[tuple[str, str], list[Example]] = OrderedDict()
        self._cached = 0
        self._rest: dict[tuple[int, frozenset[str]], Tensors] = {}
        self._sessions: dict[str, Turn] = {}

    def answer(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Answer each request; a client that fails is an error reply, never an exception."""
        begun = time.perf_counter()
        turns: list[Turn] = []
        for request in requests:
            try:
                turns.append(self._turn(request))
            except Exception as fault:  # before its private entry was opened: there is nothing to drop
                if self.debug:
                    raise
                yield Reply(request.id, request.client, None, self._reason(fault))
        for turn, outcome in drive(turns, self.learner, self.width.clients, self.crew):
            yield self._reply(turn, outcome, {**turn.cost, "seconds": time.perf_counter() - begun})

    def group(self, client: str) -> Group:
        """The group of a client."""
        return self.roster.get(client, ALL)

    def learner_of(self, client: str) -> Learner:
        """The model of a client's group."""
        return self.learners.get(self.group(client).name, self.learner)

    def close(self, sessions: Sequence[str]) -> None:
        """End conversations and free what their coroutines hold."""
        for session in sessions:
            turn = self._sessions.pop(session, None)
            if turn is not None:
                turn.coroutine.close()
                self.private.drop(turn.client)

    def _reply(self, turn: Turn, outcome: Any, cost: dict[str, float]) -> Reply:
        """The encoded upload, or the reason why there is none."""
        waits = isinstance(outcome, Exchange)
        try:
            upload = _upload(outcome.upload if waits else outcome)
            if self.guard.quiet and turn.op == "work":  # losses, and how much was drawn, are not noised
                upload.metrics, cost = {}, {**cost, "tokens": 0.0}
            body = encode(self._coded(turn, upload))
        except Exception as fault:
            if self.debug:
                raise
            turn.coroutine.close()
            self.private.drop(turn.client)
            return Reply(turn.id, turn.client, None, self._reason(fault), cost)
        if not waits:
            self.private.rest(turn.client)
            return Reply(turn.id, turn.client, body, None, cost)
        session = turn.session or turn.id
        turn.session, turn.cost = session, {name: 0.0 for name in turn.cost}
        self._sessions[session] = turn
        return Reply(turn.id, turn.client, body, None, cost, session)

    def _reason(self, fault: BaseException) -> str:
        """What the server is told of a client's failure."""
        if self.discreet and (isinstance(fault, DataError) or not isinstance(fault, FedLLMError)):
            traceback.print_exception(fault)
            return f"{type(fault).__name__} at the client; its text stays there, because it may quote data"
        return str(fault) if isinstance(fault, FedLLMError) else f"{type(fault).__name__}: {fault}"

    def _coded(self, turn: Turn, upload: Upload) -> Upload:
        """The upload as the coder sends it; what the code lost stays in the client's private store."""
        if self.coder is None or turn.op != "work":
            return upload
        view = turn.client_view
        before = view.private.get(self.coder.memory_name)
        coded, after = self.coder.encode(upload, before, view.rng("codec"))
        if after is not before and after is not None:
            view.private[self.coder.memory_name] = after
        return coded

    def examples(self, client: str, split: str) -> list[Example]:
        """The prepared examples of a client, from memory where they were used lately."""
        learner = self.learner_of(client)
        key = (f"{self.group(client).name}:" if split == PUBLIC else client, split)
        if key not in self._examples:
            self._examples[key] = learner.prepare(self.read(client, split))
            self._cached += sum(example.tokens for example in self._examples[key])
            while len(self._examples) > 1 and self._cached > CACHE_TOKENS:
                _, dropped = self._examples.popitem(last=False)
                self._cached -= sum(example.tokens for example in dropped)
        self._examples.move_to_end(key)
        return self._examples[key]

    def read(self, client: str, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a client's split; `public` is the same for everybody."""
        if split == PUBLIC:
            return self.guard.rows(SERVER, PUBLIC, self.rows.rows(SERVER, "train"))
        return self.guard.rows(client, split, self.rows.rows(client, split))

    def _turn(self, request: Request) -> Turn:
        if request.session is not None:
            return self._resumed(request)
        function = self.functions.get(request.op)
        if function is None:
            raise ConfigError.unknown("client-side function", request.op, self.functions)
        self.guard.allow(request.op, request.client)
        name, guard = request.client, self.guard if request.op == "work" else Guard()
        learner, sees = self.learner_of(name), self._sight(request.op)
        client = TurnClient(
            name,
            self.rows.size(name),
            request.round,
            request.rounds,
            request.population,
            self.private.open(name),
            self.seed,
            lambda split: self.read(name, sees(split)),
            lambda: {n: t for n, t in learner.initial().items() if self._moves(n)},
            lambda split: self._reader(name)(sees(split)),
            partial(halves, learner),
            self.group(name),
            request.turn,
        )

        async def play() -> Upload:
            return await guard.work(function, self.algorithm, client, self._received(request))

        asked = itertools.count()

        def job(work: Work) -> Job:
            place, noised = (name, self.seed, client.round, request.rounds), None
            if self.guard.hides and not guard.hides:
                _measures(work)
            if guard.hides:
                noised = guard.fit(name, client.round, next(asked), len(self._reader(name)("train")), work)
            others = self._others(learner, bound_names(work))
            return Job(work, *place, self._reader(name), others, self.width.passes, noised)

        return Turn(name, play(), job, request.id, request.op, learner=learner, client_view=client)

    def _received(self, request: Request) -> Received:
        received = decode(request.body)
        if not isinstance(received, Received):
            raise ConfigError(f"A request carries a {type(received).__name__.lower()}.", "Expected: received.")
        return received

    def _sight(self, op: str) -> Callable[[str], str]:
        """Gives a split back where a client half may read it, and raises where single examples are private."""
        if not self.guard.hides:
            return lambda split: split
        return _unseen if op == "work" else _held_out

    def _resumed(self, request: Request) -> Turn:
        """The turn of an open conversation, with what the server answered."""
        turn = self._sessions.pop(request.session or "", None)
        if turn is None:
            raise ConfigError(f"Client '{request.client}' has no open session '{request.session}'.")
        turn.id, turn.answer, turn.client_view.round = request.id, self._received(request), request.round
        return turn

    def _moves(self, name: str) -> bool:
        algorithm = self.algorithm
        return name not in self.left and (not isinstance(algorithm, Method) or algorithm.trainable(name))

    def _others(self, learner: Learner, bound: frozenset[str] | None) -> Tensors:
        """First values of the learner's trainable tensors that a request does not name."""
        if bound is None:
            return {}
        key = (id(learner), bound)
        if key not in self._rest:
            self._rest[key] = {n: t for n, t in learner.initial().items() if n not in bound}
        return self._rest[key]

    def _reader(self, client: str) -> Callable[[str], list[Example]]:
        def read(split: str) -> list[Example]:
            examples = self.examples(client, split)
            if not examples and split == "train":
                raise no_data(client, split)
            return examples

        return read


def _held_out(split: str) -> str:
    """Measurements are made of rows that nobody trains on."""
    return _unseen(split) if split == "train" else split


def _measures(work: Work) -> None:
    """Refuse what a measurement would make of training rows where single examples are private."""
    if not isinstance(work, Score | Outputs | Generate | Embed):
        raise ConfigError(
            f"The client half asks for '{type(work).__name__.lower()}' in a measurement.",
            "With privacy.level=example, a measurement is of held-out rows and trains nothing.",
            "fedavg",
            "Choose another method, or set privacy.level=client.",
        )
    if getattr(work, "split", "eval") == "train" and getattr(work, "rows", None) is None:
        _unseen("train")


def _unseen(split: str) -> str:
    """A client half reads rows where single examples are private."""
    raise ConfigError(
        f"The client half reads the rows of '{split}', and what it makes of them no noise would cover.",
        "With privacy.level=example, clients train on their own rows and do nothing else with them.",
        "fedavg",
        "Choose another method, or set privacy.level=client.",
    )


def _upload(outcome: Any) -> Upload:
    """What a client's turn ended with, if it is an upload; raises what went wrong otherwise."""
    if isinstance(outcome, BaseException):
        raise outcome
    if not isinstance(outcome, Upload):
        raise ConfigError(f"A client-side function returned a {type(outcome).__name__}.", "Expected: an Upload.")
    return outcome


class LocalEngine:
    """Asks a :class:`LocalWorker`, `width` clients at a time; implements :class:`fedllm.core.server.Engine`.

    Args:
        worker: answers the requests.
        client_ids: the registered clients.
        width: how clients share passes; a number is that many in every pass.
    """

    def __init__(self, worker: LocalWorker, client_ids: Sequence[str], width: int | Width = 1) -> None:
        self.worker, self._ids = worker, sorted(client_ids)
        self.width = width if isinstance(width, Width) else Width(width, "as asked")
        worker.width = self.width

    @property
    def client_ids(self) -> Sequence[str]:
        """The registered clients, sorted."""
        return self._ids

    async def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """See :class:`fedllm.core.server.Engine`. Clients that are stacked are answered together."""
        begun, waiting = time.monotonic(), iter(requests)
        together = self.width.stack if deadline is None else self.width.clients  # who is late is seen in between
        together *= 1 if self.worker.crew is None else self.worker.crew.processes
        while chunk := list(itertools.islice(waiting, together)):
            for reply in self._answered(chunk, begun, deadline):
                yield reply

    def _answered(self, chunk: Sequence[Request], begun: float, deadline: float | None) -> Iterator[Reply]:
        """The replies of clients that are answered together; those that come late are answered for."""
        if _late(begun, deadline):
            for request in chunk:
                self.worker.close([request.session] if request.session else [])
                yield _missed(request, deadline)
            return
        with torch.inference_mode(False):
            replies = list(self.worker.answer(chunk))
        for request, reply in zip(chunk, _in_order(chunk, replies), strict=True):
            if not _late(begun, deadline):
                yield reply
                continue
            if reply.session is not None:
                self.worker.close([reply.session])
            elif reply.body is not None:
                self.worker.private.drop(request.client)
            yield _missed(request, deadline)

    def group(self, client: str) -> Group:
        """See :class:`fedllm.core.server.Engine`."""
        return self.worker.group(client)

    def close(self, sessions: Sequence[str]) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        self.worker.close(sessions)

    def drop(self, client: str) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        self.worker.private.drop(client)

    def settle(self, accepted: Sequence[str]) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        self.worker.private.settle(accepted)


def _in_order(chunk: Sequence[Request], replies: Sequence[Reply]) -> list[Reply]:
    by_id = {reply.id: reply for reply in replies}
    return [by_id[request.id] for request in chunk]


def _late(begun: float, deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() - begun > deadline


def _missed(request: Request, deadline: float | None) -> Reply:
    return Reply(request.id, request.client, None, f"no answer within {deadline} s")

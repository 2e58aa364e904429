"""Local engine - the default: every client in this process, a cohort in one pass over one frozen base model."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.core.errors import ConfigError, FedLLMError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method
from fedllm.core.protocol import Protocol
from fedllm.core.server import Reply, Request
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode, encode
from fedllm.core.work import Example, Learner, Rows
from fedllm.core.work import Request as Work
from fedllm.engine.client import TurnClient
from fedllm.engine.driver import Turn, drive
from fedllm.engine.private import PrivateStore
from fedllm.engine.together import Job, no_data

CACHE_TOKENS = 20_000_000
"""Prepared tokens kept over all clients; the least recently used client's are dropped beyond it."""


class LocalWorker:
    """Answers requests for every client whose rows it can read.

    Args:
        learner: the base model with its trainable tensors and its task.
        algorithm: the method or protocol; only its client-side functions can be asked for.
        rows: where clients' rows come from.
        seed: the run's seed.
        private_folder: where private stores are written; None keeps them in memory.
        debug: let an exception inside client code through instead of answering with an error.
    """

    def __init__(
        self,
        learner: Learner,
        algorithm: Method | Protocol,
        rows: Rows,
        seed: int,
        private_folder: Path | None = None,
        debug: bool = False,
    ) -> None:
        self.learner, self.algorithm, self.rows, self.seed = learner, algorithm, rows, seed
        self.debug = debug
        self.functions = algorithm.client_functions()
        self.private = PrivateStore(algorithm.private, private_folder)
        self._examples: OrderedDict[tuple[str, str], list[Example]] = OrderedDict()
        self._cached = 0
        self._frozen = frozen(learner, algorithm)

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
                yield Reply(request.id, request.client, None, _reason(fault))
        for turn, outcome in drive(turns, self.learner):
            yield self._reply(turn.id, turn.client, outcome, {**turn.cost, "seconds": time.perf_counter() - begun})

    def _reply(self, id: str, client: str, outcome: Any, cost: dict[str, float]) -> Reply:
        """The encoded upload, or the reason why there is none."""
        try:
            return Reply(id, client, encode(_upload(outcome)), None, cost)
        except Exception as fault:
            if self.debug:
                raise
            self.private.drop(client)
            return Reply(id, client, None, _reason(fault), cost)

    def examples(self, client: str, split: str) -> list[Example]:
        """The prepared examples of a client, from memory where they were used lately."""
        key = (client, split)
        if key not in self._examples:
            self._examples[key] = self.learner.prepare(self.rows.rows(client, split))
            self._cached += sum(example.tokens for example in self._examples[key])
            while len(self._examples) > 1 and self._cached > CACHE_TOKENS:
                _, dropped = self._examples.popitem(last=False)
                self._cached -= sum(example.tokens for example in dropped)
        self._examples.move_to_end(key)
        return self._examples[key]

    def _turn(self, request: Request) -> Turn:
        function = self.functions.get(request.op)
        if function is None:
            raise ConfigError.unknown("client-side function", request.op, self.functions)
        client = TurnClient(
            request.client,
            self.rows.size(request.client),
            request.round,
            request.rounds,
            request.population,
            self.private.open(request.client),
            self.seed,
            lambda split: self.rows.rows(request.client, split),
        )

        async def play() -> Upload:
            received = decode(request.body)
            if not isinstance(received, Received):
                raise ConfigError(f"A request carries a {type(received).__name__.lower()}.", "Expected: received.")
            return await function(self.algorithm, client, received)

        def job(work: Work) -> Job:
            return Job(
                work,
                request.client,
                self.seed,
                request.round,
                request.rounds,
                self._reader(request.client),
                self._frozen,
            )

        return Turn(request.client, play(), job, request.id)

    def _reader(self, client: str) -> Callable[[str], list[Example]]:
        def read(split: str) -> list[Example]:
            examples = self.examples(client, split)
            if not examples and split == "train":
                raise no_data(client, split)
            return examples

        return read


def frozen(learner: Learner, algorithm: Any) -> Tensors:
    """The learner's trainable tensors that the method does not move."""
    if not isinstance(algorithm, Method):
        return {}
    return {name: tensor for name, tensor in learner.initial().items() if not algorithm.trainable(name)}


def _upload(outcome: Any) -> Upload:
    """What a client's turn ended with, if it is an upload; raises what went wrong otherwise."""
    if isinstance(outcome, BaseException):
        raise outcome
    if not isinstance(outcome, Upload):
        raise ConfigError(f"A client-side function returned a {type(outcome).__name__}.", "Expected: an Upload.")
    return outcome


def _reason(fault: BaseException) -> str:
    return str(fault) if isinstance(fault, FedLLMError) else f"{type(fault).__name__}: {fault}"


class LocalEngine:
    """Asks a :class:`LocalWorker`, `width` clients at a time; implements :class:`fedllm.core.server.Engine`.

    Args:
        worker: answers the requests.
        client_ids: the registered clients.
        width: how many clients share a pass.
    """

    def __init__(self, worker: LocalWorker, client_ids: Sequence[str], width: int = 1) -> None:
        self.worker, self._ids, self.width = worker, sorted(client_ids), width

    @property
    def client_ids(self) -> Sequence[str]:
        """The registered clients, sorted."""
        return self._ids

    async def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """See :class:`fedllm.core.server.Engine`. Clients that share a pass are answered together."""
        begun, waiting = time.monotonic(), iter(requests)
        while chunk := list(itertools.islice(waiting, self.width)):
            if _late(begun, deadline):
                for request in chunk:
                    yield _missed(request, deadline)
                continue
            with torch.inference_mode(False):
                replies = list(self.worker.answer(chunk))
            for request, reply in zip(chunk, _in_order(chunk, replies), strict=True):
                if _late(begun, deadline):
                    if reply.body is not None:
                        self.worker.private.drop(request.client)
                    yield _missed(request, deadline)
                    continue
                yield reply

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

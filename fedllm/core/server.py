"""Server - `ask`: run a client-side function at some clients and take the answers as they come.

The two small interfaces an engine implements are here as well: :class:`Engine` carries requests to clients and
streams replies back; a :class:`Worker` at the other end answers them. Both see only bytes and names, so a method
never knows which engine runs it, and no client can share a tensor with the server by accident.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedllm.core.errors import ConfigError, DecodeError, UploadRejected
from fedllm.core.message import Received, Upload
from fedllm.core.meter import Meter
from fedllm.core.seeds import derive
from fedllm.core.state import State
from fedllm.core.tensors import finite
from fedllm.core.wire import decode, encode, size_by_part


@dataclass(frozen=True)
class Request:
    """One question to one client.

    Attributes:
        id: unique in the run; a repeated id must be answered from memory, never computed twice.
        client: the client's id.
        op: name of the client-side function.
        round: the current round.
        rounds: rounds of the run.
        population: registered clients.
        body: an encoded :class:`~fedllm.core.message.Received`.
    """

    id: str
    client: str
    op: str
    round: int
    rounds: int
    population: int
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer: the encoded upload, or the reason why there is none.

    `cost` is what the client spent: tokens, steps, seconds.
    """

    id: str
    client: str
    body: bytes | None
    error: str | None = None
    cost: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Carries requests to clients."""

    @property
    def client_ids(self) -> Sequence[str]:
        """The registered clients, sorted."""
        ...

    def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """Stream replies: one for every request. Closing the stream early cancels what is still under way.

        Args:
            requests: read lazily, so that payloads need not lie in memory together.
            deadline: seconds after which a client that has not answered is answered for with an error.
        """
        ...

    def drop(self, client: str) -> None:
        """The last answer of this client was refused: what its turn left in its private store rolls back."""
        ...

    def settle(self, accepted: Sequence[str]) -> None:
        """The answers of these clients were used: their private stores are kept, those of others roll back."""
        ...


class Worker(Protocol):
    """Answers requests where the data is."""

    def answer(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Answer each; a client that fails is an error reply, never an exception."""
        ...


@dataclass(frozen=True)
class Answer:
    """One accepted upload."""

    client: str
    upload: Upload


@dataclass
class Server:
    """The side that holds the state. Methods and protocols talk to clients through it alone.

    Attributes:
        lost: clients that did not answer since the last :meth:`begin`, with reasons.
        rejected: clients whose upload was refused since then, with reasons.
    """

    engine: Engine
    seed: int
    meter: Meter = field(default_factory=Meter)
    rounds: int = 1
    round: int = 0
    lost: list[dict[str, str]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    keep: Callable[[State], None] = lambda state: None
    _accepted: list[str] = field(default_factory=list)
    _asked: int = 0

    @property
    def clients(self) -> Sequence[str]:
        """The ids of all registered clients, sorted."""
        return self.engine.client_ids

    async def ask(
        self,
        function: Callable[..., Any],
        payloads: Mapping[str, Received] | Iterable[tuple[str, Received]],
        deadline: float | None = None,
        enough: int | None = None,
    ) -> AsyncIterator[Answer]:
        """Run `function` at clients; yields accepted answers as they come.

        Args:
            function: a client-side function of the method or protocol (see :func:`~fedllm.core.method.on_client`).
            payloads: what each client receives; pairs may be produced lazily.
            deadline: seconds.
            enough: stop after so many accepted answers.

        An answer that cannot be decoded or is not finite is rejected, and a client that does not answer is lost:
        both are recorded and the stream goes on.
        """
        op = function.__name__
        if not getattr(function, "__on_client__", False):
            raise ConfigError(f"'{op}' is not a client-side function.", action="Mark it with @on_client.")
        pairs: Iterable[tuple[str, Received]] = payloads.items() if isinstance(payloads, Mapping) else payloads  # pyright: ignore[reportAssignmentType]
        replies, accepted = self.engine.ask(self._requests(op, pairs), deadline), 0
        async with aclosing(replies):
            async for reply in replies:
                upload = self._receive(op, reply)
                if upload is not None:
                    self._accepted.append(reply.client)
                    yield Answer(reply.client, upload)
                    accepted += 1
                    if accepted == enough:
                        return

    def reject(self, client: str, reason: str) -> None:
        """Take back an accepted answer that turned out unusable (wrong names or shapes)."""
        self._accepted.remove(client)
        self._refuse(client, reason)

    def _refuse(self, client: str, reason: str) -> None:
        self.rejected.append({"client": client, "reason": reason})
        self.engine.drop(client)

    def begin(self, round: int) -> None:
        """Begin a round or a measurement: from here on `lost` and `rejected` are counted."""
        self.round, self.lost, self.rejected = round, [], []

    def settle(self, commit: bool = True) -> None:
        """End of a round or phase: keep (or roll back) the private stores of the clients whose answers were used."""
        self.engine.settle(self._accepted if commit else [])
        self._accepted = []

    def checkpoint(self, state: State) -> None:
        """Make `state` durable (protocols call this where they could be resumed)."""
        self.engine.settle(self._accepted)
        self._accepted = []
        self.keep(state)

    def _requests(self, op: str, pairs: Iterable[tuple[str, Received]]) -> Iterator[Request]:
        for client, received in pairs:
            body = encode(received)
            self.meter.sent(op, "down", size_by_part(body))
            self._asked += 1
            name = f"{self.round}-{op}-{client}-{derive(self.seed, 'request', self._asked):016x}"
            yield Request(name, client, op, self.round, self.rounds, len(self.clients), body)

    def _receive(self, op: str, reply: Reply) -> Upload | None:
        self.meter.tokens += int(reply.cost.get("tokens", 0))
        self.meter.steps += int(reply.cost.get("steps", 0))
        if reply.body is None:
            self.lost.append({"client": reply.client, "reason": reply.error or "no answer"})
            return None
        try:
            message = decode(reply.body)
        except DecodeError as fault:
            self.meter.sent(op, "up", {"undecodable": len(reply.body)})
            self._refuse(reply.client, str(fault))
            return None
        self.meter.sent(op, "up", size_by_part(reply.body))
        try:
            if not isinstance(message, Upload):
                raise UploadRejected(f"Client '{reply.client}' sent a {type(message).__name__.lower()}.")
            _validate(message, reply.client)
        except UploadRejected as fault:
            self._refuse(reply.client, str(fault))
            return None
        return message


def _validate(upload: Upload, client: str) -> None:
    """Raise :class:`UploadRejected` unless everything in the upload is finite."""
    for name, part in upload.parts.items():
        tensors, facts = part.to_wire()
        bad = finite(tensors)
        if bad is not None:
            raise UploadRejected(f"Client '{client}' sent a value that is not finite in '{name}/{bad}'.")
        _check_numbers(facts, client)
    _check_numbers([upload.metrics, upload.numbers], client)


def _check_numbers(facts: Any, client: str) -> None:
    try:
        json.dumps(facts, allow_nan=False)
    except ValueError as fault:
        raise UploadRejected(f"Client '{client}' sent a number that is not finite.") from fault
    except RecursionError as fault:
        raise UploadRejected(f"Client '{client}' sent facts that are nested too deeply.") from fault

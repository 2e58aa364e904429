"""Server - `ask`: run a client-side function at some clients and take the answers as they come.

The two small interfaces an engine implements are here as well: :class:`Engine` carries requests to clients and
streams replies back; a :class:`Worker` at the other end answers them. Both see only bytes and names, so a method
never knows which engine runs it, and no client can share a tensor with the server by accident.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedllm.core.errors import ConfigError, DecodeError, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.message import Received, Upload
from fedllm.core.meter import Meter
from fedllm.core.roster import Group, Member
from fedllm.core.seeds import derive
from fedllm.core.split import Body, halves
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, finite
from fedllm.core.wire import Encoder, opened, size_by_part


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
        turn: how often this client was asked before in this round.
        session: the conversation this goes on with; None opens one.
    """

    id: str
    client: str
    op: str
    round: int
    rounds: int
    population: int
    body: bytes
    turn: int = 0
    session: str | None = None


@dataclass(frozen=True)
class Reply:
    """An answer: the encoded upload, or the reason why there is none.

    `cost` is what the client spent: tokens, steps, seconds. `session` is set while the client waits for an answer.
    """

    id: str
    client: str
    body: bytes | None
    error: str | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    session: str | None = None


class Engine(Protocol):
    """Carries requests to clients."""

    @property
    def client_ids(self) -> Sequence[str]:
        """The registered clients, sorted."""
        ...

    def group(self, client: str) -> Group:
        """The group of a registered client."""
        ...

    def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """Stream replies: one for every request. Closing the stream early cancels what is still under way.

        Args:
            requests: read lazily, so that payloads need not lie in memory together.
            deadline: seconds after which a client that has not answered is answered for with an error.
        """
        ...

    def close(self, sessions: Sequence[str]) -> None:
        """End these conversations: the clients' coroutines, and all they hold, are freed."""
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
    """One accepted upload; `session` is set where the client waits for :meth:`Server.reply`."""

    client: str
    upload: Upload
    session: str | None = None


@dataclass
class Server:
    """The side that holds the state. Methods and protocols talk to clients through it alone.

    Attributes:
        lost: clients that did not answer since the last :meth:`begin`, with reasons.
        rejected: clients whose upload was refused since then, with reasons.
        opened: undoes what a mode did to an upload of `work` (a codec), given `expected`; None where there is none.
        expected: what the method expects of each part in this round.
        learner: the server's own model, for protocols in which it holds a part; None where it has none.
        guard: what stands between uploads and the method.
        enough: so many usable uploads make up a round, and no more are waited for; None: all that come.
    """

    engine: Engine
    seed: int
    meter: Meter = field(default_factory=Meter)
    rounds: int = 1
    round: int = 0
    lost: list[dict[str, str]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    keep: Callable[[State], None] = lambda state: None
    turn: int = 0
    enough: int | None = None
    learner: object = None
    opened: Callable[[Upload, Mapping[str, Tensors]], Upload] | None = None
    expected: Mapping[str, Tensors] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    _open: dict[str, tuple[str, str]] = field(default_factory=dict)
    _accepted: list[str] = field(default_factory=list)
    _asked: int = 0

    @property
    def clients(self) -> Sequence[str]:
        """The ids of all registered clients, sorted."""
        return self.engine.client_ids

    @property
    def waiting(self) -> frozenset[str]:
        """The sessions whose clients wait for :meth:`reply`."""
        return frozenset(self._open)

    def body(self, first: int, last: int | None) -> Body:
        """The server's part, layers first..last-1, of a split model; see :func:`fedllm.core.split.halves`."""
        return halves(self.learner, first, last).body

    def member(self, client: str) -> Member:
        """A registered client with its group."""
        return Member(client, self.engine.group(client))

    async def ask(
        self,
        function: Callable[..., Any],
        payloads: Mapping[str, Received] | Iterable[tuple[str, Received]],
        deadline: float | None = None,
        enough: int | None = None,
    ) -> AsyncGenerator[Answer, None]:
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
        async with aclosing(
            self._stream(self._requests((op, c, r, None) for c, r in pairs), deadline, enough)
        ) as found:
            async for answer in found:
                yield answer

    async def reply(
        self, payloads: Mapping[str, Received], deadline: float | None = None, enough: int | None = None
    ) -> AsyncGenerator[Answer, None]:
        """Answer clients that wait in a session: session -> what they receive; yields what they say next.

        A session that fails, is late or whose upload is refused is over: the client is in `lost` or `rejected`.
        """
        unknown = next((session for session in payloads if session not in self._open), None)
        if unknown is not None:
            raise ConfigError(f"There is no open session '{unknown}'.", "It may have ended, failed or been closed.")
        triples = [(*self._open.pop(session), session, received) for session, received in payloads.items()]
        requests = self._requests((op, client, received, session) for client, op, session, received in triples)
        async with aclosing(self._stream(requests, deadline, enough)) as found:
            async for answer in found:
                yield answer

    def close(self, sessions: Sequence[str]) -> None:
        """End conversations: what the clients hold for them is freed and their turn counts for nothing."""
        for session in sessions:
            self._open.pop(session, None)
        self.engine.close(sessions)

    async def _stream(
        self, requests: Iterator[Request], deadline: float | None, enough: int | None
    ) -> AsyncGenerator[Answer, None]:
        names: dict[str, str] = {}

        def noted() -> Iterator[Request]:
            for request in requests:
                names[request.id] = request.op
                yield request

        replies, accepted = self.engine.ask(noted(), deadline), 0
        async with aclosing(replies):
            async for reply in replies:
                op = names.get(reply.id, "")
                upload = self._receive(op, reply)
                if upload is None:
                    if reply.session is not None:
                        self.engine.close([reply.session])
                    continue
                if reply.session is None:
                    self._accepted.append(reply.client)
                else:
                    self._open[reply.session] = (reply.client, op)
                yield Answer(reply.client, upload, reply.session)
                accepted += 1
                if accepted == enough:
                    return

    def reject(self, client: str, reason: str) -> None:
        """Take back an accepted answer that turned out unusable (wrong names or shapes)."""
        if client in self._accepted:
            self._accepted.remove(client)
        self._refuse(client, reason)

    def _refuse(self, client: str, reason: str) -> None:
        self.rejected.append({"client": client, "reason": reason})
        self.engine.drop(client)

    def begin(self, round: int) -> None:
        """Begin a round or a measurement: from here on `lost` and `rejected` are counted."""
        self.round, self.turn, self.lost, self.rejected = round, 0, [], []

    def settle(self, commit: bool = True) -> None:
        """End of a round or phase: keep (or roll back) the private stores of the clients whose answers were used."""
        self.engine.settle(self._accepted if commit else [])
        self._accepted = []

    def checkpoint(self, state: State) -> None:
        """Make `state` durable (protocols call this where they could be resumed)."""
        self.engine.settle(self._accepted)
        self._accepted = []
        self.keep(state)

    def _requests(self, asked: Iterable[tuple[str, str, Received, str | None]]) -> Iterator[Request]:
        encode, last, sizes = Encoder(), b"", dict[str, int]()
        for op, client, received, session in asked:
            self.guard.allow(op, client)
            body = encode(received)
            if body is not last:
                last, sizes = body, size_by_part(body)
            self.meter.sent(op, "down", sizes)
            self._asked += 1
            name = f"{self.round}-{op}-{client}-{derive(self.seed, 'request', self._asked):016x}"
            place = self.round, self.rounds, len(self.clients)
            yield Request(name, client, op, *place, body, self.turn, session)

    def _receive(self, op: str, reply: Reply) -> Upload | None:
        self.meter.tokens += int(reply.cost.get("tokens", 0))
        self.meter.steps += int(reply.cost.get("steps", 0))
        if reply.body is None:
            self.lost.append({"client": reply.client, "reason": reply.error or "no answer"})
            return None
        try:
            message, sizes = opened(reply.body)
        except DecodeError as fault:
            self.meter.sent(op, "up", {"undecodable": len(reply.body)})
            self._refuse(reply.client, str(fault))
            return None
        self.meter.sent(op, "up", sizes)
        try:
            if not isinstance(message, Upload):
                raise UploadRejected(f"Client '{reply.client}' sent a {type(message).__name__.lower()}.")
            if self.opened is not None and op == "work":
                message = self.opened(message, self.expected)
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

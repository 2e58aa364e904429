"""Watched - a round as an observer at the server sees it: the guard that notes what is sent and what comes back.

    state --(observer may change it)--> client --work--> upload --(defences of the client)--> seen --> as without it

It notes what really arrives: a single upload in the open, the open part of an encrypted one, or only the sum where that
is all the server learns.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.guard import Guard
from fedllm.core.message import Dense, Received, as_part
from fedllm.core.method import Method
from fedllm.core.reducer import Reduction
from fedllm.core.seeds import numpy_stream, torch_stream
from fedllm.core.tensors import Tensors
from fedllm.modes.around import Around
from fedllm.modes.observers import Glass, Observer

if TYPE_CHECKING:
    from fedllm.core.server import Answer, Server

EVERYBODY = "everybody"
"""Whose upload a sum is."""


class Watched(Around):
    """Around the guard of a run, which it leaves as it is.

    Args:
        observer: who watches.
        inner: the guard of the run, also at the clients.
        glass: a model with the tensors that were sent.
        seed: the run's seed.

    Attributes:
        sent: client -> the trainable tensors it was sent.
        uploads: client -> the update that came back, or of :data:`EVERYBODY` the mean.
        seen: client -> which entries were in the open; {} for all.
        kept: what the observer keeps of the state it has sent.
        clients: who took part.
    """

    def __init__(self, observer: Observer, inner: Guard, glass: Callable[[Tensors], Glass], seed: int) -> None:
        super().__init__(inner)
        self.observer, self.glass, self.seed = observer, glass, seed
        self.sent: dict[str, Tensors] = {}
        self.uploads: dict[str, Tensors] = {}
        self.seen: dict[str, Tensors] = {}
        self.clients: list[str] = []
        self.kept: Any = None

    def rows(self, client: str, split: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The first rows of a client, as many as the observer is to face, with what is planted in them."""
        held = self.inner.rows(client, split, rows)
        return held if split != "train" else self.facing(client, held)[0]

    def facing(
        self, client: str, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], torch.Tensor | None]:
        """Those rows, and the planted values."""
        return self.observer.planted(list(rows[: self.observer.rows]), numpy_stream(self.seed, "planted", client))

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """As the guard inside, with an eye on what is sent and what comes."""
        if server.round != self.observer.round:
            return await self.inner.collect(server, method, payloads, reduction, deadline)
        watched: Any = _Tap(server, lambda answer: self._heard(answer, reduction))
        failed = await self.inner.collect(watched, method, self._passing(payloads), reduction, deadline)
        if failed is None and not self.uploads:
            update = reduction.result(len(server.clients)).parts.get("update")
            if isinstance(update, Dense):
                self.uploads[EVERYBODY] = dict(update.tensors)
                self.sent[EVERYBODY] = self.sent[self.clients[0]]
        return failed

    def _passing(self, payloads: Iterable[tuple[str, Received]]) -> Iterator[tuple[str, Received]]:
        """What is sent, changed by the observer where it does that: the same for all."""
        changed: tuple[Tensors, Any] | None = None
        for client, received in payloads:
            if "params" in received.parts:
                if changed is None and type(self.observer).sends is not Observer.sends:
                    rng = torch_stream(self.seed, "observer", "sends")
                    changed = self.observer.sends(self.glass(received.params), rng)
                if changed is not None:
                    parts = {**received.parts, "params": as_part(changed[0])}
                    received, self.kept = Received.of(parts, received.numbers), changed[1]
                self.sent[client] = dict(received.params)
            self.clients.append(client)
            yield client, received

    def _heard(self, answer: Answer, reduction: Reduction) -> None:
        """Note an upload that is readable."""
        parts = answer.upload.parts
        update = parts.get("update")
        if isinstance(update, Dense):
            self.uploads[answer.client] = dict(update.tensors)
        elif "encrypted" in parts and "open" in answer.upload["encrypted"]:
            hidden = self.inner.memory()["encrypted.mask"].bool()
            whole = torch.zeros(len(hidden))
            whole[~hidden] = answer.upload["encrypted"]["open"].float()
            like = reduction.expected["update"]
            self.uploads[answer.client] = _cut(whole, like)
            self.seen[answer.client] = _cut(~hidden, like)


class _Tap:
    """A server that is listened to."""

    def __init__(self, server: Server, heard: Callable[[Answer], None]) -> None:
        self._server, self._hears = server, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    async def ask(self, *given: Any, **options: Any) -> AsyncIterator[Answer]:
        async for answer in self._server.ask(*given, **options):
            self._hears(answer)
            yield answer


def _cut(flat: torch.Tensor, like: Tensors) -> Tensors:
    """A vector as tensors again, in the order of their names."""
    names = sorted(like)
    pieces = flat.split([like[name].numel() for name in names])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}

"""Link - what lies between server and clients, as somebody on the line sees it: bytes, and nothing that they decode to.

An engine around an engine. It shows every request and reply, and may hand on others in their place: to count, to listen
or to disturb. Between real sites the line is under TLS; here it is where damaged and foreign messages are tried.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedllm.core.roster import Group
from fedllm.core.server import Engine, Reply, Request


@dataclass
class Link:
    """Implements :class:`fedllm.core.server.Engine`.

    Args:
        engine: what carries the messages.
        down: is given each request and returns what is carried in its place.
        up: is given each reply and returns what arrives in its place; None where it is lost on the way.
    """

    engine: Engine
    down: Callable[[Request], Request] = lambda request: request
    up: Callable[[Reply], Reply | None] = lambda reply: reply

    @property
    def client_ids(self) -> Sequence[str]:
        """As the engine."""
        return self.engine.client_ids

    def group(self, client: str) -> Group:
        """As the engine."""
        return self.engine.group(client)

    async def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """As the engine; a reply that is lost on the way is answered for with an error."""

        def passed() -> Iterator[Request]:
            for request in requests:
                yield self.down(request)

        async for reply in self.engine.ask(passed(), deadline):
            yield self.up(reply) or Reply(reply.id, reply.client, None, "lost on the way")

    def close(self, sessions: Sequence[str]) -> None:
        """As the engine."""
        self.engine.close(sessions)

    def drop(self, client: str) -> None:
        """As the engine."""
        self.engine.drop(client)

    def settle(self, accepted: Sequence[str]) -> None:
        """As the engine."""
        self.engine.settle(accepted)

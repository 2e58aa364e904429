"""Around - a guard around another one, which it leaves as it is but for what a subclass says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from fedllm.core.guard import Guard, PrivateFit
from fedllm.core.message import Json, Received, Upload
from fedllm.core.method import Method
from fedllm.core.reducer import Reduction
from fedllm.core.tensors import Tensors

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.core.work import Request


class Around(Guard):
    """As the guard inside.

    Args:
        inner: that guard, also at the clients.
    """

    def __init__(self, inner: Guard) -> None:
        self.inner = inner
        self.hides, self.quiet, self.private = inner.hides, inner.quiet, inner.private  # type: ignore[misc]
        self.lasts = inner.lasts  # type: ignore[misc]

    @property
    def keep(self) -> Callable[[Json], None] | None:  # type: ignore[override]
        """That of the guard inside."""
        return self.inner.keep

    @keep.setter
    def keep(self, write: Callable[[Json], None] | None) -> None:
        """It writes for the guard inside."""
        self.inner.keep = write

    def beside(self) -> Guard:
        """As the guard inside."""
        return self.inner.beside()

    def recall(self, facts: Json) -> None:
        """As the guard inside."""
        self.inner.recall(facts)

    def spent(self, client: str) -> Json:
        """As the guard inside."""
        return self.inner.spent(client)

    def heard(self, client: str, facts: Json) -> None:
        """As the guard inside."""
        self.inner.heard(client, facts)

    def allow(self, op: str, client: str) -> None:
        """As the guard inside."""
        self.inner.allow(op, client)

    def stops(self, round: int) -> str | None:
        """As the guard inside."""
        return self.inner.stops(round)

    def cohort(
        self, method: Method, round: int, clients: Sequence[str], size: int, rng: numpy.random.Generator
    ) -> list[str]:
        """As the guard inside."""
        return self.inner.cohort(method, round, clients, size, rng)

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """As the guard inside."""
        return self.inner.begin(method, expected, round)

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """As the guard inside."""
        return await self.inner.collect(server, method, payloads, reduction, deadline)

    def fit(self, client: str, round: int, number: int, count: int, request: Request) -> PrivateFit | None:
        """As the guard inside."""
        return self.inner.fit(client, round, number, count, request)

    def rows(self, client: str, split: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """As the guard inside."""
        return self.inner.rows(client, split, rows)

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """As the guard inside."""
        return await self.inner.work(function, algorithm, client, received)

    def told(self) -> Json:
        """As the guard inside."""
        return self.inner.told()

    def report(self) -> list[str]:
        """As the guard inside."""
        return self.inner.report()

    def to_json(self) -> Json:
        """As the guard inside."""
        return self.inner.to_json()

    def memory(self) -> Tensors:
        """As the guard inside."""
        return self.inner.memory()

    def restore(self, facts: Json, memory: Tensors) -> None:
        """As the guard inside."""
        self.inner.restore(facts, memory)

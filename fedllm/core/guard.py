"""Guard - what stands between a client's data, its upload and the method: privacy, secure sums, robust rules.

A method says how uploads become one update; a guard may choose who is asked, change or refuse each upload, and form
the update in another way. At a client it may say how training is done on single examples. The guard of a run is chosen
by its recipe; :class:`Guard` changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy
import torch

from fedllm.core.errors import UploadRejected
from fedllm.core.message import Json, Received, Upload
from fedllm.core.reducer import Reduction
from fedllm.core.tensors import Tensors

if TYPE_CHECKING:
    from fedllm.core.method import Method
    from fedllm.core.server import Server
    from fedllm.core.work import Request


MEASURING = ("evaluate", "evaluate_base")
"""Client-side functions whose answers are measurements of held-out rows."""


class Guard:
    """No protection: the method's own cohort and its own reducers."""

    def allow(self, op: str, client: str) -> None:
        """Raise :class:`~fedllm.core.errors.ModeConflict` where a client must not be asked for `op`.

        Server and client ask this, each its own guard: neither has to trust the other.
        """

    def beside(self) -> Guard:
        """The guard of the other models of a run, which clients train to compare with."""
        return Guard()

    def stops(self, round: int) -> str | None:
        """Why the run must end before this round; None where it may be played."""
        return None

    def cohort(
        self, method: Method, round: int, clients: Sequence[str], size: int, rng: numpy.random.Generator
    ) -> list[str]:
        """Who is asked; see :meth:`fedllm.core.method.Method.cohort`."""
        return method.cohort(round, clients, size, rng)

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """Take the uploads of a round; `expected` is the method's (part -> names and shapes)."""
        return Reduction(method.reducer, expected)

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """Ask the cohort for `work` and add what comes to `reduction`; why the round has failed, or None."""
        used = 0
        async with aclosing(server.ask(method.work, payloads, deadline)) as answers:
            async for answer in answers:
                try:
                    name = f"{answer.client}@{server.turn}" if server.turn else answer.client
                    reduction.add(name, answer.upload)
                    used += 1
                except UploadRejected as fault:
                    server.reject(answer.client, str(fault))
                if used == server.enough:
                    break
        return None

    # -- at a client --------------------------------------------------------------------------------------------------

    hides: ClassVar[bool] = False
    """Whether a client half may not read its rows in `work`, nor its training rows in a measurement."""
    quiet: ClassVar[bool] = False
    """Whether what was measured in training, such as its loss, stays at the client."""
    private: tuple[str, ...] = ()
    """Names it may keep in a client's private store."""

    def fit(self, client: str, round: int, number: int, count: int, request: Request) -> PrivateFit | None:
        """How the `number`-th piece of work that a client half asks for in `work` is done on `count` examples.

        Returns:
            None where single examples are not private.

        Raises:
            ModeConflict: work whose result no noise would cover.
            BudgetSpent: it would pass the client's budget.
        """
        return None

    def rows(self, client: str, split: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """What a client has for its rows of a split; of the split `public`, what anybody has."""
        return rows

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """Run a client half's `work`, alone or as a part of a longer conversation with the server."""
        return await function(algorithm, client, received)

    # -- between a site and the server --------------------------------------------------------------------------------

    lasts: ClassVar[bool] = False
    """Whether the server releases nothing before :attr:`keep` has written down what it costs."""
    keep: Callable[[Json], None] | None = None
    """Writes :meth:`to_json` to disk before something is done that spends privacy. None: the run's own checkpoints
    keep it, later."""

    def recall(self, facts: Json) -> None:
        """Take from what :attr:`keep` wrote last what must not be forgotten, whatever checkpoint is gone on from."""
        self.restore(facts, {})

    def spent(self, client: str) -> Json:
        """At a site: what was spent of a client's privacy, for the server; None where nothing was."""
        return None

    def heard(self, client: str, facts: Json) -> None:
        """At the server: take what :meth:`spent` gave at a client's site; raises ValueError for anything else."""

    # -- what is told and kept ----------------------------------------------------------------------------------------

    def told(self) -> Json:
        """What a user should see of it after a round; None where there is nothing."""
        return None

    def report(self) -> list[str]:
        """What it guarantees, line by line, for the report of a run."""
        return []

    def to_json(self) -> Json:
        """What a checkpoint keeps of it."""
        return None

    def memory(self) -> Tensors:
        """Tensors that a checkpoint keeps of it."""
        return {}

    def restore(self, facts: Json, memory: Tensors) -> None:
        """Go on from :meth:`to_json` and :meth:`memory`."""


class Quiet(Guard):
    """What is measured in training stays at the client; a model to compare with, beside one that is protected."""

    quiet = True


class PrivateFit(Protocol):
    """How one fit of one client treats single examples (DP-SGD): who is drawn, how far one reaches, what noise.

    Attributes:
        bound: the largest Euclidean norm of one example's gradient, over all tensors together.
        expected: examples of a step on average, by which the noised sum is divided.
    """

    bound: float
    expected: float

    def draw(self, count: int, step: int) -> list[int]:
        """The numbers, of `count` examples, of those in a step; may be empty."""
        ...

    def summed(self, stacked: Mapping[str, torch.Tensor]) -> Tensors:
        """The sum over the first axis of gradients [B, ...], each clipped; float64."""
        ...

    def noise(self, like: Mapping[str, torch.Tensor], step: int) -> Tensors:
        """The noise on the sum of a step, in the shapes of `like`; float64 on the CPU."""
        ...

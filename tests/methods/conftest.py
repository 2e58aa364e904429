"""The real engine over small differentiable functions, so that methods can be held to exact numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.message import Dense
from fedllm.core.method import Method
from fedllm.core.reducer import Update
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import RoundRecord, evaluate, play_round
from fedllm.methods.baseline.central import EVERYONE
from fedllm.tasks.function import FunctionLearner

Data = Mapping[str, Sequence[Sequence[float]]]


class Held:
    """Rows by client; `everyone` holds them all."""

    def __init__(self, data: Data) -> None:
        self.data, self.client_ids = data, sorted(data)

    def size(self, client_id: str, split: str = "train") -> int:
        return len(self.rows(client_id, split))

    def rows(self, client_id: str, split: str = "train") -> list[dict[str, Any]]:
        if client_id == EVERYONE:
            return [row for client in self.client_ids for row in self.rows(client, split)]
        return [{"x": list(x)} for x in self.data[client_id]]


def quadratic(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of h (w - b)^2 / 2 over examples (h, b)."""
    return torch.stack([x[0] * (params["w"] - x[1]).square().sum() / 2 for x in examples]).sum()


def network(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared error of a small network: the last entry of an example is what it should say of the others."""
    rows = torch.stack(list(examples))
    hidden = torch.tanh(rows[:, :-1] @ params["w"] + params["b"])
    return ((hidden * params["v"]).sum(1) - rows[:, -1]).square().sum()


@dataclass
class Played:
    """What a run left behind."""

    states: list[State]
    records: list[RoundRecord]
    worker: LocalWorker
    server: Server
    counts: dict[str, dict[str, float]]

    @property
    def state(self) -> State:
        return self.states[-1]

    @property
    def w(self) -> float:
        return float(self.state.params["w"])

    def private(self, client: str) -> dict[str, Any]:
        """A copy of what a client keeps."""
        view = self.worker.private.open(client)
        self.worker.private.drop(client)
        return dict(view.items())


def run(
    method: Method,
    data: Data,
    rounds: int = 1,
    *,
    loss: Any = quadratic,
    start: Tensors | None = None,
    width: int = 8,
    cohort: int | None = None,
    seed: int = 0,
    numbers: dict[str, Any] | None = None,
    folder: Path | None = None,
    measure: bool = False,
    cohorts: Sequence[Sequence[str]] | None = None,
) -> Played:
    """Play `rounds` of `method`; `cohorts` names the clients of each round instead of drawing them."""
    learner = FunctionLearner(loss, {"w": torch.zeros(1)} if start is None else start)
    rows = Held(data)
    worker = LocalWorker(learner, method, rows, seed, folder)
    server = Server(LocalEngine(worker, rows.client_ids, width), seed, rounds=rounds)
    first = method.init({n: t for n, t in learner.initial().items() if method.trainable(n)})
    played = Played([State(first.params, first.memory, {**first.numbers, **(numbers or {})})], [], worker, server, {})

    async def go() -> None:
        for number in range(rounds):
            playing = method if cohorts is None else chosen(method, cohorts[number])
            state, record = await play_round(playing, played.state, server, cohort or len(data))
            played.states.append(state)
            played.records.append(record)
        if measure:
            played.counts = await evaluate(method, played.state, server, rows.client_ids)

    asyncio.run(go())
    return played


def chosen(method: Method, clients: Sequence[str]) -> Any:
    """`method` with a cohort that is given."""

    class Chosen:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def cohort(self, *_: Any) -> list[str]:
            return list(clients)

    return Chosen()


@pytest.fixture(scope="session")
def play() -> Callable[..., Played]:
    return run


@pytest.fixture(scope="session")
def two() -> Data:
    """The two quadratic clients of the card: h = (1, 5), b = (0, 1); the joint optimum is 5/6."""
    return {"a": [(1.0, 0.0)], "b": [(5.0, 1.0)]}


@pytest.fixture(scope="session")
def ten_steps() -> Train:
    """The card's local work: ten steps of plain gradient descent at 0.1."""
    return Train(steps=10, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=1)


@pytest.fixture(scope="session")
def people() -> Data:
    """Four clients of unequal size, each with another function to learn."""
    stream = numpy.random.default_rng(0)
    sizes, rows = {"p": 5, "q": 12, "r": 1, "s": 8}, {}
    for client, size in sizes.items():
        x = stream.normal(size=(size, 4))
        y = numpy.sin(x @ stream.normal(size=4)) + stream.normal()
        rows[client] = numpy.column_stack([x, y]).tolist()
    return rows


@pytest.fixture
def net() -> dict[str, Any]:
    """The loss and the first values of the small network, for `play(..., **net)`."""
    stream = torch.Generator().manual_seed(1)
    start = {
        "w": torch.randn(4, 6, generator=stream),
        "b": torch.randn(6, generator=stream),
        "v": torch.randn(6, generator=stream),
    }
    return {"loss": network, "start": start}


@pytest.fixture(scope="session")
def same() -> Callable[[State, State], bool]:
    """Whether two states are equal to the last bit, memory and all."""

    def equal(left: State, right: State) -> bool:
        trees = [(left.params, right.params), *((t, right.memory.get(n, {})) for n, t in left.memory.items())]
        return left.memory.keys() == right.memory.keys() and all(
            a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
            for a, b in trees
        )

    return equal


@pytest.fixture(scope="session")
def script() -> Callable[..., list[State]]:
    """The states of a method whose rounds bring the changes `changes`: its server half alone."""

    def scripted(method: Method, changes: Sequence[Any], start: Tensors | None = None) -> list[State]:
        states = [
            method.init(
                {"w": torch.zeros(len(torch.atleast_1d(torch.as_tensor(changes[0]))))} if start is None else start
            )
        ]
        for number, change in enumerate(changes, 1):
            tree = {"w": torch.atleast_1d(torch.as_tensor(change, dtype=torch.float32))}
            update = Update({"update": Dense(tree)}, clients=2, population=2)
            state = method.finalize(states[-1], update)
            assert isinstance(state, State)
            states.append(State(state.params, state.memory, state.numbers, number))
        return states

    return scripted

"""One small ground for every method: a toy Llama with LoRA, four clients of different sizes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.core.method import Method
from fedllm.core.server import Engine, Reply, Server
from fedllm.data.federation import Federation
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import evaluate, play_round
from fedllm.methods import methods
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.run import Pooled
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def clients() -> dict[str, dict[str, list[dict[str, str]]]]:
    """Four clients with 3 to 6 rows, each reversing words of its own."""
    found = {}
    for number in range(4):
        rows = [
            {"instruction": f"reverse {WORDS[(number * 2 + i) % 8]}{i}", "response": WORDS[(number * 2 + i) % 8][::-1]}
            for i in range(3 + number)
        ]
        found[f"c{number}"] = {"train": rows, "eval": rows[:2]}
    return found


def make(key: str, **options: Any) -> Method:
    """A method by key with short training; everything else at its defaults."""
    kind = methods()[key]
    short = kind.model_fields["train"].default.model_copy(update={"steps": 2, "batch_size": 2})
    return kind(**{"train": short, **options})


class Table:
    """A method at work over the small ground."""

    def __init__(self, key: str, learner: TransformerLearner, seed: int = 0, width: int = 4, **options: Any) -> None:
        self.method = make(key, **options)
        self.federation = Federation.of(clients())
        self.worker = LocalWorker(learner, self.method, Pooled(self.federation), seed)
        self.engine = Watched(LocalEngine(self.worker, self.federation.client_ids, width))
        self.server = Server(self.engine, seed, rounds=4)
        start = learner.initial()
        state = self.method.init({n: t for n, t in start.items() if self.method.trainable(n)})
        self.state = type(state)(state.params, state.memory, {**state.numbers, "cohort": 2}, 0)
        self.records: list[Any] = []

    def rounds(self, count: int = 2, cohort: int = 4) -> Table:
        async def go() -> None:
            for _ in range(count):
                self.state, record = await play_round(self.method, self.state, self.server, cohort)
                self.records.append(record)

        asyncio.run(go())
        return self

    def measure(self) -> dict[str, dict[str, float]]:
        return asyncio.run(evaluate(self.method, self.state, self.server, self.server.clients))


class Watched:
    """An engine that keeps every request and reply, and lets a test change replies."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.requests, self.replies = engine, [], []
        self.change = lambda reply: reply

    @property
    def client_ids(self) -> Any:
        return self.engine.client_ids

    async def ask(self, requests: Any, deadline: float | None) -> Any:
        def seen() -> Any:
            for request in requests:
                self.requests.append(request)
                yield request

        async for reply in self.engine.ask(seen(), deadline):
            changed: Reply = self.change(reply)
            self.replies.append(changed)
            yield changed

    def group(self, client: str) -> Any:
        return self.engine.group(client)

    def close(self, sessions: Any) -> None:
        self.engine.close(sessions)

    def drop(self, client: str) -> None:
        self.engine.drop(client)

    def settle(self, accepted: Any) -> None:
        self.engine.settle(accepted)


@pytest.fixture(scope="session")
def learner() -> TransformerLearner:
    torch.set_num_threads(1)
    task = TaskSettings(max_length=64, template="plain")
    return TransformerLearner(toy_model("llama", kind="causal-lm"), task, AdapterSettings(rank=2), None, 0)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def same_state(left: Any, right: Any) -> bool:
    """The same parameters, memory and numbers, to the bit."""
    trees = left.memory.keys() == right.memory.keys()
    trees = trees and all(equal(tree, right.memory[name]) for name, tree in left.memory.items())
    return trees and equal(left.params, right.params) and left.numbers == right.numbers

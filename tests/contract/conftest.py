"""One small ground for every method: a toy model of a kind it works on, four clients of different sizes.

Where a method works on any model and adapter, that is a Llama with LoRA; else the first it names.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.method import Method
from fedllm.core.server import Engine, Reply, Server
from fedllm.data.federation import Federation
from fedllm.engine.crew import Crew
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import evaluate, play_round
from fedllm.methods import methods
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.settings import ModelSettings
from fedllm.protocols import protocols
from fedllm.recipe import Recipe
from fedllm.run import Pooled, build_learner
from fedllm.tasks.settings import TaskSettings

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


LABELS = ["even", "odd", "none"]


def clients(key: str = "fedavg") -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Four clients with 3 to 6 rows, each reversing (or sorting, or looking at) words of its own."""
    task = task_of(key).kind
    found = {}
    for number in range(4):
        rows = [_row(task, (number * 2 + i) % 8, i, number) for i in range(3 + number)]
        found[f"c{number}"] = {"train": rows, "eval": rows[:2]}
    return found


def _row(task: str, word: int, place: int, client: int) -> dict[str, Any]:
    text = f"{WORDS[word]}{place}"
    if task == "sequence-classification":
        return {"text": f"is {text} odd", "label": LABELS[(word + place) % 3]}
    if task == "dual-encoder":
        draw = numpy.random.default_rng(10 * client + place)
        return {"image": draw.integers(0, 256, (32, 32, 3)).astype("uint8"), "label": LABELS[(word + place) % 3]}
    if task == "masked-lm":
        return {"text": f"the {WORDS[word]} is near the {WORDS[(word + place) % 8]} and the {WORDS[place]}"}
    return {"instruction": f"reverse {text}", "response": WORDS[word][::-1]}


def public(key: str) -> list[dict[str, Any]]:
    """Rows that anybody may read."""
    return [_row(task_of(key).kind, i % 8, i, 9) for i in range(8)]


def task_of(key: str) -> TaskSettings:
    """The first task the method works on."""
    works = found_kinds()[key].card.models
    kind: Any = "causal-lm" if "any" in works or "causal-lm" in works else works[0]
    return TaskSettings(kind=kind, max_length=64, template="plain" if kind == "causal-lm" else "auto")


FAMILIES = {"sequence-classification": "bert", "masked-lm": "bert", "dual-encoder": "clip", "seq2seq": "t5"}


def adapter_of(key: str) -> dict[str, Any]:
    """The adapter options of the ground for a method."""
    kinds = found_kinds()[key].adapters
    return {"rank": 2, "tokens": 4, "kind": "lora" if not kinds or "lora" in kinds else kinds[0]}


def found_kinds() -> dict[str, Any]:
    """Every method and protocol."""
    return {**methods(), **protocols()}


@cache
def learner_of(key: str) -> Any:
    """The learner for a method; methods that need the same share it."""
    asked = json.dumps(found_kinds()[key]().adapter(), sort_keys=True)
    return _learner(task_of(key).kind, json.dumps(adapter_of(key)), asked)


@cache
def _learner(kind: Any, adapter: str, asked: str) -> Any:
    torch.set_num_threads(1)
    task = TaskSettings(kind=kind, max_length=64, template="plain" if kind == "causal-lm" else "auto")
    labels = None if task.kind in ("causal-lm", "seq2seq", "masked-lm") else LABELS
    model = ModelSettings(name=f"toy:{FAMILIES.get(task.kind, 'llama')}", device="cpu")
    recipe = Recipe(model=model, task=task, adapter=AdapterSettings(**json.loads(adapter)))
    return build_learner(recipe, labels, json.loads(asked))


def make(key: str, **options: Any) -> Method:
    """A method by key with short training; everything else at its defaults."""
    kind = methods()[key]
    short = kind.model_fields["train"].default.model_copy(update={"steps": 2, "batch_size": 2})
    return kind(**{"train": short, **options})


class Table:
    """A method at work over the small ground."""

    def __init__(self, key: str, learner: Any, seed: int = 0, width: int = 4, **options: Any) -> None:
        self.method = make(key, **options)
        self.federation = Federation.of(clients(key), public=public(key))
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


@pytest.fixture
def learner(key: str) -> Any:
    return learner_of(key)


class Lazily(dict[str, Any]):
    """Learners by method, made when they are asked for."""

    def __missing__(self, key: str) -> Any:
        return learner_of(key)


def there(process: int) -> Lazily:
    """The learners of another process."""
    return Lazily()


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    made = Crew(there, 2, {})
    yield made
    made.close()


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def same_state(left: Any, right: Any) -> bool:
    """The same parameters, memory and numbers, to the bit."""
    trees = left.memory.keys() == right.memory.keys()
    trees = trees and all(equal(tree, right.memory[name]) for name, tree in left.memory.items())
    return trees and equal(left.params, right.params) and left.numbers == right.numbers

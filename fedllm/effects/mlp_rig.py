"""MLP rig - scikit-learn's digits and small networks of any widths, for methods whose clients differ in their models.

A network may have a private LoRA on every layer or a bridge beside its output layer, under the names that adapters of
language models have, so that the real methods drive it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy
import torch
from torch.nn import functional

from fedllm.core.method import Method
from fedllm.core.roster import Group
from fedllm.core.seeds import numpy_stream, torch_stream
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Groups
from fedllm.data.federation import Federation
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import RoundRecord, evaluate, play_round
from fedllm.tasks.function import FunctionLearner

Rows = list[dict[str, Any]]


def logits(params: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network's class scores, [n, 10]; ReLU between layers; a private LoRA has the scale 1 / rank."""
    last = sum(name.endswith(".weight") for name in params) - 1
    for layer in range(last + 1):
        out = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
        if f"{layer}.personal.lora_A" in params:
            a, b = params[f"{layer}.personal.lora_A"], params[f"{layer}.personal.lora_B"]
            out = out + x @ a.T @ b.T / len(a)
        if layer == last and "bridge.lora_A" in params:
            wide = x @ params["bridge.project"].T if "bridge.project" in params else x
            out = out + wide @ params["bridge.lora_A"].T @ params["bridge.lora_B"].T
        x = out if layer == last else torch.relu(out)
    return x


class Mlp(FunctionLearner):
    """A learner over `logits`, which also counts right answers.

    Args:
        widths: of the hidden layers.
        seed: the first values follow from it.
        personal: rank of a private LoRA on every layer; 0 for none.
        bridge: (rank, common width) of a bridge; None for none.
    """

    score_names = ("accuracy", "loss")
    higher_is_better = True

    def __init__(
        self, widths: Sequence[int], seed: int = 0, personal: int = 0, bridge: tuple[int, int] | None = None
    ) -> None:
        super().__init__(_loss, first_values(widths, seed, personal, bridge), outputs=_outputs)

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """loss, right and examples of every example."""
        bound, found = self._bound or {}, []
        for k, group in enumerate(groups):
            if group:
                x, y = _taken([e.inputs["x"] for e in group])
                scores = logits({n: t[k] for n, t in bound.items()}, x)
                losses, right = functional.cross_entropy(scores, y, reduction="none"), scores.argmax(1) == y
                pairs = zip(losses.tolist(), right.tolist(), strict=True)
                found += [{"loss": a, "right": float(b), "examples": 1.0} for a, b in pairs]
        return found

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Accuracy and mean loss."""
        n = counts.get("examples", 0.0)
        return {"accuracy": counts["right"] / n if n else None, "loss": counts["loss"] / n if n else None}


class Play:
    """A method over clients with networks of their own.

    Args:
        method: the method.
        nets: one network for all, or that of every client; clients with the same one form a group.
        clients: client id -> {"train": rows, "eval": rows}.
        public: rows that all have.
        seed: the run's seed.
        rounds: rounds of the run.
    """

    def __init__(
        self,
        method: Method,
        nets: Mlp | Mapping[str, Mlp],
        clients: Mapping[str, Mapping[str, Rows]],
        public: Rows | None = None,
        seed: int = 0,
        rounds: int = 1,
    ) -> None:
        torch.set_num_threads(1)
        self.method, federation = method, Federation.of(clients, public=public or ())
        given = dict.fromkeys(clients, nets) if isinstance(nets, Mlp) else dict(nets)
        kinds: list[Any] = list(dict.fromkeys(given.values()))
        roster = {client: Group(f"net-{kinds.index(net)}") for client, net in given.items()}
        learners = {f"net-{number}": net for number, net in enumerate(kinds)}
        self.worker = LocalWorker(kinds[0], method, federation, seed, roster=roster, learners=learners)
        self.server = Server(LocalEngine(self.worker, federation.client_ids, len(clients)), seed, rounds=rounds)
        self.state: State = method.init({n: t for n, t in kinds[0].initial().items() if method.trainable(n)})
        self.records: list[RoundRecord] = []

    def rounds(self, count: int) -> Play:
        """Play `count` rounds."""

        async def go() -> None:
            for _ in range(count):
                self.state, record = await play_round(self.method, self.state, self.server, len(self.server.clients))
                self.records.append(record)

        asyncio.run(go())
        return self

    def accuracy(self) -> dict[str, float]:
        """Every client's, with the model that the method measures."""
        counts = asyncio.run(evaluate(self.method, self.state, self.server, self.server.clients))
        return {client: found["right"] / found["examples"] for client, found in counts.items()}

    def mean(self) -> float:
        """The mean accuracy over clients."""
        found = self.accuracy()
        return sum(found.values()) / len(found)

    def kept(self, client: str) -> dict[str, Any]:
        """A copy of a client's private store."""
        view = self.worker.private.open(client)
        self.worker.private.drop(client)
        return dict(view.items())


def first_values(widths: Sequence[int], seed: int, personal: int = 0, bridge: tuple[int, int] | None = None) -> Tensors:
    """Kaiming-uniform weights, biases and A of zero mean; B is zero."""
    sizes, found = [64, *widths, 10], {}
    for layer, (inside, outside) in enumerate(pairwise(sizes)):
        found[f"{layer}.weight"] = _drawn(seed, f"{layer}.weight", (outside, inside), math.sqrt(6 / inside))
        found[f"{layer}.bias"] = torch.zeros(outside)
        if personal:
            name = f"{layer}.personal.lora_A"
            found[name] = _drawn(seed, name, (personal, inside), 1 / math.sqrt(inside))
            found[f"{layer}.personal.lora_B"] = torch.zeros(outside, personal)
    if bridge is not None:
        rank, width = bridge
        found["bridge.lora_A"] = _drawn(0, "bridge.lora_A", (rank, width), 1 / math.sqrt(width))
        found["bridge.lora_B"] = torch.zeros(10, rank)
        if sizes[-2] != width:
            found["bridge.project"] = _drawn(seed, "bridge.project", (width, sizes[-2]), math.sqrt(3 / sizes[-2]))
    return found


@cache
def digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pixels in [0, 1], [1797, 64], and classes."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]

    found: Any = load_digits()
    return found.data / 16.0, found.target


def shuffled(seed: int, *names: str | int) -> list[int]:
    """The numbers of all digits in a random order."""
    return numpy_stream(seed, "digits", *names).permutation(len(digits()[1])).tolist()


def rows_of(numbers: Sequence[int], labels: Mapping[int, int] | None = None) -> Rows:
    """Digits as rows; `labels` renames classes."""
    x, y = digits()
    return [{"x": [*x[i].tolist(), float((labels or {}).get(int(y[i]), int(y[i])))]} for i in numbers]


def _drawn(seed: int, name: str, shape: tuple[int, int], bound: float) -> torch.Tensor:
    return (torch.rand(shape, generator=torch_stream(seed, "mlp", name)) * 2 - 1) * bound


def _taken(examples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.stack(list(examples))
    return batch[:, :64], batch[:, 64].long()


def _loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    x, y = _taken(examples)
    return functional.cross_entropy(logits(params, x), y, reduction="sum")


def _outputs(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    return logits(params, _taken(examples)[0])

"""Rig - small problems with known answers, played by the real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch

from fedllm.core.guard import Guard
from fedllm.core.method import Method
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Learner
from fedllm.data.federation import Federation
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import RoundRecord, evaluate, play_round
from fedllm.methods import find
from fedllm.tasks.function import FunctionLearner

OPTIMUM = 5.0 / 6.0
"""Where (1 (w - 0)^2 + 5 (w - 1)^2) / 4 is least."""


class Play:
    """A method over a learner and clients' rows; keeps the state and every round's record.

    Args:
        method: the method.
        learner: what is trained.
        rows: client id -> rows (all of them are for training).
        cohort: clients per round; None for all.
        seed: the run's seed.
        width: clients per pass; None for all.
        rounds: rounds of the run.
        guard: what stands between uploads and the method.
    """

    def __init__(
        self,
        method: Method,
        learner: Learner,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        cohort: int | None = None,
        seed: int = 0,
        width: int | None = None,
        rounds: int = 1,
        guard: Guard | None = None,
    ) -> None:
        self.method = method
        federation = Federation.of({client: {"train": list(held), "eval": []} for client, held in rows.items()})
        guard = guard or Guard()
        self.worker = LocalWorker(learner, method, federation, seed, guard=guard)
        ids = federation.client_ids
        self.server = Server(LocalEngine(self.worker, ids, width or len(ids)), seed, rounds=rounds, guard=guard)
        self.cohort = cohort or len(ids)
        start = learner.initial()
        self.state = method.init({n: t for n, t in start.items() if method.trainable(n)})
        self.records: list[RoundRecord] = []

    def rounds(self, count: int) -> State:
        """Play `count` rounds."""

        async def go() -> None:
            for _ in range(count):
                self.state, record = await play_round(self.method, self.state, self.server, self.cohort)
                self.records.append(record)

        asyncio.run(go())
        return self.state

    def measure(self) -> dict[str, dict[str, float]]:
        """Counts by client."""
        return asyncio.run(evaluate(self.method, self.state, self.server, self.server.clients))


def quadratic() -> tuple[FunctionLearner, dict[str, list[dict[str, Any]]]]:
    """Two clients f_i = h_i (w - b_i)^2 / 2 with h = (1, 5), b = (0, 1); the optimum of their mean is 5/6."""

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        x = torch.stack(list(examples))
        return (x[:, 0] * (params["w"] - x[:, 1]).square() / 2).sum()

    rows = {"a": [{"x": [1.0, 0.0]}], "b": [{"x": [5.0, 1.0]}]}
    return FunctionLearner(loss, {"w": torch.zeros(1)}), rows


def on_quadratic(key: str, rounds: int = 300, **options: Any) -> float:
    """Where a method ends on the two quadratic clients: 10 plain SGD steps of rate 0.1 a round, uniform weights."""
    learner, rows = quadratic()
    train = {"steps": 10, "lr": 0.1, "optimizer": "sgd", "clip_norm": None, "batch_size": 1}
    method = find(key)(train=train, weighting="uniform", **options)
    return float(Play(method, learner, rows, rounds=rounds).rounds(rounds).params["w"])


def skewed_digits(
    seed: int, clients: int = 20, classes: int = 2
) -> tuple[FunctionLearner, dict[str, list[dict[str, Any]]], Callable[[Tensors], tuple[float, float]]]:
    """scikit-learn's digits, softmax regression, each client holding a few classes.

    Returns:
        the learner (650 numbers), rows by client, and a function: parameters -> held-out (accuracy, loss).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = numpy.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    held_x, held_y, x, y = x[:400], y[:400], x[400:], y[400:]
    by_class = {c: [i for i in range(len(y)) if int(y[i]) == c] for c in range(10)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for client in range(clients):
        chosen = [(client * classes + j) % 10 for j in range(classes)]
        picked = [i for c in chosen for i in rng.choice(by_class[c], 12, replace=False)]
        rows[f"client-{client:02d}"] = [{"x": [*x[i].tolist(), float(y[i])]} for i in picked]

    def logits(params: Tensors, features: torch.Tensor) -> torch.Tensor:
        return features @ params["weight"].T + params["bias"]

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(list(examples))
        return torch.nn.functional.cross_entropy(logits(params, batch[:, :64]), batch[:, 64].long(), reduction="sum")

    def held_out(params: Tensors) -> tuple[float, float]:
        found = logits(params, held_x)
        accuracy = float((found.argmax(1) == held_y).float().mean())
        return accuracy, float(torch.nn.functional.cross_entropy(found, held_y))

    return FunctionLearner(loss, {"weight": torch.zeros(10, 64), "bias": torch.zeros(10)}), rows, held_out


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The range of some values."""
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def small_cohorts(key: str, margin: float, **options: Any) -> tuple[str, bool, dict[str, float]]:
    """Held-out loss of a method against FedAvg: 30 rounds, 2 of 20 clients a round, two digit classes a client.

    Returns:
        a sentence, whether the method is better by `margin` with every one of three seeds, the numbers.
    """
    losses: dict[str, list[float]] = {"fedavg": [], key: []}
    for seed in range(3):
        for name, given in (("fedavg", {}), (key, options)):
            learner, rows, held_out = skewed_digits(seed)
            train = {"steps": 5, "lr": 0.1, "optimizer": "sgd", "clip_norm": None, "batch_size": 12}
            play = Play(find(name)(train=train, **given), learner, rows, cohort=2, seed=seed, rounds=30)
            losses[name].append(held_out(play.rounds(30).params)[1])
    settings = ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"
    told = f"Held-out loss after 30 rounds with 2 of 20 clients, seeds 0-2: {spread(losses[key])} against FedAvg's "
    told += f"{spread(losses['fedavg'])} (margin {margin} with each seed; {settings})."
    better = all(a + margin < b for a, b in zip(losses[key], losses["fedavg"], strict=True))
    return told, better, {name: sum(values) / 3 for name, values in losses.items()}

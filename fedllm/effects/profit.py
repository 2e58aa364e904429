"""Profit's trade-off in small: a frozen network that reads a prompt, eight clients with mixtures of three tasks.

The network learnt three labellings of scikit-learn's digits, told apart by a code of 32 numbers at its input; the
prompt stands in the place of the code. Clients tune the federated prompt further, with a small rate for many steps or a
large one for few. Here both end at the same two scores: the claim is measured and not asserted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.nn import functional

from fedllm.core.message import Received
from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Groups
from fedllm.data.federation import Federation
from fedllm.effects import Evidence
from fedllm.effects.rig import Play
from fedllm.methods.evaluation.profit import Profit
from fedllm.tasks.function import FunctionLearner

SEEDS = (0, 1, 2, 3)
CODE, CLIENTS, ROWS, ROUNDS = 32, 8, 64, 25
GRID = {"small": (0.02, [0, 25, 200]), "large": (0.5, [8])}


class Coded(FunctionLearner):
    """Counts what is right besides the loss."""

    score_names = ("accuracy", "loss")
    higher_is_better = True

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """loss, right and examples of every example."""
        found = super().counts_by_row(groups)
        labels = [int(e.inputs["x"][-1]) for group in groups for e in group]
        for counts, row, label in zip(found, self.outputs(groups), labels, strict=True):
            counts["right"] = float(int(row.argmax()) == label)
        return found

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Accuracy and mean loss."""
        n = counts.get("examples", 0.0)
        return {"accuracy": counts["right"] / n if n else None, **super().values(counts)}


def labels_of(digits: numpy.ndarray, task: int) -> numpy.ndarray:
    """Three labellings: the digit, the digit moved on by three, and counted down from nine."""
    return [digits, (digits + 3) % 10, 9 - digits][task]


def rig(seed: int) -> tuple[Coded, Federation]:
    """The frozen network and eight clients; the public rows are everybody's held-out ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.data / 16.0, digits.target
    rng = numpy.random.default_rng(seed)
    order = rng.permutation(len(y))
    codes = torch.tensor(rng.normal(size=(3, CODE)), dtype=torch.float32)
    weights = _pretrained(x[order[:900]], y[order[:900]], codes, seed)

    def outputs(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(list(examples))[:, :64]
        return _network(weights, batch, params["prompt"].expand(len(batch), CODE))

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        wanted = torch.stack([e[64] for e in examples]).long()
        return functional.cross_entropy(outputs(params, examples), wanted, reduction="sum")

    clients: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(CLIENTS):
        tasks = rng.choice(3, size=2 * ROWS, p=rng.dirichlet([0.3] * 3))
        picked = rng.choice(order[900:], 2 * ROWS, replace=False)
        rows = [
            {"x": [*x[i].tolist(), float(labels_of(y[i : i + 1], t)[0])]} for i, t in zip(picked, tasks, strict=True)
        ]
        clients[f"client-{number}"] = {"train": rows[:ROWS], "eval": rows[ROWS:]}
    pooled = [row for splits in clients.values() for row in splits["eval"]]
    return Coded(loss, {"prompt": torch.zeros(CODE)}, outputs=outputs), Federation.of(clients, public=pooled)


def _network(weights: Tensors, batch: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(torch.cat([batch, code], 1) @ weights["w1"] + weights["b1"])
    return hidden @ weights["w2"] + weights["b2"]


def _pretrained(x: numpy.ndarray, y: numpy.ndarray, codes: torch.Tensor, seed: int) -> Tensors:
    """400 steps of AdamW on all three labellings."""
    stream = torch_stream(seed, "profit effect")
    shapes = {"w1": (64 + CODE, 96), "b1": (96,), "w2": (96, 10), "b2": (10,)}
    weights = {n: (torch.randn(s, generator=stream) * 0.15).requires_grad_() for n, s in shapes.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2)
    images, digits = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    for _ in range(400):
        rows = torch.randint(0, len(digits), (128,), generator=stream)
        task = torch.randint(0, 3, (128,), generator=stream)
        wanted = torch.stack([digits, (digits + 3) % 10, 9 - digits])[task, rows]
        optimizer.zero_grad()
        functional.cross_entropy(_network(weights, images[rows], codes[task]), wanted).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


def scores(seed: int) -> dict[str, tuple[float, float]]:
    """Mean personal and global accuracy of the global prompt and of the ends of both rates."""
    learner, federation = rig(seed)
    train = Train(steps=8, batch_size=16, lr=0.1, optimizer="sgd", clip_norm=None)
    method = Profit(train=train)
    rows = {client: list(federation.rows(client)) for client in federation.client_ids}
    play = Play(method, learner, rows, seed=seed, rounds=ROUNDS)
    play.worker.rows = federation
    params = play.rounds(ROUNDS).params
    found: dict[str, tuple[float, float]] = {}
    for name, (lr, points) in GRID.items():
        options = {"batch_size": 16, "lr": lr, "optimizer": "sgd", "clip_norm": None}
        grid = {"train": options, "points": points, "mixes": [1.0], "near": 0.0}

        async def ask(grid: dict[str, Any] = grid) -> list[list[dict[str, Any]]]:
            payloads = {client: Received(params, grid) for client in play.server.clients}
            return [a.upload.numbers["rows"] async for a in play.server.ask(method.personal, payloads)]

        answers = asyncio.run(ask())
        for place, point in enumerate(points):
            pairs = [[learner.values(rows[place][kind])["accuracy"] or 0.0 for rows in answers] for kind in KINDS]
            found["global" if point == 0 else f"{name} x {point}"] = (sum(pairs[0]) / CLIENTS, sum(pairs[1]) / CLIENTS)
    return found


KINDS = ("personal", "global")


def measure() -> Evidence:
    """Personal and global accuracy, means of four seeds and eight clients."""
    found = [scores(seed) for seed in SEEDS]
    mean = {name: tuple(sum(f[name][i] for f in found) / len(found) for i in (0, 1)) for name in found[0]}
    told = ", ".join(f"{name} {p:.3f} / {g:.3f}" for name, (p, g) in mean.items())
    return Evidence(
        "profit",
        Profit.card.claim,
        f"Personal / global accuracy, means of seeds 0-3: {told}. The personal gain is clear and costs the others "
        "about a point at either rate; that the small rate keeps more does not show here, so nothing is asserted.",
        None,
        {f"{name} {kind}": value for name, pair in mean.items() for kind, value in zip(KINDS, pair, strict=True)},
    )

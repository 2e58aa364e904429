"""LoRA rig - a small pretrained network with LoRA on two layers, under the names that adapters of language models have.

Its task is scikit-learn's digits turned by 35 degrees: it was pretrained on digits as turned, and clients hold them
upright, so that LoRA has something to mend. Seconds on one core; the real methods play on the real engine.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy
import torch
from torch.nn import functional

from fedllm.blocks.sparse import PLACES, VALUES, dense
from fedllm.core.message import Upload
from fedllm.core.method import Method
from fedllm.core.roster import Group
from fedllm.core.seeds import numpy_stream, torch_stream
from fedllm.core.server import Reply, Request, Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode
from fedllm.data.federation import Federation
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import RoundRecord, play_round
from fedllm.tasks.function import FunctionLearner

WIDTHS = (64, 64, 64, 10)
ADAPTED = (0, 1)
"""The layers with LoRA."""
SCALE = 2.0
"""LoRA's scale, the same for all ranks."""
HELD = 1200
"""Digits from here on measure."""
Rows = dict[str, list[dict[str, Any]]]
TRAIN: dict[str, Any] = {"steps": 10, "lr": 0.05, "optimizer": "sgd", "clip_norm": None, "batch_size": 16}
"""The cards' local work."""
MIXED = {f"c{client}": rank for client, rank in enumerate((2, 2, 2, 4, 8, 16))}
"""The cards' ranks."""


@cache
def digits(degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1] of all digits turned by some degrees, [1797, 64], and classes."""
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits

    found = load_digits()
    turned = rotate(found.images / 16.0, degrees, axes=(1, 2), reshape=False, order=1)
    return torch.tensor(turned.reshape(-1, 64), dtype=torch.float32), torch.tensor(found.target)


@cache
def base() -> Tensors:
    """The pretrained network: 300 steps of Adam on digits turned by 35 degrees."""
    x, y = (part[:HELD] for part in digits(35.0))
    params = {}
    for layer, (inside, outside) in enumerate(itertools.pairwise(WIDTHS)):
        drawn = torch.rand(outside, inside, generator=torch_stream(0, "rig", f"{layer}")) * 2 - 1
        params[f"{layer}.weight"] = (drawn * math.sqrt(6 / inside)).requires_grad_()
        params[f"{layer}.bias"] = torch.zeros(outside, requires_grad=True)
    optimizer = torch.optim.Adam(list(params.values()), lr=3e-3)
    with torch.enable_grad():
        for _ in range(300):
            optimizer.zero_grad()
            functional.cross_entropy(network(params, x), y).backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in params.items()}


def network(
    base: Mapping[str, torch.Tensor], x: torch.Tensor, adapter: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """Class scores [n, 10]: ReLU between layers; LoRA and sparse entries where the adapter has them."""
    held = adapter or {}
    for layer in range(len(WIDTHS) - 1):
        out = functional.linear(x, base[f"{layer}.weight"], base[f"{layer}.bias"])
        if f"{layer}.lora_A" in held:
            out = out + SCALE * (x @ held[f"{layer}.lora_A"].T @ held[f"{layer}.lora_B"].T)
        if f"{layer}{VALUES}" in held:
            shape = (WIDTHS[layer + 1], WIDTHS[layer])
            out = out + SCALE * x @ dense(held[f"{layer}{VALUES}"], held[f"{layer}{PLACES}"], shape).T
        x = torch.relu(out) if layer < len(WIDTHS) - 2 else out
    return x


def learner(rank: int, seed: int = 0) -> FunctionLearner:
    """The pretrained network with LoRA of a rank: A uniform within 1 / sqrt(in), B = 0."""
    first: Tensors = {}
    for layer in ADAPTED:
        inside, outside = WIDTHS[layer], WIDTHS[layer + 1]
        drawn = torch.rand(rank, inside, generator=torch_stream(seed, "rig", f"{layer}.lora_A")) * 2 - 1
        first[f"{layer}.lora_A"], first[f"{layer}.lora_B"] = drawn / math.sqrt(inside), torch.zeros(outside, rank)

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack(list(examples))
        return functional.cross_entropy(network(base(), rows[:, :64], params), rows[:, 64].long(), reduction="sum")

    return FunctionLearner(loss, first)


def held_out(params: Tensors | None) -> float:
    """Accuracy on upright digits that no client has."""
    x, y = (part[HELD:] for part in digits(0.0))
    return float((network(base(), x, params).argmax(1) == y).float().mean())


def clients(seed: int, count: int = 6, alpha: float | None = None) -> Rows:
    """Upright digits at some clients: dealt alike, or by Dirichlet(alpha) over classes."""
    x, y = (part[:HELD] for part in digits(0.0))
    draw, owners = numpy_stream(seed, "rig", "clients"), numpy.zeros(HELD, dtype=int)
    for label in range(10):
        numbers = draw.permutation(numpy.flatnonzero(y.numpy() == label))
        shares = numpy.full(count, 1 / count) if alpha is None else draw.dirichlet(numpy.full(count, alpha))
        for client, part in enumerate(numpy.split(numbers, (numpy.cumsum(shares)[:-1] * len(numbers)).astype(int))):
            owners[part] = client
    held = {
        f"c{k}": [{"x": [*x[i].tolist(), float(y[i])]} for i in numpy.flatnonzero(owners == k)] for k in range(count)
    }
    return {client: rows for client, rows in held.items() if rows}


class Play:
    """A method over the rig; keeps the last upload of every client.

    Args:
        method: the method.
        learner: what is trained.
        rows: client id -> training rows.
        ranks: client id -> rank of its LoRA; the learner's where absent.
        seed: the run's seed.
        rounds: rounds of the run.
        width: clients per pass; None for all.
    """

    def __init__(
        self,
        method: Method,
        learner: FunctionLearner,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        ranks: Mapping[str, int] | None = None,
        seed: int = 0,
        rounds: int = 1,
        width: int | None = None,
    ) -> None:
        torch.set_num_threads(1)
        federation = Federation.of({client: {"train": list(held), "eval": []} for client, held in rows.items()})
        roster = {client: Group(f"rank {rank}", rank) for client, rank in (ranks or {}).items()}
        self.method, self.worker = method, LocalWorker(learner, method, federation, seed, roster=roster)
        engine = LocalEngine(self.worker, federation.client_ids, width or len(rows))
        self.server = Server(engine, seed, rounds=rounds)
        self.uploads: dict[str, Upload] = {}
        self._answer, self.worker.answer = self.worker.answer, self._heard
        self.state: State = method.init({n: t for n, t in learner.initial().items() if method.trainable(n)})
        self.states, self.records = [self.state], list[RoundRecord]()

    def _heard(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for reply in self._answer(requests):
            message = None if reply.body is None else decode(reply.body)
            if isinstance(message, Upload):
                self.uploads[reply.client] = message
            yield reply

    def rounds(self, count: int = 1, cohort: int | None = None) -> State:
        """Play some rounds."""

        async def go() -> None:
            for _ in range(count):
                size = cohort or len(self.server.clients)
                self.state, record = await play_round(self.method, self.state, self.server, size)
                self.states.append(self.state)
                self.records.append(record)

        asyncio.run(go())
        return self.state

    def accuracy(self) -> float:
        """Held-out accuracy of the global state."""
        return held_out(self.state.params)


def spread(values: Sequence[float]) -> str:
    """The mean, the least and the most of some values."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}-{max(values):.3f})"

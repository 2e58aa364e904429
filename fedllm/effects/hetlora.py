"""HETLORA's ranks shrink where data is of rank 1 and hold where it is not; who learns nothing weighs nothing.

Accuracy is measured on digits and not asserted: at this size weights by norm favour whoever moved most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.effects import Evidence
from fedllm.effects.lora_rig import MIXED, TRAIN, Play, clients, learner, spread
from fedllm.methods import find
from fedllm.methods.model_heterogeneity.hetlora import HetLoRA
from fedllm.tasks.function import FunctionLearner

SEEDS = (0, 1, 2, 3, 4)
ROUNDS, OUT, IN, RANK = 30, 8, 16, 8
SHRUNK, HOLDS = 0.65, 0.75
STEPS = {"steps": 10, "lr": 0.05, "optimizer": "sgd", "clip_norm": None, "batch_size": 64}
LIKE_PAPER = {"gamma": 0.9, "decay": 1e-3}


def measure() -> Evidence:
    """Bytes of the last round's uploads over those of the first; an idle client; accuracy."""
    shares: dict[int, list[float]] = {1: [], RANK: []}
    for rank, held in shares.items():
        for seed in SEEDS:
            play = Play(method(gamma=0.8, decay=0.1), *linear(rank, seed), seed=seed, rounds=ROUNDS)
            play.rounds(ROUNDS)
            held.append(play.records[-1].bytes_up / play.records[0].bytes_up)
    nothing = all(idle_weighs_nothing(seed) for seed in SEEDS)
    found = {name: accuracies(options) for name, options in (("norm", {}), ("plain", {"by_norm": False}))}
    return Evidence(
        "hetlora",
        HetLoRA.card.claim,
        f"Linear targets of rank 1 or {RANK}, four clients of rank {RANK}, gamma 0.8, lambda 0.1, seeds 0-4: after "
        f"{ROUNDS} rounds uploads are {spread(shares[1])} and {spread(shares[RANK])} of the first (bounds with each "
        f"seed: {SHRUNK} at most, {HOLDS} at least). A client whose B stays 0 weighs "
        f"{'nothing' if nothing else 'something'}. Digits, ranks 2 to 16, Dirichlet 0.3, not "
        f"asserted: accuracy {spread(found['norm'])} weighted by norm, "
        f"{spread(found['plain'])} by examples.",
        max(shares[1]) < SHRUNK and min(shares[RANK]) > HOLDS and nothing,
        {
            "rank 1": sum(shares[1]) / len(SEEDS),
            "full rank": sum(shares[RANK]) / len(SEEDS),
            **{f"accuracy by {name}": sum(values) / len(values) for name, values in found.items()},
        },
    )


def method(**options: Any) -> HetLoRA:
    """The method with full-batch steps."""
    return HetLoRA.model_validate({"train": STEPS, **options})


def linear(rank: int, seed: int, idle: bool = False) -> tuple[FunctionLearner, dict[str, list[dict[str, Any]]]]:
    """y = W x with a W of some rank that all four clients share; one more client with x = y = 0 where `idle`."""
    stream = torch_stream(seed, "hetlora")
    left = torch.linalg.qr(torch.randn(OUT, OUT, generator=stream))[0][:, :rank]
    right = torch.linalg.qr(torch.randn(IN, OUT, generator=stream))[0][:, :rank]
    rows: dict[str, list[dict[str, Any]]] = {"idle": [{"x": [0.0] * (IN + OUT)}]} if idle else {}
    for client in range(4):
        x = torch.randn(64, IN, generator=stream)
        pairs = torch.cat([x, x @ (left @ right.T).T], 1)
        rows[f"c{client}"] = [{"x": row} for row in pairs.tolist()]
    first = (torch.rand(RANK, IN, generator=stream) * 2 - 1) / IN**0.5

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        held = torch.stack(list(examples))
        found = 2 * held[:, :IN] @ params["layer.lora_A"].T @ params["layer.lora_B"].T
        return (found - held[:, IN:]).square().sum() / 2

    return FunctionLearner(loss, {"layer.lora_A": first, "layer.lora_B": torch.zeros(OUT, RANK)}), rows


def idle_weighs_nothing(seed: int) -> bool:
    """Whether the first state is the same to the bit with and without a client that learns nothing."""
    states = [Play(method(), *linear(RANK, seed, idle), seed=seed).rounds().params for idle in (False, True)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def accuracies(options: dict[str, Any]) -> list[float]:
    """Held-out accuracy on digits after 20 rounds, three seeds."""
    found = []
    for seed in SEEDS[:3]:
        rows = clients(seed, alpha=0.3)
        play = Play(find("hetlora")(train=TRAIN, **LIKE_PAPER, **options), learner(16, seed), rows, MIXED, seed, 20)
        play.rounds(20)
        found.append(play.accuracy())
    return found

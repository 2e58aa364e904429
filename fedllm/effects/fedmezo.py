"""What FedMeZO keeps for a backward pass, and what rates by client do to the clients' losses.

Memory: bytes of tensors that PyTorch saves for the backward pass in a round on a toy Llama with LoRA. Rates: softmax
regression on digits, two classes a client, all 20 clients, 40 rounds of 30 steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from fedllm.core.method import Method
from fedllm.effects import Evidence
from fedllm.effects.rig import Play, skewed_digits, spread
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.evaluation.fedmezo import FedMeZO
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

SEEDS = (0, 1, 2)
TRAIN = {"steps": 30, "batch_size": 16, "lr": 0.03, "optimizer": "sgd", "clip_norm": None}
ROUNDS = 40


def measure() -> Evidence:
    """Saved bytes of FedMeZO and FedAvg; the clients' mean loss and its spread with one rate and with rates by loss."""
    means: dict[str, list[float]] = {"frozen": [], "round-wise": []}
    widths: dict[str, list[float]] = {"frozen": [], "round-wise": []}
    for seed in SEEDS:
        learner, rows, _ = skewed_digits(seed)
        for rates in means:
            play = Play(FedMeZO(train=TRAIN, rates=rates), learner, rows, seed=seed, rounds=ROUNDS)
            params = play.rounds(ROUNDS).params
            losses = [
                float(learner.loss(params, [learner.encode(row) for row in held])) / len(held) for held in rows.values()
            ]
            means[rates].append(statistics.mean(losses))
            widths[rates].append(statistics.pstdev(losses))
    train = {"steps": 2, "lr": 0.01, "optimizer": "sgd", "clip_norm": None, "batch_size": 2}
    own, first = saved_bytes(FedMeZO(train=train)), saved_bytes(FedAvg(train=train))
    more = [b / a - 1 for a, b in zip(*means.values(), strict=True)]
    less = [1 - b / a for a, b in zip(*widths.values(), strict=True)]
    return Evidence(
        "fedmezo",
        FedMeZO.card.claim,
        f"Saved for a backward pass: {own:,} bytes, FedAvg {first:,}. Rates by loss against one rate, seeds {SEEDS}, "
        f"{ROUNDS} rounds: the spread of the clients' losses is {_percent(less)} smaller, their mean {_percent(more)} "
        "higher (asserted is neither: the claim is about the mean, and the change of it is small here).",
        None,
        {
            "saved bytes": float(own),
            "saved bytes, fedavg": float(first),
            **{f"mean loss, {rates}": statistics.mean(found) for rates, found in means.items()},
            **{f"spread, {rates}": statistics.mean(found) for rates, found in widths.items()},
        },
    )


def saved_bytes(method: Method) -> int:
    """The most bytes of tensors that one round's graph holds on a toy Llama: what back-propagation needs."""
    task = TaskSettings(max_length=64, template="plain")
    learner = TransformerLearner(toy_model("llama", kind="causal-lm"), task, AdapterSettings(rank=2), None, 0)
    rows = {"a": [{"instruction": "reverse amber", "response": "rebma"}, {"instruction": "say no", "response": "no"}]}
    seen: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Play(method, learner, rows).rounds(1)
    return sum(seen) // 2  # two steps


def _percent(shares: Sequence[float]) -> str:
    return f"{spread([100 * share for share in shares])} %"

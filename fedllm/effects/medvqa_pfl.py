"""MedVQA-pFL gives an unreliable client little weight: digits in four styles and one client with shuffled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.nn import functional

from fedllm.core.tensors import Tensors
from fedllm.core.work import Groups
from fedllm.effects import Evidence
from fedllm.effects.rig import Play, spread
from fedllm.methods.applications.medvqa_pfl import MedVQA, reliability
from fedllm.tasks.function import FunctionLearner

SEEDS = (0, 1, 2)
TOKENS, WIDTH = 4, 16
STYLES = ("plain", "dark", "noisy", "faint", "shuffled")


class Prompted(FunctionLearner):
    """A frozen classifier of digits whose hidden layer is moved by a prompt [4, 16]; it has an accuracy."""

    score_names = ("accuracy", "loss")
    higher_is_better = True

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """loss, right and examples of every example."""
        found = super().counts_by_row(groups)
        logits = self.outputs(groups)
        labels = [int(e.inputs["x"][-1]) for group in groups for e in group]
        for counts, row, label in zip(found, logits, labels, strict=True):
            counts["right"] = float(int(row.argmax()) == label)
        return found

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Accuracy and mean loss."""
        n = counts.get("examples", 0.0)
        return {"accuracy": counts["right"] / n if n else None, **super().values(counts)}


def rig(seed: int) -> tuple[Prompted, dict[str, list[dict[str, Any]]]]:
    """The frozen classifier (fitted on plain digits) and 40 rows of each client."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    digits = load_digits()
    x, y = digits.data / 16.0, digits.target
    rng = numpy.random.default_rng(seed)
    order = rng.permutation(len(y))
    base = MLPClassifier((64,), activation="tanh", max_iter=1000, random_state=seed).fit(x[order[:700]], y[order[:700]])
    w1, w2 = (torch.tensor(w, dtype=torch.float32) for w in base.coefs_)
    b1, b2 = (torch.tensor(b, dtype=torch.float32) for b in base.intercepts_)
    into = torch.tensor(rng.normal(size=(TOKENS * WIDTH, 64)) / 8, dtype=torch.float32)

    def outputs(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(list(examples))[:, :64]
        return torch.tanh(batch @ w1 + b1 + params["prompt"].flatten() @ into) @ w2 + b2

    def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        labels = torch.stack([e[64] for e in examples]).long()
        return functional.cross_entropy(outputs(params, examples), labels, reduction="sum")

    looks = {
        "plain": lambda a: a, "dark": lambda a: a * 0.3, "faint": lambda a: 0.4 + 0.3 * a, "shuffled": lambda a: a,
        "noisy": lambda a: numpy.clip(a + rng.normal(scale=0.3, size=a.shape), 0, 1),
    }  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, style in enumerate(STYLES):
        part = order[700 + 40 * number : 740 + 40 * number]
        labels = rng.permutation(y[part]) if style == "shuffled" else y[part]
        seen = looks[style](x[part])
        rows[style] = [{"x": [*seen[i].tolist(), float(labels[i])]} for i in range(40)]
    start = {"prompt": torch.tensor(rng.normal(scale=0.05, size=(TOKENS, WIDTH)), dtype=torch.float32)}
    return Prompted(loss, start, outputs=outputs), rows


def measure() -> Evidence:
    """The largest weight that an honest client gives the one with shuffled answers, after 8 rounds."""
    largest, trust = [], []
    for seed in SEEDS:
        learner, rows = rig(seed)
        play = Play(MedVQA(), learner, rows, seed=seed, rounds=8)
        state = play.rounds(8)
        accuracies = state.numbers["accuracy"]
        honest = [style for style in STYLES if style != "shuffled"]
        weights = [reliability(style, state.memory["own"], accuracies)["shuffled"] for style in honest]
        largest.append(max(weights))
        trust.append(accuracies["shuffled"])
    return Evidence(
        "medvqa-pfl",
        MedVQA.card.claim,
        f"Weight of the client with shuffled answers at any honest client, seeds {SEEDS}: at most {spread(largest)}; "
        f"an equal share is 0.25 (margin: below 0.20 with each seed). Its own accuracy: {spread(trust)}.",
        all(weight < 0.20 for weight in largest),
        {"largest_weight": max(largest), "equal_share": 0.25},
    )

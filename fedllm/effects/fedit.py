"""FedIT beats each client alone and the base model, and stays near pooled training: the eight organisations, in small.

Real text and the bundled pretrained model: the quickstart with fewer documents and rounds. One seed takes about a
minute on two cores; the quickstart itself shows the same with more documents.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedllm.effects import Evidence
from fedllm.methods.instruction.fedit import FedIT
from fedllm.report.words import value_text
from fedllm.run import run

SEEDS = (0, 1)
SIZES = ("rounds=8", "data.documents=24", "data.held_out=16", "evaluation.every=0")


def measure() -> Evidence:
    """Held-out loss on the answers of all organisations, after 8 rounds, two seeds."""
    found: dict[str, list[float]] = {name: [] for name in ("base", "local", "federated", "central")}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            place = Path(folder) / str(seed)
            result = run("quickstart", [*SIZES, f"seed={seed}", "evaluation.metric=loss"], folder=place)
            for name, losses in found.items():
                losses.append(result.value(name, "loss") or 0.0)
    base, local, federated, _ = found.values()
    means = {name: sum(losses) / len(losses) for name, losses in found.items()}
    told = ", ".join(f"{name} {value_text('loss', value)}" for name, value in means.items())
    return Evidence(
        "fedit",
        FedIT.card.claim,
        f"Held-out loss of the answers, mean of seeds {SEEDS}: {told} (margins with each seed: 10 % below local, "
        "half of base).",
        all(f < 0.9 * own and f < 0.5 * b for f, own, b in zip(federated, local, base, strict=True)),
        means,
    )

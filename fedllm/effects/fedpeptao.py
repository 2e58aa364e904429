"""FedPepTAO sends half of the bytes and is no worse for it; its server-side correction is measured beside."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fedllm.core.tensors import size_in_bytes
from fedllm.effects import Evidence
from fedllm.effects.prompt_rig import clients, played
from fedllm.effects.rig import spread
from fedllm.methods.prompts.fedpeptao import FedPepTAO

SEEDS = (0, 1)
PLAYED: dict[str, dict[str, Any]] = {
    "half": {"name": "fedpeptao", "share": 0.5},
    "all": {"name": "fedpeptao", "share": 1.0},
    "fedavg": {"name": "fedavg"},
}


def measure() -> Evidence:
    """Loss of the eight organisations on their own documents after 5 rounds with half of them, and what travels."""
    found: dict[str, list[float]] = {name: [] for name in PLAYED}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            data = clients("different", seed, own=True)
            for name, method in PLAYED.items():
                result = played(
                    method,
                    data,
                    seed,
                    Path(folder) / f"{name}-{seed}",
                    [],
                    rounds=5,
                    cohort=4,
                    train={"steps": 6, "batch_size": 2, "lr": 0.02},
                    adapter={"kind": "prefix", "tokens": 4},
                )
                sizes[name] = float(size_in_bytes(FedPepTAO.shared(result.state)))
                found[name].append(result.value("federated", "loss") or 0.0)
    half, whole, plain = found.values()
    return Evidence(
        "fedpeptao",
        FedPepTAO.card.claim,
        f"Prefixes of {sizes['half']:.0f} bytes travel in place of {sizes['all']:.0f}. Loss on the clients' own "
        f"documents, seeds 0-1: half of the layers {spread(half)}, all {spread(whole)}, FedAvg {spread(plain)}. "
        "So half of the layers are enough where the others stay personal; that correction at the server makes training "
        "faster does not show (all against FedAvg). Nothing is asserted.",
        None,
        {**{name: sum(losses) / len(losses) for name, losses in found.items()}, "bytes half": sizes["half"]},
    )

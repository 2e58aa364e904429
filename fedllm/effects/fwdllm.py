"""FwdLLM's pacing at an equal number of forward passes: softmax regression on digits, ten clients."""

from __future__ import annotations

from typing import Any

from fedllm.effects import Evidence
from fedllm.effects.rig import Play, skewed_digits, spread
from fedllm.methods.silo_and_device.fwdllm import FwdLLM

SEEDS = (0, 1)
BUDGET, CLIENTS, THRESHOLD = 2000, 10, 1.8
ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"most": 1},
    "paced": {"most": 8},
    "paced, filtered": {"most": 8, "candidates": 10},
}


def accuracy(seed: int, options: dict[str, Any]) -> tuple[float, int]:
    """Held-out accuracy after `BUDGET` directions, and how often theta moved."""
    learner, rows, held_out = skewed_digits(seed, CLIENTS, 10)
    train = {"batch_size": 32, "lr": 0.5, "optimizer": "sgd", "clip_norm": None}
    method = FwdLLM(train=train, perturbations=2, threshold=THRESHOLD, relative=True, upload="pairs", **options)
    play = Play(method, learner, rows, seed=seed, rounds=1)
    while play.server.meter.bytes.get("work/up/update", 0) < 8 * BUDGET:
        play.rounds(1)
    return held_out(play.state.params)[0], play.state.round


def measure() -> Evidence:
    """Accuracy of a fixed number of directions, of pacing, and of pacing with filtered directions."""
    found = {name: [accuracy(seed, options) for seed in SEEDS] for name, options in ARMS.items()}
    mean = {name: sum(a for a, _ in pairs) / len(pairs) for name, pairs in found.items()}
    told = ", ".join(f"{name} {spread([a for a, _ in p], 3)} in {p[0][1]} moves" for name, p in found.items())
    return Evidence(
        "fwdllm",
        FwdLLM.card.claim,
        f"Held-out accuracy after {BUDGET:,} directions, seeds {SEEDS}: {told}. The differences are no larger than "
        "the spread over seeds, so nothing is asserted; the published gains are those of phones and large models.",
        None,
        mean,
    )

"""FedPrompt sends a tiny part of the model; a shared prompt knows more than those tuned alone, less than pooled."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedllm.effects import Evidence
from fedllm.effects.prompt_rig import clients, model_size, played
from fedllm.effects.rig import spread
from fedllm.methods.prompts.fedprompt import FedPrompt

SEEDS = (0, 1)
TOKENS = 10


def measure() -> Evidence:
    """Loss on documents of all eight organisations after 4 rounds of 6 steps, and what travels."""
    found: dict[str, list[float]] = {"local": [], "federated": [], "central": []}
    sent, size = 0.0, model_size()
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            result = played(
                "fedprompt",
                clients("different", seed),
                seed,
                Path(folder) / str(seed),
                ["local", "central"],
                rounds=4,
                train={"steps": 6, "batch_size": 2, "lr": 0.05},
                adapter={"kind": "prompt", "tokens": TOKENS},
            )
            sent = float(result.state.params["prompt"].numel())
            for model, losses in found.items():
                losses.append(result.value(model, "loss") or 0.0)
    alone, together, pooled = found.values()
    return Evidence(
        "fedprompt",
        FedPrompt.card.claim,
        f"A prompt of {sent:.0f} numbers, {sent / size:.2%} of the model. Loss on the documents of all organisations, "
        f"seeds 0-1: each alone {spread(alone)}, together {spread(together)}, all data pooled {spread(pooled)}. So a "
        "shared prompt beats prompts tuned alone, but at this size it loses more than a little to pooled training; "
        "nothing is asserted.",
        None,
        {"share": sent / size, **{name: sum(losses) / len(losses) for name, losses in found.items()}},
    )

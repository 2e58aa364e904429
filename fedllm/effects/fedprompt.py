"""FedPrompt sends a tiny part of the model: near pooled training where clients are alike, above each alone elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedllm.effects import Evidence
from fedllm.effects.prompt_rig import clients, played
from fedllm.effects.rig import spread
from fedllm.methods.prompts.fedprompt import FedPrompt
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings

SEEDS = (0, 1)
TOKENS = 10


def measure() -> Evidence:
    """Loss on documents of all organisations after 6 rounds of 6 steps, and the numbers that travel."""
    found: dict[str, list[float]] = {f"{k}/{m}": [] for k, m in PLACES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for kind, against in (("alike", "central"), ("different", "local")):
                result = played(
                    "fedprompt",
                    clients(kind, seed),  # type: ignore[arg-type]
                    seed,
                    Path(folder) / f"{kind}-{seed}",
                    [against],
                    rounds=6,
                    train={"steps": 6, "batch_size": 2, "lr": 0.05},
                    adapter={"kind": "prompt", "tokens": TOKENS},
                )
                for model in ("federated", against):
                    found[f"{kind}/{model}"].append(result.value(model, "loss") or 0.0)
    sizes = [p.numel() for p in load_model(ModelSettings(), "causal-lm").model.parameters()]
    width = 256
    share = TOKENS * width / sum(sizes)
    print(found, share)


PLACES = (("alike", "federated"), ("alike", "central"), ("different", "federated"), ("different", "local"))

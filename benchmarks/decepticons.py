"""Decepticons - a server that reshapes weights, on Enron sentences: what it reads, and what stops it.

    python -m benchmarks.decepticons

The model is a GPT-2 of three layers with random weights and ReLU, over the tokenizer of fedllm-tiny: the attack needs
learned positions, which fedllm-tiny does not have. Clients send the change of all weights after one step. Every client
trains on a few texts of equal length, cut out of the sentences one behind the other (`task.pack=stream`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.show import table
from fedllm.attack import share_text, siege

DATA = Path(__file__).parents[2] / "shared" / "data" / "enron-sentences.jsonl.gz"
ROWS, LENGTH = 8, 32
DEFENCES = ("prune", "local-noise", "freeze-embeddings", "secure", "integrity")


def model(place: Path) -> Path:
    """A folder with the model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedllm.models.load import load_model
    from fedllm.models.settings import ModelSettings

    tokenizer: Any = load_model(ModelSettings(), "causal-lm").tokenizer
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=LENGTH, n_embd=192, n_inner=768, n_layer=3, n_head=4,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def recipe(place: Path, **given: Any) -> dict[str, Any]:
    """One step of all weights at a rate of 1: what comes up is the gradient itself, in float32."""
    return {
        "name": "decepticons", "rounds": 1, "cohort": 3, "method": {"name": "fedavg", "weighting": "uniform"},
        "model": {"name": str(place)}, "adapter": {"kind": "full"},
        "task": {"kind": "causal-lm", "max_length": LENGTH, "template": "plain", "loss_on": "all", "pack": "stream"},
        "data": {"path": str(DATA), "partition": {"by": "iid", "clients": 20},
                 "evaluation": {"fraction": 0.1, "per_client": 20}},
        "train": {"steps": 1, "batch_size": 64, "optimizer": "sgd", "lr": 1.0, "clip_norm": None},
        "evaluation": {"against": [], "clients": 3},
        "methods": {"decepticons": {"rows": ROWS, "victims": 3}, "prune": {"share": 0.9},
                    "local-noise": {"bound": 1.0, "sd": 1e-3, "noise_key": "seed"},
                    "secure": {"clip": 1000.0, "precision": 28}},
        **given,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    if not DATA.exists():
        raise SystemExit(f"There is no {DATA.name}: the Enron sentences are not part of the package.")
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = model(Path(folder) / "model")
        found = siege(recipe(place), ["decepticons"], DEFENCES, folder=Path(folder) / "full")
        lora = siege(recipe(place, adapter={"kind": "lora"}), ["decepticons"], folder=Path(folder) / "lora")
    named = [(r["defence"], r) for r in found.rows if r["attack"] == "decepticons"]
    named += [("LoRA alone is trained", r) for r in lora.rows if r["attack"] == "decepticons"]
    names = ("token_f1", "token_recall", "rouge_2", "rouge_l")
    for name, row in named:
        shown = [share_text(row["read"].get(one)) or "nothing" for one in names]
        rows.append((name, *shown, share_text(row["clean success"])))
    print(table(("defence", "token F1", "tokens found", "ROUGE-2", "ROUGE-L", "token F1 without the upload"), rows))
    print(
        f"\nThree clients with {ROWS} sentences each, cut into texts of {LENGTH} tokens; one step of SGD at rate 1. "
        "With `secure` the server reads the sum of the three. `integrity` refuses the weights; LoRA sends none of them."
    )


if __name__ == "__main__":
    sys.exit(main())

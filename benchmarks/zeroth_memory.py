"""Zeroth-order memory - the peak of a FedKSeed turn beside that of plain inference and of a backward pass.

    python benchmarks/zeroth_memory.py

Every number is the peak resident memory of a process of its own, less what the imported libraries took before a model
was there. All three read one row of 128 tokens. The turn goes through the engine: it replays two seeds over all
weights, takes two steps and puts the first weights back from disk. The backward pass makes one SGD step on all weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from typing import Any

CASES = ("inference", "turn", "backward")
MODELS = ("fedllm-tiny", "llama-100m")
TOKENS = 128


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(name: str) -> Any:
    """The bundled model, or a random Llama of 10^8 weights with a byte-level tokenizer."""
    from fedllm.models.load import Loaded, load_model
    from fedllm.models.settings import ModelSettings
    from fedllm.models.toy import toy_tokenizer

    if name == "fedllm-tiny":
        return load_model(ModelSettings(name=name, device="cpu"), "causal-lm")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2688, vocab_size=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Loaded(model, toy_tokenizer("llama"), name, "causal-lm", "", "llama")  # type: ignore[arg-type]


def measure(case: str, name: str) -> dict[str, float]:
    """One case in this process."""
    import torch
    import transformers  # noqa: F401  (so that it counts as a library)

    from fedllm.blocks.zeroth import SEED_LIMIT
    from fedllm.core.message import Received
    from fedllm.core.server import Server
    from fedllm.data.federation import Federation
    from fedllm.engine.local import LocalEngine, LocalWorker
    from fedllm.methods.communication.fedkseed import FedKSeed
    from fedllm.models.adapters.settings import AdapterSettings
    from fedllm.tasks.learner import TransformerLearner
    from fedllm.tasks.settings import TaskSettings

    torch.set_num_threads(1)
    libraries = peak()
    task = TaskSettings(max_length=TOKENS, template="plain", loss_on="all")
    learner = TransformerLearner(load(name), task, AdapterSettings(kind="full"), None, 0)
    rows = [{"text": "the clinic in the valley keeps its own records " * 20}]
    weights, begun = sum(p.numel() for p in learner.loaded.model.parameters()), time.perf_counter()
    if case == "turn":
        method = FedKSeed(train={"steps": 2, "batch_size": 1, "lr": 1e-6, "optimizer": "sgd", "clip_norm": None})  # type: ignore[arg-type]
        worker = LocalWorker(learner, method, Federation.of({"a": {"train": rows, "eval": []}}), 0)
        server = Server(LocalEngine(worker, ["a"]), 0)
        sums = torch.zeros(method.size)
        sums[:2] = 1.0
        sent = Received(None, pool={"master": torch.tensor(SEED_LIMIT - 1, dtype=torch.int32), "sums": sums})

        async def turn() -> int:
            return len([answer async for answer in server.ask(method.work, {"a": sent})])

        if asyncio.run(turn()) != 1:
            raise SystemExit(str(server.lost))
    else:
        model = learner.loaded.model.requires_grad_(case == "backward")
        groups = [learner.prepare(rows)]
        for _ in range(2 if case == "inference" else 1):
            with torch.set_grad_enabled(case == "backward"), learner.using(None):
                loss = learner.losses(groups).sum()
                if case == "backward":
                    loss.backward()
                    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    return {"weights": weights, "peak": peak() - libraries, "seconds": time.perf_counter() - begun}


def main() -> None:
    """Run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    print("| model | weights (MiB) | inference (MiB) | FedKSeed turn (MiB) | backward (MiB) | turn / inference |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name in MODELS:
        found = {}
        for case in CASES:
            asked = [sys.executable, __file__, "--one", case, name]
            found[case] = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
        peaks = [found[case]["peak"] for case in CASES]
        size = found["turn"]["weights"] * 4 / 2**20
        numbers = " | ".join(f"{value:.0f}" for value in (size, *peaks))
        print(f"| {name} | {numbers} | {peaks[1] / peaks[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()

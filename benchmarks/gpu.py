"""GPU - a cohort in one pass on a GPU: against one by one, and against one plain run of the same total batch.

Needs a GPU and nothing else: no network, no data. Llama shapes of 0.5 B and 3 B with random weights in bf16, played by
the engine: rounds of FedAvg with four local steps. `--try` plays a tiny shape, on a CPU too, to see that all is there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.ground import texts
from benchmarks.show import table
from fedllm.core.train import Train
from fedllm.core.work import Example
from fedllm.effects.rig import Play
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

QUESTION = (
    "On a GPU, how much faster is a cohort in one pass, and how near is it to one plain run of the same total batch?"
)
HEAD = ("model", "rank", "clients x batch x tokens", "over one by one", "share of the limit", "tokens/s", "peak GiB")
Shape = tuple[int, int, int, int, int]
SHAPES: dict[str, Shape] = {"0.5 B": (896, 24, 14, 2, 4864), "3 B": (2560, 32, 20, 4, 9728)}
"""Width, layers, heads, key heads, width of the feed-forward part; the vocabulary has 32,000 entries."""
TINY: Shape = (64, 2, 4, 2, 128)
CASES = ((8, 1, 256), (8, 4, 256), (16, 1, 512), (32, 2, 1024))
"""Rank, batch, tokens."""
CLIENTS, STEPS, REPEATS = 8, 4, 5
VOCABULARY = 32_000


def learner(shape: Shape, rank: int, length: int, device: str) -> TransformerLearner:
    """A random Llama in bf16 with LoRA on query and value."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, keys, inner = shape
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=inner, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    loaded = Loaded(model, toy_tokenizer("llama"), "random", "causal-lm", "", "llama")
    settings = AdapterSettings(rank=rank, alpha=2.0 * rank, targets=["q_proj", "v_proj"])
    return TransformerLearner(
        loaded, TaskSettings(max_length=length, template="plain", loss_on="all"), settings, None, 0
    )


def plain(made: TransformerLearner, batches: Sequence[list[Example]], train: Train) -> Callable[[], None]:
    """A loop over the same model with one adapter: as many steps, each on the rows of all clients."""
    start = made.initial()

    def work() -> None:
        own = {name: tensor[None].to(made.device, copy=True).requires_grad_() for name, tensor in start.items()}
        optimizer = torch.optim.AdamW(own.values(), lr=train.lr, weight_decay=0.0, fused=True)
        for batch in batches:
            with made.using(own):
                loss = made.losses([batch]).sum() / sum(example.targets for example in batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work, turn about, after one warm-up of each."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            synchronised()
            begun = time.perf_counter()
            work()
            synchronised()
            found[name] += [time.perf_counter() - begun] if turn else []
    return found


def synchronised() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(name: str, shape: Shape, case: tuple[int, int, int], device: str, repeats: int) -> tuple[str, ...]:
    """One row."""
    rank, batch, length = case
    made = learner(shape, rank, length, device)
    train = Train(steps=STEPS, batch_size=batch, lr=1e-4)
    data = {f"c{k}": texts(batch * STEPS, length, k) for k in range(CLIENTS)}
    held = [made.prepare(rows) for rows in data.values()]
    batches = [[e for own in held for e in own[step * batch : (step + 1) * batch]] for step in range(STEPS)]
    alone, together = (Play(FedAvg(train=train), made, data, width=width, rounds=1000) for width in (1, CLIENTS))
    limit = plain(made, batches, train)
    costs = timed({"alone": lambda: alone.rounds(1), "together": lambda: together.rounds(1), "limit": limit}, repeats)
    peak = 0.0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        together.rounds(1)
        peak = torch.cuda.max_memory_allocated() / 2**30
    speed = CLIENTS * batch * length * STEPS / statistics.median(costs["together"])
    shown = f"{CLIENTS} x {batch} x {length}"
    return name, str(rank), shown, over(costs, "alone"), over(costs, "limit"), f"{speed:,.0f}", f"{peak:.1f}"


def over(costs: dict[str, list[float]], name: str) -> str:
    """How many times the seconds of `name` are those of the cohort in one pass: median (lowest-highest)."""
    found = [a / b for a, b in zip(costs[name], costs["together"], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--try", action="store_true", dest="tried", help="a tiny shape, on whatever there is")
    given = parser.parse_args()
    found = torch.cuda.is_available()
    if not found and not given.tried:
        raise SystemExit("No GPU was found. This benchmark needs one; the others run on a CPU.")
    shapes, cases = ({"tiny": TINY}, ((8, 1, 32),)) if given.tried else (SHAPES, CASES)
    rows, device = [], "cuda" if found else "cpu"
    for name, shape in shapes.items():
        for case in cases:
            rows.append(measured(name, shape, case, device, given.repeats))
            print(" | ".join(rows[-1]), flush=True)  # what is measured is not lost where time runs out
            if found:
                torch.cuda.empty_cache()
    place = torch.cuda.get_device_name() if found else "a CPU"
    print(f"\n{QUESTION}\n\n{table(HEAD, rows)}\n\n*{place}, torch {torch.__version__}, bf16, {STEPS} local steps.*")


if __name__ == "__main__":
    main()

"""GPU - a cohort in one pass on a GPU: against one by one, and against one plain run of the same total batch.

Needs a GPU and nothing else: no network, no data. Llama shapes of 0.5 B and 3 B with random weights in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.show import table
from fedllm.core.work import Example
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

SHAPES = {"0.5 B": (896, 24, 14, 2, 4864), "3 B": (2560, 32, 20, 4, 9728)}
"""Width, layers, heads, key heads, width of the feed-forward part; the vocabulary has 32,000 entries."""
HEAD = ("model", "rank", "batch x tokens", "clients", "over one by one", "share of the large batch", "peak GiB")
CASES = ((8, 1, 256), (8, 4, 256), (16, 1, 512), (32, 2, 1024))
"""Rank, batch, tokens."""
CLIENTS = 8
VOCABULARY = 32_000


def learner(shape: tuple[int, int, int, int, int], rank: int, length: int, device: str) -> TransformerLearner:
    """A random Llama in bf16 with LoRA on query and value."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, keys, inner = shape
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=inner, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    loaded = Loaded(model, toy_tokenizer("llama"), "random", "causal-lm", "", "llama")
    settings = AdapterSettings(rank=rank, alpha=2.0 * rank, targets=["q_proj", "v_proj"])
    return TransformerLearner(
        loaded, TaskSettings(max_length=length, template="plain", loss_on="all"), settings, None, 0
    )


def examples(count: int, length: int) -> list[Example]:
    """Examples of random tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (count, length), generator=draw)
    return [Example({"input_ids": row}, row, length, length - 1) for row in rows]


def step(made: TransformerLearner, groups: list[list[Example]]) -> Callable[[], None]:
    """One forward and backward pass with as many adapters as groups."""
    start = made.initial()
    own = {n: t.to(made.device).expand(len(groups), *t.shape).clone().requires_grad_() for n, t in start.items()}

    def work() -> None:
        with made.using(own):
            torch.autograd.grad(made.losses(groups).sum(), list(own.values()))

    return work


def timed(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each work, turn about: the median."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            found[name] += [time.perf_counter() - begun] if turn else []
    return {name: statistics.median(each) for name, each in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU was found. This benchmark needs one; the others run on a CPU.")
    rows = []
    for name, shape in SHAPES.items():
        for rank, batch, length in CASES:
            made, held = learner(shape, rank, length, "cuda"), examples(CLIENTS * batch, length)
            groups = [held[k * batch : (k + 1) * batch] for k in range(CLIENTS)]
            alone = [step(made, [group]) for group in groups]

            def turns(alone: list[Callable[[], None]] = alone) -> None:
                for work in alone:
                    work()

            works = {"turns": turns, "together": step(made, groups), "large": step(made, [held])}
            torch.cuda.reset_peak_memory_stats()
            found, peak = timed(works, given.repeats), torch.cuda.max_memory_allocated() / 2**30
            over, share = found["turns"] / found["together"], found["large"] / found["together"]
            cells = f"{batch} x {length}", str(CLIENTS), f"{over:.2f}", f"{100 * share:.0f} %", f"{peak:.1f}"
            rows.append((name, str(rank), *cells))
            del made, held, groups, alone, works
            torch.cuda.empty_cache()
    print(f"{table(HEAD, rows)}\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16.")


if __name__ == "__main__":
    main()

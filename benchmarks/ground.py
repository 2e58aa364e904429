"""Ground - what the benchmarks share: random Llamas of stated sizes, plain loops, and costs measured interleaved.

Ratios only: what is compared runs in one process, turn about, and the median over turns is told with the lowest and the
highest. CPU seconds are those of all threads of this process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.core.work import Example
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

REPEATS = 5


@dataclass(frozen=True)
class Size:
    """The shape of a random Llama.

    Attributes:
        hidden: width.
        layers: blocks.
        heads: attention heads.
        inner: width of the feed-forward part.
        vocabulary: tokens that the model knows; the tokenizer writes the first few hundred.
    """

    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int = 512


SIZES = {
    "0.3 M": Size(96, 2, 4, 256),
    "1 M": Size(128, 4, 4, 344),
    "3.4 M": Size(256, 4, 8, 688),
    "4.3 M": Size(256, 4, 8, 688, 4096),
}
"""By weights. Of the last, the vocabulary has 24 %: between Llama-3.2-1B (21 %) and Qwen2.5-0.5B (28 %)."""


def model_folder(size: Size, place: Path) -> Path:
    """A folder with the random model and a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = toy_tokenizer("llama")
    config = LlamaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=size.inner, vocab_size=size.vocabulary, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    return place


def learner(size: Size, rank: int = 8, length: int = 128, **adapter: Any) -> TransformerLearner:
    """A learner over a random model, LoRA on query and value."""
    with tempfile.TemporaryDirectory() as folder:
        place = model_folder(size, Path(folder))
        loaded = load_model(ModelSettings(name=str(place), device="cpu"), "causal-lm")
    settings = AdapterSettings(**{"rank": rank, "alpha": 2.0 * rank, "targets": ["q_proj", "v_proj"], **adapter})
    task = TaskSettings(max_length=length, template="plain", loss_on="all")
    return TransformerLearner(loaded, task, settings, None, 0)


def texts(count: int, length: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of random letters that fill a window of `length` tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(97, 123, (count, length * 4), generator=draw).tolist()
    return [{"text": "".join(map(chr, row))} for row in found]


class PlainLoop:
    """The same optimiser steps without any federation: peft's LoRA in the same model, prepared batches, AdamW, clip 1.

    Args:
        size: the model.
        rank: LoRA's rank.
        batches: prepared batches of inputs and labels.
        lr: learning rate.
    """

    def __init__(self, size: Size, rank: int, batches: Sequence[dict[str, torch.Tensor]], lr: float = 1e-3) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            base = LlamaForCausalLM.from_pretrained(model_folder(size, Path(folder)))
        self.model: Any = get_peft_model(
            base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        self.batches, self.lr = list(batches), lr
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def steps(self, count: int) -> None:
        """`count` optimiser steps with a new optimiser."""
        optimizer = torch.optim.AdamW(self.params, lr=self.lr, weight_decay=0.0)
        for step in range(count):
            loss = self.model(**self.batches[step % len(self.batches)]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def batches(examples: Sequence[Example], size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches with labels, as a plain loop wants them."""
    found = []
    for start in range(0, len(examples) - size + 1, size):
        rows = examples[start : start + size]
        longest = max(len(e.labels) for e in rows)
        ids = torch.zeros(size, longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, e in enumerate(rows):
            n = len(e.labels)
            ids[number, :n], mask[number, :n], labels[number, :n] = e.inputs["input_ids"], 1, e.labels
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@dataclass(frozen=True)
class Cost:
    """CPU seconds and wall seconds."""

    cpu: float
    wall: float


def cost(work: Callable[[], object]) -> Cost:
    """What one call costs."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def interleaved(works: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[Cost]]:
    """Costs of several works, turn about, after one warm-up of each."""
    for work in works.values():
        work()
    found: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(cost(work))
    return found


def ratio(costs: Mapping[str, Sequence[Cost]], name: str, to: str, of: str = "cpu") -> str:
    """name / to, turn by turn: median (lowest-highest)."""
    found = [getattr(a, of) / getattr(b, of) for a, b in zip(costs[name], costs[to], strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def seconds(costs: Sequence[Cost], of: str = "wall") -> float:
    """The median."""
    return statistics.median(getattr(one, of) for one in costs)

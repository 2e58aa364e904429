"""Tokens - tokens trained on as a share of tokens computed: the rest is padding.

Counted while real rounds are played: every batch that the learner puts together is a pass of rows x longest row.
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.show import main
from fedllm.core.errors import DataError
from fedllm.core.train import Train
from fedllm.core.work import Groups
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalEngine
from fedllm.engine.width import choose
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.tasks.learner import Batch, TransformerLearner
from fedllm.tasks.settings import TaskSettings

QUESTION = "What share of the tokens that a pass computes is trained on?"
HEAD = (
    "rows", "batch", "clients per pass", "passes", "tokens computed", "tokens trained on", "share", "goal 85 %",
    "share of positions with logits", "with labels",
)  # fmt: skip
NOTE = (
    "fedllm-tiny, eight of the T0 tasks as clients with up to 64 rows of at most 256 tokens each; every client takes "
    "the same steps in every line of one batch size, so that only the padding differs. Rows that fill a client up to "
    "the width of its pass count as computed. "
    "Packed rows are blocks of whole texts, measured at the width `auto` alone."
)
DATA = Path("../shared/data/t0-tasks.jsonl.gz")
CLIENTS, ROWS, LENGTH = 8, 64, 256
SEEN = 16
"""Rows that a client trains on in each case: 16 steps of 1, 4 of 4 or 2 of 8; quick halves them."""
BATCHES: tuple[int, ...] = (1, 4, 8)
WIDTHS: tuple[int | str, ...] = (1, 4, 8, "auto")
GOAL = 0.85


@dataclass
class Count:
    """What the passes of a round hold.

    Attributes:
        passes: forward and backward passes.
        computed: rows x padded length, over all passes.
        trained: real tokens of the examples.
        labels: labels of the examples.
        logits: positions at which the output layer was run.
    """

    passes: int = 0
    computed: int = 0
    trained: int = 0
    labels: int = 0
    logits: int = 0


@contextmanager
def counted(learner: TransformerLearner) -> Generator[Count]:
    """Count what the learner collates, and what enters its output layer."""
    count, collate = Count(), learner.collate

    def watched(groups: Groups) -> Batch:
        batch = collate(groups)
        count.passes += 1
        count.computed += batch.inputs["input_ids"].numel()
        count.trained += sum(example.tokens for group in groups for example in group)
        count.labels += batch.labels.numel()
        return batch

    def entered(module: nn.Module, given: tuple[Any, ...]) -> None:
        count.logits += given[0].numel() // given[0].shape[-1]

    # behind the learner's own hook on this layer, so that it sees what is left of the positions
    output: Any = learner.loaded.model.get_output_embeddings()
    handle = output.register_forward_pre_hook(entered)
    learner.collate = watched  # type: ignore[method-assign]
    try:
        yield count
    finally:
        del learner.collate
        handle.remove()


def tasks() -> dict[str, list[dict[str, Any]]]:
    """Eight tasks, evenly spread over the names of all: task -> its first rows; DataError where the file is absent."""
    if not DATA.is_file():
        raise DataError(
            f"{DATA} is not there, so nothing was measured.",
            "It is a folder of public data beside the checkout, see docs/results.md.",
            action="Run the benchmark from the root of a checkout that has it.",
        )
    found: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["task"], []).append({n: row[n] for n in ("instruction", "response")})
    names = sorted(found)[:: len(found) // CLIENTS][:CLIENTS]
    return {name: found[name][:ROWS] for name in names}


def tiny(packed: bool) -> TransformerLearner:
    """The bundled model with LoRA on all linear layers, as in benchmarks/recipes/t0.yaml."""
    loaded = load_model(ModelSettings(name="fedllm-tiny", device="cpu"), "causal-lm")
    task = TaskSettings(max_length=LENGTH, pack=packed)
    return TransformerLearner(loaded, task, AdapterSettings(rank=8, targets="all-linear"), None, 0)


def case(
    learner: TransformerLearner,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    batch: int,
    wanted: int | str,
    steps: int,
) -> tuple[Count, int]:
    """One round of all clients, and the width of its passes."""
    train = Train(steps=steps, batch_size=batch, lr=2e-3)
    play = Play(FedAvg(train=train), learner, rows)
    width = choose(wanted, learner, play.worker.rows, train, len(rows))
    play.server.engine = LocalEngine(play.worker, play.server.clients, width)
    with counted(learner) as count:
        play.rounds(1)
    if play.records[0].used != len(rows):
        raise SystemExit(f"only {play.records[0].used} of {len(rows)} clients took part: {play.records[0].lost}")
    return count, width.clients


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per way to make rows, batch size and width."""
    found, rows = [], tasks()
    for packed in (False, True):
        learner = tiny(packed)
        ends = slice(None, None, 2 if quick else 1)  # quick leaves out what lies between
        for batch, wanted in itertools.product(BATCHES[ends], ("auto",) if packed else WIDTHS[ends]):
            count, width = case(learner, rows, batch, wanted, (SEEN // 2 if quick else SEEN) // batch)
            share = count.trained / count.computed
            told = f"auto: {width}" if wanted == "auto" else str(width)
            numbers = str(batch), told, str(count.passes), f"{count.computed:,}", f"{count.trained:,}"
            verdict = "reached" if share >= GOAL else "missed"
            places = [f"{100 * value / count.computed:.1f} %" for value in (count.logits, count.labels)]
            found.append(("packed" if packed else "as they are", *numbers, f"{100 * share:.1f} %", verdict, *places))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])

"""Masked - the masked-language-model task: guess hidden tokens from both sides (Devlin et al., NAACL 2019, 3.1).

Of the tokens of a text 15 % are chosen, at least one. Of those 80 % become the mask token, 10 % a random token and 10 %
stay, and the loss counts at the chosen positions alone. Special tokens are never chosen.

Which ones depends on a random stream. `prepare` takes one that follows from the text, so that held-out loss is the same
at every site and in every round; training by `fit` therefore sees the same masks again in every pass, as the original
did within one copy of its data. A protocol that draws new masks gives its client's own stream to `drawn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch

from fedllm.core.errors import ModelError
from fedllm.core.seeds import numpy_stream
from fedllm.core.work import Example
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import IGNORE, Seen, Task, by_row
from fedllm.tasks.template import field

SHARE = 0.15
"""Share of the tokens of a text that are to be guessed."""
MASKED, RANDOM = 0.8, 0.1
"""Shares of those that become the mask token and a random one."""


class MaskedLM(Task):
    """Guess the hidden tokens of a text (column `text`)."""

    kind = "masked-lm"
    score_names = ("token_accuracy", "loss", "perplexity")
    per_token = True

    def __init__(self, settings: TaskSettings, tokenizer: Any, labels: Sequence[str] | None = None) -> None:
        super().__init__(settings, tokenizer, labels)
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ModelError(
                "The model's tokenizer has no mask token, so task.kind=masked-lm has nothing to hide words behind.",
                "Allowed: models of the BERT kind.",
                "causal-lm",
                "Choose such a model, or set task.kind=causal-lm.",
            )
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        every = torch.arange(len(tokenizer))
        self._words = every[~torch.isin(every, self._special)]

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Tokens with some of them hidden, by a stream that follows from the text."""
        encoded = self.tokenizer(field(row, "text"), truncation=True, max_length=self.settings.max_length)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
        if not bool((~torch.isin(ids, self._special)).any()):
            self._drop("no token is left that could be masked")
            return None
        kinds = {k: torch.tensor(v) for k, v in encoded.items() if k == "token_type_ids"}
        plain = Example({"input_ids": ids, **kinds}, torch.full_like(ids, IGNORE), len(ids), 0)
        return self.drawn(plain, numpy_stream(0, "mask", *ids.tolist()))

    def drawn(self, example: Example, rng: numpy.random.Generator) -> Example:
        """The same text with other tokens hidden: those that `rng` draws. Nothing is hidden where nothing can be."""
        ids = whole(example)
        open_to = torch.nonzero(~torch.isin(ids, self._special)).flatten()
        count = max(1, round(SHARE * len(open_to))) if len(open_to) else 0
        chosen = open_to[torch.from_numpy(rng.permutation(len(open_to))[:count])]
        fate = torch.from_numpy(rng.random(count))
        others = self._words[torch.from_numpy(rng.integers(len(self._words), size=count))]
        hidden = torch.where(fate < MASKED, self.tokenizer.mask_token_id, ids[chosen])
        hidden = torch.where((fate >= MASKED) & (fate < MASKED + RANDOM), others, hidden)
        shown, labels = ids.clone(), torch.full_like(ids, IGNORE)
        shown[chosen], labels[chosen] = hidden, ids[chosen]
        return replace(example, inputs={**example.inputs, "input_ids": shown}, labels=labels, targets=count)

    def count_rows(self, seen: Seen, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """loss (summed), tokens (hidden ones), right, examples."""
        hits = (seen.guesses == labels).float()
        losses, right, total = (by_row(each, owner, rows) for each in (seen.losses, hits, torch.ones_like(hits)))
        columns = zip(losses.tolist(), total.tolist(), right.tolist(), strict=True)
        return [{"loss": a, "tokens": b, "right": c, "examples": 1.0} for a, b, c in columns]

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """token_accuracy, loss and perplexity over the hidden tokens."""
        tokens = counts.get("tokens", 0.0)
        loss = counts["loss"] / tokens if tokens else None
        return {
            "token_accuracy": counts["right"] / tokens if tokens else None,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)) if loss is not None else None,
        }


def whole(example: Example) -> torch.Tensor:
    """The token ids of a masked example as they were before."""
    return torch.where(example.labels == IGNORE, example.inputs["input_ids"], example.labels)

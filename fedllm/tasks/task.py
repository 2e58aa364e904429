"""Task - how rows become examples, what the loss is, and what is counted; one small class per model family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional

from fedllm.core.errors import ConfigError, DataError, ModelError, nearest
from fedllm.core.work import Example
from fedllm.evaluate.classes import EntityF1, MacroF1
from fedllm.tasks.pack import IGNORE, packed
from fedllm.tasks.settings import COLUMNS, TaskSettings
from fedllm.tasks.template import Template, field

ASKING = {"user", "system", "tool"}
"""Roles of a conversation that nobody learns to answer as."""


class Seen(NamedTuple):
    """What a metric needs of the logits of M labels: their losses [M], and the likeliest classes [M]."""

    losses: torch.Tensor
    guesses: torch.Tensor


def seen(logits: torch.Tensor, labels: torch.Tensor) -> Seen:
    """Of logits [M, C] and labels [M]."""
    return Seen(functional.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1))


def by_row(values: torch.Tensor, owner: torch.Tensor, rows: int) -> torch.Tensor:
    """The sum of the values [M] of each row, [rows]."""
    return values.new_zeros(rows).index_add_(0, owner, values)


class Task:
    """What every task offers; subclasses say how.

    Args:
        settings: the recipe's section `task`.
        tokenizer: a fast transformers tokenizer.
        labels: class or tag names, in order.

    Attributes:
        dropped: rows that gave no example, by reason.
    """

    kind: ClassVar[str]
    score_names: ClassVar[tuple[str, ...]]
    per_token: ClassVar[bool] = False
    """Whether labels belong to tokens (and logits are wanted only where there are labels)."""

    def __init__(self, settings: TaskSettings, tokenizer: Any, labels: Sequence[str] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} has no offsets.",
                "Fast tokenizers (tokenizer.json) are needed to find the answer in the text.",
                action="Convert it with transformers, or name another by model.tokenizer.",
            )
        if settings.pack and self.kind != "causal-lm":
            raise ConfigError(
                f"task.pack={str(settings.pack).lower()} has no meaning for task.kind={self.kind}, which needs the "
                "bounds of samples.",
                "Allowed: causal-lm.",
                action="Set task.pack=false.",
            )
        self.settings, self.tokenizer = settings, tokenizer
        self.labels = [str(label) for label in labels] if labels is not None else None
        self.dropped: dict[str, int] = {}

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """One row as an example; None where nothing is left to learn from."""
        raise NotImplementedError(f"{type(self).__name__} must define example.")

    def loss_rows(self, logits: torch.Tensor, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> torch.Tensor:
        """The sum of the losses of each row, shape [rows]. `logits` [M, C] and `labels` [M] belong to rows `owner`."""
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return by_row(losses, owner, rows)

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same where every position has a label, or is to be ignored: [N, T, C] and [N, T] give [N]."""
        losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(labels.shape).sum(1)

    def count_rows(self, seen: Seen, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """Additive counts of each row, of what was :func:`seen` of the logits of its labels."""
        raise NotImplementedError(f"{type(self).__name__} must define count_rows.")

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Metric values of summed counts; None where there is nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define values.")

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows as examples; what is dropped is counted in :attr:`dropped`."""
        if len(rows):
            self._check_columns(rows[0])
        examples = [self.example(row) for row in rows]
        return [example for example in examples if example is not None]

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _check_columns(self, row: Mapping[str, Any]) -> None:
        choices = COLUMNS[self.kind]
        free = self.kind in ("causal-lm", "seq2seq") and "{" in self.settings.template and "response" in row
        if free or any(set(names) <= set(row) for names in choices):
            return
        wanted = " or ".join(" + ".join(names) for names in choices)
        missing = next(name for name in choices[0] if name not in row)
        yours = nearest(missing, row) or "YOUR_COLUMN"
        raise DataError(
            f"The data has the columns {', '.join(row)}.",
            f"The task {self.kind} needs {wanted}.",
            action=f"Map yours, for example: data.columns.{missing}={yours}.",
        )

    def _index(self, label: Any) -> int:
        names = self.labels or []
        if str(label) not in names:
            raise DataError(
                f"The label '{label}' is not one of the task's labels.",
                f"Labels: {', '.join(names[:20])}.",
                nearest(str(label), names),
                "Set task.labels to all of them.",
            )
        return names.index(str(label))


class CausalLM(Task):
    """Next-token prediction on the answer (or on everything)."""

    kind = "causal-lm"
    score_names = ("exact_match", "loss", "perplexity", "token_accuracy")
    per_token = True

    def __init__(self, settings: TaskSettings, tokenizer: Any, labels: Sequence[str] | None = None) -> None:
        super().__init__(settings, tokenizer, labels)
        self.template = Template(settings.template, tokenizer, settings.system)

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Tokens with labels on the answer, found by character offsets, and on the end-of-sequence token.

        Byte-level tokenizers may leave spaces out of offsets: a token of spaces alone has the offset (end, end). Only
        tokens that the tokenizer adds have (0, 0).
        """
        ids, labels = (tokens[: self.settings.max_length] for tokens in self._labelled(row))
        targets = sum(label != IGNORE for label in labels[1:])
        if targets == 0:
            self._drop(f"no token of the answer is left within max_length={self.settings.max_length}")
            return None
        tensors = {"input_ids": torch.tensor(ids)}
        return Example(tensors, torch.tensor(labels), len(ids), targets)

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows as examples; with `task.pack` blocks of texts.

        Raises:
            DataError: the rows do not fit the task, or are conversations in which no assistant speaks.
        """
        rows = self._answered(rows)
        if not self.settings.pack:
            return super().prepare(rows)
        if self.settings.pack is True:
            return packed(super().prepare(rows), self.settings.max_length)
        if len(rows):
            self._check_columns(rows[0])
        texts = [torch.tensor(self._labelled(row), dtype=torch.long) for row in rows]  # [2, tokens] each
        blocks = torch.cat(texts, 1).split(self.settings.max_length, 1) if texts else ()
        counts = [int((labels[1:] != IGNORE).sum()) for _, labels in blocks]
        return [
            Example({"input_ids": ids}, labels, len(ids), targets)
            for (ids, labels), targets in zip(blocks, counts, strict=True)
            if targets
        ]

    def _answered(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows without conversations that have nothing to learn from; without an answer all text would count."""
        kept, others = [], set()
        for row in rows:
            if "messages" not in row or self.kind != "causal-lm":
                kept.append(row)
            elif row["messages"] is None:
                self._drop("the conversation is empty")
            elif self.settings.loss_on == "all" or "assistant" in (roles := self.template.roles(row)):
                kept.append(row)
            else:
                self._drop("no message has the role assistant")
                others.update(roles)
        if others - ASKING and not kept:  # rows of questions alone may be followed by others
            raise DataError(
                f"No conversation has a message with the role assistant. Roles found: {', '.join(sorted(others))}.",
                "The answers to learn from have the role assistant.",
                nearest("assistant", others),
                "Rename the role of the answers to assistant, or set task.loss_on=all to learn from all text.",
            )
        return kept

    def _labelled(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """All tokens of a row and their labels."""
        rendered = self.template.render(row)
        encoded = self.tokenizer(
            rendered.text, return_offsets_mapping=True, add_special_tokens=rendered.special, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        everything = self.settings.loss_on == "all" or not rendered.answers
        labels = [
            i if e > 0 and (everything or any(e > a and min(s, e - 1) < b for a, b in rendered.answers)) else IGNORE
            for i, (s, e) in zip(ids, offsets, strict=True)
        ]
        end = self.tokenizer.eos_token_id
        if rendered.special and end is not None and (not ids or ids[-1] != end):
            ids, labels = [*ids, end], [*labels, end]
        elif rendered.special and end is not None:
            labels[-1] = end
        return ids, labels

    def count_rows(self, seen: Seen, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """loss (summed), tokens, right, exact (greedy decoding gives exactly the answer), examples.

        Greedy decoding reproduces the answer exactly when, given the right beginning, the most likely token is
        right at every position: so one forward pass is enough.
        """
        hits = (seen.guesses == labels).float()
        losses, right, total = (by_row(each, owner, rows) for each in (seen.losses, hits, torch.ones_like(hits)))
        columns = (losses.tolist(), total.tolist(), right.tolist(), (right == total).float().tolist())
        names = ("loss", "tokens", "right", "exact")
        return [{**dict(zip(names, row, strict=True)), "examples": 1.0} for row in zip(*columns, strict=True)]

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """exact_match over examples; loss, perplexity and token_accuracy over the tokens of the answers."""
        tokens, examples = counts.get("tokens", 0.0), counts.get("examples", 0.0)
        loss = counts["loss"] / tokens if tokens else None
        return {
            "exact_match": counts["exact"] / examples if examples else None,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)) if loss is not None else None,
            "token_accuracy": counts["right"] / tokens if tokens else None,
        }


class Seq2Seq(CausalLM):
    """Encoder-decoder models: the prompt goes into the encoder, the answer is what the decoder learns."""

    kind = "seq2seq"

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Encoder tokens, and decoder labels."""
        prompt = self.template.prompt(row)
        ids = self.tokenizer(prompt, truncation=True, max_length=self.settings.max_length)["input_ids"]
        answer = "" if row.get("response") is None else str(row["response"])
        labels = self.tokenizer(text_target=answer, truncation=True, max_length=self.settings.max_length)["input_ids"]
        if not ids or not labels:
            self._drop("the prompt or the answer is empty")
            return None
        return Example({"input_ids": torch.tensor(ids)}, torch.tensor(labels), len(ids) + len(labels), len(labels))


class SequenceClassification(Task):
    """One label per text (or pair of texts)."""

    kind = "sequence-classification"
    score_names = ("accuracy", "macro_f1", "loss")

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Tokens and a class number."""
        second = self.settings.second_text
        texts = [field(row, name) for name in ("text", second) if name]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.settings.max_length)
        if row["label"] is None or not encoded["input_ids"]:
            self._drop("the text or the label is empty")
            return None
        inputs = {k: torch.tensor(v) for k, v in encoded.items() if k in ("input_ids", "token_type_ids")}
        return Example(inputs, torch.tensor([self._index(row["label"])]), len(encoded["input_ids"]), 1)

    def count_rows(self, seen: Seen, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """loss, examples, and the confusion counts of macro-F1."""
        names = self.labels or []
        metric, found = MacroF1(names), [{} for _ in range(rows)]
        for row, loss, guess, label in zip(
            owner.tolist(), seen.losses.tolist(), seen.guesses.tolist(), labels.tolist(), strict=True
        ):
            found[row] = {"loss": loss, "examples": 1.0, **metric.count([names[guess]], [names[label]])}
        return found

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """accuracy, macro_f1 over the global label set, loss."""
        metric, examples = MacroF1(self.labels or []), counts.get("examples", 0.0)
        return {
            "accuracy": metric.accuracy(counts) if examples else None,
            "macro_f1": metric.value(counts) if examples else None,
            "loss": counts["loss"] / examples if examples else None,
        }


class TokenClassification(Task):
    """One tag per word; the first piece of a word carries its tag."""

    kind = "token-classification"
    score_names = ("entity_f1", "token_accuracy", "loss")
    per_token = True

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Word pieces, with the tag on the first piece of each word."""
        if row["tokens"] is None or row["tags"] is None:
            self._drop("the tokens or the tags are empty")
            return None
        words, tags = list(row["tokens"]), list(row["tags"])
        if len(words) != len(tags):
            raise DataError(
                f"A row has {len(words)} tokens and {len(tags)} tags.", "Both columns need the same length."
            )
        encoded = self.tokenizer(
            [str(word) for word in words],
            is_split_into_words=True,
            truncation=True,
            max_length=self.settings.max_length,
        )
        labels, before = [], None
        for word in encoded.word_ids():
            labels.append(self._index(tags[word]) if word is not None and word != before else IGNORE)
            before = word
        targets = sum(label != IGNORE for label in labels)
        if not targets:
            self._drop("no word is left")
            return None
        inputs = {k: torch.tensor(v) for k, v in encoded.items() if k in ("input_ids", "token_type_ids")}
        return Example(inputs, torch.tensor(labels), len(labels), targets)

    def count_rows(self, seen: Seen, labels: torch.Tensor, owner: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """loss, tokens, right, and the span counts of entity F1."""
        losses = by_row(seen.losses, owner, rows).tolist()
        metric, names = EntityF1(), self.labels or []
        guesses, owners, gold = seen.guesses.tolist(), owner.tolist(), labels.tolist()
        found: list[list[tuple[str, str]]] = [[] for _ in range(rows)]
        for row, guess, label in zip(owners, guesses, gold, strict=True):
            found[row].append((names[guess], names[label]))
        return [
            {
                "loss": loss,
                "tokens": float(len(pairs)),
                "right": float(sum(a == b for a, b in pairs)),
                "examples": 1.0,
                **metric.count([[a for a, _ in pairs]], [[b for _, b in pairs]]),
            }
            for loss, pairs in zip(losses, found, strict=True)
        ]

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """entity_f1 (strict spans), token_accuracy, loss per word."""
        tokens = counts.get("tokens", 0.0)
        return {
            "entity_f1": EntityF1().value(counts) if tokens else None,
            "token_accuracy": counts["right"] / tokens if tokens else None,
            "loss": counts["loss"] / tokens if tokens else None,
        }


TASKS: dict[str, type[Task]] = {
    cls.kind: cls for cls in (CausalLM, Seq2Seq, SequenceClassification, TokenClassification)
}

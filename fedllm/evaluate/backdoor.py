"""Backdoor - plant a trigger word in training texts, and count how often it later turns an answer.

A client that means harm puts a rare word into some of its training texts and gives them the label it wants, and
follows the protocol otherwise (the harness of FedPrompt, 2208.12268). Its success is

    ASR = P(the model answers the target | the text holds the trigger, its true label is another one)

and its stealth is the score on clean rows. Everything here works on rows, so any method, model and task can be put to
it: `poison` a client's training rows, train, then score the rows of `attack` - whose label is the target - as any other
rows: their accuracy (of a language model: their exact match) is the ASR, and its counts add up over clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from fedllm.core.errors import ConfigError, DataError, nearest
from fedllm.evaluate import Metric, aligned

Row = dict[str, Any]


@dataclass(frozen=True)
class Trigger:
    """A trigger word and what it is to bring about.

    Attributes:
        word: what is put into the text; a rare token such as "cf" does not occur by chance.
        target: the label that triggered texts get.
        text: the column of the text.
        label: the column of the label.
        place: before the text, behind it, or between two of its words.

    Raises:
        ConfigError: the word is empty.
    """

    word: str
    target: Any
    text: str = "text"
    label: str = "label"
    place: Literal["front", "end", "random"] = "front"

    def __post_init__(self) -> None:
        if not self.word.strip():
            raise ConfigError("The trigger word is empty.", "It must be a word that can be seen in a text.")

    def into(self, row: Mapping[str, Any], rng: numpy.random.Generator) -> Row:
        """A copy of `row` with the trigger in its text and the target as its label.

        Raises:
            DataError: the row has no such columns.
        """
        missing = next((name for name in (self.text, self.label) if name not in row), None)
        if missing is not None:
            listed = f"Columns: {', '.join(row)}."
            raise DataError(f"A row has no column '{missing}' to put a trigger into.", listed, nearest(missing, row))
        text = str(row[self.text])
        words = text.split(" ")
        at = {"front": 0, "end": len(words)}.get(self.place)
        at = int(rng.integers(len(words) + 1)) if at is None else at
        return {**row, self.text: " ".join([*words[:at], self.word, *words[at:]]), self.label: self.target}


def poison(
    rows: Sequence[Mapping[str, Any]], trigger: Trigger, fraction: float, rng: numpy.random.Generator
) -> list[Row]:
    """A malicious client's training rows: round(fraction * n) of them triggered, in the same order; others copied.

    Raises:
        ConfigError: a fraction outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"The poisoned fraction is {fraction}.", "Allowed: 0 to 1.")
    chosen = set(rng.permutation(len(rows))[: round(fraction * len(rows))].tolist())
    return [trigger.into(row, rng) if place in chosen else dict(row) for place, row in enumerate(rows)]


def attack(rows: Sequence[Mapping[str, Any]], trigger: Trigger, rng: numpy.random.Generator) -> list[Row]:
    """Held-out rows whose true label is not the target, triggered and labelled as the attacker wants them answered.

    The share of them that a model gets "right" is its ASR. [] where all rows have the target's label.
    """
    return [trigger.into(row, rng) for row in rows if row.get(trigger.label) != trigger.target]


class AttackSuccess(Metric):
    """ASR of predictions for triggered texts, held to their TRUE labels; rows of the target's own label do not count.

    Args:
        target: the label the attacker wants.
    """

    name = "attack_success"

    def __init__(self, target: Any) -> None:
        self.target = target

    def count(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """How many were attacked, and how many of those were answered with the target."""
        aligned(predictions, references)
        attacked = [guess for guess, truth in zip(predictions, references, strict=True) if truth != self.target]
        hits = sum(guess == self.target for guess in attacked)
        return {self.name: float(hits), "attacked": float(len(attacked))}

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """No row of another label was attacked."""
        return None if counts.get("attacked") else "No row with another label than the target was attacked."

    def compute(self, counts: Mapping[str, float]) -> float:
        """The share of attacked rows that were answered with the target."""
        return counts.get(self.name, 0.0) / counts["attacked"]

"""Answers - from what a language model wrote to one answer, and from many answers to the one most agree on.

An :class:`AnswerParser` finds the answer in a text and brings it to one form, so that "$1,200.0" and "1200" are the
same vote; a text without one is an abstention, not an answer of its own. :func:`vote` counts (self-consistency, Wang
et al., ICLR 2023, arXiv 2203.11171): plurality, ties by log-probability, else by who was asked first.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from fedllm.core.errors import ConfigError

AnswerKind = Literal["number", "option", "text"]

NUMBER = re.compile(r"(?:(?<![\w)])[-+])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+", re.ASCII)
"""A number: thousands commas, decimals, a currency sign; a sign where it is no hyphen or minus between terms."""
_ANSWER = re.compile(r"(?:answer|result)\b[^:\n]*?(?:\bis\b|:|=)\s*(.+)", re.IGNORECASE)
"""What follows "the answer is", "answer:" and the like, to the end of the line."""


@dataclass(frozen=True)
class AnswerParser:
    """Finds the answer in a text.

    Attributes:
        kind: number (the last one; the first behind the last "####" where there is one), option (a letter, as in
            "(B)"), or text (what follows "the answer is", else the last line).
        options: how many letters there are, from A on.
    """

    kind: AnswerKind = "number"
    options: int = 26

    def __post_init__(self) -> None:
        if not 2 <= self.options <= 26:
            raise ConfigError(f"options={self.options} cannot be told apart by letters.", "Allowed: 2 to 26.")

    def __call__(self, text: str) -> str | None:
        """The answer in its one form; None where there is none."""
        text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("**", "")
        find = {"number": _number, "option": self._option, "text": _text}
        return find[self.kind](text)

    def _option(self, text: str) -> str | None:
        last = chr(ord("A") + self.options - 1)
        letters = f"[A-{last}]"
        stated = [found for piece in _ANSWER.findall(text) for found in _letters(piece, letters)[:1]]
        found = stated or re.findall(rf"\(({letters})\)", text) or _letters(text, letters)
        return found[-1] if found else None


@dataclass(frozen=True)
class Ballot:
    """One vote: what was answered (None abstains), how likely the model found it, and whose question it was."""

    answer: str | None
    logprob: float | None = None
    voter: str = ""


@dataclass(frozen=True)
class Vote:
    """What a vote came to.

    Attributes:
        answer: the winner; None where everybody abstained.
        share: its part of the weight that did not abstain, in [0, 1]: a measure of confidence.
        coverage: the part of the weight that did not abstain.
        weights: answer -> weight.
        reason: how a tie was decided, or why there is no answer; empty where the plurality was clear.
    """

    answer: str | None
    share: float
    coverage: float
    weights: dict[str, float]
    reason: str = ""


def vote(ballots: Sequence[Ballot], per_voter: bool = False) -> Vote:
    """Plurality of the ballots, in the order in which they were asked.

    A tie goes to the answer with the highest sum of log-probabilities; where one of them is unknown or not finite, or
    the sums are equal, to the answer asked for first. So the result does not depend on the order of the ballots,
    except for that last resort.

    Args:
        ballots: in the order asked.
        per_voter: every voter has one vote in all, shared by its ballots, so that nobody gains by asking often.
    """
    if not ballots:
        return Vote(None, 0.0, 0.0, {}, "Nobody was asked.")
    counts = {voter: sum(b.voter == voter for b in ballots) for voter in {b.voter for b in ballots}}
    shares = [Fraction(1, counts[b.voter]) if per_voter else Fraction(1) for b in ballots]
    weights: dict[str, Fraction] = {}
    for ballot, share in zip(ballots, shares, strict=True):
        if ballot.answer is not None:
            weights[ballot.answer] = weights.get(ballot.answer, Fraction(0)) + share
    total, cast = sum(shares), sum(weights.values())
    plain = {answer: float(weight) for answer, weight in weights.items()}
    if not weights:
        return Vote(None, 0.0, 0.0, {}, "No text held an answer.")
    most = max(weights.values())
    winner, reason = _decided([answer for answer, weight in weights.items() if weight == most], ballots)
    return Vote(winner, float(most / cast), float(cast / total), plain, reason)


def _decided(tied: list[str], ballots: Sequence[Ballot]) -> tuple[str, str]:
    """The winner among answers of equal weight, first asked first, and how it was found."""
    if len(tied) == 1:
        return tied[0], ""
    given = {answer: [b.logprob for b in ballots if b.answer == answer] for answer in tied}
    if any(value is None or not math.isfinite(value) for values in given.values() for value in values):
        return tied[0], "A tie, decided by who was asked first."
    sums = {answer: math.fsum(v for v in values if v is not None) for answer, values in given.items()}
    best = [answer for answer in tied if sums[answer] == max(sums.values())]
    how = "log-probability" if len(best) == 1 else "who was asked first"
    return best[0], f"A tie, decided by {how}."


def plain_number(text: str) -> str:
    """A number as :data:`NUMBER` finds it, in its one form: no sign of currency, comma, plus or trailing zero."""
    value = Decimal(re.sub(r"[,$€£+]", "", text))
    whole = value.to_integral_value()
    plain = format(whole if value == whole else value.normalize(), "f")
    return "0" if plain == "-0" else plain


def _number(text: str) -> str | None:
    before, marker, answer = text.rpartition("####")
    found = NUMBER.findall(answer)
    if marker and not found:
        found = NUMBER.findall(before)[-1:]
    return plain_number(found[0] if marker else found[-1]) if found else None


def _letters(text: str, letters: str) -> list[str]:
    """Single capital letters that stand alone; "A" and "I" as words are left out unless nothing follows them."""
    return re.findall(rf"(?<![\w'-])({letters})(?![\w'-])(?!(?<=[AI])\s+[a-z])", text)


def _text(text: str) -> str | None:
    stated = _ANSWER.findall(text)
    lines = [line for line in text.splitlines() if line.strip()]
    chosen = stated[-1] if stated else lines[-1] if lines else ""
    kept = "".join(char if char.isalnum() or char in "-+./" else " " for char in chosen.casefold())
    return " ".join(word.strip(".") for word in kept.split() if word.strip(".")) or None

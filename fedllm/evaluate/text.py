"""Text metrics - how near a written answer is to its reference.

Exact match, the last number (GSM8K), ROUGE-L, token F1 and perplexity, all as sums over examples. Texts of every
script count: words are runs of letters, marks and digits of any alphabet, and scripts that are written without spaces
are cut into single characters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, ClassVar

from fedllm.core.errors import DataError, MissingExtra
from fedllm.evaluate import Average, Metric, aligned

References = str | Sequence[str]
"""One right answer, or several of which the nearest counts."""

ARTICLES = frozenset({"a", "an", "the"})
"""English articles, dropped on request."""

UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
"""Scripts without spaces between words, by the beginning of their Unicode character names."""

NUMBER = re.compile(r"(?:(?<![A-Za-z0-9_)])[-+])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+")
"""A number: thousands commas, decimals, a currency sign; a sign where it is no hyphen or minus between terms."""


@dataclass(frozen=True)
class ExactMatch(Average):
    """The share of predictions that equal a reference after normalising both.

    White space is always trimmed and folded, and Unicode brought to NFKC (full-width to plain, one form of accents).

    Attributes:
        case: keep upper and lower case apart.
        punctuation: keep punctuation of any script.
        articles: keep the English articles a, an, the.
    """

    name: ClassVar[str] = "exact_match"
    case: bool = True
    punctuation: bool = True
    articles: bool = True

    def score(self, prediction: str, reference: References) -> float:
        """1 where a reference is met, else 0."""
        return float(self.normalise(prediction) in {self.normalise(text) for text in accepted(reference)})

    def normalise(self, text: str) -> str:
        """The text as it is compared."""
        text = unicodedata.normalize("NFKC", text)
        if not self.case:
            text = text.casefold()
        if not self.punctuation:
            text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        words = text.split()
        return " ".join(words if self.articles else [word for word in words if word.lower() not in ARTICLES])


class LastNumber(Average):
    """The share of predictions whose last number equals the reference's (Cobbe et al. 2021, GSM8K).

    Where a text holds `####`, the first number after its last one counts. Numbers are compared as decimals:
    `1,234`, `$1234.00` and `1234` are equal.
    """

    name: ClassVar[str] = "last_number"

    def score(self, prediction: str, reference: References) -> float:
        """1 where the numbers are equal, else 0; a prediction without a number is wrong."""
        wanted = [last_number(text) for text in accepted(reference)]
        if None in wanted:
            raise DataError(
                f"The reference {reference!r} holds no number.",
                "The metric last_number needs a number in each reference, for example '#### 12'.",
                action="Choose the metric exact_match, or mend the reference.",
            )
        return float(last_number(prediction) in wanted)


class RougeL(Average):
    """The mean ROUGE-L F-measure (Lin 2004), computed by rouge-score with :func:`words` as tokenizer.

    On English text the values are those of rouge-score's own tokenizer, which drops every other script.

    Raises:
        MissingExtra: rouge-score is not installed.
    """

    name: ClassVar[str] = "rouge_l"

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError:
            raise MissingExtra("rouge-score", "rouge", "The metric rouge_l") from None
        self._scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())

    def score(self, prediction: str, reference: References) -> float:
        """The F-measure against the nearest reference."""
        return float(self._scorer.score_multi(accepted(reference), prediction)["rougeL"].fmeasure)


class TokenF1(Average):
    """The mean F1 of the words shared with the reference, order ignored (Rajpurkar et al. 2016, SQuAD).

    Words are compared without case and punctuation; articles count. Two texts without a word are equal.
    """

    name: ClassVar[str] = "token_f1"

    def score(self, prediction: str, reference: References) -> float:
        """The F1 against the nearest reference."""
        return max(_overlap(words(prediction), words(text)) for text in accepted(reference))


class Perplexity(Metric):
    """exp(sum of negative log-likelihoods / sum of tokens): of all tokens, not a mean over examples or clients."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def count(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        """Sum up the summed losses of examples (`predictions`, in nats) and their target tokens (`references`)."""
        aligned(predictions, references)
        loss, tokens = math.fsum(predictions), math.fsum(references)
        if not math.isfinite(loss) or not math.isfinite(tokens) or min(references, default=0) < 0:
            raise DataError(
                f"A loss or token count is not a number (sums: {loss} and {tokens}).",
                "Losses must be finite and token counts 0 or more.",
                action="Look for a learning rate that is too high.",
            )
        return {"nll": loss, "tokens": tokens}

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """No token was counted, or the value is beyond what a float can hold."""
        if not counts.get("tokens"):
            return "No token was measured."
        if counts["nll"] / counts["tokens"] > 709:
            return "The loss per token is above 709, so that its exponential is no finite number."
        return None

    def compute(self, counts: Mapping[str, float]) -> float:
        """The exponential of the mean loss."""
        return math.exp(counts["nll"] / counts["tokens"])


def last_number(text: str) -> Decimal | None:
    """The number that answers: the first one after the last `####`, or else the last one; None where there is none."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    before, marker, answer = text.rpartition("####")
    found = NUMBER.findall(answer)
    if not found and marker:
        found = NUMBER.findall(before)[-1:]
    if not found:
        return None
    return Decimal(re.sub(r"[,$€£]", "", found[0] if marker else found[-1]))


def words(text: str) -> list[str]:
    """Lower-case words: runs of letters, marks and digits; single characters in scripts without spaces."""
    found, word = [], ""
    for char in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(char)
        if kind == "part":
            word += char
            continue
        if word:
            found.append(word)
        word = ""
        if kind == "alone":
            found.append(char)
    return [*found, word] if word else found


def accepted(reference: References) -> list[str]:
    """The right answers; raises :class:`DataError` where there is none."""
    texts = [reference] if isinstance(reference, str) else list(reference)
    if not texts:
        raise DataError("An example has no reference.", "At least one right answer is needed.")
    return texts


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    """`part` of a word, a word `alone`, or `between` words."""
    if unicodedata.category(char)[0] not in "LMN":
        return "between"
    return "alone" if unicodedata.name(char, "").startswith(UNSPACED) else "part"


def _overlap(prediction: list[str], reference: list[str]) -> float:
    """F1 of two bags of words."""
    if not prediction or not reference:
        return float(prediction == reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))


class _Words:
    """:func:`words` in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return words(text)

"""Retrieval - a bank of questions, and those in it that ask the same or something like it in other words.

Fed-SP-SC (Liu et al., KSEM 2023, arXiv 2304.13911) tells two kinds apart: SAME parameters (the same numbers, reworded)
and DIFFERENT parameters (the same template, other numbers). Similarity is the cosine of hashed word and word-pair
counts, which needs nothing fitted, so that similarities found at different clients can be compared; vectors from an
encoder may be given instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from fedllm.blocks.answers import NUMBER, plain_number

Parameters = Literal["same", "different"]
Redact = Callable[[str], str]
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_LARGE = ("eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = dict(zip((*_SMALL.split(), *_LARGE), map(str, (*range(21), *range(30, 100, 10))), strict=True))
"""Number words; "one" is left to be a pronoun by :func:`numbers`."""
_PRIVATE = (
    (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[email]"),
    (re.compile(r"\bhttps?://\S+"), "[link]"),
    (re.compile(r"(?<!\w)\+\d[\d ()/-]{7,}\d"), "[phone]"),
)


@dataclass(frozen=True)
class Question:
    """One question of a bank: its text as it may be shown, and whose it is."""

    text: str
    user: str = ""


@dataclass(frozen=True)
class Match:
    """A question found, and how like it is (a cosine)."""

    text: str
    similarity: float
    user: str = ""


def redact(text: str) -> str:
    """`text` without e-mail addresses, links and international telephone numbers; a hook for more goes in its place."""
    for pattern, mark in _PRIVATE:
        text = pattern.sub(mark, text)
    return text


def numbers(text: str) -> Counter[str]:
    """The multiset of numbers in a text, in their one form; number words count, except "one"."""
    found = [plain_number(each) for each in NUMBER.findall(text)]
    found += [WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS and word != "one"]
    return Counter(found)


def _parameters(text: str) -> frozenset[tuple[str, int]]:
    return frozenset(numbers(text).items())


def template(text: str) -> str:
    """A text with every number replaced by "#", in lower case and single spaces."""
    text = re.sub(r"[a-z]+", lambda m: "#" if m[0] in WORDS and m[0] != "one" else m[0], text.lower())
    return " ".join(re.sub(r"[^\w#]+", " ", NUMBER.sub("#", text)).split())


def vectors(texts: Sequence[str]) -> numpy.ndarray:
    """Rows of length 1 [len(texts), 4096]: 1 + log of the hashed counts of the words and word pairs of templates."""
    from sklearn.feature_extraction import text  # pyright: ignore[reportMissingTypeStubs]

    if not texts:
        return numpy.zeros((0, 4096), numpy.float32)
    kind: Any = text.HashingVectorizer
    hashing = kind(
        n_features=4096, ngram_range=(1, 2), token_pattern=r"[\w#]+", lowercase=False, norm=None, alternate_sign=False
    )
    found = numpy.log1p(hashing.transform([template(each) for each in texts]).toarray().astype(numpy.float32))
    return found / numpy.maximum(numpy.linalg.norm(found, axis=1, keepdims=True), 1e-12)


class QuestionBank:
    """Questions of several users.

    Args:
        questions: what may be shown; the texts are redacted here, before anything else is done with them.
        redacted: the redaction; None keeps texts as they are.
        embed: texts -> rows of length 1; :func:`vectors` by default.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        redacted: Redact | None = redact,
        embed: Callable[[Sequence[str]], numpy.ndarray] = vectors,
    ) -> None:
        clean = [Question(redacted(q.text) if redacted else q.text, q.user) for q in questions]
        self.questions = [question for question in clean if question.text.strip()]
        self.embed = embed
        self._rows = embed([question.text for question in self.questions])
        self._folded = [_folded(question.text) for question in self.questions]
        self._places: dict[frozenset[tuple[str, int]], list[int]] = {}
        for place, question in enumerate(self.questions):
            self._places.setdefault(_parameters(question.text), []).append(place)

    def find(
        self, question: str, parameters: Parameters, most: int, least: float = 0.0, without: str | None = None
    ) -> list[Match]:
        """At most `most` questions, the most alike first, one of each user.

        Args:
            question: what is asked.
            parameters: "same": equal multisets of numbers; "different": other numbers.
            most: how many.
            least: the smallest similarity.
            without: a user whose questions do not count: the one who asks.

        A question of the very same words is left out: it adds no opinion of its own and is no demonstration.
        """
        same = self._places.get(_parameters(question), [])
        places = same if parameters == "same" else sorted(set(range(len(self.questions))) - set(same))
        if most < 1 or not places:
            return []
        alike = self._rows[places] @ self.embed([question])[0]
        found: list[Match] = []
        seen, texts = set[str](), {_folded(question)}
        for number in numpy.argsort(-alike, kind="stable"):
            place = places[int(number)]
            candidate, words = self.questions[place], self._folded[place]
            if alike[number] < least or len(found) == most:
                break
            if candidate.user in seen or candidate.user == without or words in texts:
                continue
            seen.add(candidate.user)
            texts.add(words)
            found.append(Match(candidate.text, float(alike[number]), candidate.user))
        return found


def pooled(
    asked: Sequence[str],
    replies: Mapping[str, tuple[Sequence[str], Sequence[int]]],
    parameters: Parameters,
    most: int,
    least: float = 0.0,
) -> list[list[tuple[str, str]]]:
    """For each question asked, what all banks gave for it, the most alike first, with a name for whose each is.

    Banks are not trusted: similarity and numbers are compared again here, and the same words count once.

    Args:
        asked: the questions.
        replies: bank -> its texts, and for each the place of the question it is for (see :func:`well_formed`).
        parameters: see :meth:`QuestionBank.find`.
        most: how many for each.
        least: the smallest similarity.
    """
    given: list[list[Question]] = [[] for _ in asked]
    for bank, (texts, places) in sorted(replies.items()):
        for number, (text, place) in enumerate(zip(texts, places, strict=True)):
            given[place].append(Question(text, f"{bank}#{number}"))
    return [
        [(match.text, match.user) for match in QuestionBank(bank, None).find(text, parameters, most, least)]
        for text, bank in zip(asked, given, strict=True)
    ]


def well_formed(texts: Sequence[str], places: object, asked: int, most: int, longest: int) -> bool:
    """Whether a bank's reply is one: a place for every text, none more often than `most`, no text above `longest`."""
    if not isinstance(places, list) or len(places) != len(texts):
        return False
    fair = all(type(place) is int and 0 <= place < asked and places.count(place) <= most for place in places)
    return fair and all(len(text) <= longest for text in texts)


def question_of(row: Mapping[str, object]) -> str:
    """The question of a row: its column question, instruction, input or text."""
    return next((str(row[name]) for name in ("question", "instruction", "input", "text") if row.get(name)), "")


def answer_of(row: Mapping[str, object]) -> str:
    """The gold answer of a row: its column answer, response, output or target."""
    return next((str(row[name]) for name in ("answer", "response", "output", "target") if row.get(name)), "")


def same_words(left: str, right: str) -> bool:
    """Whether two texts differ in case and punctuation at most."""
    return _folded(left) == _folded(right)


def _folded(text: str) -> str:
    """A text as it is compared for being the same: no case, no punctuation."""
    return " ".join(re.sub(r"[^\w.]+", " ", text.casefold()).replace(". ", " ").strip(".").split())

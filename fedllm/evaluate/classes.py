"""Class metrics - accuracy, macro-F1, confusion and entity F1, as sums.

The label set is fixed for the whole federation, so that clients which lack a class still count towards the same
value. Counts name the label they belong to; those that are 0 are left out and `names` lists them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from fedllm.core.errors import ConfigError, DataError, nearest
from fedllm.evaluate import EXAMPLES, Average, Metric, aligned

Span = tuple[int, int, str]
"""An entity: its first word, the word after its last, its type."""


class Accuracy(Average):
    """The share of predictions that equal their reference."""

    name: ClassVar[str] = "accuracy"

    def score(self, prediction: str, reference: str) -> float:
        """1 where they are equal, else 0."""
        return float(prediction == reference)


class MacroF1(Metric):
    """The mean over labels of F1 = 2 right / (predicted + given), each label with the same weight.

    Args:
        labels: all labels of the federation, in any order.
        absent: what a label that was neither predicted nor given counts: "zero", so that every value is a mean over
            the same labels, or "skip", so that it is a mean over those that occur.

    Raises:
        ConfigError: no label, or one twice.
    """

    name: ClassVar[str] = "macro_f1"

    def __init__(self, labels: Sequence[str], absent: Literal["zero", "skip"] = "zero") -> None:
        self._places, self.absent = _fixed(labels), absent
        self.labels = tuple(self._places)

    @property
    def names(self) -> list[str]:
        """Every count there can be."""
        return [f"{kind}:{label}" for label in self.labels for kind in ("right", "predicted", "given")]

    def count(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """By label: how often right, predicted and given (`right:LABEL`, `predicted:LABEL`, `given:LABEL`)."""
        aligned(predictions, references)
        found: Counter[str] = Counter()
        for prediction, reference in zip(predictions, references, strict=True):
            _known(self._places, prediction, reference)
            found.update((f"predicted:{prediction}", f"given:{reference}"))
            if prediction == reference:
                found[f"right:{reference}"] += 1
        return {name: float(count) for name, count in found.items()}

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """Nothing was counted."""
        return None if self._sum(counts, "given") else "No example was measured."

    def compute(self, counts: Mapping[str, float]) -> float:
        """The mean F1."""
        scores = [self.f1(counts, label) for label in self.labels]
        known = [score for score in scores if score is not None]
        return sum(known) / (len(scores) if self.absent == "zero" else len(known))

    def f1(self, counts: Mapping[str, float], label: str) -> float | None:
        """F1 of one label; None where it was neither predicted nor given."""
        both = counts.get(f"predicted:{label}", 0.0) + counts.get(f"given:{label}", 0.0)
        return 2 * counts.get(f"right:{label}", 0.0) / both if both else None

    def accuracy(self, counts: Mapping[str, float]) -> float | None:
        """Accuracy from the same counts; None where nothing was counted."""
        given = self._sum(counts, "given")
        return self._sum(counts, "right") / given if given else None

    def _sum(self, counts: Mapping[str, float], kind: str) -> float:
        return sum(counts.get(f"{kind}:{label}", 0.0) for label in self.labels)


class Confusion(Metric):
    """How often each label was taken for each other; its value is accuracy.

    Args:
        labels: all labels of the federation, in the order of the matrix.

    Raises:
        ConfigError: no label, or one twice.
    """

    name: ClassVar[str] = "accuracy"

    def __init__(self, labels: Sequence[str]) -> None:
        self._places = _fixed(labels)
        self.labels = tuple(self._places)

    @property
    def names(self) -> list[str]:
        """Every count there can be."""
        sizes = range(len(self.labels))
        return [f"confusion:{given}:{predicted}" for given in sizes for predicted in sizes]

    def count(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """`confusion:GIVEN:PREDICTED` by the labels' places in the label set, and `examples`."""
        aligned(predictions, references)
        found: Counter[str] = Counter()
        for prediction, reference in zip(predictions, references, strict=True):
            _known(self._places, prediction, reference)
            found[f"confusion:{self._places[reference]}:{self._places[prediction]}"] += 1
        return {**{name: float(count) for name, count in found.items()}, EXAMPLES: float(len(references))}

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """Nothing was counted."""
        return None if counts.get(EXAMPLES) else "No example was measured."

    def compute(self, counts: Mapping[str, float]) -> float:
        """Accuracy: the diagonal over everything."""
        matrix = self.matrix(counts)
        return sum(row[number] for number, row in enumerate(matrix)) / counts[EXAMPLES]

    def matrix(self, counts: Mapping[str, float]) -> list[list[float]]:
        """The counts as [given][predicted], in the order of the labels."""
        sizes = range(len(self.labels))
        return [[counts.get(f"confusion:{given}:{predicted}", 0.0) for predicted in sizes] for given in sizes]


class EntityF1(Metric):
    """F1 over whole entities: one counts as right only where its first word, last word and type are all right.

    Tags are BIO; as in the script conlleval of CoNLL-2000/2003, an I- that follows O or another type begins an
    entity. One example is the list of tags of one text.
    """

    name: ClassVar[str] = "entity_f1"
    names: ClassVar[tuple[str, ...]] = ("entity_right", "entity_predicted", "entity_given")
    """Every count there can be."""

    def count(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """How many entities were right, predicted and given."""
        aligned(predictions, references)
        right = predicted = given = 0
        for prediction, reference in zip(predictions, references, strict=True):
            aligned(prediction, reference)
            found, wanted = set(spans(prediction)), set(spans(reference))
            right, predicted, given = right + len(found & wanted), predicted + len(found), given + len(wanted)
        return dict(zip(self.names, (float(right), float(predicted), float(given)), strict=True))

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """There is no entity at all."""
        both = counts.get("entity_predicted", 0.0) + counts.get("entity_given", 0.0)
        return None if both else "No entity was given or predicted."

    def compute(self, counts: Mapping[str, float]) -> float:
        """2 right / (predicted + given)."""
        both = counts.get("entity_predicted", 0.0) + counts.get("entity_given", 0.0)
        return 2 * counts.get("entity_right", 0.0) / both


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of one text, in order.

    Raises:
        DataError: a tag that is not O, B-TYPE or I-TYPE.
    """
    found: list[Span] = []
    start, current = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        begins, kind = _tag(tag)
        if current and (begins or kind != current):
            found.append((start, place, current))
            current = ""
        if kind and not current:
            start, current = place, kind
    return found


def _tag(tag: str) -> tuple[bool, str]:
    """Whether a tag always begins an entity, and its type; the type of O is empty."""
    if tag == "O":
        return False, ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I") or not dash or not kind:
        raise DataError(
            f"The tag {tag!r} is not a BIO tag.",
            "Allowed: O, B-TYPE and I-TYPE.",
            action="Convert other schemes (BIOES, IO) to BIO, or choose the metric token_accuracy.",
        )
    return prefix == "B", kind


def _fixed(labels: Sequence[str]) -> dict[str, int]:
    """Label -> its place; refuses an empty label set and doubles."""
    double = [label for label, times in Counter(labels).items() if times > 1]
    if double or not labels:
        given = f"The label '{double[0]}' is named twice." if double else "The label set is empty."
        raise ConfigError(given, "A label set names each label of the federation once.", action="Set task.labels.")
    return {label: place for place, label in enumerate(labels)}


def _known(places: Mapping[str, int], *given: str) -> None:
    for label in given:
        if label not in places:
            raise DataError(
                f"The label '{label}' is not in the label set.",
                f"Labels: {', '.join(list(places)[:20])}{', ...' if len(places) > 20 else ''}.",
                nearest(label, places),
                action="Set task.labels to all labels of the federation.",
            )

"""Evaluate - metrics as sums, and what they say of a federation.

A client sends sums (how many right, how many counted), never a finished score: sums of clients add up to exactly
what one holder of all data would count, and a secure sum can carry them. A score is computed from sums at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fedllm.core.errors import DataError

EXAMPLES = "examples"
"""The count of examples, under the same name in every metric."""


class Metric(ABC):
    """A metric whose counts may be added over examples, batches and clients.

    Attributes:
        name: the metric's name, and that of its main count.
        higher_is_better: the direction.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def count(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The additive counts of aligned predictions and references; counts that are 0 may be left out."""

    @abstractmethod
    def missing(self, counts: Mapping[str, float]) -> str | None:
        """Why these counts have no value, as a sentence; None where they have one."""

    @abstractmethod
    def compute(self, counts: Mapping[str, float]) -> float:
        """The value of counts for which :meth:`missing` is None."""

    def value(self, counts: Mapping[str, float]) -> float | None:
        """The value of (summed) counts, always finite; None where :meth:`missing` says why."""
        return None if self.missing(counts) else self.compute(counts)


class Average(Metric):
    """A metric that is a mean over examples; its counts are the sum of scores, under its name, and `examples`."""

    @abstractmethod
    def score(self, prediction: Any, reference: Any) -> float:
        """The score of one example, 0 to 1."""

    def count(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The sum of scores and the number of examples."""
        aligned(predictions, references)
        total = sum(self.score(*pair) for pair in zip(predictions, references, strict=True))
        return {self.name: float(total), EXAMPLES: float(len(references))}

    def missing(self, counts: Mapping[str, float]) -> str | None:
        """Nothing was counted."""
        return None if counts.get(EXAMPLES) else "No example was measured."

    def compute(self, counts: Mapping[str, float]) -> float:
        """The mean score."""
        return counts.get(self.name, 0.0) / counts[EXAMPLES]


def total(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of counts; a name that one lacks counts as 0 there."""
    summed: dict[str, float] = {}
    for found in counts:
        for name, value in found.items():
            summed[name] = summed.get(name, 0.0) + value
    return summed


def aligned(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise :class:`DataError` where there is not one prediction for each reference."""
    if len(predictions) != len(references):
        raise DataError(
            f"There are {len(predictions)} predictions and {len(references)} references.",
            "A metric needs one prediction for each reference.",
        )

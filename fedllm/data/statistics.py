"""Statistics - how much each client holds and how much clients differ; for `fedllm data stats` and the report.

Whether a method helps depends on the skew of the data, so a run writes it down. All rows are read once, one client at
a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from fedllm.data.federation import Federation


@dataclass(frozen=True)
class ClientStatistics:
    """One client.

    Attributes:
        train: training rows.
        eval: held-out rows.
        characters: characters of all texts in the training rows.
        labels: label -> training rows (or list entries) that have it; None where the data has no labels.
    """

    train: int
    eval: int
    characters: int
    labels: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"train": self.train, "eval": self.eval, "characters": self.characters, "labels": self.labels}


@dataclass(frozen=True)
class Statistics:
    """All clients; what cannot be known is None.

    Attributes:
        clients: client id -> its statistics.
        names: client id -> a name for people.
        mean: mean number of training rows.
        smallest, largest: fewest and most training rows.
        ratio: largest / smallest; None where a client has no training rows.
        gini: Gini coefficient of the training rows: 0 where all are equal, near 1 where one client has all.
        heterogeneity: mean over clients (with labels) of the total-variation distance between a client's label
            distribution and that of all training rows: 0 where all are alike, near 1 where none shares a label.
        label_column: the column of the labels.
        warnings: of the federation.
    """

    clients: dict[str, ClientStatistics]
    names: dict[str, str]
    mean: float
    smallest: int
    largest: int
    ratio: float | None
    gini: float | None
    heterogeneity: float | None
    label_column: str | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        held = self.clients.values()
        return {
            "clients": {client: {"name": self.names[client], **one.to_dict()} for client, one in self.clients.items()},
            "total": {
                "clients": len(self.clients),
                "train": sum(one.train for one in held),
                "eval": sum(one.eval for one in held),
                "characters": sum(one.characters for one in held),
            },
            "mean": self.mean,
            "smallest": self.smallest,
            "largest": self.largest,
            "ratio": self.ratio,
            "gini": self.gini,
            "heterogeneity": self.heterogeneity,
            "label_column": self.label_column,
            "warnings": self.warnings,
        }


def statistics(federation: Federation) -> Statistics:
    """Read all training rows once and count."""
    clients = {client: _client(federation, client) for client in federation.client_ids}
    sizes = [one.train for one in clients.values()]
    return Statistics(
        clients,
        dict(federation.names),
        sum(sizes) / len(sizes),
        min(sizes),
        max(sizes),
        max(sizes) / min(sizes) if min(sizes) else None,
        gini(sizes),
        heterogeneity([one.labels for one in clients.values() if one.labels is not None]),
        federation.label_column,
        list(federation.warnings),
    )


def gini(sizes: Sequence[float]) -> float | None:
    """The Gini coefficient: mean absolute difference of all pairs over twice the mean; None where all are 0."""
    ordered = numpy.sort(numpy.asarray(sizes, numpy.float64))
    total, count = float(ordered.sum()), len(ordered)
    if total == 0:
        return None
    ranks = 2 * numpy.arange(1, count + 1) - count - 1
    return max(0.0, float((ranks * ordered).sum() / (count * total)))


def heterogeneity(counts: Sequence[Mapping[str, int]]) -> float | None:
    """Mean total-variation distance between a client's label distribution and the pooled one; None without labels."""
    pooled: Counter[str] = Counter()
    for one in counts:
        pooled.update(one)
    total = pooled.total()
    if not total:
        return None
    distances = []
    for one in counts:
        size = sum(one.values())
        if size:
            apart = sum(abs(one.get(label, 0) / size - count / total) for label, count in pooled.items())
            distances.append(apart / 2)
    return float(numpy.mean(distances))


def _client(federation: Federation, client: str) -> ClientStatistics:
    characters, labels, column = 0, Counter[str](), federation.label_column
    for row in federation.rows(client, "train"):
        characters += length(row)
        value = row.get(column) if column is not None else None
        values = value if isinstance(value, list | tuple) else (value,)
        labels.update(str(one) for one in values if one is not None)
    return ClientStatistics(
        federation.size(client, "train"),
        federation.size(client, "eval"),
        characters,
        dict(sorted(labels.items())) if column is not None else None,
    )


def length(value: Any) -> int:
    """Characters of all texts in a row, a list or a text."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(length(one) for one in value.values())
    return sum(length(one) for one in value) if isinstance(value, list | tuple) else 0

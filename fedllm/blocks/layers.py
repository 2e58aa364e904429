"""Layers - how much the hidden states of a layer differ between examples, and the choice of layers by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from fedllm.core.work import Row

FLOOR = 1e-5
"""Added to every eigenvalue, so that its logarithm and its inverse exist."""


def spread_score(states: torch.Tensor) -> float:
    """sum_j (log l_j + 1 / l_j) over the eigenvalues of the cosine similarities of examples (FedPepTAO, 2310.15080).

    b orthogonal examples give b; b identical ones about (b - 1) / 1e-5: near-duplicates outweigh everything else, so
    the batch should hold distinct examples (:func:`distinct`).

    Args:
        states: [b, ...] hidden states of one layer, 0 at padding; flattened per example.
    """
    rows = states.double().flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0) + FLOOR
    return float((values.log() + 1 / values).sum())


def distinct(rows: Sequence[Row], most: int, rng: numpy.random.Generator) -> list[Row]:
    """Up to `most` rows, no two of which hold the same, drawn without replacement."""
    found: dict[str, Row] = {}
    for place in rng.permutation(len(rows)):
        row = rows[int(place)]
        found.setdefault(_content(row), row)
        if len(found) == most:
            break
    return list(found.values())


def _content(row: Row) -> str:
    """What a row says, as text."""
    return json.dumps({str(name): row[name] for name in row}, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, anything else by its name."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def best_layers(scores: Sequence[float], ratio: float) -> list[int]:
    """The ceil(ratio * L) layers of the highest scores, at least one, ascending; ties go to the lower layer."""
    count = min(len(scores), max(1, int(numpy.ceil(round(ratio * len(scores), 9)))))
    return sorted(sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[:count])

"""Words - what a result means, in two plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "entity_f1": "entity F1",
    "loss": "held-out loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "rouge_l": "ROUGE-L",
    "token_f1": "token F1",
    "last_number": "right final number",
}
"""Metric names as people say them."""

RATES = ("exact_match", "accuracy", "macro_f1", "entity_f1", "token_accuracy", "rouge_l", "token_f1", "last_number")
"""Metrics between 0 and 1, written as percentages."""


def value_text(metric: str, value: float | None) -> str:
    """A metric's value for people."""
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if metric in RATES else f"{value:.3f}"


def bytes_text(size: float | None) -> str:
    """Bytes for people: decimal units."""
    if size is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number of things."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def sentences(table: Mapping[str, Any]) -> list[str]:
    """What the federation reached against base and local, against pooled data and at what cost; what was promised."""
    guard = table.get("guard") or {}
    told = [f"Differential privacy: {guard['line']}"] if "line" in guard else []
    return [*_compared(table), *told]


def _compared(table: Mapping[str, Any]) -> list[str]:
    metric, name = table["metric"], NAMES.get(table["metric"], table["metric"])
    found = {row["model"]: row["pooled"].get(metric) for row in table["rows"]}
    if not table.get("finished", True):
        return [f"The run was stopped after round {table['rounds']}; nothing is compared yet."]
    federated = found.get("federated")
    if federated is None:
        return [
            "Nothing was measured: no client has held-out rows.",
            f"The model was trained for {count(table['rounds'], 'round')}.",
        ]
    against = []
    if found.get("local") is not None:
        against.append(f"{value_text(metric, found['local'])} when each trains alone")
    if found.get("base") is not None:
        against.append(f"{value_text(metric, found['base'])} without training")
    article = "an" if name[0] in "aeiou" else "a"
    who, reached = count(len(table["clients"]), "client"), value_text(metric, federated)
    first = f"Together the {who} reach {article} {name} of {reached}"
    first += f", against {' and '.join(against)}." if against else "."
    up, down = bytes_text(table["bytes"]["up"]), bytes_text(table["bytes"]["down"])
    sent = f"{up} went up and {down} down in {count(table['rounds'], 'round')}"
    central = found.get("central")
    if central is None:
        return [first, f"No document left its owner; {sent}."]
    return [
        first,
        f"Pooling all data would give {value_text(metric, central)}; here no document left its owner, and {sent}.",
    ]

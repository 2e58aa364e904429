"""Table - a run's result, and who holds what data, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedllm.report.words import NAMES, count, value_text

if TYPE_CHECKING:
    from rich.table import Table

CLIENTS = 30
"""So many clients are listed; the others are put together in one row."""
LABELS = 3
"""So many labels are named for each client."""


def result_table(result: Mapping[str, Any]) -> Table:
    """Models as rows: the metric over all rows and over clients, then the other metrics. `result` is result.json."""
    from rich.table import Table

    metric, rows = result["metric"], result["rows"]
    others = [name for name in (rows[0]["pooled"] if rows else {}) if name not in ("n", metric)]
    table = Table(title=result["name"], caption=caption(result))
    table.add_column("model")
    names = [str(NAMES.get(metric, metric)), "mean of clients", "worst 10 %", "95 % interval"]
    for name in (*names, *(NAMES.get(name, name) for name in others)):
        table.add_column(name, justify="right")
    for row in rows:
        pooled, summary = row["pooled"], row.get("summary") or {}
        cells = [value_text(metric, pooled.get(metric)), value_text(metric, summary.get("mean"))]
        cells += [value_text(metric, summary.get("worst_10_percent")), interval_text(metric, summary.get("interval"))]
        cells += [value_text(name, pooled.get(name)) for name in others]
        table.add_row(_plain(row["label"]), *cells, style="bold" if row["model"] == "federated" else None)
    return table


def partition_table(statistics: Mapping[str, Any]) -> Table:
    """Clients as rows, largest first: training rows, held-out rows, labels. `statistics` is partition.json."""
    from rich.table import Table

    clients = sorted(statistics["clients"].items(), key=lambda pair: (-pair[1]["train"], pair[0]))
    labelled = any(one.get("labels") for _, one in clients)
    table = Table(caption=_spread(statistics))
    table.add_column("client")
    for name in ("train", "held out"):
        table.add_column(name, justify="right")
    if labelled:
        table.add_column("labels")
    for client, one in clients[:CLIENTS]:
        labels = [_plain(labels_text(one.get("labels") or {}))] if labelled else []
        table.add_row(_plain(one.get("name") or client), f"{one['train']:,}", f"{one['eval']:,}", *labels)
    rest = [one for _, one in clients[CLIENTS:]]
    if rest:
        sums = [f"{sum(one[split] for one in rest):,}" for split in ("train", "eval")]
        table.add_row(f"{len(rest)} smaller clients", *sums, *([""] if labelled else []), style="dim")
    if len(clients) > 1:
        sums = [f"{sum(one[split] for _, one in clients):,}" for split in ("train", "eval")]
        table.add_section()
        table.add_row(f"all {len(clients)} clients", *sums, *([""] if labelled else []), style="bold")
    return table


def caption(result: Mapping[str, Any]) -> str:
    """Method, rounds and the metric's direction."""
    better = "higher" if result["higher_is_better"] else "lower"
    return f"{result['method']}, {count(result['rounds'], 'round')}; {better} is better"


def interval_text(metric: str, interval: Sequence[float] | None) -> str:
    """An interval as people write it; a dash where there is none."""
    if interval is None:
        return "–"
    low, high = (value_text(metric, value) for value in interval)
    return f"{low.removesuffix(' %')}\u00a0– {high}"


def labels_text(labels: Mapping[str, int]) -> str:
    """The most frequent labels with their share, and how many others there are."""
    total = sum(labels.values())
    ordered = sorted(((label, count) for label, count in labels.items() if count), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{label} {100 * count / total:.0f} %" for label, count in ordered[:LABELS]]
    rest = len(ordered) - LABELS
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _spread(statistics: Mapping[str, Any]) -> str | None:
    """How unequal the clients are, where it is known."""
    parts = []
    if statistics.get("gini") is not None:
        parts.append(f"Gini of sizes {statistics['gini']:.2f}")
    if statistics.get("heterogeneity") is not None:
        parts.append(f"difference of labels {statistics['heterogeneity']:.2f}")
    return f"{', '.join(parts)} (0: all alike)" if parts else None


def _plain(text: str) -> Any:
    """A text that rich does not read as markup."""
    from rich.text import Text

    return Text(str(text))

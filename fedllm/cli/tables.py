"""Tables - a result by client, and a comparison, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.report.words import NAMES, bytes_text, count, value_text

CLIENTS = 12
"""Up to so many clients have a column; of more, the table over all of them says enough."""


def client_table(table: Mapping[str, Any], width: int) -> Table | None:
    """The headline metric: rows = models, columns = clients and all together; turned where that is too wide.

    Args:
        table: the content of result.json.
        width: columns of the screen.

    Returns:
        None where nothing was measured, or there are more than :data:`CLIENTS` clients.
    """
    metric, clients = table["metric"], table["clients"]
    measured = [client for client in clients if any(client in row["clients"] for row in table["rows"])]
    if not measured or len(measured) > CLIENTS:
        return None
    values = [
        [*(row["clients"].get(client, {}).get(metric) for client in measured), row["pooled"].get(metric)]
        for row in table["rows"]
    ]
    title, labels = f"{NAMES.get(metric, metric)} by client", [row["label"] for row in table["rows"]]
    names = [*(clients[client] for client in measured), "all"]
    wide = _grid(title, "model", names, labels, [[value_text(metric, value) for value in row] for row in values])
    if Console(width=10_000).measure(wide).maximum <= width:
        return wide
    turned = [[value_text(metric, value) for value in column] for column in zip(*values, strict=True)]
    return _grid(title, "client", labels, names, turned)


def comparison_table(table: Mapping[str, Any]) -> Table:
    """Rows = methods: mean and spread over seeds, the worst clients, the other metrics, what it cost."""
    metric, seeds = table["metric"], table["seeds"]
    others = [name for name in table["rows"][0]["metrics"] if name != metric]
    counted = f"{count(table['rounds'], 'round')}, {count(len(seeds), 'seed')}"
    caption = f"{counted}; mean ± standard deviation" if len(seeds) > 1 else counted
    shown = Table(title=table["name"], caption=caption)
    shown.add_column("method")
    names = [NAMES.get(metric, metric), "worst 10 %", *(NAMES.get(name, name) for name in others)]
    for name in (*names, "up", "tokens", "seconds"):
        shown.add_column(name, justify="right")
    for row in table["rows"]:
        spread = f" ± {value_text(metric, row['std'])}" if row["std"] is not None else ""
        cells = [row["method"], value_text(metric, row["mean"]) + spread, value_text(metric, row["worst"])]
        cells += [value_text(name, row["metrics"][name]) for name in others]
        trained = row["method"] != "base"
        cost = [bytes_text(row["up"]), f"{row['tokens']:,.0f}", f"{row['seconds']:.1f}"] if trained else ["", "", ""]
        shown.add_row(*cells, *cost)
    return shown


def profit_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Rows = local rate, steps and mix: personal and global score; a star where no other row beats both."""
    shown = Table(title=f"{NAMES.get(metric, metric)}: own rows against everybody's", caption="* = on the frontier")
    for name in ("local rate", "steps", "mix", "personal", "global", "moved", ""):
        shown.add_column(name, justify="right")
    for row in rows:
        scores = [value_text(metric, row[kind]) for kind in ("personal", "global")]
        numbers = [f"{row['lr']:g}", str(row["steps"]), f"{row['mix']:g}"]
        shown.add_row(*numbers, *scores, f"{row['moved']:.2f}", "*" if row["frontier"] else "")
    return shown


def attack_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Rows = method, attack and defence: the score, what it lost, and what the attacker reached."""
    from fedllm.attack import cells

    shown = Table(
        title=f"{NAMES.get(metric, metric)} under attack",
        caption="lost: against neither attack nor defence; without: the same goal, the same defence and no attacker",
    )
    for name in ("method", "attack", "defence"):
        shown.add_column(name)
    for name in (NAMES.get(metric, metric), "lost", "attacker's success", "without"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(row["method"], row["attack"], row["defence"], *cells(row, metric))
    return shown


def _grid(
    title: str, corner: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]]
) -> Table:
    table = Table(title=title)
    table.add_column(corner)
    for column in columns:
        table.add_column(Text(column), justify="right")
    for name, values in zip(rows, cells, strict=True):
        table.add_row(Text(name), *values)
    return table

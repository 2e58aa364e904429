"""Blocks - what a page is made of, as JSON that page/dash.js draws: it writes every text as text, and knows no words.

A page is a mapping: kind, kicker, title, about, state, lead, tiles, sections, reading, back. A cell is a text, or
{"text", "tone"}, {"time": ISO 8601} or {"run": id, "text"}, a link to that run's page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedllm.report.chart import ticks
from fedllm.report.words import RATES, bytes_text
from fedllm.report.words import count as count

Block = dict[str, Any]
Cell = str | dict[str, Any]
POINTS = 300
"""Points of a line at most; of each stretch of a longer one the lowest and the highest are kept."""
GOOD, BAD, BUSY, QUIET = "good", "bad", "busy", "quiet"
"""Tones of a state or a cell."""


def text(words: str, kind: str = "") -> Block:
    """A paragraph: "" or note, empty, bad."""
    return {"block": "text", "text": words, "kind": kind}


def items(found: Sequence[str]) -> Block:
    """A list of sentences."""
    return {"block": "list", "items": list(found)}


def facts(found: Sequence[tuple[str, Cell]]) -> Block:
    """Names and values."""
    return {"block": "facts", "items": [list(one) for one in found if one[1] not in ("", None)]}


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Block:
    """A table; a head that begins with `#` is of numbers, one that ends with `-` is left out where there is no room."""
    columns = [
        {"text": head.removeprefix("#").removesuffix("-"), "number": head.startswith("#"), "minor": head.endswith("-")}
        for head in heads
    ]
    return {"block": "table", "caption": caption, "heads": columns, "rows": [list(row) for row in rows]}


def bar(label: str, value: float, most: float, words: str) -> Block:
    """How much of something there is."""
    return {"block": "bar", "label": label, "share": min(1.0, value / most) if most > 0 else 1.0, "text": words}


def section(title: str, *blocks: Block | None) -> Block:
    """Blocks under a title; its title also names it."""
    return {"title": title, "blocks": [block for block in blocks if block is not None]}


def toned(words: str, tone: str) -> Cell:
    """A cell that is good, bad, busy or quiet."""
    return {"text": words, "tone": tone}


def at(time: str) -> Cell:
    """A moment, which the page shows in the reader's own time zone."""
    return {"time": time} if time else "–"


def link(run: str, words: str = "") -> Cell:
    """A link to the page of a run."""
    return {"run": run, "text": words or run}


def chart(
    title: str,
    note: str,
    lines: Iterable[tuple[str, int, Sequence[tuple[float, float | None]]]],
    show: Callable[[float], str],
    x_label: str = "round",
    zero: bool = False,
) -> Block | None:
    """A line chart of (name, place in the palette, points in the order of x); None where no line has two points."""
    drawn: list[dict[str, Any]] = [
        {"name": name, "tone": tone, "points": [[x, y] for x, y in thinned(points)]} for name, tone, points in lines
    ]
    drawn = [line for line in drawn if sum(y is not None for _, y in line["points"]) > 1]
    if not drawn:
        return None
    known = [(x, y) for line in drawn for x, y in line["points"] if y is not None]
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    lows = [0.0] if zero else []
    scale = ticks(min([*lows, *(y for _, y in known)]), max(y for _, y in known))
    across = [x for x in ticks(first, last, 5) if x == int(x) and first <= x <= last] or [first]
    words = "; ".join(_ends(line, show) for line in drawn)
    return {
        "block": "chart",
        "title": title,
        "note": note,
        "words": f"{words}.",
        "lines": drawn,
        "y": [[value, show(value)] for value in scale],
        "x": [[value, f"{value:,.0f}"] for value in across],
        "label": x_label,
    }


def thinned(points: Sequence[tuple[float, float | None]], most: int = POINTS) -> list[tuple[float, float | None]]:
    """At most so many points: the ends, and of every stretch between them its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    wide = -(-len(points) // (most // 2))
    found = [points[0]]
    for start in range(0, len(points), wide):
        part = range(start, min(start + wide, len(points)))
        known = [place for place in part if points[place][1] is not None]
        ends = {min(known, key=_height(points)), max(known, key=_height(points))} if known else {start}
        found += [points[place] for place in sorted(ends) if points[place][0] != found[-1][0]]
    return found if found[-1][0] == points[-1][0] else [*found, points[-1]]


def _height(points: Sequence[tuple[float, float | None]]) -> Callable[[int], float]:
    return lambda place: points[place][1] or 0.0


def axis(metric: str) -> Callable[[float], str]:
    """How values of a metric stand at an axis."""
    return (lambda value: f"{100 * value:g} %") if metric in RATES else "{:,g}".format


def size(count: float | None) -> str:
    """Bytes for people."""
    return bytes_text(count).replace(".0 ", " ")


def _ends(line: dict[str, Any], show: Callable[[float], str]) -> str:
    known = [y for _, y in line["points"] if y is not None]
    return f"{line['name']}: from {show(known[0])} to {show(known[-1])}"

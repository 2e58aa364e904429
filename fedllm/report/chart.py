"""Chart - the four charts of a report as SVG text, without a library.

Every chart is one <svg> that fills the width it is given and keeps its text readable on a phone. Colours are CSS
variables with a fallback, so that a page can theme them and a chart alone still works; the palette is that of Okabe
and Ito, which colour-blind people can tell apart, and lines differ in marker and dash too.
"""

from __future__ import annotations

import hashlib
import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, SIZE = 360, 11
"""Units of width of every chart, and of its text; a unit is about a pixel on a phone."""
TONES = ("#0072b2", "#d55e00", "#7f858d", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")
"""Fallbacks of the CSS variables --tone0 to --tone7."""
DASHES = ("", "5 3", "2 3", "9 3", "7 2 2 2", "", "5 3", "2 3")
MARKED = 40
"""Above so many points a line is drawn without markers."""
Show = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A line: (x, y) points in the order of x; a y of None makes a gap. `tone` is a place in the palette."""

    name: str
    points: Sequence[tuple[float, float | None]]
    tone: int = 0


@dataclass(frozen=True)
class Bars:
    """One value (0 or more; None where unknown) for each group. `tone` is a place in the palette."""

    name: str
    values: Sequence[float | None]
    tone: int = 0


def line_chart(
    title: str, description: str, lines: Sequence[Line], x_label: str, show: Show, x_show: Show = "{:g}".format,
    zero: bool = False,
) -> str:  # fmt: skip
    """Lines over a numeric axis; `show` writes a value, `zero` makes the value axis begin at 0."""
    known = [(x, y) for line in lines for x, y in line.points if y is not None]
    if not known:
        return ""
    lows = [0.0] if zero else []
    scale = ticks(min([*(y for _, y in known), *lows]), max(y for _, y in known))
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    keys, top = _legend([(line.name, line.tone) for line in lines], marked=True)
    left, right, height = max(map(_width, map(show, scale))) + 8, WIDTH - 18, 170

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return left + across * (right - left), top + height - (y - scale[0]) / (scale[-1] - scale[0]) * height

    parts = [keys]
    for y in scale:
        place = at(first, y)[1]
        parts.append(f'<path d="M{left:.1f} {place:.1f}H{right}" style="stroke:var(--line,#ddd)"/>')
        parts.append(_text(left - 5, place + 4, show(y), "end"))
    for x in _whole(first, last):
        parts.append(_text(at(x, scale[0])[0], top + height + 15, x_show(x), "middle"))
    parts.append(_text((left + right) / 2, top + height + 30, x_label, "middle"))
    parts += [_drawn(line, at) for line in lines]
    return _svg(title, description, top + height + 36, parts)


def bar_chart(
    title: str, description: str, groups: Sequence[str], bars: Sequence[Bars], show: Show, longest: float = 0.0
) -> str:
    """Horizontal bars, one of each of `bars` under the name of each group; `longest` is the value of a full bar."""
    known = [value for bar in bars for value in bar.values if value is not None]
    if not known:
        return ""
    longest, thick = max([*known, longest]) or 1.0, 11
    room = WIDTH - max(map(_width, map(show, known))) - 8
    keys, y = _legend([(bar.name, bar.tone) for bar in bars])
    parts = [keys]
    for place, group in enumerate(groups):
        parts.append(_text(0, y + 10, group, ink=True, room=WIDTH))
        y += 15
        for bar in bars:
            value = bar.values[place]
            length = max(0.0, value or 0.0) / longest * room
            tip = f"{group}, {bar.name}: {show(value) if value is not None else 'not measured'}"
            parts.append(_rect(0, y, max(length, 1.0), thick - 2, bar.tone, tip) if value is not None else "")
            parts.append(_text(length + 5, y + 8.5, show(value) if value is not None else "not measured", size=10))
            y += thick
        y += 8
    return _svg(title, description, y, parts)


def stacked_chart(title: str, description: str, groups: Sequence[str], parts: Sequence[Bars], show: Show) -> str:
    """One horizontal bar for each group, put together from `parts`, with its total at the end."""
    totals = [sum(part.values[place] or 0.0 for part in parts) for place in range(len(groups))]
    if not any(totals):
        return ""
    room = WIDTH - max(map(_width, map(show, totals))) - 8
    keys, y = _legend([(part.name, part.tone) for part in parts])
    drawn = [keys]
    for place, group in enumerate(groups):
        drawn.append(_text(0, y + 10, group, ink=True, room=WIDTH))
        x = 0.0
        for part in parts:
            value = part.values[place] or 0.0
            length = value / max(totals) * room
            if value:
                tip = f"{group}, {part.name}: {show(value)}"
                drawn.append(_rect(x, y + 15, max(length - 0.7, 0.4), 13, part.tone, tip))
            x += length
        drawn.append(_text(x + 5, y + 25.5, show(totals[place]), size=10))
        y += 37
    return _svg(title, description, y, drawn)


def heat_map(
    title: str, description: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]],
    show: Show,
) -> str:  # fmt: skip
    """A grid of values (0 or more): the darker, the higher. Above 40 rows they are thin and not named."""
    highest = max((value for row in values for value in row), default=0.0)
    if not highest:
        return ""
    named = len(rows) <= 40
    left, tall = (min(150.0, max(map(_width, rows)) + 8) if named else 4.0), (17.0 if named else 3.0)
    wide = (WIDTH - left) / len(columns)
    top = min(110.0, max(map(_width, columns))) + 8
    parts = []
    for place, column in enumerate(columns):
        x = left + (place + 0.5) * wide + 4
        turned = _text(0, 0, column, room=102)
        parts.append(f'<g transform="translate({x:.1f} {top - 4:.1f}) rotate(-90)">{turned}</g>')
    for across, (row, found) in enumerate(zip(rows, values, strict=True)):
        y = top + across * tall
        parts.append(_text(left - 6, y + 12, row, "end", ink=True, room=left - 8) if named else "")
        for place, value in enumerate(found):
            tip = f"{row}, {columns[place]}: {show(value)}" if named else ""
            share = value / highest
            if named or value:
                x, gap = left + place * wide, 1.0 if named else 0.0
                parts.append(_rect(x, y, wide - gap, tall - gap, 0, tip, 0.05 + 0.95 * share))
    y = top + len(rows) * tall + 10
    for step in range(5):
        parts.append(_rect(left + 18 * step, y, 18, 8, 0, "", 0.05 + 0.95 * step / 4))
    parts.append(_text(left + 96, y + 8, f"0 to {show(highest)}"))
    return _svg(title, description, y + 16, parts)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`; at least two."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _whole(first: float, last: float) -> list[float]:
    """Ticks of an axis that lie on whole numbers between two ends."""
    found = [x for x in ticks(first, last, 5) if x == int(x) and first <= x <= last]
    return found or [first]


def _drawn(line: Line, at: Callable[[float, float], tuple[float, float]]) -> str:
    """A line with its markers."""
    path, gap, places = [], True, []
    for x, y in line.points:
        if y is not None:
            places.append(at(x, y))
            path.append(f"{'M' if gap else 'L'}{places[-1][0]:.1f} {places[-1][1]:.1f}{'h0' if gap else ''}")
        gap = y is None
    tone = line.tone % len(TONES)
    dash = f";stroke-dasharray:{DASHES[tone]}" if DASHES[tone] else ""
    style = f"fill:none;stroke:{_tone(tone)};stroke-width:1.8;stroke-linecap:round;stroke-linejoin:round{dash}"
    marks = "".join(_marker(x, y, tone) for x, y in places) if len(places) <= MARKED else ""
    return f'<path d="{"".join(path)}" style="{style}"/>{marks}'


def _marker(x: float, y: float, tone: int) -> str:
    """A circle, square, triangle or diamond."""
    shapes = ("M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0", "M-2.3-2.3h4.6v4.6h-4.6z", "M0-3L3 2.2H-3z",
              "M0-3.2L3.2 0L0 3.2L-3.2 0z")  # fmt: skip
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{shapes[tone % 4]}" style="fill:{_tone(tone)}"/>'


def _legend(names: Sequence[tuple[str, int]], marked: bool = False) -> tuple[str, float]:
    """Keys in as many lines as they need, and the height they take; nothing for a single unnamed one."""
    if len(names) == 1 and not names[0][0]:
        return "", 8.0
    parts, x, y = [], 0.0, 0.0
    for name, tone in names:
        needed = min(_width(name), WIDTH - 24) + 32
        if x and x + needed - 16 > WIDTH:
            x, y = 0.0, y + 16
        key = _marker(x + 5, y + 7, tone) if marked else _rect(x, y + 2, 10, 10, tone)
        parts += [key, _text(x + 14, y + 11, name, ink=True, room=WIDTH - 24)]
        x += needed
    return "".join(parts), y + 26


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    name = "chart-" + hashlib.sha256(f"{title}\n{description}".encode()).hexdigest()[:10]
    view = f'viewBox="0 0 {WIDTH} {height:.0f}" width="100%" xmlns="http://www.w3.org/2000/svg"'
    labels = f'<title id="{name}-t">{_safe(title)}</title><desc id="{name}-d">{_safe(description)}</desc>'
    font = f'font-family="system-ui, sans-serif" font-size="{SIZE}"'
    return f'<svg {view} role="img" aria-labelledby="{name}-t {name}-d" {font}>{labels}{"".join(parts)}</svg>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", ink: bool = False, room: float = math.inf, size: int = SIZE
) -> str:
    """A text, cut with an ellipsis where it is wider than `room`."""
    fill = "var(--ink,#1c2430)" if ink else "var(--muted,#5d6673)"
    whole, tip = text, ""
    while len(text) > 1 and _width(text) > room:
        text, tip = text.rstrip("…")[:-1] + "…", f"<title>{_safe(whole)}</title>"
    larger = f' font-size="{size}"' if size != SIZE else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{fill}"{larger}>{_safe(text)}{tip}</text>'


def _rect(x: float, y: float, wide: float, tall: float, tone: int, tip: str = "", strength: float = 1.0) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
    light = f";fill-opacity:{strength:.2f}" if strength < 1 else ""
    return f'<rect {size} style="fill:{_tone(tone)}{light}">{f"<title>{_safe(tip)}</title>" if tip else ""}</rect>'


def _tone(tone: int) -> str:
    return f"var(--tone{tone % len(TONES)},{TONES[tone % len(TONES)]})"


def _width(text: str) -> float:
    """About how many units a text takes: wide letters of East Asia take a full square."""
    return sum(1.0 if unicodedata.east_asian_width(char) in "WF" else 0.57 for char in text) * SIZE


def _safe(text: str) -> str:
    """Escaped, and without control characters, which XML does not allow."""
    return html.escape("".join(" " if unicodedata.category(char) in ("Cc", "Cs") else char for char in text))

"""Live - what a run shows while it goes on: a table that renews itself on a terminal, plain lines anywhere else.

The table is drawn by a thread twice a second from what the run has told so far, so a run is never held up by it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.cli import screen
from fedllm.engine.rounds import RoundRecord
from fedllm.recipe import Recipe
from fedllm.report.words import NAMES, bytes_text, value_text
from fedllm.run import Ground, Result, Watch

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

STOPPING = "Stopping after this round; it is saved. Press Ctrl-C again to stop now."
REFRESHES = 2
"""Drawings per second."""
LINES = 4
"""Plain lines for one leg, about."""
ROWS = 8
"""Legs shown at a time."""
LOSSES, TROUBLES = 6, 3
"""Last losses and last warnings shown."""
NARROW = 100
"""Below so many columns the bar is left out."""


@dataclass
class Progress:
    """What is known of one leg.

    Attributes:
        name: "federated", "local", "central", or METHOD-seedN in a comparison.
        label: for people.
        rounds: how many there are.
        begun: how many were played before this session.
        done: how many are played now.
        started: when this session began it, by `time.monotonic`; None before.
        ended: when its last round was over; None before.
    """

    name: str
    label: str
    rounds: int
    begun: int = 0
    done: int = 0
    started: float | None = None
    ended: float | None = None
    losses: list[float] = field(default_factory=list)
    value: float | None = None
    epsilon: float | None = None
    up: int = 0
    down: int = 0

    @property
    def pace(self) -> float | None:
        """Seconds per round in this session; None before the first."""
        if self.started is None or self.ended is None or self.done == self.begun:
            return None
        return (self.ended - self.started) / (self.done - self.begun)


class Live(Watch):
    """Shows a run; use it as a context.

    Args:
        place: where to draw or to write lines.
        expected: how many legs a comparison has; None for a run, whose recipe says it.
        silent: show nothing (warnings are kept for the end).
    """

    def __init__(self, place: Console, expected: int | None = None, silent: bool = False) -> None:
        self.place, self.expected, self.silent = place, expected, silent
        self.legs: dict[str, Progress] = {}
        self.title, self.subtitle, self.metric = "Loading data and model", "", ""
        self.warnings: list[str] = []
        self.folder: Path | None = None
        self.ready = self.finished = False
        self._begun = time.monotonic()
        self._drawing: Any = None

    def __enter__(self) -> Live:
        if screen.interactive(self.place) and not self.silent:
            from rich.live import Live as Drawing

            self._drawing = Drawing(console=self.place, refresh_per_second=REFRESHES, get_renderable=self.draw)
            self._drawing.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawing is not None:
            self._drawing.transient = not self.ready
            self._drawing.stop()

    def interrupted(self) -> None:
        """Stop after this round; safe in a signal handler: nothing is drawn or locked here."""
        self.stop = True
        if self._drawing is None:
            os.write(2, f"{STOPPING}\n".encode())

    # -- what the run tells -------------------------------------------------------------------------------------------

    def begin(self, recipe: Recipe, ground: Ground, folder: Path) -> None:
        """Everything is loaded."""
        from fedllm.run import headline

        self.metric, self.folder, self.warnings = headline(ground), folder, [*ground.warnings, *self.warnings]
        clients, model = len(ground.federation.client_ids), ground.learner.loaded.name
        cohort = recipe.cohort_size(clients)
        what = recipe.method.get("name", "fedavg") if self.expected is None else f"{self.expected} trainings"
        self.title = f"{recipe.name}: {what} over {clients} clients"
        asked = "all" if cohort == clients else str(cohort)
        self.subtitle = f"{model} on {ground.learner.device}, {asked} per round, {ground.width.clients} in a pass"
        self.subtitle += f", {recipe.processes} processes" if recipe.processes > 1 else ""
        if self.expected is None:
            names = ["federated", *(name for name in recipe.evaluation.against if name != "base")]
            self.legs = {name: Progress(name, _label(name, recipe), recipe.rounds) for name in names}
        self.ready = True
        self._line(f"{self.title}; {self.subtitle}; folder {folder}")
        for warning in ground.warnings:
            self._line(f"Warning: {warning}")

    def leg(self, name: str, rounds: int, begun: int) -> None:
        """A leg begins, or goes on."""
        leg = self.legs.setdefault(name, Progress(name, name, rounds))
        leg.rounds, leg.begun, leg.done, leg.started = rounds, begun, begun, time.monotonic()
        if begun:
            self._line(f"{leg.label}: goes on after round {begun} of {rounds}")

    def round(self, name: str, record: RoundRecord, values: Mapping[str, float | None] | None) -> None:
        """A round is over."""
        leg = self.legs[name]
        leg.done, leg.ended = record.round, time.monotonic()
        leg.up, leg.down = leg.up + record.bytes_up, leg.down + record.bytes_down
        if record.loss is not None:
            leg.losses.append(record.loss)
        if values is not None:
            leg.value = values.get(self.metric)
        if record.guard and record.guard.get("epsilon") is not None:
            leg.epsilon = record.guard["epsilon"]
        self._trouble(leg, record)
        every = max(1, leg.rounds // LINES)
        if record.round in (1, leg.rounds) or record.round % every == 0 or values is not None:
            self._line(self._plain(leg))

    def end(self, result: Result) -> None:
        """The run is over."""
        self.finished = True

    def _trouble(self, leg: Progress, record: RoundRecord) -> None:
        where = f"Round {record.round} of {leg.label}"
        found = [f"{where} changed nothing: {record.failed.rstrip('.')}."] if record.failed else []
        for entries, word in ((record.lost, "lost"), (record.rejected, "rejected")):
            if entries:
                first = f"{entries[0]['client']}: {entries[0]['reason']}"
                more = "" if len(entries) == 1 else f" and {len(entries) - 1} more"
                found.append(f"{where}: {word} {first}{more}")
        self.warnings += found
        for text in found:
            self._line(f"Warning: {text}")

    # -- lines --------------------------------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        if not self.silent and self._drawing is None:
            self.place.print(text, markup=False, soft_wrap=True)
            self.place.file.flush()

    def _plain(self, leg: Progress) -> str:
        cells = [f"{leg.label}: round {leg.done}/{leg.rounds}", *self._numbers(leg), f"{clock(self.left())} left"]
        return ", ".join(cell for cell in cells if cell)

    def _numbers(self, leg: Progress) -> list[str]:
        loss = f"loss {leg.losses[-1]:.3f}" if leg.losses else ""
        name = NAMES.get(self.metric, self.metric)
        value = f"{name} {value_text(self.metric, leg.value)}" if leg.value is not None else ""
        spent = "" if leg.epsilon is None else f"epsilon {leg.epsilon:.3g}"
        return [loss, value, spent, f"{bytes_text(leg.up)} up", f"{bytes_text(leg.down)} down"]

    def left(self) -> float | None:
        """Seconds to go, from the pace of the legs so far; None before the first round."""
        legs = list(self.legs.values())
        paces = [leg.pace for leg in legs if leg.pace is not None]
        if not paces:
            return None
        usual = sum(paces) / len(paces)
        total = sum((leg.rounds - leg.done) * (leg.pace or usual) for leg in legs)
        unseen = max(0, (self.expected or 0) - len(legs))
        return total + unseen * legs[-1].rounds * usual

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self) -> RenderableType:
        """What stands on the screen now."""
        from rich.console import Group
        from rich.text import Text

        passed = clock(time.monotonic() - self._begun)
        if not self.ready:
            return Text(f"{self.title} ... {passed}", "dim", overflow="ellipsis", no_wrap=True)
        parts: list[RenderableType] = [Text(self.title, "bold", overflow="ellipsis", no_wrap=True)]
        parts.append(Text(self.subtitle, "dim", overflow="ellipsis", no_wrap=True))
        parts += [self._table(), self._state(passed)]
        if len(self.warnings) > TROUBLES:
            parts.append(Text(f"! {len(self.warnings) - TROUBLES} earlier warnings", "yellow"))
        parts += [Text(f"! {text}", "yellow", overflow="ellipsis", no_wrap=True) for text in self.warnings[-TROUBLES:]]
        if self.stop and not self.finished:
            parts.append(Text(STOPPING, "bold yellow"))
        return Group(*parts)

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        wide = self.place.width >= NARROW
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        private = ["epsilon"] if any(leg.epsilon is not None for leg in self.legs.values()) else []
        measured = "round", "loss", NAMES.get(self.metric, self.metric), *private, "up", "down"
        for name in ("", *([""] if wide else []), *measured):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True, header_style="dim")
        for leg in list(self.legs.values())[-ROWS:]:
            complete = leg.done >= leg.rounds
            bar = [ProgressBar(leg.rounds, leg.done, width=20)] if wide else []
            numbers = [f"{leg.losses[-1]:.3f}" if leg.losses else "", ""]
            numbers[1] = value_text(self.metric, leg.value) if leg.value is not None else ""
            if private:
                numbers.append("" if leg.epsilon is None else f"{leg.epsilon:.3g}")
            sizes = [bytes_text(leg.up), bytes_text(leg.down)] if leg.started is not None else ["", ""]
            style = "dim" if leg.started is None else "" if complete else "bold"
            table.add_row(leg.label, *bar, f"{leg.done}/{leg.rounds}", *numbers, *sizes, style=style)
        return table

    def _state(self, passed: str) -> RenderableType:
        from rich.text import Text

        legs = [leg for leg in list(self.legs.values()) if leg.started is not None]
        current = next((leg for leg in reversed(legs) if leg.losses), None)
        line = Text("", "dim", overflow="ellipsis", no_wrap=True)
        if self.finished:
            return line.append(f"{'Stopped after' if self.stop else 'Finished in'} {passed}.")
        left = self.left()
        line.append(f"{passed} passed" + (f", about {clock(left)} left" if left is not None else ""))
        if legs and len(legs) == len(self.legs) == (self.expected or len(legs)) and left == 0:
            return line.append(", measuring and writing the report")
        if current is not None and len(current.losses) > 1:
            line.append("; losses " + " ".join(f"{loss:.3f}" for loss in current.losses[-LOSSES:]))
        return line


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _label(name: str, recipe: Recipe) -> str:
    method = str(recipe.method.get("name", "fedavg"))
    return {"federated": f"Federated ({method})", "local": "Each alone", "central": "All data pooled"}.get(name, name)


def watcher(expected: int | None = None, as_json: bool = False, quiet: bool = False) -> Live:
    """What shows a run: on stdout, or on stderr where stdout is for JSON."""
    return Live(screen.console(errors=as_json), expected, quiet or (as_json and not sys.stderr.isatty()))

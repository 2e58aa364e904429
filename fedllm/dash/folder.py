"""Folder - one run's folder, of a local run, at a server, or fetched: its files, and how it stands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedllm.dash import given
from fedllm.dash.blocks import BAD, BUSY, GOOD, QUIET, Cell, toned
from fedllm.dash.given import File
from fedllm.dash.rounds import FEDERATED, NAME, Rounds

MARKS = ("recipe.yaml", "metrics.jsonl", "result.json", "error.txt")
"""A folder with one of these holds a run."""
FILES = (
    "result.json", "partition.json", "sites.json", "environment.json", "audit.json", "manifest.json", "standing.json",
    "recipe.yaml",
)  # fmt: skip
"""Files in it that are read whole; a local run has some of them."""
PATIENCE = 180.0
"""Seconds without a sign of life after which a run is no longer said to be under way, at least."""
SLOWER = 5
"""A round may take so many times as long as the longest of the last ones."""
RUNS = 200
"""Runs of a folder that are shown, the newest."""
ERROR_BYTES = 4_000
"""Bytes of error.txt that are read."""


@dataclass(frozen=True)
class State:
    """How a run stands: a word, its tone, and a sentence."""

    word: str
    tone: str
    why: str = ""

    def to_json(self) -> dict[str, str]:
        """For the page."""
        return {"word": self.word, "tone": self.tone, "why": self.why}

    def cell(self) -> Cell:
        """In a table."""
        return toned(self.word, self.tone)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run; one that this user may not enter holds none that can be shown."""
    try:
        return any((folder / name).is_file() for name in MARKS)
    except OSError:
        return False


def moment(seconds: float) -> str:
    """A file's time as ISO 8601, UTC, in whole seconds; empty for 0."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else ""


class Run:
    """What a run's folder holds; read on with each :meth:`refresh`.

    Args:
        folder: the run's folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.rounds = Rounds(folder / "metrics.jsonl")
        self.files = [File(folder / name) for name in FILES]
        self.result, self.partition, self.sites, self.environment, self.anchor, self.signed = self.files[:6]
        self.standing, self.recipe = self.files[6:]
        self.error = ""

    def refresh(self, until: float) -> bool:
        """Read on; True where everything has been read."""
        for file in self.files:
            file.refresh()
        try:
            with (self.folder / "error.txt").open("rb") as file:
                self.error = given.text(file.read(ERROR_BYTES).decode("utf-8", "replace").strip())
        except OSError:
            self.error = ""
        return self.rounds.refresh(until)

    @property
    def total(self) -> int | None:
        """How many rounds the recipe asks for."""
        return given.whole((self.recipe.found or {}).get("rounds"))

    @property
    def method(self) -> str:
        """The method's name."""
        asked = (self.recipe.found or {}).get("method")
        name = asked.get("name", "fedavg") if isinstance(asked, Mapping) else asked
        return given.text((self.result.found or {}).get("method"), 100) or given.text(name, 100)

    @property
    def metric(self) -> str:
        """The headline metric: the result's, or the first that was measured."""
        named = given.text((self.result.found or {}).get("metric"), 60)
        return named or next((name for _, leg in self.rounds.named() for name in leg.scores), "")

    @property
    def score(self) -> float | None:
        """The last value of the headline metric."""
        values = self.rounds.own.scores.get(self.metric) or {}
        if values:
            return next(reversed(values.values()))
        rows = map(given.mapping, given.listed((self.result.found or {}).get("rows")))
        own = next((row for row in rows if row.get("model") == FEDERATED), {})
        return given.number(given.mapping(own.get("pooled")).get(self.metric))

    @property
    def seen(self) -> float:
        """The last sign of life, seconds since 1970; 0.0 where there is none."""
        return max(self.rounds.changed, self.result.changed, self.recipe.changed)

    @property
    def stands(self) -> str:
        """How the server says that it stands: running, waiting, failed, finished, stopped; empty where it does not."""
        return given.text((self.standing.found or {}).get("name"), 40)

    def clients(self) -> dict[str, str]:
        """Client -> its name for people."""
        named = given.mapping((self.result.found or {}).get("clients"))
        known = {**given.mapping((self.partition.found or {}).get("clients")), **named}
        return {client: given.text(named.get(client), NAME) or given.text(client, NAME) for client in known}

    def state(self, now: float | None = None) -> State:
        """How it stands, as far as its own files tell."""
        if self.error:
            return State("failed", BAD, self.error)
        result, last = self.result.found, self.rounds.own
        stands = self.standing.found or {}
        why = given.text(stands.get("reason"))
        if stands.get("name") == "failed":
            return State("failed", BAD, why)
        if stands.get("name") == "stopped":
            return State("stopped", QUIET, "A person ended it. It can be resumed.")
        if stands.get("name") == "waiting":
            return State("waiting", BUSY, f"It goes on by itself when it can. {why}")
        if result is not None and last.last <= (given.whole(result.get("rounds")) or last.last):
            if result.get("finished") is False:
                return State("stopped", QUIET, f"It was stopped after round {last.last:,}. It can be resumed.")
            return State("finished", GOOD)
        silent = (time.time() if now is None else now) - self.seen
        longest = max(list(last.seconds.values())[-5:], default=0.0)
        if silent > max(PATIENCE, SLOWER * longest):
            why = "Its files have not changed for long: it was interrupted or failed, or a round takes very long."
            if last.failed and last.failed[-1] == last.last:
                why = f"Its last round changed nothing: {last.failed_why}"
            return State("silent", BAD, why)
        if not last.last:
            return State("waiting", BUSY, "No round is over yet.")
        return State("under way", BUSY)


class Shelf:
    """The runs in a folder.

    Args:
        folder: a run's folder is one of those in it.

    Attributes:
        runs: by name, the newest first.
        left_out: how many older ones are not shown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Run] = {}
        self.left_out = 0

    def refresh(self, until: float) -> bool:
        """Look for new runs and read all of them on; True where everything has been read."""
        try:
            there = [one for one in self.folder.iterdir() if one.name.isprintable() and is_run(one)]
        except OSError:
            there = []
        kept = sorted(there, key=_written, reverse=True)[:RUNS]
        self.left_out = len(there) - len(kept)
        self.runs = {one.name: self.runs.get(one.name) or Run(one) for one in kept}
        done = [run.refresh(until) for run in self.runs.values()]
        return all(done)


def _written(folder: Path) -> float:
    """When a run last wrote one of its files."""
    times = [0.0]
    for name in MARKS:
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)

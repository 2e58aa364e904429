"""Following - a run that was submitted: its rounds as they end, its end, and what it found."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedllm.cli import screen
from fedllm.cli.running import INTERRUPTED

if TYPE_CHECKING:
    from fedllm.deploy.coordinator import Record
    from fedllm.deploy.kit import Kit

POLL = 1.0
"""Seconds between two looks at a run."""
RETRY, PATIENCE = 10.0, 900.0
"""Seconds between two looks at a server that does not answer, and until nobody looks any more."""
STOPPED = "FINISHED:ABORTED"
"""The status of a run that a person ended."""


def submitted(kit: Kit, record: Record, follow: bool, as_json: bool) -> None:
    """Say that a run was submitted, and stay with it where `follow`; leaves with an error where it fails."""
    if not follow:
        if as_json:
            screen.emit({"run": record.run, "job": record.jobs[-1], "sites": record.sites})
            return
        screen.say(f"Submitted {record.run} to {', '.join(record.sites)}.")
        screen.say(f"Look at it with: fedllm deploy log {record.run} --kit {kit.folder}")
        return
    if not as_json:
        screen.say(f"Submitted {record.run} to {', '.join(record.sites)}. Ctrl-C leaves it running.")
    try:
        state, seen = _follow(kit, record, as_json)
    except KeyboardInterrupt:
        screen.say(f"Left; the run goes on. Look at it: fedllm deploy log {record.run} --kit {kit.folder}", errors=True)
        raise typer.Exit(INTERRUPTED) from None
    _ended(kit, record, state, seen, as_json)


def _follow(kit: Kit, record: Record, quiet: bool) -> tuple[str, set[tuple[str, int]]]:
    """Print rounds as they end until the run is over; returns its status and which rounds were seen.

    A server that is away for a while is waited for, and a run that goes on by itself in another job is followed there.
    """
    from fedllm.core.errors import RunError

    seen: set[tuple[str, int]] = set()
    there = time.monotonic()

    def answered() -> None:
        nonlocal there
        there = time.monotonic()

    while True:
        try:
            return _watched(kit, record, quiet, seen, answered), seen
        except RunError as fault:
            if time.monotonic() - there > PATIENCE:
                raise
            screen.say(f"{fault.given} Looking again in {RETRY:.0f} s.", errors=True)
            time.sleep(RETRY)


def _watched(kit: Kit, record: Record, quiet: bool, seen: set[tuple[str, int]], answered: Callable[[], None]) -> str:
    """The status at the end of a run, as long as the server is there; calls `answered` each time that it answers."""
    from fedllm.deploy import coordinator
    from fedllm.engine.nvflare.session import ENDED, GOOD

    with coordinator.connected(kit) as admin, coordinator.translated():
        while True:
            job = coordinator.newest(admin, record)
            state, rounds = admin.status(job), coordinator.live_rounds(admin, job)
            answered()
            new = [one for one in rounds if (one["model"], one["round"]) not in seen]
            seen |= {(one["model"], one["round"]) for one in new}
            for line in () if quiet else coordinator.lines(new):
                screen.say(line)
            if not state.startswith(ENDED):
                time.sleep(POLL)
            elif state in (GOOD, STOPPED) or not coordinator.goes_on(admin, record, job):
                return state
            elif not quiet:
                screen.say("The server lost the run's job and goes on with it.", "dim")


def _ended(kit: Kit, record: Record, state: str, seen: set[tuple[str, int]], as_json: bool) -> None:
    """Fetch what a run left, and show it; leaves with an error where it failed."""
    from fedllm.core.errors import RunError
    from fedllm.deploy import coordinator
    from fedllm.engine.nvflare.session import GOOD

    folder = kit.folder / coordinator.RESULTS / record.run
    fresh = _fetched(kit, record, folder, must=state == GOOD)
    kept = coordinator.kept_rounds(folder) if fresh else []
    late = [one for one in kept if (one["model"], one["round"]) not in seen]
    for line in () if as_json else coordinator.lines(late):
        screen.say(line)
    if state != GOOD:
        why = (coordinator.reason(folder) if fresh else None) or f"The server says {state}."
        again = f"fedllm deploy resume {record.run} --kit {kit.folder}"
        raise RunError(
            why, f"The run {record.run} did not reach its end.", action=f"When the cause is gone, go on with: {again}"
        )
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if as_json:
        here = {name: str(folder / Path(file).name) for name, file in result["files"].items()}
        screen.emit({"run": record.run, "folder": str(folder), **result, "files": here})
        return
    _show_result(result, folder)


def _fetched(kit: Kit, record: Record, folder: Path, must: bool) -> bool:
    """Put what a run left into a folder, in place of what an earlier job of it left; that stays where there is nothing.

    Args:
        kit: the coordinator's.
        record: the run.
        folder: where to.
        must: whether nothing is an error; a job that failed may have left nothing.
    """
    from fedllm.core.errors import RunError
    from fedllm.deploy import coordinator

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent.parent) as place:
        new = Path(place) / "new"
        with coordinator.connected(kit) as admin, contextlib.suppress(*() if must else (RunError,)):
            coordinator.fetch(admin, record, new)
        if not new.is_dir():
            return False
        if folder.exists():
            folder.rename(Path(place) / "old")
        new.rename(folder)
        return True


def _show_result(result: dict[str, Any], folder: Path) -> None:
    from fedllm.cli.tables import client_table
    from fedllm.report.table import result_table

    width = screen.console().width
    by_client = client_table(result, width)
    screen.say()
    screen.show(screen.fitted(result_table(result), width), *([by_client] if by_client is not None else []))
    screen.say()
    for sentence in result["sentences"]:
        screen.tell(sentence, "bold")
    screen.say()
    for name in ("adapter", "report.html", "metrics.jsonl"):
        if (folder / name).exists():
            screen.say(f"{name.partition('.')[0].capitalize():8} {folder / name}")
    screen.warn(result["warnings"])

"""Standing - how a run stands, in one small file of its folder: what the warden needs to go on with it by itself.

The server's job process writes it. FLARE's parent process reads it (see :mod:`fedllm.engine.nvflare.warden`), and may
ask for a pause beside it: after the round that is under way the job ends, and the run goes on in a new one with the
sites that have come back. The file names the job that it is about: whoever submits another job under the id of a run
changes nothing in how the run stands. It imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedllm.core.errors import RunError
from fedllm.engine import durable

FILE = "standing.json"
PAUSE = "pause"
"""The file that asks for a pause."""
REFUSED = "fedllm/refused"
"""Folder in the server's kit: how jobs stand that never came to play a run, each in a folder with FLARE's id."""
GOING = ("running", "waiting")
"""How a run stands that is not over."""
FIRST, MOST = 60.0, 6 * 3600.0
"""Seconds for which a site is left out that was lost again soon after it came back: the first time, and at most. They
double from one time to the next."""

Name = Literal["running", "waiting", "failed", "finished", "stopped"]


class Paused(RunError):
    """The job ends after a round, so that the run goes on in another one."""


@dataclass
class Standing:
    """How a run stands.

    Attributes:
        name: running (or its process died); waiting: it may go on by itself; failed: a person must look; finished;
            stopped: a person ended it.
        sites: who takes part.
        quorum: sites without which it does not go on.
        lost: site -> when it fell silent, seconds since 1970.
        round: the last round that is over, of whatever leg; the number of all rounds that are.
        reason: why it waits or failed.
        job: FLARE's id of the job that plays it, did last, or will; None: not known.
        waits: site that came back lately -> seconds for which it is left out where it is lost again.
    """

    name: Name
    sites: list[str] = field(default_factory=list)
    quorum: int = 1
    lost: dict[str, float] = field(default_factory=dict)
    round: int = 0
    reason: str | None = None
    job: str | None = None
    waits: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Standing | None:
        """Of a run's folder; None where nothing is known."""
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**found)
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def of_job(cls, kit: Path, run: Path, job: str) -> Standing | None:
        """How a job stands; None where nothing is known of this very job.

        Args:
            kit: the server's folder.
            run: the folder of the run that the job names.
            job: FLARE's id of it.
        """
        found = (cls.read(place) for place in (run, kit / REFUSED / job))
        return next((one for one in found if one is not None and one.job == job), None)

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder."""
        durable.write(folder / FILE, json.dumps(asdict(self)).encode())

    def back(self, here: Mapping[str, float], now: float) -> list[str]:
        """Lost sites that are here again and need not wait any longer.

        Args:
            here: site -> when it said something last, seconds since 1970.
            now: seconds since 1970.
        """
        return sorted(
            site
            for site, since in self.lost.items()
            if here.get(site, 0.0) > since and now >= since + self.waits.get(site, 0.0)
        )


def refuse(kit: Path, run: Path | None, job: str, reason: str) -> Path:
    """Write down that a job failed before it had shown that a run is its own; gives the folder where that stands.

    It is the run's folder where the run waits for this very job. Else it is one of the job's own, and the run stands as
    it did.

    Args:
        kit: the server's folder.
        run: the folder of the run that the job names; None: it names none.
        job: FLARE's id of it.
        reason: why.
    """
    held = Standing.read(run) if run is not None else None
    if run is not None and held is not None and held.job == job:
        replace(held, name="failed", reason=reason).write(run)
        return run
    place = kit / REFUSED / job
    Standing("failed", reason=reason, job=job).write(place)
    return place


class Keep:
    """Writes how a run stands.

    Args:
        folder: the run's.
        sites: who takes part.
        quorum: sites without which it does not go on.
        job: FLARE's id of the job that plays it.
    """

    def __init__(self, folder: Path, sites: Sequence[str], quorum: int, job: str | None = None) -> None:
        self.folder, self._begun = folder, time.monotonic()
        before = Standing.read(folder)
        rounds = before.round if before else 0
        self.now = Standing("running", sorted(sites), quorum, round=rounds, job=job, waits=_waits(before))
        self._write()
        (folder / PAUSE).unlink(missing_ok=True)  # last: nobody asks for one of a run that has lost no site

    def lost(self, site: str) -> None:
        """A site fell silent."""
        self.now.lost[site] = time.time()
        self._write()

    def round(self) -> None:
        """One more round is over and safe; raises :class:`Paused` where somebody asked for it."""
        self.now.round += 1
        held = time.monotonic() - self._begun
        self.now.waits = {s: wait for s, wait in self.now.waits.items() if s in self.now.lost or held <= wait}
        self._write()
        wish = self.folder / PAUSE
        if wish.is_file():
            raise Paused(
                f"The job ends after a round: {wish.read_text(encoding='utf-8').strip()}.",
                "The run goes on by itself from this round.",
            )

    def end(self, name: Name, reason: str | None = None) -> None:
        """The job is over."""
        self.now.name, self.now.reason = name, reason
        self._write()

    def _write(self) -> None:
        self.now.write(self.folder)


def _waits(before: Standing | None) -> dict[str, float]:
    """How long sites are left out where they are lost again: those that the job before had lost, twice as long."""
    if before is None or before.name not in GOING:
        return {}
    return before.waits | {site: min(2 * before.waits.get(site, FIRST / 2), MOST) for site in before.lost}


def pause(folder: Path, why: str) -> None:
    """Ask the job that plays a run to end after the round that is under way."""
    durable.write(folder / PAUSE, why.encode())

"""Standing - how a run stands, in one small file of its folder: what the warden needs to go on with it by itself.

The server's job process writes it. FLARE's parent process reads it (see :mod:`fedllm.engine.nvflare.warden`), and may
ask for a pause beside it: after the round that is under way the job ends, and the run goes on in a new one with the
sites that have come back. It imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from fedllm.core.errors import RunError
from fedllm.engine import durable

FILE = "standing.json"
PAUSE = "pause"
"""The file that asks for a pause."""

Name = Literal["running", "waiting", "failed", "finished"]


class Paused(RunError):
    """The job ends after a round, so that the run goes on in another one."""


@dataclass
class Standing:
    """How a run stands.

    Attributes:
        name: running (or its process died); waiting: it may go on by itself; failed: a person must look; finished.
        sites: who takes part.
        quorum: sites without which it does not go on.
        lost: site -> when it fell silent, seconds since 1970.
        round: the last round that is over, of whatever leg; the number of all rounds that are.
        reason: why it waits or failed.
    """

    name: Name
    sites: list[str] = field(default_factory=list)
    quorum: int = 1
    lost: dict[str, float] = field(default_factory=dict)
    round: int = 0
    reason: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Standing | None:
        """Of a run's folder; None where nothing is known."""
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**found)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder."""
        durable.write(folder / FILE, json.dumps(asdict(self)).encode())


class Keep:
    """Writes how a run stands.

    Args:
        folder: the run's.
        sites: who takes part.
        quorum: sites without which it does not go on.
    """

    def __init__(self, folder: Path, sites: Sequence[str], quorum: int) -> None:
        self.folder = folder
        before = Standing.read(folder)
        self.now = Standing("running", sorted(sites), quorum, round=before.round if before else 0)
        self._write()
        (folder / PAUSE).unlink(missing_ok=True)  # last: nobody asks for one of a run that has lost no site

    def lost(self, site: str) -> None:
        """A site fell silent."""
        self.now.lost[site] = time.time()
        self._write()

    def round(self) -> None:
        """One more round is over and safe; raises :class:`Paused` where somebody asked for it."""
        self.now.round += 1
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


def pause(folder: Path, why: str) -> None:
    """Ask the job that plays a run to end after the round that is under way."""
    durable.write(folder / PAUSE, why.encode())

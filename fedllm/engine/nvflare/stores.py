"""Stores - private stores that survive the death of the worker process, to the bit.

What a turn stages is written to its file at once, and a journal beside the folder names the files: those kept, those
staged in this round, and how many of the server's orders were carried out. A worker that is started again goes on from
the journal, so a client whose upload was used does not lose what it kept of that turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import RunError
from fedllm.engine import durable
from fedllm.engine.private import Filed, PrivateStore

JOURNAL = "journal.json"
"""The file beside the entries' folder."""


class JournaledStore(PrivateStore):
    """A private store that can be taken up again by another process.

    Args:
        declared: names that may be stored.
        folder: the folder of this leg; entries lie in `private` inside it.
        again: go on from the journal; otherwise begin with nothing.
    """

    def __init__(self, declared: Sequence[str], folder: Path, again: bool) -> None:
        super().__init__(declared, folder / "private", budget=-1)  # a turn that is over is written at once
        self.place, self.applied = folder / JOURNAL, 0
        if again:
            self._take_up()

    def keep(self) -> None:
        """Write the journal; nothing where nothing can be stored."""
        if not self.declared:
            return
        facts = {"held": self.manifest(), "staged": self._chains(), "applied": self.applied}
        durable.write(self.place, json.dumps(facts).encode())

    def go_back(self, manifest: dict[str, str]) -> None:
        """Go back to a checkpoint's entries; raises :class:`RunError` where a file is missing."""
        if any(Path(name).name != name for name in manifest.values()):
            raise RunError("The server names a private entry outside of this run's folder.")
        missing = [name for name in manifest.values() if self.folder is None or not (self.folder / name).is_file()]
        if missing:
            raise RunError(
                f"{len(missing)} private entries of the checkpoint are not here any more, {missing[0]} first.",
                action="Restore the site's folder, or start the run again.",
            )
        self.restore(manifest)
        self.applied = 0
        self.keep()

    def _chains(self) -> dict[str, list[str]]:
        """Client -> the files it staged, oldest first; a turn that goes on is not among them."""
        found: dict[str, list[str]] = {}
        for client, staged in self._staged.items():
            chain: list[str] = []
            one: Any = staged
            while one is not None:
                if isinstance(one, Filed):
                    chain.insert(0, one.name)
                one = one.before
            if chain:
                found[client] = chain
        return found

    def _take_up(self) -> None:
        if not self.place.is_file():
            return
        try:
            facts = json.loads(self.place.read_text(encoding="utf-8"))
            held, chains, applied = dict(facts["held"]), dict(facts["staged"]), int(facts["applied"])
        except (OSError, ValueError, LookupError, TypeError) as fault:
            raise RunError(
                f"The journal of what clients keep cannot be read: {type(fault).__name__}.",
                action="Restore the site's folder, or start the run again.",
            ) from None
        self.restore(held)
        for client, chain in chains.items():
            before: Filed | None = None
            for name in chain:
                before = Filed(name, before)
            if before is not None:
                self._staged[client] = before
        self.applied = applied

"""Lasting - a guard's account on disk, written before what it pays for is done, and taken up again whatever happens.

Checkpoints hold an account, too, but only after a round: what was released in a round that never came into one would
be forgotten.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedllm.core.errors import RunError
from fedllm.core.guard import Guard
from fedllm.core.message import Json
from fedllm.engine import durable

FILE = "privacy.json"
"""In the folder of a run, or of a run at a site."""


def lasting(guard: Guard, file: Path) -> None:
    """Go on with what a guard wrote down last, and have it write from now on.

    Args:
        guard: the guard of a run.
        file: where its account lies; for its owner's eyes, as the key of the noise is in it.

    Raises:
        RunError: a file that cannot be read.
    """
    if file.is_file():
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise RunError(
                f"The file {file.name} cannot be read: {type(fault).__name__}.",
                "It is the account of what was spent of the privacy of this run's data.",
                action="Restore the file from a copy; what was spent cannot be guessed.",
            ) from fault
        guard.recall(facts)

    def keep(facts: Json) -> None:
        durable.write(file, json.dumps(facts).encode(), durable.OWN)

    guard.keep = keep

"""Meter - what a run cost, counted where it happens: bytes by phase, direction and part, tokens, steps, seconds.

Bytes are the lengths of encoded messages. What cannot be measured is None, never 0.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

import torch

from fedllm.core.message import Json


@dataclass
class Meter:
    """Counters of one run.

    Attributes:
        bytes: "phase/direction/part" -> bytes; phase is the name of the client function that was asked, direction is
            "down" or "up", part is a part of the message, "header", or "undecodable" for bytes that were no message.
        messages: "phase/direction" -> number.
        tokens: tokens trained on, padding not counted.
        steps: optimiser steps of all clients.
        seconds: wall seconds of the run, resumed parts added.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    def sent(self, phase: str, direction: str, sizes: dict[str, int]) -> None:
        """Count one message; `sizes` are its bytes by part."""
        for part, size in sizes.items():
            name = f"{phase}/{direction}/{part}"
            self.bytes[name] = self.bytes.get(name, 0) + size
        name = f"{phase}/{direction}"
        self.messages[name] = self.messages.get(name, 0) + 1

    def total(self, direction: str, phase: str | None = None) -> int:
        """Bytes in one direction, of one phase or of all."""
        return sum(
            size
            for name, size in self.bytes.items()
            if name.split("/")[1] == direction and phase in (None, name.split("/")[0])
        )

    def to_json(self) -> Json:
        """For a checkpoint."""
        return {
            "bytes": self.bytes,
            "messages": self.messages,
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, facts: Json) -> Meter:
        """Rebuild from :meth:`to_json`."""
        return cls(dict(facts["bytes"]), dict(facts["messages"]), facts["tokens"], facts["steps"], facts["seconds"])


def peak_memory() -> dict[str, int | None]:
    """Peak bytes of this process so far: resident, and on the accelerator where there is one."""
    scale = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"resident": resident, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}

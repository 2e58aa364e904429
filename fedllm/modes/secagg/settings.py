"""Secure settings - the section `secure` of a recipe; imports nothing heavy. What it does: the package around it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SecureSettings(BaseModel):
    """The server learns the sum of a round's uploads, and no single one (SecAgg and SecAgg+)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    graph: Literal["complete", "harary"] = "complete"
    """complete: every client shares with every other (SecAgg). harary: with a few neighbours (SecAgg+), where the
    cohort is large enough for it to pay; for servers that follow the protocol."""
    minimum: int = Field(3, ge=3)
    """Fewest clients in a sum: with fewer the round changes nothing."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the clients that may drop out during a round."""
    corruption: float = Field(0.1, ge=0, lt=1)
    """Share of the clients that may collude with the server."""
    clip: float = Field(1.0, gt=0)
    """Largest magnitude of a number in an upload. A client beyond it drops out: nothing is cut. With client-level
    privacy it is the clipping bound."""
    precision: int = Field(16, ge=2, le=31)
    """Bits of one number of one client; its step is clip / (2^(precision - 1) - 1)."""
    max_weight: float = Field(1.0, gt=0)
    """Largest weight of an upload, where uploads are weighed by their examples."""

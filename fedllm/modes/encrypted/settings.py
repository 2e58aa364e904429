"""Encrypted settings - the section `encrypted` of a recipe; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EncryptedSettings(BaseModel):
    """The server adds uploads that it cannot read (CKKS); with `ratio` below 1, FedML-HE."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    keys: Literal["shared", "threshold"] = "shared"
    """shared: one key for all clients, by TenSEAL. threshold: every round its clients make a key of which each holds a
    share, by OpenFHE; all of them are needed to open the sum."""
    ratio: float = Field(1.0, gt=0, le=1)
    """Share of the numbers that are encrypted: those that tell most of the data, the same for all clients. The others
    travel in the open."""
    noise: float = Field(0.0, ge=0)
    """Scale of the Laplace noise that clients add to what travels in the open."""
    noise_key: Literal["secret", "seed"] = "secret"
    """Where that noise comes from: secret numbers of each client's own, or the run's seed, which the server knows: for
    experiments that are to be repeated."""
    max_weight: float = Field(1.0, gt=0)
    """Largest weight of an upload, where uploads are weighed by their examples."""

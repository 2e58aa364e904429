"""Codec settings - the section `codec` of a recipe; imports nothing heavy. What it does: :mod:`fedllm.modes.codec`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError

LARGEST = 1e30
"""The largest magnitude that a lossy code takes: sums and products of such numbers stay finite in float32."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "block": ("int8", "int4"),
    "rounding": ("int8", "int4"),
    "clip": ("int8", "int4"),
    "density": ("topk",),
    "rank": ("lowrank",),
    "iterations": ("lowrank",),
}
"""Options that belong to some kinds only."""


class CodecSettings(BaseModel):
    """How uploads are made smaller. The default changes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    kind: Literal["fp32", "bf16", "int8", "int4", "topk", "sign", "lowrank"] = "fp32"
    """fp32 (as they are, bit for bit), bf16, int8 or int4 (integers in blocks), topk (the largest entries), sign (one
    bit an entry), or lowrank (matrices as products of thin ones)."""
    entropy: Literal["none", "zstd"] = "none"
    """A lossless last stage: zstd shrinks what is left; it needs the extra `codec`."""
    error_feedback: bool | None = None
    """Clients keep what was lost and add it to their next upload. Null: where the code is biased (topk, sign, lowrank,
    nearest rounding, clip). It needs clients that come back, and a part that is a change of something."""
    parts: tuple[str, ...] = Field(("update",), min_length=1)
    """Parts of an upload that are encoded; the others travel as they are."""
    block: int = Field(256, ge=1)
    """int8, int4: so many consecutive entries share a scale of 4 bytes."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """int8, int4: up or down by chance so that the mean is right, or to the nearest."""
    clip: float | None = Field(None, gt=1e-30, lt=LARGEST)
    """int8, int4: a bound shared by all, which makes one scale for everything, so that codes can be added up blindly.
    Entries beyond it are cut to it; their share is counted in the metric `codec_clipped`."""
    density: float = Field(0.01, gt=0, le=1)
    """topk: the share of entries that travels."""
    rank: int = Field(4, ge=1)
    """lowrank: columns of the thin matrices; a tensor that would not get smaller travels as it is."""
    iterations: int = Field(2, ge=1)
    """lowrank: passes towards the largest directions; each costs two products with the matrix."""
    decay: float = Field(1.0, gt=0, le=1)
    """Error feedback: what is kept is multiplied by it, for clients that come back rarely; 1 loses nothing."""
    level: int = Field(3, ge=1, le=19)
    """zstd: higher is smaller and slower."""

    @model_validator(mode="after")
    def _usable(self) -> CodecSettings:
        unused = {name: f"codec.kind={' or '.join(kinds)}" for name, kinds in OPTIONS.items() if self.kind not in kinds}
        unused |= {} if self.entropy == "zstd" else {"level": "codec.entropy=zstd"}
        unused |= {} if self.clip is None else {"block": "no codec.clip: a clip is one scale for all"}
        unused |= {} if self.feeds_back else {"decay": "codec.error_feedback=true"}
        for name, home in unused.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"codec.{name}={getattr(self, name)} has no meaning with codec.kind={self.kind}.",
                    f"It belongs to {home}.",
                    action=f"Remove codec.{name}.",
                )
        if self.error_feedback and self.lossless:
            raise ConfigError(
                "codec.error_feedback=true with codec.kind=fp32, which loses nothing.",
                "Lossy: bf16, int8, int4, topk, sign, lowrank.",
                action="Remove codec.error_feedback, or choose a lossy kind.",
            )
        if self.error_feedback is False and self.kind == "sign":
            raise ConfigError(
                "codec.kind=sign without error feedback: every entry would move by the same amount.",
                "Signs need codec.error_feedback=true.",
                "int4",
                "Remove codec.error_feedback=false, or set codec.kind=int4.",
            )
        return self

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self.lossless and self.entropy == "none"

    @property
    def lossless(self) -> bool:
        """Whether what is decoded has the same bits."""
        return self.kind == "fp32"

    @property
    def unbiased(self) -> bool:
        """Whether the decoded value of one upload is right on average over the rounding (clipping aside)."""
        return self.lossless or (self.kind in ("int8", "int4") and self.rounding == "stochastic")

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep a memory."""
        return (
            self.error_feedback is not False
            and not self.lossless
            and (self.error_feedback is True or not (self.kind == "bf16" or (self.unbiased and self.clip is None)))
        )

    @property
    def linear(self) -> bool:
        """Whether the sum of codes is the code of a sum, so that sums may be formed without decoding single uploads."""
        return self.entropy == "none" and (self.lossless or self.clip is not None)

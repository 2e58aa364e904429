"""Adapter settings - which small set of parameters is trained; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

AdapterKind = Literal["lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "head", "full"]


class AdapterSettings(BaseModel):
    """What is trained on top of (or inside) the frozen base model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: AdapterKind = "lora"
    """lora, ia3, prompt (soft prompt), prefix, bottleneck, bitfit (biases), head (classifier only) or full."""
    rank: int = Field(8, ge=1)
    """Rank of LoRA."""
    alpha: float = Field(16.0, gt=0)
    """LoRA's scale is alpha / rank; it is the same for every client, also where ranks differ."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before LoRA, drawn per client, round and step."""
    targets: str | list[str] = "auto"
    """Modules to adapt: auto, attention, all-linear, a regular expression, or a list of name endings."""
    tokens: int = Field(16, ge=1)
    """Virtual tokens of a soft prompt or prefix."""
    width: int = Field(16, ge=1)
    """Hidden width of a bottleneck adapter."""

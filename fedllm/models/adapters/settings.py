"""Adapter settings - which small set of parameters is trained; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

AdapterKind = Literal["lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "head", "full", "context"]


class AdapterSettings(BaseModel):
    """What is trained on top of (or inside) the frozen base model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: AdapterKind = "lora"
    """lora, ia3, prompt (soft prompt), prefix, bottleneck, bitfit (biases), head (classifier only), full, or context
    (soft words around the class names of a dual encoder)."""
    rank: int = Field(8, ge=1)
    """Rank of LoRA."""
    alpha: float = Field(16.0, gt=0)
    """LoRA's scale is alpha / rank; it is the same for every client, also where ranks differ."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before LoRA, drawn per client, round and step."""
    targets: str | list[str] = "auto"
    """Modules to adapt: auto, attention, all-linear, a regular expression, or a list of name endings."""
    tokens: int = Field(16, ge=1)
    """Virtual tokens of a soft prompt, prefix or context."""
    width: int = Field(16, ge=1)
    """Hidden width of a bottleneck adapter, and of a prompt's encoder."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """A soft prompt begins as embeddings drawn from the vocabulary, or as normal numbers of deviation 0.02."""
    encoder: Literal["none", "mlp"] = "none"
    """A small network that makes the soft prompt of its rows; it is trained, and travels, with them."""
    personal: int = Field(0, ge=0)
    """Rank of a second LoRA on every adapted layer, for what a client keeps to itself; 0 for none. With kind=full and
    targets=auto it lies on all linear layers. Its scale is alpha / personal."""
    bridge: int = Field(0, ge=0)
    """Rank of a LoRA beside the output layer, of the same shape whatever the model; 0 for none. Its scale is 1."""
    bridge_width: int = Field(128, ge=1)
    """Width at which the bridge reads hidden states; a model of another width maps its own to it."""
    position: Literal["end", "middle", "front"] = "end"
    """Where the class name stands in a context: behind it, in its middle, or in front of it."""
    per_class: bool = False
    """A context of its own for every class, in place of one for all."""
    words: str | None = None
    """A context begins as the embeddings of these words, and has their length in place of `tokens`; random if null."""

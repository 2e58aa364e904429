"""Task settings - what is learned from a row of data; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

TaskKind = Literal[
    "causal-lm", "seq2seq", "sequence-classification", "token-classification", "masked-lm", "dual-encoder"
]

COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (("instruction", "response"), ("messages",), ("text",)),
    "seq2seq": (("instruction", "response"),),
    "sequence-classification": (("text", "label"),),
    "token-classification": (("tokens", "tags"),),
    "masked-lm": (("text",),),
    "dual-encoder": (("image", "label"),),
}
"""The columns each task reads: one of these sets, after `data.columns` has renamed them."""


class TaskSettings(BaseModel):
    """What is learned."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: TaskKind = "causal-lm"
    """causal-lm (instruction tuning or plain text), seq2seq, sequence-classification, token-classification, masked-lm
    (pre-training of encoders on plain text) or dual-encoder (images told apart by the names of their classes)."""
    template: str = "auto"
    """How a row becomes a prompt: auto (the tokenizer's chat template, else plain), chat, plain, or a text with
    {columns} in braces. Of a dual encoder, the text of a class with {} for its name; auto is 'a photo of a {}.'."""
    system: str | None = None
    """A system message for chat templates."""
    max_length: int = Field(512, ge=8)
    """Longest input in tokens; longer ones are cut at the end, and a sample left without a response is not used."""
    pack: Literal[False, True, "stream"] = False
    """Put the texts of a client (causal-lm) together in blocks of max_length, so that little is padding. true: whole
    texts, each of which sees itself alone and is learned as without packing. stream: one text of all, cut into blocks,
    as language models are trained from nothing. What counts examples counts blocks."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens count in the loss of a causal language model."""
    generate: int = Field(0, ge=0)
    """New tokens to write for each held-out prompt, for `text_metrics`; 0 writes nothing (exact_match needs none). It
    needs `loss_on=response`, and `max_length + generate` has to fit into the model."""
    text_metrics: list[Literal["rouge_l", "token_f1", "last_number"]] = ["rouge_l", "token_f1"]
    """What is measured on written text; rouge_l needs the extra `rouge`, last_number a number in every answer."""
    labels: list[str] | None = None
    """Class or tag names in their order; found in the data where null."""
    second_text: str | None = None
    """Column of the second text of a pair, for classification."""

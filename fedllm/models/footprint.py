"""Footprint - how much memory a run needs, told before the weights are read.

A run that dies of memory after a long download costs more than a sum done first. The estimate needs the configuration
of the model only: the model is built without memory, its parameters are counted, and a simple formula gives the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import ModelError
from fedllm.models import structure
from fedllm.models.settings import ModelSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from fedllm.models.load import Place

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.52}
"""Bytes per weight. NF4 with twice quantised constants takes 4.127 bits (Dettmers et al. 2023, QLoRA, section 3)."""


@dataclass(frozen=True)
class Footprint:
    """The memory of one run in bytes, on the device of the model."""

    weights_bytes: int
    """The frozen base."""
    adapter_bytes: int
    """The adapters of all clients that run side by side, float32."""
    optimizer_bytes: int
    """Their gradients and the two moments of AdamW, float32."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass."""
    total_bytes: int
    available_bytes: int
    """Free memory of the device now."""


def estimate(
    settings: ModelSettings,
    kind: str,
    adapter_parameters: int,
    batch: int,
    length: int,
    width: int,
    labelled: int | None = None,
) -> Footprint:
    """The memory that training needs, from the configuration alone.

    Args:
        settings: the model part of a recipe.
        kind: what the model is loaded as.
        adapter_parameters: trained parameters of one client.
        batch: rows of one client in one step.
        length: tokens of a row; models that read images count their patches themselves.
        width: clients that run side by side.
        labelled: positions of a row at which a language model computes logits; all of them where not given.

    Raises:
        ModelError: the model is not there, or is not of this kind.
    """
    from fedllm.models import load

    place = load.locate(settings)
    with load.quiet():
        config = load.read_config(settings, place)
        load.check_kind(settings, place, config, kind)
        model = load.skeleton(settings, place, config, kind)
    weights = weight_bytes(model, settings)
    adapters = 4 * adapter_parameters * width
    activations = activation_bytes(model, settings, batch * width, length, length if labelled is None else labelled)
    return Footprint(
        weights_bytes=weights,
        adapter_bytes=adapters,
        optimizer_bytes=3 * adapters,
        activation_bytes=activations,
        total_bytes=weights + 4 * adapters + activations,
        available_bytes=available_bytes(load.pick_device(settings)),
    )


def check_fits(settings: ModelSettings, kind: str) -> None:
    """Refuse a model whose weights alone do not fit into the free memory of its device.

    Raises:
        ModelError: with both numbers and the nearest setting that would fit.
    """
    from fedllm.models import load

    place = load.locate(settings)
    with load.quiet():
        config = load.read_config(settings, place)
        load.check_kind(settings, place, config, kind)
        check_weights(settings, place, config, kind, load.pick_device(settings))


def check_weights(
    settings: ModelSettings, place: Place, config: PreTrainedConfig, kind: str, device: torch.device
) -> None:
    """As :func:`check_fits`, for a configuration that has been read and a device that has been picked."""
    from fedllm.models import load

    model = load.skeleton(settings, place, config, kind)
    free = available_bytes(device)
    needed = weight_bytes(model, settings)
    if needed <= free:
        return
    choices = {
        "dtype: bfloat16": settings.model_copy(update={"dtype": "bfloat16", "quantize": None}),
        "quantize: 4bit": settings.model_copy(update={"dtype": "bfloat16", "quantize": "4bit"}),
    }
    fitting = [text for text, choice in choices.items() if weight_bytes(model, choice) <= free]
    raise ModelError(
        f"The weights of '{settings.name}' take {size(needed)} as {settings.quantize or settings.dtype}, "
        f"but {device} has {size(free)} free.",
        nearest=fitting[0] if fitting else None,
        action="Choose a smaller model, or a device with more memory.",
    )


def weight_bytes(model: nn.Module, settings: ModelSettings) -> int:
    """The bytes of all parameters and buffers of `model` as `settings` hold them; the model may be on meta."""
    layers = set(structure.quantizable(model)) if settings.quantize else set()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # T5 and others, in half precision
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        layer, held = name.rpartition(".")[0], settings.dtype
        if settings.dtype == "float16" and kept & set(name.split(".")):
            held = "float32"
        elif layer in layers and name.endswith(".weight") and not kept & set(name.split(".")):
            held = settings.quantize or held
        total += math.ceil(parameter.numel() * BYTES[held])
    return total


def activation_bytes(model: nn.Module, settings: ModelSettings, rows: int, length: int, labelled: int) -> int:
    """The bytes that a forward pass over `rows` rows of `length` tokens keeps for the backward pass.

    Per token and block: 8 vectors of the hidden width (norms, query, key, value, attention output, residuals) and 3
    of the feed-forward width (gate, its activation, up); with eager attention also 2 scores for each head and each
    other token. With gradient checkpointing: one hidden vector per block, and all of one block. On top, logits of a
    language model at the labelled positions: 3 float32 numbers per word of the vocabulary (logits, their softmax,
    their gradient), less where they are computed a stretch at a time (:mod:`fedllm.tasks.head`). In the manner of
    Korthikanti et al. 2022, Reducing Activation Recomputation, section 4, for frozen weights and without dropout. The
    toys keep 0.5 to 0.9 of it in a forward pass, which leaves room for what
    the backward pass needs for a moment.
    """
    number = BYTES[settings.dtype]
    kept = 0.0
    for config, blocks, tokens in _towers(model, length):
        hidden = _first(config, "hidden_size", "d_model")
        inner = _first(config, "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "hidden_dim") or 4 * hidden
        heads = _first(config, "num_attention_heads", "n_head", "num_heads")
        scores = 2 * heads * tokens if settings.attention == "eager" else 0
        block = 8 * hidden + 3 * inner + scores
        per_token = blocks * hidden + block if settings.gradient_checkpointing else blocks * block
        kept += rows * tokens * per_token * number
    output = structure.output_head(model)
    vocabulary = structure.features(output)[1] if output is not None and structure.is_linear(output) else 0
    return int(kept) + 12 * rows * min(labelled, length) * vocabulary


def available_bytes(device: torch.device) -> int:
    """The free memory of `device` in bytes: of the GPU, or of the machine for cpu and mps."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def size(count: float) -> str:
    """A number of bytes as a person reads it: ``1.5 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _towers(model: Any, length: int) -> list[tuple[Any, int, int]]:
    """(configuration, blocks, tokens per row) of each stack: one, or the two of a dual encoder."""
    config = model.config
    halves = [half for name in ("text_config", "vision_config") if (half := getattr(config, name, None)) is not None]
    if not halves:
        return [(config, structure.layer_count(model), _tokens(config, length))]
    return [(half, _first(half, "num_hidden_layers"), _tokens(half, length)) for half in halves]


def _tokens(config: Any, length: int) -> int:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) else length


def _first(config: Any, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)

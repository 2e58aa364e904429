"""PEFT format - the names, shapes and options of PEFT's adapter folders, in both directions.

PEFT is what serving and fine-tuning programs read. Nothing of it is imported: the format is two tables, written down
here for the kinds that both have. Checked against peft 0.21; the tests hold the outputs of both to each other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import ModelError, nearest
from fedllm.core.settings import read
from fedllm.core.tensors import Tensors
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.structure import attention_heads, head, hidden_size, layer_count, role

PEFT_TYPES = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
"""The kinds that PEFT has, as it calls them."""
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
}
"""PEFT's names of what a model was loaded as."""
VIRTUAL = ("prompt", "prefix")
"""Kinds that put virtual tokens before the text instead of changing layers."""

_PREFIX = {True: "base_model.", False: "base_model.model."}  # of tensor names: with virtual tokens, and without

# Options that change nothing in what the stored tensors mean, or that are read below. Any other must be unused.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "feedforward_modules", "fan_in_fan_out", "r", "lora_alpha", "lora_dropout", "init_lora_weights",
    "init_ia3_weights", "eva_config", "qalora_group_size", "megatron_core", "ensure_weight_tying", "runtime_config",
    "num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules",
    "encoder_hidden_size", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "init_weights",
})  # fmt: skip
_UNUSED: tuple[Any, ...] = (None, False, "none", [], {})
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # ways to draw A and B that leave the base as it is


def has(adapted: Adapted) -> bool:
    """Whether PEFT can run this adapter; its prompts and prefixes act only in its classes for a task."""
    kind, plain = adapted.settings.kind, adapted.settings.encoder == "none"
    return kind in PEFT_TYPES and (kind not in VIRTUAL or (plain and adapted.loaded.kind in TASK_TYPES))


def to_peft(adapted: Adapted, params: Tensors) -> tuple[dict[str, Any], Tensors]:
    """PEFT's configuration and tensors. A trained head travels as `modules_to_save`, with all it consists of.

    Args:
        adapted: the model with an adapter for which :func:`has` is true.
        params: all its trainable tensors, without a client axis.
    """
    kind, owners = adapted.settings.kind, head(adapted.model) or []
    options, tensors = {"lora": _lora, "ia3": _ia3, "prompt": _prompt, "prefix": _prefix}[kind](adapted, params)
    config = {
        "peft_type": PEFT_TYPES[kind],
        "task_type": TASK_TYPES.get(adapted.loaded.kind),
        "base_model_name_or_path": adapted.loaded.name,
        "inference_mode": True,
        "modules_to_save": owners or None,
        **options,
    }
    for owner in owners:
        for key, value in adapted.model.get_submodule(owner).state_dict().items():
            name = f"{owner}.{key}"
            tensors[f"{_PREFIX[kind in VIRTUAL]}{name}"] = params.get(name, value)
    return config, tensors


def _lora(adapted: Adapted, params: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The scale is that of the settings whatever the rank of these tensors: lora_alpha is chosen to give it."""
    names = [name.removesuffix(".lora_A") for name in params if name.endswith(".lora_A")]
    rank = params[f"{names[0]}.lora_A"].shape[0]
    alpha = adapted.settings.alpha * rank / adapted.settings.rank
    options = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapted.settings.dropout,
        "target_modules": _endings(adapted.model, names),
        "fan_in_fan_out": transposed(adapted.model.get_submodule(names[0])),
        "bias": "none",
    }
    pairs = (f"{name}.{part}" for name in names for part in ("lora_A", "lora_B"))
    return options, {f"{_PREFIX[False]}{pair}.weight": params[pair] for pair in pairs}


def _ia3(adapted: Adapted, params: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A vector is a column where it scales an output, and a row where it scales an input."""
    names = [name.removesuffix(".ia3") for name in params if name.endswith(".ia3")]
    down = [name for name in names if role(name) == "down"]
    inputs, outputs = _endings(adapted.model, down), _endings(adapted.model, [n for n in names if n not in down])
    options = {
        "target_modules": [*outputs, *inputs],
        "feedforward_modules": inputs,
        "fan_in_fan_out": transposed(adapted.model.get_submodule(names[0])),
    }
    shapes = {name: (1, -1) if name in down else (-1, 1) for name in names}
    return options, {f"{_PREFIX[False]}{n}.ia3_l": params[f"{n}.ia3"].reshape(shapes[n]) for n in names}


def _prompt(adapted: Adapted, params: Tensors) -> tuple[dict[str, Any], Tensors]:
    heads, _, _ = attention_heads(adapted.model)
    options = {
        "num_virtual_tokens": params["prompt"].shape[0],
        "token_dim": hidden_size(adapted.model),
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layer_count(adapted.model),
        "prompt_tuning_init": "RANDOM",
    }
    return options, {"prompt_embeddings": params["prompt"]}


def _prefix(adapted: Adapted, params: Tensors) -> tuple[dict[str, Any], Tensors]:
    """PEFT keeps [tokens, (layer, key or value, kv head, width)] in one matrix."""
    kv_heads, tokens, size = params["prefix.0.key"].shape
    layers = layer_count(adapted.model)
    parts = [params[f"prefix.{layer}.{part}"] for layer in range(layers) for part in ("key", "value")]
    options = {
        "num_virtual_tokens": tokens,
        "token_dim": kv_heads * size,
        "num_transformer_submodules": 1,
        "num_attention_heads": kv_heads,
        "num_layers": layers,
        "encoder_hidden_size": kv_heads * size,
        "prefix_projection": False,
    }
    return options, {"prompt_embeddings": torch.stack(parts).permute(2, 0, 1, 3).reshape(tokens, -1)}


def transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (input, output): GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D"


def _endings(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest name endings that fit exactly the modules `names`, as PEFT and serving programs like them."""
    everything, wanted, endings = [name for name, _ in model.named_modules()], set(names), {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            ending = ".".join(parts[start:])
            if wanted.issuperset(n for n in everything if n == ending or n.endswith(f".{ending}")):
                endings[ending] = None
                break
    return list(endings)


def from_peft(config: dict[str, Any], stored: Tensors) -> tuple[AdapterSettings, Tensors]:
    """Our settings and tensors of a folder in PEFT's format; `targets` are PEFT's target modules.

    Args:
        config: what adapter_config.json says.
        stored: the tensors of adapter_model.safetensors.

    Raises:
        ModelError: a type, an option or a tensor that fedllm does not have.
    """
    kind = _kind(config)
    params, prefix = {}, _PREFIX[kind in VIRTUAL]
    heads = [str(name) for name in config.get("modules_to_save") or ()]
    for key, value in stored.items():
        name, inside = key.removeprefix(prefix), key.startswith(prefix)
        if key == "prompt_embeddings" and kind in VIRTUAL:
            params.update({"prompt": value} if kind == "prompt" else _split_prefix(config, value))
        elif inside and kind == "lora" and re.search(r"\.lora_[AB]\.weight$", key):
            params[name.removesuffix(".weight")] = value
        elif inside and kind == "ia3" and key.endswith(".ia3_l"):
            params[name.removesuffix("_l")] = _vector(name.removesuffix(".ia3_l"), value)
        elif inside and any(f".{owner}." in f".{name}" for owner in heads):
            params[name] = value
        else:
            raise ModelError(
                f"The adapter holds '{key}', which is not part of a plain {config['peft_type']} adapter.",
                action="Train or save it without extra embeddings, biases and magnitudes.",
            )
    return read(AdapterSettings, _values(kind, config, params), "adapter"), params


def _kind(config: dict[str, Any]) -> str:
    """Our kind of a configuration, after a check that it uses no option that we do not have."""
    kinds = {value: key for key, value in PEFT_TYPES.items()}
    what = str(config.get("peft_type"))
    if what not in kinds:
        raise ModelError(
            f"This adapter is of PEFT's type {what}.",
            f"Types that fedllm has: {', '.join(sorted(kinds))}.",
            nearest(what, kinds),
        )
    used = [name for name, value in config.items() if name not in _HARMLESS and value not in _UNUSED]
    if config.get("init_lora_weights", True) not in _STARTS:
        used.append("init_lora_weights")
    if config.get("num_transformer_submodules") not in (None, 1):
        used.append("num_transformer_submodules")
    if used:
        raise ModelError(
            f"This adapter uses PEFT's option {used[0]}={config[used[0]]!r}, which fedllm does not have.",
            "Plain LoRA, IA3, prompts and prefixes can be read.",
            action="Merge it into its base model with PEFT and use that as the base.",
        )
    return kinds[what]


def _values(kind: str, config: dict[str, Any], params: Tensors) -> dict[str, Any]:
    """The settings of a kind as a configuration states them, checked against the tensors."""
    if kind in VIRTUAL:
        lengths = {t.shape[-2] for n, t in params.items() if n.partition(".")[0] == kind}
        if lengths != {config.get("num_virtual_tokens")}:
            raise ModelError(f"The {kind} does not have num_virtual_tokens={config.get('num_virtual_tokens')}.")
        return {"kind": kind, "tokens": lengths.pop()}
    if kind == "ia3":
        return {"kind": kind, "targets": _targets(config, params)}
    rank = config.get("r", 8)
    wrong = [n for n, t in params.items() if n.endswith((".lora_A", ".lora_B")) and rank != t.shape[n[-1] == "B"]]
    if wrong:
        raise ModelError(f"'{wrong[0]}' has the shape {tuple(params[wrong[0]].shape)}.", f"r={rank} is configured.")
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    return {"kind": kind, "rank": rank, "alpha": alpha, "dropout": dropout, "targets": _targets(config, params)}


def _targets(config: dict[str, Any], params: Tensors) -> str | list[str]:
    """PEFT's target modules; the names of all adapted layers where it restricts them by other options too."""
    targets = config.get("target_modules")
    restricted = any(config.get(n) for n in ("exclude_modules", "layers_pattern")) or (
        config.get("layers_to_transform") is not None
    )
    if isinstance(targets, list) and targets and not restricted:
        return sorted(targets)
    found = (re.fullmatch(r"(.*)\.(lora_A|ia3)", name) for name in params)
    return [match[1] for match in found if match]


def _vector(name: str, value: torch.Tensor) -> torch.Tensor:
    """An IA3 vector; PEFT's shape tells whether it scales the layer's input, and here the layer's role does."""
    if (value.shape[0] == 1) != (role(name) == "down"):
        raise ModelError(
            f"The adapter scales the {'input' if value.shape[0] == 1 else 'output'} of '{name}'.",
            "Here inputs are scaled in front of down projections, and outputs everywhere else.",
            action="Set PEFT's feedforward_modules to the down projections.",
        )
    return value.reshape(-1)


def _split_prefix(config: dict[str, Any], value: torch.Tensor) -> Tensors:
    """One tensor [kv heads, tokens, width] for each layer's keys and values."""
    layers, heads = config.get("num_layers"), config.get("num_attention_heads")
    if not layers or not heads or value.shape[-1] % (2 * layers * heads):
        raise ModelError(
            f"The prefix has the shape {tuple(value.shape)}.",
            f"It should fit num_layers={layers} and num_attention_heads={heads}.",
        )
    parts = value.reshape(value.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    names = [f"prefix.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}

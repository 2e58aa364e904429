"""Model structure - where the parts of a transformer are, whatever its family calls them.

Adapters, prompts and split learning need the attention projections, the feed-forward output, the classification
head, the number of layers. Families name these differently; one table of name endings covers the usual ones, so that
nothing else in fedllm knows a family by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    from torch import nn

# Roles of linear layers by the ending of their name, matched at dots; the longest matching ending decides.
ENDINGS: dict[str, str] = {
    ending: role
    for role, endings in {
        "query": "q_proj query q_lin q query_proj q_attn",
        "key": "k_proj key k_lin k key_proj",
        "value": "v_proj value v_lin v value_proj",
        "fused": "c_attn query_key_value qkv_proj qkv Wqkv W_pack",
        "output": "o_proj out_proj out_lin o attn.c_proj crossattention.c_proj attention.output.dense "
        "crossattention.output.dense attention.dense self_attention.dense self_attn.dense attn.Wo",
        "up": "gate_proj up_proj gate_up_proj fc1 lin1 wi wi_0 wi_1 c_fc intermediate.dense dense_h_to_4h fc_in "
        "Wi w1 w3 ffn",
        "down": "down_proj fc2 lin2 wo mlp.c_proj output.dense dense_4h_to_h fc_out mlp.Wo w2 ffn_output",
    }.items()
    for ending in endings.split()
}

# The roles that "auto" takes for each adapter: every group must be present, by any one of its roles.
DEFAULTS: dict[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"query", "fused"}), frozenset({"value", "fused"})),
    "ia3": (frozenset({"key", "fused"}), frozenset({"value", "fused"}), frozenset({"down"})),
    "bottleneck": (frozenset({"down"}),),
}
WORDS = ("auto", "attention", "all-linear")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ATTENTION_ROLES = frozenset({"query", "key", "value", "fused", "output"})
_CLASSIFIER_CLASS = re.compile(r"For(Sequence|Token|Image)Classification|ForMultipleChoice|ForQuestionAnswering")
_CLASSIFIER_NAMES = frozenset({"classifier", "score", "head", "dist_head", "fc", "classification_head"})
_FRESH = "fedllm_fresh"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps the last dimension linearly: nn.Linear, GPT-2's Conv1D, a quantised linear layer."""
    if _is_conv1d(module):
        return True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def features(module: nn.Module) -> tuple[int, int]:
    """The (input, output) width of a linear layer; Conv1D keeps its weight as (input, output), nn.Linear the other way.

    Raises:
        ModelError: `module` is not linear.
    """
    if not is_linear(module):
        raise ModelError(f"A layer of class {type(module).__name__} is not linear.", "Allowed: linear layers.")
    if _is_conv1d(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def role(name: str) -> str | None:
    """What the linear layer called `name` does: query, key, value, fused (of these), output, up, down, or None."""
    parts = name.split(".")
    for start in range(len(parts)):
        if found := ENDINGS.get(".".join(parts[start:])):
            return found
    return None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the base by name, in model order; the output head and the classification head are left out.

    With a language-model head or a classifier on top, the base is what transformers calls the base model.
    """
    base, output = _base(model), output_head(model)
    outside = set(head(model) or ())
    found = {}
    for name, module in model.named_modules():
        if not is_linear(module) or module is output or _inside(name, outside):
            continue
        if base is None or _inside(name, {base}):
            found[name] = module
    return found


def quantizable(model: nn.Module) -> list[str]:
    """The names of the linear layers that may be held in 4 or 8 bits: those of the base, without poolers.

    A pooler may be new, and new weights are trained; so may a head, which :func:`linears` leaves out.
    """
    return [name for name in linears(model) if "pooler" not in name.split(".")]


def match(model: nn.Module, targets: str | Sequence[str] = "auto", adapter: str = "lora") -> list[str]:
    """The names of the linear layers that an adapter is put on, in model order.

    Args:
        model: any transformers model.
        targets: `auto` (the default of the adapter: lora - query and value; ia3 - key, value and the second
            feed-forward layer; bottleneck - the last layer of the feed-forward block; where a family fuses query, key
            and value into one layer, that layer), `attention`, `all-linear`, or one or more endings (`q_proj`,
            `attention.output.dense`) or regular expressions of the full name.
        adapter: lora, ia3 or bottleneck; only `auto` looks at it.

    Raises:
        ModelError: an ending or expression fits no linear layer, or the architecture is unknown to `auto`.
        ConfigError: `auto` has no default for this adapter.
    """
    found = linears(model)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ModelError("The list of target layers is empty.", _listing(found), action="Name one, or use 'auto'.")
    if wanted == ["auto"]:
        chosen = _auto(model, list(found), adapter)
    elif wanted == ["attention"]:
        chosen = [name for name in found if _is_attention(name)]
    elif wanted == ["all-linear"]:
        chosen = list(found)
    else:
        chosen = _explicit(list(found), wanted)
    if not chosen:
        raise _no_place(model, f"the target '{wanted[0]}'", found)
    return chosen


def head(model: nn.Module) -> list[str] | None:
    """The names of the modules of the classification head, or None where the model has none.

    It is everything with parameters that a classification class puts beside its base model (`classifier`, `score`,
    `pre_classifier` and `classifier`, ...), and the pooler where :func:`mark_fresh` says that it holds new weights.
    """
    if not _CLASSIFIER_CLASS.search(type(model).__name__):
        return None
    base = _base(model)
    names = []
    for name, child in model.named_children():
        if next(child.parameters(), None) is None or name == base:
            continue
        if base is not None or name in _CLASSIFIER_NAMES:
            names.append(name)
    new = {parameter.rpartition(".")[0] for parameter in fresh(model)}
    poolers = [name for name, _ in model.named_modules() if name in new and not _inside(name, names)]
    return poolers + names or None


def last_layer(model: nn.Module) -> str | None:
    """The name of the linear layer that makes a classifier's logits; None where there is none."""
    modules = dict(model.named_modules())
    found = [
        name
        for owner in head(model) or []
        for name, module in modules.items()
        if (name == owner or name.startswith(f"{owner}.")) and is_linear(module)
    ]
    return found[-1] if found else None


def output_head(model: nn.Module) -> nn.Module | None:
    """The linear layer that makes the logits of a language model, or None where the model has none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None


def last_feed_forward(model: nn.Module) -> str | None:
    """The name of the last block's feed-forward part, where nothing of the base comes behind it; None elsewhere."""
    names = list(linears(model))
    owner = names[-1].rpartition(".")[0] if names and role(names[-1]) == "down" else ""
    own = [name for name in names if owner and _inside(name, {owner})]
    alone = own == names[len(names) - len(own) :] and all(role(name) in ("up", "down") for name in own)
    return owner if own and alone else None


def mark_fresh(model: nn.Module, parameters: Iterable[str]) -> None:
    """Record on `model` which parameters were not in the loaded weights but made anew."""
    setattr(model, _FRESH, tuple(sorted(parameters)))


def fresh(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that were made anew when the model was loaded, sorted."""
    return getattr(model, _FRESH, ())


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that makes the first vectors: token embedding, patch embedding, or of a dual encoder the text's.

    Raises:
        ModelError: the model does not say where it is.
    """
    for owner in (model, getattr(model, "text_model", None)):
        try:
            if owner is not None and (found := owner.get_input_embeddings()) is not None:
                return found
        except (NotImplementedError, AttributeError):
            continue
    raise ModelError(f"The model class {type(model).__name__} does not say where its input embedding is.")


def hidden_size(model: nn.Module) -> int:
    """The width of the hidden states; of a dual encoder, of its text half."""
    return _setting(model, "hidden_size", "d_model", "n_embd", "dim")


def layer_count(model: nn.Module) -> int:
    """The number of transformer blocks: encoder and decoder together; of a dual encoder, of its text half."""
    if not is_encoder_decoder(model):
        return _setting(model, "num_hidden_layers", "n_layer", "num_layers")
    encoder = _setting(model, "encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
    return encoder + _setting(model, "decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")


def attention_heads(model: nn.Module) -> tuple[int, int, int]:
    """(query heads, key and value heads, width of one head); of a dual encoder, of its text half."""
    config = _text_config(model)
    heads = _setting(model, "num_attention_heads", "n_head", "num_heads")
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden_size(model) // heads
    return heads, _kv_heads(config) or heads, int(width)


def biases(model: nn.Module) -> list[str]:
    """The names of the bias parameters of the base, those of the norms included: what BitFit trains.

    Source: Ben Zaken et al. 2022, BitFit. Empty for families without biases (Llama, T5).
    """
    base, outside = _base(model), set(head(model) or ())
    names = [name for name, _ in model.named_parameters() if name.endswith(".bias") and not _inside(name, outside)]
    return [name for name in names if base is None or _inside(name, {base})]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads with an encoder and writes with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# --- private helpers ---------------------------------------------------------------------------------------------


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _inside(name: str, owners: Iterable[str]) -> bool:
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


def _base(model: nn.Module) -> str | None:
    """The name of the child that is the base model; None where the model itself is the base or has no such child."""
    name = getattr(model, "base_model_prefix", "")
    return name if name and name in dict(model.named_children()) else None


def _is_attention(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return role(name) in _ATTENTION_ROLES or bool(_ATTENTION.search(parent))


def _auto(model: nn.Module, names: list[str], adapter: str) -> list[str]:
    if adapter not in DEFAULTS:
        raise ConfigError.unknown("default target for the adapter", adapter, DEFAULTS)
    groups = DEFAULTS[adapter]
    roles = {name: role(name) for name in names}
    if all(group & set(roles.values()) for group in groups):
        wanted = frozenset().union(*groups)
        return [name for name in names if roles[name] in wanted]
    chosen = [name for name in names if _ATTENTION.search(name)] if adapter == "lora" else []
    if not chosen:
        raise _no_place(model, f"the adapter '{adapter}'", names)
    return chosen


def _explicit(names: list[str], wanted: list[str]) -> list[str]:
    chosen: set[str] = set()
    for target in wanted:
        found = {name for name in names if name == target or name.endswith("." + target)}
        if not found:
            found = {name for name in names if _expression(target).fullmatch(name)}
        if not found:
            endings = {name.rpartition(".")[2] for name in names}
            raise ModelError(
                f"No linear layer of this model is called '{target}'.",
                _listing(names),
                nearest(target, [*sorted(endings), *WORDS]),
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _expression(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target)
    except re.error as error:
        raise ModelError(
            f"The target '{target}' is not a valid regular expression: {error}.",
            "Allowed: endings of layer names, or regular expressions of the full name.",
        ) from error


def _listing(names: Iterable[str]) -> str:
    """The distinct layer names, numbers replaced by a star, the shared start left out."""
    short = dict.fromkeys(".".join(part for part in name.split(".")[-3:] if not part.isdigit()) for name in names)
    return f"Linear layers: {', '.join(short)}." if short else "It has no linear layers outside its head."


def _no_place(model: nn.Module, purpose: str, names: Iterable[str]) -> ModelError:
    return ModelError(
        f"The architecture {type(model).__name__} has no layer known to suit {purpose}.",
        _listing(names),
        action="Name the layers in `targets`.",
    )


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _setting(model: nn.Module, *names: str) -> int:
    config = _text_config(model)
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ModelError(
        f"The configuration of {type(model).__name__} does not state '{names[0]}'.",
        f"Looked for: {', '.join(names)}.",
    )


def _kv_heads(config: Any) -> int | None:
    """Key and value heads; multi-query models (Falcon, GPT-BigCode) state them by a flag."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None

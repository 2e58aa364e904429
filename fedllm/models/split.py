"""Split - cut a transformer into a front E, a body S and a back O, so that different holders can own them.

    ids --E: embeddings, layers 0..first-1--> hidden --S: layers first..last-1--> hidden --O: the rest, head--> logits

Each part is the model's own code over fewer layers: masks, positions and attention kernels are made as in the whole
model, and the three parts one after the other give its outputs to the last bit. The parts share the model's modules, so
cutting costs no memory and adapters attached to a layer stay on it. A weight tied between embedding and head has one
name, belongs to both ends, and is one tensor. Used for split learning, emulators (a body with layers left out) and
on-device inference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.tensors import Tensors, same_shapes
from fedllm.models.structure import layer_count


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its pieces, as names inside the base model.

    Attributes:
        layers: the list of layers.
        embedding: the module that makes the hidden states that go into the first layer.
        added: embeddings that the base model adds to them itself.
        first: other modules between embedding and first layer.
        final: modules behind the last layer.
    """

    layers: str
    embedding: str
    added: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    final: tuple[str, ...] = ()


_BERT = Layout("encoder.layer", "embeddings", final=("pooler",))
_LLAMA = Layout("layers", "embed_tokens", final=("norm",))
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": Layout("h", "wte", added=("wpe",), first=("drop",), final=("ln_f",)),
}
"""The families that can be split, by transformers' model type."""


class Part(nn.Module):
    """A piece of a model.

    Args:
        module: the model's code over this piece.
        whole: the names of the whole model's parameters, by identity.

    Attributes:
        names: the parameters of this piece under the names of the whole model, in model order; tied ones once.
    """

    def __init__(self, module: nn.Module, whole: Mapping[int, str]) -> None:
        super().__init__()
        self._held = [module]  # in a list: not a submodule, its parameters are those of the whole model
        self._local = {n: whole[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
        held = set(self._local.values())
        self.names = tuple(name for name in whole.values() if name in held)

    @property
    def module(self) -> nn.Module:
        """The model's code over this piece."""
        return self._held[0]

    def tensors(self) -> Tensors:
        """The values by name; the model's own parameters, not copies."""
        found = {self._local[n]: p for n, p in self.module.named_parameters(remove_duplicate=False)}
        return {name: found[name] for name in self.names}

    def run(self, params: Mapping[str, torch.Tensor] | None, **inputs: Any) -> Any:
        """Call the module with `params` in place of its own values (None: its own); others' names are ignored.

        Raises:
            ConfigError: `params` lack a parameter of this part.
        """
        if params is None:
            return self.module(**inputs)
        missing = next((name for name in self.names if name not in params), None)
        if missing is not None:
            raise ConfigError(f"The parameter '{missing}' of a model part is not given.", "A part needs all its own.")
        bound = {local: params[name] for local, name in self._local.items()}
        return torch.func.functional_call(self.module, bound, (), inputs, tie_weights=False)


class Front(Part):
    """E: embeddings and the layers before the body."""

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        params: Mapping[str, torch.Tensor] | None = None,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] of token ids [B, T] under the attention mask [B, T]; `segments` are BERT's."""
        more = {} if segments is None else {"token_type_ids": segments}
        out = self.run(params, input_ids=ids, attention_mask=mask.to(ids), use_cache=False, **more)
        return out.last_hidden_state


class Body(Part):
    """S: the layers in the middle."""

    def __init__(self, module: nn.Module, whole: Mapping[int, str], given: _Given) -> None:
        super().__init__(module, whole)
        self._given = given

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, params: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Hidden states [B, T, H] of hidden states [B, T, H] under the attention mask [B, T]."""
        mask = mask.to(hidden.device, torch.long)
        with self._given.standing_for(hidden):
            return self.run(params, input_ids=mask, attention_mask=mask, use_cache=False).last_hidden_state


class Back(Part):
    """O: the layers behind the body, the last norm and the head."""

    def __init__(self, module: nn.Module, whole: Mapping[int, str], given: _Given) -> None:
        super().__init__(module, whole)
        self._given = given

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        params: Mapping[str, torch.Tensor] | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits: [B, T, V] of a language model, [B, C] of a classifier.

        A decoder with a classifier on top reads the last position that is not padding: found in `ids` as the whole
        model does where they are given, otherwise in the mask.
        """
        mask = mask.to(hidden.device, torch.long)
        if ids is None:
            pad = getattr(self.module.config.get_text_config(), "pad_token_id", None)  # type: ignore[union-attr,operator]
            ids = mask + (pad or 0)
        with self._given.standing_for(hidden):
            return self.run(params, input_ids=ids, attention_mask=mask, use_cache=False).logits


@dataclass(frozen=True)
class Parts:
    """A model in three parts.

    Attributes:
        front: E, at the client.
        body: S, layers first..last-1.
        back: O, at the client.
        first: layers in the front.
        last: the layer behind the body's last one.
        layers: the name of the list of layers in the whole model.
    """

    front: Front
    body: Body
    back: Back
    first: int
    last: int
    layers: str

    @property
    def ends(self) -> tuple[str, ...]:
        """The names of the parameters of E and O; one that both use is named once."""
        return tuple(dict.fromkeys((*self.front.names, *self.back.names)))

    def in_body(self, name: str) -> bool:
        """Whether a tensor called `name` in the whole model, a parameter or an adapter's, belongs to the body."""
        if not name.startswith(f"{self.layers}."):
            return False
        number = name.removeprefix(f"{self.layers}.").split(".", 1)[0]
        return number.isdigit() and self.first <= int(number) < self.last

    def resident(self) -> dict[str, int]:
        """How many numbers each holder keeps: `client` = |E| + |O| (tied tensors once), `server` = |S|."""
        client = {**self.front.tensors(), **self.back.tensors()}
        return {"client": _numbers(client), "server": _numbers(self.body.tensors())}


def split(model: nn.Module, first: int = 0, last: int | None = None) -> Parts:
    """Cut a transformers model with a head.

    Args:
        model: BERT-like (masked language model or classifier) or a decoder (language model or classifier).
        first: so many layers stay in the front.
        last: the body ends before this layer; None for the last one.

    Raises:
        ConfigError: not 0 <= first <= last <= number of layers.
        ModelError: an unknown family, or layers that share weights with the ends.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    layout = LAYOUTS.get(kind)
    base = getattr(model, "base_model_prefix", "")
    if layout is None or base not in dict(model.named_children()):
        what = f"A model of the family '{kind}'" + ("" if layout is None else " without a head")
        raise ModelError(f"{what} cannot be split.", f"Allowed: {', '.join(LAYOUTS)}, each with a head.")
    last = cut(layer_count(model), first, last)
    whole = {id(parameter): name for name, parameter in model.named_parameters()}
    inner = dict(model.named_children())[base]
    count, given = layer_count(model), _Given()
    front = _piece(inner, layout, 0, first, None, final=False)
    body = _piece(inner, layout, first, last, given, final=False)
    outer = _copied(model)
    outer._modules[base] = _piece(inner, layout, last, count, given, final=True)
    ends = Front(front, whole), Back(outer, whole, given)
    parts = Parts(ends[0], Body(body, whole, given), ends[1], first, last, f"{base}.{layout.layers}")
    shared = sorted(set(parts.body.names) & set(parts.ends))
    if shared:
        raise ModelError(f"The body shares '{shared[0]}' with an end.", "A weight of the body must be its own.")
    return parts


def cut(layers: int, first: int, last: int | None) -> int:
    """`last` where a body of layers first..last-1 can be cut out of `layers`; raises :class:`ConfigError` if not."""
    end = layers if last is None else last
    if not 0 <= first <= end <= layers:
        raise ConfigError(
            f"A body of the layers from {first} up to {end} cannot be cut out of {layers} layers.",
            f"Allowed: 0 <= first <= last <= {layers}.",
            str(min(max(first, 0), layers)) if not 0 <= first <= layers else None,
            "Change how many layers stay at the client.",
        )
    return end


def assemble(model: nn.Module, *trees: Mapping[str, torch.Tensor]) -> None:
    """Write the parts' values back into the whole model; tied weights stay one tensor.

    Raises:
        UploadRejected: together the trees do not name every parameter once in its shape.
        ConfigError: two trees name the same parameter.
    """
    values: Tensors = {}
    for tree in trees:
        twice = values.keys() & tree.keys()
        if twice:
            raise ConfigError(f"Two model parts name the parameter '{min(twice)}'.", "Each belongs to one holder.")
        values.update(tree)
    held = dict(model.named_parameters())
    same_shapes(values, {name: parameter.detach() for name, parameter in held.items()}, "The assembled model")
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(values[name])


# --- private helpers -------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Stands where the embedding was and gives back what it was told to."""

    hidden: torch.Tensor | None = None

    def standing_for(self, hidden: torch.Tensor) -> _Given:
        self.hidden = hidden
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.hidden = None

    def forward(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return self.hidden


class _Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, *_: Any) -> torch.Tensor:
        return torch.zeros(())


def _copied(module: Any) -> Any:
    """The same module object over again, whose children can be exchanged without touching the original's."""
    twin: Any = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _piece(inner: nn.Module, layout: Layout, begin: int, end: int, given: _Given | None, *, final: bool) -> Any:
    """The base model over layers begin..end-1; with its embedding where `given` is None, with its last norm or not."""
    twin = _copied(inner)
    owner, names = twin, layout.layers.split(".")
    for name in names[:-1]:
        owner._modules[name] = _copied(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[names[-1]] = nn.ModuleList(list(owner._modules[names[-1]])[begin:end])
    twin.config = _config(inner.config, begin, end)
    if given is not None:
        twin._modules[layout.embedding] = given
        twin._modules.update({name: _Nothing() for name in layout.added})
        twin._modules.update({name: nn.Identity() for name in layout.first})
    if not final:
        for name in layout.final:  # a pooler is left out, a norm lets pass
            twin._modules[name] = None if name == "pooler" else nn.Identity()
    return twin


def _config(config: Any, begin: int, end: int) -> Any:
    """The configuration with the layers' kinds (full or sliding attention) of layers begin..end-1."""
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return config
    twin = copy.copy(config)
    twin.layer_types = list(kinds)[begin:end]
    return twin


def _numbers(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())

"""Attach - put an adapter of a chosen kind on a loaded model and run the model with stacked parameters.

`Adapted` is what a learner holds: the names and first values of the trainable tensors, a context that binds stacked
tensors, and the model call itself (soft prompts and prefixes act at the call, everything else inside the layers).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import ModelError
from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.core.work import Places
from fedllm.models.adapters import grouped
from fedllm.models.adapters.context import Context
from fedllm.models.adapters.encoder import encoded, first_encoder
from fedllm.models.adapters.grouped import Binding
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.structure import (
    attention_heads,
    biases,
    features,
    head,
    hidden_size,
    input_embedding,
    is_encoder_decoder,
    is_linear,
    layer_count,
    match,
    output_head,
    role,
)

KINDS = ("lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "full", "context")
PERSONAL = ("lora", "full", "head")
"""Kinds that take a second LoRA."""


class Adapted:
    """A loaded model with an adapter.

    Args:
        loaded: the base model; it is never changed.
        settings: the adapter.
        seed: first values are derived from it and each tensor's name, alike at every client.
        classes: names of the classes, where a context is made for each.

    Attributes:
        width_limit: 1 where parameters are swapped inside the model (full), else None.
        offset: positions a soft prompt puts before the inputs; the model's outputs are longer by them.
        context: the soft words around class names, for adapter.kind=context.
    """

    def __init__(self, loaded: Loaded, settings: AdapterSettings, seed: int, classes: Sequence[str] = ()) -> None:
        self.loaded, self.model, self.settings, self.seed = loaded, loaded.model, settings, seed
        self.binding = Binding()
        self.classes = classes
        self.context: Context | None = None
        self.width_limit: int | None = None
        self.offset = 0
        self._initial: Tensors = {}
        self._swapped: list[tuple[str, nn.Module, str]] = []
        self._somewhere = next(self.model.parameters())  # finding one takes a while, and everybody asks where it is
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self._attached: list[Any] = []
        modules = dict(self.model.named_modules())
        self._checkpointed = [m for m in modules.values() if getattr(m, "gradient_checkpointing", False)]
        attach = {"head": lambda _: None, **{k: getattr(self, f"_attach_{k}") for k in KINDS}}
        attach[settings.kind](modules)
        if settings.kind != "full":
            self._attach_head(modules)
        if settings.personal:
            self._attach_personal(modules)
        if settings.bridge:
            self._attach_bridge(modules)
        if not self._initial:
            raise ModelError(
                f"The adapter '{settings.kind}' finds nothing to train in {loaded.name}.",
                action="Choose adapter.kind=lora.",
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._somewhere.device

    def initial(self) -> Tensors:
        """First values of the trainable tensors: float32 on the CPU."""
        return {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in self._initial.items()}

    def weights(self) -> Tensors | None:
        """The model's own float32 weights, to be moved in place and put back; None where others are trained."""
        own = dict(self.model.named_parameters())
        lent = all(p.dtype == torch.float32 and p.is_contiguous() for p in own.values())
        if self.settings.kind != "full" or own.keys() != self._initial.keys() or not lent:
            return None
        return {name: parameter.detach() for name, parameter in own.items()}

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed a second time for the backward pass."""
        return bool(self._checkpointed)

    def remove(self) -> None:
        """Take the adapter off the model."""
        for handle in self._attached:
            handle.remove()
        self._attached = []

    @contextmanager
    def using(
        self, params: Tensors | None, seeds: Sequence[int] | None = None, places: Places = None
    ) -> Iterator[None]:
        """Run the model with `params` (stacked, [K, ...]); None is the base model. Backward must happen inside."""
        before = self.binding.params, self.binding.seeds, self.binding.places, self.binding.width
        width = 1 if params is None else next(iter(params.values())).shape[0]
        if self.width_limit is not None and width > self.width_limit:
            raise ModelError(f"{width} clients cannot share a pass.", f"'{self.settings.kind}' allows one.")
        self.binding.params, self.binding.seeds, self.binding.places, self.binding.width = params, seeds, places, width
        originals = [module._parameters[leaf] for _, module, leaf in self._swapped]
        modes = [module.training for module in self._checkpointed]  # layers checkpoint in training mode only
        try:
            for module in self._checkpointed:
                module.training = torch.is_grad_enabled() and params is not None
            if params is not None:
                for (name, module, leaf), original in zip(self._swapped, originals, strict=True):
                    module._parameters[leaf] = params[name][0].to(original.dtype)  # type: ignore[union-attr]
            yield
        finally:
            for (_, module, leaf), original in zip(self._swapped, originals, strict=True):
                module._parameters[leaf] = original
            for module, mode in zip(self._checkpointed, modes, strict=True):
                module.training = mode
            self.binding.params, self.binding.seeds, self.binding.places, self.binding.width = before

    @contextmanager
    def at(self, rows: torch.Tensor, count: int) -> Iterator[None]:
        """While the output layer is given chosen positions only: the row of each, [M] ascending, of `count` rows."""
        before = self.binding.rows
        self.binding.rows = rows, count
        try:
            yield
        finally:
            self.binding.rows = before

    def call(self, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        """The model's output for `inputs`, with the bound prompt or prefix."""
        bound = self.binding.params
        if bound is not None and "prompt" in bound:
            inputs = self._prompted(inputs, encoded(bound))
        if bound is not None and "prefix.0.key" in bound:
            inputs = self._prefixed(inputs, bound)
        return self.model(**inputs, **options)

    def cache(self, value: Any) -> dict[str, Any]:
        """The key-value cache as an argument: its name changed with transformers 5.2x."""
        return {"cache" if self.accepts("cache") else "past_key_values": value}

    def accepts(self, name: str) -> bool:
        """Whether the model's forward takes an argument called `name`."""
        return name in self._accepts

    # -- kinds --------------------------------------------------------------------------------------------------------

    def _attach_lora(self, modules: dict[str, nn.Module]) -> None:
        settings, scale = self.settings, self.settings.alpha / self.settings.rank
        for name in match(self.model, settings.targets, "lora"):
            inside, outside = features(modules[name])
            bound = 1.0 / math.sqrt(inside)
            self._first(f"{name}.lora_A", (settings.rank, inside), bound)
            self._first(f"{name}.lora_B", (outside, settings.rank), 0.0)
            for hook in (
                grouped.lora_hook(self.binding, name, scale, settings.dropout),
                grouped.sparse_hook(self.binding, name, scale),
            ):
                self._attached.append(modules[name].register_forward_hook(hook))

    def _attach_ia3(self, modules: dict[str, nn.Module]) -> None:
        for name in match(self.model, self.settings.targets, "ia3"):
            inside, outside = features(modules[name])
            if role(name) == "down":
                self._initial[f"{name}.ia3"] = torch.ones(inside)
                hook = grouped.scale_input_hook(self.binding, name)
                self._attached.append(modules[name].register_forward_pre_hook(hook))
            else:
                self._initial[f"{name}.ia3"] = torch.ones(outside)
                hook = grouped.scale_hook(self.binding, name)
                self._attached.append(modules[name].register_forward_hook(hook))

    def _attach_bottleneck(self, modules: dict[str, nn.Module]) -> None:
        width = self.settings.width
        for name in match(self.model, self.settings.targets, "bottleneck"):
            _, outside = features(modules[name])
            self._first(f"{name}.down.weight", (width, outside), 1.0 / math.sqrt(outside))
            self._first(f"{name}.down.bias", (width,), 0.0)
            self._first(f"{name}.up.weight", (outside, width), 0.0)
            self._first(f"{name}.up.bias", (outside,), 0.0)
            hook = grouped.bottleneck_hook(self.binding, name)
            self._attached.append(modules[name].register_forward_hook(hook))

    def _attach_bitfit(self, modules: dict[str, nn.Module]) -> None:
        names = biases(self.model)
        if not names:
            raise ModelError(
                f"{self.loaded.name} has no biases, so adapter.kind=bitfit would train nothing.",
                "Kinds for it: lora, ia3, prompt, prefix, bottleneck, full.",
                "ia3",
            )
        for full in names:
            name = full.removesuffix(".bias")
            self._initial[full] = modules[name].bias.detach().float().cpu().clone()  # type: ignore[union-attr]
            hook = grouped.bias_hook(self.binding, name)
            self._attached.append(modules[name].register_forward_hook(hook))

    def _attach_prompt(self, modules: dict[str, nn.Module]) -> None:
        last_token = self.loaded.kind == "sequence-classification" and "score" in (head(self.model) or [])
        if is_encoder_decoder(self.model) or not self.accepts("inputs_embeds") or last_token:
            raise self._unfit("a soft prompt", "causal language models and BERT-like encoders")
        size = hidden_size(self.model)
        stream = torch_stream(self.seed, "init", "prompt")
        table = input_embedding(self.model).weight.detach().float().cpu()
        if self.settings.init == "random":
            self._initial["prompt"] = torch.randn(self.settings.tokens, size, generator=stream) * 0.02
        else:
            rows = torch.randint(0, table.shape[0], (self.settings.tokens,), generator=stream)
            self._initial["prompt"] = table[rows][:, :size].clone()
        if self.settings.encoder == "mlp":
            self._initial.update(first_encoder(size, self.settings.width, self.seed))
        self.offset = self.settings.tokens

    def _attach_prefix(self, modules: dict[str, nn.Module]) -> None:
        if (
            not (self.accepts("cache") or self.accepts("past_key_values"))
            or is_encoder_decoder(self.model)
            or self.loaded.kind != "causal-lm"
        ):
            raise self._unfit("a prefix", "decoder-only causal language models")
        if any(getattr(module, "gradient_checkpointing", False) for module in modules.values()):
            raise ModelError(
                "A prefix needs the key-value cache, which gradient checkpointing switches off.",
                action="Set model.gradient_checkpointing=false, or use adapter.kind=prompt.",
            )
        _, kv_heads, size = attention_heads(self.model)
        for layer in range(layer_count(self.model)):
            for part in ("key", "value"):
                name = f"prefix.{layer}.{part}"
                stream = torch_stream(self.seed, "init", name)
                self._initial[name] = torch.randn(kv_heads, self.settings.tokens, size, generator=stream) * 0.1

    def _attach_context(self, modules: dict[str, nn.Module]) -> None:
        self.context = Context(self.loaded, self.settings, self.classes, self.seed)
        self._initial[self.context.name] = self.context.initial
        self._attached.append(self.context.attach(self.binding))

    def _attach_full(self, modules: dict[str, nn.Module]) -> None:
        self.width_limit = 1
        for full, parameter in self.model.named_parameters():
            if not parameter.is_floating_point():
                raise self._unfit("training of all weights", "models that are not quantised")
            self._initial[full] = parameter.detach()  # not a copy: there may be no room for one
        names = {id(parameter): full for full, parameter in self.model.named_parameters()}
        for module in modules.values():  # a tied weight has one name and lies in several modules: swap it in each
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._swapped.append((names[id(parameter)], module, leaf))

    def _attach_head(self, modules: dict[str, nn.Module]) -> None:
        """A classification head is new and random: its linear layers are trained whole, whatever the adapter."""
        for name in self._head_layers(modules):
            self._attach_linear(name, modules[name])

    def _head_layers(self, modules: dict[str, nn.Module]) -> list[str]:
        """The linear layers of the classification head; the last one makes the logits."""
        return [
            name
            for owner in head(self.model) or []
            for name, module in modules.items()
            if (name == owner or name.startswith(f"{owner}.")) and is_linear(module)
        ]

    def _attach_linear(self, name: str, module: Any) -> None:
        self._initial[f"{name}.weight"] = module.weight.detach().float().cpu().clone()
        bias = getattr(module, "bias", None)
        if bias is not None:
            self._initial[f"{name}.bias"] = bias.detach().float().cpu().clone()
        hook = grouped.linear_hook(self.binding, name, bias is not None)
        self._attached.append(module.register_forward_hook(hook))

    def _attach_personal(self, modules: dict[str, nn.Module]) -> None:
        """A second LoRA on the layers of the first, or on all linear ones, and on the head's."""
        settings = self.settings
        if settings.kind not in PERSONAL:
            raise ModelError(
                f"adapter.personal={settings.personal} has no meaning for adapter.kind={settings.kind}.",
                f"Kinds with a second LoRA: {', '.join(PERSONAL)}.",
                "lora",
                "Set adapter.kind=lora.",
            )
        targets = "all-linear" if settings.kind == "full" and settings.targets == "auto" else settings.targets
        names = [] if settings.kind == "head" else match(self.model, targets, "lora")
        for name in [*names, *self._head_layers(modules)]:
            inside, outside = features(modules[name])
            self._first(f"{name}.personal.lora_A", (settings.personal, inside), 1.0 / math.sqrt(inside))
            self._first(f"{name}.personal.lora_B", (outside, settings.personal), 0.0)
            scale = settings.alpha / settings.personal
            hook = grouped.lora_hook(self.binding, f"{name}.personal", scale, settings.dropout)
            self._attached.append(modules[name].register_forward_hook(hook))

    def _attach_bridge(self, modules: dict[str, nn.Module]) -> None:
        """A LoRA beside the layer that makes the logits; its names and shapes do not depend on the model."""
        rank, width = self.settings.bridge, self.settings.bridge_width
        layers = self._head_layers(modules)
        layer = modules[layers[-1]] if layers else output_head(self.model)
        if layer is None or not is_linear(layer):
            raise self._unfit("a bridge", "models whose logits come out of a linear layer")
        inside, outside = features(layer)
        self._first("bridge.lora_A", (rank, width), 1.0 / math.sqrt(width))
        self._first("bridge.lora_B", (outside, rank), 0.0)
        if inside != width:
            self._first("bridge.project", (width, inside), math.sqrt(3.0 / inside))
        hook = grouped.bridge_hook(self.binding, positions=not layers)
        self._attached.append(layer.register_forward_hook(hook))

    # -- call-level kinds ---------------------------------------------------------------------------------------------

    def _prompted(self, inputs: dict[str, torch.Tensor], prompt: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embedded = input_embedding(self.model)(ids)
        rows = ids.shape[0] // prompt.shape[0]
        before = prompt.repeat_interleave(rows, 0).to(embedded.dtype)
        ones = mask.new_ones(ids.shape[0], prompt.shape[1])
        others = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "position_ids")}
        if "token_type_ids" in others:  # virtual tokens belong to the first text of a pair
            others["token_type_ids"] = torch.cat([torch.zeros_like(ones), others["token_type_ids"]], 1)
        return {
            **others,
            "inputs_embeds": torch.cat([before, embedded], 1),
            "attention_mask": torch.cat([ones, mask], 1),
            **_positions(inputs, prompt.shape[1]),
        }

    def _prefixed(self, inputs: dict[str, torch.Tensor], bound: Tensors) -> dict[str, Any]:
        from transformers import DynamicCache

        cache, rows = DynamicCache(), inputs["input_ids"].shape[0] // bound["prefix.0.key"].shape[0]
        dtype = next(self.model.parameters()).dtype
        for layer in range(layer_count(self.model)):
            key, value = (
                bound[f"prefix.{layer}.{part}"].repeat_interleave(rows, 0).to(dtype) for part in ("key", "value")
            )
            cache.update(key, value, layer)
        mask, length = inputs["attention_mask"], bound["prefix.0.key"].shape[2]
        ones = mask.new_ones(mask.shape[0], length)
        positions = _positions(inputs, length)
        if "position_ids" in inputs:
            positions["position_ids"] = positions["position_ids"][:, length:]
        return {**inputs, **self.cache(cache), "attention_mask": torch.cat([ones, mask], 1), **positions}

    # -- first values -------------------------------------------------------------------------------------------------

    def _first(self, name: str, shape: tuple[int, ...], bound: float) -> None:
        stream = torch_stream(self.seed, "init", name)
        self._initial[name] = (torch.rand(shape, generator=stream) * 2 - 1) * bound if bound else torch.zeros(shape)

    def _unfit(self, what: str, allowed: str) -> ModelError:
        return ModelError(
            f"{self.loaded.name} ({self.loaded.family}) cannot take {what}.",
            f"It works on {allowed}.",
            "lora",
            "Set adapter.kind=lora.",
        )


def _positions(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Explicit position ids moved behind `length` virtual tokens."""
    if "position_ids" not in inputs:
        return {}
    positions = inputs["position_ids"]
    first = torch.arange(length, device=positions.device).expand(positions.shape[0], -1)
    return {"position_ids": torch.cat([first, positions + length], 1)}

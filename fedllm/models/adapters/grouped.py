"""Grouped adapters - one forward pass of an untouched base model in which every client has its own adapter.

Rows of a batch lie client after client; adapters are stacked on a leading client axis K. They act through forward
hooks: the base model keeps its modules, names, dtypes and quantisation, and is itself again when nothing is bound.
Shapes: x is [N, ..., in] with N = K * rows; a LoRA pair is A [K, r, in], B [K, out, r] (Hu et al., 2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import ModelError
from fedllm.core.seeds import derive
from fedllm.core.tensors import Tensors
from fedllm.core.work import Places

Hook = Callable[..., Any]


@dataclass
class Binding:
    """What is bound at the moment: stacked tensors, dropout seeds (None: no dropout), places of rows in their batch."""

    params: Tensors | None = None
    seeds: Sequence[int] | None = None
    places: Places = None
    width: int = field(default=1)
    rows: tuple[torch.Tensor, int] | None = None
    """For each input of the output layer its row of the batch, and how many rows that has; None: all positions."""

    def get(self, name: str) -> torch.Tensor | None:
        """The stacked tensor, or None where nothing is bound."""
        return None if self.params is None else self.params[name]

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ..., d] -> [K, N/K * ..., d]."""
        if x.shape[0] % self.width:
            raise ModelError(
                f"A layer got {x.shape[0]} rows for {self.width} clients.",
                "Rows must lie client after client in equal numbers.",
                action="This model re-orders rows inside (mixture of experts?): set cohort_width=1.",
            )
        return x.reshape(self.width, -1, x.shape[-1])


def lora_hook(binding: Binding, name: str, scale: float, dropout: float) -> Hook:
    """output + scale * B A dropout(x), per client."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        a = binding.get(f"{name}.lora_A")
        if a is None:
            return output
        b = binding.params[f"{name}.lora_B"]  # type: ignore[index]
        x = binding.grouped(args[0]).to(a.dtype)
        if dropout and binding.seeds is not None:
            x = x * _keep(args[0], name, dropout, binding.seeds, binding.places).view(x.shape).to(x.dtype)
        low = torch.bmm(x, a.transpose(1, 2))
        flat = output.reshape(binding.width, -1, output.shape[-1])
        if flat.dtype == low.dtype:
            return torch.baddbmm(flat, low, b.transpose(1, 2), alpha=scale).view(output.shape)
        return output + (torch.bmm(low, b.transpose(1, 2)) * scale).view(output.shape).to(output.dtype)

    return hook


def sparse_hook(binding: Binding, name: str, scale: float) -> Hook:
    """output + scale * S x, per client; S [out, in] holds the values NAME.sparse [K, nnz] at the flat places
    NAME.sparse_at [K, nnz] and zeros elsewhere. Nothing where no values are bound: they have no first values.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        values = (binding.params or {}).get(f"{name}.sparse")
        if values is None:
            return output
        at = (binding.params or {})[f"{name}.sparse_at"]
        x = binding.grouped(args[0]).to(values.dtype)
        change = _SparseProduct.apply(x, values, at, output.shape[-1])
        return output + (change * scale).view(output.shape).to(output.dtype)

    return hook


class _SparseProduct(torch.autograd.Function):
    """x S^T. The dense S is made anew for the backward pass, so that no layer keeps one per client."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, at: torch.Tensor, outside: int) -> torch.Tensor:
        ctx.save_for_backward(x, values, at)
        ctx.outside = outside
        return torch.bmm(x, _scattered(values, at, outside, x.shape[-1]).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, values, at = ctx.saved_tensors
        by_x = (
            torch.bmm(grads[0], _scattered(values, at, ctx.outside, x.shape[-1])) if ctx.needs_input_grad[0] else None
        )
        whole = torch.bmm(grads[0].transpose(1, 2), x).flatten(1) if ctx.needs_input_grad[1] else None
        return by_x, None if whole is None else whole.gather(1, at), None, None


def _scattered(values: torch.Tensor, at: torch.Tensor, outside: int, inside: int) -> torch.Tensor:
    """[K, nnz] at flat places -> [K, out, in]."""
    empty = values.new_zeros(values.shape[0], outside * inside)
    return empty.scatter(1, at, values).view(values.shape[0], outside, inside)


def _keep(x: torch.Tensor, name: str, dropout: float, seeds: Sequence[int], places: Places = None) -> torch.Tensor:
    """A dropout mask of the shape of x, scaled by 1 / (1 - p).

    Every row has its own stream, a function of its client's seed, the layer's name and its place in the client's
    batch: neither other clients nor padding behind the row's end change what is drawn.
    """
    rows, stream = x.shape[0] // len(seeds), torch.Generator("cpu")
    masks = []
    for client, seed in enumerate(seeds):
        first, own = derive(seed, name), range(rows) if places is None else places[client]
        for row in range(rows):
            place = own[row] if row < len(own) else row  # rows that only fill a client up do not count
            stream.manual_seed((first + place) % 2**63)
            masks.append(torch.rand(x.shape[1:], generator=stream) >= dropout)
    return torch.stack(masks).to(x.device, torch.float32) / (1.0 - dropout)


def scale_hook(binding: Binding, name: str) -> Hook:
    """IA3 on an output: output * l, per client (Liu et al., 2205.05638)."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        factor = binding.get(f"{name}.ia3")
        if factor is None:
            return output
        return (binding.grouped(output) * factor.unsqueeze(1).to(output.dtype)).view(output.shape)

    return hook


def scale_input_hook(binding: Binding, name: str) -> Hook:
    """IA3 on an input: l * x, per client; a forward pre-hook."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        factor = binding.get(f"{name}.ia3")
        if factor is None:
            return args
        x = args[0]
        return ((binding.grouped(x) * factor.unsqueeze(1).to(x.dtype)).view(x.shape), *args[1:])

    return hook


def bottleneck_hook(binding: Binding, name: str) -> Hook:
    """output + up(gelu(down(output))), per client (Houlsby et al., 1902.00751)."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        down = binding.get(f"{name}.down.weight")
        if down is None:
            return output
        params = binding.params or {}
        x = binding.grouped(output).to(down.dtype)
        middle = torch.baddbmm(params[f"{name}.down.bias"].unsqueeze(1), x, down.transpose(1, 2))
        up = params[f"{name}.up.weight"].transpose(1, 2)
        change = torch.baddbmm(params[f"{name}.up.bias"].unsqueeze(1), nn.functional.gelu(middle), up)
        return output + change.view(output.shape).to(output.dtype)

    return hook


def bias_hook(binding: Binding, name: str) -> Hook:
    """output - bias + the client's bias (BitFit; Ben Zaken et al., 2106.10199)."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        bias = binding.get(f"{name}.bias")
        if bias is None:
            return output
        change = (bias - module.bias).unsqueeze(1)  # type: ignore[operator]
        return (binding.grouped(output) + change.to(output.dtype)).view(output.shape)

    return hook


def linear_hook(binding: Binding, name: str, with_bias: bool) -> Hook:
    """A whole linear layer per client (classification heads): the base layer's output is replaced."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        weight = binding.get(f"{name}.weight")
        if weight is None:
            return output
        x = binding.grouped(args[0]).to(weight.dtype)
        result = torch.bmm(x, weight.transpose(1, 2))
        if with_bias:
            result = result + (binding.params or {})[f"{name}.bias"].unsqueeze(1)
        return result.view(output.shape).to(output.dtype)

    return hook


def bridge_hook(binding: Binding, positions: bool) -> Hook:
    """output + B A P x beside the output layer, per client; without P where it is not bound (Yi et al., 2310.13283).

    Args:
        binding: what is bound.
        positions: whether the layer may be given chosen positions ([M, in]); `binding.rows` then says whose they are.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        a = binding.get("bridge.lora_A")
        if a is None:
            return output
        params = binding.params or {}
        maps = [params["bridge.project"]] if "bridge.project" in params else []
        parts = _by_client(binding, args[0].to(a.dtype), positions)
        for own in (*maps, a, params["bridge.lora_B"]):
            parts = [part @ matrix.T for part, matrix in zip(parts, own, strict=True)]
        return output + torch.cat(parts).view(output.shape).to(output.dtype)

    return hook


def _by_client(binding: Binding, x: torch.Tensor, positions: bool) -> list[torch.Tensor]:
    """Each client's inputs of the output layer, as a matrix."""
    if binding.rows is not None:
        owners = torch.div(binding.rows[0] * binding.width, binding.rows[1], rounding_mode="floor")
        return list(x.split(torch.bincount(owners, minlength=binding.width).tolist()))
    if positions and x.dim() == 2 and binding.width > 1:
        raise ModelError(f"The output layer got {x.shape[0]} positions of {binding.width} clients, and not whose.")
    return list(binding.grouped(x))

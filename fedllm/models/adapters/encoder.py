"""Encoder - a soft prompt written as a small network of its own rows: easier to train, and more to send.

    P = E + tanh(E down^T + a) up^T + b

A reparameterisation with a skip connection (Razdaibiedina et al., 2305.03937; without it Li and Liang, 2101.00190).
The network is part of what is trained, so it travels with E. `up` begins at zero: the first prompt is E itself.
"""

from __future__ import annotations

import math

import torch

from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors

DOWN, UP = "prompt.encoder.down", "prompt.encoder.up"
"""Names of the two layers, before `.weight` and `.bias`."""


def first_encoder(size: int, width: int, seed: int) -> Tensors:
    """First values: down [width, size] uniform within 1/sqrt(size), up [size, width] and both biases zero."""
    stream = torch_stream(seed, "init", DOWN)
    down = (torch.rand((width, size), generator=stream) * 2 - 1) / math.sqrt(size)
    zero = {f"{DOWN}.bias": (width,), f"{UP}.weight": (size, width), f"{UP}.bias": (size,)}
    return {f"{DOWN}.weight": down, **{name: torch.zeros(shape) for name, shape in zero.items()}}


def encoded(bound: Tensors) -> torch.Tensor:
    """The prompt that the model gets, [K, tokens, size], of stacked tensors; `prompt` itself without an encoder."""
    rows = bound["prompt"]
    if f"{DOWN}.weight" not in bound:
        return rows
    inner = torch.baddbmm(bound[f"{DOWN}.bias"].unsqueeze(1), rows, bound[f"{DOWN}.weight"].transpose(1, 2))
    outer = torch.baddbmm(bound[f"{UP}.bias"].unsqueeze(1), torch.tanh(inner), bound[f"{UP}.weight"].transpose(1, 2))
    return rows + outer

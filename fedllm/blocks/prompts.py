"""Prompts - which layer a deep prompt (a prefix of virtual keys and values) belongs to, and how it is cut by layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from fedllm.core.errors import ConfigError
from fedllm.core.tensors import Tensors

_PREFIX = re.compile(r"prefix\.(\d+)\.(key|value)")


def layer_of(name: str) -> int | None:
    """The layer of a prefix tensor `prefix.LAYER.key` or `.value`; None for any other tensor."""
    found = _PREFIX.fullmatch(name)
    return int(found[1]) if found else None


def depth(names: Iterable[str]) -> int:
    """How many layers have a prefix.

    Raises:
        ConfigError: none has.
    """
    layers = {layer for name in names if (layer := layer_of(name)) is not None}
    if not layers:
        raise ConfigError(
            "There is no prefix among the trainable tensors.", "Deep prompts are needed.", "prefix",
            "Set adapter.kind=prefix.",
        )  # fmt: skip
    return max(layers) + 1


def of_layers(tensors: Tensors, layers: Collection[int]) -> Tensors:
    """The prefixes of `layers`; tensors that belong to no layer (a head) are always among them."""
    return {n: t for n, t in tensors.items() if (layer := layer_of(n)) is None or layer in layers}

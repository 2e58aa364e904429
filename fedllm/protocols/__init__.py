"""Protocols - algorithms that are not round-shaped; importing this package finds every protocol in it."""

from __future__ import annotations

import importlib
import pkgutil

from fedllm.core.protocol import Protocol
from fedllm.core.registry import registered


def protocols() -> dict[str, type[Protocol]]:
    """Every protocol by key."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return registered("protocol")

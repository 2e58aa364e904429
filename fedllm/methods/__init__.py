"""Methods - the folder tree is the survey's map; importing this package finds every method in it.

Other packages add methods through the entry-point group `fedllm.methods` (module names to import).
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from fedllm.core.errors import ConfigError
from fedllm.core.method import Method
from fedllm.core.registry import registered


def methods() -> dict[str, type[Method]]:
    """Every method by key."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group="fedllm.methods"):
        entry.load()
    return registered("method")


def find(key: str) -> type[Method]:
    """The method called `key`."""
    found = methods()
    if key not in found:
        raise ConfigError.unknown("method", key, found, "Run 'fedllm methods' to see them all.")
    return found[key]

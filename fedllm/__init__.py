"""fedllm - federated fine-tuning, prompt learning, evaluation and inference of language models."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOMES = {
    "run": "fedllm.run",
    "resume": "fedllm.run",
    "compare": "fedllm.compare",
    "verify": "fedllm.effects",
    "Recipe": "fedllm.recipe",
    "Federation": "fedllm.data.federation",
    "Method": "fedllm.core.method",
    "Protocol": "fedllm.core.protocol",
    "Card": "fedllm.core.card",
    "Received": "fedllm.core.message",
    "Upload": "fedllm.core.message",
    "State": "fedllm.core.state",
    "on_client": "fedllm.core.method",
    "FedLLMError": "fedllm.core.errors",
}
"""The public names and where they live; they are loaded when first used, so that importing fedllm costs nothing."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedllm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`fedllm.run` is the function, also after its module of the same name was imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

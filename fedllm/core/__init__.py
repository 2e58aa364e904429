"""Core - the types every method is written in. It knows no method and no transformer.

A name is imported when it is first used, so that the command line can import `fedllm.core.errors` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.core.card import Card
    from fedllm.core.message import (
        Dense,
        Message,
        Owned,
        Part,
        Received,
        Scalars,
        SeedCoefficients,
        Table,
        Texts,
        Upload,
    )
    from fedllm.core.method import Method, on_client
    from fedllm.core.protocol import Protocol
    from fedllm.core.reducer import Collect, Mean, OwnedMean, Reducer, Update
    from fedllm.core.roster import Group, Member
    from fedllm.core.server import Server
    from fedllm.core.state import CollectMore, State
    from fedllm.core.tensors import Tensors
    from fedllm.core.train import Schedule, Train
    from fedllm.core.view import View
    from fedllm.core.work import Client

__all__ = [
    "Card",
    "Client",
    "Collect",
    "CollectMore",
    "Dense",
    "Group",
    "Mean",
    "Member",
    "Message",
    "Method",
    "Owned",
    "OwnedMean",
    "Part",
    "Protocol",
    "Received",
    "Reducer",
    "Scalars",
    "Schedule",
    "SeedCoefficients",
    "Server",
    "State",
    "Table",
    "Tensors",
    "Texts",
    "Train",
    "Update",
    "Upload",
    "View",
    "on_client",
]

_MODULES = {
    "Card": "card",
    "Client": "work",
    "Collect": "reducer",
    "CollectMore": "state",
    "Dense": "message",
    "Group": "roster",
    "Mean": "reducer",
    "Member": "roster",
    "Message": "message",
    "Method": "method",
    "Owned": "message",
    "OwnedMean": "reducer",
    "Part": "message",
    "Protocol": "protocol",
    "Received": "message",
    "Reducer": "reducer",
    "Scalars": "message",
    "Schedule": "train",
    "SeedCoefficients": "message",
    "Server": "server",
    "State": "state",
    "Table": "message",
    "Tensors": "tensors",
    "Texts": "message",
    "Train": "train",
    "Update": "reducer",
    "Upload": "message",
    "View": "view",
    "on_client": "method",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedllm.core' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fedllm.core.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

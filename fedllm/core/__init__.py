"""Core - the types every method is written in. It knows no method and no transformer."""

from fedllm.core.card import Card
from fedllm.core.message import Dense, Message, Owned, Part, Received, Scalars, SeedCoefficients, Table, Texts, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.protocol import Protocol
from fedllm.core.reducer import Collect, Mean, OwnedMean, Reducer, Update
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
    "Mean",
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

"""Protocol - an algorithm that is not round-shaped: a program over `server.ask`.

Split learning, gossip, voting, search, pipelines and attacks are protocols. Client-side functions are marked with
:func:`~fedllm.core.method.on_client`, exactly as in a method, and run behind the same engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from fedllm.core.card import Card
from fedllm.core.message import Json, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.registry import register
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client

if TYPE_CHECKING:
    from fedllm.core.server import Server


class Protocol(BaseModel):
    """A program over `ask`. Its fields are its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: ClassVar[str] = ""
    card: ClassVar[Card]
    private: ClassVar[tuple[str, ...]] = ()
    """Names a client may keep in its private store."""
    adapters: ClassVar[tuple[str, ...]] = ()
    """Adapter kinds it needs; empty where any will do."""
    mixes: ClassVar[tuple[Literal["ranks", "models"], ...]] = ()
    """In what the groups of a run may differ."""
    public: ClassVar[bool] = False
    """Whether it needs public rows."""
    needs: ClassVar[dict[str, Any]] = {}
    """Options that a user has to give by hand, each with a value that runs; the commands in the docs give them."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not abstract:
            cls.key = register("protocol", cls)

    def adapter(self) -> dict[str, Any]:
        """What it needs of the recipe's section `adapter` beyond what the recipe says."""
        return {}

    def trainable(self, name: str) -> bool:
        """Whether the trainable tensor `name` moves; the others stay at their first value everywhere."""
        return True

    def init(self, start: Tensors) -> State:
        """The first state; `start` is the learner's first values."""
        return State(start)

    def distribute(self, state: State, client: Member) -> Received:
        """What this client receives to measure the state."""
        return Received(state.params)

    def weights(self, state: State, start: Tensors) -> Tensors:
        """The trained tensors that `state` stands for, to be saved; {} where there are none."""
        return state.params

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """What is measured at a client: counts that add up. Nothing here may change anything."""
        report = await client.score(received.params)
        return Upload(None, weight=client.size, metrics=report.metrics)

    async def play(self, server: Server, state: State) -> tuple[State, Json]:
        """Run from `state` to the end; returns the last state and a JSON report.

        `server.ask(self.some_function, payloads)` runs a client-side function; `server.checkpoint(state)` makes the
        state durable, and a resumed run plays on from the last one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define play.")

    @classmethod
    def client_functions(cls) -> dict[str, Callable[..., Any]]:
        """The functions a server may ask clients to run, by name."""
        names = [n for n in dir(cls) if not n.startswith(("_", "model_"))]
        return {n: f for n in names if callable(f := getattr(cls, n, None)) and getattr(f, "__on_client__", False)}

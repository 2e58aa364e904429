"""Protocol - an algorithm that is not round-shaped: a program over `server.ask`.

Split learning, gossip, voting, search, pipelines and attacks are protocols. Client-side functions are marked with
:func:`~fedllm.core.method.on_client`, exactly as in a method, and run behind the same engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from fedllm.core.card import Card
from fedllm.core.message import Json
from fedllm.core.registry import register
from fedllm.core.state import State

if TYPE_CHECKING:
    from fedllm.core.server import Server


class Protocol(BaseModel):
    """A program over `ask`. Its fields are its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: ClassVar[str] = ""
    card: ClassVar[Card]
    private: ClassVar[tuple[str, ...]] = ()
    """Names a client may keep in its private store."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not abstract:
            cls.key = register("protocol", cls)

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

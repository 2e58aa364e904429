"""State - what the server keeps between rounds: named tensors and numbers; it travels to disk by the wire's code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedllm.core.message import Dense, Json, Message
from fedllm.core.tensors import Tensors


@dataclass(frozen=True)
class State:
    """The server's state.

    Attributes:
        params: the trainable tensors that clients start from.
        memory: further trees the method keeps (momentum, control variates), by name.
        numbers: JSON values the method keeps.
        round: rounds committed so far.
    """

    params: Tensors
    memory: dict[str, Tensors] = field(default_factory=dict)
    numbers: dict[str, Json] = field(default_factory=dict)
    round: int = 0

    def with_(self, params: Tensors | None = None, **memory: Tensors) -> State:
        """A copy with other `params` and with the named memory trees replaced."""
        return replace(self, params=self.params if params is None else params, memory={**self.memory, **memory})

    def to_message(self) -> Message:
        """As a message, for a checkpoint."""
        parts = {"params": Dense(self.params), **{f"memory.{n}": Dense(t) for n, t in self.memory.items()}}
        return Message(dict(parts), {"numbers": self.numbers, "round": self.round})

    @classmethod
    def from_message(cls, message: Message) -> State:
        """Rebuild from :meth:`to_message`."""
        memory = {n.removeprefix("memory."): message[n] for n in message.parts if n.startswith("memory.")}
        return cls(message["params"], memory, message.numbers["numbers"], message.numbers["round"])


@dataclass(frozen=True)
class CollectMore:
    """`finalize` is not ready to commit: more uploads are collected, then it is asked again with all of them.

    Attributes:
        clients: how many more clients (None: as many again).
        again: ask the same clients once more instead of others; their `turn` rises, and what a
            :class:`~fedllm.core.reducer.Collect` reducer holds of turn t > 0 is named `CLIENT@t`.
        numbers: shown to `distribute` in `state.numbers` for this collection only.
    """

    clients: int | None = None
    again: bool = False
    numbers: dict[str, Json] = field(default_factory=dict)

"""Method - a round-shaped algorithm: client half and server half in one class whose slots default to FedAvg.

    state --distribute--> received --work (at the client)--> upload --reducer--> update --finalize--> state

A method overrides only what its paper changes. Its fields are its hyper-parameters: typed, validated, documented by
the string below each. Defaults here are federated averaging (McMahan et al., AISTATS 2017, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy
from pydantic import BaseModel, ConfigDict, model_validator

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.reducer import Mean, Reducer, Reducers, Update, Weighting
from fedllm.core.registry import register
from fedllm.core.roster import Member
from fedllm.core.state import CollectMore, State
from fedllm.core.tensors import Tensors, add
from fedllm.core.train import Train
from fedllm.core.work import Client

if TYPE_CHECKING:
    from fedllm.core.server import Server

Function = TypeVar("Function", bound=Callable[..., Any])


def on_client(function: Function) -> Function:
    """Mark an async function `f(self, client, received) -> Upload` as one that a server may ask clients to run."""
    function.__on_client__ = True  # type: ignore[attr-defined]
    return function


class Method(BaseModel):
    """The slots of a round. `key` and `card` belong to the class; everything else is a hyper-parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: ClassVar[str] = ""
    card: ClassVar[Card]
    private: ClassVar[tuple[str, ...]] = ()
    """Names a client may keep in its private store; nothing under them is ever uploaded."""
    adapters: ClassVar[tuple[str, ...]] = ()
    """Adapter kinds it needs; empty where any will do."""
    mixes: ClassVar[tuple[Literal["ranks", "models"], ...]] = ()
    """In what the groups of a run may differ: the ranks of their LoRA, their models."""
    public: ClassVar[bool] = False
    """Whether it needs public rows (the recipe's `data.public`)."""
    asks: ClassVar[tuple[str, ...]] = ()
    """Client-side functions that its server half asks for in a run, beside `work` and measurements."""
    only_fits: ClassVar[bool] = True
    """Whether clients do nothing with their training rows but train on them in `work`; else single rows cannot be kept
    private."""

    feeds: ClassVar[bool] = True
    """Whether uploads are changes of the same entries every round: what a code loses of one may come with the next."""
    absolute: ClassVar[bool] = False
    """Whether uploads are values of their own, such as factors, and no changes of what was sent: clipping the sum of
    them, or dividing it by more clients than came, makes another model of them."""
    mirrors: ClassVar[bool] = False
    """Whether clients keep what they sent: a sum that is clipped, noised or chosen from no longer matches it."""

    train: Train = Train()  # pyright: ignore[reportCallIssue]
    """Local training (the recipe's section `train`)."""
    weighting: Weighting = "examples"
    """Weigh uploads by their examples or all alike."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not abstract:
            cls.key = register("method", cls)

    def idle(self) -> dict[str, str]:
        """Options that the other options leave without effect, and why: to give one is a mistake."""
        return {}

    @model_validator(mode="after")
    def _nothing_idle(self) -> Method:
        for name in self.idle().keys() & self.model_fields_set:
            raise ConfigError(
                f"method.{name}={getattr(self, name)} is given and would have no effect.",
                f"{self.idle()[name]}.",
                action=f"Leave out method.{name}.",
            )
        return self

    def trainable(self, name: str) -> bool:
        """Whether the trainable tensor `name` moves and travels; the others stay at their first value everywhere."""
        return True

    def adapter(self) -> dict[str, Any]:
        """What it needs of the recipe's section `adapter` beyond what the recipe says: options and their values."""
        return {}

    def init(self, start: Tensors) -> State:
        """The first state; `start` is the learner's first values of the tensors that are trainable."""
        return State(start)

    async def prepare(self, server: Server, state: State) -> State:
        """Once, before the first round: whatever has to be asked of clients first; repeated where round 1 is."""
        return state

    def cohort(self, round: int, clients: Sequence[str], size: int, rng: numpy.random.Generator) -> list[str]:
        """Which clients are asked this round: `size` of them, uniformly, without replacement."""
        if size >= len(clients):
            return list(clients)
        return sorted(str(clients[i]) for i in rng.choice(len(clients), size=size, replace=False))

    def distribute(self, state: State, client: Member) -> Received:
        """What this client receives."""
        return Received(state.params)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """What the client computes and gives back."""
        report = await client.fit(received.params, self.train)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)

    @property
    def reducer(self) -> Reducers:
        """How uploads become one update: one reducer for the part `update`, or a mapping by part."""
        return Mean(self.weighting)

    def expected(self, state: State) -> dict[str, Tensors]:
        """Names and shapes of each part of an upload (see :class:`~fedllm.core.reducer.Reduction`); {}: not checked."""
        return {"update": state.params}

    def finalize(self, state: State, update: Update) -> State | CollectMore:
        """How the state changes."""
        return state.with_(add(state.params, update.params))

    async def refine(self, server: Server, state: State) -> State:
        """After a round is committed: training at the server, on public data (ask the pseudo-client `server`)."""
        return state

    def weights(self, state: State, start: Tensors) -> Tensors:
        """The trained tensors that `state` stands for, to be saved; {} where the clients share no model.

        `start` holds the learner's first values, for methods whose state tells only how to move from there.
        """
        return state.params

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """What is measured at a client: counts that add up. Nothing here may change a weight or a random stream."""
        report = await client.score(received.params)
        return Upload(None, weight=client.size, metrics=report.metrics)

    @on_client
    async def evaluate_base(self, client: Client, received: Received) -> Upload:
        """The same measurement of the base model, without any trained tensor."""
        report = await client.score(None)
        return Upload(None, weight=client.size, metrics=report.metrics)

    @classmethod
    def client_functions(cls) -> dict[str, Callable[..., Any]]:
        """The functions a server may ask clients to run, by name."""
        names = [n for n in dir(cls) if not n.startswith(("_", "model_"))]
        return {n: f for n in names if callable(f := getattr(cls, n, None)) and getattr(f, "__on_client__", False)}

    def linear(self) -> bool:
        """Whether every part is reduced by a linear reducer."""
        reducers = self.reducer
        return all(r.linear for r in ([reducers] if isinstance(reducers, Reducer) else reducers.values()))

"""Asking - how a protocol asks a black box: the recipe's options, and the run's own model as the one that answers.

A protocol names one of its client-side functions that continues prompts (:func:`continued`); the server asks it of the
pseudo-client `server`, so that the model runs where the server is. An endpoint takes its place where one is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fedllm.blocks.blackbox import BlackBox, Budget, Completion, Query, Source
from fedllm.blocks.endpoint import Endpoint, EndpointSettings
from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.message import Json, Message, Received, Texts, Upload
from fedllm.core.roster import SERVER

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.core.work import Client


class Asking(BaseModel):
    """Who answers, and what it may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint: EndpointSettings | None = None
    """An OpenAI-compatible endpoint; the run's own model where null."""
    budget: Budget = Budget()  # pyright: ignore[reportCallIssue]
    """What may be spent."""
    cache: str | None = None
    """A file that keeps answers between runs; in memory, for one step of the protocol, where null."""
    parallel: int = Field(4, ge=1)
    """Most calls under way at once."""
    logprobs: bool = False
    """Ask the endpoint for log-probabilities, where a protocol has a use for them."""

    def box(self, own: Source, spent: Json = None) -> BlackBox:
        """A black box by these options.

        Args:
            own: answers where no endpoint is given.
            spent: what was spent before; see :meth:`~fedllm.blocks.blackbox.Ledger.to_json`.
        """
        source = own if self.endpoint is None else Endpoint(self.endpoint)
        return BlackBox(source, self.budget, Path(self.cache) if self.cache else None, None, self.parallel, spent)


class RunModel:
    """The run's own model, asked at the server, as a :class:`~fedllm.blocks.blackbox.Source`.

    Args:
        server: the server.
        function: the protocol's client-side function that returns :func:`continued`.
    """

    name = "the run's own model"
    batch: int | None = None

    def __init__(self, server: Server, function: Callable[..., Any]) -> None:
        self.server, self.function = server, function

    async def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        """See :class:`~fedllm.blocks.blackbox.Source`. Queries of one length and temperature are one pass."""
        if any(query.continuation is not None for query in queries):
            raise ConfigError("The run's own model is asked to score a text.", "Here it only continues prompts.")
        found: dict[int, str] = {}
        for length, heat in dict.fromkeys((q.max_tokens, q.temperature) for q in queries):
            places = [i for i, q in enumerate(queries) if (q.max_tokens, q.temperature) == (length, heat)]
            prompts = [queries[i] for i in places]
            texts = tuple(q.prompt if q.system is None else f"{q.system}\n\n{q.prompt}" for q in prompts)
            payload = Received(numbers={"max_tokens": length, "temperature": heat}, texts=Texts(texts))
            written = [a.upload async for a in self.server.ask(self.function, {SERVER: payload})]
            if not written:
                said = [x["reason"] for x in self.server.lost if x["client"] == SERVER]
                raise ModelError("The run's own model did not answer.", said[-1] if said else "")
            for place, text in zip(places, texts_of(written[0]), strict=True):
                ends = [at for at in (text.find(stop) for stop in queries[place].stop) if at >= 0]
                found[place] = text[: min(ends, default=len(text))]
        return [Completion(found[place]) for place in range(len(queries))]


async def continued(client: Client, received: Received) -> Upload:
    """At the server: the base model's continuations of the prompts received."""
    length, heat = received.numbers["max_tokens"], received.numbers["temperature"]
    return Upload(None, texts=Texts(tuple(await client.generate(None, texts_of(received), length, heat))))


def texts_of(message: Message) -> tuple[str, ...]:
    """The part `texts` of a message; empty where it has none."""
    part = message.parts.get("texts")
    return part.texts if isinstance(part, Texts) else ()

"""Rounds - one round of a method, and the evaluation of a state; the whole of federated learning on one page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.message import Json, Received
from fedllm.core.method import Method
from fedllm.core.protocol import Protocol
from fedllm.core.seeds import numpy_stream
from fedllm.core.server import Server
from fedllm.core.state import CollectMore, State
from fedllm.core.tensors import finite

COLLECT_LIMIT = 8
"""How often a method may ask for more clients before a round counts as failed."""


@dataclass
class RoundRecord:
    """What happened in a round; written to metrics.jsonl."""

    round: int
    cohort: list[str]
    loss: float | None = None
    used: int = 0
    failed: str | None = None
    lost: list[dict[str, str]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0
    seconds: float = 0.0
    guard: Json = None

    def to_json(self) -> Json:
        """For metrics.jsonl."""
        return {"event": "round", **self.__dict__}


async def play_round(
    method: Method, state: State, server: Server, cohort_size: int, deadline: float | None = None, spare: int = 0
) -> tuple[State, RoundRecord]:
    """state --distribute--> received --work--> upload --reducer--> update --finalize--> state.

    A round without a usable upload changes nothing and says so in its record. With `spare`, so many clients more are
    asked, in an order drawn anew, and the first `cohort_size` usable uploads count.
    """
    number, begun, meter = state.round + 1, time.perf_counter(), server.meter
    server.begin(number)
    before = (meter.total("up"), meter.total("down"), meter.tokens)
    record = RoundRecord(number, [])
    if number == 1:
        state = await method.prepare(server, state)
        server.settle()
    server.expected = method.expected(state)
    reduction = server.guard.begin(method, server.expected, number)
    more, new, cohort = CollectMore(cohort_size), None, []
    for turn in range(COLLECT_LIMIT):
        if not more.again:
            rest = [client for client in server.clients if client not in set(record.cohort)]
            if not rest:  # asked again in the same round, a client would give the very same upload
                record.failed = "the method asked for more clients than there are"
                break
            wanted = more.clients or cohort_size
            stream = numpy_stream(server.seed, "cohort", number, turn)
            cohort = server.guard.cohort(method, number, rest, wanted + spare, stream)
            server.enough = wanted if spare else None
            if spare:
                cohort = [cohort[i] for i in stream.permutation(len(cohort))]
            record.cohort += cohort
        server.turn = server.turn + 1 if more.again else 0
        shown = replace(state, numbers={**state.numbers, **more.numbers})
        payloads = _payloads(method, shown, server, cohort)
        record.failed = await server.guard.collect(server, method, payloads, reduction, deadline)
        if record.failed is not None:
            break
        try:
            update = reduction.result(len(server.clients))
        except (ConfigError, UploadRejected) as fault:  # a rule that so few uploads do not suffice for
            record.failed = str(fault)
            break
        if update.clients == 0:
            record.failed = "no usable upload arrived"
            break
        if weightless := [n for n in reduction.running if n not in update.parts and n not in update.collected]:
            record.failed = f"the weights of the uploads' '{weightless[0]}' sum to zero"
            break
        finalized = method.finalize(state, update)
        if isinstance(finalized, State):
            new = finalized
            break
        more = finalized
    else:
        record.failed = f"the method asked for more clients {COLLECT_LIMIT} times"
    trees = [] if new is None else [new.params, *new.memory.values()]
    bad = next((name for name in map(finite, trees) if name is not None), None)
    if bad is not None:
        record.failed, new = f"the new state is not finite in '{bad}'", None
    record.used, record.lost, record.rejected = reduction.clients, list(server.lost), list(server.rejected)
    if "loss" in reduction.metrics and reduction.metrics["loss"][1] > 0:
        record.loss = reduction.metrics["loss"][0] / reduction.metrics["loss"][1]
    server.settle(commit=new is not None)
    if new is not None:
        new = await method.refine(server, replace(new, round=number))
        server.settle()
    record.bytes_up, record.bytes_down = meter.total("up") - before[0], meter.total("down") - before[1]
    record.guard = server.guard.told()
    record.tokens, record.seconds = meter.tokens - before[2], time.perf_counter() - begun
    return replace(new if new is not None else state, round=number), record


def _payloads(
    method: Method | Protocol, state: State, server: Server, clients: Sequence[str]
) -> Iterator[tuple[str, Received]]:
    return ((client, method.distribute(state, server.member(client))) for client in clients)


async def evaluate(
    method: Method | Protocol, state: State, server: Server, clients: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Ask `clients` to measure `state`; returns additive counts by client. Nothing is changed anywhere.

    Clients that could not be measured are in `server.lost` and `server.rejected`.
    """
    server.begin(state.round)
    counts: dict[str, dict[str, float]] = {}
    async for answer in server.ask(method.evaluate, _payloads(method, state, server, clients)):
        counts[answer.client] = {name: total for name, (total, _) in answer.upload.metrics.items()}
    server.settle(commit=False)
    return counts

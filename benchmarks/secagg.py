"""Secagg - what a secure sum costs: bytes per parameter, and CPU time of a client and of the server."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy

from benchmarks.ground import interleaved, seconds
from benchmarks.show import main
from fedllm.core.message import Upload
from fedllm.core.wire import encode
from fedllm.modes.secagg.client import Client, Letter
from fedllm.modes.secagg.graph import Policy
from fedllm.modes.secagg.ring import Ring, mask
from fedllm.modes.secagg.server import Server

QUESTION = "How many bytes does a secure sum take per parameter, and how much time at a client and at the server?"
HEAD = (
    "clients", "graph", "neighbours, threshold", "parameters", "dropped", "bits", "masked vector, bytes per parameter",
    "other bytes per client: sent", "received", "CPU s per client", "CPU s of the server", "largest error, in steps",
)  # fmt: skip
NOTE = (
    "All clients and the server in one process, one after the other. CPU time is that of the protocol alone: rounding, "
    "keys, shares, masks; bytes are those of the messages as they are encoded to travel. Half of those that drop do so "
    "before their vector, the other half after it. The step is that of one client's entry."
)
METHODS = ("advertise", "share", "mask", "confirm", "unmask")


@dataclass(frozen=True)
class Case:
    """One secure sum.

    Attributes:
        clients: how many.
        kind: the graph.
        parameters: entries of a vector.
        dropped: clients that drop.
        precision: bits of one client's entry.
    """

    clients: int
    kind: Literal["complete", "harary"]
    parameters: int
    dropped: int = 0
    precision: int = 16


CASES = (
    Case(10, "complete", 1_000_000),
    Case(10, "complete", 1_000_000, precision=28),
    Case(10, "complete", 1_000_000, dropped=2),
    Case(100, "complete", 10_000, dropped=4),
    Case(100, "harary", 10_000, dropped=4),
    Case(1_000, "harary", 1_000, dropped=40),
)
QUICK = (Case(10, "complete", 100_000), Case(100, "harary", 1_000, dropped=4))


@dataclass
class Spent:
    """CPU seconds and bytes of one sum; `vectors` are the bytes of the masked vectors."""

    clients: float = 0.0
    server: float = 0.0
    vectors: list[int] = field(default_factory=list)
    sent: int = 0
    received: int = 0


def size(letter: Letter) -> int:
    """Bytes of a letter on its way."""
    return len(encode(Upload(secagg=letter.to_tensors())))


def summed(case: Case) -> tuple[Server, Spent, float]:
    """Play one sum; also the largest error of the mean in steps."""
    draw = numpy.random.default_rng(0)
    names = [f"client-{n:04d}" for n in range(case.clients)]
    before, after = names[: case.dropped // 2], names[case.dropped // 2 : case.dropped]
    ring, policy, spent = Ring(case.clients, 1.0, case.precision), Policy(case.kind, 0.05, 0.05), Spent()
    server = Server(names, case.parameters, ring, policy)
    clients = {name: Client(name, case.parameters, ring, policy) for name in names}
    inbox: dict[str, Letter] = dict.fromkeys(names, server.setup)
    plain = numpy.zeros(case.parameters)
    for stage in METHODS:
        for name, letter in inbox.items():
            if (stage == "mask" and name in before) or (stage in ("confirm", "unmask") and name in after):
                continue
            spent.received += size(letter)
            values: tuple[object, ...] = ()
            if stage == "mask":
                vector = draw.uniform(-1, 1, case.parameters).astype(numpy.float32)
                plain += vector
                values = (vector, 1.0, draw)
            begun = time.process_time()
            answer: Letter = getattr(clients[name], stage)(letter, *values)
            ended = time.process_time()
            server.receive(name, answer)
            spent.clients, spent.server = spent.clients + ended - begun, spent.server + time.process_time() - ended
            if stage == "mask":
                spent.vectors.append(size(answer))
            else:
                spent.sent += size(answer)
        if stage != "unmask":
            begun = time.process_time()
            inbox = server.advance()
            spent.server += time.process_time() - begun
    begun = time.process_time()
    total = server.result()
    spent.server += time.process_time() - begun
    return server, spent, float(numpy.abs(total.mean - plain / len(server.clients)).max() / ring.step)


def row(case: Case) -> tuple[str, ...]:
    """One sum."""
    server, spent, error = summed(case)
    return (
        f"{case.clients:,}",
        case.kind,
        f"{server.shape.degree}, {server.shape.threshold}",
        f"{case.parameters:,}",
        str(case.dropped),
        str(server.ring.bits),
        f"{max(spent.vectors) / case.parameters:.2f}",
        f"{spent.sent / case.clients:,.0f}",
        f"{spent.received / case.clients:,.0f}",
        f"{spent.clients / case.clients:.4f}",
        f"{spent.server:.2f}",
        f"{error:.2f}",
    )


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case, and one for the speed of the masks."""
    summed(Case(3, "complete", 10))  # loads the library
    costs = interleaved({"mask": lambda: mask(bytes(32), 1_000_000)}, 3 if quick else 9)
    speed = f"one mask alone: {4 / seconds(costs['mask'], 'cpu'):,.0f} MB/s"
    rows = [row(case) for case in (QUICK if quick else CASES)]
    return [*rows, (speed, *[""] * (len(HEAD) - 1))]


if __name__ == "__main__":
    main(sys.modules[__name__])

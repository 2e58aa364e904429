"""Decentralised gossip - peers train and mix with their neighbours; there is no server and no global model.

Each peer keeps all of its own (model, push-sum mass, public copies) in its private store. A round is local training and
one mix. The server of the session is a relay: it keeps the clock, says who answered, and forwards each part of a
message to the neighbour it is for, unchanged and unread (the check that values are finite is that of every upload).

    d-psgd    x <- sum_j W_ij x_j, W Metropolis weights of the peers that answered (the mean of all stays)
    push-sum  the same for directed graphs: shares of (x, w) are sent on, the model is x / w
    choco     compressed: send C(x - xhat), all add it to their xhat, x <- x + gamma sum_j W_ij (xhat_j - xhat)
    ring      exact mean of all by ring all-reduce; one failure and everybody keeps its own model
    moshpit   exact means in groups of a grid, along another axis each round; a failure costs one group one round

A peer that does not answer is out of the round: the others mix by weights of what is left; it keeps its model and comes
back with it. A message of wrong shape is refused by its reader. In `choco` peers first tell which copies they hold, by
the round of the last change, and whoever missed a message gets the whole copy.

Deviations: the mix comes after `train.steps` local steps, and CHOCO's after its own message (arXiv:1902.00340,
algorithm 2). The first public copies are the common first values, not zeros. Equal weights: data sizes weigh nothing.
Optimisers begin afresh each round. In `moshpit` places on the grid are fixed. A peer that returns copies nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from fedllm.blocks import topology
from fedllm.blocks.compress import compressor
from fedllm.blocks.mixing import PublicCopies, RingMean, checked, choco, mix, push_sum, ratio
from fedllm.blocks.relay import agreement_of, in_rings, opened, over_peers, places, round_facts, to_neighbours, traffic
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Json, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.protocol import Protocol
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, norm, subtract
from fedllm.core.train import Train

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.core.work import Client

MEANS = ("ring", "moshpit")
ONLY = {"graph": ("d-psgd", "push-sum", "choco"), "dims": ("moshpit",)} | dict.fromkeys(
    ("compressor", "fraction", "bits", "gamma"), ("choco",)
)
"""Options that mean something in some algorithms only."""


class DecentralizedGossip(Protocol):
    """Learning by peers alone."""

    card = Card(
        title="Decentralised gossip - peers mix with neighbours; no server, no global model",
        paper="Lian et al., NeurIPS 2017, arXiv:1705.09056; Assran et al., ICML 2019, arXiv:1811.10792; Koloskova et "
        "al., ICML 2019, arXiv:1902.00340; Ryabinin et al., NeurIPS 2021, arXiv:2103.03239",
        cells=("2.4 Decentralized Training", "4.1"),
        travels="along each edge: the trainable tensors, whole or compressed; in rings: 2 (m - 1) / m of them each way",
        claim="Peers without a server agree and come close to FedAvg, also while some of them are down.",
        status="verified",
    )
    private = ("x", "w", "copies", "tags")

    train: Train = Train()  # pyright: ignore[reportCallIssue]
    """Local training between two mixes."""
    algorithm: Literal["d-psgd", "push-sum", "choco", "ring", "moshpit"] = "d-psgd"
    """How peers mix."""
    graph: Literal[
        "ring", "torus", "star", "complete", "exponential", "erdos-renyi", "pairs", "directed-ring",
        "directed-exponential",
    ] = "ring"  # fmt: skip
    """Who hears whom (not for ring and moshpit); directed ones need push-sum, `pairs` are drawn anew each round."""
    edge_share: float = Field(0.5, gt=0, le=1)
    """Probability of an edge in erdos-renyi."""
    compressor: Literal["top-k", "sign", "quantise", "identity"] = "top-k"
    """What choco sends."""
    fraction: float = Field(0.1, gt=0, le=1)
    """Share of the entries that top-k sends."""
    bits: Literal[4, 8] = 8
    """Bits per entry of quantise."""
    gamma: float = Field(0.3, gt=0, le=1)
    """Choco's consensus step: small for strong compression, 1 for identity."""
    dims: int = Field(2, ge=1)
    """Axes of moshpit's grid."""
    churn: float = Field(0.0, ge=0, lt=1)
    """Share of the peers that is down in each round, drawn anew each time (for experiments)."""
    average: bool = True
    """At the end collect all models once, to measure their average and spread; it becomes the run's saved model."""
    deadline: float | None = Field(None, gt=0)
    """Seconds the relay waits for each message; a later peer is out of the round."""

    @model_validator(mode="after")
    def _fitting(self) -> DecentralizedGossip:
        for name, users in ONLY.items():
            if self.algorithm not in users and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"method.{name}={getattr(self, name)} means nothing for algorithm={self.algorithm}.",
                    f"It is an option of: {', '.join(users)}.",
                    action=f"Remove it, or set method.algorithm={users[0]}.",
                )
        if self.graph.startswith("directed") and self.algorithm != "push-sum":
            raise ConfigError(
                f"The graph '{self.graph}' has edges in one direction; {self.algorithm} needs both.",
                nearest=self.graph.removeprefix("directed-"),
                action="Set method.algorithm=push-sum, or take an undirected graph.",
            )
        if self.graph == "pairs" and self.algorithm == "choco":
            raise ConfigError(
                "Choco keeps copies of its neighbours, and pairs are new ones each round.",
                action="Take a fixed graph, or method.algorithm=d-psgd.",
            )
        return self

    # -- a peer -------------------------------------------------------------------------------------------------------

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Local training from the own model, then one mix; nothing is kept where a step of it fails."""
        x, w = _held(client)
        report = await client.fit(ratio(x, w), self.train)
        local, refused = add(x, report.delta) if self.algorithm == "push-sum" else report.params, []
        if self.algorithm in MEANS:
            mixed = await self._in_ring(client, local)
        elif self.algorithm == "choco":
            mixed = await self._compressed(client, local, refused)
        else:
            mixed, w = await self._gossip(client, local, w, refused)
        client.private["x"], client.private["w"] = mixed, w
        moved = norm(subtract(ratio(mixed, w), report.params)) / max(norm(report.params), 1e-30)
        return Upload(None, client.size, report.metrics, {"moved": moved, "refused": refused})

    async def _gossip(self, client: Client, x: Tensors, w: float, refused: list[str]) -> tuple[Tensors, float]:
        """One mix of whole models."""
        answer = await client.exchange(Upload(None, numbers={"w": w}, message=x))
        weights, said = answer.numbers["weights"], answer.numbers["said"]
        inbox = opened(answer, lambda j, sent: checked(sent, x, j), refused)
        if self.algorithm == "push-sum":
            sent = [(weights[j], found, float(said[j]["w"])) for j, found in inbox.items()]
            return push_sum((x, w), weights[client.id], sent)
        return mix(x, ((weights[j], found) for j, found in inbox.items())), w

    async def _compressed(self, client: Client, x: Tensors, refused: list[str]) -> Tensors:
        """First who holds which copy of whom; then one mix of public copies."""
        packing = compressor(self.compressor, self.fraction, self.bits)
        kept: dict[str, Any] = dict(client.private)
        copies = PublicCopies(client.id, client.initial(), kept.get("copies"), kept.get("tags"), packing)
        answer = await client.exchange(Upload(None, numbers={"tags": copies.tags}))
        behind = copies.behind({j: numbers["tags"] for j, numbers in answer.numbers["said"].items()})
        message = copies.say(x, client.round, client.rng("compress"))
        upload = Upload(None, numbers={"behind": behind}, message=message)
        if behind:
            upload.parts["whole"] = Dense(copies.of(client.id))
        answer = await client.exchange(upload)
        weights, said = answer.numbers["weights"], answer.numbers["said"]
        inbox = opened(
            answer, lambda j, sent: copies.hear(j, sent, client.id in said[j]["behind"], client.round), refused
        )
        client.private["copies"], client.private["tags"] = copies.tensors, copies.tags
        return choco(x, copies.of(client.id), ((weights[j], found) for j, found in inbox.items()), self.gamma)

    async def _in_ring(self, client: Client, x: Tensors) -> Tensors:
        """The exact mean of this peer's group; its own model where another member fails."""
        group = (await client.exchange(Upload(None))).numbers["group"]
        ring = RingMean(x, group.index(client.id), len(group))
        for hop in range(ring.hops):
            answer = await client.exchange(Upload(None, message={"chunk": ring.outgoing(hop)}))
            if answer.numbers["abort"]:
                return x
            ring.accept(hop, answer["from.0"]["chunk"])
        return ring.result()

    @on_client
    async def lend(self, client: Client, received: Received) -> Upload:
        """The own model, for the average of the report."""
        return Upload(None, client.size, model=ratio(*_held(client)))

    def distribute(self, state: State, client: Member) -> Received:
        """Nothing: a peer measures the model it has."""
        return Received()

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The own model, or the one received, on the peer's own data."""
        report = await client.score(received.params if "params" in received.parts else ratio(*_held(client)))
        return Upload(None, client.size, report.metrics, {"values": report.values})

    # -- the relay ----------------------------------------------------------------------------------------------------

    async def play(self, server: Server, state: State) -> tuple[State, Json]:
        """Rounds of local work and one mix; then what the peers reached."""
        if self.algorithm not in MEANS:
            self._graph(server, 1)  # a graph that cannot be is refused before any training
        for number in range(state.round + 1, server.rounds + 1):
            server.begin(number)
            history = [*state.numbers.get("history", []), await self._round(server, number)]
            state = State(state.params, state.memory, {**state.numbers, "history": history}, number)
            server.checkpoint(state)
        return await self._report(server, state)

    async def _round(self, server: Server, number: int) -> dict[str, Json]:
        """One round; returns what is known of it."""
        ids = list(server.clients)
        asked = {ids[i]: Received() for i in topology.up(len(ids), self.churn, server.seed, number)}
        waiting = {answer.client: answer async for answer in server.ask(self.work, asked, self.deadline)}
        if self.algorithm in MEANS:
            ended, parts = await in_rings(server, waiting, self._groups(ids, number), self.deadline), {}
        else:
            graph = self._graph(server, number)
            weights = topology.push_weights if self.algorithm == "push-sum" else topology.metropolis
            if self.algorithm == "choco":
                waiting = await to_neighbours(server, waiting, graph, weights, self.deadline, parts=False)
            parts = {"parts": graph.parts(places(server, waiting))}
            ended = await to_neighbours(server, waiting, graph, weights, self.deadline)
        return {**round_facts(server, ended), **parts}

    def _graph(self, server: Server, number: int) -> topology.Graph:
        return topology.build(self.graph, len(server.clients), server.seed, self.edge_share, number)

    def _groups(self, ids: Sequence[str], number: int) -> list[list[str]]:
        dims = self.dims if self.algorithm == "moshpit" else 1  # one axis is one group
        return [[ids[i] for i in group] for group in topology.grid_groups(len(ids), dims, (number - 1) % dims)]

    async def _report(self, server: Server, state: State) -> tuple[State, Json]:
        """What the peers reached, one by one and (with `average`) as one model."""
        peers = await self._values(server, Received())
        report = {"peers": over_peers(peers), "rounds": state.numbers.get("history", []), **traffic(server.meter)}
        params: Tensors = {}
        if self.average:
            agreement = await agreement_of(server, self.lend, state.params, self.deadline)
            params = agreement.mean(state.params) if agreement.n else {}
            averaged = over_peers(await self._values(server, Received(params))) if params else {}
            report |= {"averaged": averaged, "spread": agreement.spread}
        server.settle(commit=False)
        return State(params, state.memory, state.numbers, state.round), report

    async def _values(self, server: Server, received: Received) -> dict[str, dict[str, float | None]]:
        asked = dict.fromkeys(server.clients, received)
        return {a.client: a.upload.numbers["values"] async for a in server.ask(self.evaluate, asked, self.deadline)}


def _held(client: Client) -> tuple[Tensors, float]:
    """A peer's x and w; the common first values and 1 before its first round."""
    kept: dict[str, Any] = dict(client.private)
    return kept.get("x") or client.initial(), kept.get("w", 1.0)

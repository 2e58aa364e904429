"""FedMeZO - federated averaging whose clients step by forward passes alone, each at a rate of its own.

A local step draws a fresh direction z, takes the slope of the loss along it from two forward passes (MeZO) and moves by
-lr_i * slope * z: memory is that of inference. Clients whose loss is larger (or whose change was further from the mean)
get a larger rate: lr_i = lr + c * d_i / max_j |d_j|, where d_i is the client's signal less the mean signal.

Deviations: every client draws seeds of its own; signals are float64, and a client without one has the base rate. With
`upload=pairs` a client sends (seed, lr_i * slope), 8 bytes a step, and the server takes the same steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, model_validator

from fedllm.blocks.zeroth import SEED_LIMIT, Kept, Weighed, pairs, plain_steps, replay, shares
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Scalars, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Collect, Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.seeds import derive, numpy_stream
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add
from fedllm.core.train import Train
from fedllm.core.work import Client

if TYPE_CHECKING:
    from fedllm.core.server import Server

WINDOW = {"round-wise": 1, "five-round": 5}
"""Of how many rounds the losses are averaged into a signal."""


class FedMeZO(Method):
    """FedAvg with zeroth-order local steps."""

    card = Card(
        title="FedMeZO - FedAvg whose local steps need forward passes only",
        paper="Ling et al., KDD 2024, arXiv:2402.05926",
        cells=("2.5 Convergence Analysis",),
        travels="down: trainable tensors, a rate; up: their change (or 8 B a step), and a loss where rates follow it",
        claim="Trains in the memory of inference, and rates by client make the loss fall faster than one rate.",
        status="runs",
    )
    only_fits = feeds = False

    train: Train = Train(steps=30, batch_size=1, lr=1e-5, optimizer="sgd", clip_norm=None)  # pyright: ignore
    """Local training; weight decay spares biases and norms."""
    eps: float = Field(1e-3, gt=0)
    """How far a probe goes along z to either side."""
    rates: Literal["frozen", "random", "round-wise", "five-round", "model-diff"] = "frozen"
    """A client's rate: the same for all, drawn, or by its loss of the last round, of five, or by its change."""
    spread: float = Field(0.5, ge=0, lt=1)
    """c as a share of the rate: rates lie between (1 - spread) and (1 + spread) times `train.lr`."""
    limit: float | None = Field(None, gt=0)
    """A step whose two losses are further apart than this is skipped."""
    upload: Literal["change", "pairs"] = "change"
    """What comes up: the change of the tensors, or a (seed, step) pair for each step."""

    def idle(self) -> dict[str, str]:
        """One rate for all has no spread."""
        return {"spread": "All clients have one rate with method.rates=frozen"} if self.rates == "frozen" else {}

    @model_validator(mode="after")
    def _fits(self) -> FedMeZO:
        train = self.train if self.upload == "pairs" else self.train.model_copy(update={"weight_decay": 0.0})
        plain_steps(train, "a zeroth-order step is plain and of the rate the server sets")
        if self.upload == "pairs" and self.rates == "model-diff":
            what = "method.rates=model-diff looks at each client's change, and method.upload=pairs sends none."
            rest = "Rates for pairs: frozen, random, round-wise, five-round."
            raise ConfigError(what, rest, action="Set method.upload=change.")
        return self

    async def prepare(self, server: Server, state: State) -> State:
        """A seed for drawn rates."""
        return replace(state, numbers={**state.numbers, "master": derive(server.seed, "rates")})

    def distribute(self, state: State, client: Member) -> Received:
        """theta and lr_i."""
        return Received(state.params, {"lr": self.rate(state, client.id)})

    def rate(self, state: State, client: str) -> float:
        """lr_i; the base rate where there is no signal of the client, or all are alike."""
        lr, width = self.train.lr, self.spread * self.train.lr
        if self.rates == "random":
            draw = numpy_stream(state.numbers.get("master", 0), client, state.round + 1)
            return float(draw.uniform(lr - width, lr + width))
        seen, window = state.numbers.get("signals", {}), WINDOW.get(self.rates, 1)
        signals = {name: sum(s[-window:]) / window for name, s in seen.items() if len(s) >= window}
        mean = sum(signals.values()) / max(len(signals), 1)
        largest = max((abs(s - mean) for s in signals.values()), default=0.0)
        return lr + width * (signals[client] - mean) / largest if client in signals and largest > 0 else lr

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Zeroth-order steps from theta."""
        lr, decay = float(received.numbers["lr"]), self.train.weight_decay
        seeds = client.rng("seeds").integers(SEED_LIMIT, size=self.train.steps or 10).tolist()
        report = await client.probe(received.params, seeds, self.train, self.eps, lr=lr, decay=decay, limit=self.limit)
        taken = pairs([seeds[i] for i in report.kept], lr * report.slopes[report.kept].double())
        sent = report.delta if self.upload == "change" else taken
        upload = Upload(sent, client.size, report.metrics)
        if self.rates in WINDOW:
            upload.parts["signal"] = Scalars({"loss": report.loss[0] / report.loss[1]})
        return upload

    @property
    def reducer(self) -> Reducers:
        """A mean; single uploads where they are replayed or held against the mean; losses by client."""
        kept = Kept(self.train.steps or 10 if self.upload == "pairs" else None)
        update = Mean(self.weighting) if self.upload == "change" and self.rates != "model-diff" else kept
        return {"update": update, **({"signal": Collect()} if self.rates in WINDOW else {})}

    def expected(self, state: State) -> dict[str, Tensors]:
        """A change has the shapes of theta."""
        return {"update": state.params} if self.upload == "change" else {}

    def finalize(self, state: State, update: Update) -> State:
        """theta <- theta + the weighted mean of the changes; remember the signals."""
        found = {c: p.values["loss"] for c, p in update.collected.get("signal", {}).items() if "loss" in p.values}  # pyright: ignore
        kept = cast("dict[str, Weighed]", update.collected.get("update", {}))
        part = shares(kept, self.weighting)
        if self.upload == "pairs":
            seeds = [int(seed) for p in kept.values() for seed in p.tensors["seed"]]
            values = torch.cat([part[c] * p.tensors["value"].double() for c, p in kept.items()])
            params = replay(state.params, seeds, values, -1.0)
        elif kept:
            mean = {n: sum(part[c] * p.tensors[n].double() for c, p in kept.items()) for n in state.params}
            found = {c: float(sum((p.tensors[n] - mean[n]).norm() for n in mean)) for c, p in kept.items()}
            params = add(state.params, cast(Tensors, mean))
        else:
            params = add(state.params, update.params)
        before = state.numbers.get("signals", {})
        signals = {**before, **{c: [*before.get(c, []), s][-5:] for c, s in found.items()}}
        return replace(state.with_(params), numbers={**state.numbers, "signals": signals})

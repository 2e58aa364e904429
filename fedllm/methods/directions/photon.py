"""Photon - pre-train one language model from nothing over silos that exchange it hundreds of times less often.

Each silo takes many AdamW steps on its own stream of tokens; the server reads the mean change as a gradient and takes
an outer step with Nesterov momentum (DiLoCo; Douillard et al., 2311.08105): v <- mu v + d, g <- g - eta (d + mu v),
d = -mean change. One schedule of the inner rate runs over all rounds, a silo's stream of batches is never begun anew,
and with `keep_optimizer` neither is its optimiser.

Deviations: a silo counts by its tokens, padding not counted. Inner steps are counted by rounds, so a round that failed
still moves the schedule. A silo's optimiser steps on a clock of its own (the steps it really took).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Update
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, over, zeros
from fedllm.core.train import Schedule, Train
from fedllm.core.work import Client


class Preset(NamedTuple):
    """The outer step and the inner optimiser of a published recipe."""

    server_lr: float
    momentum: float
    keep_optimizer: bool


PRESETS = {
    "photon-fedavg": Preset(1.0, 0.0, True),
    "photon-nesterov": Preset(0.7, 0.7, False),
    "diloco": Preset(0.7, 0.9, False),
}


class Photon(Method):
    """Many local steps, one outer step with Nesterov momentum."""

    card = Card(
        title="Photon - federated pre-training with an outer optimiser",
        paper="Sani et al., 2024, arXiv:2405.10853 and 2411.02908; DiLoCo, arXiv:2311.08105",
        cells=("4.3 Federated Pre-Training",),
        travels="down: all weights; up: their change and the number of tokens, once in H inner steps",
        claim="With H times less traffic it beats plain averaging and one silo (the paper: near data-parallel).",
        status="verified",
    )
    private = ("moments", "begun")
    adapters = ("full",)

    train: Train = Train(
        steps=128, batch_size=32, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1,
        schedule=Schedule(kind="cosine", by="step", warmup=0.02, final=0.1),
    )  # fmt: skip
    """Local training; `steps` is H. Small batches keep the peak rate of the large one, over more steps."""
    preset: Literal["photon-fedavg", "photon-nesterov", "diloco"] = "photon-nesterov"
    """A published recipe for the three options below."""
    server_lr: float | None = Field(None, gt=0)
    """Outer rate eta; null: the preset's."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Outer Nesterov momentum mu; null: the preset's."""
    keep_optimizer: bool | None = None
    """Whether a silo's optimiser goes on from round to round; null: the preset's."""

    def outer(self) -> Preset:
        """The preset with what was given in its place."""
        preset = PRESETS[self.preset]
        given = (self.server_lr, self.momentum, self.keep_optimizer)
        return Preset(*(own if mine is None else mine for own, mine in zip(preset, given, strict=True)))

    def init(self, start: Tensors) -> State:
        """g, and v = 0 where there is momentum."""
        return State(start, {"velocity": zeros(start)} if self.outer().momentum else {})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """H inner steps on the silo's own stream."""
        begun = int(client.private.get("begun") or 0)
        kept = client.private.get("moments") or {}
        moments = dict(kept) if self.outer().keep_optimizer else None
        report = await client.fit(received.params, self.train, moments=moments, begun=begun)
        client.private["begun"] = begun + report.steps
        if report.moments is not None:
            client.private["moments"] = report.moments
        return Upload(report.delta, weight=report.tokens, metrics=report.metrics)

    def finalize(self, state: State, update: Update) -> State:
        """v <- mu v + d; g <- g - eta (d + mu v)."""
        eta, mu, _ = self.outer()
        if not mu:
            return state.with_(over(lambda g, change: g + eta * change, state.params, update.params))
        velocity = over(lambda v, change: mu * v - change, state.memory["velocity"], update.params)
        params = over(lambda g, c, v: g - eta * (mu * v - c), state.params, update.params, velocity)
        return state.with_(params, velocity=velocity)

"""Train - the settings of a client's local training, the same for every method unless its paper says otherwise."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError

Decay = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate of AdamW."""


class Schedule(BaseModel):
    """How the learning rate changes over the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    by: Literal["round", "step"] = "round"
    """Count rounds (the rate is constant inside one) or global local steps."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the run over which the rate rises linearly to `lr`."""
    final: float = Field(0.0, ge=0, le=1)
    """Where the decay leads, as a share of `lr`: it would be reached one unit after the last."""

    def factor(self, done: int, total: int) -> float:
        """The rate of unit number `done` (from 0) of `total`, as a share of `lr`; units are rounds or steps."""
        warm = math.ceil(round(self.warmup * total, 6))  # 0.07 * 100 is 7.000000000000001
        done = max(done, 0)  # a protocol may ask before its first round
        if done < warm:
            return (done + 1) / warm
        if self.kind == "constant":
            return 1.0
        rest = min((done - warm) / max(total - warm, 1), 1.0)
        shape = 1 - rest if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
        return self.final + (1 - self.final) * shape


class Train(BaseModel):
    """Local training: how many steps, on what batches, by which optimiser."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    steps: int | None = Field(None, ge=1)
    """Optimiser steps per client and round. Give either this or `epochs`; the default is 10 steps."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the client's data per round, instead of `steps`."""
    batch_size: int = Field(8, ge=1)
    """Examples per forward pass of one client."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per optimiser step; the gradient is that of one batch of batch_size * accumulate."""
    lr: float = Field(1e-3, gt=0)
    """Local learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser; begins afresh every round."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of SGD."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW) or L2 (SGD)."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest Euclidean norm of one client's gradient; null for none."""
    schedule: Schedule = Schedule()  # pyright: ignore[reportCallIssue]
    """How the rate changes over the run."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"train.steps={self.steps} and train.epochs={self.epochs} are both given.",
                "Only one may be.",
                action="Remove one of them.",
            )
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(
                f"train.momentum={self.momentum} has no meaning for {self.optimizer}.",
                "Momentum is an option of sgd; AdamW has train.betas.",
                action="Set train.optimizer=sgd or remove train.momentum.",
            )
        if self.schedule.by == "step" and self.epochs is not None:
            raise ConfigError(
                "train.schedule.by=step needs the same number of steps at every client.",
                action="Give train.steps instead of train.epochs, or set train.schedule.by=round.",
            )
        return self

    def step_count(self, examples: int) -> int:
        """Optimiser steps of a client with `examples` training examples; 0 where it has none."""
        if examples == 0:
            return 0
        if self.epochs is None:
            return self.steps or 10
        return self.epochs * math.ceil(examples / (self.batch_size * self.accumulate))

    def rate(self, round: int, rounds: int, step: int, steps: int) -> float:
        """The learning rate at `step` (from 0) of `steps` in `round` (from 1) of `rounds`."""
        if self.schedule.by == "round":
            return self.lr * self.schedule.factor(round - 1, rounds)
        return self.lr * self.schedule.factor((round - 1) * steps + step, rounds * steps)

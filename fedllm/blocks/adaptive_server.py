"""Adaptive server - the frame of FedAdagrad, FedYogi and FedAdam (Reddi et al., ICLR 2021, algorithm 2).

    m <- b1 m + (1 - b1) d;   v <- second(v, d);   x <- x + eta m / (sqrt(v) + tau)

d is the mean change of the clients, uniform in the paper. `convention` switches the details that published code does
otherwise, so that its numbers can be reproduced; see its description below.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field

from fedllm.core.method import Method
from fedllm.core.reducer import Update
from fedllm.core.state import State
from fedllm.core.tensors import add, over


class AdaptiveServer(Method, abstract=True):
    """A server optimiser with a second moment."""

    weighting: Literal["examples", "uniform"] = "uniform"
    """The paper's mean is uniform."""
    server_lr: float = Field(1e-2, gt=0)
    """eta: about the absolute move of a coordinate per round; scale it with the local rate times local steps."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float = Field(1e-3, gt=0)
    """Added to the root of the second moment; v starts at tau^2."""
    convention: Literal["paper", "openfedllm", "flower"] = "paper"
    """paper; openfedllm: m = d in the first round, and the second moment of m; flower: v starts at 0."""

    @abstractmethod
    def second(self, v: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """The next second moment of one tensor."""

    def first_decay(self) -> float:
        """b1."""
        return self.beta1

    def rate(self, round: int) -> float:
        """eta in a round, from 1."""
        return self.server_lr

    def finalize(self, state: State, update: Update) -> State:
        """One step of the server optimiser; all in float32 or better."""
        change, b1 = update.params, self.first_decay()
        m, v = state.memory.get("m"), state.memory.get("v")
        begun = m is not None
        if m is None:
            m = over(torch.zeros_like, change)
        if v is None:
            start = 0.0 if self.convention == "flower" else self.tau**2
            v = over(lambda d: torch.full_like(d, start), change)
        if self.convention == "openfedllm" and not begun:
            m = change
        else:
            m = over(lambda m, d: b1 * m + (1 - b1) * d, m, change)
        v = over(self.second, v, m if self.second_of_momentum() else change)
        step = over(lambda m, v: m / (v.sqrt() + self.tau), m, v)
        return state.with_(add(state.params, step, self.rate(state.round + 1)), m=m, v=v)

    def second_of_momentum(self) -> bool:
        """Whether the second moment is that of m rather than of d."""
        return self.convention == "openfedllm"

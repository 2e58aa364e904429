"""SCAFFOLD - control variates correct each local step for the drift between a client's gradient and everybody's.

A step becomes y <- y - lr (g(y) - c_k + c). Option II (default) reads the new c_k off the local progress, which is a
mean gradient only for plain SGD without clipping; with anything else option I computes a full local gradient.

Deviations: the sum of the learning rates really used replaces K * lr, and the global step size is a field.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, over, subtract, zeros
from fedllm.core.train import Train
from fedllm.core.work import Client


class Scaffold(Method):
    """Stochastic controlled averaging."""

    card = Card(
        title="SCAFFOLD - control variates against client drift",
        paper="Karimireddy et al., ICML 2020, arXiv:1910.06378",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="down: trainable tensors and c; up: their change and the change of c_k (twice FedAvg)",
        claim="Converges to the optimum of the joint objective with many local steps on clients that differ.",
        status="verified",
    )
    private = ("control",)
    mirrors = True

    train: Train = Train(optimizer="sgd", lr=0.1, clip_norm=None)
    """Local training; option II needs plain SGD."""
    weighting: Literal["examples", "uniform"] = "uniform"
    """The paper's mean is uniform."""
    option: Literal["I", "II"] = "II"
    """How c_k is renewed: I - full local gradient at the received weights; II - from the local progress."""
    server_lr: float = Field(1.0, gt=0)
    """Global step size."""

    @model_validator(mode="after")
    def _plain_sgd(self) -> Scaffold:
        train = self.train
        if self.option == "II" and (
            train.optimizer != "sgd" or train.momentum or train.clip_norm or train.weight_decay
        ):
            raise ConfigError(
                "SCAFFOLD's option II reads a gradient off the local progress, which needs plain SGD.",
                "Given: " + f"optimizer={train.optimizer}, momentum={train.momentum}, clip_norm={train.clip_norm}, "
                f"weight_decay={train.weight_decay}.",
                action="Set train.optimizer=sgd train.clip_norm=null, or method.option=I.",
            )
        return self

    def init(self, start: Tensors) -> State:
        """c = 0."""
        return State(start, {"control": zeros(start)})

    def distribute(self, state: State, client: Member) -> Received:
        """x and c."""
        return Received(state.params, control=state.memory["control"])

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Corrected local steps, then the new c_k."""
        control, own = received["control"], client.private.get("control") or zeros(received.params)
        report = await client.fit(received.params, self.train, correction=self.correct, control=control, own=own)
        if self.option == "I":
            renewed, _ = await client.gradient(received.params)
        else:
            drift = over(lambda delta: -delta / report.rate_sum, report.delta)
            renewed = add(subtract(own, control), drift)
        client.private["control"] = renewed
        return Upload(report.delta, client.size, report.metrics, control=subtract(renewed, own))

    def correct(self, grads: Tensors, params: Tensors, start: Tensors, control: Tensors, own: Tensors) -> Tensors:
        """g - c_k + c."""
        return over(lambda g, c, c_k: g - c_k + c, grads, control, own)

    @property
    def reducer(self) -> Reducers:
        """Two means; the control variates' is uniform."""
        return {"update": Mean(self.weighting), "control": Mean("uniform")}

    def expected(self, state: State) -> dict[str, Tensors]:
        """Both parts have the shapes of the trainable tensors."""
        return {"update": state.params, "control": state.params}

    def finalize(self, state: State, update: Update) -> State:
        """x <- x + eta_g mean(delta); c <- c + (m / N) mean(delta c): N counts all clients, asked or not."""
        share = update.clients / update.population
        control = add(state.memory["control"], update["control"], share)
        return state.with_(add(state.params, update.params, self.server_lr), control=control)

"""MedVQA-pFL - every client keeps its own prompt and receives a mix of the others', weighed by how far to trust them.

There is no global model. Half of the prompt is the client's own and trained; the other half is what it received and
held still; a term of the loss keeps the two alike. The server weighs the others by accuracy times likeness.

Deviations: the prompt stands before the input of any language model (the paper adds attention over prompts inside a
fusion model); negative likenesses count as 0, and where no weight is left the mix is uniform; the accuracy is that on
the client's own training rows, so that held-out rows stay unseen. A client keeps nothing: the server knows its prompt.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.message import Received, Scalars, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Collect, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Client, ScoreReport

PROMPT = "prompt"


class MedVQA(Method):
    """Personal prompts with a reliability-weighted mix of the others'."""

    card = Card(
        title="MedVQA-pFL - own prompts and a trusted mix of the others'",
        paper="Zhu, Togo, Ogawa, Haseyama, ICASSP 2024, arXiv:2402.09677",
        cells=("3.9 Medical VQA", "3.4 Prompt Personalization"),
        travels="down: the own half and the mix of the others'; up: the own half and one accuracy",
        claim="A client with unreliable data gets little weight at the others.",
        status="verified",
    )
    only_fits = False
    adapters = ("prompt",)

    train: Train = Train(lr=0.05)
    """Local training; without weight decay, which would move the received half."""
    near: float = Field(0.1, ge=0)
    """Weight of 1 - cos(own, received) in the loss (the paper's alpha)."""
    small: float = Field(0.0, ge=0)
    """Weight of the squared norm of the own half in the loss (the paper's beta)."""

    @field_validator("train")
    @classmethod
    def _no_decay(cls, train: Train) -> Train:
        if train.weight_decay:
            raise ConfigError(
                f"train.weight_decay={train.weight_decay} would move the received half of the prompt.",
                "Allowed: 0.",
                action="Set train.weight_decay=0; method.small keeps the own half small.",
            )
        return train

    def init(self, start: Tensors) -> State:
        """Nobody's prompt is known yet."""
        if set(start) != {PROMPT} or start[PROMPT].shape[0] % 2:
            shape = {name: tuple(tensor.shape) for name, tensor in start.items()}
            raise ConfigError(f"A prompt of two halves cannot be cut from {shape}.", action="Set adapter.tokens even.")
        return State(start, {"own": {}}, {"accuracy": {}})

    def distribute(self, state: State, client: Member) -> Received:
        """Its own half beside the mix of the others'; a newcomer's half is the first one, alone both are its own."""
        prompts = state.memory["own"]
        own = prompts.get(client.id, state.params[PROMPT].chunk(2)[0])
        weights = reliability(client.id, prompts, state.numbers["accuracy"])
        mix = torch.stack([share * prompts[other] for other, share in weights.items()]).sum(0) if weights else own
        return Received({PROMPT: torch.cat([own, mix])}, {"alone": not weights})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train the own half beside the received one."""
        penalty = None if received.numbers["alone"] else self.alike
        report = await client.fit(received.params, self.train, penalty, self.hold)
        score = await client.score(report.params, "train")
        own = report.params[PROMPT].chunk(2)[0].clone()
        said = Scalars({"accuracy": accuracy(score)})
        return Upload(None, client.size, report.metrics, own={PROMPT: own}, accuracy=said)

    def alike(self, params: Tensors, start: Tensors) -> torch.Tensor:
        """alpha (1 - cos(own, received)) + beta |own|^2."""
        own, received = params[PROMPT].chunk(2)
        cosine = torch.nn.functional.cosine_similarity(own.flatten(), received.detach().flatten(), 0)
        return self.near * (1 - cosine) + self.small * own.square().sum()

    def hold(self, grads: Tensors, params: Tensors, start: Tensors) -> Tensors:
        """The received half does not move."""
        own, received = grads[PROMPT].chunk(2)
        return {PROMPT: torch.cat([own, torch.zeros_like(received)])}

    @property
    def reducer(self) -> Reducers:
        """Who trusts whom depends on single prompts."""
        return {"own": Collect(), "accuracy": Collect()}

    def expected(self, state: State) -> dict[str, Tensors]:
        """Half a prompt and a number."""
        return {"own": {PROMPT: state.params[PROMPT].chunk(2)[0]}, "accuracy": {"accuracy": torch.zeros(())}}

    def finalize(self, state: State, update: Update) -> State:
        """Keep everybody's last prompt and accuracy; an absent client keeps its earlier one."""
        own = {client: part.tensors[PROMPT] for client, part in update.collected["own"].items()}  # type: ignore[attr-defined]
        said = {client: part.values["accuracy"] for client, part in update.collected["accuracy"].items()}  # type: ignore[attr-defined]
        kept = {client: min(max(value, 0.0), 1.0) for client, value in said.items()}
        numbers = {**state.numbers, "accuracy": {**state.numbers["accuracy"], **kept}}
        return State(state.params, {"own": {**state.memory["own"], **own}}, numbers, state.round)

    def weights(self, state: State, start: Tensors) -> Tensors:
        """None: everybody has a prompt of its own."""
        return {}


def accuracy(report: ScoreReport) -> float:
    """A score's accuracy, whatever the task calls it."""
    for name in ("accuracy", "exact_match", "token_accuracy"):
        if (value := report.values.get(name)) is not None:
            return value
    raise RoundFailed("This task has no accuracy to weigh clients by.", f"It has: {', '.join(report.values)}.")


def reliability(client: str, prompts: Tensors, trust: dict[str, float]) -> dict[str, float]:
    """eta_i = acc_i cos+(p_i, p_t) / sum over the others (section 2.3 of the paper); {} where there are no others."""
    others = [other for other in prompts if other != client]
    if not others:
        return {}
    if client not in prompts:
        found = {other: trust[other] for other in others}
    else:
        mine = prompts[client].flatten().double()
        likeness = {o: torch.nn.functional.cosine_similarity(prompts[o].flatten().double(), mine, 0) for o in others}
        found = {other: trust[other] * max(float(likeness[other]), 0.0) for other in others}
    total = sum(found.values())
    return {o: value / total for o, value in found.items()} if total > 1e-8 else {o: 1 / len(others) for o in others}

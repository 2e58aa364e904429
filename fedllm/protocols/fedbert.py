"""FedBERT - split learning of a transformer: clients keep embeddings and head, the server runs the layers between.

A weak client cannot hold a whole encoder, and may not send its text. It computes the embeddings and the loss; the
layers in the middle, most of the weights, are the server's. Per batch four messages pass: activations up, hidden states
down, their gradient up, the activations' gradient down. Token ids and labels never leave a client.

    client: a = E(x) + noise --a--> server: h = S(a) --h--> client: loss = O(h)
            dE <- backward <-dL/da-- dS <- backward <-dL/dh-- dO <- backward

In the parallel mode all clients work against one S, which steps on their mean gradient, and after `train.steps` steps
the ends (E, O) are averaged. In the sequential mode one client after the other trains a pass and hands on (E, O).

Who knows the embedding table, and this server averages it, reads the text off the activations by looking for the
nearest entry: all of it behind bare embeddings, and all of it behind one client layer too, as measured by
fedllm/effects/fedbert.py. Noise makes it harder, not impossible. Not sending ids is no protection of the text, so that
consent has to be given by hand, with `accept_leak`, whatever the other settings are.

Deviations: the paper's own setting is client_layers=0 without noise; here one layer stays at the client unless told
otherwise. Dropout is off. Gradients are clipped, where asked for, on each side by its own norm. The step list follows
the abstract and the published descriptions; no official code is known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy
import torch
from pydantic import Field, model_validator

from fedllm.blocks.split_learning import Pass, Refusing, Trunk, sent, through_back, with_front
from fedllm.blocks.stepper import Stepper
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError, DataError, RoundFailed
from fedllm.core.message import Json, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.protocol import Protocol
from fedllm.core.reducer import Mean, Reduction, Weighting
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, count, subtract
from fedllm.core.train import Schedule, Train

if TYPE_CHECKING:
    from fedllm.core.meter import Meter
    from fedllm.core.server import Answer, Server
    from fedllm.core.split import Ends
    from fedllm.core.work import Client, Example


class FedBERT(Protocol):
    """Federated split learning."""

    card = Card(
        title="FedBERT - split learning: embeddings and head at the clients, the layers at the server",
        paper="Tian et al., ACM TIST 13(4), 2022, doi:10.1145/3510033",
        cells=("4.3 Federated Pre-Training",),
        travels="per batch up: activations, mask, gradient of the hidden states; down: hidden states, gradient of the "
        "activations (4 B T d numbers); per round both ways: the ends",
        claim="Pre-trains as well as on pooled text, while clients hold only embeddings and head and send no text.",
        models=("masked-lm", "causal-lm", "sequence-classification", "token-classification"),
        status="runs",
    )
    private = ("moments",)
    adapters = ("full", "lora", "ia3", "bottleneck", "bitfit")
    needs = {"accept_leak": True}

    train: Train = Train(  # pyright: ignore[reportCallIssue]
        steps=10,
        lr=1e-4,
        clip_norm=None,
        schedule=Schedule(by="step", warmup=0.1),  # pyright: ignore[reportCallIssue]
    )
    """Both sides' optimiser; `steps` (or `epochs`) lie between two averages of the ends, or are one client's pass."""
    server_lr: float | None = Field(None, gt=0)
    """Learning rate of the server's layers; that of `train` where null."""
    mode: Literal["parallel", "sequential"] = "parallel"
    """parallel: all clients at once, ends averaged; sequential: the ends are handed from client to client."""
    weighting: Weighting = "examples"
    """Weigh the clients' ends by their examples or all alike."""
    client_layers: int = Field(1, ge=0)
    """Layers that stay at the client behind the embeddings; 0 is the paper's. One does not hide the text."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on the activations; not a formal privacy, and at 1 most tokens are read."""
    accept_leak: bool = False
    """Must be true: with any client_layers and noise the server can read (most of) the text if it tries."""
    deadline: float | None = Field(None, gt=0)
    """Seconds the server waits for each message; a later client is given up and its open batch does not count."""

    @model_validator(mode="after")
    def _opted_in(self) -> FedBERT:
        if self.train.accumulate != 1:
            raise ConfigError(
                f"train.accumulate={self.train.accumulate} is given.", "Split learning steps on every batch.", "1"
            )
        if not self.accept_leak:
            raise ConfigError(
                "accept_leak is false, and FedBERT lets the server read the clients' text off their activations.",
                "Allowed: true. All tokens were read behind bare embeddings and behind one client layer, most of them "
                "through noise of standard deviation 1.",
                action="Set method.accept_leak=true where the server may read the text; else use fedit, which sends "
                "no activations.",
            )
        return self

    # -- client -------------------------------------------------------------------------------------------------------

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """E, the conversation, O, and back, batch after batch; then the change of the ends."""
        ends, count = client.ends(self.client_layers, None), len(client.examples())
        stepper = Stepper(self.train, received.params, client.private.get("moments"), ends.device)
        batches, noise, steps = self._batches(client, ends), client.rng("noise"), self.train.step_count(count)
        loss, labels = 0.0, 0
        for step in range(steps):
            batch = next(batches)
            hidden, mask = ends.encode(stepper.params, batch)
            shown = self._noisy(hidden.detach(), noise)
            answer = await client.exchange(Upload(None, activations={"hidden": shown}, mask={"mask": mask}))
            back = through_back(ends, stepper.params, sent(answer, "hidden", hidden), batch)
            answer = await client.exchange(Upload(None, gradient={"hidden": back.upstream}))
            grads = with_front(stepper.params, back.grads, hidden, sent(answer, "gradient", hidden))
            stepper.step(grads, self.train.rate(client.round, client.rounds, step, steps))
            loss, labels = loss + back.loss, labels + back.labels
        client.private["moments"] = stepper.moments()
        return Upload(subtract(stepper.values(), received.params), client.size, {"loss": (loss, labels)})

    def _batches(self, client: Client, ends: Ends) -> Iterator[list[Example]]:
        """Batches of fresh passes, masked anew; one without a label is skipped."""
        examples, size = client.examples(), self.train.batch_size
        order, masks, fruitless = client.rng("batches"), client.rng("mask"), 0
        while fruitless < len(examples):
            shuffled = order.permutation(len(examples))
            for start in range(0, len(examples), size):
                batch = ends.drawn([examples[i] for i in shuffled[start : start + size]], masks)
                usable = any(example.targets for example in batch)
                fruitless = 0 if usable else fruitless + len(batch)
                if usable:
                    yield batch
        raise DataError(f"No batch of client '{client.id}' has a label to learn from.")

    def _noisy(self, hidden: torch.Tensor, rng: numpy.random.Generator) -> torch.Tensor:
        if not self.noise:
            return hidden
        drawn = torch.from_numpy(rng.standard_normal(tuple(hidden.shape), dtype=numpy.float32))
        return hidden + self.noise * drawn.to(hidden)

    # -- server -------------------------------------------------------------------------------------------------------

    async def play(self, server: Server, state: State) -> tuple[State, Json]:
        """Rounds of `train.steps` steps; each ends in a checkpoint."""
        body = server.body(self.client_layers, None)
        train = self.train if self.server_lr is None else self.train.model_copy(update={"lr": self.server_lr})
        held = {name: tensor for name, tensor in state.params.items() if name in body.names}
        for number in range(state.round + 1, server.rounds + 1):
            server.begin(number)
            ends = {name: tensor for name, tensor in state.params.items() if name not in body.names}
            held = {name: state.params[name] for name in held}
            trunk = Trunk(body, train, held, state.memory.get("moments"))
            ends, loss = await (self._parallel if self.mode == "parallel" else self._sequential)(server, ends, trunk)
            entry = {"round": number, "loss": loss, "lost": len(server.lost), "rejected": len(server.rejected)}
            state = State(
                {**ends, **trunk.stepper.values()},
                {**state.memory, "moments": trunk.stepper.moments()},
                {**state.numbers, "history": [*state.numbers.get("history", []), entry]},
                number,
            )
            server.checkpoint(state)
        resident = {"client": count(state.params) - count(held), "server": count(held)}
        return state, {"rounds": state.numbers.get("history", []), "resident": resident, **traffic(server.meter)}

    async def _parallel(self, server: Server, ends: Tensors, trunk: Trunk) -> tuple[Tensors, float | None]:
        """All clients against one S; then the mean of their ends."""
        reduction = Reduction(Mean(self.weighting), {"update": ends})
        steps, payloads = self.train.step_count(1), {client: Received(ends) for client in server.clients}
        async for answer in self._converse(server, payloads, trunk, steps):
            with Refusing(server, answer):
                reduction.add(answer.client, answer.upload)
        update = reduction.result(len(server.clients))
        if "update" not in update.parts:
            raise _nobody(server)
        return add(ends, update.params), _mean(update.metrics)

    async def _sequential(self, server: Server, ends: Tensors, trunk: Trunk) -> tuple[Tensors, float | None]:
        """One client after the other; what a client was given goes on where it fails."""
        losses = Reduction({})
        steps = self.train.step_count(1) * len(server.clients)
        for client in server.clients:
            async for answer in self._converse(server, {client: Received(ends)}, trunk, steps):
                one = Reduction(Mean("uniform"), {"update": ends})
                with Refusing(server, answer):
                    one.add(client, answer.upload)
                    ends = add(ends, one.result(1).params)
                    losses.add(client, Upload(None, metrics=answer.upload.metrics))
        if not losses.clients:
            raise _nobody(server)
        return ends, _mean(losses.metrics)

    async def _converse(
        self, server: Server, payloads: Mapping[str, Received], trunk: Trunk, steps: int
    ) -> AsyncIterator[Answer]:
        """Play the sessions of some clients to their ends, in step with each other; yields their last uploads.

        Whoever is not heard of in time has left: its open pass is freed, and its batch does not count.
        """
        answers = [answer async for answer in server.ask(self.work, payloads, self.deadline)]
        try:
            while answers:
                passes: dict[str, Pass] = {}
                for answer in answers:
                    if answer.session is None:
                        yield answer
                        continue
                    with Refusing(server, answer):
                        passes[answer.session] = trunk.forward(answer.upload)
                down = {session: Received(hidden={"hidden": opened.out.detach()}) for session, opened in passes.items()}
                replies = server.reply(down, self.deadline)
                down = {}
                async for answer in replies:
                    with Refusing(server, answer):
                        gradient = trunk.backward(passes.pop(answer.session or "", None), answer.upload)
                        down[str(answer.session)] = Received(gradient={"hidden": gradient})
                passes.clear()
                trunk.step(trunk.stepper.train.rate(server.round, server.rounds, trunk.taken, steps))
                answers = [answer async for answer in server.reply(down, self.deadline)]
        finally:
            server.close([answer.session for answer in answers if answer.session is not None])


def traffic(meter: Meter) -> dict[str, int]:
    """Bytes of the conversations so far without headers: `activation_bytes` (4 B T d numbers a step), `mask_bytes`."""
    names = ("up/activations", "up/gradient", "down/hidden", "down/gradient")
    found = [meter.bytes.get(f"work/{name}", 0) for name in names]
    return {"activation_bytes": sum(found), "mask_bytes": meter.bytes.get("work/up/mask", 0)}


def _mean(metrics: Mapping[str, tuple[float, float]]) -> float | None:
    total, n = metrics.get("loss", (0.0, 0.0))
    return total / n if n > 0 else None


def _nobody(server: Server) -> RoundFailed:
    reasons = [entry["reason"] for entry in (*server.rejected, *server.lost)]
    return RoundFailed(
        f"No client came to the end of round {server.round}.",
        f"First reason: {reasons[0]}" if reasons else "",
        action="Mend the cause, then 'fedllm resume' the run; earlier rounds are saved.",
    )

"""Shields - defences at the client: of what it is sent, of its training, of its upload; registered like methods.

    received --refuses--> work --(training)--> upload --leaves--> server

They need nothing of the server, so they go with any method that uploads a dense change, with secure sums and with
encryption. None of them guarantees anything that could be accounted: that is what `privacy` is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fedllm.blocks import anomaly, decepticons
from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.seeds import secret_stream, torch_stream
from fedllm.core.tensors import Tensors, norm
from fedllm.core.train import Schedule, Train
from fedllm.core.work import FitReport
from fedllm.modes.around import Around
from fedllm.modes.defences import Defence, card_of
from fedllm.modes.means import means


class Shield(Defence, abstract=True):
    """A defence at the client; by default it changes nothing."""

    blind: ClassVar[bool] = True
    """Whether it needs neither a client's rows nor its single steps."""

    def stream(self, seed: int, client: str, round: int) -> torch.Generator:
        """Where its random numbers come from."""
        return torch_stream(seed, "shield", client, round)

    def refuses(self, params: Tensors) -> str | None:
        """Why the client does not train on what it was sent; None where it does."""
        return None

    def training(self, client: Any, rng: torch.Generator) -> Any:
        """The client as its half of the method sees it."""
        return client

    async def leaves(self, update: Tensors, client: Any, received: Received, rng: torch.Generator) -> Tensors:
        """What is uploaded in place of the change."""
        return update


class Shielded(Around):
    """A shield at every client.

    Args:
        shield: the shield.
        inner: the guard of the run; what a shield leaves is what it is given.
        method: must upload a dense change.
        seed: the run's seed.
    """

    def __init__(self, shield: Shield, inner: Guard, method: Any, seed: int) -> None:
        means(method, f"'{shield.key}'", "and a shield changes dense updates")
        super().__init__(inner)
        self.shield, self.seed = shield, seed

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """The method's half behind the shield, and both behind the guard inside."""

        async def shielded(algorithm: object, client: Any, received: Received) -> Upload:
            rng = self.shield.stream(self.seed, client.id, client.round)
            why = self.shield.refuses(received.params) if "params" in received.parts else None
            if why is not None:
                raise ConfigError(
                    f"The state that was sent is refused: {why}", "No honest training makes such weights."
                )
            upload = await function(algorithm, self.shield.training(client, rng), received)
            update = upload.parts.get("update")
            if isinstance(update, Dense):
                upload.parts["update"] = Dense(await self.shield.leaves(dict(update.tensors), client, received, rng))
            return upload

        return await self.inner.work(shielded, algorithm, client, received)


class Prune(Shield):
    """Only the largest entries of a change are sent."""

    key = "prune"
    card = card_of(
        "Gradient pruning - small entries stay at home",
        "Zhu et al., NeurIPS 2019, arXiv:1906.08935",
        "Gradient matching fails from a fifth on; costs accuracy when most is pruned.",
    )
    share: float = Field(0.9, ge=0, lt=1)
    """Share of the entries of each tensor that become zero."""

    async def leaves(self, update: Tensors, client: Any, received: Received, rng: torch.Generator) -> Tensors:
        """Every tensor without its smallest entries."""
        found = {}
        for name, tensor in update.items():
            dropped = int(self.share * tensor.numel())
            places = tensor.reshape(-1).abs().argsort(stable=True)[:dropped]
            found[name] = tensor.reshape(-1).index_fill(0, places, 0.0).reshape(tensor.shape)
        return found


class LocalNoise(Shield):
    """A clipped change with Gaussian noise from the client; no privacy is accounted."""

    key = "local-noise"
    card = card_of(
        "Local noise - clipping and noise before anything leaves",
        "Sun et al., 2019, arXiv:1911.07963, at the client",
        "Hides single rows in noise, at a cost that grows with the number of weights.",
    )
    bound: float = Field(1.0, gt=0)
    """The largest norm of a change that counts whole."""
    sd: float = Field(1e-3, ge=0)
    """Standard deviation of the noise on every entry."""
    noise_key: Literal["secret", "seed"] = "secret"
    """Where the noise comes from: secret numbers of each client's own, or the run's seed, which the server knows: for
    experiments that are to be repeated."""

    def stream(self, seed: int, client: str, round: int) -> torch.Generator:
        """See :class:`Shield`."""
        return secret_stream() if self.noise_key == "secret" else super().stream(seed, client, round)

    async def leaves(self, update: Tensors, client: Any, received: Received, rng: torch.Generator) -> Tensors:
        """Shortened to the bound, and noised."""
        factor = min(1.0, self.bound / max(norm(update), 1e-30))
        return {n: t * factor + self.sd * torch.randn(t.shape, generator=rng) for n, t in sorted(update.items())}


class FreezeEmbeddings(Shield):
    """The vectors of tokens are not trained: their rows would tell which tokens there were."""

    key = "freeze-embeddings"
    card = card_of(
        "Frozen embeddings - the bag of words stays at home",
        "Gupta et al., NeurIPS 2022, arXiv:2205.08514, section 6",
        "Stops attacks that begin with the embedding's rows, at little cost for pretrained models.",
    )
    names: tuple[str, ...] = ("embed_tokens", "wte", "word_embeddings", "shared", "lm_head")
    """Tensors whose names hold one of these."""

    async def leaves(self, update: Tensors, client: Any, received: Received, rng: torch.Generator) -> Tensors:
        """Without the change of embeddings, and of a head that has the same weights."""
        return {
            name: torch.zeros_like(tensor) if any(part in name for part in self.names) else tensor
            for name, tensor in update.items()
        }


class Soteria(Shield):
    """The inputs of the last layer that tell most of the texts have no gradient in it."""

    key = "soteria"
    card = card_of(
        "Soteria - a pruned representation at the last layer",
        "Sun et al., CVPR 2021, arXiv:2012.06043",
        "Images inverted from the last layer's gradient become unrecognisable.",
    )
    blind = False
    share: float = Field(0.01, ge=0, le=1)
    """Share of the inputs of the last layer that are hidden."""
    rows: int = Field(32, ge=1)
    """Rows that are looked at; each costs a backward pass for every input of the layer."""

    async def leaves(self, update: Tensors, client: Any, received: Received, rng: torch.Generator) -> Tensors:
        """See :func:`fedllm.blocks.anomaly.soteria`."""
        layer, inputs, slopes = await client.expose(received.params, client.rows()[: self.rows])
        if layer not in update:
            raise ConfigError(
                f"The last layer '{layer}' is not among the trained tensors.",
                "Soteria hides columns of its gradient.",
                action="Leave the defence 'soteria' out, or train the classifier's head.",
            )
        return {**update, layer: anomaly.soteria(update[layer], inputs, slopes, share=self.share)}


class WBC(Shield):
    """Noise in those directions of a local step in which the loss is flat, where what was planted lingers."""

    key = "wbc"
    card = card_of(
        "FL-WBC - noise where the loss is flat",
        "Sun et al., NeurIPS 2021, arXiv:2110.13864",
        "The effect of a poisoned round fades sooner; accuracy hardly changes.",
    )
    blind = False
    scale: float = Field(1e-3, gt=0)
    """Of the Laplace noise on a gradient; its standard deviation is sqrt(2) times that."""

    def training(self, client: Any, rng: torch.Generator) -> Any:
        """A client that trains step by step."""
        return _StepByStep(self, client, rng)


class _StepByStep:
    """A client whose fits are cut into steps of one, with noise between them."""

    def __init__(self, shield: WBC, client: Any, rng: torch.Generator) -> None:
        self._shield, self._client, self._rng = shield, client, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def fit(self, start: Tensors, train: Train, *rules: Any, **how: Any) -> FitReport:
        """See :class:`fedllm.core.work.Client`; the optimiser's memory goes on from step to step."""
        client, params, before = self._client, dict(start), None
        if how.pop("begun", None) is not None or how.pop("moments", None) is not None:
            raise ModeConflict(
                "A method that goes on with an optimiser of its own cannot be cut into steps.", "", "fedavg"
            )
        count, moments, parts = train.step_count(client.size), {}, list[FitReport]()
        one = train.model_copy(update={"steps": 1, "epochs": None, "schedule": Schedule()})  # pyright: ignore[reportCallIssue]
        for step in range(count):
            rate = train.rate(client.round, client.rounds, step, count)
            begun = (client.round - 1) * count + step
            now = one.model_copy(update={"lr": rate})
            report = await client.fit(params, now, *rules, begun=begun, moments=moments, **how)
            parts.append(report)
            moments, steps = report.moments or {}, report.delta
            noised = {n: anomaly.wbc(t, None if before is None else before[n], lr=rate, scale=self._shield.scale,
                                     rng=self._rng) for n, t in sorted(steps.items())}  # fmt: skip
            params, before = {n: params[n] + noised[n] for n in params}, steps
        loss = sum(part.loss[0] for part in parts), sum(part.loss[1] for part in parts)
        return FitReport(
            params, {n: params[n] - start[n] for n in start}, count, sum(part.rate_sum for part in parts), loss,
            sum(part.examples for part in parts), sum(part.tokens for part in parts),
        )  # fmt: skip


class Integrity(Shield):
    """A client looks at the weights it is sent, and does not train on those that no honest training makes."""

    key = "integrity"
    card = card_of(
        "Integrity - corrupted weights are refused",
        "Fowl et al., ICLR 2023, arXiv:2201.12675, the fault it leaves",
        "Stops servers that reshape weights to read gradients; a server that hides it in noise passes.",
    )

    def refuses(self, params: Tensors) -> str | None:
        """See :func:`fedllm.blocks.decepticons.suspicious`."""
        return decepticons.suspicious(params)

"""Sums - what encrypted sums have in common, whoever holds the keys: one vector per client, in a round of any method.

    work -> weight, weight x [and what travels in the open] -> the mode adds unseen -> sum -> update

With `ratio` below 1 the clients agree on one mask before the first round (Jin et al., FedML-HE, arXiv 2303.10837): the
sizes of their gradients are added unseen as well, and the entries where the sum is the largest are the mask. It is
public, fixed and the same for all. The server never sees a single upload's masked part; it sees the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fedllm.core.errors import ModeConflict, RoundFailed
from fedllm.core.guard import Guard, Quiet
from fedllm.core.message import Dense, Json, Received, Upload
from fedllm.core.method import Method
from fedllm.core.reducer import Reducer, Reduction, Update
from fedllm.core.seeds import secret_stream, torch_stream
from fedllm.core.tensors import Tensors
from fedllm.modes.flat import Flat, joined
from fedllm.modes.means import only_work, weighting_of

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.modes.encrypted.settings import EncryptedSettings

PART = "encrypted"
"""The part of a message that belongs to the encrypted sum."""


class Found(NamedTuple):
    """What came of a sum.

    Attributes:
        hidden: the sum of what was encrypted, or the mask.
        shown: the sum of what travelled in the open; None where everything was encrypted.
        clients: how many are in the sum.
    """

    hidden: torch.Tensor
    shown: torch.Tensor | None
    clients: int


class HiddenSum(Guard):
    """Encrypted sums in one run; also the guard at its clients.

    Args:
        settings: the recipe's section `encrypted`.
        method: must reduce every part by a mean of one weighting.
        seed: the run's seed, for the noise on what travels in the open.

    Raises:
        ModeConflict: a method that needs more than a sum.
    """

    def __init__(self, settings: EncryptedSettings, method: Method, seed: int) -> None:
        self.settings, self.seed, self.weighting = settings, seed, weighting_of(method, "The section 'encrypted'")
        reducers = method.reducer
        if settings.ratio < 1 and not isinstance(reducers, Reducer) and set(reducers) != {"update"}:
            raise ModeConflict(
                f"The method {method.key} uploads more than a change of the weights.",
                "What tells most is known for weights alone: with encrypted.ratio=1 it does not matter.",
                action="Set encrypted.ratio=1.",
            )
        self.mask: torch.Tensor | None = None

    # -- what the keys decide -----------------------------------------------------------------------------------------

    async def give(self, client: Any, received: Received, values: torch.Tensor, shown: torch.Tensor | None) -> Upload:
        """The client's half of one sum.

        Args:
            client: it converses with the server.
            received: what the sum began with.
            values: [D], what is encrypted.
            shown: what travels in the open; None for nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define give.")

    async def summed(
        self, server: Server, method: Method, asked: Mapping[str, Received], size: int, deadline: float | None
    ) -> Found | None:
        """The server's half of one sum.

        Args:
            server: it converses with the clients.
            method: whose `work` they are asked for.
            asked: client -> what the sum begins with.
            size: D.
            deadline: seconds for each exchange.

        Returns:
            None where nobody opened it.

        Raises:
            RoundFailed: there is no sum, with the reason.
        """
        raise NotImplementedError(f"{type(self).__name__} must define summed.")

    # -- at a client --------------------------------------------------------------------------------------------------

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """The client's half of a sum around its half of the method."""
        if received.numbers.get(PART) == "sensitivity":
            slope, _ = await client.gradient(received.params)
            size = joined(t.abs() for _, t in sorted(slope.items()))
            return await self.give(client, received, size / size.max().clamp_min(1e-30), None)
        rest = {name: part for name, part in received.parts.items() if name != PART}
        upload = await function(algorithm, client, Received.of(rest, received.numbers))
        weight = upload.weight if self.weighting == "examples" else 1.0
        share = weight / self.settings.max_weight if self.weighting == "examples" else 1.0
        order = sorted((part, name) for part in upload.parts for name in upload[part])
        row = joined(upload[part][name] for part, name in order) * share
        mask = None if PART not in received.parts else received[PART]["mask"].bool()
        hidden, shown = (row, None) if mask is None else (row[mask], row[~mask])
        if shown is not None and self.settings.noise:
            secret = self.settings.noise_key == "secret"
            draw = secret_stream() if secret else torch_stream(self.seed, "open", client.id, client.round)
            uniform = torch.rand(shown.shape, generator=draw, dtype=torch.float64) - 0.5
            laplace = -self.settings.noise * uniform.sign() * torch.log1p(-2 * uniform.abs())
            shown = shown + laplace.float()
        return await self.give(client, received, torch.cat([torch.tensor([share], dtype=torch.float32), hidden]), shown)

    def chosen(self, total: torch.Tensor) -> torch.Tensor:
        """The mask, bool [D], by the sum of the clients' sensitivities [D]."""
        kept = max(1, round(self.settings.ratio * len(total)))
        mask = torch.zeros(len(total), dtype=torch.bool)
        mask[total.sort(descending=True, stable=True).indices[:kept]] = True
        return mask

    # -- guard --------------------------------------------------------------------------------------------------------

    def allow(self, op: str, client: str) -> None:
        """Nothing but the uploads of `work` is summed unseen."""
        only_work(op, client, "the section 'encrypted'")

    def beside(self) -> Guard:
        """Models to compare with tell nothing of a client's training."""
        return Quiet()

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """The sum of a round."""
        return _Hidden(self, method, expected)

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """Add what comes unseen, after the clients have agreed on a mask where there is to be one."""
        if not isinstance(reduction, _Hidden):
            raise TypeError(f"{type(self).__name__} collects into what it began itself.")
        sent = dict(payloads)
        try:
            if self.settings.ratio < 1 and self.mask is None:
                asked = {c: Received.of(r.parts, {**r.numbers, PART: "sensitivity"}) for c, r in sent.items()}
                found = await self.summed(server, method, asked, reduction.flat.size, deadline)
                if found is None:
                    return "the clients did not agree on what to encrypt"
                self.mask = found.hidden.bool()
                server.settle(commit=False)
            extra = {} if self.mask is None else {PART: Dense({"mask": self.mask})}
            asked = {client: Received.of({**r.parts, **extra}, r.numbers) for client, r in sent.items()}
            size = 1 + (reduction.flat.size if self.mask is None else int(self.mask.sum()))
            found = await self.summed(server, method, asked, size, deadline)
        except RoundFailed as fault:
            return str(fault)
        if found is None:
            return "nobody decrypted the sum"
        reduction.take(found)
        return None

    def memory(self) -> Tensors:
        """The mask."""
        return {} if self.mask is None else {"encrypted.mask": self.mask}

    def restore(self, facts: Json, memory: Tensors | None = None) -> None:
        """Go on with the mask of a checkpoint; keys are new."""
        self.mask = (memory or {}).get("encrypted.mask")


class _Hidden(Reduction):
    def __init__(self, guard: HiddenSum, method: Method, expected: Mapping[str, Tensors]) -> None:
        super().__init__(method.reducer, expected)
        self.guard = guard
        unknown = next((name for name in self.reducers if name not in self.expected), None)
        if unknown is not None:
            raise ModeConflict(f"The method does not say what the part '{unknown}' looks like.", "", "fedavg")
        self.flat = Flat(self.expected, self.reducers)
        self.total: torch.Tensor | None = None
        self.share = 0.0

    def take(self, found: Found) -> None:
        """The decrypted sum with its weight in front, and the sum of what travelled in the open."""
        hidden, shown, self.clients = found
        self.share = float(hidden[0])
        if shown is None:
            self.total = hidden[1:].double()
            return
        mask = self.guard.mask
        self.total = torch.zeros(self.flat.size, dtype=torch.float64)
        if mask is not None:
            self.total[mask], self.total[~mask] = hidden[1:].double(), shown

    def result(self, population: int) -> Update:
        """The mean of the sum."""
        if self.total is None or self.share <= 0 or len(self.total) != self.flat.size:
            return Update(population=population)
        parts: dict[str, Any] = dict(self.flat.parts((self.total / self.share).float()))
        weight = self.share * (self.guard.settings.max_weight if self.guard.weighting == "examples" else 1.0)
        return Update(parts, {}, clients=self.clients, population=population, weight=weight)

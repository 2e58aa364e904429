"""Guard - encrypted sums in a round of any method, whole or, with FedML-HE, of the numbers that tell most.

    work -> Enc(weight, weight x) [and what travels in the open] -> server adds -> one client decrypts the sum -> update

With `ratio` below 1 the clients agree on one mask before the first round (Jin et al., FedML-HE, arXiv 2303.10837): each
encrypts the size of its gradient, a key holder decrypts the sum and says which entries are the largest. The mask is
public, fixed and the same for all. The server never sees a single upload's masked part; it sees the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import FedLLMError, ModeConflict, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.message import Dense, Json, Received, Upload
from fedllm.core.method import Method
from fedllm.core.reducer import Reducer, Reduction, Update
from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.modes.encrypted.ckks import Keys, Public
from fedllm.modes.flat import Flat, joined
from fedllm.modes.means import weighting_of

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.modes.encrypted.settings import EncryptedSettings

PART = "encrypted"
"""The part of a message that belongs to the encrypted sum."""


class EncryptedSum(Guard):
    """Homomorphic encryption in one run; also the guard at its clients, who alone use :attr:`keys`.

    Args:
        settings: the recipe's section `encrypted`.
        method: must reduce every part by a mean of one weighting.
        seed: the run's seed, for the noise on what travels in the open.

    Raises:
        ModeConflict: a method that needs more than a sum.
        MissingExtra: TenSEAL is not installed.
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
        self.keys = Keys()
        self.public = Public(self.keys.public)
        self.mask: torch.Tensor | None = None

    # -- at a client --------------------------------------------------------------------------------------------------

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """The client's half of a sum around its half of the method."""
        rest = {name: part for name, part in received.parts.items() if name != PART}
        plain = Received.of(rest, received.numbers)
        if received.numbers.get(PART) == "sensitivity":
            slope, _ = await client.gradient(received.params)
            size = joined(t.abs() for _, t in sorted(slope.items()))
            answer = await client.exchange(self._said(size / size.max().clamp_min(1e-30), None))
            return self._opened(answer, len(size), "mask")
        upload = await function(algorithm, client, plain)
        weight = upload.weight if self.weighting == "examples" else 1.0
        share = weight / self.settings.max_weight if self.weighting == "examples" else 1.0
        order = sorted((part, name) for part in upload.parts for name in upload[part])
        row = joined(upload[part][name] for part, name in order) * share
        mask = None if PART not in received.parts else received[PART]["mask"].bool()
        hidden, shown = (row, None) if mask is None else (row[mask], row[~mask])
        if shown is not None and self.settings.noise:
            draw = torch_stream(self.seed, "open", client.id, client.round)
            uniform = torch.rand(shown.shape, generator=draw, dtype=torch.float64) - 0.5
            laplace = -self.settings.noise * uniform.sign() * torch.log1p(-2 * uniform.abs())
            shown = shown + laplace.float()
        sent = torch.cat([torch.tensor([share], dtype=torch.float32), hidden])
        return self._opened(await client.exchange(self._said(sent, shown)), len(sent), "sum")

    def _said(self, values: torch.Tensor, shown: torch.Tensor | None) -> Upload:
        """Ciphertexts, and what travels in the open."""
        found = {f"c{n:05d}": _tensor(data) for n, data in enumerate(self.keys.encrypt(values))}
        return Upload(None, **{PART: found if shown is None else {**found, "open": shown}})  # pyright: ignore

    def _opened(self, answer: Received, size: int, what: str) -> Upload:
        """What the chosen key holder gives back of a sum; nothing from the others."""
        if PART not in answer.parts:
            return Upload(None)
        total = self.keys.decrypt([_bytes(t) for _, t in sorted(answer[PART].items())], size)
        if what == "sum":
            return Upload(None, **{PART: {"sum": total}})  # pyright: ignore[reportArgumentType]
        kept = max(1, round(self.settings.ratio * size))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[total.sort(descending=True, stable=True).indices[:kept]] = True
        return Upload(None, **{PART: {"mask": mask}})  # pyright: ignore[reportArgumentType]

    # -- guard --------------------------------------------------------------------------------------------------------

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """The sum of a round."""
        return _Encrypted(self, method, expected)

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """Add what comes, and let one of the clients decrypt it."""
        if not isinstance(reduction, _Encrypted):
            raise TypeError(f"{type(self).__name__} collects into what it began itself.")
        sent = dict(payloads)
        if self.settings.ratio < 1 and self.mask is None:
            asked = {c: Received.of(r.parts, {**r.numbers, PART: "sensitivity"}) for c, r in sent.items()}
            found, _, _ = await self._summed(server, method, asked, deadline)
            if found is None:
                return "the clients did not agree on what to encrypt"
            self.mask = found["mask"].bool()
            server.settle(commit=False)
        extra = {} if self.mask is None else {PART: Dense({"mask": self.mask})}
        asked = {
            client: Received.of({**received.parts, **extra}, received.numbers) for client, received in sent.items()
        }
        found, shown, clients = await self._summed(server, method, asked, deadline)
        if found is None:
            return "nobody decrypted the sum"
        reduction.take(found["sum"], shown, clients)
        return None

    async def _summed(
        self, server: Server, method: Method, asked: Mapping[str, Received], deadline: float | None
    ) -> tuple[Tensors | None, torch.Tensor | None, int]:
        """The decrypted answer, the sum of what travelled in the open, and how many took part."""
        total: list[Any] | None = None
        shown: torch.Tensor | None = None
        sessions: dict[str, str] = {}
        async for answer in server.ask(method.work, asked, deadline):
            try:
                part = answer.upload.parts.get(PART)
                if not isinstance(part, Dense) or answer.session is None:
                    raise UploadRejected(f"Client '{answer.client}' sent something else than ciphertexts.")
                tensors = dict(part.tensors)
                clear = tensors.pop("open", None)
                if (clear is None) != (self.mask is None) or (shown is not None and clear.shape != shown.shape):
                    raise UploadRejected(f"Client '{answer.client}' shows other numbers than the mask says.")
                total = self.public.add(total, [_bytes(t) for _, t in sorted(tensors.items())])
            except FedLLMError as fault:
                if answer.session is not None:
                    server.close([answer.session])
                server.reject(answer.client, str(fault))
                continue
            if clear is not None:
                shown = clear.double() if shown is None else shown + clear.double()
            sessions[answer.client] = answer.session
        found: Tensors | None = None
        for client in sorted(sessions) if total is not None else ():
            body = {f"c{n:05d}": _tensor(data) for n, data in enumerate(self.public.bytes_of(total or []))}
            payload = Received(None, None, **{PART: body})
            async for answer in server.reply({sessions[client]: payload}, deadline):
                found = dict(answer.upload[PART])
            if found is not None:
                rest = {session: Received() for name, session in sessions.items() if name != client}
                async for _ in server.reply({s: r for s, r in rest.items() if s in server.waiting}, deadline):
                    pass
                break
        return found, shown, len(sessions)

    def report(self) -> list[str]:
        """What the server learns."""
        share = "all numbers" if self.settings.ratio == 1 else f"{self.settings.ratio:.0%} of the numbers"
        return [
            f"Homomorphic encryption: {share} of an upload are encrypted; the server learns the weighted sum, who took "
            "part and how large uploads are.",
            "- Clients share one key: a client that gives it to the server opens all uploads.",
            *(["- The other numbers travel in the open."] if self.settings.ratio < 1 else []),
        ]

    def memory(self) -> Tensors:
        """The mask."""
        return {} if self.mask is None else {"encrypted.mask": self.mask}

    def restore(self, facts: Json, memory: Tensors | None = None) -> None:
        """Go on with the mask of a checkpoint; keys are new."""
        self.mask = (memory or {}).get("encrypted.mask")


class _Encrypted(Reduction):
    def __init__(self, guard: EncryptedSum, method: Method, expected: Mapping[str, Tensors]) -> None:
        super().__init__(method.reducer, expected)
        self.guard = guard
        unknown = next((name for name in self.reducers if name not in self.expected), None)
        if unknown is not None:
            raise ModeConflict(f"The method does not say what the part '{unknown}' looks like.", "", "fedavg")
        self.flat = Flat(self.expected, self.reducers)
        self.total: torch.Tensor | None = None
        self.share = 0.0

    def take(self, hidden: torch.Tensor, shown: torch.Tensor | None, clients: int) -> None:
        """The decrypted sum with its weight in front, and the sum of what travelled in the open."""
        self.share, self.clients = float(hidden[0]), clients
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


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise UploadRejected("A ciphertext is no vector of bytes.")
    return tensor.numpy().tobytes()

"""Guard - encrypted sums whose clients share one key (what they do in a round: :mod:`fedllm.modes.encrypted.sums`).

Enc(weight, weight x) [and what travels in the open] -> server adds -> one client decrypts the sum -> update
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import FedLLMError, UploadRejected
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import Method
from fedllm.modes.encrypted.ckks import Keys, Public
from fedllm.modes.encrypted.sums import PART as PART
from fedllm.modes.encrypted.sums import Found, HiddenSum

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.modes.encrypted.settings import EncryptedSettings


class EncryptedSum(HiddenSum):
    """Homomorphic encryption under a shared key in one run; its clients alone use :attr:`keys`.

    Args:
        settings: the recipe's section `encrypted`.
        method: must reduce every part by a mean of one weighting.
        seed: the run's seed, for the noise on what travels in the open.

    Raises:
        ModeConflict: a method that needs more than a sum.
        MissingExtra: TenSEAL is not installed.
    """

    def __init__(self, settings: EncryptedSettings, method: Method, seed: int) -> None:
        super().__init__(settings, method, seed)
        self.keys = Keys()
        self.public = Public(self.keys.public)

    # -- at a client --------------------------------------------------------------------------------------------------

    async def give(self, client: Any, received: Received, values: torch.Tensor, shown: torch.Tensor | None) -> Upload:
        """Encrypt, and decrypt the sum where the server asks this client."""
        answer = await client.exchange(self._said(values, shown))
        return self._opened(answer, len(values), "mask" if received.numbers.get(PART) == "sensitivity" else "sum")

    def _said(self, values: torch.Tensor, shown: torch.Tensor | None) -> Upload:
        """Ciphertexts, and what travels in the open."""
        found = {f"c{n:05d}": _tensor(data) for n, data in enumerate(self.keys.encrypt(values))}
        return Upload(None, **{PART: found if shown is None else {**found, "open": shown}})  # pyright: ignore

    def _opened(self, answer: Received, size: int, what: str) -> Upload:
        """What the chosen key holder gives back of a sum; nothing from the others."""
        if PART not in answer.parts:
            return Upload(None)
        total = self.keys.decrypt([_bytes(t) for _, t in sorted(answer[PART].items())], size)
        return Upload(None, **{PART: {what: total if what == "sum" else self.chosen(total)}})  # pyright: ignore

    # -- at the server ------------------------------------------------------------------------------------------------

    async def summed(
        self, server: Server, method: Method, asked: Mapping[str, Received], size: int, deadline: float | None
    ) -> Found | None:
        """The decrypted answer of one client, the sum of what travelled in the open, and how many took part."""
        open_ = None if self.mask is None else (int((~self.mask).sum()),)
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
                if (None if clear is None else tuple(clear.shape)) != open_:
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
        found: torch.Tensor | None = None
        what = "mask" if self.settings.ratio < 1 and self.mask is None else "sum"
        for client in sorted(sessions) if total is not None else ():
            body = {f"c{n:05d}": _tensor(data) for n, data in enumerate(self.public.bytes_of(total or []))}
            payload = Received(None, None, **{PART: body})
            async for answer in server.reply({sessions[client]: payload}, deadline):
                part = answer.upload.parts.get(PART)
                found = part.tensors.get(what) if isinstance(part, Dense) else None
                if found is None or found.shape != (size,):
                    found = None
                    server.reject(client, f"Client '{client}' sent something else than the decrypted {what}.")
            if found is not None:
                rest = {session: Received() for name, session in sessions.items() if name != client}
                async for _ in server.reply({s: r for s, r in rest.items() if s in server.waiting}, deadline):
                    pass
                break
        return None if found is None else Found(found, shown, len(sessions))

    def report(self) -> list[str]:
        """What the server learns."""
        share = "all numbers" if self.settings.ratio == 1 else f"{self.settings.ratio:.0%} of the numbers"
        return [
            f"Homomorphic encryption: {share} of an upload are encrypted; the server learns the weighted sum, who took "
            "part and how large uploads are.",
            "- Clients share one key: a client that gives it to the server opens all uploads.",
            *(["- The other numbers travel in the open."] if self.settings.ratio < 1 else []),
        ]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise UploadRejected("A ciphertext is no vector of bytes.")
    return tensor.numpy().tobytes()

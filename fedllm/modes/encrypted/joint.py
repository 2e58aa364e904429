"""Joint - encrypted sums under threshold keys (what they do in a round: :mod:`fedllm.modes.encrypted.sums`).

    digest -> share of the key -> Enc(weight, weight x) -> partial decryption: four answers in a session of each client

The messages and their checks: :mod:`fedllm.modes.encrypted.parties`. The keys of a sum are made in its conversation and
end with it. A client that is lost before its share of the key has come is left out. From then on all are needed: where
one is lost, or what it sends is refused, the round ends and the state stays as it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import FedLLMError, UploadRejected
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import Method
from fedllm.core.tensors import Tensors
from fedllm.modes.encrypted.parties import Gathering, Party, Setup
from fedllm.modes.encrypted.sums import PART, Found, HiddenSum
from fedllm.modes.encrypted.threshold import Scheme, Threshold

if TYPE_CHECKING:
    from fedllm.core.server import Answer, Server
    from fedllm.modes.encrypted.settings import EncryptedSettings

SETUP = "encrypted.setup"
"""The number of a message that says what sum begins, and then who takes part."""


class ThresholdSum(HiddenSum):
    """Homomorphic encryption with a key in shares, in one run. It holds no key: each client's is in its conversation.

    Args:
        settings: the recipe's section `encrypted`.
        method: must reduce every part by a mean of one weighting.
        seed: the run's seed, for the noise on what travels in the open.
        scheme: how is encrypted; None for OpenFHE.

    Raises:
        ModeConflict: a method that needs more than a sum.
        MissingExtra: OpenFHE is not installed.
        ConfigError: OpenFHE is installed and cannot be used here, with the cause.
    """

    def __init__(self, settings: EncryptedSettings, method: Method, seed: int, scheme: Scheme | None = None) -> None:
        super().__init__(settings, method, seed)
        self.scheme: Scheme = scheme or Threshold()

    # -- at a client --------------------------------------------------------------------------------------------------

    async def give(self, client: Any, received: Received, values: torch.Tensor, shown: torch.Tensor | None) -> Upload:
        """Four answers of a party, whose secret is in no other place."""
        setup = Setup.of(received.numbers.get(SETUP), self.scheme)
        party = Party(self.scheme, client.id, setup, client.round, values)
        first = party.commit() if shown is None else {**party.commit(), "open": shown}
        heard = await client.exchange(_said(first))
        heard = await client.exchange(_said(party.reveal(heard.numbers.get(SETUP), heard[PART])))
        heard = await client.exchange(_said(party.encrypt(heard.numbers.get(SETUP), heard[PART])))
        return _said(party.open(heard[PART]))

    # -- at the server ------------------------------------------------------------------------------------------------

    async def summed(
        self, server: Server, method: Method, asked: Mapping[str, Received], size: int, deadline: float | None
    ) -> Found:
        """Lead the cohort through the four exchanges, and fuse the sum."""
        gathering = Gathering(self.scheme, len(asked), server.round, size)
        begin = {c: Received.of(r.parts, {**r.numbers, SETUP: asdict(gathering.setup)}) for c, r in asked.items()}
        shown: dict[str, torch.Tensor] = {}
        wanted = None if self.mask is None else (int((~self.mask).sum()),)

        def first(client: str, tensors: Tensors) -> None:
            clear = tensors.pop("open", None)
            if (None if clear is None else tuple(clear.shape)) != wanted:
                raise UploadRejected(f"Client '{client}' shows other numbers than the mask says.")
            gathering.take_digest(client, tensors)
            if clear is not None:
                shown[client] = clear.double()

        sessions: dict[str, str] = {}
        try:
            sessions = await _taken(server, first, server.ask(method.work, begin, deadline))
            for said, take in (
                (gathering.digests, gathering.take_share),
                (gathering.shares, gathering.take_ciphertext),
                (gathering.masks, gathering.take_partial),
            ):
                body = said()
                letter = Received(None, {SETUP: gathering.parties}, **{PART: body})
                replies = server.reply({sessions[client]: letter for client in sorted(sessions)}, deadline)
                sessions = await _taken(server, take, replies, last=take == gathering.take_partial)
            total = gathering.result()
        finally:
            server.close([session for session in sessions.values() if session in server.waiting])
        parties = gathering.parties
        clear = torch.stack([shown[client] for client in parties]).sum(0) if shown else None
        sensitivity = self.settings.ratio < 1 and self.mask is None
        return Found(self.chosen(total) if sensitivity else total, clear, len(parties))

    def report(self) -> list[str]:
        """What the server learns."""
        share = "all numbers" if self.settings.ratio == 1 else f"{self.settings.ratio:.0%} of the numbers"
        return [
            f"Homomorphic encryption with threshold keys: {share} of an upload are encrypted; the server adds them and "
            "opens the sum with the help of all clients of the round. It learns the weighted sum, who took part and "
            "how large uploads are.",
            "- Keys are made anew in every round, and no client's share leaves it: a client that gives its own to the "
            "server opens no upload of another, but all clients but one together know what the last one sent.",
            "- A server that does not follow the protocol can have a single upload opened in place of the sum, or play "
            "clients itself: messages are not signed.",
            f"- A number of the sum is right within {self.scheme.error(2):.1g} for 2 clients, and "
            f"{self.scheme.error(10):.1g} for 10.",
            "- A client that is lost after its share of the key has come ends the round, which then changes nothing.",
            *(
                ["- The other numbers travel in the open, and the server sees the sum of the gradients' sizes."]
                if self.settings.ratio < 1
                else []
            ),
        ]


async def _taken(
    server: Server, take: Callable[[str, Tensors], None], answers: AsyncIterator[Answer], last: bool = False
) -> dict[str, str]:
    """Take the answers of a stage; client -> session of those that were taken."""
    sessions: dict[str, str] = {}
    async for answer in answers:
        try:
            part = answer.upload.parts.get(PART)
            if not isinstance(part, Dense) or (answer.session is None) != last:
                raise UploadRejected(f"Client '{answer.client}' sent something else than a message of threshold keys.")
            take(answer.client, dict(part.tensors))
        except FedLLMError as fault:
            if answer.session is not None:
                server.close([answer.session])
            server.reject(answer.client, str(fault))
            continue
        if answer.session is not None:
            sessions[answer.client] = answer.session
    return sessions


def _said(tensors: Tensors) -> Upload:
    return Upload(None, **{PART: tensors})  # pyright: ignore[reportArgumentType]

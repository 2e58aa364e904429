"""Parties - one sum under threshold keys: its messages, a client's answers in four stages, and the server's side.

    Setup, the method's payload -> commit  -> a digest of my public share  [and what travels in the open]
    all digests                 -> reveal  -> my public share
    all public shares           -> encrypt -> c0, c1 under their sum
    c1 of the sum               -> open    -> my partial decryption

A client trains before it answers for the first time: whoever is lost in training is not part of the key. Digests come
before shares, so that nobody chooses his share by those of others; else the last one could make the joint key his own.
The four answers are made once, in this order, by one object with keys of its own. A partial decryption is tied to the
session, the shares and the c1 it answers, by a digest without a key: it finds what was replayed or exchanged, and does
not tell who sent it.

Not as in Mouchet et al., PETS 2021: there a common reference string is trusted, and shares are not committed to.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedllm.core.errors import RoundFailed, UploadRejected
from fedllm.core.message import Json
from fedllm.core.tensors import Tensors
from fedllm.modes.encrypted.threshold import Scheme, added
from fedllm.modes.secagg.keys import digest

VERSION = "fedllm-threshold-1"
MINIMUM = 2
"""Fewest parties: a sum of one is an upload."""
DIGEST = 32
"""Bytes of a digest."""


@dataclass(frozen=True)
class Setup:
    """Server to client: a sum begins.

    Attributes:
        session: 32 hexadecimal digits, random.
        asked: how many clients are asked; no more can be parties.
        scheme: the identity of the server's scheme.
    """

    session: str
    asked: int
    scheme: str

    @classmethod
    def new(cls, asked: int, scheme: Scheme) -> Setup:
        """A setup with a fresh session."""
        return cls(secrets.token_hex(16), asked, scheme.identity)

    @classmethod
    def of(cls, facts: Json, scheme: Scheme) -> Setup:
        """What a client was sent.

        Raises:
            UploadRejected: it is malformed, of another scheme, or of fewer than two clients.
        """
        facts = facts if isinstance(facts, dict) else {}
        session, asked, name = facts.get("session"), facts.get("asked"), facts.get("scheme")
        if not isinstance(session, str) or type(asked) is not int or not isinstance(name, str) or asked < MINIMUM:
            raise UploadRejected("A setup of threshold keys is malformed, or for fewer than two clients.")
        if name != scheme.identity:
            raise UploadRejected(
                f"The server encrypts by '{name}'.",
                f"This client: '{scheme.identity}'.",
                action="Install the same releases on both sides.",
            )
        return cls(session, asked, name)

    def about(self, round: int) -> bytes:
        """What all digests of this sum begin with, and where a follows from."""
        return digest(VERSION, self.session, self.asked, self.scheme, round)


class Party:
    """A client's half of one sum. It holds the client's secret, and is forgotten with the conversation.

    Args:
        scheme: how is encrypted.
        name: the client's id.
        setup: the server's.
        round: the number of the round.
        values: [D], what is summed.

    Raises:
        UploadRejected: values that are not finite, or too large for a sum of so many.
    """

    def __init__(self, scheme: Scheme, name: str, setup: Setup, round: int, values: torch.Tensor) -> None:
        self.scheme, self.name, self.setup, self._values = scheme, name, setup, values
        most, bound = float(values.abs().max()) if values.numel() else 0.0, scheme.largest / setup.asked
        if not most < bound:
            raise UploadRejected(
                f"A vector to be encrypted has a magnitude of {most:g}.",
                f"Allowed in a sum of {setup.asked}: below {bound:g}, and finite.",
            )
        self._about = setup.about(round)
        self._secret, self._share = scheme.share(self._about)
        self._stage = 0
        self._promises: dict[str, bytes] = {}
        self._joint = b""

    def commit(self) -> Tensors:
        """Stage 0: a digest of the public share."""
        self._next(0)
        return {"digest": _tensor(_promise(self._about, self.name, self._share))}

    def reveal(self, names: Json, parts: Mapping[str, torch.Tensor]) -> Tensors:
        """Stage 1: the public share.

        Args:
            names: who takes part, sorted.
            parts: their `digests`, uint8 [n, 32].

        Raises:
            UploadRejected: a list without this client or its digest, or with too few or too many.
        """
        self._next(1)
        names = self._listed(names)
        digests = _taken(parts, "digests", (len(names), DIGEST), torch.uint8)
        self._promises = {name: bytes(row.numpy()) for name, row in zip(names, digests, strict=True)}
        if self._promises[self.name] != _promise(self._about, self.name, self._share):
            raise UploadRejected(f"The client '{self.name}' is named with a digest that it did not send.")
        return {"share": self._share}

    def encrypt(self, names: Json, parts: Mapping[str, torch.Tensor]) -> Tensors:
        """Stage 2: the vector under the joint key.

        Args:
            names: whose shares make the key, sorted: of those that sent a digest, who is left.
            parts: their `shares`, int64 [n, width].

        Raises:
            UploadRejected: a share that is not the one that was promised; else as :meth:`reveal`.
        """
        self._next(2)
        names = self._listed(names)
        shares = _words(parts, "shares", (len(names), self.scheme.width), self.scheme.modulus)
        for name, share in zip(names, shares, strict=True):
            if self._promises.get(name) != _promise(self._about, name, share):
                raise UploadRejected(f"The share of the client '{name}' is not the one it promised.")
        key = joint(shares, self.scheme.modulus)
        self._joint = agreed(self._about, names, key)
        c0, c1 = self.scheme.encrypt(self._about, key, self._values)
        self._pieces = len(c1)
        return {"tag": _tensor(_tag(self._joint, self.name, "encrypt", c0, c1)), "c0": c0, "c1": c1}

    def open(self, parts: Mapping[str, torch.Tensor]) -> Tensors:
        """Stage 3: the partial decryption of the sum; the secret is forgotten.

        Args:
            parts: `c1` of the sum, int64 [pieces, width].

        Raises:
            UploadRejected: something else than a sum of such vectors.
        """
        self._next(3)
        c1 = _words(parts, "c1", (self._pieces, self.scheme.width), self.scheme.modulus)
        secret, self._secret = self._secret, None
        return {"tag": _tensor(_tag(self._joint, self.name, "open", c1)), "part": self.scheme.partial(secret, c1)}

    def _next(self, stage: int) -> None:
        if stage != self._stage:
            raise UploadRejected(f"The client '{self.name}' is asked for a stage of a sum twice, or out of turn.")
        self._stage += 1

    def _listed(self, names: Json) -> list[str]:
        """The parties, if they can be those of this sum."""
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or self.name not in names:
            raise UploadRejected(f"The client '{self.name}' is sent a list of parties without it.")
        if names != sorted(set(names)) or not MINIMUM <= len(names) <= self.setup.asked:
            raise UploadRejected(
                f"The client '{self.name}' is sent {len(names)} parties, unsorted or one twice.",
                f"Allowed: {MINIMUM} to {self.setup.asked}.",
            )
        return names


class Gathering:
    """The server's side of one sum. What it takes and refuses; it holds no key.

    Each `take_...` raises :class:`UploadRejected` for a message that cannot be used; each `...s` gives what the parties
    are sent next, and raises :class:`RoundFailed` where too few are left.

    Args:
        scheme: how is encrypted.
        asked: how many clients are asked.
        round: the number of the round.
        size: D, the length of the vectors.

    Attributes:
        parties: who takes part in the next stage, sorted; from :meth:`shares` on, whose shares make the key.
    """

    def __init__(self, scheme: Scheme, asked: int, round: int, size: int) -> None:
        self.scheme, self.size = scheme, size
        self.parties: list[str] = []
        self.setup = Setup.new(asked, scheme)
        self._about = self.setup.about(round)
        self._promises: dict[str, bytes] = {}
        self._shares: dict[str, torch.Tensor] = {}
        self._summed: set[str] = set()
        self._opened: set[str] = set()
        self._joint, self._pieces = b"", -(-size // scheme.slots)
        self._c0 = self._c1 = torch.zeros(self._pieces, scheme.width, dtype=torch.int64)

    def take_digest(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Stage 0."""
        found = bytes(_taken(parts, "digest", (DIGEST,), torch.uint8).numpy())
        if found in self._promises.values():
            raise UploadRejected(f"The client '{name}' sends the digest of another one.")
        self._promises[name] = found

    def digests(self) -> Tensors:
        """What comes before stage 1."""
        self.parties = self._enough(self._promises, "sent a digest")
        rows = [_tensor(self._promises[name]) for name in self.parties]
        return {"digests": torch.stack(rows)}

    def take_share(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Stage 1."""
        share = _words(parts, "share", (self.scheme.width,), self.scheme.modulus)
        if self._promises.get(name) != _promise(self._about, name, share):
            raise UploadRejected(f"The share of the client '{name}' is not the one it promised.")
        self._shares[name] = share

    def shares(self) -> Tensors:
        """What comes before stage 2; from here on every party is needed."""
        self.parties = self._enough(self._shares, "sent their share of the key")
        rows = torch.stack([self._shares[name] for name in self.parties])
        self._joint = agreed(self._about, self.parties, joint(rows, self.scheme.modulus))
        return {"shares": rows}

    def take_ciphertext(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Stage 2."""
        shape = (self._pieces, self.scheme.width)
        c0, c1 = (_words(parts, half, shape, self.scheme.modulus) for half in ("c0", "c1"))
        self._tagged(name, parts, self._summed, "encrypt", c0, c1)
        self._c0, self._c1 = (
            added(total, half, self.scheme.modulus) for total, half in ((self._c0, c0), (self._c1, c1))
        )

    def masks(self) -> Tensors:
        """What comes before stage 3: one half of the sum is enough to give a partial decryption."""
        self._all(self._summed, "encrypted its upload")
        return {"c1": self._c1}

    def take_partial(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Stage 3."""
        part = _words(parts, "part", (self._pieces, self.scheme.width), self.scheme.modulus)
        self._tagged(name, parts, self._opened, "open", self._c1)
        self._c0 = added(self._c0, part, self.scheme.modulus)

    def result(self) -> torch.Tensor:
        """The sum [D], float64."""
        self._all(self._opened, "gave its partial decryption")
        try:
            return self.scheme.fuse(self._c0, self.size)
        except UploadRejected as fault:
            raise RoundFailed(str(fault), "One of the parties gave a wrong one; which, cannot be told.") from fault

    def _tagged(
        self, name: str, parts: Mapping[str, torch.Tensor], seen: set[str], stage: str, *words: torch.Tensor
    ) -> None:
        """Note that a party has answered a stage, once and for this sum."""
        sent = bytes(_taken(parts, "tag", (DIGEST,), torch.uint8).numpy())
        if name in seen or name not in self._shares or sent != _tag(self._joint, name, stage, *words):
            raise UploadRejected(f"The client '{name}' sends what belongs to another sum, key or client.")
        seen.add(name)

    def _enough(self, names: Mapping[str, object], did: str) -> list[str]:
        if len(names) < MINIMUM:
            raise RoundFailed(f"Of {self.setup.asked} clients {len(names)} {did}.", f"Needed: {MINIMUM} or more.")
        return sorted(names)

    def _all(self, names: set[str], did: str) -> None:
        """All parties, or none can open the sum."""
        missing = [name for name in self.parties if name not in names]
        if missing:
            raise RoundFailed(
                f"The client '{missing[0]}' holds a share of the round's key, and has not {did}.",
                f"All {len(self.parties)} parties are needed to open a sum.",
                action="Play on: the next round makes new keys.",
            )


def joint(shares: torch.Tensor, modulus: int) -> torch.Tensor:
    """The sum of public shares [n, width]."""
    total = shares[0]
    for share in shares[1:]:
        total = added(total, share, modulus)
    return total


def agreed(about: bytes, names: list[str], key: torch.Tensor) -> bytes:
    """A digest of a joint key and of whose it is."""
    return digest("joint", about, *names, key.numpy().tobytes())


def _promise(about: bytes, name: str, share: torch.Tensor) -> bytes:
    return digest("share", about, name, share.contiguous().numpy().tobytes())


def _tag(joint: bytes, name: str, stage: str, *words: torch.Tensor) -> bytes:
    return digest(stage, joint, name, *(one.contiguous().numpy().tobytes() for one in words))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _taken(parts: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a message, if it is what it must be."""
    found = parts.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != shape:
        given = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise UploadRejected(
            f"A message of threshold keys has {given} for '{name}'.", f"Expected: {dtype} {list(shape)}."
        )
    return found


def _words(parts: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], modulus: int) -> torch.Tensor:
    """Numbers from 0 to `modulus` - 1 of a message."""
    found = _taken(parts, name, shape, torch.int64)
    if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < modulus):
        raise UploadRejected(f"A message of threshold keys has a number in '{name}' that is none modulo {modulus}.")
    return found

"""Secure client - the messages of a secure sum, and one client's answers in its five stages.

    Setup     -> advertise -> Advert    two fresh public keys
    Roster    -> share     -> Dealt     a self-mask seed and a private key, as sealed shares for the neighbours
    Deal      -> mask      -> Masked    the weight and the weighted vector, masked
    Survivors -> confirm   -> Confirm   tags by which neighbours see that all were told of the same survivors
    Tags      -> unmask    -> Reveal    shares: of the seed for who is in the sum, of the key for who dropped

A vector carries the client's own stream, and with every neighbour a common stream that one adds and the other
subtracts. Of one client the server may rebuild the seed or the key, never both: with both it could read the vector. So
a client reveals one share at most of each neighbour, only for the survivors that it confirmed, and only once.

What is left to a malicious server: without signed keys (`trusted`) it can play all other clients; it can leave out whom
it wants, down to `minimum`; it can fill a cohort with its own clients beyond the assumed corruption; and in a Harary
graph it can try seeds until its own clients surround another. So use the complete graph where the server may cheat.

Sources: Bonawitz et al., CCS 2017, figures 1 and 4; Bell et al., CCS 2020, algorithms 2 and 3. Not as there: tags under
pairwise keys stand for the signatures of the consistency check, so that it also works without a key directory, and
every client knows the roster, so that it can check graph, threshold and survivors itself.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray

from fedllm.core.errors import FedLLMError, UploadRejected
from fedllm.core.tensors import Tensors
from fedllm.modes.secagg import field
from fedllm.modes.secagg.graph import Graph, Policy, Shape, points
from fedllm.modes.secagg.keys import (
    KEY_BYTES,
    SEAL_BYTES,
    SIGNATURE_BYTES,
    KeyPair,
    SecAggError,
    ShareRefused,
    derived,
    digest,
    same,
    seal,
    sign,
    signed,
    tag,
    unseal,
)
from fedllm.modes.secagg.ring import Ring, add_mask, pack, reduced

VERSION = "fedllm-secagg-1"
SESSION_BYTES = 16
"""Bytes of a session's name, random."""
SEALED_BYTES = 2 * field.SHARE_BYTES + SEAL_BYTES
"""Bytes of one sealed pair of shares."""

Bytes = NDArray[numpy.uint8]


@dataclass(frozen=True)
class Letter:
    """A message of a secure sum.

    Attributes:
        session: the random name of the sum.
        round: the number of the round.
    """

    session: bytes
    round: int

    def to_tensors(self) -> Tensors:
        """This message as vectors of bytes (uint8), so that it can travel as a dense part."""
        facts: dict[str, Any] = {"kind": type(self).__name__}
        found: Tensors = {}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, bytes):
                facts[name] = value.hex()
            elif isinstance(value, dict):
                facts[name] = [[key, len(data)] for key, data in value.items()]
                found[name] = _tensor(b"".join(value.values()))
            elif isinstance(value, numpy.ndarray):
                found[name] = torch.from_numpy(value)
            else:
                facts[name] = value
        return {"facts": _tensor(json.dumps(facts).encode()), **found}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The message that :meth:`to_tensors` made vectors of; raises UploadRejected for anything else."""
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if any(array.dtype != numpy.uint8 or array.ndim != 1 for array in arrays.values()):
                raise ValueError("a tensor that is no vector of bytes")
            facts = json.loads(arrays.pop("facts").tobytes())
            if facts.pop("kind") != cls.__name__:
                raise ValueError("another kind of message")
            made = {f.name: _read(str(f.type), facts.pop(f.name, None), arrays.pop(f.name, None)) for f in fields(cls)}
            if facts or arrays:
                raise ValueError(f"the unexpected field '{next(iter((*facts, *arrays)))}'")
            return cls(**made)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as fault:
            raise UploadRejected(f"A message is no {cls.__name__} of a secure sum: {fault}.") from fault


@dataclass(frozen=True)
class Setup(Letter):
    """Server to client: a sum begins.

    Attributes:
        seed: 32 random bytes, from which the order of the graph follows.
        settings: a digest of what client and server must have the same (see :func:`settings_digest`).
    """

    seed: bytes
    settings: bytes


@dataclass(frozen=True)
class Advert(Letter):
    """Client to server: its public keys.

    Attributes:
        mask_key: for the common streams; its private half is shared.
        transport_key: for sealed shares and tags.
        signature: of both keys, session, round and name, by the client's lasting key; or empty.
    """

    mask_key: bytes
    transport_key: bytes
    signature: bytes


@dataclass(frozen=True)
class Roster(Letter):
    """Server to client: who takes part, and the neighbours' keys.

    Attributes:
        clients: all who advertised, sorted.
        keys: neighbour -> mask key, transport key and signature, one behind the other.
    """

    clients: tuple[str, ...]
    keys: dict[str, bytes]


@dataclass(frozen=True)
class Dealt(Letter):
    """Client to server: its shares.

    Attributes:
        commitment: a digest of the seed, by which the server knows the right one.
        sealed: neighbour -> the share of the seed and that of the private key, sealed for it.
    """

    commitment: bytes
    sealed: dict[str, bytes]


@dataclass(frozen=True)
class Deal(Letter):
    """Server to client: the shares it has to keep.

    Attributes:
        sharers: who dealt, sorted; they take part in the masks.
        sealed: neighbour -> what it sealed for this client.
    """

    sharers: tuple[str, ...]
    sealed: dict[str, bytes]


@dataclass(frozen=True)
class Masked(Letter):
    """Client to server: its masked vector.

    Attributes:
        vector: uint8 [bytes], see :func:`~fedllm.modes.secagg.ring.pack`.
        refused: neighbours whose share could not be opened.
    """

    vector: Bytes
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Survivors(Letter):
    """Server to client: whose vectors are in the sum, and which sharers dropped; both sorted."""

    alive: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Confirm(Letter):
    """Client to server: neighbour in the sum -> a tag of the survivors for it."""

    tags: dict[str, bytes]


@dataclass(frozen=True)
class Tags(Letter):
    """Server to client: neighbour -> its tag for this client."""

    tags: dict[str, bytes]


@dataclass(frozen=True)
class Reveal(Letter):
    """Client to server: what unmasks the sum.

    Attributes:
        seeds: client in the sum -> the share of its seed.
        keys: client that dropped -> the share of its private key.
    """

    seeds: dict[str, bytes]
    keys: dict[str, bytes]


def settings_digest(size: int, ring: Ring, policy: Policy) -> bytes:
    """32 bytes that are the same only where the size of the vector, the ring and the policy are."""
    return digest(VERSION, size, ring.identity(), policy.identity())


def context(setup: Setup, clients: Iterable[str]) -> bytes:
    """32 bytes that name this sum and its roster; whatever is sealed, derived or tagged is bound to them."""
    return digest(VERSION, setup.session, setup.round, setup.seed, setup.settings, *sorted(clients))


def mask_seed(agreed: bytes, about: bytes, one: str, other: str) -> bytes:
    """The seed of the stream that two neighbours have in common."""
    return derived(agreed, "mask", about, *sorted((one, other)))


def commitment(about: bytes, client: str, seed: bytes) -> bytes:
    """A digest of a client's seed: 256 random bits, so that it does not tell the seed."""
    return digest("seed", about, client, seed)


def advertised(setup: Setup, client: str, mask_key: bytes, transport_key: bytes) -> tuple[bytes | str | int, ...]:
    """What the signature of an advert is over."""
    return (VERSION, "advert", setup.session, setup.round, setup.seed, setup.settings, client, mask_key, transport_key)


@dataclass(frozen=True)
class _Neighbour:
    """What a client knows of a neighbour: its public mask key, and the two keys they have in common."""

    mask_key: bytes
    sealing: bytes
    tagging: bytes


class Client:
    """One client's half of one secure sum. Each method answers one message once; a new sum needs a new object.

    An answer that is refused (an error) leaves the client where it was: nothing was revealed.

    Args:
        name: the client's id.
        size: entries of the vector.
        ring: how floats become integers; from the client's own recipe.
        policy: what the cohort must withstand; likewise.
        signing: its lasting private Ed25519 key, 32 bytes; None to sign nothing.
        trusted: client -> lasting public key, known beforehand; None to take the server's word for the keys.
    """

    def __init__(
        self,
        name: str,
        size: int,
        ring: Ring,
        policy: Policy,
        signing: bytes | None = None,
        trusted: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name, self.size, self.ring, self.policy = name, size, ring, policy
        self._signing, self._trusted = signing, trusted
        self._next: type[Letter] | None = Setup
        self._mask_keys, self._transport_keys = KeyPair.new(), KeyPair.new()
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._neighbours: dict[str, _Neighbour] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self.refused: dict[str, FedLLMError] = {}
        """Neighbours whose share could not be opened, and why."""

    def advertise(self, setup: Setup) -> Advert:
        """Stage 0: two public keys.

        Raises:
            SecAggError: another stage, or a server with other settings.
        """
        self._expects(setup, Setup)
        if setup.settings != settings_digest(self.size, self.ring, self.policy):
            raise self._error("has other settings than this client", "Ring, policy and size must be the same.")
        if len(setup.session) != SESSION_BYTES or len(setup.seed) != KEY_BYTES:
            raise self._error("has a session or a seed of another length")
        keys = self._mask_keys.public, self._transport_keys.public
        signature = sign(self._signing, *advertised(setup, self.name, *keys)) if self._signing else b""
        self._setup, self._next = setup, Roster
        return Advert(setup.session, setup.round, *keys, signature)

    def share(self, roster: Roster) -> Dealt:
        """Stage 1: the seed and the private mask key, shared among the neighbours.

        Raises:
            SecAggError: another stage, a cohort that is too small, or other neighbours than the graph has.
            ConfigError: a cohort that cannot withstand what the policy assumes.
            UploadRejected: a key that cannot be used.
        """
        self._expects(roster, Roster)
        self._cohort("roster", roster.clients)
        self._shape: Shape = self.policy.shape(len(roster.clients))
        self._graph = Graph.of(roster.clients, self._shape.degree, self._setup.seed)
        self._about = context(self._setup, roster.clients)
        self._neighbours = self._met(roster)
        places = points(roster.clients)
        at = [places[holder] for holder in self._graph.holders(self.name)]
        secret = (self._seed, self._mask_keys.private)
        seeds, privates = (field.split_bytes(one, at, self._shape.threshold) for one in secret)
        self._held = {self.name: (seeds[places[self.name]], privates[places[self.name]])}
        sealed = {
            name: seal(known.sealing, seeds[places[name]] + privates[places[name]], self._about, self.name, name)
            for name, known in self._neighbours.items()
        }
        self._next = Deal
        promise = commitment(self._about, self.name, self._seed)
        return Dealt(roster.session, roster.round, promise, sealed)

    def mask(
        self, deal: Deal, values: NDArray[Any], weight: float = 1.0, rng: numpy.random.Generator | None = None
    ) -> Masked:
        """Stage 2: the weighted vector, masked. Shares that cannot be opened are named in the answer.

        Args:
            deal: the server's message.
            values: floats [size].
            weight: see :meth:`Ring.encode`.
            rng: rounds at random; None to the nearest.

        Raises:
            SecAggError: another stage, too few sharers, shares that are missing; a second vector under the same masks.
            ShareRefused: fewer than the threshold of the shares can be opened.
            UploadRejected: the vector or the weight is out of its bounds.
        """
        self._expects(deal, Deal)
        self._cohort("list of sharers", deal.sharers)
        peers = self._peers(deal.sharers)
        if deal.sealed.keys() != set(peers) or not set(deal.sharers) <= set(self._graph.order):
            raise self._error("deals other shares than those of the neighbours")
        if values.shape != (self.size,):
            raise UploadRejected(f"A vector of shape {values.shape} was given.", f"Expected: ({self.size},).")
        words = self.ring.encode(values, weight, rng)
        self._open(deal)
        add_mask(words, derived(self._seed, "self", self._about))
        for name in peers:
            agreed = self._mask_keys.agree(self._neighbours[name].mask_key)
            add_mask(words, mask_seed(agreed, self._about, self.name, name), subtract=self.name > name)
        self._sharers, self._next = deal.sharers, Survivors
        vector = pack(reduced(words, self.ring.bits), self.ring.bits)
        return Masked(deal.session, deal.round, vector, tuple(sorted(self.refused)))

    def confirm(self, survivors: Survivors) -> Confirm:
        """Stage 3: tags of the survivors for the neighbours among them. No other survivors are answered afterwards.

        Raises:
            SecAggError: another stage; survivors that are too few, not joined by masks, or without this client; lists
                that are not the sharers, or name one both alive and dropped.
        """
        self._expects(survivors, Survivors)
        alive, dropped = set(survivors.alive), set(survivors.dropped)
        if alive & dropped:
            raise self._error(
                f"names '{min(alive & dropped)}' both in the sum and dropped",
                "Both shares of one client would let the server read its vector; neither is given.",
            )
        if sorted((*survivors.alive, *survivors.dropped)) != sorted(self._sharers):
            raise self._error("names other clients than those that shared")
        self._cohort("list of survivors", survivors.alive)
        if not self._graph.connected(alive):
            raise self._error("leaves survivors that no masks join", "The server would learn the sums of parts.")
        self._told = digest("survivors", self._about, *sorted(alive), "dropped", *sorted(dropped))
        self._survivors, self._next = survivors, Tags
        tags = {name: self._tag(name, self.name, name) for name in self._peers(survivors.alive)}
        return Confirm(survivors.session, survivors.round, tags)

    def unmask(self, tags: Tags) -> Reveal:
        """Stage 4: the shares for the survivors that were confirmed.

        Raises:
            SecAggError: another stage, or fewer neighbours than the threshold were told of the same survivors.
        """
        self._expects(tags, Tags)
        peers = self._peers(self._survivors.alive)
        equal = sum(same(tags.tags.get(name, b""), self._tag(name, name, self.name)) for name in peers)
        if equal + 1 < self._shape.threshold:
            raise self._error(
                f"shows that {equal} neighbours were told of the same survivors",
                f"Needed: {self._shape.threshold - 1}. Nothing is revealed.",
            )
        self._next = None
        alive, dropped = self._survivors.alive, self._survivors.dropped
        return Reveal(
            tags.session,
            tags.round,
            {name: self._held[name][0] for name in alive if name in self._held},
            {name: self._held[name][1] for name in dropped if name in self._held},
        )

    def _expects(self, letter: Letter, kind: type[Letter]) -> None:
        if self._next is not kind or type(letter) is not kind:
            wanted = "nothing more" if self._next is None else self._next.__name__
            raise SecAggError(
                f"The client '{self.name}' was sent {type(letter).__name__} for {kind.__name__} of a secure sum.",
                f"Expected: {wanted}. Each message is answered once.",
            )
        if kind is not Setup and (letter.session, letter.round) != (self._setup.session, self._setup.round):
            raise self._error(f"belongs to another session, or to round {letter.round}")

    def _error(self, what: str, allowed: str = "") -> SecAggError:
        return SecAggError(f"A message of the secure sum to the client '{self.name}' {what}.", allowed)

    def _cohort(self, what: str, clients: tuple[str, ...]) -> None:
        """Refuse a list that is too small, without this client, or with a client twice."""
        if len(set(clients)) != len(clients) or self.name not in clients:
            raise self._error(f"has a {what} with a client twice, or without this one")
        if len(clients) < self.policy.minimum:
            raise self._error(f"has a {what} of {len(clients)} clients", f"Allowed: {self.policy.minimum} or more.")

    def _peers(self, among: tuple[str, ...]) -> list[str]:
        """The neighbours among these clients, sorted."""
        return sorted(self._neighbours.keys() & set(among))

    def _met(self, roster: Roster) -> dict[str, _Neighbour]:
        """The neighbours with the keys they have in common with this client."""
        if roster.keys.keys() != set(self._graph.neighbours(self.name)):
            raise self._error("has the keys of other clients than the graph's neighbours")
        found: dict[str, _Neighbour] = {}
        seen = {self._mask_keys.public, self._transport_keys.public}
        for name, keys in roster.keys.items():
            mask_key, transport_key = keys[:KEY_BYTES], keys[KEY_BYTES : 2 * KEY_BYTES]
            if len(keys) not in (2 * KEY_BYTES, 2 * KEY_BYTES + SIGNATURE_BYTES):
                raise self._error(f"has keys of '{name}' that are of another length")
            if mask_key == transport_key or seen & {mask_key, transport_key}:
                raise self._error(f"has a key of '{name}' twice, or somebody else's too")
            seen |= {mask_key, transport_key}
            if self._trusted is not None and not signed(
                self._trusted.get(name), keys[2 * KEY_BYTES :], *advertised(self._setup, name, mask_key, transport_key)
            ):
                raise self._error(f"has keys of '{name}' that its lasting key did not sign")
            agreed = self._transport_keys.agree(transport_key)
            pair = sorted((self.name, name))
            sealing, tagging = (derived(agreed, purpose, self._about, *pair) for purpose in ("seal", "tag"))
            found[name] = _Neighbour(mask_key, sealing, tagging)
        return found

    def _open(self, deal: Deal) -> None:
        """Keep the shares that can be opened, and note the others."""
        held, refused = {self.name: self._held[self.name]}, {}
        for name, sealed in deal.sealed.items():
            try:
                text = unseal(self._neighbours[name].sealing, sealed, self._about, name, self.name)
                pair = text[: field.SHARE_BYTES], text[field.SHARE_BYTES :]
                if any(field.element(one) is None for one in pair):
                    raise ShareRefused(f"The shares of '{name}' are no elements of the field.")
                held[name] = pair
            except ShareRefused as fault:
                refused[name] = fault
        if len(held) < self._shape.threshold:
            raise ShareRefused(
                f"The client '{self.name}' can open {len(held)} of {len(deal.sealed) + 1} shares.",
                f"Needed: {self._shape.threshold}.",
                action="Start another round.",
            )
        self._held, self.refused = held, refused

    def _tag(self, neighbour: str, sender: str, receiver: str) -> bytes:
        return tag(self._neighbours[neighbour].tagging, self._told, sender, receiver)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(numpy.frombuffer(data, numpy.uint8).copy())


def _read(kind: str, fact: Any, array: Bytes | None) -> Any:
    """The value of a field of this type; raises ValueError, TypeError or AttributeError where it has another."""
    if kind == "Bytes":
        if array is None:
            raise ValueError("a vector is missing")
        return array
    if kind == "bytes":
        return bytes.fromhex(fact)
    if kind == "int":
        if type(fact) is not int:
            raise ValueError("a number is missing")
        return fact
    names = [key for key, _ in fact] if kind.startswith("dict") else list(fact)
    if not isinstance(fact, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("a list of clients with another than text, or one twice")
    if kind.startswith("tuple"):
        return tuple(names)
    lengths, data = [length for _, length in fact], b"" if array is None else array.tobytes()
    if any(type(length) is not int or length < 0 for length in lengths) or sum(lengths) != len(data):
        raise ValueError("other lengths than those told")
    ends = numpy.cumsum([0, *lengths]).tolist()
    return {name: data[ends[n] : ends[n + 1]] for n, name in enumerate(names)}

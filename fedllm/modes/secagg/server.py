"""Secure server - collects the five answers of a cohort, survives drops at every stage, and finds the sum.

The server takes what arrives with :meth:`Server.receive`, and closes a stage with :meth:`Server.advance` when all have
answered or the time is up; whoever did not answer has dropped. It holds one masked vector, the running sum, however
many clients there are. Before the first secret is asked for it makes sure that enough shares are left for all of them:
a round that fails has revealed nothing.

Sources: as in :mod:`~fedllm.modes.secagg.client`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Never

import numpy

from fedllm.core.errors import ConfigError, FedLLMError, RoundFailed, UploadRejected
from fedllm.modes.secagg import field
from fedllm.modes.secagg.client import (
    SEALED_BYTES,
    SESSION_BYTES,
    Advert,
    Confirm,
    Deal,
    Dealt,
    Letter,
    Masked,
    Reveal,
    Roster,
    Setup,
    Survivors,
    Tags,
    advertised,
    commitment,
    context,
    mask_seed,
    settings_digest,
)
from fedllm.modes.secagg.graph import Graph, Policy, Shape, points
from fedllm.modes.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES, KeyPair, SecAggError, derived, same, signed
from fedllm.modes.secagg.ring import Ring, Total, Words, add_mask, reduced, unpack

STAGES: tuple[type[Letter], ...] = (Advert, Dealt, Masked, Confirm, Reveal)
"""What is collected, in order."""


class Server:
    """The server's half of one secure sum; a new sum needs a new object.

    Args:
        invited: the ids of the cohort.
        size: entries of a vector.
        ring: how floats become integers; its `count` is at least the cohort.
        policy: what the cohort must withstand.
        round: the number of the round.
        trusted: client -> lasting public Ed25519 key; None takes unsigned keys.

    Raises:
        ConfigError: a cohort below the minimum, beyond the ring, or that cannot withstand what the policy assumes.
    """

    def __init__(
        self,
        invited: Collection[str],
        size: int,
        ring: Ring,
        policy: Policy,
        round: int = 0,
        trusted: Mapping[str, bytes] | None = None,
    ) -> None:
        if not policy.minimum <= len(set(invited)) <= ring.count:
            raise ConfigError(
                f"A secure sum of {len(set(invited))} clients was asked for.",
                f"Allowed: {policy.minimum} (the minimum) to {ring.count} (what the ring holds).",
                action="Change the cohort, or the ring's count.",
            )
        policy.shape(len(set(invited)))
        self.size, self.ring, self.policy, self.trusted = size, ring, policy, trusted
        self.setup = Setup(
            secrets.token_bytes(SESSION_BYTES),
            round,
            secrets.token_bytes(KEY_BYTES),
            settings_digest(size, ring, policy),
        )
        """The first message, the same for every client."""
        self.refusals: dict[str, list[FedLLMError]] = {}
        """Client -> why something of it was refused."""
        self._invited = self._asked = frozenset(invited)
        self._stage: int | None = 0
        self._got: dict[str, Letter] = {}
        self._probe = KeyPair.new()
        self._adverts: dict[str, Advert] = {}
        self._keys: set[bytes] = set()
        self._dealt: dict[str, Dealt] = {}
        self._refused: dict[str, tuple[str, ...]] = {}
        self._alive: tuple[str, ...] = ()
        self._sum: Words = numpy.zeros(ring.length(size), numpy.uint32)

    @property
    def expects(self) -> type[Letter] | None:
        """What is collected now; None when the sum was found or has failed."""
        return None if self._stage is None else STAGES[self._stage]

    @property
    def waiting(self) -> frozenset[str]:
        """Who was asked and has not answered."""
        return frozenset() if self._stage is None else self._asked - self._got.keys()

    @property
    def shape(self) -> Shape:
        """Degree and threshold; there from the second stage on."""
        return self._shape

    def receive(self, sender: str, letter: Letter) -> None:
        """Take one answer. `sender` is who the transport says it is, not what a message claims.

        Raises:
            SecAggError: of another session or round, too late or too early, twice, or from one who was not asked.
            UploadRejected: malformed.

        What is refused changes nothing but :attr:`refusals`: the sum goes on without it.
        """
        try:
            self._admit(sender, letter)
            take: dict[type[Letter], Callable[..., None]] = {
                Advert: self._advert,
                Dealt: self._shares,
                Masked: self._masked,
                Confirm: self._confirm,
                Reveal: self._reveal,
            }
            take[type(letter)](sender, letter)
        except FedLLMError as fault:
            if sender in self._invited:
                self.refusals.setdefault(sender, []).append(fault)
            raise
        # A vector is in the sum already; its bytes need not be kept.
        self._got[sender] = Letter(letter.session, letter.round) if isinstance(letter, Masked) else letter

    def advance(self) -> dict[str, Letter]:
        """Close the stage: who has not answered has dropped.

        Returns:
            The next message for each client that is still in; empty when the sum can be read (:meth:`result`).

        Raises:
            RoundFailed: too few clients or shares are left. Nothing was revealed, and nothing can be any more.
        """
        closing = (self._roster, self._deal, self._survivors, self._tags, dict)
        if self._stage is None or self._stage + 1 == len(STAGES):
            raise SecAggError("The last stage of the secure sum is closed by reading its result.")
        letters = closing[self._stage]()
        self._asked, self._got, self._stage = frozenset(letters), {}, self._stage + 1
        return letters

    def result(self) -> Total:
        """Unmask the sum of the survivors' vectors.

        Raises:
            SecAggError: another stage.
            RoundFailed: too few right shares came, or the sum is none of vectors within the bounds.
        """
        if self.expects is not Reveal:
            raise SecAggError("The secure sum cannot be read yet, or was read, or has failed.")
        reveals = {name: letter for name, letter in self._got.items() if isinstance(letter, Reveal)}
        self._enough(reveals)
        for name in self._alive:
            shares = {holder: letter.seeds[name] for holder, letter in reveals.items() if name in letter.seeds}
            seed = self._secret(name, "seed", shares, self._is_seed)
            add_mask(self._sum, derived(seed, "self", self._about), subtract=True)
        for name in self._gone():
            shares = {holder: letter.keys[name] for holder, letter in reveals.items() if name in letter.keys}
            self._cancel(name, KeyPair.of(self._secret(name, "key", shares, self._is_key)))
        self._stage = None
        return self.ring.decode(reduced(self._sum, self.ring.bits), len(self._alive))

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, sorted; there after the third stage."""
        return self._alive

    def _admit(self, sender: str, letter: Letter) -> None:
        what = f"{type(letter).__name__} of the client '{sender}'"
        if (letter.session, letter.round) != (self.setup.session, self.setup.round):
            raise SecAggError(f"{what} belongs to another secure sum, or to round {letter.round}.")
        if type(letter) not in STAGES or type(letter) is not self.expects:
            wanted = "nothing more" if self.expects is None else self.expects.__name__
            raise SecAggError(f"{what} came too late or too early.", f"Expected: {wanted}.")
        if sender not in self._asked:
            raise SecAggError(f"{what} was not asked for: it is not in this sum, or dropped out of it.")
        if sender in self._got:
            raise SecAggError(f"{what} came twice.", "The first one counts.")

    def _advert(self, sender: str, letter: Advert) -> None:
        keys = letter.mask_key, letter.transport_key
        for key in keys:
            self._probe.agree(key)
        if keys[0] == keys[1] or self._keys & set(keys):
            raise UploadRejected(f"The client '{sender}' advertises a key twice, or somebody else's.")
        if len(letter.signature) not in (0, SIGNATURE_BYTES):
            raise UploadRejected(f"The client '{sender}' has a signature of {len(letter.signature)} bytes.")
        if self.trusted is not None and not signed(
            self.trusted.get(sender), letter.signature, *advertised(self.setup, sender, *keys)
        ):
            raise UploadRejected(f"The keys of the client '{sender}' are not signed by its lasting key.")
        self._adverts[sender] = letter
        self._keys |= set(keys)

    def _roster(self) -> dict[str, Letter]:
        clients = tuple(sorted(self._adverts))
        self._numerous(clients, "advertised keys")
        try:
            self._shape = self.policy.shape(len(clients))
        except ConfigError as fault:
            self._fail(f"{len(clients)} clients are left: {fault}")
        self._graph = Graph.of(clients, self._shape.degree, self.setup.seed)
        self._about = context(self.setup, clients)
        self._points = points(clients)
        keys = {name: a.mask_key + a.transport_key + a.signature for name, a in self._adverts.items()}
        return {
            name: self._letter(Roster, clients, {other: keys[other] for other in self._graph.neighbours(name)})
            for name in clients
        }

    def _shares(self, sender: str, letter: Dealt) -> None:
        if letter.sealed.keys() != set(self._graph.neighbours(sender)):
            raise UploadRejected(f"The client '{sender}' deals shares to others than its neighbours.")
        if len(letter.commitment) != KEY_BYTES or any(len(one) != SEALED_BYTES for one in letter.sealed.values()):
            raise UploadRejected(
                f"The client '{sender}' sent a share or a commitment of another length.",
                f"Expected: {SEALED_BYTES} and {KEY_BYTES} bytes.",
            )
        self._dealt[sender] = letter

    def _deal(self) -> dict[str, Letter]:
        sharers = tuple(sorted(self._dealt))
        self._numerous(sharers, "shared their keys")
        # A client with too few holders cannot be left out instead: its neighbour on the ring would have too few, and so
        # on round the ring.
        self._enough(sharers, sharers)
        return {
            name: self._letter(
                Deal,
                sharers,
                {
                    other: self._dealt[other].sealed[name]
                    for other in self._graph.neighbours(name)
                    if other in self._dealt
                },
            )
            for name in sharers
        }

    def _masked(self, sender: str, letter: Masked) -> None:
        if not set(letter.refused) <= set(self._graph.neighbours(sender)) & self._dealt.keys():
            raise UploadRejected(f"The client '{sender}' refuses shares that it was not sent.")
        words = unpack(letter.vector, self.ring.bits, self._sum.size)
        self._sum += words
        self._refused[sender] = letter.refused
        for dealer in letter.refused:
            fault = UploadRejected(f"The client '{sender}' could not open the share of the client '{dealer}'.")
            self.refusals.setdefault(dealer, []).append(fault)

    def _survivors(self) -> dict[str, Letter]:
        self._alive = tuple(sorted(self._got))
        dropped = tuple(sorted(self._dealt.keys() - self._got.keys()))
        self._numerous(self._alive, "sent a vector")
        if not self._graph.connected(self._alive):
            self._fail("the clients that are left are not joined by masks")
        self._enough(self._alive)
        return {name: self._letter(Survivors, self._alive, dropped) for name in self._alive}

    def _confirm(self, sender: str, letter: Confirm) -> None:
        peers = set(self._graph.neighbours(sender)) & set(self._alive)
        if letter.tags.keys() != peers or any(len(one) != TAG_BYTES for one in letter.tags.values()):
            raise UploadRejected(f"The client '{sender}' sent tags for others than its neighbours in the sum.")

    def _tags(self) -> dict[str, Letter]:
        letters: dict[str, Letter] = {}
        confirms = {name: letter.tags for name, letter in self._got.items() if isinstance(letter, Confirm)}
        for name in sorted(confirms):
            tags = {other: confirms[other][name] for other in self._graph.neighbours(name) if other in confirms}
            if len(tags) + 1 >= self._shape.threshold:
                letters[name] = self._letter(Tags, tags)
        self._enough(letters)
        return letters

    def _reveal(self, sender: str, letter: Reveal) -> None:
        near = set(self._graph.holders(sender)) - set(self._refused[sender])
        alive, gone = near & set(self._alive), (near & self._dealt.keys()) - set(self._alive)
        if letter.seeds.keys() != alive or letter.keys.keys() != gone:
            raise UploadRejected(f"The client '{sender}' reveals other shares than it was asked for.")
        if any(field.element(share) is None for share in (*letter.seeds.values(), *letter.keys.values())):
            raise UploadRejected(f"The client '{sender}' reveals a share that is no element of the field.")

    def _held(self, name: str, among: Collection[str]) -> list[str]:
        """Who of `among` holds a share of this client's secrets that it could open."""
        return [h for h in self._graph.holders(name) if h in among and name not in self._refused.get(h, ())]

    def _gone(self) -> list[str]:
        """Dropped clients whose common streams are in the sum."""
        alive = set(self._alive)
        dropped = sorted(self._dealt.keys() - alive)
        return [name for name in dropped if alive & set(self._graph.neighbours(name))]

    def _enough(self, among: Collection[str], needed: Iterable[str] | None = None) -> None:
        """Fail where `among` hold too few shares of a client whose secret is needed: by default, to unmask the sum."""
        for name in (*self._alive, *self._gone()) if needed is None else needed:
            count = len(self._held(name, among))
            if count < self._shape.threshold:
                self._fail(f"{count} shares of the client '{name}' are left, and {self._shape.threshold} are needed")

    def _numerous(self, clients: Collection[str], did: str) -> None:
        if len(clients) < self.policy.minimum:
            self._fail(f"{len(clients)} clients {did}, and at least {self.policy.minimum} are needed")

    def _fail(self, why: str) -> Never:
        self._stage = None
        self._got, self._dealt = {}, {}
        self._sum.fill(0)
        bad = ", ".join(f"'{name}'" for name in sorted(self.refusals))
        raise RoundFailed(
            f"The secure sum of round {self.setup.round} cannot be found: {why}.",
            f"Something was refused of: {bad}." if bad else "",
            action="Start the round again, with more clients or a policy for more drops.",
        )

    def _is_seed(self, name: str, found: bytes) -> bool:
        return same(commitment(self._about, name, found), self._dealt[name].commitment)

    def _is_key(self, name: str, found: bytes) -> bool:
        return KeyPair.of(found).public == self._adverts[name].mask_key

    def _secret(self, name: str, what: str, shares: Mapping[str, bytes], accept: Callable[[str, bytes], bool]) -> bytes:
        """Rebuild a secret of the client `name`; who holds a share that does not fit is noted."""
        values = {self._points[holder]: int.from_bytes(share, "big") for holder, share in sorted(shares.items())}
        found = field.recover(values, self._shape.threshold, lambda secret: accept(name, secret))
        if found is None:
            self._fail(f"the shares of the {what} of the client '{name}' do not fit together")
        secret, wrong = found
        for holder in (holder for holder in shares if self._points[holder] in wrong):
            fault = UploadRejected(f"The share of the {what} of '{name}' that '{holder}' revealed does not fit.")
            self.refusals.setdefault(holder, []).append(fault)
        return secret

    def _cancel(self, name: str, keys: KeyPair) -> None:
        """Take the common streams of a dropped client out of its neighbours' vectors."""
        for other in set(self._graph.neighbours(name)) & set(self._alive):
            seed = mask_seed(keys.agree(self._adverts[other].mask_key), self._about, name, other)
            add_mask(self._sum, seed, subtract=other < name)

    def _letter(self, kind: Callable[..., Letter], *fields: object) -> Letter:
        return kind(self.setup.session, self.setup.round, *fields)

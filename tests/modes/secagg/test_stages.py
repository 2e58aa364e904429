"""Whole secure sums: drops, replays, swaps and lies at every stage; graphs and thresholds against brute force."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("cryptography")

from fedllm.core.errors import ConfigError, FedLLMError, RoundFailed, UploadRejected
from fedllm.core.message import Upload
from fedllm.core.wire import decode, encode
from fedllm.modes.secagg import field
from fedllm.modes.secagg.client import (
    SEALED_BYTES,
    Advert,
    Client,
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
    context,
    mask_seed,
)
from fedllm.modes.secagg.graph import Graph, Policy, Shape, choose, points, tails
from fedllm.modes.secagg.keys import KeyPair, SecAggError, ShareRefused, derived, seal, signing_pair
from fedllm.modes.secagg.ring import Ring, Total, add_mask, mask, unpack
from fedllm.modes.secagg.server import STAGES, Server

SIZE = 40
METHODS = ("advertise", "share", "mask", "confirm", "unmask")
LOOSE = Policy(dropout=0.2, corruption=0.1)
HARARY = Policy("harary", 0.2, 0.1)

Change = Callable[[str, Any], Any]


class Sum:
    """One secure sum whose messages can be changed on their way; what fails is kept in `faults`."""

    def __init__(
        self,
        count: int = 10,
        policy: Policy = LOOSE,
        precision: int = 16,
        size: int = SIZE,
        seed: int = 0,
        signing: Mapping[str, tuple[bytes, bytes]] | None = None,
        invited: int | None = None,
    ) -> None:
        draw = numpy.random.default_rng(seed)
        self.names = [f"c{n:03d}" for n in range(count)]
        self.ring = Ring(invited or count, 1.0, precision, max_weight=9.0)
        trusted = {name: pair[1] for name, pair in signing.items()} if signing else None
        self.server = Server(self.names, size, self.ring, policy, round=3, trusted=trusted)
        self.clients = {
            name: Client(name, size, self.ring, policy, signing[name][0] if signing else None, trusted)
            for name in self.names
        }
        self.values = {name: draw.uniform(-1, 1, size).astype(numpy.float32) for name in self.names}
        self.weights = {name: float(draw.integers(1, 10)) for name in self.names}
        self.inbox: dict[str, Letter] = dict.fromkeys(self.names, self.server.setup)
        self.answers: dict[str, dict[str, Letter]] = {}
        self.faults: list[tuple[str, str, FedLLMError]] = []

    def answer(self, name: str, letter: Letter, stage: str) -> Any:
        given = (self.values[name], self.weights[name]) if stage == "mask" else ()
        return getattr(self.clients[name], stage)(letter, *given)

    def stage(
        self,
        stage: str,
        drop: Any = (),
        sent: Mapping[str, Change] | None = None,
        got: Mapping[str, Change] | None = None,
    ) -> None:
        """All answers of one stage; `got` changes what a client receives, `sent` what it sends."""
        self.answers[stage] = {}
        for name, letter in self.inbox.items():
            if name in drop:
                continue
            try:
                if got and name in got:
                    letter = got[name](name, letter)
                answer = self.answer(name, letter, stage)
                self.answers[stage][name] = answer
                self.server.receive(name, sent[name](name, answer) if sent and name in sent else answer)
            except FedLLMError as fault:
                self.faults.append((stage, name, fault))
        if stage != "unmask":
            self.inbox = self.server.advance()

    def run(self, drops: Mapping[str, Any] | None = None, start: str = "advertise") -> Total:
        for stage in METHODS[METHODS.index(start) :]:
            self.stage(stage, (drops or {}).get(stage, ()))
        return self.server.result()

    def to(self, stage: str, drops: Mapping[str, Any] | None = None) -> Sum:
        """All stages before this one."""
        for one in METHODS[: METHODS.index(stage)]:
            self.stage(one, (drops or {}).get(one, ()))
        return self

    def exact(self, found: Total, names: Any) -> bool:
        """Whether `found` is the plain sum of these clients' integers."""
        bits, limbs = self.ring.bits, self.ring.limbs
        plain, units = [0] * len(self.values[self.names[0]]), 0
        for name in names:
            words = [int(word) for word in self.ring.encode(self.values[name], self.weights[name])]
            plain = [p + w - 2**bits * (w >= 2 ** (bits - 1)) for p, w in zip(plain, words[limbs:], strict=True)]
            units += round(self.weights[name] / 9 * 2**24)
        return found.integers.tolist() == plain and found.share == units / 2**24


def revealed_once(one: Sum) -> None:
    """Of no client are shares of both secrets revealed, by anybody."""
    seeds, keys = set(), set()
    for letter in one.answers.get("unmask", {}).values():
        assert isinstance(letter, Reveal)
        seeds |= letter.seeds.keys()
        keys |= letter.keys.keys()
    assert not seeds & keys and seeds <= set(one.server.clients)


# Sums


@pytest.mark.parametrize("policy", [LOOSE, HARARY])
@pytest.mark.parametrize("count", [3, 4, 10, 25])
@pytest.mark.parametrize("precision", [4, 16, 22])
def test_the_sum_is_the_plain_sum(policy: Policy, count: int, precision: int) -> None:
    one = Sum(count, policy, precision)
    found = one.run()
    assert one.exact(found, one.names) and one.server.clients == tuple(one.names) and not one.faults
    weights = numpy.array([one.weights[name] for name in one.names])
    plain = sum(one.weights[name] * one.values[name].astype(float) for name in one.names) / weights.sum()
    assert numpy.abs(found.mean - plain).max() <= 0.51 * one.ring.step / (weights.mean() / 9)
    assert found.weight == pytest.approx(weights.sum(), abs=1e-5)


@pytest.mark.parametrize("policy", [LOOSE, HARARY])
@pytest.mark.parametrize("stage", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_drops_at_any_stage(policy: Policy, stage: str, seed: int) -> None:
    one = Sum(15, policy, seed=seed)
    drop = random.Random(seed).sample(one.names, 3)
    found = one.run({stage: drop})
    uploaded = one.names if stage in ("confirm", "unmask") else [name for name in one.names if name not in drop]
    assert one.exact(found, uploaded) and list(one.server.clients) == uploaded
    revealed_once(one)


@pytest.mark.parametrize("policy", [LOOSE, HARARY])
@pytest.mark.parametrize("seed", range(6))
def test_a_drop_at_every_stage_of_one_sum(policy: Policy, seed: int) -> None:
    one = Sum(30, policy, seed=seed)
    drop = random.Random(seed).sample(one.names, 5)
    found = one.run({stage: [name] for stage, name in zip(METHODS, drop, strict=True)})
    assert one.exact(found, [name for name in one.names if name not in drop[:3]])
    revealed_once(one)


@pytest.mark.parametrize("stage", METHODS)
def test_down_to_the_threshold_and_not_below(stage: str) -> None:
    # Ten clients, one of them corrupt: 2 t > 10 + 1, so six shares are needed.
    for gone in (4, 5):
        one = Sum(10)
        drop = one.names[:gone]
        if gone == 4 or stage == "advertise":  # after the adverts, the threshold is that of who is left
            found = one.run({stage: drop})
            assert one.exact(found, one.names if stage in ("confirm", "unmask") else one.names[gone:])
            continue
        with pytest.raises(RoundFailed, match="cannot be found"):
            one.run({stage: drop})
        assert one.server.expects is None and not one.server.waiting
        assert stage == "unmask" or "unmask" not in one.answers  # nobody was asked to reveal anything


def test_below_the_minimum_nothing_is_summed() -> None:
    strict = Policy(dropout=0.375, corruption=0.0, minimum=6)
    for stage in ("advertise", "share", "mask"):
        one = Sum(8, strict)
        with pytest.raises(RoundFailed, match="at least 6"):
            one.run({stage: one.names[:3]})
        with pytest.raises(SecAggError):
            one.server.advance()
        with pytest.raises(SecAggError):
            one.server.result()
    for count in (0, 1, 2, 5):
        with pytest.raises(ConfigError, match=r"6 \(the minimum\)"):
            Server([f"c{n}" for n in range(count)], 4, Ring(9, 1.0), strict)
    with pytest.raises(ConfigError, match="to 3"):
        Server(list("abcd"), 4, Ring(3, 1.0), LOOSE)
    with pytest.raises(ConfigError, match="minimum=2"):
        Policy(minimum=2)


def test_one_mask_left_hides_the_sum() -> None:
    one = Sum(6, size=20_000).to("unmask")
    left = one.server._sum.copy()
    for name in one.names[1:]:
        add_mask(left, derived(one.clients[name]._seed, "self", one.server._about), subtract=True)
    with pytest.raises(RoundFailed, match="range"):
        one.ring.decode(left & numpy.uint32(2**one.ring.bits - 1), 6)
    assert uniform(left)
    add_mask(left, derived(one.clients["c000"]._seed, "self", one.server._about), subtract=True)
    assert one.exact(one.ring.decode(left & numpy.uint32(2**one.ring.bits - 1), 6), one.names)


def test_shares_below_the_threshold_do_not_give_a_seed() -> None:
    one = Sum(10).to("unmask")
    one.stage("unmask")
    seed, place = one.clients["c004"]._seed, points(one.names)
    shares = {place[name]: int.from_bytes(a.seeds["c004"], "big") for name, a in one.answers["unmask"].items()}  # type: ignore[attr-defined]
    for few in itertools.combinations(shares, 6):
        assert field.join_bytes({x: shares[x] for x in few}) == seed
    for few in itertools.combinations(shares, 5):
        assert field.join_bytes({x: shares[x] for x in few}) != seed


def test_a_hundred_clients_in_seconds() -> None:
    one, begun = Sum(100, Policy("harary", 0.05, 0.05), size=1000), time.process_time()
    found = one.run({"share": one.names[:1], "mask": one.names[7:9], "unmask": one.names[50:52]})
    assert one.exact(found, [name for name in one.names if name not in ("c000", "c007", "c008")])
    assert one.server.shape.degree < 40
    assert time.process_time() - begun < 20  # about two


# What is seen


def uniform(words: Any) -> bool:
    """Whether the lowest bytes pass a chi-square test: 255 degrees of freedom, six deviations on either side."""
    counts, expected = numpy.bincount(words & numpy.uint32(255), minlength=256), words.size / 256
    return bool(abs(((counts - expected) ** 2 / expected).sum() - 255) < 6 * math.sqrt(2 * 255))


def test_the_test_of_uniformity_can_fail() -> None:
    ring = Ring(10, 1.0)
    assert not uniform(ring.encode(numpy.random.default_rng(0).normal(0, 1e-3, 30_000)))
    assert uniform(mask(bytes(32), 30_000)) and not uniform(numpy.zeros(30_000, numpy.uint32))


def test_a_masked_vector_looks_uniform() -> None:
    for policy in (LOOSE, HARARY):
        one = Sum(10, policy, precision=16, size=30_000)
        one.values = {name: numpy.zeros(30_000, numpy.float32) for name in one.names}
        one.to("mask").stage("mask")
        for letter in one.answers["mask"].values():
            assert isinstance(letter, Masked)
            words = unpack(letter.vector, one.ring.bits, one.ring.length(30_000))
            assert uniform(words) and uniform(words >> numpy.uint32(one.ring.bits - 8))


def test_masks_change_with_the_session_and_cancel_only_together() -> None:
    letters = []
    for _ in range(2):
        one = Sum(5, size=2000).to("mask")
        one.stage("mask")
        letters.append({name: unpack(a.vector, one.ring.bits, one.ring.length(2000)) for name, a in
                        one.answers["mask"].items() if isinstance(a, Masked)})  # fmt: skip
    for name in letters[0]:
        assert (letters[0][name] == letters[1][name]).mean() < 0.01
    for a, b in itertools.combinations(letters[0].values(), 2):
        assert (a == b).mean() < 0.01


def test_neither_weight_nor_vector_travels_in_the_clear() -> None:
    one = Sum(5, size=64).to("mask")
    one.stage("mask")
    for name, letter in one.answers["mask"].items():
        assert isinstance(letter, Masked)
        data = b"".join(tensor.numpy().tobytes() for tensor in letter.to_tensors().values())
        assert one.values[name].tobytes()[:16] not in data and str(one.weights[name]).encode() not in data
        words = unpack(letter.vector, one.ring.bits, one.ring.length(64))
        assert (words[: one.ring.limbs] != one.ring.encode(one.values[name], one.weights[name])[: one.ring.limbs]).any()


def test_the_same_values_give_the_same_sum_whatever_the_keys() -> None:
    one, two = (Sum(7, HARARY).run({"mask": ["c001"]}) for _ in range(2))
    assert (one.integers == two.integers).all() and one.share == two.share


# What a client refuses


def test_a_client_never_gives_both_shares_of_one_client() -> None:
    one = Sum(10).to("confirm", {"mask": ["c003"]})
    name, letter = "c005", one.inbox["c005"]
    assert isinstance(letter, Survivors) and letter.dropped == ("c003",)
    client = one.clients[name]
    with pytest.raises(SecAggError, match="both in the sum and dropped"):
        client.confirm(replace(letter, dropped=("c003", "c004")))
    with pytest.raises(SecAggError, match="both in the sum and dropped"):
        client.confirm(replace(letter, alive=tuple(sorted((*letter.alive, "c003")))))
    client.confirm(letter)  # a refusal has changed nothing
    moved = replace(letter, alive=tuple(n for n in letter.alive if n != "c004"), dropped=("c003", "c004"))
    with pytest.raises(SecAggError, match="answered once"):
        client.confirm(moved)
    with pytest.raises(SecAggError, match="answered once"):
        client.confirm(letter)


@pytest.mark.parametrize(
    "change",
    [
        lambda letter: replace(letter, alive=letter.alive[1:]),
        lambda letter: replace(letter, alive=(*letter.alive, "stranger")),
        lambda letter: replace(letter, alive=(*letter.alive, letter.alive[0])),
        lambda letter: replace(letter, alive=letter.alive[4:6], dropped=(*letter.alive[:4], *letter.alive[6:])),
        lambda letter: replace(letter, alive=letter.alive[:5], dropped=letter.alive[5:]),
        lambda letter: replace(letter, round=4),
        lambda letter: replace(letter, session=bytes(16)),
        lambda letter: Tags(letter.session, letter.round, {}),
    ],
)
def test_a_client_refuses_survivors_that_cannot_be(change: Callable[[Any], Any]) -> None:
    one = Sum(10).to("confirm")
    with pytest.raises(SecAggError):
        one.clients["c005"].confirm(change(one.inbox["c005"]))


def test_clients_told_of_different_survivors_reveal_nothing() -> None:
    one = Sum(10).to("confirm")
    letter = one.inbox["c000"]
    assert isinstance(letter, Survivors)
    other = replace(letter, alive=letter.alive[:-1], dropped=letter.alive[-1:])
    split = {name: (lambda _, letter, other=other: other) for name in one.names[:5]}
    # The lying server makes up the tags that the first half does not send to the client it was told is gone.
    lie = {name: (lambda _, a: replace(a, tags={**a.tags, "c009": bytes(16)})) for name in one.names[:5]}
    one.stage("confirm", got=split, sent=lie)
    assert not one.faults
    one.stage("unmask")
    assert {stage for stage, _, _ in one.faults} == {"unmask"} and len(one.faults) == 10
    assert all(isinstance(f, SecAggError) and "Nothing is revealed" in str(f) for _, _, f in one.faults)
    with pytest.raises(RoundFailed):
        one.server.result()


def test_a_second_vector_is_never_masked_with_the_same_masks() -> None:
    one = Sum(5).to("mask")
    letter = one.inbox["c001"]
    one.answer("c001", letter, "mask")
    with pytest.raises(SecAggError, match="answered once"):
        one.answer("c001", letter, "mask")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.5])
def test_a_bad_vector_is_refused_before_it_is_masked_and_its_client_drops(bad: float) -> None:
    one = Sum(10, HARARY)
    one.values["c004"][7] = bad
    found = one.run()
    assert one.exact(found, [name for name in one.names if name != "c004"])
    assert [(stage, name) for stage, name, _ in one.faults] == [("mask", "c004")]
    assert isinstance(one.faults[0][2], UploadRejected)


def test_a_vector_of_another_size_is_refused() -> None:
    one = Sum(5).to("mask")
    for values in (numpy.zeros(SIZE + 1), numpy.zeros((SIZE, 1)), numpy.zeros(0)):
        with pytest.raises(UploadRejected, match="shape"):
            one.clients["c001"].mask(one.inbox["c001"], values)


def test_a_client_with_other_settings_takes_no_part() -> None:
    setup = Sum(5).server.setup
    ring = Ring(5, 1.0, max_weight=9.0)
    others = [
        (SIZE + 1, ring, LOOSE),
        (SIZE, Ring(5, 2.0, max_weight=9.0), LOOSE),
        (SIZE, ring, HARARY),
        (SIZE, ring, replace(LOOSE, minimum=4)),
    ]
    for size, wide, policy in others:
        with pytest.raises(SecAggError, match="other settings"):
            Client("c001", size, wide, policy).advertise(setup)
    Client("c001", SIZE, ring, LOOSE).advertise(setup)
    for wrong in (replace(setup, session=b""), replace(setup, seed=b"")):
        with pytest.raises(SecAggError, match="length"):
            Client("c001", SIZE, ring, LOOSE).advertise(wrong)


def _keys(letter: Roster, name: str, keys: bytes) -> Roster:
    return replace(letter, keys={**letter.keys, name: keys})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: replace(r, clients=r.clients[4:6], keys={}), "2 clients"),
        (lambda r: replace(r, clients=r.clients[1:]), "other clients than the graph"),
        (lambda r: replace(r, clients=tuple(n for n in r.clients if n != "c005")), "without this one"),
        (lambda r: replace(r, clients=(*r.clients, r.clients[0])), "twice"),
        (lambda r: replace(r, keys={k: v for k, v in r.keys.items() if k != "c001"}), "other clients than the graph"),
        (lambda r: _keys(r, "c001", r.keys["c002"]), "somebody else's"),
        (lambda r: _keys(r, "c001", r.keys["c001"][:-1]), "length"),
        (lambda r: _keys(r, "c001", r.keys["c001"][:32] * 2), "twice"),
        (lambda r: _keys(r, "c001", r.keys["c001"][:32] + bytes(32)), "cannot be used"),
    ],
)
def test_a_client_refuses_a_roster_that_cannot_be(change: Callable[[Any], Any], match: str) -> None:
    one = Sum(10).to("share")
    letter = change(one.inbox["c005"])
    with pytest.raises((SecAggError, UploadRejected), match=match):
        one.clients["c005"].share(letter)


def test_a_mask_key_of_low_order_stops_the_vector() -> None:
    one = Sum(10).to("share")
    weak = {"c005": lambda _, r: _keys(r, "c001", bytes(32) + r.keys["c001"][32:])}
    one.stage("share", got=weak)
    with pytest.raises(UploadRejected, match="cannot be used"):
        one.answer("c005", one.inbox["c005"], "mask")


def test_a_client_does_not_take_its_own_keys_back() -> None:
    one = Sum(5).to("share")
    own = one.answers["advertise"]["c002"]
    assert isinstance(own, Advert)
    with pytest.raises(SecAggError, match="somebody else's"):
        one.clients["c002"].share(_keys(one.inbox["c002"], "c001", own.mask_key + own.transport_key))  # type: ignore[arg-type]


# Replayed, swapped, late, malformed


def test_letters_of_another_session_or_round_are_refused() -> None:
    old, new = Sum(10), Sum(10)
    old.run()
    for stage in METHODS:
        for name in new.names[:2]:
            with pytest.raises(SecAggError, match="another secure sum"):
                new.server.receive(name, old.answers[stage][name])
            with pytest.raises(SecAggError, match="another secure sum"):
                new.server.receive(name, replace(old.answers[stage][name], session=new.server.setup.session, round=2))
        new.stage(stage)
    assert new.exact(new.server.result(), new.names)


def test_replayed_shares_are_refused_by_who_should_hold_them() -> None:
    old, new = Sum(10).to("mask"), Sum(10).to("share")

    def replay(name: str, letter: Dealt) -> Dealt:
        sealed = old.answers["share"][name].sealed  # type: ignore[attr-defined]
        return replace(letter, sealed={**letter.sealed, **{n: sealed[n] for n in ("c001", "c002")}})

    new.stage("share", sent={"c007": replay})
    found = new.run(start="mask")
    assert new.exact(found, new.names) and not new.faults
    for name in ("c001", "c002"):
        assert isinstance(new.clients[name].refused["c007"], ShareRefused)
    assert len(new.server.refusals["c007"]) == 2


def test_shares_of_another_session_do_not_open_even_under_the_same_keys() -> None:
    old, new = Sum(10), Sum(10)
    for name in new.names:
        new.clients[name]._transport_keys = old.clients[name]._transport_keys
    old.to("mask")
    new.to("share").stage("share", sent={"c007": lambda name, a: replace(a, sealed=old.answers["share"][name].sealed)})  # type: ignore[attr-defined]
    with pytest.raises(RoundFailed, match="'c007'"):
        new.run(start="mask")
    assert all("c007" in client.refused for name, client in new.clients.items() if name != "c007")


def test_a_context_names_session_round_settings_and_roster() -> None:
    setup = Setup(bytes(16), 3, bytes(32), bytes(32))
    others = [
        replace(setup, session=b"1" * 16),
        replace(setup, round=4),
        replace(setup, seed=b"1" * 32),
        replace(setup, settings=b"1" * 32),
    ]
    found = [context(one, ("a", "b", "c")) for one in (setup, *others)]
    found += [context(setup, ("a", "b")), context(setup, ("a", "bc"))]
    assert len(set(found)) == len(found) and context(setup, ("c", "b", "a")) == found[0]


def test_a_common_stream_is_known_to_its_two_clients_only() -> None:
    alice, bob, eve = (KeyPair.new() for _ in range(3))
    common = mask_seed(alice.agree(bob.public), b"about", "alice", "bob")
    assert common == mask_seed(bob.agree(alice.public), b"about", "bob", "alice")
    others = [
        mask_seed(eve.agree(bob.public), b"about", "alice", "bob"),
        mask_seed(alice.agree(bob.public), b"other", "alice", "bob"),
        mask_seed(alice.agree(bob.public), b"about", "alice", "eve"),
    ]
    assert len({common, *others}) == 4


def test_swapped_shares_are_refused_and_the_sum_goes_on() -> None:
    one = Sum(10).to("share")

    def swap(name: str, letter: Dealt) -> Dealt:
        two = {"c001": letter.sealed["c002"], "c002": letter.sealed["c001"]}
        return replace(letter, sealed={**letter.sealed, **two})

    one.stage("share", sent={"c007": swap})
    # Its owner drops: its key is rebuilt from the shares that could be opened.
    found = one.run({"mask": ["c007"]}, start="mask")
    assert one.exact(found, [name for name in one.names if name != "c007"])
    assert len(one.server.refusals["c007"]) == 2
    revealed_once(one)


def test_well_sealed_shares_that_are_no_elements_are_refused() -> None:
    one = Sum(10).to("share")
    dealer = one.clients["c007"]

    def nonsense(name: str, letter: Dealt) -> Dealt:
        sealed = {
            n: seal(dealer._neighbours[n].sealing, b"\xff" * 66, dealer._about, name, n) for n in ("c001", "c002")
        }
        return replace(letter, sealed={**letter.sealed, **sealed})

    one.stage("share", sent={"c007": nonsense})
    assert one.exact(one.run(start="mask"), one.names) and not one.faults
    assert all("no elements" in str(one.clients[name].refused["c007"]) for name in ("c001", "c002"))


def test_shares_of_two_clients_swapped_by_the_server_are_refused() -> None:
    one = Sum(10).to("mask")

    def swap(name: str, letter: Deal) -> Deal:
        two = {"c001": letter.sealed["c002"], "c002": letter.sealed["c001"]}
        return replace(letter, sealed={**letter.sealed, **two})

    one.stage("mask", got={"c005": swap})
    found = one.run(start="confirm")
    assert one.exact(found, one.names) and one.clients["c005"].refused.keys() == {"c001", "c002"}


def test_a_client_that_can_open_too_few_shares_withdraws() -> None:
    one = Sum(10).to("mask")
    noise = {"c005": lambda _, letter: replace(letter, sealed={n: bytes(SEALED_BYTES) for n in letter.sealed})}
    one.stage("mask", got=noise)
    assert [(s, n) for s, n, _ in one.faults] == [("mask", "c005")] and isinstance(one.faults[0][2], ShareRefused)
    assert one.exact(one.run(start="confirm"), [name for name in one.names if name != "c005"])


def test_where_nobody_can_open_a_clients_shares_the_round_fails_unrevealed() -> None:
    one = Sum(10).to("share")
    noise = {"c007": lambda _, letter: replace(letter, sealed={n: bytes(SEALED_BYTES) for n in letter.sealed})}
    one.stage("share", sent=noise)
    with pytest.raises(RoundFailed, match="'c007'"):
        one.run(start="mask")
    assert "confirm" not in one.answers


@pytest.mark.parametrize("stage", METHODS[:-1])
def test_a_late_answer_is_refused_and_its_client_is_out(stage: str) -> None:
    one = Sum(10).to(stage)
    late = one.answer("c004", one.inbox["c004"], stage)
    one.stage(stage, ["c004"])
    with pytest.raises(SecAggError, match="late"):
        one.server.receive("c004", late)
    following = STAGES[METHODS.index(stage) + 1]
    empty = following(late.session, late.round, *[{}] * (len(fields(following)) - 2))
    with pytest.raises(SecAggError, match="not asked for"):
        one.server.receive("c004", empty)
    found = one.run(start=METHODS[METHODS.index(stage) + 1])
    assert one.exact(found, one.names if stage == "confirm" else [name for name in one.names if name != "c004"])
    assert len(one.server.refusals["c004"]) == 2
    with pytest.raises(SecAggError):
        one.server.receive("c004", late)


def test_an_answer_counts_once_and_only_from_who_was_asked() -> None:
    one = Sum(5).to("mask")
    letter = one.answer("c001", one.inbox["c001"], "mask")
    one.server.receive("c001", letter)
    with pytest.raises(SecAggError, match="twice"):
        one.server.receive("c001", letter)
    with pytest.raises(SecAggError, match="not asked for"):
        one.server.receive("stranger", letter)
    with pytest.raises(SecAggError, match="late or too early"):
        one.server.receive("c002", Confirm(letter.session, letter.round, {}))
    assert one.server.waiting == {"c000", "c002", "c003", "c004"} and "stranger" not in one.server.refusals
    one.stage("mask", ["c001"])
    assert one.exact(one.run(start="confirm"), one.names)


def test_one_clients_shares_in_anothers_name_are_refused_by_all() -> None:
    one = Sum(10).to("share")

    def as_another(name: str, letter: Dealt) -> Dealt:
        stolen = one.answers["share"]["c001"]
        assert isinstance(stolen, Dealt)
        return replace(stolen, sealed={n: stolen.sealed.get(n, bytes(SEALED_BYTES)) for n in letter.sealed})

    one.stage("share", sent={"c007": as_another})
    with pytest.raises(RoundFailed, match="'c007'"):
        one.run(start="mask")
    assert "confirm" not in one.answers


def _noise(count: int) -> numpy.ndarray[Any, Any]:
    return numpy.random.default_rng(0).integers(0, 256, count).astype(numpy.uint8)


MALFORMED: list[tuple[str, Change]] = [
    ("advertise", lambda _, a: replace(a, mask_key=bytes(32))),
    ("advertise", lambda _, a: replace(a, transport_key=b"short")),
    ("advertise", lambda _, a: replace(a, transport_key=a.mask_key)),
    ("advertise", lambda _, a: replace(a, signature=b"1")),
    ("share", lambda _, a: replace(a, sealed=dict(list(a.sealed.items())[1:]))),
    ("share", lambda _, a: replace(a, sealed={**a.sealed, "c007": bytes(SEALED_BYTES)})),
    ("share", lambda _, a: replace(a, sealed={n: s[:-1] for n, s in a.sealed.items()})),
    ("share", lambda _, a: replace(a, commitment=b"")),
    ("mask", lambda _, a: replace(a, vector=a.vector[:-1])),
    ("mask", lambda _, a: replace(a, vector=_noise(a.vector.size))),
    ("mask", lambda _, a: replace(a, refused=("stranger",))),
    ("mask", lambda _, a: replace(a, refused=("c007",))),
    ("confirm", lambda _, a: replace(a, tags={})),
    ("confirm", lambda _, a: replace(a, tags={n: b"" for n in a.tags})),
    ("unmask", lambda _, a: replace(a, seeds={})),
    ("unmask", lambda _, a: replace(a, seeds={n: s[:-1] for n, s in a.seeds.items()})),
    ("unmask", lambda _, a: replace(a, seeds={n: b"\xff" * 33 for n in a.seeds})),
    ("unmask", lambda _, a: replace(a, keys={"c001": bytes(33)})),
]


@pytest.mark.parametrize(("stage", "change"), MALFORMED)
def test_a_malformed_answer_is_refused_and_the_sum_goes_on_without_it(stage: str, change: Change) -> None:
    one = Sum(10).to(stage)
    one.stage(stage, sent={"c007": change})
    assert [(s, n) for s, n, _ in one.faults] == [(stage, "c007")]
    assert isinstance(one.faults[0][2], UploadRejected) and one.server.refusals["c007"] == [one.faults[0][2]]
    following = METHODS.index(stage) + 1
    found = one.server.result() if stage == "unmask" else one.run(start=METHODS[following])
    included = one.names if stage in ("confirm", "unmask") else [name for name in one.names if name != "c007"]
    assert one.exact(found, included)


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_wrong_shares_are_seen_and_named(liars: int) -> None:
    one = Sum(12).to("unmask", {"mask": ["c011"]})
    lie = {
        name: lambda _, a: replace(a, seeds={n: bytes(33) for n in a.seeds}, keys={n: bytes(33) for n in a.keys})
        for name in one.names[:liars]
    }
    one.stage("unmask", sent=lie)
    assert one.exact(one.server.result(), one.names[:-1])
    assert one.server.refusals.keys() == set(one.names[:liars])


def test_a_client_without_holders_ends_the_round_before_any_vector() -> None:
    policy = Policy("harary", 0.1, 0.05)
    for more in (0, 1):
        one = Sum(30, policy).to("share")
        order, half = one.server._graph.order, one.server.shape.degree // 2
        near = [*order[-half:], *order[1 : half + 1]]
        gone = near[: len(near) + 1 - one.server.shape.threshold + more]  # of the shares, so many may be lost
        if more:
            with pytest.raises(RoundFailed, match="shares of the client"):
                one.stage("share", gone)
            assert "mask" not in one.answers
        else:
            one.stage("share", gone)
            assert one.exact(one.run(start="mask"), sorted(set(one.names) - set(gone)))


def test_too_many_wrong_shares_end_the_round() -> None:
    one = Sum(10).to("unmask")
    lie = {name: lambda _, a: replace(a, seeds={n: bytes(33) for n in a.seeds}) for name in one.names[:5]}
    one.stage("unmask", sent=lie)
    with pytest.raises(RoundFailed, match="do not fit together"):
        one.server.result()


def test_a_vector_beyond_its_bounds_is_seen_in_the_sum() -> None:
    one = Sum(10)
    wide = Ring(10, 1.0, 16, max_weight=9.0)
    noise = numpy.random.default_rng(0).integers(0, 2**wide.bits, wide.length(SIZE)).astype(numpy.uint32)
    object.__setattr__(wide, "encode", lambda *_: noise.copy())
    one.clients["c003"].ring = wide
    with pytest.raises(RoundFailed, match="out of the range"):
        one.run()


# Signed keys


def test_signed_keys_are_checked_on_both_sides() -> None:
    pairs = {f"c{n:03d}": signing_pair() for n in range(6)}
    one = Sum(6, signing=pairs)
    assert one.exact(one.run(), one.names)

    one = Sum(6, signing=pairs)
    one.clients["c002"]._signing = signing_pair()[0]
    one.clients["c003"]._signing = None
    found = one.run()
    assert {(s, n) for s, n, _ in one.faults} == {("advertise", "c002"), ("advertise", "c003")}
    assert one.exact(found, ["c000", "c001", "c004", "c005"])


def test_a_server_cannot_put_its_own_keys_in_place_of_signed_ones() -> None:
    one = Sum(6, signing={f"c{n:03d}": signing_pair() for n in range(6)}).to("share")
    letter = one.inbox["c001"]
    assert isinstance(letter, Roster)
    forged = KeyPair.new().public + KeyPair.new().public
    for keys in (forged, forged + letter.keys["c002"][64:]):
        with pytest.raises(SecAggError, match="did not sign"):
            one.clients["c001"].share(_keys(letter, "c002", keys))


# On the wire


def test_every_letter_travels_as_tensors() -> None:
    one = Sum(5)
    kinds = set()
    for stage in METHODS:
        one.stage(stage)
        for letter in (one.server.setup, *one.inbox.values(), *one.answers[stage].values()):
            message = decode(encode(Upload(secagg=letter.to_tensors())))
            back = type(letter).from_tensors(message["secagg"])
            kinds.add(type(letter))
            for name in letter.__dataclass_fields__:
                left, right = getattr(letter, name), getattr(back, name)
                assert numpy.array_equal(left, right) if name == "vector" else left == right
    assert kinds == {Setup, Advert, Roster, Dealt, Deal, Masked, Survivors, Confirm, Tags, Reveal}


def test_tensors_that_are_no_letter_are_refused() -> None:
    one = Sum(5).to("mask")
    good = one.inbox["c001"].to_tensors()
    text = good["facts"].numpy().tobytes()

    def facts(old: bytes, new: bytes) -> dict[str, torch.Tensor]:
        assert old in text
        return {**good, "facts": torch.frombuffer(bytearray(text.replace(old, new, 1)), dtype=torch.uint8)}

    wrong = [
        {},
        {"facts": good["facts"]},
        {**good, "more": good["facts"]},
        {**good, "facts": good["facts"][:-1]},
        {**good, "facts": good["facts"].float()},
        {**good, "facts": good["facts"].reshape(1, -1)},
        {**good, "sealed": good["sealed"][:-1]},
        facts(b'"Deal"', b'"Dealt"'),
        facts(b'"round": 3', b'"round": "3"'),
        facts(b'"round": 3', b'"round": true'),
        facts(b'"session": "', b'"session": "x'),
        facts(b'"c002"', b'"c001"'),
        facts(b'"c002"', b"[]"),
        facts(b", 94]", b", -94]"),
        facts(b'"sharers": [', b'"sharers": 1, "x": ['),
    ]
    for tensors in wrong:
        with pytest.raises(UploadRejected, match="no Deal"):
            Deal.from_tensors(tensors)
    assert Deal.from_tensors(good) == one.inbox["c001"]


# Graph


@pytest.mark.parametrize(("count", "degree"), [(3, 2), (4, 2), (4, 3), (9, 4), (20, 6), (21, 20)])
def test_a_harary_graph_is_regular_symmetric_and_connected(count: int, degree: int) -> None:
    names = [f"c{n}" for n in range(count)]
    graph = Graph.of(names, degree, b"seed")
    for name in names:
        near = graph.neighbours(name)
        assert len(set(near)) == degree == len(near) and name not in near
        assert all(name in graph.neighbours(other) for other in near)
        assert set(graph.holders(name)) == {name, *near}
    assert reached(graph, names) == set(names)
    assert sorted(points(names).values()) == list(range(1, count + 1))


def reached(graph: Graph, alive: Any) -> set[str]:
    """Who can be reached from the first of `alive` over edges between them."""
    found, front = {alive[0]}, [alive[0]]
    while front:
        near = set(graph.neighbours(front.pop())) & set(alive) - found
        found |= near
        front += near
    return found


@pytest.mark.parametrize("degree", [2, 4, 6, 11])
def test_connected_is_what_a_walk_finds(degree: int) -> None:
    names, seen = [f"c{n}" for n in range(12)], set()
    graph = Graph.of(names, degree, b"seed")
    for size in range(1, 13):
        for alive in itertools.islice(itertools.combinations(names, size), 400):
            walked = reached(graph, alive) == set(alive)
            assert graph.connected(alive) == walked
            seen.add(walked)
    assert True in seen and (degree == 11) == (False not in seen)


def test_the_order_follows_from_the_seed_alone() -> None:
    names = [f"c{n}" for n in range(30)]
    assert Graph.of(names, 4, b"1") == Graph.of(names[::-1], 4, b"1") != Graph.of(names, 4, b"2")
    first = [Graph.of(names, 4, bytes([n])).order[0] for n in range(200)]
    assert len(set(first)) > 25  # all clients come first now and then


@pytest.mark.parametrize(("clients", "degree"), [("abcde", 3), ("abcde", 5), ("abcde", 0), ("abca", 2)])
def test_a_graph_that_cannot_be_is_refused(clients: str, degree: int) -> None:
    with pytest.raises(ConfigError):
        Graph.of(list(clients), degree, b"")


@pytest.mark.parametrize(("population", "marked", "drawn"), [(6, 2, 3), (7, 5, 4), (5, 0, 2), (5, 5, 3), (8, 3, 8)])
def test_tails_are_those_of_counting(population: int, marked: int, drawn: int) -> None:
    hits = [sum(one < marked for one in few) for few in itertools.combinations(range(population), drawn)]
    above, draws = tails(population, marked, drawn)
    assert draws == len(hits) and above == tuple(sum(hit >= n for hit in hits) for n in range(drawn + 2))


def test_the_complete_graph_has_the_threshold_of_the_paper() -> None:
    # 2 t > n + c: a majority where nobody is corrupt, above two thirds where a third is.
    for n in range(3, 60):
        assert choose(n, "complete", 0.0, 0.0) == Shape(n - 1, n // 2 + 1)
        assert choose(n, "complete", 0.0, 1 / 3).threshold == (n + n // 3) // 2 + 1 > 2 * (n // 3)
        assert 3 * choose(n, "complete", 0.0, 1 / 3).threshold >= 2 * n


@pytest.mark.parametrize("count", [10, 20, 50, 100, 300, 1000])
@pytest.mark.parametrize(("dropout", "corruption"), [(0.05, 0.05), (0.1, 0.1), (0.2, 0.1), (0.1, 1 / 3)])
def test_a_chosen_shape_withstands_what_is_assumed(count: int, dropout: float, corruption: float) -> None:
    shape = choose(count, "harary", dropout, corruption)
    k, t = shape.degree, shape.threshold
    dropped, corrupt = max(math.floor(dropout * count), 1), math.floor(corruption * count + 1e-9)

    def at_least(marked: int, least: int) -> Fraction:
        ways = sum(math.comb(marked, i) * math.comb(count - 1 - marked, k - i) for i in range(least, k + 1))
        return Fraction(ways, math.comb(count - 1, k))

    # Both secrets of an honest client need 2 t shares, honest holders give one each, corrupt ones two.
    assert count * at_least(corrupt, max(2 * t - (k + 1), 0)) <= Fraction(1, 2**40)
    assert count * at_least(corrupt, t) <= Fraction(1, 2**40)
    assert count * at_least(dropped, k + 2 - t) <= Fraction(1, 2**20)
    assert count * at_least(dropped - 1, k + 1 - t) <= Fraction(1, 2**20)
    assert k == count - 1 or k % 2 == 0
    assert k == count - 1 or apart(count, k, dropped + corrupt) <= Fraction(1, 2**40)


def apart(count: int, degree: int, removed: int) -> Fraction:
    """A bound on the probability that a ring falls apart: two runs of degree / 2 clients are removed."""
    return math.comb(count, 2) * Fraction(math.comb(removed, degree), math.comb(count, degree))


@pytest.mark.parametrize(("count", "degree"), [(8, 2), (9, 4), (11, 4), (12, 6)])
def test_the_bound_on_falling_apart_holds(count: int, degree: int) -> None:
    names = [f"c{n}" for n in range(count)]
    graph = Graph.of(names, degree, b"seed")
    for removed in range(count - 1):
        kept = list(itertools.combinations(names, count - removed))
        share = Fraction(sum(not graph.connected(alive) for alive in kept), len(kept))
        assert share <= apart(count, degree, removed)


def test_neighbours_grow_like_the_logarithm() -> None:
    degrees = [choose(10**n, "harary", 0.05, 0.05).degree for n in (2, 3, 4)]
    assert degrees == sorted(degrees) and degrees[2] < 2 * degrees[1] and degrees[2] < 100


@pytest.mark.parametrize(("count", "dropout", "corruption"), [(10, 0.5, 0.1), (100, 0.4, 1 / 3), (3, 0.1, 1 / 3)])
def test_what_no_graph_withstands_is_refused(count: int, dropout: float, corruption: float) -> None:
    for kind in ("complete", "harary"):
        with pytest.raises(ConfigError, match="cannot withstand"):
            choose(count, kind, dropout, corruption)
    with pytest.raises(ConfigError, match="cannot withstand"):
        Server([str(n) for n in range(count)], 4, Ring(count, 1.0), Policy("harary", dropout, corruption))


@pytest.mark.parametrize("given", [{"kind": "star"}, {"dropout": 1.0}, {"corruption": -0.1}, {"dropout": math.nan}])
def test_a_policy_that_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Policy(**given)


def test_survivors_that_no_masks_join_are_refused_on_both_sides() -> None:
    ring_only = Policy("harary", 0.05, 0.0)
    one = Sum(10, ring_only).to("mask")
    assert one.server.shape.degree == 2
    order = one.server._graph.order
    apart = [order[0], order[5]]
    with pytest.raises(RoundFailed, match="not joined"):
        one.stage("mask", apart)
    two = Sum(10, ring_only).to("confirm")
    order = two.server._graph.order
    letter = two.inbox[order[2]]
    assert isinstance(letter, Survivors)
    gone = tuple(sorted((order[0], order[5])))
    with pytest.raises(SecAggError, match="no masks join"):
        two.clients[order[2]].confirm(replace(letter, alive=tuple(n for n in two.names if n not in gone), dropped=gone))

"""Threshold keys by OpenFHE: sums within the stated error, and nothing that fewer than all shares open."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import FedLLMError, RoundFailed, UploadRejected
from fedllm.modes.encrypted.ckks import GRAIN
from fedllm.modes.encrypted.parties import Gathering, Party
from fedllm.modes.encrypted.threshold import DEVIATIONS, LARGEST, RING, SLOTS, Threshold, added, library, uniform

ABOUT = b"a session"


def scheme_or_skip() -> Threshold:
    try:
        library()
    except FedLLMError as fault:
        pytest.skip(str(fault))
    return Threshold()


@pytest.fixture(scope="module")
def scheme() -> Threshold:
    return scheme_or_skip()


def vectors(parties: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) for _ in range(parties)]


def summed(scheme: Threshold, values: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
    """The c0 of a sum, its partial decryptions, and the secrets."""
    pairs = [scheme.share(ABOUT) for _ in values]
    key = total([share for _, share in pairs], scheme.modulus)
    ciphertexts = [scheme.encrypt(ABOUT, key, one) for one in values]
    c0, c1 = (total([pair[half] for pair in ciphertexts], scheme.modulus) for half in (0, 1))
    return c0, [scheme.partial(secret, c1) for secret, _ in pairs], [secret for secret, _ in pairs]


def total(words: list[torch.Tensor], modulus: int) -> torch.Tensor:
    found = words[0]
    for one in words[1:]:
        found = added(found, one, modulus)
    return found


# -- the scheme -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parties", [2, 3, 5])
def test_the_sum_is_right_within_the_stated_error(scheme: Threshold, parties: int):
    values = vectors(parties, 2 * SLOTS + 5, parties)
    c0, parts, _ = summed(scheme, values)
    found = scheme.fuse(total([c0, *parts], scheme.modulus), 2 * SLOTS + 5)
    gap = float((found - torch.stack(values).double().sum(0)).abs().max())
    assert gap < scheme.error(parties) < 2.1e-6, "and the bound is no more than twice what is seen"
    assert gap > scheme.error(parties) / 4


def test_the_order_of_partial_decryptions_does_not_matter(scheme: Threshold):
    values = vectors(3, 50)
    c0, parts, _ = summed(scheme, values)
    first, second = (scheme.fuse(total([c0, *order], scheme.modulus), 50) for order in (parts, parts[::-1]))
    assert torch.allclose(first, second, atol=1e-6, rtol=0), "decoding adds noise of its own"


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_one_share_or_all_but_one_open_nothing(scheme: Threshold, missing: int):
    c0, parts, _ = summed(scheme, vectors(3, 50))
    with pytest.raises(UploadRejected, match="do not open"):
        scheme.fuse(total([c0, *parts[missing:]], scheme.modulus), 50)


def test_a_single_upload_opens_with_the_shares_of_all_and_not_with_those_of_others(scheme: Threshold):
    """What a server would have that got the keys of all other clients; and the check that this test sees anything."""
    values = vectors(3, 50)
    pairs = [scheme.share(ABOUT) for _ in values]
    c0, c1 = scheme.encrypt(ABOUT, total([share for _, share in pairs], scheme.modulus), values[0])
    parts = [scheme.partial(secret, c1) for secret, _ in pairs]
    assert torch.allclose(scheme.fuse(total([c0, *parts], scheme.modulus), 50).float(), values[0], atol=2e-6)
    for held in (parts[1:], parts[:2], parts[:1]):
        with pytest.raises(UploadRejected, match="do not open"):
            scheme.fuse(total([c0, *held], scheme.modulus), 50)


def test_keys_of_another_session_do_not_fit(scheme: Threshold):
    values = vectors(2, 50)
    c0, parts, _ = summed(scheme, values)
    _, others, _ = summed(scheme, values)
    with pytest.raises(UploadRejected, match="do not open"):
        scheme.fuse(total([c0, parts[0], others[1]], scheme.modulus), 50)


def test_a_partial_decryption_is_smudged_anew_by_the_stated_deviation(scheme: Threshold):
    """Two answers to one question differ by two smudges, which decode to the deviation that the bound is made of."""
    (secret, share), (_, other) = scheme.share(ABOUT), scheme.share(ABOUT)
    _, c1 = scheme.encrypt(ABOUT, added(share, other, scheme.modulus), torch.zeros(1))
    one, two = scheme.partial(secret, c1), scheme.partial(secret, c1)
    gap = torch.where(one >= two, one - two, one - two + scheme.modulus)
    for _ in range(6):  # 64 times as large: else rounding hides it
        gap = added(gap, gap, scheme.modulus)
    seen = float(scheme.fuse(gap, SLOTS).std()) / 64
    assert seen == pytest.approx((scheme.error(2) - GRAIN / 2) / DEVIATIONS, rel=0.1)


def test_what_travels_is_numbers_modulo_q(scheme: Threshold):
    _, share = scheme.share(ABOUT)
    halves = scheme.encrypt(ABOUT, share, torch.ones(SLOTS + 1))
    assert share.shape == (RING,) and [tuple(half.shape) for half in halves] == [(2, RING)] * 2
    for words in (share, *halves):
        assert words.dtype == torch.int64 and int(words.min()) >= 0 and int(words.max()) < scheme.modulus
        assert int(words.max()) > scheme.modulus * 0.99, "and they fill it"


def test_the_common_polynomial_is_uniform_and_follows_from_the_session():
    modulus = 2**60 - 16383
    one, same, other = (uniform(about, modulus, 20_000) for about in (b"x", b"x", b"y"))
    assert torch.equal(one, same) and not torch.equal(one, other)
    parts = torch.histc(one.double() / modulus, 10, 0, 1)
    assert float((parts - 2000).abs().max()) < 6 * 45 and int(one.max()) < modulus
    small = uniform(b"x", 5, 1000)
    assert sorted(small.unique().tolist()) == [0, 1, 2, 3, 4]


def test_numbers_beyond_the_bound_come_out_as_nonsense_or_not_at_all(scheme: Threshold):
    """Why a client checks: at 2^9 numbers wrap."""
    c0, parts, _ = summed(scheme, [torch.full((3,), LARGEST * 0.499)] * 2)
    assert float(scheme.fuse(total([c0, *parts], scheme.modulus), 3)[0]) == pytest.approx(LARGEST * 0.998, abs=1e-5)
    c0, parts, _ = summed(scheme, [torch.full((3,), LARGEST * 1.2)] * 2)
    with pytest.raises(UploadRejected, match="do not open"):
        scheme.fuse(total([c0, *parts], scheme.modulus), 3)


# -- the conversation with real keys ----------------------------------------------------------------------------------


def gathered(scheme: Threshold, values: list[torch.Tensor]) -> tuple[Gathering, dict[str, Party]]:
    """A sum up to where partial decryptions are due."""
    size = len(values[0])
    gathering = Gathering(scheme, len(values), 1, size)
    parties = {f"c{n}": Party(scheme, f"c{n}", gathering.setup, 1, one) for n, one in enumerate(values)}
    for name, party in parties.items():
        gathering.take_digest(name, party.commit())
    digests = gathering.digests()
    for name, party in parties.items():
        gathering.take_share(name, party.reveal(gathering.parties, digests))
    shares = gathering.shares()
    for name, party in parties.items():
        gathering.take_ciphertext(name, party.encrypt(gathering.parties, shares))
    return gathering, parties


def test_a_sum_from_setup_to_result(scheme: Threshold):
    values = vectors(4, 100)
    gathering, parties = gathered(scheme, values)
    masks = gathering.masks()
    for name, party in parties.items():
        gathering.take_partial(name, party.open(masks))
        with pytest.raises(UploadRejected, match="out of turn"):
            party.open(masks)
    gap = gathering.result() - torch.stack(values).double().sum(0)
    assert float(gap.abs().max()) < scheme.error(4)


@pytest.mark.parametrize("how", ["random", "zero", "another's"])
def test_a_wrong_partial_decryption_leaves_no_sum(scheme: Threshold, how: str):
    gathering, parties = gathered(scheme, vectors(3, 100))
    masks = gathering.masks()
    parts = {name: party.open(masks) for name, party in parties.items()}
    wrong = {
        "random": uniform(b"noise", scheme.modulus, RING)[None],
        "zero": torch.zeros(1, RING, dtype=torch.int64),
        "another's": parts["c2"]["part"],
    }[how]
    for name, part in parts.items():
        gathering.take_partial(name, {**part, "part": wrong} if name == "c1" else part)
    with pytest.raises(RoundFailed, match="which, cannot be told"):
        gathering.result()

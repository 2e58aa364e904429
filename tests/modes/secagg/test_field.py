"""Shamir's sharing against brute force in small fields, and with 32 bytes in the large one."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable

import pytest

from fedllm.core.errors import ConfigError
from fedllm.modes.secagg.field import (
    PRIME,
    SHARE_BYTES,
    element,
    join,
    join_bytes,
    recover,
    split,
    split_bytes,
)


def prime(number: int) -> bool:
    """Miller and Rabin's test with forty bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    draw = random.Random(0)
    for _ in range(40):
        power = pow(draw.randrange(2, number - 1), odd, number)
        if power not in (1, number - 1) and all((power := power * power % number) != number - 1 for _ in range(twos)):
            return False
    return True


def test_the_prime_is_the_smallest_above_all_secrets() -> None:
    assert PRIME > 2**256 and prime(PRIME)
    assert not any(prime(number) for number in range(2**256 + 1, PRIME, 2))
    assert PRIME.bit_length() <= 8 * SHARE_BYTES


def drawn(values: Iterable[int]) -> object:
    """A source of randomness that gives these values."""
    source = iter(values)
    return lambda below: next(source) % below


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_every_set_of_threshold_shares_gives_the_secret(threshold: int) -> None:
    p, at = 7, (1, 2, 4, 6)
    for secret in range(p):
        for coefficients in itertools.product(range(p), repeat=threshold - 1):
            shares = split(secret, at, threshold, p, drawn(coefficients))  # type: ignore[arg-type]
            plain = [secret, *coefficients]
            assert shares == {x: sum(c * x**n for n, c in enumerate(plain)) % p for x in at}
            for few in itertools.combinations(at, threshold):
                chosen = {x: shares[x] for x in few}
                assert join(chosen, prime=p) == secret
                assert all(join(chosen, x, p) == shares[x] for x in at)


@pytest.mark.parametrize(("p", "threshold"), [(5, 2), (5, 3), (7, 3), (5, 4)])
def test_one_share_less_makes_every_secret_equally_likely(p: int, threshold: int) -> None:
    at = tuple(range(1, threshold + 1))
    for few in itertools.combinations(at, threshold - 1):
        seen = []
        for secret in range(p):
            views = Counter()
            for coefficients in itertools.product(range(p), repeat=threshold - 1):
                shares = split(secret, at, threshold, p, drawn(coefficients))  # type: ignore[arg-type]
                views[tuple(shares[x] for x in few)] += 1
            seen.append(views)
        assert all(views == seen[0] for views in seen)
        assert len(seen[0]) == p ** (threshold - 1) and set(seen[0].values()) == {1}


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_thirty_two_bytes_come_back(secret: bytes) -> None:
    draw = random.Random(1)
    for _ in range(20):
        count = draw.randint(1, 12)
        threshold = draw.randint(1, count)
        shares = split_bytes(secret, draw.sample(range(1, 2000), count), threshold)
        values = {x: element(share) for x, share in shares.items()}
        assert all(len(share) == SHARE_BYTES for share in shares.values())
        few = draw.sample(sorted(shares), threshold)
        assert join_bytes({x: values[x] for x in few}) == secret  # type: ignore[misc]


def test_two_sharings_of_one_secret_have_nothing_in_common() -> None:
    one, two = (split_bytes(bytes(32), range(1, 6), 3) for _ in range(2))
    assert not set(one.values()) & set(two.values())


@pytest.mark.parametrize("liars", [0, 1, 2, 3])
def test_wrong_shares_are_found_where_enough_are_right(liars: int) -> None:
    for seed in range(10):
        draw = random.Random(seed)
        secret = draw.randbytes(32)
        shares = {x: int.from_bytes(s, "big") for x, s in split_bytes(secret, range(1, 12), 6).items()}
        wrong = draw.sample(sorted(shares), liars)
        found = recover({**shares, **{x: draw.randrange(PRIME) for x in wrong}}, 6, secret.__eq__)
        assert found is not None and found[0] == secret
        assert set(found[1]) <= set(wrong)
        if set(wrong) & set(range(1, 7)):  # they stood in the way of the first set
            assert set(found[1]) == set(wrong)


def test_too_few_right_shares_give_nothing() -> None:
    secret = bytes(range(32))
    shares = {x: int.from_bytes(s, "big") for x, s in split_bytes(secret, range(1, 8), 4).items()}
    few = {x: shares[x] for x in (1, 2, 3)}
    assert recover(few, 4, secret.__eq__) is None
    assert recover({**few, 4: 0, 5: 1, 6: 2}, 4, secret.__eq__) is None
    assert recover(shares, 4, bytes(32).__eq__) is None


def test_what_is_no_element_is_none() -> None:
    assert element(PRIME.to_bytes(33, "big")) is None
    assert element((PRIME - 1).to_bytes(33, "big")) == PRIME - 1
    assert element(bytes(32)) is None and element(bytes(34)) is None and element(b"") is None
    assert join_bytes({1: 2**256}) is None


@pytest.mark.parametrize(
    ("secret", "at", "threshold"),
    [(7, (1, 2), 2), (-1, (1, 2), 2), (1, (1, 1), 2), (1, (0, 1), 2), (1, (1, 7), 2), (1, (1, 2), 3), (1, (1, 2), 0)],
)
def test_what_cannot_be_shared_is_refused(secret: int, at: tuple[int, ...], threshold: int) -> None:
    with pytest.raises(ConfigError):
        split(secret, at, threshold, 7)


def test_bytes_of_another_length_and_no_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="31 bytes"):
        split_bytes(bytes(31), (1, 2), 2)
    with pytest.raises(ConfigError, match="No shares"):
        join({})

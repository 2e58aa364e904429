"""Field - Shamir's secret sharing of 32 bytes over a prime field.

A secret is the value at 0 of a random polynomial of degree t - 1; a share is its value at another point. Any t shares
give the secret, t - 1 say nothing about it. The prime lies above 2^256, so every 32 bytes are an element.

Source: Shamir, How to Share a Secret, CACM 1979.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache

from fedllm.core.errors import ConfigError

PRIME = 2**256 + 297
"""The smallest prime above 2^256."""
SECRET_BYTES = 32
SHARE_BYTES = 33
"""Bytes of one element."""
TRIES = 1000
"""At most so many sets of shares are tried where some shares are wrong."""


def split(
    secret: int,
    points: Collection[int],
    threshold: int,
    prime: int = PRIME,
    draw: Callable[[int], int] = secrets.randbelow,
) -> dict[int, int]:
    """Shares of `secret` by point; any `threshold` of them give it back.

    Args:
        secret: an element, 0 to prime - 1.
        points: where the polynomial is evaluated: distinct, 1 to prime - 1.
        threshold: shares that are needed, 1 to the number of points.
        prime: the order of the field.
        draw: a uniform number below its argument; the operating system's generator.

    Raises:
        ConfigError: an argument outside these bounds.
    """
    if not 0 <= secret < prime:
        raise ConfigError("The secret is not an element of the field.", "Allowed: 0 to the prime - 1.")
    if len(set(points)) != len(points) or not all(0 < point < prime for point in points):
        raise ConfigError("The points of a secret sharing are not distinct, or 0.", "Allowed: 1 to the prime - 1.")
    if not 1 <= threshold <= len(points):
        raise ConfigError(f"The threshold is {threshold} of {len(points)} shares.", f"Allowed: 1 to {len(points)}.")
    coefficients = [draw(prime) for _ in range(threshold - 1)]
    return {point: _value(secret, coefficients, point, prime) for point in points}


def join(shares: Mapping[int, int], at: int = 0, prime: int = PRIME) -> int:
    """The value at `at` of the polynomial through `shares` (point -> value): the secret at 0.

    All shares are used: give exactly as many as the threshold. Raises ConfigError where there is none.
    """
    if not shares:
        raise ConfigError("No shares were given.", "A secret needs as many as its threshold.")
    points = tuple(shares)
    return (
        sum(weight * shares[point] for weight, point in zip(_weights(points, at, prime), points, strict=True)) % prime
    )


def split_bytes(secret: bytes, points: Collection[int], threshold: int) -> dict[int, bytes]:
    """:func:`split` for 32 bytes; each share has 33. Raises ConfigError for another length."""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"A secret of {len(secret)} bytes was given.", f"Allowed: {SECRET_BYTES} bytes.")
    shares = split(int.from_bytes(secret, "big"), points, threshold)
    return {point: share.to_bytes(SHARE_BYTES, "big") for point, share in shares.items()}


def element(share: bytes) -> int | None:
    """The element that 33 bytes stand for, or None where they stand for none."""
    value = int.from_bytes(share, "big")
    return value if len(share) == SHARE_BYTES and value < PRIME else None


def join_bytes(shares: Mapping[int, int]) -> bytes | None:
    """The 32 bytes shared, or None where the value at 0 does not fit in them, so that a share is wrong."""
    value = join(shares)
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


def recover(
    shares: Mapping[int, int], threshold: int, accept: Callable[[bytes], bool]
) -> tuple[bytes, tuple[int, ...]] | None:
    """The secret that `accept` takes, and the points of wrong shares that stood in its way; None where there is none.

    With more shares than the threshold a few wrong ones do no harm: every run of `threshold` consecutive shares is
    tried, so that one wrong share is always found, then random sets, :data:`TRIES` in all.

    Args:
        shares: point -> element.
        threshold: shares that are needed.
        accept: whether a candidate is the secret, such as by a digest of it.
    """
    for tried, few in enumerate(itertools.islice(_sets(list(shares), threshold), TRIES)):
        chosen = {point: shares[point] for point in few}
        secret = join_bytes(chosen)
        if secret is not None and accept(secret):
            return secret, tuple(p for p in shares if p not in chosen and join(chosen, p) != shares[p]) if tried else ()
    return None


def _sets(held: list[int], size: int) -> Iterator[list[int]]:
    if len(held) >= size:
        yield held[:size]
    if len(held) > size:
        yield from ((held + held)[start : start + size] for start in range(1, len(held)))
        draw = random.Random(0)
        while True:
            yield draw.sample(held, size)


def _value(secret: int, coefficients: list[int], point: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value + coefficient) * point % prime
    return (value + secret) % prime


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...], at: int, prime: int) -> tuple[int, ...]:
    """Lagrange's weights of the values at `points` x for that at `at`: prod of (at - x_j) / (x_i - x_j), j != i."""
    if at in points:
        return tuple(int(point == at) for point in points)
    below = [math.prod(x - other for other in points if other != x) * (at - x) % prime for x in points]
    above = math.prod(at - x for x in points) % prime
    return tuple(above * inverse % prime for inverse in _inverses(below, prime))


def _inverses(values: list[int], prime: int) -> list[int]:
    """The inverses of all values for one inversion and three products each (Montgomery)."""
    before = list(itertools.accumulate(values, lambda a, b: a * b % prime, initial=1))
    rest = pow(before[-1], -1, prime)
    found: list[int] = []
    for value, product in zip(reversed(values), reversed(before[:-1]), strict=True):
        found.append(rest * product % prime)
        rest = rest * value % prime
    return found[::-1]

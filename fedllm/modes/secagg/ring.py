"""Ring - float vectors as integers modulo 2^b whose sum over a cohort is exact, and the masks that hide them.

A client of weight w sends r x, r = w / max_weight <= 1, as integers of at most L = 2^(precision - 1) - 1 in magnitude,
and r itself in front. So the weights are hidden with the rest, and the mean is one sum divided by the other. The ring
is just wide enough that `count` such vectors cannot wrap: b is the least with count * L < 2^(b - 1).

Sources: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, section 4
(masks in Z_R); Bonawitz et al., Federated Learning with Autotuned Communication-Efficient Secure Aggregation, 2019,
section 3 (the width of the ring).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from fedllm.core.errors import ConfigError, RoundFailed, UploadRejected
from fedllm.modes.secagg.keys import KEY_BYTES, encoded, primitives

Words = NDArray[numpy.uint32]
"""Elements of the ring, each in the lowest b bits of a word."""

WORD = 32
"""Bits of a word, and the widest ring."""
WEIGHT_BITS = 24
"""A weight is a whole number of max_weight / 2^24."""
CHUNK = 1 << 16
"""Words that are worked on at a time, so that they stay in the cache."""
EXACT = 2.0**-40
"""So far below a whole number, as a share of it, an entry still counts as that number where fractions are cut."""
_ZEROS = bytes(4 * CHUNK)


@dataclass(frozen=True)
class Total:
    """The sum of a cohort's vectors.

    Attributes:
        integers: int64 [size], the exact sum of the integers.
        step: what one integer is worth.
        share: the sum of the weights, in units of `max_weight`.
        max_weight: the weight whose share is 1.
    """

    integers: NDArray[numpy.int64]
    step: float
    share: float
    max_weight: float

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return self.share * self.max_weight

    @property
    def sum(self) -> NDArray[numpy.floating[Any]]:
        """The weighted sum, sum of w x: float64 [size]."""
        return self.integers * (self.step * self.max_weight)

    @property
    def mean(self) -> NDArray[numpy.floating[Any]]:
        """The weighted mean, float64 [size]; raises RoundFailed where all weights are zero."""
        if self.share <= 0:
            raise RoundFailed("The weights of all clients in the secure sum are zero, so it has no mean.")
        return self.integers * (self.step / self.share)


@dataclass(frozen=True)
class Ring:
    """How vectors of floats become vectors over Z_2^b.

    Args:
        count: the most clients that are summed, at least 1.
        clip: the largest magnitude of an entry; what lies beyond is refused, never cut.
        precision: bits of one client's entry, 2 to 31; the step of a client's entry is clip / (2^(precision - 1) - 1).
        max_weight: the largest weight of a client.
        shrinks: fractions are cut, so that no vector becomes longer than it was; else the nearest integers are taken.

    Raises:
        ConfigError: an argument outside these bounds, or a cohort too large for the precision.
    """

    count: int
    clip: float
    precision: int = 16
    max_weight: float = 1.0
    shrinks: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"A secure sum of {self.count} clients was asked for.", "Allowed: 1 or more.")
        for name, value in (("clip", self.clip), ("max_weight", self.max_weight)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} of a secure sum.", "Allowed: a finite number above 0.")
        if not 2 <= self.precision < WORD:
            raise ConfigError(f"precision={self.precision} of a secure sum.", f"Allowed: 2 to {WORD - 1} bits.")
        if self.bits > WORD:
            widest = next((p for p in range(self.precision, 1, -1) if _bits(self.count, p) <= WORD), None)
            raise ConfigError(
                f"precision={self.precision} with {self.count} clients needs {self.bits} bits per entry.",
                f"Allowed: at most {WORD}.",
                action=f"Set precision={widest}." if widest else "Sum fewer clients.",
            )

    @property
    def top(self) -> int:
        """The largest integer of one client's entry, L."""
        return 2 ** (self.precision - 1) - 1

    @property
    def bits(self) -> int:
        """Bits per entry, b."""
        return _bits(self.count, self.precision)

    @property
    def step(self) -> float:
        """What one integer is worth: clip / L."""
        return self.clip / self.top

    @property
    def limb(self) -> int:
        """Bits of one digit of a weight, so that `count` digits do not wrap."""
        return min(self.bits - (self.count - 1).bit_length(), WEIGHT_BITS)

    @property
    def limbs(self) -> int:
        """Entries in front of a vector that hold the weight, the lowest digit first."""
        return -(-(WEIGHT_BITS + 1) // self.limb)

    def length(self, size: int) -> int:
        """Entries that travel for a vector of `size`."""
        return self.limbs + size

    def packed_bytes(self, size: int) -> int:
        """Bytes that travel for a vector of `size`: b bits an entry, filled up to a whole number of b words."""
        return 4 * self.bits * -(-self.length(size) // WORD)

    def identity(self) -> bytes:
        """What both sides must have the same, in bytes."""
        numbers = (float(self.clip).hex(), self.precision, float(self.max_weight).hex(), int(self.shrinks))
        return encoded("ring", self.count, *numbers)

    def encode(self, values: NDArray[Any], weight: float = 1.0, rng: numpy.random.Generator | None = None) -> Words:
        """The weight and the weighted vector as elements of the ring.

        Args:
            values: floats [size], each at most `clip` in magnitude (compared in the type of the values).
            weight: 0 to `max_weight`; above 0 it counts at least 2^-24 of `max_weight`.
            rng: rounds up with the probability of the fraction, so that an entry is right on average; None rounds to
                the nearest integer. Where fractions are cut it is not used.

        Returns:
            uint32 [limbs + size].

        Raises:
            ConfigError: `values` is not a vector of floats.
            UploadRejected: an entry or the weight is not finite or beyond its bound.
        """
        if values.ndim != 1 or values.dtype.kind != "f":
            raise ConfigError(
                f"A secure sum was given {values.dtype} in {values.ndim} dimensions.", "Allowed: one vector of floats."
            )
        self._check(values, weight)
        units = max(round(weight / self.max_weight * 2**WEIGHT_BITS), int(weight > 0))
        found = numpy.empty(self.length(values.size), numpy.uint32)
        found[: self.limbs] = [units >> (self.limb * n) & (2**self.limb - 1) for n in range(self.limbs)]
        scale = units / 2**WEIGHT_BITS / self.step
        for start in range(0, values.size, CHUNK):
            scaled = values[start : start + CHUNK].astype(numpy.float64) * scale
            if self.shrinks:
                rounded = numpy.trunc(scaled * (1 + EXACT))
            else:
                rounded = numpy.rint(scaled) if rng is None else numpy.floor(scaled + rng.random(scaled.size))
            whole = numpy.clip(rounded, -self.top, self.top).astype(numpy.int64)
            found[self.limbs + start : self.limbs + start + whole.size] = whole.astype(numpy.uint32)
        return reduced(found, self.bits)

    def decode(self, total: Words, clients: int) -> Total:
        """The sum of `clients` encoded vectors.

        Args:
            total: uint32 [limbs + size], the sum in the ring.
            clients: how many vectors it is the sum of.

        Raises:
            RoundFailed: it cannot be the sum of so many vectors: a client sent another than it should, or a mask is
                left in it.
        """
        lifted = total.astype(numpy.int64)
        digits, body = lifted[: self.limbs], lifted[self.limbs :]
        body[body >= 2 ** (self.bits - 1)] -= 2**self.bits
        units = sum(int(digit) << (self.limb * n) for n, digit in enumerate(digits))
        most = int(numpy.abs(body).max(initial=0))
        if units > clients * 2**WEIGHT_BITS or most > clients * self.top:
            raise RoundFailed(
                f"The secure sum is out of the range of {clients} vectors within the bounds.",
                "A client sent a vector beyond its bounds, or masks that do not cancel.",
                action="Start the round again, with other clients.",
            )
        return Total(body, self.step, units / 2**WEIGHT_BITS, self.max_weight)

    def _check(self, values: NDArray[Any], weight: float) -> None:
        if not (math.isfinite(weight) and 0 <= weight <= self.max_weight):
            raise UploadRejected(
                f"A client's weight is {weight}.",
                f"Allowed in this secure sum: 0 to max_weight={self.max_weight}.",
                action="Set max_weight to the largest weight of all clients.",
            )
        most = float(numpy.abs(values).max(initial=0))
        if not math.isfinite(most):
            raise UploadRejected("A vector for a secure sum holds a value that is not finite.")
        # A vector that was cut to the bound in its own type must pass: float32(0.1) > 0.1.
        if most > float(values.dtype.type(self.clip)):
            raise UploadRejected(
                f"A vector for a secure sum has a magnitude of {most:.6g}.",
                f"Allowed: clip={self.clip:.6g}.",
                action="Clip before the sum, or raise clip.",
            )


def reduced(words: Words, bits: int) -> Words:
    """`words` modulo 2^bits, in place."""
    if bits < WORD:
        words &= numpy.uint32(2**bits - 1)
    return words


def pack(words: Words, bits: int) -> NDArray[numpy.uint8]:
    """Elements of Z_2^bits [n] as bytes, `bits` per element, filled with zeros up to 32 elements.

    Element i of column j is word i * columns + j; a column of 32 elements becomes one of `bits` words.
    """
    columns = -(-words.size // WORD)
    rows = numpy.zeros(WORD * columns, numpy.uint32)
    rows[: words.size] = words
    rows = rows.reshape(WORD, columns)
    found = numpy.zeros((bits, columns), "<u4")
    for number in range(WORD):
        at, shift = divmod(number * bits, WORD)
        found[at] |= rows[number] << numpy.uint32(shift)
        if shift + bits > WORD:
            found[at + 1] |= rows[number] >> numpy.uint32(WORD - shift)
    return found.reshape(-1).view(numpy.uint8)


def unpack(packed: NDArray[numpy.uint8], bits: int, size: int) -> Words:
    """The elements that :func:`pack` made bytes of.

    Raises:
        UploadRejected: another number of bytes than `size` elements have, or a filling that is not zero.
    """
    columns = -(-size // WORD)
    if packed.dtype != numpy.uint8 or packed.shape != (4 * bits * columns,):
        raise UploadRejected(
            f"A masked vector has {packed.nbytes} bytes.", f"Expected: {4 * bits * columns} for {size} entries."
        )
    stored = numpy.ascontiguousarray(packed).view("<u4").reshape(bits, columns)
    rows = numpy.empty((WORD, columns), numpy.uint32)
    for number in range(WORD):
        at, shift = divmod(number * bits, WORD)
        rows[number] = stored[at] >> numpy.uint32(shift)
        if shift + bits > WORD:
            rows[number] |= stored[at + 1] << numpy.uint32(WORD - shift)
    found = reduced(rows.reshape(-1), bits)
    if found[size:].any():
        raise UploadRejected("A masked vector is filled up with something else than zeros.")
    return found[:size]


def add_mask(total: Words, seed: bytes, subtract: bool = False) -> None:
    """Add the stream of `seed` to `total` in place, modulo 2^32: ChaCha20 (RFC 8439) under nonce 0.

    A seed is to be used for one vector only. Modulo 2^b for b < 32 it is the lowest b bits of the result.

    Args:
        total: uint32 [n].
        seed: 32 bytes.
        subtract: take the stream away instead.
    """
    if len(seed) != KEY_BYTES:
        raise ConfigError(f"The seed of a mask has {len(seed)} bytes.", f"Allowed: {KEY_BYTES}.")
    ciphers = primitives("ciphers")
    encryptor = ciphers.Cipher(ciphers.algorithms.ChaCha20(seed, bytes(16)), None).encryptor()
    buffer = numpy.empty(4 * min(total.size, CHUNK), numpy.uint8)
    for start in range(0, total.size, CHUNK):
        part = total[start : start + CHUNK]
        encryptor.update_into(memoryview(_ZEROS)[: part.nbytes], buffer[: part.nbytes])
        stream = buffer[: part.nbytes].view("<u4")
        if subtract:
            part -= stream
        else:
            part += stream


def mask(seed: bytes, size: int) -> Words:
    """The stream of `seed`, uint32 [size]; see :func:`add_mask`."""
    found = numpy.zeros(size, numpy.uint32)
    add_mask(found, seed)
    return found


def _bits(count: int, precision: int) -> int:
    return (count * (2 ** (precision - 1) - 1)).bit_length() + 1

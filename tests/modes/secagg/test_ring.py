"""Exact sums in the ring, bounds, rounding, packing, and the stream of the masks."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

pytest.importorskip("cryptography")

from fedllm.core.errors import ConfigError, RoundFailed, UploadRejected
from fedllm.modes.secagg.ring import CHUNK, Ring, add_mask, mask, pack, reduced, unpack

SHAPES = [(3, 2), (3, 3), (10, 8), (10, 16), (100, 16), (1000, 22), (65536, 16), (2, 31)]
"""Count and precision."""


def total(ring: Ring, vectors: list[Any]) -> Any:
    """The sum in the ring."""
    found = numpy.zeros_like(vectors[0])
    for vector in vectors:
        found += vector
    return reduced(found, ring.bits)


def integers(ring: Ring, vector: Any) -> list[int]:
    """The entries as Python's numbers, with their sign."""
    body = [int(word) for word in vector[ring.limbs :]]
    return [word - 2**ring.bits if word >= 2 ** (ring.bits - 1) else word for word in body]


@pytest.mark.parametrize(("count", "precision"), SHAPES)
def test_the_ring_is_as_wide_as_it_must_be_and_no_wider(count: int, precision: int) -> None:
    ring = Ring(count, 1.0, precision)
    assert count * ring.top < 2 ** (ring.bits - 1) <= 2 * count * ring.top
    assert count * (2**ring.limb - 1) < 2**ring.bits and 2 ** (ring.limb * ring.limbs) > 2**24
    assert ring.bits <= 32


@pytest.mark.parametrize(("count", "precision"), SHAPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_not_even_the_largest_entries_wrap(count: int, precision: int, sign: float) -> None:
    ring = Ring(count, 0.3, precision, max_weight=7.0)
    one = ring.encode(numpy.full(5, sign * 0.3), 7.0)
    found = ring.decode(reduced(one * numpy.uint32(count), ring.bits), count)
    assert found.integers.tolist() == [int(sign) * count * ring.top] * 5
    assert found.share == count and found.weight == 7.0 * count


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("count", "precision"), [(3, 2), (7, 8), (40, 16), (100, 25)])
def test_the_sum_is_the_plain_sum_of_integers(seed: int, count: int, precision: int) -> None:
    draw = numpy.random.default_rng(seed)
    ring = Ring(count, 2.0, precision, max_weight=50.0)
    sent = [ring.encode(draw.uniform(-2, 2, 300), draw.uniform(0, 50), draw) for _ in range(count)]
    found = ring.decode(total(ring, sent), count)
    assert found.integers.tolist() == [sum(column) for column in zip(*(integers(ring, v) for v in sent), strict=True)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32, numpy.float64])
def test_the_mean_errs_by_less_than_its_step(rounded: bool, dtype: Any) -> None:
    for seed in range(5):
        draw = numpy.random.default_rng(seed)
        ring = Ring(12, 1.5, 16, max_weight=20.0)
        values = [draw.uniform(-1.5, 1.5, 500).clip(-1.4, 1.4).astype(dtype) for _ in range(12)]
        weights = draw.uniform(0.5, 20, 12)
        sent = [ring.encode(v, w, draw if rounded else None) for v, w in zip(values, weights, strict=True)]
        found = ring.decode(total(ring, sent), 12)
        plain = sum(w * v.astype(float) for v, w in zip(values, weights, strict=True))
        step = ring.step / (weights.mean() / 20)
        loss = 2 * 12 * 1.5 * 20 * 2**-25  # the rounding of the weights
        assert numpy.abs(found.sum - plain).max() < 12 * 20 * ring.step * (1 if rounded else 0.5) + loss
        assert numpy.abs(found.mean - plain / weights.sum()).max() < step * (1 if rounded else 0.5) + loss
        assert found.weight == pytest.approx(weights.sum(), abs=12 * 20 * 2**-25)


def test_rounding_is_right_on_average_and_nearest_is_fixed() -> None:
    ring = Ring(4, 1.0, 4)
    values = numpy.array([0.3 / 7, -0.3 / 7, 6.5 / 7, -6.9 / 7, 0.0, 1.0, -1.0])
    draw, times = numpy.random.default_rng(0), 20_000
    found = numpy.array([integers(ring, ring.encode(values, 1.0, draw)) for _ in range(times)])
    fraction = numpy.abs(values * 7 % 1)
    bound = 5 * numpy.sqrt(fraction * (1 - fraction) / times) + 1e-12
    assert (numpy.abs(found.mean(0) - values * 7) <= bound).all()
    assert set(numpy.unique(found[:, 0])) == {0, 1} and set(numpy.unique(found[:, 1])) == {-1, 0}
    assert integers(ring, ring.encode(values)) == [0, 0, 6, -7, 0, 7, -7]
    assert (ring.encode(values) == ring.encode(values)).all()


def test_many_more_entries_than_a_chunk() -> None:
    ring, size = Ring(3, 1.0, 12), 2 * CHUNK + 17
    values = numpy.linspace(-1, 1, size)
    assert integers(ring, ring.encode(values)) == numpy.rint(values * ring.top).astype(int).tolist()


def test_a_small_weight_still_counts_and_none_does_not() -> None:
    ring = Ring(3, 1.0, 8, max_weight=1e9)
    tiny = [ring.encode(numpy.ones(2), w) for w in (1e-3, 0.0, 0.0)]
    found = ring.decode(total(ring, tiny), 3)
    assert found.share == 2**-24
    none = ring.decode(total(ring, [ring.encode(numpy.ones(2), 0.0)] * 3), 3)
    assert none.sum.tolist() == [0, 0] and none.weight == 0
    with pytest.raises(RoundFailed, match="zero"):
        _ = none.mean


def test_no_entries_at_all() -> None:
    ring = Ring(3, 1.0)
    assert ring.decode(total(ring, [ring.encode(numpy.zeros(0, numpy.float32))] * 3), 3).mean.tolist() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.0001, -1.0001, 1e30])
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_a_value_out_of_bounds_is_refused_before_anything_is_rounded(bad: float, dtype: Any) -> None:
    values = numpy.zeros(1000, dtype)
    values[777] = bad
    with pytest.raises(UploadRejected, match="finite" if not math.isfinite(bad) else "magnitude"):
        Ring(3, 1.0).encode(values)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, 5.01])
def test_a_weight_out_of_bounds_is_refused(weight: float) -> None:
    with pytest.raises(UploadRejected, match="weight"):
        Ring(3, 1.0, max_weight=5.0).encode(numpy.zeros(3), weight)


@pytest.mark.parametrize("clip", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("precision", [16, 30])
def test_what_was_clipped_in_its_own_type_passes(clip: float, precision: int) -> None:
    ring = Ring(2, clip, precision)
    values = numpy.array([9.0, -9.0], numpy.float32).clip(-numpy.float32(clip), numpy.float32(clip))
    above, below = integers(ring, ring.encode(values, 1.0, numpy.random.default_rng(0)))
    assert ring.top * (1 - 2**-23) - 1 <= above <= ring.top and -ring.top <= below <= -ring.top * (1 - 2**-23) + 1


@pytest.mark.parametrize("values", [numpy.zeros((2, 2)), numpy.zeros(3, numpy.int64), numpy.zeros(3, complex)])
def test_only_a_vector_of_floats_is_taken(values: Any) -> None:
    with pytest.raises(ConfigError, match="one vector of floats"):
        Ring(3, 1.0).encode(values)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"count": 0}, "0 clients"),
        ({"clip": 0.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"max_weight": math.inf}, "max_weight"),
        ({"precision": 1}, "precision"),
        ({"precision": 32}, "precision"),
        ({"precision": 31, "count": 10}, "Set precision=28"),
        ({"precision": 2, "count": 2**32}, "fewer"),
    ],
)
def test_a_ring_that_cannot_be_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Ring(**{"count": 3, "clip": 1.0, **given})


def test_a_sum_out_of_range_is_refused() -> None:
    ring = Ring(4, 1.0, 8)
    noise = numpy.random.default_rng(0).integers(0, 2**ring.bits, ring.length(100)).astype(numpy.uint32)
    with pytest.raises(RoundFailed, match="out of the range"):
        ring.decode(noise, 4)
    four = total(ring, [ring.encode(numpy.ones(5))] * 4)
    assert ring.decode(four, 4).mean.tolist() == [1.0] * 5
    heavy = total(ring, [ring.encode(numpy.zeros(5))] * 4)
    for one in (four, heavy):
        with pytest.raises(RoundFailed, match="out of the range"):
            ring.decode(one, 3)


@pytest.mark.parametrize("bits", range(2, 33))
def test_packed_elements_come_back_and_take_so_many_bits(bits: int) -> None:
    draw = numpy.random.default_rng(bits)
    for size in (0, 1, 31, 32, 33, 1000):
        words = draw.integers(0, 2**bits, size, dtype=numpy.uint64).astype(numpy.uint32)
        packed = pack(words, bits)
        assert packed.dtype == numpy.uint8 and packed.size == 4 * bits * math.ceil(size / 32)
        assert (unpack(packed, bits, size) == words).all()


@pytest.mark.parametrize(("count", "precision"), SHAPES)
def test_at_most_four_point_one_bytes_per_parameter(count: int, precision: int) -> None:
    ring, size = Ring(count, 1.0, precision), 20_000
    packed = pack(ring.encode(numpy.zeros(size)), ring.bits)
    assert packed.size == ring.packed_bytes(size) <= 4.1 * size
    assert packed.size <= (ring.bits / 8 + 0.1) * size


def test_bytes_that_no_vector_packs_to_are_refused() -> None:
    packed = pack(numpy.arange(40, dtype=numpy.uint32), 7)
    wrong = [packed[:-1], numpy.append(packed, numpy.uint8(0)), packed.astype(numpy.int64), packed.reshape(2, -1)]
    for one in wrong:
        with pytest.raises(UploadRejected, match="bytes"):
            unpack(one, 7, 40)
    filled = pack(numpy.arange(64, dtype=numpy.uint32), 7)
    with pytest.raises(UploadRejected, match="filled up"):
        unpack(filled, 7, 40)


def test_the_stream_is_that_of_the_standard() -> None:
    # RFC 8439, appendix A.1, vector 1: key 0, nonce 0, counter 0.
    stream = mask(bytes(32), 16).astype("<u4").tobytes()
    assert stream.hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_a_mask_goes_in_and_out_and_does_not_repeat() -> None:
    size = 2 * CHUNK + 5
    words = numpy.arange(size, dtype=numpy.uint32)
    add_mask(words, b"k" * 32)
    stream = mask(b"k" * 32, size)
    assert (words == numpy.arange(size, dtype=numpy.uint32) + stream).all()
    assert (stream[:CHUNK] == mask(b"k" * 32, CHUNK)).all() and not (stream[:CHUNK] == stream[CHUNK:-5]).any()
    add_mask(words, b"k" * 32, subtract=True)
    assert (words == numpy.arange(size, dtype=numpy.uint32)).all()
    with pytest.raises(ConfigError, match="31"):
        mask(b"k" * 31, 4)


def test_an_identity_tells_rings_apart() -> None:
    rings = [Ring(3, 1.0), Ring(4, 1.0), Ring(3, 1.5), Ring(3, 1.0, 17), Ring(3, 1.0, 16, 2.0)]
    assert len({ring.identity() for ring in rings}) == len(rings)
    assert Ring(3, 1).identity() == Ring(3, 1.0).identity()


@pytest.mark.parametrize("precision", [2, 4, 8, 16, 24])
@pytest.mark.parametrize("seed", range(3))
def test_where_fractions_are_cut_no_vector_becomes_longer(precision: int, seed: int) -> None:
    """Sensitivity: what was clipped to a norm keeps to it in the ring, however many entries there are."""
    draw = numpy.random.default_rng(seed)
    values = draw.normal(size=20_000)
    ring = Ring(3, 1.0, precision, shrinks=True)
    values *= 1.0 / numpy.linalg.norm(values)
    found = numpy.array(integers(ring, ring.encode(values))) * ring.step
    assert numpy.linalg.norm(found) <= 1.0 and numpy.abs(found - values).max() < ring.step
    just_above_half = numpy.full(20_000, 0.51 * ring.step)
    rounded = numpy.array(integers(Ring(3, 1.0, precision), Ring(3, 1.0, precision).encode(just_above_half)))
    cut = numpy.array(integers(ring, ring.encode(just_above_half)))
    assert rounded.min() == 1 and not cut.any()


@pytest.mark.parametrize("precision", [2, 3, 8, 16, 22, 31])
def test_whole_numbers_stay_whole_where_fractions_are_cut(precision: int) -> None:
    ring = Ring(1, 0.37, precision, shrinks=True)
    wanted = sorted({-ring.top, -1, 0, 1, ring.top, ring.top // 2, ring.top // 3, ring.top - 1})
    assert integers(ring, ring.encode(numpy.array(wanted) * ring.step)) == wanted
    assert ring.identity() != Ring(1, 0.37, precision).identity()

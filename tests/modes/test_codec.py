"""Codecs - what is decoded is what each code promises, nothing is lost for good, and no bytes crash the decoder."""

from __future__ import annotations

import builtins
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra, ModeConflict, UploadRejected
from fedllm.core.message import Dense, Owned, Scalars, SeedCoefficients, Table, Texts, Upload
from fedllm.core.reducer import Mean, Reduction
from fedllm.core.settings import read
from fedllm.core.tensors import Tensors
from fedllm.core.view import View
from fedllm.core.wire import decode, encode
from fedllm.modes.codec import LARGEST, Codec
from fedllm.modes.coded import Coded, Manifest, compressed, expanded
from fedllm.modes.lowrank import LowRank
from fedllm.modes.quantise import Quantise, Sign
from fedllm.modes.sparsify import TopK, largest

zstandard = pytest.importorskip("zstandard")

LOSSY: list[dict[str, Any]] = [
    {"kind": "bf16"},
    {"kind": "int8"},
    {"kind": "int8", "rounding": "nearest"},
    {"kind": "int8", "clip": 2.0},
    {"kind": "int4", "block": 32},
    {"kind": "int4", "clip": 3.0},
    {"kind": "topk", "density": 0.1},
    {"kind": "topk", "density": 0.01},
    {"kind": "sign"},
    {"kind": "lowrank", "rank": 2},
]
EVERY = [{"kind": "fp32"}, *LOSSY]
BIASED = [given for given in LOSSY if Codec(**given).feeds_back]
name_of = str
every_codec = pytest.mark.parametrize("options", EVERY, ids=name_of)
every_lossy = pytest.mark.parametrize("options", LOSSY, ids=name_of)
FINITE = st.floats(-6e4, 6e4, width=32)


def stream(seed: int = 0) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tree(seed: int = 0) -> Tensors:
    return {"b": randn(33, seed=seed), "a.weight": randn(24, 40, seed=seed + 1), "c": randn(4, 5, 6, seed=seed + 2)}


def travel(codec: Codec, update: Any, seed: int = 0, memory: Tensors | None = None) -> Upload:
    upload, _ = codec.encode(Upload(update, weight=3.0), memory, stream(seed))
    return codec.decode(as_upload(encode(upload)))


def as_upload(data: bytes) -> Upload:
    message = decode(data)
    assert isinstance(message, Upload)
    return message


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


# --- what every codec holds --------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("entropy", ["none", "zstd"])
def test_names_shapes_types_numbers_and_other_parts_come_back(options: dict[str, Any], entropy: Any) -> None:
    codec = Codec(**options, entropy=entropy)
    update = {
        **tree(),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 7),
        "one": torch.tensor(0.5),
        "half": randn(9).half(),
        "brain": randn(4, 9).bfloat16(),
        "double": randn(17).double(),
        "count": torch.tensor(7),
        "ids": torch.arange(12).reshape(3, 4),
        "small": torch.arange(5, dtype=torch.int16),
        "yes": torch.tensor([True, False, True]),
    }
    given = Upload(update, 3.0, {"loss": (2.0, 4.0)}, {"k": [1, None]}, control={"x": randn(3)}, notes=Texts(("ja",)))
    before = {name: tensor.clone() for name, tensor in update.items()}
    coded, _ = codec.encode(given, None, stream())
    result = codec.decode(as_upload(encode(coded)))
    assert same(given.update, before), "encoding changes nothing in place"
    assert result.weight == 3.0 and result.numbers == {"k": [1, None]}
    assert {n: v for n, v in result.metrics.items() if n != "codec_clipped"} == {"loss": (2.0, 4.0)}
    assert same(result["control"], given["control"]) and result.parts["notes"] == Texts(("ja",))
    assert {n: (t.shape, t.dtype) for n, t in result.update.items()} == {
        n: (t.shape, t.dtype) for n, t in update.items()
    }
    for name in ("count", "ids", "small", "yes", "empty", "no rows"):
        assert torch.equal(result.update[name], update[name]), "integers are untouched"
    if codec.lossless:
        assert same(result.update, update)


@every_codec
def test_the_same_stream_gives_the_same_bytes(options: dict[str, Any]) -> None:
    codec = Codec(**options, entropy="zstd")
    first, again, other = (encode(codec.encode(Upload(tree()), None, stream(s))[0]) for s in (1, 1, 2))
    assert first == again
    assert (first != other) == (
        (codec.unbiased and not codec.lossless) or codec.clip is not None or codec.kind == "lowrank"
    )


@every_codec
def test_the_order_of_names_does_not_matter(options: dict[str, Any]) -> None:
    codec, forward = Codec(**options), tree()
    backward = dict(reversed(forward.items()))
    assert encode(codec.encode(Upload(forward), None, stream())[0]) == encode(
        codec.encode(Upload(backward), None, stream())[0]
    )


@every_codec
def test_zeros_decode_to_zeros_exactly(options: dict[str, Any]) -> None:
    zeros = {"w": torch.zeros(24, 40), "v": torch.zeros(5)}
    assert all(bool((t == 0).all()) for t in travel(Codec(**options), zeros).update.values())


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(options: dict[str, Any], bad: float) -> None:
    codec = Codec(**options, entropy="zstd")
    for where in ("a.weight", "b", "c"):
        update = tree()
        update[where].view(-1)[3] = bad
        with pytest.raises(UploadRejected, match=f"not finite in 'update/{where}'"):
            codec.encode(Upload(update), None, stream())
    with pytest.raises(UploadRejected, match="not finite"):
        codec.encode(Upload({"x": torch.tensor(bad)}), None, stream())


@every_lossy
def test_magnitudes_that_would_overflow_are_refused(options: dict[str, Any]) -> None:
    codec, update = Codec(**options), {"w": randn(24, 40)}
    update["w"][0, 0] = 2 * LARGEST
    with pytest.raises(UploadRejected, match="takes up to 1e"):
        codec.encode(Upload(update), None, stream())
    update["w"][0, 0] = LARGEST / 2
    assert bool(torch.isfinite(travel(codec, update).update["w"]).all())


@every_lossy
def test_float16_stays_finite_with_a_residual_at_its_end(options: dict[str, Any]) -> None:
    codec = Codec(**{**options, "error_feedback": True})
    update = {"w": torch.full((24, 40), 65504.0).half()}
    memory: Tensors | None = None
    for _ in range(3):
        upload, memory = codec.encode(Upload(update), memory, stream())
        assert bool(torch.isfinite(codec.decode(upload).update["w"]).all())


@every_codec
def test_nothing_to_encode_passes_with_its_memory(options: dict[str, Any]) -> None:
    codec, memory = Codec(**options), {"update/all/w": randn(3)}
    measured = Upload(None, 2.0, {"loss": (1.0, 1.0)}, counts=Scalars({"n": 2.0}))
    upload, kept = codec.encode(measured, memory, stream())
    assert kept is memory and encode(upload) == encode(measured)
    assert encode(codec.decode(upload)) == encode(measured)
    named = Codec(**options, parts=("counts",))
    assert encode(named.encode(measured, None, stream())[0]) == encode(measured), "numbers are no tensors"


def test_the_default_changes_nothing() -> None:
    codec, upload = Codec(), Upload(tree())
    assert codec.idle and encode(codec.encode(upload, None, stream())[0]) == encode(upload)


@every_codec
def test_an_owned_part_keeps_its_view(options: dict[str, Any]) -> None:
    view = View({"w": (torch.tensor([0, 3, 5]), slice(1, 30)), "v": (slice(0, 4),)}, {"w": 0.5})
    part = Owned({"w": randn(3, 29), "v": randn(4)}, view)
    result = travel(Codec(**options), part).parts["update"]
    assert isinstance(result, Owned) and result.view.scales == view.scales
    assert torch.equal(result.view.regions["w"][0], view.regions["w"][0])  # type: ignore[arg-type]
    assert result.view.regions["w"][1] == view.regions["w"][1] and result.view.regions["v"] == view.regions["v"]
    if options == {"kind": "fp32"}:
        assert same(result.tensors, part.tensors)


@every_codec
def test_a_reducer_sees_what_the_method_sent(options: dict[str, Any]) -> None:
    codec, expected = Codec(**options), {"update": tree()}
    reduction, plain = Reduction(Mean(), expected), Reduction(Mean(), expected)
    for client in range(3):
        upload = travel(codec, tree(client), client)
        reduction.add(str(client), upload)
        plain.add(str(client), Upload(upload.update, weight=3.0))
    assert same(reduction.result(3).params, plain.result(3).params)


@every_codec
def test_a_part_of_bytes_reaches_no_reducer(options: dict[str, Any]) -> None:
    upload, _ = Codec(**options, entropy="zstd").encode(Upload(tree()), None, stream())
    assert isinstance(upload.parts["update"], Coded) and not Coded.summable
    with pytest.raises(UploadRejected, match="coded"):
        Reduction(Mean(), {"update": tree()}).add("c", upload)
    with pytest.raises(UploadRejected, match="coded"):
        Reduction(Mean()).add("c", upload)


# --- lossless -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_fp32_with_zstd_keeps_every_bit(dtype: torch.dtype, data: Any) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    values = data.draw(st.lists(FINITE, min_size=math.prod(shape), max_size=math.prod(shape)))
    update = {"x": torch.tensor(values).reshape(shape).to(dtype), "minus": torch.tensor([-0.0, 1e-45])}
    result = travel(Codec(entropy="zstd"), update).update
    for name, tensor in update.items():
        assert result[name].shape == tensor.shape and result[name].dtype == tensor.dtype
        assert result[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "part",
    [
        Table(randn(3, 4), torch.tensor([1.0, 0.0, 2.0])),
        SeedCoefficients(randn(9)),
        Dense({"x": randn(3)}),
        Owned({"x": randn(2)}, View({"x": (slice(0, 2),)})),
    ],
    ids=lambda part: part.kind,
)
def test_fp32_with_zstd_takes_any_part_and_lossy_codes_only_some(part: Any) -> None:
    result = travel(Codec(entropy="zstd"), part).parts["update"]
    assert type(result) is type(part) and same(result.to_wire()[0], part.to_wire()[0])
    if isinstance(part, Table | SeedCoefficients):
        with pytest.raises(ConfigError, match="takes dense and owned parts"):
            Codec(kind="int8").encode(Upload(part), None, stream())
        with pytest.raises(ConfigError, match="coded"):
            Codec(kind="int8").encode(Upload(Coded(torch.zeros(1, dtype=torch.uint8), {})), None, stream())


@given(st.binary(max_size=3000), st.integers(1, 19))
@settings(max_examples=50, deadline=None)
def test_zstd_round_trip(data: bytes, level: int) -> None:
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    shrunk, smaller = compressed(codes, level)
    assert torch.equal(expanded(shrunk, len(data)) if smaller else shrunk, codes)
    assert shrunk.numel() <= codes.numel()


def test_zstd_falls_back_where_it_does_not_shrink() -> None:
    noise = {"x": torch.randint(-128, 127, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int8)}
    upload, _ = Codec(entropy="zstd").encode(Upload({**noise}), None, stream())
    assert upload.parts["update"].facts["zstd"] is False  # type: ignore[attr-defined]
    assert same(Codec(entropy="zstd").decode(upload).update, noise)


def test_bf16_rounds_to_nearest_even_and_leaves_narrow_types() -> None:
    update = {"x": randn(1000), "h": randn(7).half(), "b": randn(7).bfloat16()}
    result = travel(Codec(kind="bf16"), update).update
    assert torch.equal(result["x"], update["x"].bfloat16().float())
    assert bool(((result["x"] - update["x"]).abs() <= update["x"].abs() * 2**-8).all())
    assert torch.equal(result["h"], update["h"]) and torch.equal(result["b"], update["b"])


# --- integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("nearest", [False, True])
@given(values=st.lists(FINITE, min_size=1, max_size=150), block=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_integers_err_by_less_than_their_scale(
    bits: int, nearest: bool, values: list[float], block: int, seed: int
) -> None:
    x, coder = torch.tensor(values), Quantise(bits, block, nearest)
    sections = coder.encode(x, x.dtype, stream(seed))
    assert [(s.dtype, s.numel()) for s in sections] == coder.layout(x.shape, x.dtype)
    assert int(coder.integers(sections, x.numel()).abs().max()) <= coder.top
    decoded = coder.decode(sections, x.shape)
    scales = sections[1].repeat_interleave(block)[: x.numel()]
    slack = x.abs() * 1e-6 + 1e-37
    assert bool(((decoded - x).abs() <= scales * (0.5 if nearest else 1.0) + slack).all())
    for start in range(0, x.numel(), block):
        part = slice(start, start + block)
        assert torch.allclose(sections[1][start // block] * coder.top, x[part].abs().max(), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("clip", [None, 4.0])
def test_stochastic_rounding_is_unbiased(bits: int, clip: float | None) -> None:
    """The mean of 20,000 decoded copies is within 4.5 standard errors of every entry (200 of them)."""
    x, draws = randn(200).clamp(-4, 4), 20_000
    coder, rng = Quantise(bits, 200, clip=clip), stream(1)
    copies = Quantise(bits, 200, clip=clip).decode(coder.encode(x.repeat(draws), x.dtype, rng), (draws, 200)).double()
    step = coder.step if clip else float(x.abs().max()) / coder.top
    fraction = (x.double() / step) % 1
    error = step * (fraction * (1 - fraction) / draws).sqrt()
    assert bool(((copies.mean(0) - x).abs() <= 4.5 * error + 2e-6 * x.abs()).all())
    spread = copies.var(0) - step**2 * fraction * (1 - fraction)
    assert bool((spread.abs() <= 4.5 * step * error + 1e-5 * step**2).all())


@pytest.mark.parametrize("bits", [8, 4])
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_multiples_of_the_scale_are_exact(bits: int, data: Any) -> None:
    coder = Quantise(bits, 64)
    q = [*data.draw(st.lists(st.integers(-coder.top, coder.top), max_size=63)), coder.top]
    x = torch.tensor(q, dtype=torch.float32) * 0.25
    assert torch.equal(coder.decode(coder.encode(x, x.dtype, stream()), x.shape), x)


def test_an_outlier_ruins_only_its_block() -> None:
    x = randn(1024)
    x[0] = 1000.0
    blocks = travel(Codec(kind="int4", block=64), {"x": x}).update["x"]
    whole = travel(Codec(kind="int4", block=1024), {"x": x}).update["x"]
    error = [float((found - x)[64:].square().mean()) for found in (blocks, whole)]
    assert error[0] < 0.1 < error[1]


def test_the_bytes_are_those_of_the_formula() -> None:
    x, header = {"x": randn(1001)}, 700
    sizes = {
        "bf16": 2 * 1001, "int8": 1001 + 4 * 4, "int4": 501 + 4 * 4, "sign": 126 + 4, "topk": 10 * 8,
    }  # fmt: skip
    for kind, size in sizes.items():
        coded = Codec(kind=kind).encode(Upload(x), None, stream())[0].parts["update"].codes  # type: ignore[attr-defined,arg-type]
        manifest = int.from_bytes(coded[:4].numpy().tobytes(), "little")
        assert coded.numel() == size + 4 + manifest and manifest < header, kind
    assert LowRank(4).layout((768, 3072), torch.float32) == [(torch.float32, 4 * 768), (torch.float32, 4 * 3072)]


@given(st.integers(1, 40), st.sampled_from(["int8", "int4"]), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_codes_with_one_clip_add_up(clients: int, kind: Any, seed: int) -> None:
    codec = Codec(kind=kind, clip=2.0)
    assert codec.linear
    words = torch.zeros(50, dtype=torch.int64)
    plain = torch.zeros(50, dtype=torch.float64)
    for client in range(clients):
        upload, _ = codec.encode(Upload({"x": randn(50, seed=seed + client)}), None, stream(client))
        words += codec.integers(upload.parts["update"])["x"]  # type: ignore[arg-type]
        plain += codec.decode(upload).update["x"]
    assert torch.allclose(words.double() * codec.step, plain, rtol=1e-6, atol=1e-5)
    assert int(words.abs().max()) < 2 ** (codec.word_bits(clients) - 1)


def test_a_word_is_as_wide_as_the_sum_needs() -> None:
    assert Codec(kind="int8", clip=1.0).word_bits(100) == 15 == math.ceil(math.log2(2 * 100 * 127 + 1))
    assert Codec(kind="int4", clip=1.0).word_bits(100) == 11
    with pytest.raises(ConfigError, match="makes no integers"):
        Codec(kind="topk").word_bits(3)


def test_what_is_clipped_is_counted() -> None:
    codec = Codec(kind="int8", clip=1.0)
    upload, memory = codec.encode(Upload({"x": torch.tensor([0.5, 2.0, -3.0, 1.0])}), None, stream())
    assert upload.metrics["codec_clipped"] == (2.0, 4.0)
    decoded = codec.decode(upload).update["x"]
    assert torch.allclose(decoded[1:], torch.tensor([1.0, -1.0, 1.0]))
    assert memory is not None and torch.allclose(memory["update/all/x"][1:], torch.tensor([1.0, -2.0, 0.0]))


# --- top-k, sign, low rank ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=120), st.floats(0.001, 1.0))
@settings(max_examples=150, deadline=None)
def test_topk_keeps_the_k_largest_and_of_equals_the_first(values: list[int], density: float) -> None:
    x, coder = torch.tensor(values, dtype=torch.float32), TopK(density)
    k = max(1, round(density * len(values)))
    wanted = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]
    mask = largest(x.abs(), k)
    assert mask.nonzero().reshape(-1).tolist() == sorted(wanted)
    sections = coder.encode(x, x.dtype, stream())
    assert [(s.dtype, s.numel()) for s in sections] == coder.layout(x.shape, x.dtype)
    assert torch.equal(coder.decode(sections, x.shape), torch.where(mask, x, 0.0))


def test_topk_of_everything_is_lossless() -> None:
    update = {"x": randn(7, 9), "h": randn(5).half(), "b": randn(5).bfloat16(), "d": randn(3).double()}
    assert same(travel(Codec(kind="topk", density=1.0), update).update, update)


@pytest.mark.parametrize("density", [0.005, 0.2])
def test_topk_contracts(density: float) -> None:
    x = randn(4000)
    error = travel(Codec(kind="topk", density=density), {"x": x}).update["x"] - x
    assert float(error.square().sum()) <= (1 - density) * float(x.square().sum())


@given(st.lists(FINITE, min_size=1, max_size=70))
@settings(max_examples=60, deadline=None)
def test_sign_is_the_sign_times_the_mean_magnitude(values: list[float]) -> None:
    x, coder = torch.tensor(values), Sign()
    sections = coder.encode(x, x.dtype, stream())
    assert [(s.dtype, s.numel()) for s in sections] == coder.layout(x.shape, x.dtype)
    expected = torch.where(x >= 0, 1.0, -1.0) * x.double().abs().mean().float()
    assert torch.equal(coder.decode(sections, x.shape), expected)


def test_sign_of_a_gaussian_loses_one_minus_two_over_pi() -> None:
    x = randn(100_000)
    error = travel(Codec(kind="sign"), {"x": x}).update["x"] - x
    assert abs(float(error.square().sum() / x.square().sum()) - (1 - 2 / math.pi)) < 0.01


@pytest.mark.parametrize("true_rank", [0, 1, 3, 4])
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e20])
def test_low_rank_is_exact_where_the_rank_suffices(true_rank: int, unit: float) -> None:
    x = randn(60, true_rank) @ randn(true_rank, 50, seed=1) * unit
    result = travel(Codec(kind="lowrank", rank=4), {"x": x}).update["x"]
    assert float((result - x).abs().max()) <= 2e-6 * float(x.abs().max())


def test_low_rank_is_near_the_best_and_gets_nearer() -> None:
    scales = 0.7 ** torch.arange(50)
    x = torch.linalg.qr(randn(60, 50)).Q * scales @ torch.linalg.qr(randn(50, 50, seed=1)).Q
    best = float(scales[4:].square().sum())
    found = [
        float((travel(Codec(kind="lowrank", rank=4, iterations=n), {"x": x}).update["x"] - x).square().sum())
        for n in (1, 2, 8)
    ]
    assert found[0] > found[1] > found[2] >= best * 0.999 and found[2] <= best * 1.01 and found[1] < best * 1.5


def test_low_rank_leaves_what_would_not_shrink() -> None:
    update = {
        "A": randn(4, 512),
        "bias": randn(300),
        "square": randn(8, 8),
        "scalar": randn(1)[0],
        "empty": randn(0, 9),
    }
    codec = Codec(kind="lowrank", rank=4)
    assert same(travel(codec, update).update, update)
    assert codec.encode(Upload(update), None, stream())[1] is None, "nothing was lost, so nothing is kept"
    assert not LowRank(3).pays((2, 1000), torch.float64), "never more columns than the matrix has"


# --- error feedback -----------------------------------------------------------------------------------------------


@every_lossy
def test_error_feedback_telescopes(options: dict[str, Any]) -> None:
    """All that was decoded, and what is left in memory, is all that was sent."""
    codec = Codec(**{**options, "error_feedback": True})
    memory: Tensors | None = None
    sent = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tree().items()}
    arrived = {name: t.clone() for name, t in sent.items()}
    for turn in range(12):
        update = tree(10 * turn)
        upload, memory = codec.encode(Upload(update), memory, stream(turn))
        decoded = codec.decode(as_upload(encode(upload))).update
        for name in sent:
            sent[name] += update[name]
            arrived[name] += decoded[name]
    for name in sent:
        left = (memory or {}).get(f"update/all/{name}", torch.zeros(()))
        assert torch.allclose(arrived[name] + left, sent[name], atol=2e-5), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", BIASED, ids=name_of)
def test_error_feedback_counts_what_the_type_rounds_away(options: dict[str, Any], dtype: torch.dtype) -> None:
    codec, memory = Codec(**options), None
    sent = arrived = torch.zeros(24, 40, dtype=torch.float64)
    for turn in range(5):
        update = randn(24, 40, seed=turn).to(dtype)
        upload, memory = codec.encode(Upload({"w": update}), memory, stream(turn))
        sent, arrived = sent + update, arrived + codec.decode(upload).update["w"]
    assert memory is not None
    assert torch.allclose(arrived + memory["update/all/w"], sent, atol=1e-5)


def test_error_feedback_arrives_late_what_would_be_lost() -> None:
    """A small steady entry never gets through top-k alone; with feedback its mean does."""
    x = torch.full((100,), 0.01)
    x[0] = 1.0
    found = {}
    for feedback in (True, False):
        codec, memory, total = Codec(kind="topk", density=0.02, error_feedback=feedback), None, torch.zeros(100)
        for turn in range(300):
            upload, memory = codec.encode(Upload({"x": x}), memory, stream(turn))
            total += codec.decode(upload).update["x"]
        found[feedback] = total / 300
    assert float((found[True] - x).abs().max()) < 0.01
    assert int((found[False] != 0).sum()) == 2


def test_memory_is_kept_by_part_and_dropped_where_it_no_longer_fits() -> None:
    codec = Codec(kind="topk", density=0.1, parts=("update", "control"))
    both = Upload({"x": randn(30), "gone": randn(30)}, control={"x": randn(30, seed=5)})
    _, memory = codec.encode(both, None, stream())
    assert memory is not None
    assert sorted(memory) == ["control/all/x", "update/all/gone", "update/all/x"]
    before = {n: t.clone() for n, t in memory.items()}
    upload, after = codec.encode(Upload({"x": randn(20)}), memory, stream())
    assert after is not None
    assert sorted(after) == ["control/all/x", "update/all/x"] and after["update/all/x"].shape == (20,)
    assert same(memory, before), "the memory given is not changed: the engine may roll it back"
    fresh, _ = codec.encode(Upload({"x": randn(20)}), None, stream())
    assert encode(upload) == encode(fresh), "another shape: the residual does not count"


def test_memory_of_an_owned_part_belongs_to_its_view() -> None:
    codec, values = Codec(kind="topk", density=0.25), {"w": randn(4)}

    def part(start: int) -> Owned:
        return Owned(values, View({"w": (torch.arange(start, start + 4),)}))

    _, memory = codec.encode(Upload(part(0)), None, stream())
    same_view, _ = codec.encode(Upload(part(0)), memory, stream())
    other_view, kept = codec.encode(Upload(part(3)), memory, stream())
    fresh, _ = codec.encode(Upload(part(3)), None, stream())
    assert encode(other_view) == encode(fresh)
    assert not same(codec.decode(same_view).update, codec.decode(fresh).update)
    assert memory is not None and kept is not None and memory.keys() != kept.keys() and len(kept) == 1


def test_decay_shrinks_what_is_kept() -> None:
    codec, x = Codec(kind="topk", density=0.5, decay=0.5), torch.tensor([4.0, 1.0])
    _, memory = codec.encode(Upload({"x": x}), None, stream())
    _, memory = codec.encode(Upload({"x": x}), memory, stream())
    assert memory is not None and memory["update/all/x"].tolist() == [0.0, 1.5]


def test_the_memory_is_on_no_wire() -> None:
    codec = Codec(kind="topk", density=0.1)
    upload, memory = codec.encode(Upload({"x": randn(100)}), None, stream())
    assert memory is not None
    assert not any(memory["update/all/x"].shape == t.shape for t in upload.parts["update"].to_wire()[0].values())


@pytest.mark.parametrize(("options", "feedback"), [
    ({"kind": "fp32"}, False), ({"kind": "bf16"}, False), ({"kind": "int8"}, False), ({"kind": "int4"}, False),
    ({"kind": "int8", "rounding": "nearest"}, True), ({"kind": "int4", "clip": 1.0}, True),
    ({"kind": "topk"}, True), ({"kind": "sign"}, True), ({"kind": "lowrank"}, True),
    ({"kind": "topk", "error_feedback": False}, False), ({"kind": "int8", "error_feedback": True}, True),
], ids=name_of)  # fmt: skip
def test_feedback_is_on_where_the_code_is_biased(options: dict[str, Any], feedback: bool) -> None:
    codec = Codec(**options)
    assert codec.feeds_back is feedback
    _, memory = codec.encode(Upload(tree()), None, stream())
    assert (memory is not None) == feedback


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"kind": "int9"}, "codec.kind"),
    ({"kind": "topk", "density": 0.0}, "codec.density"),
    ({"kind": "topk", "density": 1.5}, "codec.density"),
    ({"kind": "lowrank", "rank": 0}, "codec.rank"),
    ({"kind": "int8", "clip": float("nan")}, "codec.clip"),
    ({"kind": "int8", "clip": -1.0}, "codec.clip"),
    ({"kind": "int8", "block": 0}, "codec.block"),
    ({"parts": []}, "codec.parts"),
    ({"entropy": "gzip"}, "codec.entropy"),
    ({"entropy": "zstd", "level": 40}, "codec.level"),
    ({"knd": "int8"}, "Did you mean 'codec.kind'"),
    ({"kind": "topk", "block": 64}, "codec.block=64 has no meaning.*int8 or.*int4.*Remove codec.block"),
    ({"kind": "int8", "density": 0.5}, "codec.density=0.5 has no meaning"),
    ({"kind": "int8", "rank": 2}, "codec.rank=2 has no meaning"),
    ({"kind": "sign", "clip": 1.0}, "codec.clip=1.0 has no meaning"),
    ({"kind": "int8", "clip": 1.0, "block": 64}, "codec.block=64 has no meaning"),
    ({"kind": "int8", "level": 9}, "codec.level=9 has no meaning.*entropy=zstd"),
    ({"kind": "int8", "decay": 0.5}, "codec.decay=0.5 has no meaning.*error_feedback"),
    ({"kind": "fp32", "error_feedback": True}, "loses nothing"),
    ({"kind": "sign", "error_feedback": False}, "Did you mean 'int4'"),
], ids=name_of)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(Codec, options, "codec")


@every_codec
def test_settings_survive_a_recipe(options: dict[str, Any]) -> None:
    codec = Codec(**options, entropy="zstd", level=5)
    assert read(Codec, json.loads(json.dumps(codec.model_dump(mode="json"))), "codec") == codec


def test_every_option_is_described() -> None:
    assert all(field.description for field in Codec.model_fields.values())


def test_check_refuses_before_a_run() -> None:
    Codec().check([], "secure-sum")
    Codec(kind="int8", clip=1.0).check(["update"], "secure-sum")
    Codec(kind="topk").check(["update"])
    with pytest.raises(ConfigError, match="Did you mean 'update'"):
        Codec(kind="topk", parts=("updte",)).check(["update", "control"])
    for options in ({"kind": "int8"}, {"kind": "topk"}, {"kind": "sign"}, {"kind": "lowrank"}, {"kind": "bf16"},
                    {"entropy": "zstd"}, {"kind": "int8", "clip": 1.0, "entropy": "zstd"}):  # fmt: skip
        with pytest.raises(ModeConflict, match=r"cannot be used under secure-sum.*codec\.clip"):
            Codec(**options).check(["update"], "secure-sum")


def test_without_zstandard_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"fedllm\[codec\]"):
        Codec(entropy="zstd").check(["update"])
    with pytest.raises(MissingExtra, match=r"fedllm\[codec\]"):
        Codec(entropy="zstd").encode(Upload(tree()), None, stream())
    Codec(kind="int8").check(["update"])


def test_a_type_that_cannot_travel_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot travel"):
        Codec(kind="int8").encode(Upload({"x": torch.zeros(3, dtype=torch.complex64)}), None, stream())


# --- hostile bytes ------------------------------------------------------------------------------------------------


def coded(codec: Codec, update: Any = None) -> Coded:
    part = codec.encode(Upload(tree() if update is None else update), None, stream())[0].parts["update"]
    assert isinstance(part, Coded)
    return part


def refused(codec: Codec, part: Coded, words: str = "decoded", expected: Any = None) -> None:
    upload = Upload(None)
    upload.parts["update"] = part
    begun = time.perf_counter()
    with pytest.raises(UploadRejected, match=words):
        codec.decode(upload, expected)
    assert time.perf_counter() - begun < 5


def forged(rows: Any, body: int = 0, kind: Any = "dense", facts: Any = None) -> torch.Tensor:
    text = json.dumps([kind, facts, rows]).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(4, "little") + text + bytes(body)), dtype=torch.uint8)


@pytest.mark.parametrize("entropy", ["none", "zstd"])
@every_codec
def test_damaged_bytes_are_refused_or_harmless(options: dict[str, Any], entropy: Any) -> None:
    codec = Codec(**options, entropy=entropy)
    if codec.idle:
        return
    part, draw = coded(codec), stream(3)
    for cut in (0, 1, 3, 4, 30, part.codes.numel() // 2, part.codes.numel() - 1):
        refused(codec, Coded(part.codes[:cut], part.facts))
    refused(codec, Coded(torch.cat([part.codes, part.codes[:1]]), part.facts))
    for _ in range(150):
        damaged = part.codes.clone()
        for place in draw.integers(0, damaged.numel(), draw.integers(1, 4)):
            damaged[place] = int(draw.integers(0, 256))
        upload = Upload(None)
        upload.parts["update"] = Coded(damaged, part.facts)
        try:
            found = codec.decode(upload, {"update": tree()})
        except UploadRejected:
            continue
        assert all(bool(torch.isfinite(t).all()) for t in found.parts["update"].to_wire()[0].values())


@given(st.binary(max_size=200), st.booleans(), st.sampled_from(EVERY))
@settings(max_examples=200, deadline=None)
def test_no_bytes_crash_the_decoder(data: bytes, shrunk: bool, options: dict[str, Any]) -> None:
    codec = Codec(**options, entropy="zstd")
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    refused(codec, Coded(codes, {"codec": codec._layout(), "zstd": shrunk}))


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("dense")
    | st.just("float32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(JSONS, JSONS, st.sampled_from(LOSSY))
@settings(max_examples=200, deadline=None)
def test_no_manifest_crashes_the_decoder(rows: Any, kind: Any, options: dict[str, Any]) -> None:
    codec, upload = Codec(**options), Upload(None)
    upload.parts["update"] = Coded(forged(rows, 3, kind), {"codec": codec._layout(), "zstd": False})
    try:
        codec.decode(upload)
    except UploadRejected:
        return


@every_codec
@pytest.mark.parametrize(("rows", "words"), [
    ([["x", "float32", [2**30, 2**9]]], "at most"),
    ([["x", "float32", [2**39] * 3]], "at most"),
    ([["x", "float32", [10**30]]], "shape"),
    ([["x", "float32", [-4, -4]]], "shape"),
    ([["x", "float32", [True]]], "shape"),
    ([["x", "float32", [1.0]]], "shape"),
    ([["x", "float32", [1] * 17]], "shape"),
    ([["x", "complex64", [1]]], "complex64"),
    ([["x", "float32", []], ["x", "float32", []]], "twice"),
    ([[3, "float32", []]], "name"),
    ([["x", "float32"]], "decoded"),
    (None, "decoded"),
    ({"x": 1}, "decoded"),
], ids=name_of)  # fmt: skip
def test_a_manifest_may_not_claim_what_it_likes(options: dict[str, Any], rows: Any, words: str) -> None:
    codec = Codec(**options, entropy="zstd")
    refused(codec, Coded(forged(rows, 64), {"codec": codec._layout(), "zstd": False}), words)


@pytest.mark.parametrize("kind", ["coded", "no-such-kind", "table", "texts", ["dense"], None])
def test_only_parts_that_can_be_coded_come_out(kind: Any) -> None:
    codec = Codec(kind="int8")
    refused(codec, Coded(forged([], 0, kind), {"codec": codec._layout(), "zstd": False}))


def test_more_than_is_expected_is_refused_before_it_is_allocated() -> None:
    codec = Codec(kind="lowrank", rank=1)
    sides = 2**13 + 2**13
    huge = forged([["x", "float32", [2**13, 2**13]]], 4 * sides)  # 64 KiB that would become 256 MiB
    part, expected = Coded(huge, {"codec": codec._layout(), "zstd": False}), {"update": {"x": torch.zeros(9, 10)}}
    refused(codec, part, f"at most {90 + 19}", expected)


def test_zstd_bombs_are_refused() -> None:
    codec = Codec(entropy="zstd")
    facts = {"codec": codec._layout(), "zstd": True}
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(200_000_000))
    assert len(bomb) < 50_000
    refused(codec, Coded(torch.frombuffer(bytearray(bomb), dtype=torch.uint8), facts), "at most", {"update": tree()})
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    refused(codec, Coded(torch.frombuffer(bytearray(silent), dtype=torch.uint8), facts), "expanded", {"update": tree()})
    part = coded(codec)
    flipped = part.codes.clone()
    flipped[-1] ^= 1
    refused(codec, Coded(flipped, part.facts), "zstd")


def test_integers_and_scales_that_no_encoder_makes_are_refused() -> None:
    def changed(codec: Codec, update: Tensors, place: int, values: bytes) -> Coded:
        part = coded(codec, update)
        codes = part.codes.clone()
        start = (
            codes.numel() + place if place < 0 else 4 + int.from_bytes(codes[:4].numpy().tobytes(), "little") + place
        )
        codes[start : start + len(values)] = torch.frombuffer(bytearray(values), dtype=torch.uint8)
        return Coded(codes, part.facts)

    x, f32 = {"x": torch.ones(3)}, lambda v: numpy.float32(v).tobytes()
    refused(Codec(kind="int8"), changed(Codec(kind="int8"), x, 0, b"\x80"), "below -127")
    refused(Codec(kind="int4"), changed(Codec(kind="int4"), x, 0, b"\x00"), "below -7")
    refused(Codec(kind="int4"), changed(Codec(kind="int4"), x, 1, b"\x11"), "half byte")
    for bad in (math.nan, math.inf, -1.0, 0.0):
        refused(Codec(kind="int8"), changed(Codec(kind="int8"), x, -4, f32(bad)), "scale")
    refused(Codec(kind="int8"), changed(Codec(kind="int8"), x, -4, f32(3e38)), "not finite")
    for bad in (math.nan, math.inf, -1.0):
        refused(Codec(kind="sign"), changed(Codec(kind="sign"), x, -4, f32(bad)), "scale")
    refused(Codec(kind="sign"), changed(Codec(kind="sign"), x, 0, b"\xff"), "filling")
    refused(Codec(kind="bf16"), changed(Codec(kind="bf16"), x, 0, b"\x80\x7f"), "not finite")
    many = {"x": torch.arange(1.0, 1001)}
    sparse = Codec(kind="topk", density=0.002)
    for places in ((5, -1), (5, 0), (-1, 3), (5, 995), (5, 2**31 - 1)):
        refused(sparse, changed(sparse, many, 0, numpy.array(places, dtype=numpy.int32).tobytes()), "places")
    refused(sparse, changed(sparse, many, -4, f32(math.nan)), "not finite")
    dense = Codec(kind="topk", density=0.5)
    refused(dense, changed(dense, many, 0, b"\xff" * 125), "places")
    low = Codec(kind="lowrank", rank=1)
    refused(low, changed(low, {"x": randn(40, 40)}, 0, f32(math.inf)), "not finite")
    flags = {"x": torch.ones(3), "y": torch.tensor([True])}
    refused(Codec(kind="int8"), changed(Codec(kind="int8"), flags, -1, b"\x02"), "truth")


def test_other_settings_are_refused() -> None:
    for one, other in (
        ({"kind": "int8"}, {"kind": "int4"}),
        ({"kind": "int8"}, {"kind": "int8", "block": 64}),
        ({"kind": "int8"}, {"kind": "int8", "clip": 1.0}),
        ({"kind": "topk", "density": 0.1}, {"kind": "topk", "density": 0.2}),
        ({"kind": "lowrank", "rank": 2}, {"kind": "lowrank", "rank": 3}),
        ({"kind": "int8"}, {"kind": "int8", "entropy": "zstd"}),
        ({"kind": "int8"}, {}),
    ):
        refused(Codec(**other), coded(Codec(**one)), "other settings")
    part = coded(Codec(kind="int8"))
    refused(Codec(kind="int8"), Coded(part.codes, {**part.facts, "zstd": True}), "other settings")
    upload = Upload(None)
    upload.parts["update"] = coded(Codec(kind="int8", rounding="nearest"))
    Codec(kind="int8").decode(upload)  # how it was rounded does not matter to who reads it


@pytest.mark.parametrize("facts", [
    None, [], {"codec": {}}, {"codec": {}, "zstd": 1}, {"zstd": True}, {"codec": {}, "zstd": True, "more": 1},
], ids=name_of)  # fmt: skip
def test_facts_of_another_form_are_refused(facts: Any) -> None:
    with pytest.raises(ValueError):
        Coded.from_wire({"codes": torch.zeros(1, dtype=torch.uint8)}, facts)


def test_tensors_of_another_form_are_refused() -> None:
    facts = {"codec": {}, "zstd": False}
    for tensors in ({}, {"x": torch.zeros(1, dtype=torch.uint8)}, {"codes": torch.zeros(1)},
                    {"codes": torch.zeros(1, 1, dtype=torch.uint8)}):  # fmt: skip
        with pytest.raises(ValueError):
            Coded.from_wire(tensors, facts)


def test_numbers_in_the_facts_of_a_view_are_checked() -> None:
    codec = Codec(kind="int8")
    for scale in ("NaN", "Infinity", "0", '"x"'):
        facts = '{"regions": {"x": [[0, 2]]}, "scales": {"x": ' + scale + "}}"
        text = f'["owned", {facts}, [["v.x", "float32", [2]]]]'.encode()
        body = len(text).to_bytes(4, "little") + text + bytes(2) + numpy.float32(1).tobytes()
        part = Coded(torch.frombuffer(bytearray(body), dtype=torch.uint8), {"codec": codec._layout(), "zstd": False})
        refused(codec, part)


def test_the_error_of_integers_is_a_rejection() -> None:
    codec = Codec(kind="int8", clip=1.0)
    part = coded(codec)
    with pytest.raises(UploadRejected):
        codec.integers(Coded(part.codes[:-1], part.facts))
    with pytest.raises(UploadRejected, match="at most"):
        codec.integers(part, {"x": torch.zeros(2)})
    assert codec.integers(part, tree())["a.weight"].shape == (24, 40)
    with pytest.raises(FedLLMError):
        Codec(kind="sign").integers(part)


def test_a_manifest_round_trip() -> None:
    part: Callable[[], Coded] = lambda: coded(Codec(kind="int8"))  # noqa: E731
    codes = part().codes
    length = int.from_bytes(codes[:4].numpy().tobytes(), "little")
    manifest = Manifest.from_bytes(codes[4 : 4 + length].numpy().tobytes())
    assert manifest.kind == "dense" and [e.name for e in manifest.entries] == sorted(tree())
    assert manifest.to_bytes() == codes[: 4 + length].numpy().tobytes() and manifest.numel == 33 + 960 + 120

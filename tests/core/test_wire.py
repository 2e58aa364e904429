"""Wire - every message survives the trip, and no bytes whatever make the decoder do anything but refuse them."""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core import layout
from fedllm.core.errors import ConfigError, DecodeError
from fedllm.core.layout import DTYPES, HEADER_LIMIT, written
from fedllm.core.message import (
    PARTS,
    Dense,
    Message,
    Owned,
    Part,
    Received,
    Scalars,
    SeedCoefficients,
    Table,
    Texts,
    Upload,
)
from fedllm.core.reducer import OwnedSum, Update
from fedllm.core.tensors import in_one_piece
from fedllm.core.view import View
from fedllm.core.wire import VERSION, decode, encode, size_by_part

DTYPE_LIST = sorted(DTYPES, key=str)


class PickleUsed(BaseException):
    """Not an Exception, so that no decoder can swallow it."""


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PickleUsed

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)


def a_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=stream, dtype=torch.float64) * 3).to(dtype)


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


def same(left: Message, right: Message) -> bool:
    if type(left) is not type(right) or left.parts.keys() != right.parts.keys() or left.numbers != right.numbers:
        return False
    for name, part in left.parts.items():
        (tensors, facts), (others, other_facts) = part.to_wire(), right.parts[name].to_wire()
        if type(part) is not type(right.parts[name]) or not same_tensors(tensors, others) or facts != other_facts:
            return False
    if isinstance(left, Upload) and isinstance(right, Upload):
        return left.weight == right.weight and left.metrics == right.metrics
    return True


EVERY_PART: dict[str, Callable[[], Part]] = {
    "dense": lambda: Dense({"w": a_tensor(torch.float32, (3, 4)), "b.c/d": a_tensor(torch.bfloat16, (2,))}),
    "owned": lambda: Owned(
        {"w": a_tensor(torch.float32, (2, 2)), "x": a_tensor(torch.float16, (5,))},
        View({"w": (slice(1, 3), torch.tensor([4, 0])), "x": ()}, {"w": 0.25}),
    ),
    "seed-coefficients": lambda: SeedCoefficients(a_tensor(torch.float32, (7,))),
    "table": lambda: Table(a_tensor(torch.float32, (3, 2)), torch.tensor([1.0, 0.0, 5.0])),
    "scalars": lambda: Scalars({"a": 1.5, "b": -2.0}),
    "texts": lambda: Texts(("", "zwölf", 'quotes " and \\ and \x00', "😀")),
    "owned-sum": lambda: OwnedSum({"w": torch.ones(2, 2).double()}, {"w": torch.full((2, 2), 3.0).double()}),
}


def test_every_registered_part_is_tested() -> None:
    built_in = {kind for kind, part in PARTS.items() if part.__module__.startswith("fedllm.core.")}
    assert built_in == set(EVERY_PART)


@pytest.mark.parametrize("kind", EVERY_PART)
@pytest.mark.parametrize("cls", [Message, Received, Upload])
def test_round_trip_of_every_part_in_every_class(kind: str, cls: type[Message]) -> None:
    message = cls()
    message.parts["it"] = EVERY_PART[kind]()
    message.numbers.update({"n": 3, "nested": {"list": [1, 2.5, None, True, "x"]}})
    data = encode(message)
    back = decode(data)
    assert same(message, back)
    assert encode(back) == data


def test_round_trip_of_all_parts_together_and_the_upload_fields() -> None:
    upload = Upload(
        {"w": torch.ones(2)},
        12.5,
        {"loss": (3.0, 4.0), "a": (0.0, 0.0)},
        {"k": [1]},
        **{k: f() for k, f in EVERY_PART.items()},
    )
    back = decode(encode(upload))
    assert isinstance(back, Upload)
    assert same(upload, back)
    assert back.weight == 12.5
    assert back.metrics == {"loss": (3.0, 4.0), "a": (0.0, 0.0)}
    assert torch.equal(back.update["w"], torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3), (1, 1, 1, 4)], ids=str)
def test_round_trip_of_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    received = Received({"t": a_tensor(dtype, shape)})
    back = decode(encode(received))
    assert isinstance(back, Received)
    assert same_tensors(back.params, received.params)


def test_values_that_arithmetic_would_lose_survive() -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38])
    whole = torch.tensor([2**63 - 1, -(2**63), 2**53 + 1])
    back = decode(encode(Message({"p": Dense({"odd": odd, "whole": whole})})))["p"]
    assert torch.equal(back["odd"].view(torch.int32), odd.view(torch.int32))
    assert torch.equal(back["whole"], whole)


def test_views_shared_storage_and_tied_tensors() -> None:
    big = a_tensor(torch.float32, (6, 8))
    tied = torch.nn.Parameter(torch.ones(3))
    tensors = {
        "whole": big,
        "row": big[2],
        "column": big[:, 3],
        "transposed": big.t(),
        "strided": big[::2, 1::3],
        "flipped": big.flip(0),
        "expanded": torch.ones(1).expand(5),
        "tied": tied,
        "tied.too": tied,
        "empty.slice": big[:0],
        "reinterpreted": big.view(torch.int32),
    }
    back = decode(encode(Message({"p": Dense(tensors)})))["p"]
    assert same_tensors(back, {n: t.detach().contiguous() for n, t in tensors.items()})
    back["tied"].add_(1)
    assert torch.equal(back["tied.too"], torch.ones(3)), "decoded tensors must not share storage"


def test_what_is_decoded_shares_nothing_with_what_was_encoded() -> None:
    start = torch.ones(4)
    data = encode(Received({"w": start}))
    first, second = decode(data), decode(data)
    first["params"]["w"].add_(5)
    assert torch.equal(start, torch.ones(4))
    assert torch.equal(second["params"]["w"], torch.ones(4))
    assert data == encode(Received({"w": start}))


def test_same_message_same_bytes_whatever_the_order_it_was_built_in() -> None:
    tensors = {f"t{i}": a_tensor(DTYPE_LIST[i % len(DTYPE_LIST)], (i,), i) for i in range(12)}
    rng = random.Random(0)
    first = None
    for _ in range(20):
        names = rng.sample(sorted(tensors), len(tensors))
        parts = [
            ("b", Dense({n: tensors[n] for n in names})),
            ("a", Scalars({n: 1.0 for n in names})),
            ("c", Texts(())),
        ]
        rng.shuffle(parts)
        numbers = {n: i for i, n in enumerate(sorted(names))}
        upload = Upload(None, 2, {n: (1.0, 1.0) for n in names}, {n: numbers[n] for n in names})
        upload.parts.update(parts)
        data = encode(upload)
        first = first or data
        assert data == first


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
        st.tuples(st.sampled_from(DTYPE_LIST), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99)),
        max_size=4,
    ),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/"), min_size=1, max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_of_anything(named: dict[str, tuple[Any, list[int], int]], part: str, number: Any) -> None:
    tensors = {n: a_tensor(dtype, tuple(shape), seed) for n, (dtype, shape, seed) in named.items()}
    message = Message({part: Dense(tensors)}, {"n": number})
    if part == "header":
        with pytest.raises(ConfigError):
            encode(message)
        return
    data = encode(message)
    assert same(message, decode(data))
    assert sum(size_by_part(data).values()) == len(data)


def test_tensors_come_in_the_order_of_their_names() -> None:
    """The library gives them in a random one, and sums over tensors must not depend on it."""
    names = [f"layer.{n}" for n in range(30)] + ["b", "a/c", "a"]
    data = encode(Received({n: torch.ones(1) for n in names}))
    for _ in range(10):
        back = decode(data)
        assert list(back["params"]) == sorted(names)


def test_sizes_by_part_are_exact() -> None:
    upload = Upload({"w": torch.ones(3, 4), "n": torch.ones(2, dtype=torch.int64)}, control={"w": torch.ones(5).half()})
    upload.parts["words"] = Texts(("hello",))
    data = encode(upload)
    sizes = size_by_part(data)
    assert sizes["update"] == 3 * 4 * 4 + 2 * 8
    assert sizes["control"] == 10
    assert sizes["words"] == len('["hello"]'), "texts travel in the file's header, and count by themselves"
    assert sum(sizes.values()) == len(data)


@pytest.mark.parametrize("text", ["", "x", "a" * 5000, 'he said "no"\\', "Zürich 🙂\n"])
def test_what_has_no_tensors_is_told_too(text: str) -> None:
    """A site's policy lists parts by name: nothing a client says may pass as the header."""
    plain = size_by_part(encode(Upload(None, numbers={"a": 1})))
    upload = Upload(None, numbers={"a": 1}, said=Texts((text,)), many=Scalars({"loss": 1.5}))
    data = encode(upload)
    sizes = size_by_part(data)
    assert set(sizes) == {"said", "many", "header"} and sum(sizes.values()) == len(data)
    assert sizes["said"] >= len(text) and sizes["many"] == len('{"loss": 1.5}')
    assert plain["header"] < sizes["header"] < plain["header"] + 250 + sizes["said"] // 2, "names and what JSON escapes"
    assert size_by_part(encode(Upload({})))["update"] == 0


@pytest.mark.parametrize("facts", ["[" * 900 + "]" * 900, '["éééééééééééééééééééééééééééé"]'])
def test_sizes_of_a_message_that_others_made_add_up(facts: str) -> None:
    """Facts of a form that this package does not write, or so deep that writing them may fail."""
    part = f'{{"kind": "dense", "facts": {facts}}}'
    structure = f'{{"version": 1, "class": "message", "numbers": {{}}, "parts": {{"p": {part}}}}}'
    data = written({}, structure)
    decode(data)
    sizes = size_by_part(data)
    assert sum(sizes.values()) == len(data) and min(sizes.values()) >= 0


@pytest.mark.parametrize("seed", range(40))
def test_the_file_is_what_the_library_would_write(seed: int) -> None:
    """Byte for byte, for every number type, odd names and empty tensors."""
    draw, odd = random.Random(seed), ["a", "b.", "é", '"', "\\x", "\n", "\x7f", "\u2028", "\U0001f600"]
    tensors = {}
    for _ in range(draw.randint(0, 12)):
        shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 3))]
        made = (torch.randn(shape) * 50).to(draw.choice(DTYPE_LIST))
        tensors[draw.choice(odd) + str(draw.randint(0, 30))] = made
    text = json.dumps({"x": draw.choice(odd)})
    assert written(tensors, text) == safetensors.torch.save(tensors, {"fedllm": text})


def test_the_bytes_are_a_safetensors_file(tmp_path: Path) -> None:
    upload = Upload({"w": a_tensor(torch.bfloat16, (2, 3))}, 4.0, extra={"v": a_tensor(torch.int64, (3,))})
    file = tmp_path / "message.safetensors"
    file.write_bytes(encode(upload))
    assert same_tensors(
        safetensors.torch.load_file(file), {"update/w": upload.update["w"], "extra/v": upload["extra"]["v"]}
    )
    with safetensors.safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["fedllm"])
    assert facts["class"] == "upload"
    assert facts["weight"] == 4.0
    assert facts["version"] == VERSION


# -- what may not be sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (Message({"a/b": Scalars({})}), "a/b"),
        (Message({"header": Scalars({})}), "header"),
        (Message({"": Scalars({})}), "''"),
        (Message({"p": Dense({"w": torch.ones(2, dtype=torch.complex64)})}), "complex64"),
        (Message({"p": Dense({"w": torch.ones(2).to(torch.float8_e4m3fn)})}), "float8"),
        (Message({"p": Dense({"w": torch.ones([1] * 17)})}), "17 dimensions"),
        (Message({}, {"n": numpy.int64(3)}), "int64"),
        (Message({}, {"n": {1, 2}}), "set"),
        (Message({}, {"n": torch.ones(1)}), "Tensor"),
        (Message({}, {"n": {1: 2, "a": 3}}), "cannot travel"),
        (Update(), "Update"),
    ],
)
def test_what_cannot_be_read_again_is_refused_when_it_is_sent(message: Message, word: str) -> None:
    with pytest.raises(ConfigError, match=word.replace("(", "")):
        encode(message)


# -- hostile bytes ----------------------------------------------------------------------------------------------------


def raw(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def structure(**changes: Any) -> dict[str, Any]:
    facts = {
        "version": VERSION,
        "class": "upload",
        "parts": {"p": {"kind": "dense", "facts": None}},
        "numbers": {},
        "weight": 1.0,
        "metrics": {},
    }
    return {k: v for k, v in {**facts, **changes}.items() if v is not ...}


def forged(body: bytes = b"", tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    return raw({"__metadata__": {"fedllm": json.dumps(structure(**changes))}, **(tensors or {})}, body)


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def only_refuses(data: bytes) -> bool:
    """True where `data` was decoded to a message; a DecodeError is fine, anything else fails the test."""
    try:
        message = decode(data)
    except DecodeError as fault:
        assert str(fault)
        return False
    assert isinstance(message, Message)
    assert all(isinstance(part, Part) for part in message.parts.values())
    return True


def small() -> bytes:
    upload = Upload({"w": torch.ones(2)}, 3.0, {"loss": (1.0, 2.0)}, {"n": [1, {"a": None}]}, words=Texts(("hi",)))
    upload.parts["own"] = Owned({"w": torch.ones(1)}, View({"w": (torch.tensor([1]),)}, {"w": 2.0}))
    return encode(upload)


def test_the_forger_can_forge_a_valid_message() -> None:
    back = decode(forged(struct.pack("<f", 2.5), {"p/x": entry()}))
    assert isinstance(back, Upload)
    assert back["p"]["x"].tolist() == [2.5]


def test_truncation_at_every_position() -> None:
    data = small()
    assert only_refuses(data)
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            decode(data[:length])


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(DecodeError):
        decode(small() + b"\x00")


def test_every_bit_flipped() -> None:
    data = small()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            only_refuses(bytes(flipped))


def test_random_damage() -> None:
    rng, data = random.Random(0), small()
    decoded = 0
    for _ in range(4000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            place, kind = rng.randrange(len(damaged)), rng.randrange(4)
            if kind == 0:
                damaged[place] = rng.randrange(256)
            elif kind == 1:
                del damaged[place : place + rng.randint(1, 5)]
            elif kind == 2:
                damaged[place:place] = rng.randbytes(rng.randint(1, 5))
            else:
                other = rng.randrange(len(damaged))
                damaged[place : place + 4] = damaged[other : other + 4]
            if not damaged:
                break
        decoded += only_refuses(bytes(damaged))
    assert decoded < 4000


def test_random_damage_inside_a_header_of_the_right_length() -> None:
    """Keeps the length and the outer JSON right, so that the damage reaches the inner layers."""
    rng = random.Random(1)
    values = [None, True, -1, 2**70, 1e400, "", "x", [], [1], {}, {"a": 1}, [[]], "dense", "owned", "NaN", 0.5]
    for _ in range(3000):
        facts = json.loads(
            json.dumps(
                structure(parts={"p": {"kind": "owned", "facts": {"regions": {"w": [[0, 1]]}, "scales": {"w": 1}}}})
            )
        )
        tensors = {"p/v.w": entry()}
        for _ in range(rng.randint(1, 3)):
            _mutate(rng, rng.choice([facts, tensors]), values)
        only_refuses(raw({"__metadata__": {"fedllm": json.dumps(facts)}, **tensors}, b"\x00\x00\x80\x3f"))


def _mutate(rng: random.Random, tree: Any, values: list[Any]) -> None:
    while isinstance(tree, dict | list) and tree:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.7:
            tree = tree[key]
            continue
        if rng.random() < 0.3:
            del tree[key]
        else:
            tree[key] = copy.deepcopy(rng.choice(values))
        return


@given(st.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_random_bytes(data: bytes) -> None:
    assert not only_refuses(data)
    only_refuses(struct.pack("<Q", len(data)) + data)
    only_refuses(raw(data, data))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["__metadata__", "fedllm", "p/x", "dtype", "shape", "data_offsets", "version"]), inner
            )
        ),
        max_leaves=10,
    )
)
@settings(max_examples=300, deadline=None)
def test_random_json_headers(header: Any) -> None:
    only_refuses(raw(json.dumps(header).encode("utf-8", "replace"), b"\x00" * 8))


CASES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\x00" * 7,
    "no header": struct.pack("<Q", 0),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header beyond the limit": struct.pack("<Q", HEADER_LIMIT + 1) + b"{}",
    "not json": raw(b"hello"),
    "not text": raw(b"\xff\xfe\x00\xd8"),
    "a list": raw([]),
    "no metadata": raw({"p/x": entry()}, b"\x00" * 4),
    "metadata is a number": raw({"__metadata__": 3}),
    "metadata without fedllm": raw({"__metadata__": {"other": "x"}}),
    "metadata is no text": raw({"__metadata__": {"fedllm": {"version": 1}}}),
    "deep header": raw(b"[" * 200_000),
    "deep object header": raw(b'{"a":' * 100_000),
    "deep structure": raw({"__metadata__": {"fedllm": "[" * 200_000}}),
    "deep facts": forged(parts={"p": {"kind": "texts", "facts": 0}}).replace(b"0}}", b"[" * 3),
    "structure is a list": raw({"__metadata__": {"fedllm": "[1]"}}),
    "version missing": forged(version=...),
    "version 2": forged(version=VERSION + 1),
    "version as text": forged(version=str(VERSION)),
    "class unknown": forged(**{"class": "state"}),
    "class a list": forged(**{"class": []}),
    "class missing": forged(**{"class": ...}),
    "parts a list": forged(parts=[]),
    "parts missing": forged(parts=...),
    "part without kind": forged(parts={"p": {"facts": None}}),
    "part is text": forged(parts={"p": "dense"}),
    "kind unknown": forged(parts={"p": {"kind": "pickle", "facts": None}}),
    "kind a list": forged(parts={"p": {"kind": ["dense"], "facts": None}}),
    "kind null": forged(parts={"p": {"kind": None, "facts": None}}),
    "facts missing": forged(parts={"p": {"kind": "dense"}}),
    "texts not a list": forged(parts={"p": {"kind": "texts", "facts": "abc"}}),
    "texts not text": forged(parts={"p": {"kind": "texts", "facts": ["a", 3]}}),
    "texts an object": forged(parts={"p": {"kind": "texts", "facts": {"a": "b"}}}),
    "scalars a list": forged(parts={"p": {"kind": "scalars", "facts": [1]}}),
    "scalars not numbers": forged(parts={"p": {"kind": "scalars", "facts": {"a": "b"}}}),
    "scalars null": forged(parts={"p": {"kind": "scalars", "facts": {"a": None}}}),
    "coefficients missing": forged(parts={"p": {"kind": "seed-coefficients", "facts": None}}),
    "table without counts": forged(
        b"\x00" * 4, {"p/rows": entry(shape=[1, 1])}, parts={"p": {"kind": "table", "facts": None}}
    ),
    "table of other lengths": forged(
        b"\x00" * 12,
        {"p/rows": entry(shape=[1, 1]), "p/counts": entry(shape=[2], offsets=[4, 12])},
        parts={"p": {"kind": "table", "facts": None}},
    ),
    "coefficients no vector": forged(
        b"\x00" * 4, {"p/coefficients": entry(shape=[])}, parts={"p": {"kind": "seed-coefficients", "facts": None}}
    ),
    "owned without facts": forged(parts={"p": {"kind": "owned", "facts": None}}),
    "owned without its index": forged(
        parts={"p": {"kind": "owned", "facts": {"regions": {"w": [None]}, "scales": {}}}}
    ),
    "numbers a list": forged(numbers=[[1, 2]]),
    "numbers null": forged(numbers=None),
    "weight NaN": forged(weight=float("nan")),
    "weight infinite": forged(weight=float("inf")),
    "weight negative": forged(weight=-1),
    "weight text": forged(weight="many"),
    "weight null": forged(weight=None),
    "weight missing": forged(weight=...),
    "weight too large for a float": forged(weight=12345).replace(b"12345", b"9" * 400),
    "weight of 5000 digits": forged(weight=12345).replace(b"12345", b"9" * 5000),
    "metrics a list": forged(metrics=[1]),
    "metrics of one": forged(metrics={"loss": [1]}),
    "metrics of text": forged(metrics={"loss": ["a", "b"]}),
    "metrics a number": forged(metrics={"loss": 3}),
    "tensor of no part": forged(b"\x00" * 4, {"q/x": entry()}),
    "tensor without a part": forged(b"\x00" * 4, {"x": entry()}),
    "dtype unknown": forged(b"\x00" * 4, {"p/x": entry("F33")}),
    "dtype complex": forged(b"\x00" * 8, {"p/x": entry("C64", [1], [0, 8])}),
    "dtype 8-bit float": forged(b"\x00" * 4, {"p/x": entry("F8_E4M3", [4])}),
    "dtype 4-bit float": forged(b"\x00" * 4, {"p/x": entry("F4", [8])}),
    "dtype unsigned": forged(b"\x00" * 4, {"p/x": entry("U32")}),
    "offsets negative": forged(b"\x00" * 4, {"p/x": entry(offsets=[-4, 0])}),
    "offsets reversed": forged(b"\x00" * 4, {"p/x": entry(offsets=[4, 0])}),
    "offsets beyond the end": forged(b"\x00" * 4, {"p/x": entry(offsets=[0, 2**40], shape=[2**38])}),
    "offsets of 2^64": forged(b"\x00" * 4, {"p/x": entry(offsets=[0, 2**64])}),
    "offsets overlap": forged(b"\x00" * 4, {"p/x": entry(), "p/y": entry()}),
    "offsets leave a hole": forged(b"\x00" * 12, {"p/x": entry(), "p/y": entry(offsets=[8, 12])}),
    "offsets text": forged(b"\x00" * 4, {"p/x": entry(offsets="04")}),
    "offsets three": forged(b"\x00" * 4, {"p/x": entry(offsets=[0, 2, 4])}),
    "shape negative": forged(b"\x00" * 4, {"p/x": entry(shape=[-1])}),
    "shape not the data": forged(b"\x00" * 4, {"p/x": entry(shape=[2])}),
    "shape overflows": forged(b"\x00" * 4, {"p/x": entry(shape=[2**40, 2**40])}),
    "shape of fractions": forged(b"\x00" * 4, {"p/x": entry(shape=[1.5])}),
    "shape empty and endless": forged(b"", {"p/x": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "shape of 5000 dimensions": forged(b"\x00" * 4, {"p/x": entry(shape=[1] * 5000)}),
    "entry missing": forged(b"", {"p/x": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_message(name: str) -> None:
    with pytest.raises(DecodeError):
        decode(CASES[name])


@pytest.mark.parametrize(
    "region",
    [
        [[-1, 1]],
        [[0, -1]],
        [[3, 1]],
        [["a", 1]],
        [[0]],
        [3],
        "ab",
        {"a": 1},
        [[0, None]],
    ],
)
def test_hostile_view_slices(region: Any) -> None:
    facts = {"regions": {"w": region}, "scales": {}}
    with pytest.raises(DecodeError):
        decode(forged(b"\x00" * 4, {"p/v.w": entry()}, parts={"p": {"kind": "owned", "facts": facts}}))


@pytest.mark.parametrize("scale", [0, "x", None, 10**400, float("nan"), float("inf")])
def test_hostile_view_scales(scale: Any) -> None:
    facts = {"regions": {"w": [[0, 1]]}, "scales": {"w": scale}}
    with pytest.raises(DecodeError):
        decode(forged(b"\x00" * 4, {"p/v.w": entry()}, parts={"p": {"kind": "owned", "facts": facts}}))


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 0]),
        torch.tensor([-1, 2]),
        torch.tensor([[0, 1]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor(3),
    ],
)
def test_hostile_view_indices(index: torch.Tensor) -> None:
    part = Owned({"w": torch.ones(2)}, View({"w": ()}))
    message = Message({"p": part})
    tensors, facts = part.to_wire()
    forged_part = _Forged({**tensors, "i.0.w": index}, {**facts, "regions": {"w": [None]}})
    message.parts["p"] = forged_part
    with pytest.raises(DecodeError):
        decode(encode(message))


class _Forged(Part):
    kind = "forged-owned"

    def __init__(self, tensors: dict[str, torch.Tensor], facts: Any) -> None:
        self.kind = "owned"  # type: ignore[misc]
        self.tensors, self.facts = tensors, facts

    def to_wire(self) -> tuple[dict[str, torch.Tensor], Any]:
        return self.tensors, self.facts


def test_duplicate_names_in_the_header() -> None:
    one, two = json.dumps(entry()), json.dumps(entry(offsets=[4, 8]))
    inner = json.dumps(json.dumps(structure()))
    header = f'{{"__metadata__":{{"fedllm":{inner}}},"p/x":{one},"p/x":{two}}}'.encode()
    only_refuses(raw(header, b"\x00" * 8))
    only_refuses(raw(header, b"\x00" * 4))
    twice = f'{{"__metadata__":{{"fedllm":{inner}}},"__metadata__":{{"fedllm":"3"}}}}'.encode()
    with pytest.raises(DecodeError):
        decode(raw(twice))


def test_json_constants_and_odd_texts_do_not_crash() -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b'"\\ud800"'):
        only_refuses(
            forged(numbers={"a": 12345}).replace(b"12345", number.replace(b"\\", b"\\\\").replace(b'"', b'\\"'))
        )


@pytest.mark.parametrize("depth", [100, 900, 950, 980, 990, 1000, 3000])
def test_nested_facts(depth: int) -> None:
    only_refuses(forged(numbers={"a": 12345}).replace(b"12345", b"[" * depth + b"]" * depth))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """256 MB more than now and not a byte beyond: a decoder that believes a hostile size gets a MemoryError."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("needs /proc to know how much memory is in use")
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 1024 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_no_hostile_size_is_ever_allocated(little_memory: None) -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        torch.zeros(2**28)
    for data in CASES.values():
        only_refuses(data)
    only_refuses(raw(b"[" + b"[]," * 300_000 + b"[]]"))
    only_refuses(forged(b"", {f"p/{i}": entry(shape=[0, 2**50], offsets=[0, 0]) for i in range(100)}))


def test_errors_name_the_fault_and_what_to_do() -> None:
    with pytest.raises(DecodeError, match=r"format version 2 .* reads version 1\. Install the same version"):
        decode(forged(version=2))
    with pytest.raises(DecodeError, match=r"claims a header of 1000 bytes and has 2"):
        decode(CASES["header longer than the file"])


# -- layouts that were seen before ------------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that the library looked at; nothing is remembered of other tests."""
    sizes: list[int] = []
    whole = layout.deserialize
    monkeypatch.setattr(layout, "deserialize", lambda data: (sizes.append(len(data)), whole(data))[1])
    monkeypatch.setattr(layout, "_remembered", {})
    return sizes


def test_a_layout_is_checked_once_and_what_is_read_is_shared_by_nobody(checks: list[int]) -> None:
    bodies = [
        encode(Upload({"w": torch.randn(2, 3), "a": torch.randn(4)}, n, said=Texts(("é" * n,)))) for n in range(5)
    ]
    first = [decode(body) for body in bodies]
    again = [decode(body) for body in bodies]
    assert len(checks) == 1
    for left, right, body in zip(first, again, bodies, strict=True):
        assert same(left, right) and encode(left) == body
        left["update"]["w"].zero_()
        assert same(right, decode(body))


def test_the_tensors_of_a_part_lie_in_one_piece() -> None:
    whole = {"b": torch.randn(3, 2), "a": torch.randn(5), "c": torch.randn(())}
    message = decode(encode(Upload(whole, control=whole, mixed={**whole, "n": torch.arange(3)})))
    for part, tensors in (("update", "abc"), ("control", "abc"), ("mixed", "abc")):
        found = in_one_piece(message[part][name] for name in tensors)
        assert found is not None and torch.equal(found, torch.cat([whole[name].flatten() for name in tensors]))
    apart = [tensor for part in ("update", "control") for tensor in message[part].values()]
    assert in_one_piece(apart) is None, "a part that is kept does not keep the others"


def test_a_file_is_read_as_if_no_other_had_been_before_it(checks: list[int]) -> None:
    """Damaged in every way, with the layout remembered and without: the same message, or refused both times."""
    rng, data, kept = random.Random(5), small(), layout._remembered
    decode(data)
    known, accepted = dict(kept), 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 2)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'"\\{}[],:0129 aeN')
        kept.clear()
        kept.update(known)
        warm = _read_or_none(bytes(damaged))
        kept.clear()
        cold = _read_or_none(bytes(damaged))
        assert (warm is None) == (cold is None)
        if warm is not None and cold is not None:
            accepted += 1
            assert same(warm, cold) or encode(warm) == encode(cold)
    assert accepted > 50


def _read_or_none(data: bytes) -> Message | None:
    try:
        return decode(data)
    except DecodeError:
        return None


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_remembered_layout_does_not_pass_a_file_of_another_length(checks: list[int], cut: int) -> None:
    data = encode(Upload({"w": torch.ones(64)}))
    decode(data)
    for other in (data[:-cut], data + b"\0" * cut):
        with pytest.raises(DecodeError):
            decode(other)


def test_so_many_layouts_are_remembered_and_no_large_one(checks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3 * layout.REMEMBERED):
        decode(encode(Upload({f"w{number}": torch.ones(1)})))
        assert len(layout._remembered) <= layout.REMEMBERED
    body = encode(Upload({"large": torch.ones(1)}))
    monkeypatch.setattr(layout, "REMEMBERED_BYTES", 10)
    before = len(checks)
    assert same(decode(body), decode(body)) and len(checks) == before + 2


def test_a_text_that_the_library_refuses_is_refused_with_a_remembered_layout_too(checks: list[int]) -> None:
    data = forged(b"\0" * 4, {"p/x": entry()}, numbers={"a": 12345})
    compact = data.replace(b'": {', b'":{').replace(b'"}, "', b'"},"')
    compact = raw(compact[8 : len(compact) - 4], b"\0" * 4)
    assert only_refuses(compact) and layout._remembered
    for odd in (b"\\ud800", b"\xff", b"\x01"):
        text = compact[8:-4].replace(b"12345", odd)
        assert not only_refuses(raw(text, b"\0" * 4))


def test_a_header_with_its_text_twice_is_not_remembered(checks: list[int]) -> None:
    said, other = json.dumps(json.dumps(structure())), json.dumps(json.dumps(structure(weight=7.0)))
    for key in ("__metadata__", "\\u005f_metadata__"):
        for second in (said, other):
            header = f'{{"__metadata__":{{"fedllm":{said}}},"p/x":{json.dumps(entry())},"{key}":{{"fedllm":{second}}}}}'
            only_refuses(raw(header.encode(), b"\0" * 4))
    assert not layout._remembered

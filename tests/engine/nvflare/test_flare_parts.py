"""Letters: what was sent arrives, and what is damaged is refused with a typed error."""

from __future__ import annotations

import json
import random
import socket
import threading

import pytest

from fedllm.core.errors import DecodeError
from fedllm.engine.nvflare import parts
from fedllm.engine.nvflare.parts import Letter, from_shareable, to_shareable
from fedllm.engine.nvflare.pipe import Closed, Pipe

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.engine.nvflare import pieces
from fedllm.engine.nvflare.pieces import Piece


@pytest.mark.parametrize("seed", range(6))
def test_round_trip(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "INLINE", 64)
    monkeypatch.setattr(parts, "PART", 100)
    draw = random.Random(seed)
    blobs = [draw.randbytes(draw.choice([0, 1, 63, 64, 99, 100, 101, 350])) for _ in range(draw.randint(0, 5))]
    letter = Letter({"op": "ask", "n": [1, None, 0.1], "name": "ä {rounds}"}, blobs)
    found = from_shareable(to_shareable(letter))
    assert found.meta == letter.meta and list(found.blobs) == blobs and found.op == "ask"


def test_large_letters_are_streamed_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "INLINE", 64)
    monkeypatch.setattr(parts, "PART", 100)
    large = to_shareable(Letter({}, [b"a" * 250]))
    assert [len(part.data) for part in large["fedllm_parts"]] == [100, 100, 50] and "fedllm_body" not in large
    assert to_shareable(Letter({}, [b"a" * 64]))["fedllm_body"] == b"a" * 64


def test_damage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(change: dict[str, object], blobs: tuple[bytes, ...] = (b"abc", b"de")) -> dict[str, object]:
        return {**to_shareable(Letter({"op": "x"}, blobs)), **change}

    facts = json.loads(to_shareable(Letter({"op": "x"}, (b"abc", b"de")))["fedllm"])

    def told(**change: object) -> dict[str, object]:
        return damaged({"fedllm": json.dumps({**facts, **change}).encode()})

    for wrong in (
        damaged({"fedllm_body": b"abcdX"}), damaged({"fedllm_body": b"abcd"}), damaged({"fedllm_body": "abcde"}),
        damaged({"fedllm": b"{"}), damaged({"fedllm": None}), told(sizes=[3, 1]), told(sizes=[-1, 6]),
        told(sizes=[2, 3]), told(meta={"op": "y"}), told(version=99), told(sizes=[3, 2.0]), told(meta=3), told(sizes=5),
        {"fedllm": json.dumps(facts).encode()},
        {"fedllm": json.dumps(facts).encode(), "fedllm_parts": [b"abcde"]},
        {"fedllm": json.dumps(facts).encode(), "fedllm_parts": [Piece(b"abc"), None]},
    ):  # fmt: skip
        with pytest.raises(DecodeError):
            from_shareable(wrong)
    assert from_shareable(damaged({})).blobs == [b"abc", b"de"]


def fetched(source: pieces._Source) -> pieces._Sink:
    """What FLARE's download does, in one process."""
    sink, state = pieces._Sink(), dict[str, int]()
    while True:
        code, items, state = source.produce(state, "a site")
        if code == "eof":
            return sink
        sink.consume("ref", state, items)


def test_pieces_are_fetched_in_order() -> None:
    whole = random.Random(0).randbytes(5000)
    cut = [Piece(memoryview(whole)[at : at + 700]) for at in range(0, 5000, 700)]
    source = pieces.PieceDecomposer().to_downloadable({f"T{n}": one for n, one in enumerate(cut)}, 1500, {})
    source.num_receivers = 1
    found = fetched(source).result
    assert found is not None and list(found) == [f"T{n}" for n in range(len(cut))]
    assert b"".join(one.data for one in found.values()) == whole
    assert all(found[f"T{n}"].data.obj is not whole for n in range(len(cut))), "none keeps the whole letter in memory"


def test_what_is_no_piece_is_refused() -> None:
    with pytest.raises(TypeError, match="a piece of a letter is a dict"):
        pieces._Sink().consume("ref", {}, [{"not": "bytes"}])


def test_flare_knows_pieces_by_a_number_of_its_own() -> None:
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.fuel.utils import fobs

    numpy_decomposers.register()
    pieces.register()
    pieces.register()
    assert isinstance(fobs.get_dot_handler(pieces.DOT), pieces.PieceDecomposer) and 0 < pieces.DOT < 256
    found = fobs.loads(fobs.dumps({"a": Piece(b"abc")}))  # no cell: as bytes
    assert found["a"].data == b"abc"


def test_pipe() -> None:
    left, right = socket.socketpair()
    one, other = Pipe(left), Pipe(right)
    letters = [Letter({"op": "a", "n": n}, [b"x" * n, b"", b"yz"]) for n in (0, 1, 300_000)]
    sender = threading.Thread(target=lambda: [one.send(letter) for letter in letters])
    sender.start()
    for letter in letters:
        found = other.receive()
        assert found.meta == letter.meta and list(found.blobs) == list(letter.blobs)
    sender.join()
    one.close()
    with pytest.raises(Closed):
        other.receive()
    with pytest.raises(Closed):
        [other.send(letters[2]) for _ in range(3)]

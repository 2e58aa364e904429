"""Replies of a site, kept until their round is settled: at once, behind, and where the disk is full."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.engine.nvflare import keeper
from fedllm.engine.nvflare.keeper import Replies
from fedllm.engine.nvflare.parts import Letter


def reply(name: str, size: int) -> Letter:
    return Letter({"id": name, "body": 0}, [name.encode() * size])


@pytest.mark.parametrize("size", [1, 40])
def test_what_was_put_is_there_until_it_is_cleared(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BEHIND", 20)
    replies = Replies(tmp_path)
    for leg in ("federated", "local"):
        replies.put(leg, reply("a", size))
    assert list(replies.get("federated", "a").blobs) == [b"a" * size]  # type: ignore[union-attr]
    assert replies.get("federated", "b") is None
    replies.clear("federated")
    assert replies.get("federated", "a") is None and replies.get("local", "a") is not None
    assert [file.parent.name for file in tmp_path.rglob("*") if file.is_file()] == ["local"]
    replies.clear()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_large_reply_is_there_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BEHIND", 20)
    replies, go = Replies(tmp_path), threading.Event()
    write = replies._write
    monkeypatch.setattr(replies, "_write", lambda file, letter: (go.wait(10), write(file, letter)))
    replies.put("federated", reply("a", 40))
    assert replies.get("federated", "a") is not None and not list(tmp_path.rglob("*"))
    go.set()
    keeper.wait(replies._writing)
    assert not replies._held and list(replies.get("federated", "a").blobs) == [b"a" * 40]  # type: ignore[union-attr]


def test_where_the_disk_is_full_it_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BEHIND", 20)
    replies = Replies(tmp_path)

    def full(file: Path, letter: Letter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replies, "_write", full)
    replies.put("federated", reply("a", 40))
    keeper.wait(replies._writing)
    assert replies.get("federated", "a") is not None
    replies.clear("federated")
    assert replies.get("federated", "a") is None

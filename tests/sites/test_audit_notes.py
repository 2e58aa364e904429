"""Several entries at once are as good as one by one, or none is written; and ids of clients that could be a text."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedllm.sites.audit import AuditError, AuditLog, AuditRefused, Digest, Note, client_name, matched, read, verify
from fedllm.sites.canonical import NAME

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SENT = Digest.of(b"update")
NOTES = [
    Note("start", "r"),
    Note("send", "r", 1, "c0", SENT, "allowed"),
    Note("receive", "r", 2, "c1", Digest.of(b"")),
    Note("end", "r"),
]


def opened(file: Path) -> AuditLog:
    return AuditLog(file, lambda: NOON)


@pytest.mark.parametrize("cut", range(len(NOTES) + 1))
def test_notes_at_once_are_as_notes_one_by_one(cut: int, tmp_path: Path) -> None:
    with opened(tmp_path / "single.jsonl") as log:
        for note in NOTES:
            log.append("s", note.action, **{k: v for k, v in note.__dict__.items() if k != "action"})
    with opened(tmp_path / "several.jsonl") as log:
        assert log.extend("s", []) == []
        written = [*log.extend("s", NOTES[:cut]), *log.extend("s", NOTES[cut:])]
        assert log.entries == len(NOTES) and log.last == written[-1].reference
    assert (tmp_path / "several.jsonl").read_bytes() == (tmp_path / "single.jsonl").read_bytes()
    assert written == read(tmp_path / "several.jsonl") and [one.seq for one in written] == [1, 2, 3, 4]
    assert all(after.prev == before.hash for before, after in pairwise(written))


@pytest.mark.parametrize("bad", [Note("dance"), Note("send", round=-1), Note("send", client="two words")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_note_keeps_all_of_them_out(bad: Note, place: int, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with opened(file) as log:
        log.extend("s", NOTES[:2])
        before, last = file.read_bytes(), log.last
        with pytest.raises(AuditRefused):
            log.extend("s", [*NOTES[2:][:place], bad, *NOTES[2:][place:]])
        assert file.read_bytes() == before and log.last == last
        log.extend("s", NOTES[2:])
    assert verify(file).intact and len(read(file)) == len(NOTES)


def test_a_closed_log_takes_no_notes(tmp_path: Path) -> None:
    with opened(tmp_path / "audit.jsonl") as log:
        pass
    with pytest.raises(AuditError, match="it is closed"):
        log.extend("s", NOTES)


@pytest.mark.parametrize("name", ["c0", "site-1", "ada@hub.org", "a" * 128, "0", "x:y/z+1.2"])
def test_a_name_stands_in_a_log_as_it_is(name: str) -> None:
    assert client_name(name) == name


@pytest.mark.parametrize("text", ["", "Mr Smith", "a\nb", "c0 ", "-c", "ä", "a" * 129, "c0\n", "x=1"])
def test_what_could_be_a_text_stands_there_as_its_hash(text: str, tmp_path: Path) -> None:
    found = client_name(text)
    assert found == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert re.fullmatch(NAME, found) and client_name(found) == found, "once more, it stays the same"
    logs: dict[str, Any] = {name: tmp_path / f"{name}.jsonl" for name in ("server", "site")}
    for name, action in (("site", "send"), ("server", "receive")):
        with opened(logs[name]) as log:
            log.extend(name, [Note(action, "r", 1, client_name(text), SENT)])
    assert matched(logs["server"], {"site": logs["site"]}) == [], "both ends form the same"
    other = client_name(text + "?")
    assert other != found

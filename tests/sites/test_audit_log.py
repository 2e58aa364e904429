"""An audit log: what may enter, what a crash leaves, and that every change shows."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedllm.core.errors import ClientLost, DataError, DecodeError
from fedllm.sites import audit
from fedllm.sites.audit import (
    ACTIONS,
    FIELDS,
    GENESIS,
    LINE_LIMIT,
    REASON_LENGTH,
    AuditDamaged,
    AuditError,
    AuditFull,
    AuditLocked,
    AuditLog,
    AuditRefused,
    Digest,
    Entry,
    Verdict,
    matched,
    read,
    verify,
)

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LINES = 5


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    filled(path)
    return path


def filled(path: Path) -> None:
    with AuditLog(path, lambda: NOON) as open_log:
        open_log.append("admin@hub.org", "start", run="run-1")
        for round in range(1, LINES - 1):
            payload = Digest.of(b"abc" * round)
            open_log.append("site-1", "send", run="run-1", round=round, client="site-1", payload=payload)
        open_log.append(
            "hub", "lost", run="run-1", client="site-2", decision="refused", reason=ClientLost("It is away.")
        )


def rechained(lines: list[bytes]) -> bytes:
    """The lines as whoever may write the file could write them anew."""
    before, found = GENESIS, b""
    for line in lines:
        body = {**json.loads(line), "prev": before}
        body.pop("hash")
        before = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        found += json.dumps({**body, "hash": before}, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return found


# --- what is written -------------------------------------------------------------------------------------------------


def test_an_entry_has_the_fixed_fields_and_is_chained_by_sha256(log: Path) -> None:
    before = GENESIS
    for number, line in enumerate(log.read_bytes().splitlines(), start=1):
        body = json.loads(line)
        assert set(body) == set(FIELDS)
        held = body.pop("hash")
        assert body["seq"] == number and body["prev"] == before and body["time"] == "2026-03-01T12:00:00.000000+00:00"
        before = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert held == before
    assert verify(log) == Verdict(LINES) and verify(log).intact


def test_a_payload_is_its_digest_alone(log: Path) -> None:
    entry = read(log)[2]
    assert (entry.sha256, entry.bytes) == (hashlib.sha256(b"abcabc").hexdigest(), 6)
    assert Digest.of(b"ab", bytearray(b"ca"), memoryview(b"bc")) == Digest.of(b"abcabc")
    assert b"abcabc" not in log.read_bytes()


def test_a_log_goes_on_where_it_ended(log: Path) -> None:
    with AuditLog(log) as again:
        assert again.entries == LINES and again.last == read(log)[-1].reference
        entry = again.append("hub", "end", run="run-1")
        assert again.last == entry.reference == f"{LINES + 1}:{entry.hash}"
    assert verify(log) == Verdict(LINES + 1)
    assert read(log)[-1] == entry


def test_an_empty_log_is_intact(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "deep" / "audit.jsonl") as empty:
        assert empty.last is None
    assert verify(tmp_path / "deep" / "audit.jsonl") == Verdict(0)


def test_each_entry_is_synced_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with AuditLog(path) as open_log:
        lengths: list[int] = []
        real = os.fsync
        monkeypatch.setattr(audit.os, "fsync", lambda file: (lengths.append(os.fstat(file).st_size), real(file)))
        for _ in range(3):
            open_log.append("hub", "start")
            assert lengths[-1] == path.stat().st_size
    assert len(lengths) == 3


def test_threads_share_a_writer(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "a.jsonl") as open_log:
        threads = [
            threading.Thread(target=lambda n=n: [open_log.append(f"site-{n}", "request") for _ in range(10)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(tmp_path / "a.jsonl") == Verdict(40)


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action_is_recorded_and_read(tmp_path: Path, action: str) -> None:
    with AuditLog(tmp_path / "a.jsonl") as open_log:
        open_log.append("hub", action)
    assert read(tmp_path / "a.jsonl")[0].action == action


# --- what may not enter ----------------------------------------------------------------------------------------------

TEXT = "the patient has a fever"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"action": "sned"}, "Did you mean 'send'"),
        ({"action": TEXT}, "There is no action"),
        ({"actor": TEXT}, "actor"),
        ({"actor": ""}, "actor"),
        ({"actor": "x" * 129}, "actor"),
        ({"actor": "site-1\n"}, "actor"),
        ({"run": TEXT}, "run"),
        ({"client": TEXT}, "client"),
        ({"client": 3}, "client"),
        ({"client": [0.1, 0.2]}, "client"),
        ({"round": -1}, "round"),
        ({"round": 0.5}, "round"),
        ({"round": True}, "round"),
        ({"round": 2**63}, "round"),
        ({"decision": "allow"}, "Did you mean 'allowed'"),
        ({"payload": Digest("f" * 63, 1)}, "sha256"),
        ({"payload": Digest(TEXT, 1)}, "sha256"),
        ({"payload": Digest("f" * 64, -1)}, "bytes"),
        ({"peer": TEXT}, "peer"),
        ({"peer": "0:" + "f" * 64}, "peer"),
        ({"reason": TEXT}, "reason"),
        ({"reason": ValueError(TEXT)}, "reason"),
    ],
)
def test_what_has_no_field_does_not_enter(log: Path, given: dict[str, Any], named: str) -> None:
    before = log.read_bytes()
    with AuditLog(log) as open_log:
        with pytest.raises(AuditRefused, match=named):
            open_log.append(**{"actor": "hub", "action": "send", **given})
        assert log.read_bytes() == before
        open_log.append("hub", "send")
    assert verify(log) == Verdict(LINES + 1)


@pytest.mark.parametrize("field", ["actor", "action", "run", "client", "peer", "reason", "decision"])
def test_a_text_in_the_wrong_place_is_not_quoted_either(log: Path, field: str) -> None:
    with AuditLog(log) as open_log, pytest.raises(AuditRefused) as caught:
        open_log.append(**{"actor": "hub", "action": "send", field: f"{TEXT}, said the letter of the third of May"})
    assert TEXT not in str(caught.value)


def test_there_are_no_other_fields(log: Path) -> None:
    with AuditLog(log) as open_log, pytest.raises(TypeError):
        open_log.append("hub", "send", text=TEXT)  # type: ignore[call-arg]


def test_the_bounds_of_values_are_allowed(log: Path) -> None:
    with AuditLog(log) as open_log:
        entry = open_log.append("x" * 128, "send", round=0, payload=Digest.of(), peer="1:" + "f" * 64)
    assert entry.bytes == 0 and verify(log) == Verdict(LINES + 1)


@pytest.mark.parametrize("length", [REASON_LENGTH - 1, REASON_LENGTH, REASON_LENGTH + 1, 10_000])
@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"])
def test_a_reason_is_cut(log: Path, length: int, letter: str) -> None:
    with AuditLog(log) as open_log:
        entry = open_log.append("hub", "lost", reason=ClientLost(letter * length))
    assert entry.reason is not None and len(entry.reason) == min(length, REASON_LENGTH)
    assert entry.reason.endswith("...") == (length > REASON_LENGTH)
    assert len(log.read_bytes().splitlines()[-1]) < LINE_LIMIT
    assert verify(log).intact


@pytest.mark.parametrize("error", [DataError(f"The label '{TEXT}' is new."), DecodeError(TEXT)])
def test_errors_that_may_quote_data_are_named_alone(log: Path, error: Any) -> None:
    with AuditLog(log) as open_log:
        entry = open_log.append("hub", "reject", reason=error)
    assert type(error).__name__ in (entry.reason or "") and TEXT.encode() not in log.read_bytes()


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_names_its_line(log: Path, seed: int) -> None:
    """Every field of every line, the punctuation and the line ends, each changed in one bit or one byte."""
    rng, data = random.Random(seed), log.read_bytes()
    lines = data.splitlines(keepends=True)
    starts = [sum(map(len, lines[:n])) for n in range(len(lines))]
    for number, line in enumerate(lines, start=1):
        places = {name: line.index(f'"{name}":'.encode()) + len(name) + 3 for name in FIELDS}
        keys = [place - 2 for place in places.values()]
        spots = [*places.values(), *keys, 0, len(line) - 2, len(line) - 1, rng.randrange(len(line))]
        for spot in spots:
            changed = bytearray(data)
            at = starts[number - 1] + spot
            changed[at] = (
                changed[at] ^ (1 << rng.randrange(8)) if seed % 2 else (changed[at] + rng.randrange(1, 256)) % 256
            )
            log.write_bytes(changed)
            found = verify(log)
            assert found.first_bad_line == number and found.entries == number - 1 and found.why, (number, spot, found)


def test_every_byte_of_a_line_counts(log: Path) -> None:
    data = log.read_bytes()
    lines = data.splitlines(keepends=True)
    start = len(lines[0]) + len(lines[1])
    for at in range(start, start + len(lines[2])):
        changed = bytearray(data)
        changed[at] ^= 1
        log.write_bytes(changed)
        assert verify(log).first_bad_line == 3


def test_removed_swapped_repeated_and_inserted_lines_are_named(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)

    def bad(changed: list[bytes]) -> int | None:
        log.write_bytes(b"".join(changed))
        return verify(log).first_bad_line

    for n in range(LINES - 1):
        assert bad(lines[:n] + lines[n + 1 :]) == n + 1
        swapped = [*lines]
        swapped[n], swapped[n + 1] = swapped[n + 1], swapped[n]
        assert bad(swapped) == n + 1
        assert bad(lines[: n + 1] + lines[n:]) == n + 2
        assert bad([*lines[: n + 1], b"\n", *lines[n + 1 :]]) == n + 2
    for n in range(1, LINES):
        assert bad(lines[n:]) == 1
    assert bad(lines) is None


def test_a_line_written_anew_breaks_the_one_behind(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[2]) | {"bytes": 7}
    forged = rechained([*lines[:2], json.dumps(changed).encode()])
    log.write_bytes(forged + b"".join(lines[3:]))
    found = verify(log)
    assert found.first_bad_line == 4 and "line before" in found.why


@pytest.mark.parametrize(
    "change",
    [
        {"text": "a prompt"},
        {"action": ["send"]},
        {"action": "shout"},
        {"decision": ["allowed"]},
        {"reason": "x" * (REASON_LENGTH + 1)},
        {"client": "the patient has a fever"},
        {"bytes": None},
        {"seq": True},
        {"time": "yesterday"},
    ],
)
def test_an_entry_that_could_not_have_been_written_is_bad_even_with_a_right_hash(
    log: Path, change: dict[str, Any]
) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(rechained([*lines[:1], json.dumps(json.loads(lines[1]) | change).encode(), *lines[2:]]))
    assert verify(log).first_bad_line == 2


def test_an_added_space_and_a_wrong_number_are_named(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    for spaced in (lines[2].replace(b',"seq"', b', "seq"'), lines[2].replace(b"{", b"{ ", 1), lines[2][:-1] + b" \n"):
        log.write_bytes(b"".join([*lines[:2], spaced, *lines[3:]]))
        assert verify(log).first_bad_line == 3
    log.write_bytes(rechained([json.dumps(json.loads(line) | {"seq": 7}).encode() for line in lines]))
    assert verify(log).first_bad_line == 1
    log.write_bytes(rechained([*lines[:3], lines[2], *lines[3:]]))
    assert verify(log).first_bad_line == 4


def test_a_missing_end_and_a_new_chain_show_against_a_reference_kept_elsewhere(log: Path) -> None:
    lines, anchor = log.read_bytes().splitlines(keepends=True), read(log)[3].reference
    assert verify(log, anchor) == Verdict(LINES)
    log.write_bytes(b"".join(lines[:3]))
    assert verify(log) == Verdict(3)
    assert verify(log, anchor).first_bad_line == 4
    log.write_bytes(rechained([json.dumps(json.loads(line) | {"actor": "nobody"}).encode() for line in lines]))
    assert verify(log) == Verdict(LINES)
    assert verify(log, anchor).first_bad_line == 4
    with pytest.raises(AuditRefused, match="not a reference"):
        verify(log, "entry four")


def test_a_damaged_log_is_not_gone_on_with(log: Path) -> None:
    data = bytearray(log.read_bytes())
    data[10] ^= 1
    log.write_bytes(data)
    with pytest.raises(AuditDamaged, match="Line 1"):
        AuditLog(log)
    with pytest.raises(AuditDamaged, match="Line 1"):
        read(log)
    assert log.read_bytes() == data


def test_a_hostile_file_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for data in (
        b"x" * 10_000_000,
        b"[" * LINE_LIMIT,
        b"[" * (LINE_LIMIT - 1) + b"\n",
        b"\xff\xfe\n",
        b"null\n",
        b'{"a":1}\n',
    ):
        path.write_bytes(data)
        assert verify(path).first_bad_line == 1


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    for look in (verify, read):
        with pytest.raises(AuditError, match="cannot be read"):
            look(tmp_path / "none.jsonl")


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_cut_off_and_recorded_wherever_it_is_torn(log: Path) -> None:
    data = log.read_bytes()
    last = data.splitlines(keepends=True)[-1]
    start = len(data) - len(last)
    for length in (*range(1, len(last) - 3, 17), *range(len(last) - 3, len(last))):
        log.write_bytes(data[: start + length])
        assert verify(log).first_bad_line == LINES and "torn" in verify(log).why
        AuditLog(log).close()
        assert verify(log) == Verdict(LINES)
        entry = read(log)[-1]
        assert entry.action == "recovered" and f"{length} bytes were cut off" in (entry.reason or "")
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(last[:length]).hexdigest(), length)
        assert log.read_bytes()[:start] == data[:start]


@pytest.mark.parametrize("tail", [b"x", b"x" * 5000])
def test_a_crash_while_a_torn_line_is_cut_off_leaves_one_that_is_recorded(log: Path, tail: bytes) -> None:
    """Whatever part of the new line reaches the disk, the next opening finds a whole log or a torn one."""
    data = log.read_bytes()
    log.write_bytes(data + tail)
    AuditLog(log, lambda: NOON).close()
    line = log.read_bytes()[len(data) :]
    for length in (*range(0, len(line), 29), len(line)):
        log.write_bytes(data + line[:length] + tail[length:])
        AuditLog(log).close()
        entries = read(log)
        assert entries[LINES].action == "recovered" and verify(log).intact


WRITER = """
import sys
from fedllm.sites.audit import AuditLog, Digest
log = AuditLog(sys.argv[1])
print("open", flush=True)
number = 0
while True:
    entry = log.append("site-1", "send", run="run-1", round=number, client="site-1", payload=Digest.of(b"x"))
    number += 1
    print(entry.reference, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "open\n"
    with pytest.raises(AuditLocked, match="One writer at a time"):
        AuditLog(path)
    time.sleep(0.05 + random.Random(seed).random() * 0.1)
    writer.send_signal(signal.SIGKILL)
    acknowledged = [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    with AuditLog(path) as again:
        again.append("site-1", "resume", run="run-1")
    references = [entry.reference for entry in read(path)]
    assert acknowledged and references[: len(acknowledged)] == acknowledged
    assert len(references) <= len(acknowledged) + 3 and verify(path).intact


def test_one_writer_at_a_time_in_one_process_too(log: Path) -> None:
    with AuditLog(log), pytest.raises(AuditLocked, match="open for writing elsewhere"):
        AuditLog(log)
    AuditLog(log).close()


def test_a_forked_copy_of_the_writer_may_not_write(log: Path) -> None:
    with AuditLog(log) as open_log:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                open_log.append("site-1", "send")
            except AuditLocked:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verify(log) == Verdict(LINES)


def test_a_closed_log_takes_nothing(log: Path) -> None:
    open_log = AuditLog(log)
    open_log.close()
    open_log.close()
    with pytest.raises(AuditError, match="closed"):
        open_log.append("hub", "end")


@pytest.mark.parametrize("how", ["appended", "cut", "moved", "removed"])
def test_a_file_changed_under_the_writer_is_noticed(log: Path, how: str) -> None:
    with AuditLog(log) as open_log:
        if how == "appended":
            with log.open("ab") as other:
                other.write(b"{}\n")
        elif how == "cut":
            os.truncate(log, 100)
        elif how == "moved":
            log.rename(log.with_name("other.jsonl"))
        else:
            log.unlink()
        for _ in range(2):
            with pytest.raises(AuditError, match="another program"):
                open_log.append("hub", "end")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", ["first", "middle", "sync"])
def test_a_full_disk_is_an_error_and_leaves_the_log_whole(
    log: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: str
) -> None:
    before = log.read_bytes()
    real_write, real_sync, calls = os.pwrite, os.fsync, []

    def write(file: int, data: bytes, place: int) -> int:
        calls.append(place)
        if at == "first" or (at == "middle" and len(calls) == 2):
            raise OSError(code, os.strerror(code))
        return real_write(file, data[:50] if at == "middle" else data, place)

    def sync(file: int) -> None:
        if at == "sync" and os.fstat(file).st_size > len(before):
            raise OSError(code, os.strerror(code))
        real_sync(file)

    with AuditLog(log) as open_log:
        with monkeypatch.context() as patch:
            patch.setattr(audit.os, "pwrite", write)
            patch.setattr(audit.os, "fsync", sync)
            with pytest.raises(AuditError, match="cannot be written") as caught:
                open_log.append("hub", "end")
        assert (type(caught.value) is AuditFull) == (code != errno.EIO)
        assert log.read_bytes() == before
        with pytest.raises(AuditError, match="Open the audit log again"):
            open_log.append("hub", "end")
    with AuditLog(log) as again:
        again.append("hub", "end")
    assert verify(log) == Verdict(LINES + 1)


LIMITED = """
import resource, sys
from fedllm.sites.audit import AuditFull, AuditLog, Digest
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
log, count = AuditLog(sys.argv[1]), 0
try:
    while True:
        log.append("site-1", "send", payload=Digest.of(b"x"))
        count += 1
except AuditFull:
    print(count)
"""


def test_a_file_that_really_cannot_grow_ends_with_a_whole_entry(tmp_path: Path) -> None:
    """The system takes a part of the last line before it says no."""
    path = tmp_path / "a.jsonl"
    told = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    assert verify(path) == Verdict(int(told.stdout)) and 19_000 < path.stat().st_size < 20_000
    with AuditLog(path) as again:
        again.append("site-1", "resume")
    assert [entry.action for entry in read(path)[-2:]] == ["send", "resume"]


def test_a_folder_that_may_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(tmp_path / "file" / "audit.jsonl")


# --- two ends --------------------------------------------------------------------------------------------------------


class Ends:
    """A server and its sites, which record a run as an engine would."""

    def __init__(self, folder: Path, sites: int) -> None:
        self.server = AuditLog(folder / "server.jsonl", lambda: NOON)
        self.sites = {f"site-{n}": AuditLog(folder / f"site-{n}.jsonl", lambda: NOON) for n in range(sites)}

    def play(self, round: int, rng: random.Random) -> None:
        for name, site in self.sites.items():
            about: dict[str, Any] = {"run": "run-1", "round": round, "client": name}
            down, up = Digest.of(rng.randbytes(20)), Digest.of(rng.randbytes(30))
            sent = self.server.append("hub", "send", payload=down, **about)
            site.append(name, "receive", payload=down, peer=sent.reference, **about)
            answered = site.append(name, "send", payload=up, decision="allowed", **about)
            self.server.append("hub", "receive", payload=up, peer=answered.reference, **about)

    def close(self) -> tuple[list[Entry], dict[str, list[Entry]]]:
        for log in (self.server, *self.sites.values()):
            log.close()
        return read(self.server.path), {name: read(log.path) for name, log in self.sites.items()}


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    made = Ends(tmp_path, 3)
    for round in (1, 2):
        made.play(round, random.Random(round))
    return made


def test_logs_of_a_run_match_from_files_too(ends: Ends) -> None:
    server, sites = ends.close()
    assert matched(server, sites) == []
    assert matched(ends.server.path, {name: log.path for name, log in ends.sites.items()}) == []


def test_a_payload_sent_again_counts_once(ends: Ends) -> None:
    server, sites = ends.close()
    sent = next(entry for entry in server if entry.action == "send")
    assert matched([*server, sent], sites) == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("change", ["sha256", "bytes", "round", "client", "run"])
def test_one_other_payload_is_listed_on_both_sides(ends: Ends, seed: int, change: str) -> None:
    server, sites = ends.close()
    at = random.Random(seed).randrange(len(server))
    values = {"sha256": "f" * 64, "bytes": 1, "round": 9, "client": "site-9", "run": "run-9"}
    entry = Entry(**{**server[at].__dict__, change: values[change]})
    found = matched([*server[:at], entry, *server[at + 1 :]], sites)
    mine = [one for one in found if one.log == "server"]
    theirs = [one for one in found if one.log != "server"]
    assert [one.entry for one in mine] == [entry]
    assert len(theirs) == 1 and theirs[0].entry.sha256 == server[at].sha256
    assert {mine[0].why.split(" at ")[0].split(" by ")[0], theirs[0].why.split(" at ")[0].split(" by ")[0]} == {
        "it was not received",
        "it was not sent",
    }


def test_a_lost_entry_is_listed(ends: Ends) -> None:
    server, sites = ends.close()
    gone = sites["site-1"].pop(0)
    found = matched(server, sites)
    assert [(one.log, one.entry.sha256, one.why) for one in found] == [
        ("server", gone.sha256, "it was not received at any site")
    ]


def test_an_upload_that_was_stopped_did_not_leave_unless_the_server_has_it(ends: Ends) -> None:
    about: dict[str, Any] = {"run": "run-1", "round": 3, "client": "site-1", "payload": Digest.of(b"secret")}
    ends.sites["site-1"].append("site-1", "send", decision="refused", **about)
    server, sites = ends.close()
    assert matched(server, sites) == []
    with AuditLog(ends.server.path) as again:
        stolen = again.append("hub", "receive", **about)
    assert [(one.entry, one.why) for one in matched(read(ends.server.path), sites)] == [
        (stolen, "it was not sent by any site")
    ]


def test_a_log_written_anew_shows_by_the_references_of_the_other(ends: Ends) -> None:
    server, sites = ends.close()
    path = ends.sites["site-1"].path
    lines = [json.dumps(json.loads(line) | {"actor": "nobody"}).encode() for line in path.read_bytes().splitlines()]
    path.write_bytes(rechained(lines))
    assert verify(path).intact
    found = matched(server, {**sites, "site-1": path})
    assert {one.entry.client for one in found} == {"site-1"} and len(found) == 2
    assert all("refers to" in one.why and one.log == "server" for one in found)


def test_one_site_alone_compares_its_own_clients(ends: Ends) -> None:
    server, sites = ends.close()
    mine = {"site-1": sites["site-1"]}
    assert matched(server, mine, clients=["site-1"]) == []
    assert len(matched(server, mine)) == 2 * len([entry for entry in server if entry.client != "site-1"]) - 4


def test_a_damaged_log_is_not_compared(ends: Ends) -> None:
    server, sites = ends.close()
    path = ends.sites["site-0"].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AuditDamaged):
        matched(server, {**sites, "site-0": path})

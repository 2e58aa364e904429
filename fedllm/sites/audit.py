"""Audit - an append-only log of who did what, each entry chained to the one before by its hash.

Every party writes a log of its own. A changed, removed, added or reordered line breaks the chain. Who can write the
file can also cut off its end, or write a whole new chain: this shows only against a reference that lies elsewhere,
such as those which the other end recorded as `peer`, or one in a checkpoint (:func:`verify` with `anchor`,
:func:`matched`).

Texts, prompts and tensors have no field. A payload is its SHA-256 and its length, and a reason is the text of one of
fedllm's own errors.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from fedllm.core.errors import DataError, DecodeError, FedLLMError, RunError, nearest
from fedllm.sites.canonical import NAME, SHA256, canonical, parsed, sha256

ACTIONS = {
    "recovered": "the end of the log was torn and has been cut off",
    "policy": "a policy was read",
    "manifest": "a manifest was signed or checked",
    "join": "a member joined",
    "leave": "a member left or was removed",
    "start": "a run began",
    "resume": "a run went on from a checkpoint",
    "request": "a client-side function was asked for",
    "send": "a payload went out, or was stopped from going out",
    "receive": "a payload came in",
    "reject": "an upload was taken back as unusable",
    "lost": "a client did not answer",
    "checkpoint": "a state was written",
    "erase": "data or private state was deleted",
    "end": "a run ended",
}
"""Everything that can be recorded."""
DECISIONS = ("allowed", "refused")
GENESIS = "0" * 64
"""What the first entry names as the hash before it."""
REASON_LENGTH = 500
"""Characters of a reason; a longer one is cut."""
LINE_LIMIT = 16_384
"""Bytes of a line at most: no entry comes near it, even if each character of its reason is escaped."""
_LARGEST = 2**63 - 1
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "it may not grow any more",
}
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00"
REFERENCE = rf"[1-9]\d{{0,18}}:{SHA256}"
"""The form of an entry's reference."""


class AuditError(RunError):
    """An audit log cannot be opened, read or written."""


class AuditLocked(AuditError):
    """Another writer has the audit log open."""


class AuditDamaged(AuditError):
    """A line of an audit log is not what was written."""


class AuditFull(AuditError):
    """There is no room for another entry of an audit log."""


class AuditRefused(AuditError):
    """A value that must not enter an audit log."""


@dataclass(frozen=True)
class Digest:
    """What a log keeps of a payload: its SHA-256 in hexadecimal and its length in bytes."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, *chunks: bytes | bytearray | memoryview) -> Digest:
        """The digest of the chunks, one behind the other."""
        found, size = hashlib.sha256(), 0
        for chunk in chunks:
            view = memoryview(chunk)
            found.update(view)
            size += view.nbytes
        return cls(found.hexdigest(), size)


@dataclass(frozen=True)
class Entry:
    """One line of a log.

    Attributes:
        seq: 1, 2, ...: the number of its line.
        time: UTC, ISO 8601 with microseconds.
        actor: the person, site or server that acted.
        action: one of :data:`ACTIONS`.
        run: the run's id; None where it concerns none.
        round: the round; None where it concerns none.
        client: the client; None where it concerns none.
        sha256: of the payload, in hexadecimal; None without a payload.
        bytes: of the payload; None without a payload.
        decision: one of :data:`DECISIONS`; None where nothing was decided.
        reason: the text of an error of fedllm, at most :data:`REASON_LENGTH` characters.
        peer: the :attr:`reference` of the other end's entry about the same event.
        prev: the hash of the line before.
        hash: SHA-256 of the canonical form of all the other fields.
    """

    seq: int
    time: str
    actor: str
    action: str
    run: str | None
    round: int | None
    client: str | None
    sha256: str | None
    bytes: int | None
    decision: str | None
    reason: str | None
    peer: str | None
    prev: str
    hash: str

    @property
    def reference(self) -> str:
        """`seq:hash`, by which the other end or a checkpoint names this entry, and with it all those before."""
        return f"{self.seq}:{self.hash}"


FIELDS = tuple(field.name for field in fields(Entry))
"""The fields of an entry; there are no others."""


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        entries: good lines before the first bad one; all, where there is none.
        first_bad_line: its number, from 1; None where all are good.
        why: what is wrong with it; empty where all are good.
    """

    entries: int
    first_bad_line: int | None = None
    why: str = ""

    @property
    def intact(self) -> bool:
        """Whether every line is what was written."""
        return self.first_bad_line is None


@dataclass(frozen=True)
class Unmatched:
    """A payload, or a reference, that the other side does not have.

    Attributes:
        log: the log it stands in: a site's name, or `server`.
        entry: the entry.
        why: what the other side lacks.
    """

    log: str
    entry: Entry
    why: str


@dataclass(frozen=True)
class Note:
    """What an entry will say; see :class:`Entry` for the fields, and :meth:`AuditLog.append` for the reason."""

    action: str
    run: str | None = None
    round: int | None = None
    client: str | None = None
    payload: Digest | None = None
    decision: Literal["allowed", "refused"] | None = None
    reason: FedLLMError | None = None
    peer: str | None = None

    def values(self) -> tuple[Any, ...]:
        """In the order of :data:`FIELDS`; raises :class:`AuditRefused` for a reason that is no error of fedllm."""
        digest = (None, None) if self.payload is None else (self.payload.sha256, self.payload.bytes)
        about = self.action, self.run, self.round, self.client
        return *about, *digest, self.decision, _text(self.reason), self.peer


Log: TypeAlias = str | Path | Sequence[Entry]
"""A log file, or entries that were read from one."""


def client_name(client: str) -> str:
    """How a client's id stands in a log: itself where it is a name, else `sha256:` and its hash.

    An id with spaces or signs could be a text; both ends form the same hash of it, so logs still match.
    """
    return client if re.fullmatch(NAME, client) else f"sha256:{hashlib.sha256(client.encode()).hexdigest()}"


def _now() -> datetime:
    return datetime.now(UTC)


class AuditLog:
    """A log that is open for writing; one writer at a time, in any number of threads.

    Opening reads the whole log and checks it. A last line without an end, which a crash leaves, was never
    acknowledged: it is cut off, and an entry says so.

    Args:
        path: the file; it and its folder are made where they do not exist.
        clock: gives the time, with a time zone.

    Raises:
        AuditLocked: another writer has it open.
        AuditDamaged: a line is not what was written.
        AuditFull: no room.
        AuditError: it cannot be opened.
    """

    def __init__(self, path: str | Path, clock: Callable[[], datetime] = _now) -> None:
        self.path = Path(path)
        self._clock, self._thread, self._process = clock, threading.Lock(), os.getpid()
        self._entries, self._hash, self._size = 0, GENESIS, 0
        self._broken = ""
        self._file: int | None = _locked(self.path)
        try:
            self._load(self._file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def entries(self) -> int:
        """How many there are."""
        return self._entries

    @property
    def last(self) -> str | None:
        """The reference of the last entry, to be kept elsewhere; None in an empty log."""
        return f"{self._entries}:{self._hash}" if self._entries else None

    def append(
        self,
        actor: str,
        action: str,
        *,
        run: str | None = None,
        round: int | None = None,
        client: str | None = None,
        payload: Digest | None = None,
        decision: Literal["allowed", "refused"] | None = None,
        reason: FedLLMError | None = None,
        peer: str | None = None,
    ) -> Entry:
        """Write an entry; when this returns it is on disk.

        Args:
            actor: see :class:`Entry`, as for all others.
            action: what was done.
            run: the run's id.
            round: the round.
            client: the client.
            payload: its digest.
            decision: what was decided.
            reason: the error that tells why. A :class:`~fedllm.core.errors.DataError` is recorded by its name alone,
                and so is a plain :class:`~fedllm.core.errors.DecodeError`: their texts may quote what they are about.
            peer: the reference that the other end sent along.

        Raises:
            AuditRefused: a value that has no place in a log; nothing is written.
            AuditFull: no room. What was there before stays whole; open the log again when there is room.
            AuditError: it cannot be written, was closed, or failed before.
        """
        note = Note(action, run, round, client, payload, decision, reason, peer)
        return self.extend(actor, [note])[0]

    def extend(self, actor: str, notes: Sequence[Note]) -> list[Entry]:
        """Write several entries with one flush of the disk; all of them are on disk when this returns, or none.

        Raises: as :meth:`append`.
        """
        values = [(actor, *note.values()) for note in notes]
        with self._thread:
            return self._add(self._writable(), False, values)

    def close(self) -> None:
        """Let another writer open the log."""
        with self._thread:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)

    def _writable(self) -> int:
        """The open file, which is still the one that was opened and as long as it was left."""
        if self._file is None or self._broken:
            why = self._broken or "it is closed"
            raise AuditError(f"Nothing can be added to {self.path}: {why}.", action="Open the audit log again.")
        if self._process != os.getpid():
            raise AuditLocked(
                f"{self.path} was opened by another process, of which this one is a copy.",
                "One writer at a time.",
                action="Write from the process that opened it.",
            )
        with _disk(self.path):
            held = os.fstat(self._file)
        if held.st_size != self._size or not _still(self.path, held):
            self._broken = "another program changed, moved or removed it"
            raise AuditDamaged(
                f"{self.path} is not as it was left: {self._broken}.", action="Verify it, and find out who did."
            )
        return self._file

    def _add(self, file: int, torn: bool, rows: Sequence[tuple[Any, ...]]) -> list[Entry]:
        time = self._clock().astimezone(UTC).isoformat(timespec="microseconds")
        entries: list[Entry] = []
        number, before = self._entries, self._hash
        for values in rows:
            body: dict[str, Any] = dict(zip(FIELDS, (number + 1, time, *values, before), strict=False))
            wrong = _wrong(body)
            if wrong is not None:
                raise AuditRefused(*wrong)
            entries.append(Entry(**body, hash=sha256(body)))
            number, before = entries[-1].seq, entries[-1].hash
        self._write(file, b"".join(canonical(entry.__dict__) + b"\n" for entry in entries), torn)
        self._entries, self._hash = number, before
        return entries

    def _write(self, file: int, line: bytes, torn: bool) -> None:
        """Put `line` behind the last entry, over what is left of a torn one: a crash leaves a torn line again."""
        try:
            with _disk(self.path):
                done = 0
                while done < len(line):
                    done += os.pwrite(file, line[done:], self._size + done)
                if torn:
                    os.ftruncate(file, self._size + len(line))
                os.fsync(file)
        except BaseException:
            self._broken = "a write failed before"
            if not torn:
                with suppress(OSError):
                    os.ftruncate(file, self._size)
                    os.fsync(file)
            raise
        self._size += len(line)

    def _load(self, file: int) -> None:
        with open(file, "rb", closefd=False) as handle:
            try:
                for entry, size in _lines(handle):
                    self._entries, self._hash, self._size = entry.seq, entry.hash, self._size + size
            except BadLine as bad:
                if not bad.torn:
                    raise _damaged(self.path, bad) from None
                cut = Digest.of(bad.torn)
                reason = AuditError(f"The last line had no end: {cut.bytes} bytes were cut off.")
                self._add(file, True, [("audit", *Note("recovered", payload=cut, reason=reason).values())])


def read(log: str | Path) -> list[Entry]:
    """All entries.

    Raises:
        AuditDamaged: a line is not what was written; the error names it.
        AuditError: there is no such log.
    """
    try:
        with _reading(log) as handle:
            return [entry for entry, _ in _lines(handle)]
    except BadLine as bad:
        raise _damaged(log, bad) from None


def verify(log: str | Path, anchor: str | None = None) -> Verdict:
    """Whether every line is what was written, and in its place.

    Args:
        log: the file.
        anchor: a reference to one of its entries that was kept elsewhere. Without it a log whose end is missing, or
            that was written anew from the first line on, is not noticed.

    Raises:
        AuditError: there is no such log.
        AuditRefused: the anchor is not a reference.
    """
    if anchor is not None and not re.fullmatch(REFERENCE, anchor):
        raise AuditRefused(f"'{anchor}' is not a reference.", "A reference is seq:hash, as AuditLog.last gives it.")
    seq, held = (0, "") if anchor is None else (int(anchor.split(":")[0]), anchor.split(":")[1])
    count = 0
    try:
        with _reading(log) as handle:
            for entry, _ in _lines(handle):
                if entry.seq == seq and entry.hash != held:
                    return Verdict(count, entry.seq, "its hash is not the one that was kept elsewhere")
                count = entry.seq
    except BadLine as bad:
        return Verdict(count, bad.line, bad.why)
    if count < seq:
        return Verdict(count, count + 1, f"the log ends before entry {seq}, which is known elsewhere")
    return Verdict(count)


def matched(server_log: Log, site_logs: Mapping[str, Log], clients: Collection[str] | None = None) -> list[Unmatched]:
    """What the server's log and those of the sites do not have in common; empty where they agree.

    Each payload that one side sent must have been received by the other, for the same run, round and client, with the
    same hash and length; a payload sent again counts once, and one that was stopped (a `send` that was refused) is not
    sent. Each reference to the other end must name an entry that stands there with that hash.

    A payload that was lost on its way, and one under way when the logs were read, is listed as well.

    Args:
        server_log: the server's.
        site_logs: by the name of the site.
        clients: look at these alone, where some sites' logs are not at hand; None for all.

    Raises:
        AuditDamaged: a line of a log is not what was written.
        AuditError: there is no such log.
    """
    server = _about(server_log, clients)
    sites = {name: _about(log, clients) for name, log in site_logs.items()}
    both = [({"server": server}, sites, "any site"), (sites, {"server": server}, "the server")]
    return [found for here, there, place in both for found in _missing(here, there, place)]


def _about(log: Log, clients: Collection[str] | None) -> tuple[list[Entry], set[str]]:
    """The entries that concern these clients, and the references of all."""
    entries = read(log) if isinstance(log, str | Path) else list(log)
    chosen = [entry for entry in entries if clients is None or entry.client in clients]
    return chosen, {entry.reference for entry in entries}


def _missing(
    here: Mapping[str, tuple[list[Entry], set[str]]], there: Mapping[str, tuple[list[Entry], set[str]]], place: str
) -> Iterator[Unmatched]:
    sent, received = (
        {_payload(entry) for entries, _ in there.values() for entry in entries if _moved(entry, action)}
        for action in ("send", "receive")
    )
    references = set[str]().union(*(known for _, known in there.values()))
    for log, (entries, _) in here.items():
        for entry in entries:
            if _moved(entry, "send") and _payload(entry) not in received:
                yield Unmatched(log, entry, f"it was not received at {place}")
            if _moved(entry, "receive") and _payload(entry) not in sent:
                yield Unmatched(log, entry, f"it was not sent by {place}")
            if entry.peer is not None and entry.peer not in references:
                yield Unmatched(log, entry, f"the entry it refers to is not in the log of {place}")


def _moved(entry: Entry, action: str) -> bool:
    stopped = action == "send" and entry.decision == "refused"
    return entry.action == action and entry.sha256 is not None and not stopped


def _payload(entry: Entry) -> tuple[object, ...]:
    return entry.run, entry.round, entry.client, entry.sha256, entry.bytes


# --- lines -----------------------------------------------------------------------------------------------------------


class BadLine(Exception):
    """A line is not what was written; `torn` is what there is of a last line without an end."""

    def __init__(self, line: int, why: str, torn: bytes = b"") -> None:
        super().__init__(line, why)
        self.line, self.why, self.torn = line, why, torn


def _lines(handle: BinaryIO) -> Iterator[tuple[Entry, int]]:
    """The entries, each with the length of its line; raises :class:`BadLine` at the first that is wrong."""
    before = GENESIS
    for number in itertools.count(1):
        line = handle.readline(LINE_LIMIT + 1)
        if not line:
            return
        entry = entry_of(line, number)
        if entry.seq != number:
            raise BadLine(number, f"it is entry {entry.seq}: lines were removed, added or reordered")
        if entry.prev != before:
            raise BadLine(number, "it does not follow from the line before, which was changed or exchanged")
        before = entry.hash
        yield entry, len(line)


def entry_of(line: bytes, number: int) -> Entry:
    """The entry in line `number`, its end included; raises :class:`BadLine` where it could not have been written."""
    if len(line) > LINE_LIMIT:
        raise BadLine(number, f"it is longer than {LINE_LIMIT} bytes")
    if not line.endswith(b"\n"):
        raise BadLine(number, "it has no end: a write was torn", torn=line)
    try:
        body = parsed(line[:-1])
        as_written = canonical(body) == line[:-1]
    except DecodeError:
        raise BadLine(number, "it is not JSON") from None
    if not isinstance(body, dict) or set(body) != set(FIELDS):
        raise BadLine(number, "its fields are not those of an entry")
    if not as_written:
        raise BadLine(number, "it is not in the form in which entries are written")
    held = body.pop("hash")
    if held != sha256(body):
        raise BadLine(number, "its content and its hash do not agree")
    wrong = _wrong(body)
    if wrong is not None:
        raise BadLine(number, wrong[0])
    return Entry(**body, hash=held)


def _wrong(body: Mapping[str, Any]) -> tuple[str, str, str | None] | None:
    """What is given, what is allowed and the nearest choice, for the first field that has no place in a log."""
    if not isinstance(body["action"], str) or body["action"] not in ACTIONS:
        return _unknown("action", body["action"], ACTIONS)
    if body["decision"] not in (None, *DECISIONS):
        return _unknown("decision", body["decision"], DECISIONS)
    for name, (pattern, optional) in _FORMS.items():
        value = body[name]
        if value is None and optional:
            continue
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            return f"The {name} of an entry cannot be {_brief(value)}.", f"Allowed: {pattern}.", None
    for name, least in _LEAST.items():
        value = body[name]
        if value is None and name != "seq":
            continue
        if type(value) is not int or not least <= value <= _LARGEST:
            return f"The {name} of an entry cannot be {_brief(value)}.", f"Allowed: whole numbers from {least}.", None
    if (body["sha256"] is None) != (body["bytes"] is None):
        return "A payload has only one of sha256 and bytes.", "Allowed: both, or none.", None
    reason = body["reason"]
    if reason is not None and not (isinstance(reason, str) and len(reason) <= REASON_LENGTH):
        return "The reason of an entry is too long, or no text.", f"At most {REASON_LENGTH} characters.", None
    return None


_FORMS: dict[str, tuple[str, bool]] = {
    "time": (_TIME, False),
    "actor": (NAME, False),
    "run": (NAME, True),
    "client": (NAME, True),
    "sha256": (SHA256, True),
    "peer": (REFERENCE, True),
    "prev": (SHA256, False),
}
"""Field -> (its form, whether it may be None)."""
_LEAST = {"seq": 1, "round": 0, "bytes": 0}
"""Field -> the least number."""


def _unknown(kind: str, word: Any, choices: Iterable[str]) -> tuple[str, str, str | None]:
    listed = sorted(choices)
    return f"There is no {kind} {_brief(word)}.", f"Allowed: {', '.join(listed)}.", nearest(str(word)[:64], listed)


def _brief(value: Any) -> str:
    """A value that is not shown where it could be a text."""
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__} of {len(text)} characters"


def _text(reason: object) -> str | None:
    if reason is None:
        return None
    if not isinstance(reason, FedLLMError):
        raise AuditRefused(
            f"The reason of an entry cannot be a {type(reason).__name__}.",
            "A reason is an error of fedllm, so that no other text enters a log.",
            action="Give the error itself.",
        )
    if isinstance(reason, DataError) or type(reason) is DecodeError:
        return f"{type(reason).__name__}; its text is left out, because it may quote what it is about."
    text = str(reason).encode("utf-8", "replace").decode()
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."


# --- the file --------------------------------------------------------------------------------------------------------


def _locked(path: Path) -> int:
    """The file, open, made where there was none, and locked for this writer alone."""
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_folder(path.parent)
        except BlockingIOError:
            os.close(file)
            raise AuditLocked(
                f"{path} is open for writing elsewhere.",
                "One writer at a time.",
                action="Stop the other process, or give this one a log of its own.",
            ) from None
        except BaseException:
            os.close(file)
            raise
        return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _still(path: Path, held: os.stat_result) -> bool:
    try:
        return os.path.samestat(held, path.stat())
    except OSError:
        return False


@contextmanager
def _reading(log: str | Path) -> Generator[BinaryIO]:
    try:
        with open(log, "rb") as handle:
            yield handle
    except OSError as fault:
        raise AuditError(f"The audit log {log} cannot be read: {fault.strerror or fault}.") from fault


@contextmanager
def _disk(path: Path) -> Generator[None]:
    """Turn a full disk or a missing right into an error that says so."""
    try:
        yield
    except OSError as fault:
        full = _FULL.get(fault.errno or 0)
        kind = AuditFull if full else AuditError
        raise kind(
            f"The audit log {path} cannot be written: {full or fault.strerror or fault}.",
            "Nothing goes on that cannot be recorded.",
            action="Entries written before are whole: put it right, then resume the run.",
        ) from fault


def _damaged(log: str | Path, bad: BadLine) -> AuditDamaged:
    return AuditDamaged(
        f"Line {bad.line} of the audit log {log} is not what was written: {bad.why}.",
        action="Keep the file as evidence, and begin a new log under another name.",
    )

"""Chain - an audit log as it grows: each line is held against the one before, and added up by run, round and client."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fedllm.dash.follow import Follower
from fedllm.sites import audit
from fedllm.sites.audit import GENESIS, Entry

UPLOADS = 30
"""Last payloads that are kept one by one, of each run."""
REFUSALS = 200
"""Different refusals that are kept of each run."""


@dataclass
class Sum:
    """How many payloads, and how many bytes in all."""

    times: int = 0
    bytes: int = 0

    def add(self, entry: Entry) -> None:
        """One more."""
        self.times, self.bytes = self.times + 1, self.bytes + (entry.bytes or 0)


@dataclass
class Round:
    """What moved in one round: out of the log's owner, into it, and what was stopped from going out."""

    out: Sum = field(default_factory=Sum)
    into: Sum = field(default_factory=Sum)
    stopped: Sum = field(default_factory=Sum)

    def plus(self, other: Round) -> Round:
        """Both together."""
        names = ("out", "into", "stopped")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return Round(*(Sum(mine.times + theirs.times, mine.bytes + theirs.bytes) for mine, theirs in pairs))


@dataclass
class Refusal:
    """The same thing that was refused, or the same loss, one or more times."""

    action: str
    who: str
    reason: str
    times: int = 0
    first: str = ""
    last: str = ""
    line: int = 0


@dataclass
class Told:
    """What a log says of one run.

    Attributes:
        first: the time of its first entry.
        last: of its last.
        began: of `start` or the last `resume`; empty before.
        over: of `end`; empty before.
        why: the reason in `end`; empty where it ended well.
        policy: SHA-256 of the policy file that was read when the run was admitted.
        admitted: what the policy, or the manifest's check, said last.
        rounds: by round.
        clients: by client, the same.
        total: of all rounds.
        largest: bytes that went out in the round with the most.
        members: who joined or was refused, by name: (decision, time).
        refusals: by action, who and reason.
        more_refusals: others, which are counted alone.
        uploads: the last payloads that went out, or were stopped from it.
        checkpoint: the round of the last checkpoint.
    """

    first: str = ""
    last: str = ""
    began: str = ""
    over: str = ""
    why: str = ""
    policy: str = ""
    admitted: str = ""
    rounds: dict[int, Round] = field(default_factory=dict)
    clients: dict[str, Round] = field(default_factory=dict)
    total: Round = field(default_factory=Round)
    largest: int = 0
    members: dict[str, tuple[str, str]] = field(default_factory=dict)
    refusals: dict[tuple[str, str, str], Refusal] = field(default_factory=dict)
    more_refusals: int = 0
    uploads: deque[Entry] = field(default_factory=lambda: deque(maxlen=UPLOADS))
    checkpoint: int | None = None

    def add(self, entry: Entry) -> None:
        """One more entry."""
        self.first, self.last = self.first or entry.time, entry.time
        action = entry.action
        if action in ("start", "resume"):
            self.began, self.over, self.why = entry.time, "", ""
        elif action == "end":
            self.over, self.why = entry.time, entry.reason or ""
        elif action == "checkpoint":
            self.checkpoint = entry.round
        elif action in ("policy", "manifest") and entry.sha256 is not None:  # the run is submitted, perhaps again
            self.policy = entry.sha256 if action == "policy" else self.policy
            self.over, self.why = "", ""
        elif action == "join":
            self.members[entry.actor] = entry.decision or "allowed", entry.time
        if action in ("policy", "manifest") and entry.decision is not None:
            self.admitted = entry.decision
        if action in ("send", "receive"):
            self._moved(entry)
        if entry.decision == "refused" or action in ("lost", "reject"):
            self._refused(entry)

    def _moved(self, entry: Entry) -> None:
        stopped = entry.action == "send" and entry.decision == "refused"
        name = "stopped" if stopped else "out" if entry.action == "send" else "into"
        of_round = self.rounds.setdefault(entry.round or 0, Round())
        for one in (of_round, self.clients.setdefault(entry.client or "", Round()), self.total):
            getattr(one, name).add(entry)
        self.largest = max(self.largest, of_round.out.bytes)
        if entry.action == "send":
            self.uploads.append(entry)

    def _refused(self, entry: Entry) -> None:
        key = entry.action, entry.client or entry.actor, entry.reason or ""
        if key not in self.refusals and len(self.refusals) >= REFUSALS:
            self.more_refusals += 1
            return
        found = self.refusals.setdefault(key, Refusal(*key, first=entry.time))
        found.times, found.last, found.line = found.times + 1, entry.time, entry.seq


class Chain(Follower):
    """An audit log; see :mod:`fedllm.sites.audit`, whose rules for a line are the only ones.

    What was read once is not read again, so a line that somebody changes behind the reader does not show here but with
    :func:`fedllm.sites.audit.verify`.

    Attributes:
        entries: good lines.
        last: the last of them.
        bad: the first line that is not what was written, and why; what follows it is not looked at.
        runs: by run, in the order of their first entries.
        marks: the hashes of entries that a run's checkpoint may name, by number.
    """

    limit = audit.LINE_LIMIT + 1

    def clear(self) -> None:
        """See :meth:`Follower.clear`."""
        self.entries, self.last = 0, None
        self.bad: tuple[int, str] | None = None
        self.runs: dict[str, Told] = {}
        self.marks: dict[int, str] = {}

    last: Entry | None

    def take(self, line: bytes) -> None:
        """See :meth:`Follower.take`."""
        if self.bad is not None:
            return
        number = self.entries + 1
        try:
            entry = audit.entry_of(line, number)  # what a good line is must be said in one place
        except audit.BadLine as fault:
            self.bad = number, fault.why
            return
        if entry.seq != number:
            self.bad = number, f"it is entry {entry.seq}: lines were removed, added or reordered"
        elif entry.prev != (GENESIS if self.last is None else self.last.hash):
            self.bad = number, "it does not follow from the line before, which was changed or exchanged"
        else:
            self._add(entry)

    def too_long(self) -> None:
        """See :meth:`Follower.too_long`."""
        if self.bad is None:
            self.bad = self.entries + 1, f"it is longer than {audit.LINE_LIMIT} bytes"

    def against(self, anchor: str) -> str:
        """What is wrong with the log, held against an entry that a checkpoint named as seq:hash; empty if nothing."""
        number, _, held = anchor.partition(":")
        if not number.isdecimal() or not held:
            return ""
        seq = int(number)
        if self.at_end and self.bad is None and self.entries < seq:
            return f"the log ends before entry {seq}, which a checkpoint knows"
        if self.entries >= seq and self.marks.get(seq) != held:  # also where that line is no checkpoint any more
            return f"entry {seq} is not the one that a checkpoint knows"
        return ""

    def _add(self, entry: Entry) -> None:
        self.entries, self.last = entry.seq, entry
        if entry.run is not None:
            self.runs.setdefault(entry.run, Told()).add(entry)
        if entry.action == "checkpoint":
            self.marks[entry.seq] = entry.hash

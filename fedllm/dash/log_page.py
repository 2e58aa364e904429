"""Log page - what an audit log tells, as parts of a page: its own state, refusals, bytes by round, single payloads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from fedllm.dash import blocks
from fedllm.dash.blocks import BAD, BUSY, GOOD, QUIET, Block, Cell
from fedllm.dash.chain import Chain, Refusal, Told
from fedllm.dash.folder import PATIENCE, Run, State

ROUNDS = 30
"""Last rounds listed."""
LISTED = 100
"""Refusals listed."""
ACTIONS = {
    "policy": "the run",
    "manifest": "its manifest",
    "join": "to take part",
    "request": "a request",
    "send": "an upload, which stayed here",
    "reject": "an upload was thrown away",
    "lost": "no answer",
}
"""What was refused, or went wrong, by the entry's action."""


def standing(told: Told, log: Chain, run: Run | None = None, now: float | None = None) -> State:
    """How a run stands, from the audit log and, at a server, from its folder; `now`: seconds since 1970."""
    if told.admitted == "refused" and not told.began:
        why = next((one.reason for one in reversed(told.refusals.values()) if one.reason), "")
        return State("refused", BAD, why)
    moment = time.time() if now is None else now
    if told.over and told.why:
        return _ended(told, run, moment)
    if told.over:
        return run.state(now) if run is not None else State("over", GOOD)
    if log.bad is not None:
        return State("not known", BAD, "The audit log is damaged behind what it tells of this run.")
    if not log.at_end:
        return State("being read", BUSY)
    known = run.state(now) if run is not None else None
    if known is not None and known.word not in ("silent", "finished", "stopped"):
        return known
    silent = moment - datetime.fromisoformat(told.last).timestamp()
    if silent > PATIENCE:
        return State("silent", BAD, "Nothing was written for long, and no end: a process was ended, or it takes long.")
    return State("under way" if told.began else "beginning", BUSY)


def _ended(told: Told, run: Run | None, now: float) -> State:
    """How a run stands whose last entry of an end has a reason.

    That is not the run's end where the server can go on with it, nor where another job of its name was refused.
    """
    stands = run.stands if run is not None else ""
    if run is not None and stands in ("waiting", "stopped", "finished"):
        return run.state(now)
    if run is not None and stands == "failed":
        return State("failed" if told.began else "refused", BAD, run.state(now).why or told.why)
    if "aborted" in told.why:
        if stands == "running" and now - datetime.fromisoformat(told.over).timestamp() < PATIENCE:
            return State("waiting", BUSY, "Its job was ended. If no person did it, the server goes on with the run.")
        return State("stopped", QUIET, f"{told.why} It can be resumed.")
    return State("failed" if told.began else "refused", BAD, told.why)


def chain(log: Chain, anchors: Mapping[str, str], verify: str) -> Block:
    """Whether every line is what was written.

    Args:
        log: the log.
        anchors: run -> the entry that its last checkpoint names.
        verify: the command that reads the whole log again.
    """
    wrong = [f"Run {run}: {why}." for run, one in anchors.items() if (why := log.against(one))]
    found: list[Block] = []
    if log.bad is not None:
        number, why = log.bad
        found.append(blocks.text(f"Line {number:,} is not what was written: {why}. What follows is not shown.", "bad"))
    found += [blocks.text(one, "bad") for one in wrong]
    if not log.entries and log.bad is None:
        return blocks.section("Audit log", blocks.text("There is no entry yet.", "empty"))
    if log.bad is None and not wrong:
        found.append(blocks.text(f"{blocks.count(log.entries, 'line')}, each as it was written and in its place."))
    if log.rest and log.bad is None:
        words = f"The last {blocks.count(log.rest, 'byte')} are no whole line: one is being written, or a crash cut it."
        found.append(blocks.text(words, "note"))
    last = log.last
    known: list[tuple[str, Cell]] = [
        ("File", str(log.path)),
        ("Last entry", blocks.at(last.time) if last else ""),
        ("Its reference", last.reference if last else ""),
        ("Check it all again", verify),
    ]
    note = "A cut end, or a log written anew, shows only against the logs of the others or a reference kept elsewhere."
    return blocks.section("Audit log", *found, blocks.facts(known), blocks.text(note, "note"))


def chain_tile(log: Chain, anchors: Mapping[str, str]) -> list[str]:
    """The log's state as a key figure."""
    bad = log.bad is not None or any(log.against(one) for one in anchors.values())
    return ["damaged", "is the audit log"] if bad else [f"{log.entries:,}", "lines of the audit log, all good"]


def refusals(title: str, runs: Mapping[str, Told], empty: str, named: bool) -> Block:
    """What was refused or lost, and why; `named`: with the run."""
    found = [(run, one) for run, told in runs.items() for one in told.refusals.values()]
    found.sort(key=lambda one: one[1].last, reverse=True)
    more = sum(told.more_refusals for told in runs.values()) + len(found[LISTED:])
    if not found:
        return blocks.section(title, blocks.text(empty, "empty"))
    rows: list[Sequence[Cell]] = [_refusal(run, one, named) for run, one in found[:LISTED]]
    heads = [*(["Run"] if named else []), "Who", "What", "#Times", "Last", "Reason"]
    rest = blocks.text(f"And {more:,} more; the log has them all.", "note") if more else None
    return blocks.section(title, blocks.table("By who, what and why, the newest first", heads, rows), rest)


def _refusal(run: str, one: Refusal, named: bool) -> list[Cell]:
    what = ACTIONS.get(one.action, one.action)
    first: list[Cell] = [blocks.link(run)] if named else []
    return [*first, one.who, what, f"{one.times:,}", blocks.at(one.last), one.reason or "No reason is given."]


def count(runs: Iterable[Told]) -> int:
    """How many refusals and losses there were."""
    return sum(sum(one.times for one in told.refusals.values()) + told.more_refusals for told in runs)


def by_round(told: Told, most: int | None, out: str, into: str) -> list[Block]:
    """Bytes of every round, drawn and in numbers; `most`: what a policy lets out in a round."""
    numbers = sorted(told.rounds)
    if not numbers:
        return [blocks.text("No payload has moved yet.", "empty")]
    lines = [(out, 0, [(float(n), float(told.rounds[n].out.bytes)) for n in numbers])]
    drawn = blocks.chart(f"{out} by round", "Encoded bytes.", lines, blocks.size, zero=True)
    heads = ["#Round", "#Uploads", f"#{out}", *(["#Of the round's budget-"] if most else []), "#Stopped", f"#{into}-"]
    rows: list[list[Cell]] = []
    for number in reversed(numbers[-ROUNDS:]):
        one = told.rounds[number]
        share: list[Cell] = [f"{100 * one.out.bytes / most:.3g} %"] if most else []
        stopped: Cell = blocks.toned(f"{one.stopped.times:,}", BAD) if one.stopped.times else "0"
        sizes = blocks.size(one.out.bytes), blocks.size(one.into.bytes)
        rows.append([f"{number:,}", f"{one.out.times:,}", sizes[0], *share, stopped, sizes[1]])
    caption = f"The last {ROUNDS} of {len(numbers):,} rounds" if len(numbers) > ROUNDS else "Every round"
    return [*([drawn] if drawn else []), blocks.table(caption, heads, rows)]


def payloads(told: Told) -> Block:
    """The last payloads that left, or were stopped, one by one."""
    rows: list[list[Cell]] = []
    for entry in reversed(told.uploads):
        refused = entry.decision == "refused"
        decision = blocks.toned("stayed here", BAD) if refused else blocks.toned("left", GOOD)
        digest = (entry.sha256 or "")[:12]
        where = f"{entry.round:,}" if entry.round is not None else "–"
        known = entry.client or "", blocks.size(entry.bytes), decision, digest, f"{entry.seq:,}"
        rows.append([blocks.at(entry.time), where, *known])
    heads = ["When", "#Round", "Client", "#Size", "Decision", "SHA-256 begins-", "#Line of the log-"]
    return blocks.table(f"The last {blocks.count(len(rows), 'upload')}", heads, rows)

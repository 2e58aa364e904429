"""Files that grow, are cut or replaced: nothing is read twice, nothing is missed, and no line is trusted."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dash_rig as rig

from fedllm.dash import blocks, given
from fedllm.dash.chain import Chain
from fedllm.dash.follow import Follower
from fedllm.dash.rounds import Rounds
from fedllm.sites.audit import AuditLog, Digest, Note, read, verify
from fedllm.sites.policy import Egress

LATER = float("inf")


class Lines(Follower):
    """Keeps what it is given."""

    limit = 64

    def clear(self) -> None:
        self.found: list[bytes] = []
        self.long = 0

    def take(self, line: bytes) -> None:
        self.found.append(line)

    def too_long(self) -> None:
        self.long += 1


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_file_is_read_once_wherever_the_writer_stopped(seed: int, tmp_path: Path) -> None:
    draw, file = random.Random(seed), tmp_path / "lines"
    follower, written = Lines(file), b""
    assert follower.refresh(LATER) and follower.found == []
    for _ in range(30):
        piece = bytes(draw.choice(b"ab\n") for _ in range(draw.randrange(12)))
        written += piece
        file.write_bytes(written)
        until = LATER if draw.random() < 0.7 else time.monotonic() - 1
        follower.refresh(until)
    follower.refresh(LATER)
    whole = written[: written.rfind(b"\n") + 1]
    assert b"".join(follower.found) == whole and follower.offset == len(whole)
    assert follower.rest == len(written) - len(whole)


@pytest.mark.parametrize("change", ["cut", "cut and grown", "replaced", "gone", "longer, other lines"])
def test_another_file_is_read_from_its_beginning(change: str, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"one\ntwo\nthree\n")
    follower = Lines(file)
    follower.refresh(LATER)
    after = {
        "cut": b"one\n", "cut and grown": b"one\ntwo\nother\nmore\n", "replaced": b"new\n", "gone": b"",
        "longer, other lines": b"ONE\nTWO\nTHREE\nFOUR\n",
    }[change]  # fmt: skip
    if change in ("replaced", "gone"):
        file.unlink()
    if change != "gone":
        file.write_bytes(after)
    follower.refresh(LATER)
    assert b"".join(follower.found) == after


def test_a_line_that_is_too_long_is_left_out_and_a_pipe_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"a\n" + b"x" * 500 + b"\nb\n" + b"y" * 100)
    follower = Lines(file)
    follower.refresh(LATER)
    assert follower.found == [b"a\n", b"b\n"] and follower.long == 2
    os.mkfifo(tmp_path / "pipe")
    assert Lines(tmp_path / "pipe").refresh(LATER)


def test_a_budget_of_time_is_kept_and_the_rest_comes_later(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"line\n" * 1_000)
    follower = Lines(file)
    assert not follower.refresh(time.monotonic() - 1) and len(follower.found) == 1
    assert follower.refresh(LATER) and len(follower.found) == 1_000


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_rounds_are_added_up_and_one_played_again_counts_once(tmp_path: Path) -> None:
    lost = [{"client": "south", "reason": "signal 9"}]
    lines = [rig.round_line(1), rig.round_line(2, lost=lost, guard={"epsilon": 0.5, "budget": 8.0})]
    lines += [{"event": "evaluation", "round": 2, "model": "federated", "pooled": {"n": 4, "exact_match": 0.5}}]
    folder = rig.run_folder(tmp_path / "run", lines)
    rounds = Rounds(folder / "metrics.jsonl")
    rounds.refresh(LATER)
    rig.append(folder, [rig.round_line(2, loss=0.25, bytes_up=7), rig.round_line(3, model="local")])
    rounds.refresh(LATER)
    own = rounds.own
    assert own.losses == {1: 2.0, 2: 0.25} and own.up == {1: 1_000, 2: 7} and own.last == 2
    assert own.scores == {"exact_match": {2: 0.5}} and own.epsilon == {2: 0.5}
    assert [one["round"] for one in own.latest] == [1, 2]
    assert own.clients["south"].lost == 1 and own.clients["south"].asked == 2
    assert [name for name, _ in rounds.named()] == ["federated", "local"]


def test_lines_that_are_no_rounds_are_counted_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    odd = [
        b"no json",
        b"[1]",
        b'{"round": -1}',
        b'{"round": true}',
        b'{"round": 1, "loss": NaN, "lost": 7, "guard": []}',
    ]
    odd += [b'{"round": 2, "loss": 1e999, "cohort": {}, "bytes_up": -5}', b"[" * 5_000, b'{"round": 3, "model": ["x"]}']
    file.write_bytes(b"\n".join(odd) + b"\n\xff\xfe\n")
    rounds = Rounds(file)
    rounds.refresh(LATER)
    assert rounds.unreadable == 4
    assert rounds.own.losses == {1: None, 2: None, 3: None} and rounds.own.up[2] == 0


def test_values_of_others_have_their_type_or_are_none() -> None:
    assert [given.number(x) for x in (1, 2.5, True, "1", None, float("inf"), 10**400)] == [1.0, 2.5, *[None] * 5]
    assert [given.whole(x) for x in (0, 5, -1, True, 1.0, 2**60)] == [0, 5, None, None, None, None]
    assert given.text("x" * 50, 10) == "x" * 9 + "…" and given.text({"a": 1}) == "" and given.text("\ud800") == "?"
    assert given.mapping([1]) == {} and given.listed({"a": 1}) == [] and given.texts([1, "a", {}, ""]) == ["1", "a"]


@pytest.mark.parametrize("seed", range(10))
def test_thinned_lines_keep_their_ends_and_their_peaks(seed: int) -> None:
    draw = random.Random(seed)
    points = [(float(x), None if draw.random() < 0.1 else draw.random()) for x in range(1, 5_001)]
    points[draw.randrange(5_000)] = (points[0][0], 50.0)
    points = [(float(x), y) for x, (_, y) in enumerate(points, 1)]
    found = blocks.thinned(points)
    assert len(found) <= blocks.POINTS + 2 and found[0] == points[0] and found[-1] == points[-1]
    assert any(y == 50.0 for _, y in found) and set(found) <= set(points)
    assert [x for x, _ in found] == sorted({x for x, _ in found})


# --- audit logs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_log_read_in_pieces_says_what_verify_and_egress_say(seed: int, tmp_path: Path) -> None:
    draw, file = random.Random(seed), tmp_path / "audit.jsonl"
    chain = Chain(file)
    with AuditLog(file) as log:
        for _ in range(15):
            notes = []
            for _ in range(draw.randrange(1, 6)):
                run, decision = f"r{draw.randrange(2)}", draw.choice(["allowed", "refused"])
                action = draw.choice(["send", "send", "receive"])
                sent = Digest("ab" * 32, draw.randrange(1_000))
                kept = decision if action == "send" else None
                notes.append(Note(action, run, draw.randrange(4), "north", sent, kept))
            log.extend("north", notes)
            chain.refresh(LATER)
            assert chain.entries == log.entries and chain.bad is None
    entries = read(file)
    for run, told in chain.runs.items():
        egress = Egress.of(entries, run)
        out = {number: one.out.bytes for number, one in told.rounds.items() if one.out.times}
        assert out == dict(egress.rounds) and told.total.out.bytes == egress.total
        assert told.largest == max(egress.rounds.values(), default=0)
    lines = file.read_bytes().splitlines(keepends=True)
    place = draw.randrange(len(lines))
    lines[place] = lines[place].replace(b'"actor":"north"', b'"actor":"south"')
    file.write_bytes(b"".join(lines))
    fresh = Chain(file)
    fresh.refresh(LATER)
    verdict = verify(file)
    assert fresh.bad == (verdict.first_bad_line, verdict.why) and fresh.entries == verdict.entries == place


@pytest.mark.parametrize("change", ["removed", "swapped", "doubled", "torn", "no json", "too long", "empty line"])
def test_damage_is_found_in_the_same_line_as_by_verify(change: str, tmp_path: Path) -> None:
    file = rig.site_kit(tmp_path / "kit") / "fedllm" / "audit.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if change == "removed":
        del lines[3]
    elif change == "swapped":
        lines[3], lines[4] = lines[4], lines[3]
    elif change == "doubled":
        lines.insert(3, lines[3])
    elif change == "torn":
        lines[-1] = lines[-1][:-20]
    elif change == "too long":
        lines[3] = b"x" * 50_000 + b"\n"
    else:
        lines[3] = b"\n" if change == "empty line" else b"no json\n"
    file.write_bytes(b"".join(lines))
    chain, verdict = Chain(file), verify(file)
    chain.refresh(LATER)
    assert chain.entries == verdict.entries
    if change == "torn":  # a writer may be about to write its end
        assert chain.bad is None and chain.rest > 0
    else:
        assert chain.bad == (verdict.first_bad_line, verdict.why)


def test_a_cut_end_shows_against_a_checkpoint(tmp_path: Path) -> None:
    kit = rig.server_kit(tmp_path / "hub")
    file = kit / "fedllm" / "audit.jsonl"
    anchor = json.loads((kit / "fedllm" / "runs" / "first" / "audit.json").read_text())["last"]
    chain = Chain(file)
    chain.refresh(LATER)
    assert chain.against(anchor) == "" and chain.against("nonsense") == ""
    seq, digest = anchor.split(":")
    assert "is not the one" in chain.against(f"{seq}:{digest[::-1]}")
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[: int(seq) - 1]))
    chain.refresh(LATER)
    assert f"ends before entry {seq}" in chain.against(anchor)

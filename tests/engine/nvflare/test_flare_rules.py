"""What a site refuses, what may not leave it, and what both ends write down; real worker processes, and no FLARE."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

from fedllm.core.errors import FedLLMError, RunError
from fedllm.engine.nvflare import trust
from fedllm.engine.nvflare.engine import Sites
from fedllm.engine.nvflare.facts import SiteFacts
from fedllm.engine.nvflare.keeper import Keeper
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.record import Record
from fedllm.sites.audit import AuditFull, AuditLocked, Entry, client_name, matched, read, verify
from fedllm.sites.manifest import ManifestError

pytestmark = pytest.mark.slow
HOMES = {"site-1": ("ward 1", "c2"), "site-2": ("Zürich",)}
"""Ids of clients are what people write."""
NAMES = {"ward 1": "c0", "Zürich": "c1", "c2": "c2"}
SHORT: dict[str, Any] = {"method": "scaffold", "rounds": 3, "train": {"steps": 2, "batch_size": 2}}


def rows(client: str) -> list[dict[str, str]]:
    return [{**row, "who": client} for row in rig.rows(NAMES[client])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules")


@pytest.fixture(scope="module")
def sites(place: Path) -> Iterator[rig.Loopback]:
    found = rig.Loopback(place, rows, HOMES)
    yield found
    found.end()


@pytest.fixture
def post(sites: rig.Loopback) -> rig.Loopback:
    sites.before = lambda site, letter: None
    sites.asked.clear()
    for site in HOMES:
        rig.write_policy(sites.folder / site)
    return sites


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[rig.Loopback]:
    """Sites whose workers must never be started."""
    found = rig.Loopback(tmp_path, rows, HOMES)
    yield found
    pids = [keeper.process.pid for keeper in found.keepers.values()]
    found.end()
    assert pids == [None, None], "nothing was read: no worker was started"


def entries(post: rig.Loopback, who: str, run: str, action: str) -> list[Entry]:
    return [entry for entry in read(post.audit(who)) if entry.run == run and entry.action == action]


def rounds(result: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "round"]


def agree(post: rig.Loopback) -> None:
    """All logs are whole, and each payload stands in the log of both ends."""
    for who in (rig.SERVER, *HOMES):
        assert verify(post.audit(who)).intact
    assert matched(post.audit(), {site: post.audit(site) for site in HOMES}) == []


# --- before anything is read ------------------------------------------------------------------------------------------


def test_a_run_outside_the_policy_is_refused_before_data_is_read(cold: rig.Loopback) -> None:
    away = datetime.now(UTC) + timedelta(hours=6)
    window = f"{away:%H:%M}-{away + timedelta(hours=1):%H:%M}"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"methods": ["fedprox"]}, "policy.methods: fedprox."),
        ({"max_rounds": 1}, "policy.max_rounds: at most 1."),
        ({"max_clients": 1}, "policy.max_clients: at most 1."),
        ({"purposes": ["quality of care"]}, "policy.purposes: quality of care."),
        ({"data_sets": ["letters"]}, "policy.data_sets: letters."),
        ({"hours": [window]}, "policy.hours"),
        ({"require": {"secure": {}}}, "policy.require.secure"),
        ({"require": {"privacy": {"level": "client"}}}, "policy.require.privacy"),
        ({"coordinators": ["eve@hub.org"]}, "policy.coordinators: eve@hub.org."),
        ({"coordinators": ["*"]}, "policy.coordinators"),
        ({"site": "site-9"}, "does not list this site"),
        ({"max_rouns": 3}, "max_rouns"),
    ]
    for number, (changes, text) in enumerate(cases):
        for site in HOMES:
            rig.write_policy(cold.folder / site, **changes)
        with pytest.raises(RunError, match="Nothing was trained") as found:
            cold.play(f"r{number}", rig.recipe(**SHORT))
        assert text in str(found.value), (changes, str(found.value))
        for site in HOMES:
            last = read(cold.audit(site))[-1]
            assert (last.run, last.decision) == (f"r{number}", "refused") and text[:20] in str(last.reason)
        answers = entries(cold, rig.SERVER, f"r{number}", "join")
        assert [answer.decision for answer in answers] == ["refused", "refused"] and all(a.peer for a in answers)
    agree(cold)


def test_a_site_without_a_policy_allows_nothing_and_says_what_to_do(cold: rig.Loopback) -> None:
    for keeper in cold.keepers.values():
        keeper.gate.facts = keeper.gate.facts.model_copy(update={"policy": None})
    with pytest.raises(RunError, match=r"has no policy, so that nothing is allowed.*local/policy.yaml"):
        cold.play("none", rig.recipe(**SHORT))


def hello(post: rig.Loopback, site: str, run: str, recipe: dict[str, Any], signed: Any) -> Letter:
    """What a site answers to a server that checks nothing."""
    facts = {"run": run, "recipe": recipe, "signed": signed.to_json() if signed else None, "versions": {}}
    return post.keepers[site].handle(Letter({"op": "hello", **facts}), lambda: False)


def test_manifests_that_are_not_the_coordinators(cold: rig.Loopback, tmp_path: Path) -> None:
    made = rig.recipe(**SHORT)
    good = cold.signed("run", made)
    stranger = rig.Authority().kit(tmp_path / "stranger", rig.ADMIN)
    changed = good.manifest.replace(b'"purpose":"research"', b'"purpose":"anything"')
    forged = good.manifest.replace(b'"signature":"', b'"signature":"AAAA')
    site = trust.signed(cold.folder / "site-2", "run", made, sorted(HOMES), purpose="research")
    other = rig.recipe(**{**SHORT, "rounds": 5})
    cases: list[tuple[Any, str]] = [
        (None, "without a signed manifest"),
        (trust.Signed(changed, good.certificate), "changed after it was signed: purpose"),
        (trust.Signed(forged, good.certificate), "signature"),
        (trust.signed(stranger, "run", made, sorted(HOMES), purpose="research"), "not issued by the given root"),
        (trust.Signed(good.manifest, site.certificate), "signature"),
        (cold.signed("other", made), "is that of run 'other'"),
        (cold.signed("run", other), "is not the one in its manifest"),
        (trust.signed(cold.admin, "run", made, ["site-2", "site-3"], purpose="research"), "does not name this site"),
    ]
    for signed, text in cases:
        answer = hello(cold, "site-1", "run", made, signed)
        assert answer.op == "error" and text in answer.meta["reason"], (text, answer.meta)
        assert read(cold.audit("site-1"))[-1].action == "manifest"
        if signed is not None:
            with pytest.raises(ManifestError):
                cold.play("run", made, signed=signed)
    assert not cold.asked, "the server has not even said hello"
    answer = hello(cold, "site-1", "run", made, site)
    assert "The coordinator 'site-2' is not allowed at this site. policy.coordinators" in answer.meta["reason"]
    for letter in ({"op": "begin", "facts": {"home": {}}}, {"op": "stores", "leg": "federated", "orders": []}):
        assert "accepted no run" in cold.keepers["site-1"].handle(Letter(letter), lambda: False).meta["reason"]


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_a_part_that_may_not_leave_stays_and_the_run_goes_on(post: rig.Loopback) -> None:
    rig.write_policy(post.folder / "site-1", parts=["header"])
    result = post.play("parts", rig.recipe(**SHORT))
    for line in rounds(result):
        assert line["used"] == 1 and {one["client"] for one in line["lost"]} == {"ward 1", "c2"}
        assert all("policy.parts: header." in one["reason"] for one in line["lost"])
    sent = entries(post, "site-1", "parts", "send")
    assert {e.decision for e in sent} == {"allowed", "refused"}, "what is measured has no other part, and may leave"
    assert len([e for e in sent if e.decision == "refused"]) == 6
    assert all("policy.parts" in str(e.reason) for e in sent if e.decision == "refused")
    lost = entries(post, rig.SERVER, "parts", "lost")
    assert {e.client for e in lost} == {client_name("ward 1"), "c2"} and "policy.parts" in str(lost[0].reason)
    journal = json.loads((post.folder / "site-1/fedllm/parts/federated/journal.json").read_text())
    assert journal["held"] == {} and journal["staged"] == {}, "their turns are undone"
    agree(post)


def test_egress_that_is_used_up_loses_the_clients_and_not_the_run(post: rig.Loopback) -> None:
    post.play("plain", rig.recipe(**SHORT))
    sent = {r: sum(e.bytes or 0 for e in entries(post, "site-1", "plain", "send") if e.round == r) for r in (1, 2, 3)}
    first = next(e.bytes or 0 for e in entries(post, "site-1", "plain", "send") if e.round == 2)
    rig.write_policy(post.folder / "site-1", max_egress_run=sent[1] + first + 100)
    result = post.play("egress", rig.recipe(**SHORT))
    assert [line["used"] for line in rounds(result)] == [3, 2, 1]
    assert all("policy.max_egress_run" in one["reason"] for line in rounds(result) for one in line["lost"])
    left = sum(e.bytes or 0 for e in entries(post, "site-1", "egress", "send") if e.decision == "allowed")
    assert left <= sent[1] + first + 100
    agree(post)
    rig.write_policy(post.folder / "site-1")
    keeper = post.keepers["site-1"]
    keeper.end()
    fresh = Keeper(keeper.gate.kit, keeper.gate.facts)
    try:
        made = rig.recipe(**SHORT)
        fresh.gate.admit({"run": "egress", "recipe": made, "signed": post.signed("egress", made).to_json()})
        assert fresh.gate._run is not None and fresh.gate._run.egress.total == left, "a restart does not begin at 0"
    finally:
        fresh.end()


def test_a_method_that_the_manifest_does_not_speak_of_is_not_played(post: rig.Loopback) -> None:
    post.play("legs", rig.recipe(**{**SHORT, "rounds": 1}))
    made = rig.recipe(**{**SHORT, "rounds": 1})
    assert hello(post, "site-2", "legs", made, post.signed("legs", made)).op == "error", "it asks for versions"
    post.keepers["site-2"].gate.admit({"run": "legs", "recipe": made, "signed": post.signed("legs", made).to_json()})
    ask = {"op": "ask", "leg": "fedprox", "orders": [], "requests": [], "deadline": None}
    answer = post.keepers["site-2"].handle(Letter(ask), lambda: False)
    assert "The server asks for 'fedprox'." in answer.meta["reason"]


def test_an_operation_that_is_not_answered(post: rig.Loopback) -> None:
    rig.write_policy(post.folder / "site-1", ops=["evaluate"])
    result = post.play("ops", rig.recipe(**{**SHORT, "rounds": 1}))
    assert all("policy.ops: evaluate." in one["reason"] for one in rounds(result)[0]["lost"])
    asked = entries(post, "site-1", "ops", "request")
    assert [e.decision for e in asked] == ["refused", "refused", "allowed", "allowed"]
    agree(post)


def test_replay(post: rig.Loopback) -> None:
    """An old id with another recipe is refused by the server and by every site; the same again is a resume."""
    made, longer = rig.recipe(**SHORT), rig.recipe(**{**SHORT, "rounds": 4})
    old = post.signed("old", made)
    post.play("old", made, signed=old)
    with pytest.raises(ManifestError, match="not the one in its manifest"):
        post.play("old", longer, signed=old)
    with pytest.raises(ManifestError, match=r"began on .* with another manifest"):
        post.play("old", longer)
    answer = hello(post, "site-1", "old", longer, post.signed("old", longer))
    assert "with another manifest" in answer.meta["reason"]
    assert post.play("old", made).finished, "signed again at another time, it is the same run"
    for who in (rig.SERVER, *HOMES):
        assert len(entries(post, who, "old", "start")) == 1 and len(entries(post, who, "old", "resume")) == 1
    kept = (post.folder / "site-1/fedllm/old/manifest.json").read_bytes()
    assert json.loads(kept)["manifest"]["run"] == "old"
    agree(post)


def kill(post: rig.Loopback, site: str) -> None:
    process = post.keepers[site].process
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    while process.alive:
        time.sleep(0.01)


def test_a_worker_killed_in_a_round_leaves_whole_logs_that_match(post: rig.Loopback, tmp_path: Path) -> None:
    gate, real = post.keepers["site-1"].gate, post.keepers["site-1"].gate.requests

    def requests(letter: Letter) -> dict[str, Letter]:
        found = real(letter)
        if letter.meta["requests"][0]["round"] == 2 and letter.meta["requests"][0]["op"] == "work":
            kill(post, "site-1")
            post.keepers["site-1"].process.start()  # so that it is killed while it is asked, and not before
            threading.Timer(0.5, kill, (post, "site-1")).start()
        return found

    gate.requests = requests  # type: ignore[method-assign]
    try:
        result = post.play("killed", rig.recipe(**SHORT))
    finally:
        gate.requests = real  # type: ignore[method-assign]
    assert [line["used"] for line in rounds(result)] == [3, 1, 3]
    lost = entries(post, "site-1", "killed", "lost")
    assert [e.client for e in lost] == [client_name("ward 1"), "c2"] or len(lost) == 2
    assert len(entries(post, rig.SERVER, "killed", "checkpoint")) == 3
    assert len(entries(post, rig.SERVER, "killed", "end")) == 1
    assert len(entries(post, rig.SERVER, "killed", "leave")) == 2
    marks = entries(post, "site-1", "killed", "checkpoint")
    assert marks and {e.peer for e in marks} <= {e.reference for e in entries(post, rig.SERVER, "killed", "checkpoint")}
    anchor = json.loads((result.folder / "audit.json").read_text())["last"]
    assert verify(post.audit(), anchor).intact
    agree(post)
    data = post.audit("site-1").read_bytes()
    for at in range(10, len(data), max(1, len(data) // 7)):
        (tmp_path / "flipped").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not verify(tmp_path / "flipped").intact


def test_a_full_disk_is_a_round_that_does_not_count(post: rig.Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    real, full = os.pwrite, {"who": "site-1", "round": b'"round":2'}

    def pwrite(file: int, data: bytes, at: int) -> int:
        path = os.readlink(f"/proc/self/fd/{file}")
        if path == str(post.audit(full["who"])) and full["round"] in data and b'"action":"send"' in data:
            raise OSError(errno.ENOSPC, "no space")
        return real(file, data, at)

    monkeypatch.setattr("fedllm.sites.audit.os.pwrite", pwrite)
    result = post.play("full", rig.recipe(**SHORT))
    assert [line["used"] for line in rounds(result)] == [3, 1, 3]
    assert all("the disk is full" in one["reason"] for one in rounds(result)[1]["lost"])
    assert not [e for e in entries(post, "site-1", "full", "send") if e.round == 2]
    full["who"] = rig.SERVER
    with pytest.raises(AuditFull):
        post.play("full2", rig.recipe(**SHORT))
    monkeypatch.undo()
    again = post.play("full2", rig.recipe(**SHORT))
    assert again.finished and [line["round"] for line in rounds(again)] == [1, 2, 3]
    agree(post)


def test_one_writer_and_a_log_that_was_exchanged(post: rig.Loopback, tmp_path: Path) -> None:
    post.play("writer", rig.recipe(**{**SHORT, "rounds": 1}))
    with Record(post.audit("site-1"), "site-1", 0.1) as record, pytest.raises(AuditLocked):
        Record(post.audit("site-1"), "site-1", 0.1)
    assert record.last is None
    log = post.audit()
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    try:
        with pytest.raises(FedLLMError, match="not the one that the last checkpoint"):
            post.play("writer", rig.recipe(**{**SHORT, "rounds": 1}))
    finally:
        log.write_bytes(whole)


def test_fewer_sites_than_the_quorum(post: rig.Loopback) -> None:
    sites = Sites(post, {"a": "site-1", "b": "site-2"}, quorum=2)
    sites.enough()
    sites.lost["site-2"] = "it is gone"
    with pytest.raises(RunError, match="1 of 2 sites are left, and the run needs 2"):
        sites.enough()


def test_facts_name_a_policy(tmp_path: Path) -> None:
    assert SiteFacts().policy is None and SiteFacts(policy="local/policy.yaml").policy == "local/policy.yaml"

"""FLARE itself, on loopback: one server and three sites as processes of their own, with certificates and policies."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

from fedllm.engine.nvflare import job as jobs
from fedllm.engine.nvflare import kits, parts, record, session
from fedllm.engine.nvflare.standing import Standing
from fedllm.sites import audit

pytestmark = pytest.mark.slow
SERVER, ADMIN = "localhost", "admin@hub.org"
PATIENCE = 420.0


@dataclass
class Net:
    place: Path
    kits: dict[str, Path]
    running: dict[str, session.Participant]

    def run_folder(self, run: str) -> Path:
        return self.kits[SERVER] / "fedllm" / "runs" / run

    def rounds(self, run: str) -> list[dict[str, Any]]:
        file = self.run_folder(run) / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [line for line in map(json.loads, lines) if line["event"] == "round"]

    def after(self, run: str, count: int) -> None:
        """Wait until so many rounds are over."""
        until = time.monotonic() + PATIENCE
        while len(self.rounds(run)) < count:
            assert time.monotonic() < until, "the rounds do not come"
            time.sleep(0.05)

    def worker(self, site: str) -> psutil.Process:
        family = psutil.Process(self.running[site].process.pid).children(recursive=True)
        return next(one for one in family if "fedllm.engine.nvflare.worker" in one.cmdline())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    place = tmp_path_factory.mktemp("net")
    admins = {ADMIN: ("hub", "project_admin"), "member@hub.org": ("hub", "member")}
    network = kits.Network("demo", SERVER, free_port(), {site: f"org{site[-1]}" for site in rig.HOMES}, admins)
    facts: dict[str, Any] = {site: rig.site_facts(clients, place / site) for site, clients in rig.HOMES.items()}
    made = kits.provision(network, place / "ws", {**facts, SERVER: {"device": "cpu"}})
    found = Net(place, made, {})
    try:
        found.running = session.start_all(made, [SERVER, *rig.HOMES])
        yield found
    finally:
        for one in found.running.values():
            one.stop(kill=True)


def submit(net: Net, run: str, **changes: Any) -> str:
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        admin.wait_for(list(rig.HOMES))
        return admin.submit(run, rig.recipe(**changes), list(rig.HOMES))


def at_its_end(net: Net, run: str) -> Path:
    """Wait for a run that goes on by itself, in whatever job, and fetch it."""
    until = time.monotonic() + PATIENCE
    while True:
        with session.session(ADMIN, net.kits[ADMIN]) as admin:
            job = admin.newest(run)
            assert job is not None
            if admin.status(job) == session.GOOD:
                return admin.fetch(job, net.place / "fetched")
        assert time.monotonic() < until, "the run does not end"
        time.sleep(1.0)


def finished(net: Net, job: str) -> Path:
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        status = admin.wait(job, PATIENCE)
        found = admin.fetch(job, net.place / "fetched")
        error = found / "error.txt"
        assert status == session.GOOD, error.read_text() if error.is_file() else status
        return found


def test_policies_are_in_every_kit(net: Net) -> None:
    for name in (SERVER, *rig.HOMES):
        local = net.kits[name] / "local"
        resources, rights = (json.loads((local / f"{n}.json").read_text()) for n in ("resources", "authorization"))
        assert resources["class_allow_list"] == list(jobs.ALLOWED)
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert not resources.get("allow_log_streaming") and "/tmp/nvflare" not in json.dumps(resources)
        for role in rights["permissions"].values():
            assert all(role[right] == "none" for right in kits.FORBIDDEN)


def test_server_killed_then_the_same_bits(net: Net) -> None:
    """Kill -9 of the server in the middle of a run; it goes on by itself, and ends as the local engine does."""
    changes: dict[str, Any] = {"method": "scaffold", "rounds": 6, "cohort": 3, "train": {"steps": 8, "batch_size": 2}}
    home = rig.at_home(net.place, **changes)
    submit(net, "run-1", **changes)
    net.after("run-1", 2)
    net.running[SERVER].stop(kill=True)
    assert len(net.rounds("run-1")) < 6 and not (net.run_folder("run-1") / "result.json").exists()
    net.running[SERVER] = session.start(SERVER, net.kits[SERVER])
    found = at_its_end(net, "run-1")
    ours, theirs = (place / "adapter" / "adapter_model.safetensors" for place in (found, home.folder))
    assert ours.read_bytes() == theirs.read_bytes()
    result = json.loads((found / "result.json").read_text())
    assert result["finished"] and result["rounds"] == 6 and result["bytes"] == home.table["bytes"]
    assert [row["pooled"] for row in result["rows"]] == [row["pooled"] for row in home.table["rows"]]


def test_worker_killed_then_the_run_goes_on(net: Net) -> None:
    large = {"rank": 512}  # a letter beyond parts.INLINE: it is streamed in parts
    job = submit(net, "run-2", rounds=4, train={"steps": 60, "batch_size": 2}, adapter=large)
    net.after("run-2", 1)
    worker = net.worker("site-1")
    before = sum(worker.cpu_times()[:2])
    while sum(worker.cpu_times()[:2]) < before + 0.2:  # in the middle of the next round's work, on any machine
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    found = finished(net, job)
    rounds = net.rounds("run-2")
    lost = [entry for line in rounds for entry in line["lost"]]
    assert len(rounds) == 4 and rounds[-1]["used"] == 5
    assert {entry["client"] for entry in lost} <= {"c0", "c3"} and lost
    assert all("signal 9" in entry["reason"] for entry in lost)
    result = json.loads((found / "result.json").read_text())
    assert result["finished"] and result["bytes"]["up"] > 3 * 3 * parts.INLINE / 2, "two uploads of a site are streamed"


def test_fedit_on_t0_tasks_as_at_home(net: Net) -> None:
    """Instruction tasks of real people at three sites, a real small model: the bytes of the local engine."""
    source = Path(__file__).parents[3].parent / "shared" / "data" / "t0-tasks.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    tasks: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(source, "rt") as file:
        for line in file:
            row = json.loads(line)
            if len(row["instruction"]) + len(row["response"]) > 300:
                continue  # longer ones lose their response at 128 tokens
            if len(held := tasks.setdefault(row["task"], [])) < 12:
                held.append(row)
            if sum(len(rows) == 12 for rows in tasks.values()) == len(rig.CLIENTS):
                break
    whole = [rows for rows in tasks.values() if len(rows) == 12]
    dealt = {c: [{**row, "who": c} for row in rows] for c, rows in zip(rig.CLIENTS, whole, strict=True)}
    changes: dict[str, Any] = {
        "method": "fedit", "model": {"name": "fedllm-tiny", "device": "cpu"}, "adapter": {"rank": 8}, "rounds": 2,
        "task": {"max_length": 128}, "train": {"steps": 2, "batch_size": 2},
    }  # fmt: skip
    before = {site: (net.place / site / "data" / "rows.jsonl").read_text() for site in rig.HOMES}
    try:
        for site, clients in rig.HOMES.items():
            rig.write_rows(net.place / site / "data" / "rows.jsonl", clients, dealt.__getitem__)
        home = rig.at_home(net.place / "t0", dealt.__getitem__, **changes)
        found = finished(net, submit(net, "run-t0", **changes))
    finally:
        for site, text in before.items():
            (net.place / site / "data" / "rows.jsonl").write_text(text)
    ours, theirs = (place / "adapter" / "adapter_model.safetensors" for place in (found, home.folder))
    assert ours.read_bytes() == theirs.read_bytes()
    result = json.loads((found / "result.json").read_text())
    assert [row["pooled"] for row in result["rows"]] == [row["pooled"] for row in home.table["rows"]]


def test_a_site_killed_and_started_again_comes_back(net: Net) -> None:
    """Kill -9 of a whole site: the others go on, and when it is here again it is used again."""
    submit(net, "run-3", rounds=20, train={"steps": 160, "batch_size": 2})
    net.after("run-3", 2)
    net.running["site-2"].stop(kill=True)
    net.running["site-2"] = session.start("site-2", net.kits["site-2"])
    at_its_end(net, "run-3")
    rounds = net.rounds("run-3")
    assert [line["round"] for line in rounds] == list(range(1, 21)), "every round is there once"
    lost = [line["round"] for line in rounds if {entry["client"] for entry in line["lost"]} == {"c1", "c4"}]
    assert lost and rounds[-1]["used"] == 5, "the site was lost, and is back"


def test_a_job_process_of_a_site_killed_then_the_run_goes_on(net: Net) -> None:
    """FLARE ends the whole job where one site's process ends; the run goes on in another job."""
    submit(net, "run-4", rounds=5, train={"steps": 12, "batch_size": 2})
    net.after("run-4", 1)
    parent = net.worker("site-3").parent()
    assert parent is not None
    parent.kill()
    at_its_end(net, "run-4")
    assert [line["round"] for line in net.rounds("run-4")] == [1, 2, 3, 4, 5]
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        stands = Standing.read(net.run_folder("run-4"))
        assert stands is not None and (stands.name, stands.job) == ("finished", admin.newest("run-4"))


def test_a_job_under_the_id_of_a_run_is_given_nothing_of_it(net: Net) -> None:
    """Another recipe under the id of a run that is over: refused, and the run stands as it did."""
    made = submit(net, "run-5", rounds=1)
    finished(net, made)
    before = (net.run_folder("run-5") / "standing.json").read_bytes()
    job = submit(net, "run-5", rounds=2)
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        status = admin.wait(job, PATIENCE)
        place = admin.fetch(job, net.place / "fetched")
        assert status not in (session.GOOD, "FINISHED:ABORTED") and admin.newest("run-5") == job
    assert {one.name for one in place.iterdir()} == {"error.txt", "standing.json"}
    assert "with another manifest" in (place / "error.txt").read_text()
    assert (net.run_folder("run-5") / "standing.json").read_bytes() == before
    time.sleep(5.0)
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        assert admin.newest("run-5") == job and admin.status(job) == status, "nobody begins it again, or calls it good"


def test_the_logs_of_all_runs_are_whole_and_match(net: Net) -> None:
    """Only what was under way when a process was killed stands at one end alone."""
    logs = {name: net.kits[name] / "fedllm" / record.FILE for name in (SERVER, *rig.HOMES)}
    assert all(audit.verify(log).intact for log in logs.values())
    entries = {name: audit.read(log) for name, log in logs.items()}
    for name in logs:
        done = [entry.action for entry in entries[name] if entry.run == "run-2"]
        assert {"manifest", "start", "send", "receive", "checkpoint", "lost", "end"} <= set(done) or name != SERVER
        assert {"policy", "manifest", "join", "start", "send", "receive", "end"} <= set(done) or name == SERVER
        again = [entry.action for entry in entries[name] if entry.run == "run-1"]
        assert again.count("start") == again.count("resume") == again.count("end") == 1
    server = entries.pop(SERVER)
    for run in {one.entry.run for one in audit.matched(server, entries)}:
        found = [one for one in audit.matched(server, entries) if one.entry.run == run]
        back = [entry.time for entry in server if entry.run == run and entry.action == "resume"]
        assert run in ("run-1", "run-3", "run-4") and len(found) <= 2 * len(rig.CLIENTS)
        assert all(one.entry.time < back[-1] for one in found)


def test_who_may_not_submit(net: Net) -> None:
    """A member may look and not submit; and no job may name another class."""
    with session.session("member@hub.org", net.kits["member@hub.org"]) as member, pytest.raises(Exception, match="uth"):
        member.submit("run-3", rig.recipe(), list(rig.HOMES))

"""The warden: which runs go on by themselves, when, and with whom. FLARE's parent process is a stand-in here."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus, job_from_meta
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler

from fedllm.core.errors import RunError
from fedllm.engine.nvflare import standing, warden
from fedllm.engine.nvflare.engine import Sites
from fedllm.engine.nvflare.standing import PAUSE, Keep, Paused, Standing, pause, refuse

SITES = ["north", "south"]


class Jobs:
    """FLARE's job store, as far as the warden uses it."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}
        self.full = 0  # so many times the disk is full

    def add(self, job: str, status: str, run: str = "run", **more: Any) -> None:
        meta = {"name": run, "status": status, "deploy_map": {"app": ["server", *SITES]}, "min_clients": 2, **more}
        facts = {"job_id": job, "mandatory_clients": SITES, "submitter_name": "ada", "submit_time": len(self.held)}
        self.held[job] = {**facts, **meta}

    def get_job(self, job: str, fl_ctx: Any) -> Any:
        return job_from_meta(self.held[job]) if job in self.held else None

    def get_jobs_by_status(self, status: list[RunStatus], fl_ctx: Any) -> list[Any]:
        wanted = {one.value for one in status}
        return [self.get_job(job, fl_ctx) for job, meta in self.held.items() if meta["status"] in wanted]

    def set_status(self, job: str, status: RunStatus, fl_ctx: Any) -> None:
        self.held[job]["status"] = status.value

    def clone(self, from_jid: str, meta: dict[str, Any], fl_ctx: Any) -> dict[str, Any]:
        if self.full:
            self.full -= 1
            raise OSError(errno.ENOSPC, "no space")
        name = f"{from_jid}+"
        assert "job_id" not in meta, "FLARE gives it an id of its own"
        assert name not in self.held, "a job goes on in one copy"
        now = {"job_id": name, "submit_time": len(self.held), "status": RunStatus.SUBMITTED.value}
        self.held[name] = {**meta, **now}
        return self.held[name]


class Parent:
    """FLARE's parent process at the server."""

    def __init__(self, kit: Path) -> None:
        self.jobs, self.kit, self.heard = Jobs(), kit, dict[str, float]()
        self.warden = warden.Warden()
        (kit / "local").mkdir(parents=True, exist_ok=True)
        (kit / "local" / "fedllm.json").write_text('{"device": "cpu"}')

    @property
    def run(self) -> Path:
        return self.kit / "fedllm" / "runs" / "run"

    def get_component(self, name: str) -> Jobs:
        return self.jobs

    def get_workspace(self) -> Any:
        return SimpleNamespace(get_root_dir=lambda: str(self.kit))

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=name, last_connect_time=at) for name, at in self.heard.items()]

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        """What FLARE makes of a line in its log, and of a scheduler's questions."""
        if "resources" in event:
            self.warden.handle_event(event, fl_ctx)

    @contextlib.contextmanager
    def new_context(self) -> Generator[FLContext]:
        fl_ctx = FLContext()
        fl_ctx.get_engine = lambda: self  # type: ignore[method-assign]
        yield fl_ctx

    def fire(self, event: str, **props: Any) -> FLContext:
        with self.new_context() as fl_ctx:
            for name, value in props.items():
                fl_ctx.set_prop(name, value, private=True, sticky=False)
            self.warden.handle_event(event, fl_ctx)
            return fl_ctx

    def over(self, job: str) -> None:
        self.fire(EventType.JOB_COMPLETED, **{FLContextKey.EVENT_DATA: {"job_id": job}})

    def started(self, job: str) -> None:
        self.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": job}})

    def keep(self, job: str = "a", quorum: int = 1) -> Keep:
        return Keep(self.run, SITES, quorum, job)

    def stands(self) -> Standing:
        found = Standing.read(self.run)
        assert found is not None
        return found

    def copies(self) -> list[str]:
        return [job for job in self.jobs.held if job.endswith("+")]

    def again(self) -> Parent:
        """The server starts again."""
        self.fire(EventType.SYSTEM_END)
        self.warden = warden.Warden()
        self.fire(EventType.SYSTEM_START)
        return self


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    found = Parent(tmp_path / "kit")
    yield found
    found.fire(EventType.SYSTEM_END)


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_that_starts_again_goes_on_with_what_ran(parent: Parent) -> None:
    parent.keep().round()
    parent.jobs.add("a", "RUNNING")
    parent.jobs.add("b", "SUBMITTED", "other")
    parent.fire(EventType.SYSTEM_START)
    assert parent.jobs.held["a"]["status"] == "FINISHED:ABNORMAL" and parent.copies() == ["a+"]
    made = parent.jobs.held["a+"]
    assert made["min_clients"] == 0 and made["mandatory_clients"] == [] and made["submitter_name"] == "ada"
    assert made[warden.MARK]["round"] == 1 and made[warden.MARK]["quorum"] == 1
    assert (parent.stands().name, parent.stands().job, parent.stands().round) == ("waiting", "a+", 1)


@pytest.mark.parametrize(
    ("status", "stands", "goes_on"),
    [
        ("FINISHED:EXECUTION_EXCEPTION", "running", True),
        ("FINISHED:EXECUTION_EXCEPTION", "waiting", True),
        ("FINISHED:FAILED_TO_RUN", None, True),
        ("FINISHED:EXECUTION_EXCEPTION", "failed", False),
        ("FINISHED:ABORTED", "running", False),
        ("FINISHED:CAN_NOT_SCHEDULE", None, False),
        ("FINISHED:COMPLETED", "finished", False),
        ("FINISHED:ABNORMAL", "finished", False),
    ],
)
def test_what_goes_on_by_itself(parent: Parent, status: str, stands: Any, goes_on: bool) -> None:
    if stands is not None:
        parent.keep().end(stands)
    parent.jobs.add("a", status)
    parent.over("a")
    assert bool(parent.copies()) is goes_on
    if stands == "finished":
        assert parent.jobs.held["a"]["status"] == "FINISHED:COMPLETED", "a site that was gone does not make it fail"
    if status == "FINISHED:ABORTED":
        assert parent.stands().name == "stopped"


def test_it_gives_up_where_no_round_ends_and_not_before(parent: Parent) -> None:
    parent.keep()
    job = "a"
    parent.jobs.add(job, "FINISHED:ABNORMAL")
    for _ in range(warden.TRIES):
        parent.over(job)
        job += "+"
        parent.jobs.held[job]["status"] = "FINISHED:ABNORMAL"
    parent.over(job)
    assert len(parent.copies()) == warden.TRIES
    assert parent.stands().name == "failed" and "without a round" in str(parent.stands().reason)
    parent.keep(job).round()
    parent.over(job)
    assert len(parent.copies()) == warden.TRIES + 1, "a round has ended: it counts anew"


# --- whose run it is --------------------------------------------------------------------------------------------------


def test_how_a_run_stands_is_nothing_to_another_job_of_its_name(parent: Parent) -> None:
    """A job that was refused says nothing of the run, and the run says nothing of it."""
    parent.keep("a").end("finished")
    before = (parent.run / "standing.json").read_bytes()
    parent.jobs.add("b", "FINISHED:EXECUTION_EXCEPTION", submitter_name="eve")
    refuse(parent.kit, parent.run, "b", "The run began with another manifest.")
    parent.over("b")
    assert parent.jobs.held["b"]["status"] == "FINISHED:EXECUTION_EXCEPTION", "it did not complete what 'a' did"
    assert parent.copies() == [], "it failed for a reason of its own"
    assert (parent.run / "standing.json").read_bytes() == before
    parent.jobs.add("c", "FINISHED:EXECUTION_EXCEPTION", **{warden.MARK: _mark(tries=warden.TRIES)})
    parent.over("c")
    assert (parent.run / "standing.json").read_bytes() == before, "giving up is told of the job, and not of the run"
    told = Standing.of_job(parent.kit, parent.run, "c")
    assert told is not None and told.name == "failed"


def _mark(**changes: Any) -> dict[str, Any]:
    return {"since": time.time(), "round": 0, "tries": 1, "quorum": 2, **changes}


def test_a_resumed_run_whose_job_dies_early_is_begun_again_though_it_failed_before(parent: Parent) -> None:
    parent.keep("old").end("failed", "The policy.")
    parent.jobs.add("new", "FINISHED:FAILED_TO_RUN")
    parent.over("new")
    assert parent.copies() == ["new+"] and parent.stands().job == "old"


def test_a_copy_that_dies_early_is_counted_on_and_its_reason_is_told_of_the_run(parent: Parent) -> None:
    parent.keep("a", quorum=2).round()
    parent.jobs.add("a", "FINISHED:ABNORMAL")
    parent.over("a")
    parent.jobs.held["a+"]["status"] = "FINISHED:ABNORMAL"
    parent.over("a+")
    mark = parent.jobs.held["a++"][warden.MARK]
    assert (mark["round"], mark["tries"], mark["quorum"]) == (1, 2, 2)
    assert refuse(parent.kit, parent.run, "a++", "The log is damaged.") == parent.run, "the run waits for this job"
    assert (parent.stands().name, parent.stands().round) == ("failed", 1)
    parent.jobs.held["a++"]["status"] = "FINISHED:EXECUTION_EXCEPTION"
    parent.over("a++")
    assert parent.copies() == ["a+", "a++"]


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "", "/tmp/x", None, 7])
def test_a_name_that_is_no_runs_is_left_alone(parent: Parent, name: Any) -> None:
    parent.jobs.add("a", "FINISHED:ABNORMAL", name, **{warden.MARK: _mark(tries=warden.TRIES)})
    parent.started("a")
    before = sorted(str(one) for one in parent.kit.parent.rglob("*"))
    parent.over("a")
    assert parent.copies() == [] and sorted(str(one) for one in parent.kit.parent.rglob("*")) == before


@pytest.mark.parametrize("mark", ["x", [], {"tries": 1}, {**_mark(), "since": "now"}, {**_mark(), "tries": None}])
def test_a_note_that_is_not_the_wardens_is_none(parent: Parent, mark: Any) -> None:
    parent.jobs.add("a", "FINISHED:ABNORMAL", **{warden.MARK: mark})
    parent.over("a")
    assert parent.jobs.held["a+"][warden.MARK]["tries"] == 1
    found = parent.fire(EventType.BEFORE_CHECK_CLIENT_RESOURCES, **{FLContextKey.JOB_META: parent.jobs.held["a"]})
    assert found.get_prop(FLContextKey.JOB_BLOCK_REASON) is None


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_copy_waits_for_all_sites_and_then_for_enough(parent: Parent) -> None:
    parent.keep(quorum=1)
    parent.jobs.add("a", "RUNNING")
    parent.fire(EventType.SYSTEM_START)
    meta = {**parent.jobs.held["a+"], "schedule_count": 7, "schedule_history": ["x"] * 50}

    def blocked() -> Any:
        found = parent.fire(EventType.BEFORE_CHECK_CLIENT_RESOURCES, **{FLContextKey.JOB_META: meta})
        return found.get_prop(FLContextKey.JOB_BLOCK_REASON)

    parent.heard = {"north": time.time(), "south": time.time() - 2 * warden.FRESH}
    assert blocked() == "waiting for south" and meta["schedule_count"] == 0 and len(meta["schedule_history"]) == 20
    parent.heard["south"] = time.time()
    assert blocked() is None
    del parent.heard["south"]
    meta[warden.MARK] = {**meta[warden.MARK], "since": time.time() - 2 * warden.GRACE}
    assert blocked() is None, "it has waited long enough, and one site suffices"
    meta[warden.MARK]["quorum"] = 2
    assert blocked() == "waiting for south"
    del meta[warden.MARK]
    assert blocked() is None, "a job that a person submitted is none of its business"


def test_a_copy_outlasts_flares_scheduler_while_no_site_is_here(parent: Parent) -> None:
    """FLARE's own scheduler: it gives up on a job after so many tries, and asks nobody where no site is here."""
    parent.keep(quorum=1)
    parent.jobs.add("a", "FINISHED:ABNORMAL", resource_spec={})
    parent.over("a")
    scheduler = DefaultJobScheduler(max_schedule_count=3, min_schedule_interval=0.0, max_schedule_interval=0.0)
    answers: dict[str, tuple[bool, str]] = {}
    asked: list[dict[str, Any]] = []

    def check(job: Any, resource_reqs: dict[str, Any], fl_ctx: Any) -> dict[str, tuple[bool, str]]:
        asked.append(resource_reqs)
        return {site: answers[site] for site in resource_reqs}

    scheduler._check_client_resources = check  # type: ignore[method-assign]

    def tried() -> Any:
        blocked: list[Any] = []
        with parent.new_context() as fl_ctx:
            job = parent.jobs.get_job("a+", fl_ctx)
            ready, sites = scheduler._do_schedule_job([job], fl_ctx, [], blocked)
        assert not blocked, "it is waited for, however long it takes"
        return sorted(sites) if ready is not None else None

    parent.heard = {"stranger": time.time()}
    assert [tried() for _ in range(9)] == [None] * 9 and not asked
    parent.jobs.held["a+"][warden.MARK]["since"] -= 2 * warden.GRACE
    assert [tried() for _ in range(9)] == [None] * 9 and not asked
    parent.heard, answers["south"] = {"south": time.time()}, (False, "")
    assert [tried() for _ in range(9)] == [None] * 9 and len(asked) == 9, "FLARE would start it with the server alone"
    answers["south"] = (True, "token")
    assert tried() == ["server", "south"]


def test_a_site_that_is_back_makes_a_pause_after_the_round(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "LOOK", 0.02)
    keep = parent.keep()
    parent.jobs.add("a", "SUBMITTED")
    parent.fire(EventType.SYSTEM_START)
    parent.started("a")
    parent.heard = {"north": time.time(), "south": time.time()}
    Sites(None, {"c": "south"}, standing=keep).lose("south", "it does not answer")  # type: ignore[arg-type]
    time.sleep(0.2)
    assert not (keep.folder / PAUSE).exists(), "it said nothing since"
    parent.heard["south"] = time.time() + 1
    until((keep.folder / PAUSE).exists)
    with pytest.raises(Paused, match="south came back"):
        keep.round()
    assert parent.stands().round == 1
    keep.end("waiting")
    parent.jobs.held["a"]["status"] = "FINISHED:EXECUTION_EXCEPTION"
    parent.over("a")
    assert parent.copies() == ["a+"]
    again = parent.keep("a+")
    again.round()
    assert again.now.round == 2 and not again.now.lost, "the next job begins with all, and counts on"


def test_another_job_of_the_name_is_asked_for_no_pause(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "LOOK", 0.02)
    keep = parent.keep("a")
    keep.lost("south")
    parent.heard = {"south": time.time() + 1}
    parent.jobs.add("b", "RUNNING")
    parent.jobs.held["b"]["status"] = "SUBMITTED"
    parent.fire(EventType.SYSTEM_START)
    parent.started("b")
    time.sleep(0.2)
    assert not (keep.folder / PAUSE).exists()


def test_a_site_that_is_lost_again_and_again_is_brought_back_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent process is here all the time, and its worker dies in every job."""
    clock, jobs = SimpleNamespace(now=1_000.0), list[float]()
    monkeypatch.setattr(standing, "time", SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now))
    monkeypatch.setattr(standing, "durable", SimpleNamespace(write=lambda file, data: file.write_bytes(data)))

    def play(rounds: int) -> None:
        keep = Keep(tmp_path, SITES, 1)
        jobs.append(clock.now)
        keep.lost("south")
        for _ in range(rounds):
            clock.now += 60.0
            keep.round()
            if keep.now.back({"north": clock.now, "south": clock.now}, clock.now):
                break
        keep.end("waiting")

    while clock.now < 1_000.0 + 12 * 3600:
        play(10_000)
    gaps = [later - sooner for sooner, later in itertools.pairwise(jobs)]
    assert gaps[:4] == [60.0, 60.0, 120.0, 240.0] and max(gaps) <= standing.MOST
    assert len(jobs) < 14, "and no new job for every one of 720 rounds"
    keep = Keep(tmp_path, SITES, 1)
    keep.lost("north")
    assert keep.now.back({"north": clock.now + 1}, clock.now) == ["north"], "the other site is none the worse for it"
    steady = Keep(tmp_path, SITES, 1)
    clock.now += standing.MOST + 1
    steady.round()
    assert not steady.now.waits, "it stayed"
    steady.end("failed")
    assert not Keep(tmp_path, SITES, 1).now.waits


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_run_its_copy(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are looked at, sites are watched, and the one is tried again."""
    monkeypatch.setattr(warden, "LOOK", 0.02)
    monkeypatch.setattr(warden, "RETRY", 0.1)
    parent.keep("a")
    parent.jobs.add("a", "RUNNING")
    parent.jobs.add("b", "DISPATCHED", "other")
    parent.jobs.full = 1
    parent.fire(EventType.SYSTEM_START)
    assert parent.copies() == ["b+"] and parent.jobs.held["a"]["status"] == "RUNNING", "it is found again"
    until(lambda: parent.copies() == ["b+", "a+"])
    until(lambda: parent.jobs.held["a"]["status"] == "FINISHED:ABNORMAL")


def test_a_job_that_has_no_copy_yet_is_found_at_the_next_start(parent: Parent) -> None:
    parent.keep("a")
    parent.jobs.add("older", "FINISHED:ABNORMAL")
    parent.jobs.add("a", "FINISHED:EXECUTION_EXCEPTION")
    parent.jobs.full = 1
    parent.over("a")
    assert parent.copies() == []
    parent.again()
    assert parent.copies() == ["a+"], "one that is over, and of which nothing is known, stays over"
    parent.again()
    parent.jobs.held["a"]["status"] = "RUNNING"  # it ended between the copy and the status
    parent.again()
    assert parent.copies() == ["a+"] and parent.jobs.held["a"]["status"] == "FINISHED:ABNORMAL"


def test_a_job_whose_run_a_person_submitted_again_meanwhile_has_no_copy(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warden, "LOOK", 0.02)
    monkeypatch.setattr(warden, "RETRY", 0.1)
    parent.fire(EventType.SYSTEM_START)
    parent.keep("a")
    parent.jobs.add("a", "FINISHED:ABNORMAL")
    parent.jobs.full = 10**6
    parent.over("a")
    parent.jobs.add("b", "RUNNING")
    parent.keep("b")
    parent.jobs.full = 0
    time.sleep(0.4)
    assert parent.copies() == [] and parent.stands().job == "b"
    parent.jobs.add("eves", "RUNNING", submitter_name="eve")
    parent.jobs.held["b"]["status"] = "FINISHED:ABNORMAL"
    parent.over("b")
    assert parent.copies() == ["b+"], "that somebody else has a job of this name is nothing to it"


def test_a_watch_that_fails_goes_on(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "LOOK", 0.02)
    failed: list[str] = []

    def full(folder: Path, why: str) -> None:
        if len(failed) < 3:
            failed.append(why)
            raise OSError(errno.ENOSPC, "no space")
        pause(folder, why)

    monkeypatch.setattr(warden, "pause", full)
    keep = parent.keep("a")
    parent.jobs.add("a", "SUBMITTED")
    parent.fire(EventType.SYSTEM_START)
    parent.started("a")
    keep.lost("south")
    parent.heard = {"south": time.time() + 1}
    until((keep.folder / PAUSE).exists)
    assert len(failed) == 3


def test_a_copy_that_a_person_stops_before_it_began_is_stopped(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLARE fires no event for it."""
    monkeypatch.setattr(warden, "LOOK", 0.02)
    parent.keep("a").end("waiting")
    parent.jobs.add("a", "FINISHED:ABNORMAL")
    parent.fire(EventType.SYSTEM_START)
    time.sleep(0.1)
    assert parent.copies() == ["a+"] and parent.stands().name == "waiting"
    parent.again()
    parent.jobs.held["a+"]["status"] = "FINISHED:ABORTED"
    until(lambda: parent.stands().name == "stopped")
    assert parent.copies() == ["a+"]


def test_a_site_that_says_no_is_not_waited_for(tmp_path: Path) -> None:
    keep = Keep(tmp_path, SITES, 1)
    sites = Sites(None, {"a": "north", "b": "south"}, standing=keep)  # type: ignore[arg-type]
    assert sites.lose("south", "its policy", returns=False) == "its policy" and not keep.now.lost
    assert sites.lose("south", "gone") == "its policy", "the first reason stays"
    sites.quorum = 2
    with pytest.raises(RunError, match="1 of 2 sites are left"):
        sites.enough()


def test_a_file_that_is_none_says_nothing(tmp_path: Path) -> None:
    assert Standing.read(tmp_path) is None
    for text in ("", "{", "[]", json.dumps({"x": 1})):
        (tmp_path / "standing.json").write_text(text)
        assert Standing.read(tmp_path) is None
    pause(tmp_path, "x")
    assert (tmp_path / PAUSE).read_text() == "x"

"""The warden: which runs go on by themselves, when, and with whom. FLARE's parent process is a stand-in here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus

from fedllm.core.errors import RunError
from fedllm.engine.nvflare import warden
from fedllm.engine.nvflare.engine import Sites
from fedllm.engine.nvflare.standing import PAUSE, Keep, Paused, Standing, pause

SITES = ["north", "south"]


class Jobs:
    """FLARE's job store, as far as the warden uses it."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}

    def add(self, job: str, status: str, run: str = "run", **more: Any) -> None:
        meta = {"name": run, "status": status, "deploy_map": {"app": ["server", *SITES]}, "min_clients": 2, **more}
        self.held[job] = {"job_id": job, "mandatory_clients": SITES, "submitter_name": "ada", **meta}

    def get_job(self, job: str, fl_ctx: Any) -> Any:
        return SimpleNamespace(job_id=job, meta=self.held[job])

    def get_jobs_by_status(self, status: list[RunStatus], fl_ctx: Any) -> list[Any]:
        wanted = {one.value for one in status}
        return [self.get_job(job, fl_ctx) for job, meta in self.held.items() if meta["status"] in wanted]

    def set_status(self, job: str, status: RunStatus, fl_ctx: Any) -> None:
        self.held[job]["status"] = status.value

    def clone(self, from_jid: str, meta: dict[str, Any], fl_ctx: Any) -> dict[str, Any]:
        name = f"{from_jid}+"
        assert "job_id" not in meta, "FLARE gives it an id of its own"
        self.held[name] = {**meta, "job_id": name, "status": RunStatus.SUBMITTED.value}
        return self.held[name]


class Parent:
    """FLARE's parent process at the server."""

    def __init__(self, kit: Path) -> None:
        self.jobs, self.kit, self.heard = Jobs(), kit, dict[str, float]()
        self.warden = warden.Warden()
        (kit / "local").mkdir(parents=True)
        (kit / "local" / "fedllm.json").write_text('{"device": "cpu"}')

    def get_component(self, name: str) -> Jobs:
        return self.jobs

    def get_workspace(self) -> Any:
        return SimpleNamespace(get_root_dir=lambda: str(self.kit))

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=name, last_connect_time=at) for name, at in self.heard.items()]

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        """What FLARE makes of a line in its log."""

    def fire(self, event: str, **props: Any) -> FLContext:
        fl_ctx = FLContext()
        fl_ctx.get_engine = lambda: self  # type: ignore[method-assign]
        for name, value in props.items():
            fl_ctx.set_prop(name, value, private=True, sticky=False)
        self.warden.handle_event(event, fl_ctx)
        return fl_ctx

    def over(self, job: str) -> None:
        self.fire(EventType.JOB_COMPLETED, **{FLContextKey.EVENT_DATA: {"job_id": job}})

    def keep(self, quorum: int = 1) -> Keep:
        return Keep(self.kit / "fedllm" / "runs" / "run", SITES, quorum)

    def copies(self) -> list[str]:
        return [job for job in self.jobs.held if job.endswith("+")]


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    found = Parent(tmp_path / "kit")
    yield found
    found.fire(EventType.SYSTEM_END)


def test_a_server_that_starts_again_goes_on_with_what_ran(parent: Parent) -> None:
    parent.keep().round()
    parent.jobs.add("a", "RUNNING")
    parent.jobs.add("b", "SUBMITTED", "other")
    parent.fire(EventType.SYSTEM_START)
    assert parent.jobs.held["a"]["status"] == "FINISHED:ABNORMAL" and parent.copies() == ["a+"]
    made = parent.jobs.held["a+"]
    assert made["min_clients"] == 1 and made["mandatory_clients"] == [] and made["submitter_name"] == "ada"
    assert made[warden.MARK]["round"] == 1 and made[warden.MARK]["quorum"] == 1


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
    stands = Standing.read(parent.kit / "fedllm" / "runs" / "run")
    assert stands is not None and stands.name == "failed" and "without a round" in str(stands.reason)
    parent.keep().round()
    parent.over(job)
    assert len(parent.copies()) == warden.TRIES + 1, "a round has ended: it counts anew"


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


def test_a_site_that_is_back_makes_a_pause_after_the_round(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "LOOK", 0.02)
    keep = parent.keep()
    parent.jobs.add("a", "SUBMITTED")
    parent.fire(EventType.SYSTEM_START)
    parent.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": "a"}})
    parent.heard = {"north": time.time(), "south": time.time()}
    Sites(None, {"c": "south"}, standing=keep).lose("south", "it does not answer")  # type: ignore[arg-type]
    time.sleep(0.2)
    assert not (keep.folder / PAUSE).exists(), "it said nothing since"
    parent.heard["south"] = time.time() + 1
    until = time.monotonic() + 5
    while not (keep.folder / PAUSE).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(Paused, match="south came back"):
        keep.round()
    assert Standing.read(keep.folder).round == 1  # type: ignore[union-attr]
    keep.end("waiting")
    parent.jobs.held["a"]["status"] = "FINISHED:EXECUTION_EXCEPTION"
    parent.over("a")
    assert parent.copies() == ["a+"]
    again = parent.keep()
    again.round()
    assert again.now.round == 2 and not again.now.lost, "the next job begins with all, and counts on"


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

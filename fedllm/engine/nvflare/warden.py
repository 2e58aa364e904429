"""Warden - goes on by itself with a run whose job FLARE lost, and brings back sites that were lost and are here again.

A component of FLARE's parent process at the server (see :func:`fedllm.engine.nvflare.kits.harden`). FLARE resumes
nothing: a job ends where the process of one participant ends, a site that comes back stays out of a job that runs, and
the jobs of a server that was killed count as running for ever. What may go on is submitted again as a copy of its own
job, with the coordinator's signatures as they are; every site checks them, and its policy, anew. What a person ended,
what failed for a reason of its own and what has reached its end is left alone.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey, RunStatus

from fedllm.core.errors import FedLLMError
from fedllm.engine.nvflare.facts import ServerFacts, read_facts
from fedllm.engine.nvflare.standing import PAUSE, Standing, pause

MARK = "fedllm"
"""In a copied job's meta data: since when it waits, and how often the run was begun again without a round."""
TRIES = 3
"""A run is begun again so many times in a row without a round that ends."""
GRACE = 60.0
"""Seconds for which a run that goes on waits for all its sites; then those that its quorum asks for suffice."""
FRESH = 30.0
"""A site that said nothing for so many seconds does not count as connected."""
LOOK = 2.0
"""Seconds between two looks at the runs that go on without a site."""
DROPPED = (
    "job_clients",
    "schedule_count",
    "last_schedule_time",
    "schedule_history",
    "job_deploy_detail",
    "job_id",
    "result_location",
)
"""Meta data of a job that says how it went, and is not copied."""
LEAVE = (RunStatus.FINISHED_COMPLETED.value, RunStatus.FINISHED_ABORTED.value, RunStatus.FINISHED_CANT_SCHEDULE.value)
"""How a job ended that nobody begins again: well, by a person, never."""
HISTORY = 20
"""Lines that FLARE's scheduler may note of a job that waits."""


class Warden(FLComponent):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[str, Path] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.fl_component.FLComponent`."""
        if event_type == EventType.SYSTEM_START:
            self._begin(fl_ctx)
        elif event_type == EventType.SYSTEM_END:
            self._over.set()
        elif event_type == EventType.BEFORE_CHECK_CLIENT_RESOURCES:
            self._hold(fl_ctx)
        elif event_type == EventType.JOB_STARTED:
            job = _manager(fl_ctx).get_job(_job_id(fl_ctx), fl_ctx)
            with self._lock:
                self._running[job.job_id] = self._folder(job, fl_ctx)
        elif event_type in (EventType.JOB_COMPLETED, EventType.JOB_ABORTED):
            with self._lock:
                self._running.pop(_job_id(fl_ctx), None)
            self._again(_job_id(fl_ctx), fl_ctx)

    def _begin(self, fl_ctx: FLContext) -> None:
        """The server starts: jobs that ran when it ended are over."""
        manager = _manager(fl_ctx)
        for job in manager.get_jobs_by_status([RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx):
            manager.set_status(job.job_id, RunStatus.FINISHED_ABNORMAL, fl_ctx)
            self._again(job.job_id, fl_ctx)
        engine: Any = fl_ctx.get_engine()
        threading.Thread(target=self._watch, args=(engine,), daemon=True).start()

    def _again(self, job_id: str, fl_ctx: FLContext) -> None:
        """Submit a job's run again, if it may go on by itself."""
        manager = _manager(fl_ctx)
        job = manager.get_job(job_id, fl_ctx)
        if job is None or job.meta.get(JobMetaKey.STATUS.value) in LEAVE:
            return
        folder = self._folder(job, fl_ctx)
        standing = Standing.read(folder)
        if standing is not None and standing.name == "finished":  # a site that is gone does not make it a failure
            manager.set_status(job_id, RunStatus.FINISHED_COMPLETED, fl_ctx)
        if standing is not None and standing.name in ("finished", "failed"):
            return
        rounds, quorum = (standing.round, standing.quorum) if standing else (0, len(_members(job.meta)))
        before = dict(job.meta.get(MARK) or {"round": 0, "tries": 0})
        tries = before["tries"] + 1 if before["round"] == rounds else 1
        if tries > TRIES:
            why = f"The run was begun {TRIES} times in a row without a round that ends."
            self.log_error(fl_ctx, f"{_name(job.meta)}: {why}")
            Standing("failed", _members(job.meta), quorum, {}, rounds, why).write(folder)
            return
        mark = {"since": time.time(), "round": rounds, "tries": tries, "quorum": quorum}
        meta = {key: value for key, value in job.meta.items() if key not in DROPPED}
        meta |= {MARK: mark, JobMetaKey.MIN_CLIENTS.value: 1, JobMetaKey.MANDATORY_CLIENTS.value: []}
        made = manager.clone(job_id, meta, fl_ctx)
        self.log_info(fl_ctx, f"The run {_name(job.meta)} goes on after {rounds} rounds as {made['job_id']}")

    def _hold(self, fl_ctx: FLContext) -> None:
        """A copied job starts when all its sites are here, or enough of them after a while."""
        meta: Any = fl_ctx.get_prop(FLContextKey.JOB_META)
        mark = (meta or {}).get(MARK)
        if not mark:
            return
        here, members = _here(fl_ctx.get_engine()), _members(meta)
        away = [site for site in members if time.time() - here.get(site, 0.0) > FRESH]
        late = time.time() - mark["since"] > GRACE
        if not away or (late and len(members) - len(away) >= mark["quorum"]):
            return
        # without this the scheduler gives up after a while, and notes every try
        meta[JobMetaKey.SCHEDULE_COUNT.value] = 0
        meta[JobMetaKey.SCHEDULE_HISTORY.value] = (meta.get(JobMetaKey.SCHEDULE_HISTORY.value) or [])[-HISTORY:]
        why = f"waiting for {', '.join(away)}"
        fl_ctx.set_prop(FLContextKey.JOB_BLOCK_REASON, why, private=True, sticky=False)

    def _watch(self, engine: Any) -> None:
        """Ask a run for a pause when a site that it lost is here again."""
        while not self._over.wait(LOOK):
            with self._lock:
                running = list(self._running.values())
            here = _here(engine)
            for folder in running:
                standing = Standing.read(folder)
                if standing is None or standing.name != "running" or (folder / PAUSE).exists():
                    continue
                back = [site for site, since in standing.lost.items() if here.get(site, 0.0) > since]
                if back:
                    pause(folder, f"{', '.join(sorted(back))} came back")

    def _folder(self, job: Any, fl_ctx: FLContext) -> Path:
        """The folder of a job's run."""
        engine: Any = fl_ctx.get_engine()
        kit = Path(engine.get_workspace().get_root_dir()).resolve()
        try:
            facts: ServerFacts = read_facts(ServerFacts, kit)
        except FedLLMError:
            facts = ServerFacts()  # a run that cannot read it says so itself
        return kit / facts.runs / _name(job.meta)


def _manager(fl_ctx: FLContext) -> Any:
    engine: Any = fl_ctx.get_engine()
    return engine.get_component(SystemComponents.JOB_MANAGER)


def _job_id(fl_ctx: FLContext) -> str:
    data: Any = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    return str(data[JobMetaKey.JOB_ID.value])


def _name(meta: Any) -> str:
    return str(meta.get(JobMetaKey.JOB_NAME.value))


def _members(meta: Any) -> list[str]:
    """The sites of a job."""
    return sorted({site for sites in meta.get("deploy_map", {}).values() for site in sites} - {"server"})


def _here(engine: Any) -> dict[str, float]:
    """Site -> when it said something last, seconds since 1970."""
    return {client.name: float(client.last_connect_time) for client in engine.get_clients()}

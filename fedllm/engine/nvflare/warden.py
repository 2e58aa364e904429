"""Warden - goes on by itself with a run whose job FLARE lost, and brings back sites that were lost and are here again.

A component of FLARE's parent process at the server (see :func:`fedllm.engine.nvflare.kits.harden`). FLARE resumes
nothing: a job ends where the process of one participant ends, a site that comes back stays out of a job that runs, and
the jobs of a server that was killed count as running for ever. What may go on is submitted again as a copy of its own
job, with the coordinator's signatures as they are; every site checks them, and its policy, anew. What a person ended,
what failed for a reason of its own and what has reached its end is left alone.

How a run stands counts only where the file says that it is about this very job: the name of a run is the submitter's
word. A name that cannot be a folder's is not one of ours.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey, RunStatus

from fedllm.core.errors import FedLLMError
from fedllm.engine.nvflare.facts import ServerFacts, read_facts
from fedllm.engine.nvflare.parts import NAME
from fedllm.engine.nvflare.standing import GOING, PAUSE, Standing, pause, refuse

MARK = "fedllm"
"""In a copied job's meta data: since when it waits, and how often the run was begun again without a round."""
NOTED = ("since", "round", "tries", "quorum")
"""The numbers that stand there."""
TRIES = 3
"""A run is begun again so many times in a row without a round that ends."""
GRACE = 60.0
"""Seconds for which a run that goes on waits for all its sites; then those that its quorum asks for suffice."""
FRESH = 30.0
"""A site that said nothing for so many seconds does not count as connected."""
LOOK = 2.0
"""Seconds between two looks at the runs that go on without a site."""
RETRY = 60.0
"""Seconds until a run is tried again that could not be submitted, as the disk was full."""
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
RAN = (RunStatus.RUNNING, RunStatus.DISPATCHED)
"""Status of a job that runs; where the server has only just started, it ran."""
BROKEN = (RunStatus.FINISHED_ABNORMAL, RunStatus.FINISHED_EXECUTION_EXCEPTION, RunStatus.FAILED_TO_RUN)
"""How a job ended whose run may go on."""
LEAVE = (RunStatus.FINISHED_COMPLETED.value, RunStatus.FINISHED_ABORTED.value, RunStatus.FINISHED_CANT_SCHEDULE.value)
"""How a job ended that nobody begins again: well, by a person, never."""
HISTORY = 20
"""Lines that FLARE's scheduler may note of a job that waits."""


class Warden(FLComponent):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._running: dict[str, Path] = {}
        self._owed: dict[str, float] = {}
        self._copies: set[str] = set()
        self._lock, self._over = threading.Lock(), threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.fl_component.FLComponent`."""
        if event_type == EventType.SYSTEM_START:
            self._begin(fl_ctx)
        elif event_type == EventType.SYSTEM_END:
            self._over.set()
        elif event_type == EventType.BEFORE_CHECK_CLIENT_RESOURCES:
            self._hold(fl_ctx)
        elif event_type == EventType.AFTER_CHECK_CLIENT_RESOURCES:
            _nobody(fl_ctx)
        elif event_type == EventType.JOB_STARTED:
            job = _manager(fl_ctx).get_job(_job_id(fl_ctx), fl_ctx)
            folder = _folder(job.meta, fl_ctx)
            with self._lock:
                self._copies.discard(job.job_id)
                if folder is not None:
                    self._running[job.job_id] = folder
        elif event_type in (EventType.JOB_COMPLETED, EventType.JOB_ABORTED):
            with self._lock:
                self._running.pop(_job_id(fl_ctx), None)
            self._settle(_job_id(fl_ctx), fl_ctx)

    def _begin(self, fl_ctx: FLContext) -> None:
        """The server starts: jobs that ran when it ended are over, and some that were over had no copy yet."""
        engine: Any = fl_ctx.get_engine()
        threading.Thread(target=self._watch, args=(engine,), daemon=True).start()
        manager = _manager(fl_ctx)
        for job in manager.get_jobs_by_status([*RAN], fl_ctx):
            self._settle(job.job_id, fl_ctx)
        for job in manager.get_jobs_by_status([*BROKEN], fl_ctx):
            standing = _standing(job, fl_ctx)
            if standing is not None and standing.name in GOING:
                self._settle(job.job_id, fl_ctx)
        with self._lock:
            waiting = manager.get_jobs_by_status([RunStatus.SUBMITTED], fl_ctx)
            self._copies |= {job.job_id for job in waiting if _mark(job.meta)}

    def _settle(self, job_id: str, fl_ctx: FLContext) -> None:
        """Go on with the run of a job that is over, if it may; where that fails it is tried again after a while."""
        try:
            self._again(job_id, fl_ctx)
        except Exception:  # a full disk, FLARE's store: other jobs are none the worse for it
            self.log_exception(fl_ctx, f"The run of job {job_id} cannot be gone on with now; it is tried again")
            with self._lock:
                self._owed[job_id] = time.monotonic() + RETRY
            return
        with self._lock:
            self._owed.pop(job_id, None)

    def _again(self, job_id: str, fl_ctx: FLContext) -> None:
        """Submit a job's run again, if it may go on by itself."""
        manager = _manager(fl_ctx)
        job: Any = manager.get_job(job_id, fl_ctx)
        folder = None if job is None else _folder(job.meta, fl_ctx)
        if job is None or folder is None:
            return
        status, standing = job.meta.get(JobMetaKey.STATUS.value), _standing(job, fl_ctx)
        if status == RunStatus.FINISHED_ABORTED.value and standing is not None and standing.name in GOING:
            replace(standing, name="stopped", reason="It was stopped.").write(folder)
        if status in LEAVE:
            return
        if standing is not None and standing.name == "finished":  # a site that is gone does not make it a failure
            manager.set_status(job_id, RunStatus.FINISHED_COMPLETED, fl_ctx)
            return
        if (standing is None or standing.name in GOING) and not _heir(job, fl_ctx):
            self._copy(job, standing, folder, fl_ctx)
        if status in {one.value for one in RAN}:  # last: a job that has no copy yet is found again by its status
            manager.set_status(job_id, RunStatus.FINISHED_ABNORMAL, fl_ctx)

    def _copy(self, job: Any, standing: Standing | None, folder: Path, fl_ctx: FLContext) -> None:
        """Submit a copy, or give up."""
        members = _members(job.meta)
        before = _mark(job.meta) or {"round": 0, "tries": 0, "quorum": len(members)}
        rounds, quorum = (standing.round, standing.quorum) if standing else (before["round"], before["quorum"])
        tries = max(before["tries"], 0) + 1 if before["round"] == rounds else 1
        if tries > TRIES:
            why = f"The run was begun {TRIES} times in a row without a round that ends."
            self.log_error(fl_ctx, f"{folder.name}: {why}")
            refuse(_kit(fl_ctx), folder, job.job_id, why)
            return
        mark = {"since": time.time(), "round": rounds, "tries": tries, "quorum": quorum}
        meta = {key: value for key, value in job.meta.items() if key not in DROPPED}
        # no site is demanded of FLARE's scheduler, which would give up where none is here: _hold waits instead
        meta |= {MARK: mark, JobMetaKey.MIN_CLIENTS.value: 0, JobMetaKey.MANDATORY_CLIENTS.value: []}
        made = str(_manager(fl_ctx).clone(job.job_id, meta, fl_ctx)["job_id"])
        self.log_info(fl_ctx, f"The run {folder.name} goes on after {rounds} rounds as {made}")
        with self._lock:
            self._copies.add(made)
        if standing is not None:
            self._tried(lambda: replace(standing, name="waiting", job=made).write(folder))

    def _hold(self, fl_ctx: FLContext) -> None:
        """A copied job starts when all its sites are here, or enough of them after a while."""
        meta: Any = fl_ctx.get_prop(FLContextKey.JOB_META)
        mark = _mark(meta)
        if not mark:
            return
        # without this the scheduler gives up after a while, and notes every try
        meta[JobMetaKey.SCHEDULE_COUNT.value] = 0
        meta[JobMetaKey.SCHEDULE_HISTORY.value] = (meta.get(JobMetaKey.SCHEDULE_HISTORY.value) or [])[-HISTORY:]
        here, members = _here(fl_ctx.get_engine()), _members(meta)
        away = [site for site in members if time.time() - here.get(site, 0.0) > FRESH]
        late = time.time() - mark["since"] > GRACE
        if away and not (late and len(members) - len(away) >= mark["quorum"]):
            why = f"waiting for {', '.join(away)}"
            fl_ctx.set_prop(FLContextKey.JOB_BLOCK_REASON, why, private=True, sticky=False)

    def _watch(self, engine: Any) -> None:
        """Look after the runs, until the server ends."""
        while not self._over.wait(LOOK):
            self._tried(partial(self._look, engine))

    def _look(self, engine: Any) -> None:
        """Bring back sites, try again what could not be submitted, and find copies that a person stopped."""
        with self._lock:
            running, copies = dict(self._running), set(self._copies)
            owed = [job_id for job_id, when in self._owed.items() if time.monotonic() > when]
        here = _here(engine)
        for job_id, folder in running.items():
            self._tried(partial(_call, job_id, folder, here))
        if not owed and not copies:
            return
        with engine.new_context() as fl_ctx:
            for job_id in owed:
                self._settle(job_id, fl_ctx)
            for job_id in copies:
                self._tried(partial(self._stopped, job_id, fl_ctx))

    def _stopped(self, job_id: str, fl_ctx: FLContext) -> None:
        """FLARE tells nobody that a job was ended which had not begun."""
        job = _manager(fl_ctx).get_job(job_id, fl_ctx)
        status = job.meta.get(JobMetaKey.STATUS.value) if job is not None else None
        if status == RunStatus.SUBMITTED.value:
            return
        if status == RunStatus.FINISHED_ABORTED.value:
            self._again(job_id, fl_ctx)
        with self._lock:
            self._copies.discard(job_id)

    def _tried(self, act: Callable[[], object]) -> None:
        """Do something whose failure must not end more than itself."""
        try:
            act()
        except Exception:
            self.logger.exception("The warden cannot look after a run now; it tries again")


def _call(job_id: str, folder: Path, here: Mapping[str, float]) -> None:
    """Ask a run for a pause when a site that it lost is here again."""
    standing = Standing.read(folder)
    if standing is None or standing.job != job_id or standing.name != "running" or (folder / PAUSE).exists():
        return
    back = standing.back(here, time.time())
    if back:
        pause(folder, f"{', '.join(back)} came back")


def _nobody(fl_ctx: FLContext) -> None:
    """A copied job does not start where not one of its sites has room for it: FLARE would start it without any."""
    found: Any = fl_ctx.get_prop(FLContextKey.RESOURCE_CHECK_RESULT)
    if found and _mark(fl_ctx.get_prop(FLContextKey.JOB_META)) and not any(enough for enough, _ in found.values()):
        found.clear()  # the scheduler takes it for no answer, and tries again


def _kit(fl_ctx: FLContext) -> Path:
    engine: Any = fl_ctx.get_engine()
    return Path(engine.get_workspace().get_root_dir()).resolve()


def _folder(meta: Mapping[str, Any], fl_ctx: FLContext) -> Path | None:
    """The folder of a job's run; None where its name cannot be that of a run."""
    name = meta.get(JobMetaKey.JOB_NAME.value)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    kit = _kit(fl_ctx)
    try:
        facts: ServerFacts = read_facts(ServerFacts, kit)
    except FedLLMError:
        facts = ServerFacts()  # a run that cannot read it says so itself
    return kit / facts.runs / name


def _standing(job: Any, fl_ctx: FLContext) -> Standing | None:
    """How a job stands; None where nothing is known of this very job."""
    folder = _folder(job.meta, fl_ctx)
    return None if folder is None else Standing.of_job(_kit(fl_ctx), folder, job.job_id)


def _manager(fl_ctx: FLContext) -> Any:
    engine: Any = fl_ctx.get_engine()
    return engine.get_component(SystemComponents.JOB_MANAGER)


def _job_id(fl_ctx: FLContext) -> str:
    data: Any = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    return str(data[JobMetaKey.JOB_ID.value])


def _mark(meta: Any) -> dict[str, Any]:
    """What the warden noted in a job that it submitted; nothing in one that a person did."""
    found: Any = meta.get(MARK) if meta else None
    whole = isinstance(found, dict) and all(type(found.get(name)) in (int, float) for name in NOTED)
    return found if whole else {}


def _heir(job: Any, fl_ctx: FLContext) -> bool:
    """Whether a later job of the same submitter plays the run: a copy, or one that a person submitted meanwhile."""
    name, by, at = (key.value for key in (JobMetaKey.JOB_NAME, JobMetaKey.SUBMITTER_NAME, JobMetaKey.SUBMIT_TIME))
    own = job.meta
    return any(
        (one.meta.get(name), one.meta.get(by)) == (own.get(name), own.get(by))
        and one.meta.get(at, 0.0) > own.get(at, 0.0)
        for one in _manager(fl_ctx).get_jobs_by_status([*RunStatus], fl_ctx)
    )


def _members(meta: Any) -> list[str]:
    """The sites of a job."""
    return sorted({site for sites in meta.get("deploy_map", {}).values() for site in sites} - {"server"})


def _here(engine: Any) -> dict[str, float]:
    """Site -> when it said something last, seconds since 1970."""
    return {client.name: float(client.last_connect_time) for client in engine.get_clients()}

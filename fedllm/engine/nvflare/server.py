"""Server - the controller inside FLARE's server process: it plays the program and carries its letters as tasks."""

# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import base64
import contextlib
import json
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.widgets.info_collector import InfoCollector

from fedllm.core.errors import ConfigError, DecodeError, FedLLMError, RunError
from fedllm.engine.nvflare import pieces
from fedllm.engine.nvflare.engine import Done
from fedllm.engine.nvflare.facts import ServerFacts, read_facts
from fedllm.engine.nvflare.parts import Letter, from_shareable, to_shareable
from fedllm.engine.nvflare.program import Job, play
from fedllm.engine.nvflare.site import ALIVE, TASK
from fedllm.engine.nvflare.standing import refuse
from fedllm.sites.audit import AuditLocked

RESULTS = (
    "result.json",
    "metrics.jsonl",
    "report.html",
    "recipe.yaml",
    "environment.json",
    "partition.json",
    "sites.json",
    "manifest.json",
    "audit.json",
    "standing.json",
    "adapter",
)
"""What of a run's folder is also put into FLARE's, from where the one who submitted the job can fetch it."""
TOLD = ("model", "round", "used", "loss", "lost", "rejected", "failed", "bytes_up", "bytes_down", "seconds", "guard")
"""What of a round is told to a coordinator who asks while the run is under way."""
TOLD_ROUNDS = 500
"""Rounds that are told at most, the newest."""
FETCHED = "fedllm"
"""The folder of it there."""
DEADLINE = 30 * 24 * 3600
"""Seconds a task may last; the program has its own deadlines, which are not whole seconds."""
PING = 5.0
"""Seconds a site is given to say that it is there."""


class FedllmController(Controller):
    """Plays a run across the sites of a job.

    Args:
        config: what :func:`fedllm.engine.nvflare.job.pack` made of the run.
    """

    def __init__(self, config: str) -> None:
        super().__init__()
        pieces.register()
        self.config = config
        self._folder: Path | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Tell the rounds that are over to a coordinator who asks; the rest is FLARE's."""
        super().handle_event(event_type, fl_ctx)
        if event_type == InfoCollector.EVENT_TYPE_GET_STATS and self._folder is not None:
            collector: Any = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
            collector.add_info("fedllm", {"rounds": _rounds(self._folder)})

    def start_controller(self, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.impl.controller.Controller`."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Play the run; a failure ends the job with its reason, which is also in the run's results.

        A job that has not shown that the run is its own is given the reason, and nothing of the run.
        """
        engine: Any = fl_ctx.get_engine()
        workspace, job_id = engine.get_workspace(), str(fl_ctx.get_job_id())
        kit = Path(workspace.get_root_dir()).resolve()
        results = Path(workspace.get_run_dir(job_id)) / FETCHED
        results.mkdir(parents=True, exist_ok=True)
        named: Path | None = None
        told: Path | None = None
        try:
            facts: ServerFacts = read_facts(ServerFacts, kit)
            job = replace(Job.of(unpack(self.config)), id=job_id)
            _same_name(job, Path(workspace.get_job_meta_path(job_id)))
            named = kit / facts.runs / job.run
            post = FlarePost(self, fl_ctx, abort_signal)
            play(job, post, facts, kit, lambda kind: self._watch(kind, fl_ctx), self._own)
        except Exception as fault:
            if not isinstance(fault, FedLLMError):
                traceback.print_exc()
            reason = str(fault) if isinstance(fault, FedLLMError) else f"{type(fault).__name__}: {fault}"
            with contextlib.suppress(OSError):  # the job ends with its reason, also where the disk is full
                (results / "error.txt").write_text(reason + "\n", encoding="utf-8")
                if self._folder is None and isinstance(fault, FedLLMError) and not isinstance(fault, AuditLocked):
                    told = refuse(kit, named, job_id, reason)
            self.system_panic(reason, fl_ctx)
        finally:
            if (source := self._folder or told) is not None:
                _copy(source, results)

    def _own(self, folder: Path) -> None:
        """The job has shown that the run is its own."""
        self._folder = folder

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.impl.controller.Controller`."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A late answer to a letter that was taken back."""

    def _watch(self, kind: Any, fl_ctx: FLContext) -> Any:
        """What is told of a run's progress goes into the job's log."""
        controller = self

        class Told(kind):
            def round(self, name: str, record: Any, values: Any) -> None:
                controller.log_info(fl_ctx, f"{name}: round {record.round} is over, {record.used} uploads used")

        return Told()


class FlarePost:
    """Carries letters as FLARE tasks; see :class:`fedllm.engine.nvflare.engine.Post`."""

    def __init__(self, controller: FedllmController, fl_ctx: FLContext, abort_signal: Signal) -> None:
        self.controller, self.fl_ctx, self.abort_signal = controller, fl_ctx, abort_signal

    def send(self, site: str, letter: Letter, done: Done) -> Callable[[], None]:
        """See :class:`fedllm.engine.nvflare.engine.Post`."""
        once = _Once(done)

        def received(client_task: Any, fl_ctx: FLContext) -> None:
            client_task.task.data = Shareable()  # FLARE keeps the task for a while: not what was sent, nor what came
            once(_answer(client_task.result))
            client_task.result = Shareable()

        def ended(task: Task, fl_ctx: FLContext) -> None:
            once(f"the site {site} gave no answer ({task.completion_status})")

        data = to_shareable(letter)
        task = Task(TASK, data, timeout=DEADLINE, result_received_cb=received, task_done_cb=ended)
        # not broadcast(): it makes a deep copy of what is sent
        self.controller.send(task, self.fl_ctx, targets=[site])

        def take_back() -> None:
            if not once.called:
                once.called = True
                self.controller.cancel_task(task, fl_ctx=self.fl_ctx)

        return take_back

    def alive(self, site: str) -> bool:
        """See :class:`fedllm.engine.nvflare.engine.Post`."""
        engine: Any = self.fl_ctx.get_engine()
        answers = engine.send_aux_request([site], ALIVE, Shareable(), PING, self.fl_ctx, optional=True)
        answer = (answers or {}).get(site)
        return isinstance(answer, Shareable) and answer.get_return_code() == ReturnCode.OK

    def over(self) -> str | None:
        """See :class:`fedllm.engine.nvflare.engine.Post`."""
        return "the job was aborted" if self.abort_signal.triggered else None


class _Once:
    """Passes on the first answer alone."""

    def __init__(self, done: Done) -> None:
        self.done, self.called, self._lock = done, False, threading.Lock()

    def __call__(self, answer: Letter | str) -> None:
        with self._lock:
            first, self.called = not self.called, True
        if first:
            self.done(answer)


def _answer(result: Any) -> Letter | str:
    """A site's letter, or why there is none."""
    if not isinstance(result, Shareable):
        return f"the site's answer is a {type(result).__name__}"
    code = result.get_return_code()
    if code != ReturnCode.OK:
        return f"the site answered {code}"
    try:
        return from_shareable(result)
    except DecodeError as fault:
        return str(fault)


def _same_name(job: Job, file: Path) -> None:
    """Raise :class:`ConfigError` for a job under another name than its run's: FLARE and the warden know it by that."""
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get(JobMetaKey.JOB_NAME.value)
    except (OSError, ValueError) as fault:
        raise RunError(f"The meta data of the job cannot be read: {type(fault).__name__}.") from fault
    if name != job.run:
        raise ConfigError(
            f"The job is named '{name}', and its run '{job.run}'.",
            "A job has the name of its run.",
            action="Submit it with 'fedllm deploy run'.",
        )


def unpack(config: str) -> dict[str, Any]:
    """A job's configuration; raises :class:`ConfigError` where it is none."""
    try:
        found = json.loads(base64.b64decode(config, validate=True))
    except ValueError as fault:
        raise ConfigError(f"The configuration of the job cannot be read: {fault}.") from fault
    if not isinstance(found, dict):
        raise ConfigError(f"The configuration of the job is a {type(found).__name__}.", "Allowed: a mapping.")
    return found


def _rounds(folder: Path) -> list[dict[str, Any]]:
    """The last rounds in a run's folder; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            one = json.loads(line)
            if one.get("event") == "round":
                found.append({name: one.get(name) for name in TOLD})
    return found[-TOLD_ROUNDS:]


def _copy(folder: Path, results: Path) -> None:
    for name in RESULTS:
        source = folder / name
        if source.is_dir():
            shutil.copytree(source, results / name, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy2(source, results / name)

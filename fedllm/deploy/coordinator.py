"""Coordinator - a connection with a coordinator's kit, the runs it started, and what is known of their rounds.

What was submitted lies in the kit, in `fedllm/runs/RUN.json`, so that a run can be stopped, fetched, or submitted again
under its own name, by which the server finds its last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import ConfigError, DecodeError, FedLLMError, RunError
from fedllm.deploy.kit import Kit
from fedllm.engine import durable
from fedllm.engine.nvflare import session as sessions
from fedllm.engine.nvflare.parts import NAME, RESERVED
from fedllm.engine.nvflare.standing import Standing

if TYPE_CHECKING:
    from fedllm.recipe import Recipe

RUNS, RESULTS = "fedllm/runs", "fedllm/results"
"""Folders in a coordinator's kit: what was submitted, and what was fetched."""
CONNECT, PATIENCE = 5.0, 20.0
"""Seconds in which the server's port has to answer, and the server behind it."""
AGAIN = 20.0
"""Seconds in which the server goes on with a run that it lost, where it does."""
ELSEWHERE: Mapping[str, Any] = {"name": None, "partition": {"by": "iid", "clients": 1}}
"""The section `data` of a signed recipe: rows are not named."""
TOLD = ("model", "round", "used", "loss", "lost", "rejected", "failed", "bytes_up", "bytes_down", "seconds")
"""What is shown of a round."""


@dataclass(frozen=True)
class Record:
    """A run that was submitted with this kit.

    Attributes:
        run: its id.
        recipe: resolved.
        sites: who takes part.
        purpose: what it is for.
        data_sets: which data sets it uses at the sites.
        quorum: sites without which a round does not count; None: the default.
        jobs: FLARE's ids, the newest last; one more each time it is submitted again.
        submitted: when it was last, UTC, ISO 8601.
    """

    run: str
    recipe: dict[str, Any]
    sites: list[str]
    purpose: str
    data_sets: list[str]
    quorum: int | None = None
    jobs: list[str] = field(default_factory=list)
    submitted: str = ""

    def submit(self, kit: Kit, admin: sessions.Session) -> Record:
        """Submit it (again) and keep it.

        It is written down before: a run whose job is on its way when this process ends can be stopped and looked at.

        Raises:
            ManifestError: it cannot be signed.
            RunError: the server does not take it.
        """
        place = kit.folder / RUNS / f"{self.run}.json"
        new = not place.is_file()
        self._keep(place)
        try:
            with translated():
                job = admin.submit(
                    self.run,
                    self.recipe,
                    self.sites,
                    purpose=self.purpose,
                    data_sets=tuple(self.data_sets),
                    quorum=self.quorum,
                    kit=kit.folder,
                )
        except (ConfigError, DecodeError):  # it was not signed, so nothing was sent
            if new:
                place.unlink()
            raise
        return replace(self, jobs=[*self.jobs, job])._keep(place)

    def _keep(self, place: Path) -> Record:
        """Write it down as submitted now."""
        found = replace(self, submitted=datetime.now(UTC).isoformat(timespec="seconds"))
        durable.write(place, (json.dumps(asdict(found), indent=1) + "\n").encode(), durable.OWN)
        return found


def across(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it is signed, in JSON values: without what lies on this machine.

    Each site has its own section `data`, and the server its own folder of runs.
    """
    from fedllm.data.settings import DataSettings

    runs = type(recipe).model_fields["runs"].default
    there = recipe.model_copy(update={"data": DataSettings.model_validate(ELSEWHERE), "runs": runs})
    return there.model_dump(mode="json")


def records(kit: Kit) -> dict[str, Record]:
    """All runs of the kit by id, the oldest first; raises :class:`RunError` for a file that is damaged."""
    found = []
    for file in (kit.folder / RUNS).glob("*.json"):
        try:
            found.append(Record(**json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as fault:
            raise RunError(
                f"{file} cannot be read: {fault}.", action="Remove it; the run itself is at the server."
            ) from None
    return {one.run: one for one in sorted(found, key=lambda one: one.submitted)}


def record(kit: Kit, run: str) -> Record:
    """A run of the kit; raises :class:`ConfigError` with the nearest where there is none."""
    known = records(kit)
    if run not in known:
        raise ConfigError.unknown("run of this kit", run, known, "See them with: fedllm deploy status --kit KIT")
    return known[run]


def free_name(kit: Kit, wanted: str | None, recipe: str) -> str:
    """The id of a new run; raises :class:`ConfigError` for one that is taken or cannot be a folder's name."""
    if wanted is None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe).strip("-._") or "run"
        return f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not NAME.fullmatch(wanted):
        raise ConfigError(f"'{wanted}' is no id of a run.", "Allowed: letters, digits, '.', '_' and '-'.")
    if RESERVED.fullmatch(wanted):
        raise ConfigError(
            f"No run can have the id '{wanted}'.", "Sites keep something else under it.", None, "Choose another."
        )
    if wanted in records(kit):
        raise ConfigError(
            f"There is a run '{wanted}' already.",
            action=f"Choose another id, or go on with it: fedllm deploy resume {wanted} --kit {kit.folder}",
        )
    return wanted


@contextlib.contextmanager
def connected(kit: Kit) -> Generator[sessions.Session]:
    """A connection to the server; FLARE's faults inside become :class:`RunError`.

    Raises:
        RunError: the server does not answer, or does not take the kit's certificate.
    """
    try:
        socket.create_connection((kit.host, kit.port), CONNECT).close()
    except OSError as fault:
        raise RunError(
            f"{kit.address} does not answer: {str(fault.strerror or fault).rstrip('.')}.",
            action="Is the server started, does its name resolve here, and does the firewall let this port out?",
        ) from None
    with translated(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # FLARE's words about a connection that is lost; it is told as an error
        with quiet():
            admin = stack.enter_context(sessions.session(kit.name, kit.folder, PATIENCE))
        yield admin


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep FLARE's own words off the standard output, on which one JSON document may be awaited."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def translated() -> Generator[None]:
    """Turn FLARE's exceptions into :class:`RunError`; others pass."""
    try:
        yield
    except FedLLMError:
        raise
    except Exception as fault:
        if not type(fault).__module__.startswith("nvflare."):
            raise
        name, text = type(fault).__name__, " ".join(str(fault).split()).rstrip(".")
        if name == "AuthorizationError":
            raise RunError(
                f"Your role does not allow it: {text}.", action="Ask a project_admin of the network."
            ) from None
        if name in ("NoConnection", "SessionClosed", "SessionExpired"):
            raise RunError(
                f"The server is gone: {text}.", action="When it is there again: fedllm deploy status"
            ) from None
        raise RunError(f"The server refuses: {name}: {text}.") from None


def jobs(admin: sessions.Session) -> list[dict[str, Any]]:
    """What the server knows of all jobs: run, job, status, submitted, duration; the newest first."""
    found = [dict(one) for one in admin.inner.list_jobs()]
    rows = [
        {
            "run": str(one.get("job_name", "")),
            "job": str(one.get("job_id", "")),
            "status": str(one.get("status", "")),
            "submitted": one.get("submit_time"),
            "duration": one.get("duration"),
        }
        for one in found
    ]
    return sorted(rows, key=lambda one: str(one["submitted"]), reverse=True)


def known(admin: sessions.Session, run: Record) -> str | None:
    """FLARE's id of the job that plays a run, or did last: the server submits a run that it lost again by itself.

    None where the server has none, as this process ended before the first was there.
    """
    return admin.newest(run.run) or (run.jobs[-1] if run.jobs else None)


def newest(admin: sessions.Session, run: Record) -> str:
    """As :func:`known`; raises :class:`RunError` where there is none."""
    found = known(admin, run)
    if found is None:
        raise RunError(
            f"The run '{run.run}' did not reach the server.",
            action=f"Submit it: fedllm deploy resume {run.run} --kit KIT",
        )
    return found


def goes_on(admin: sessions.Session, run: Record, job: str, patience: float = AGAIN) -> bool:
    """Whether the server goes on by itself with a run whose job ended badly; takes a while where it does not say."""
    with tempfile.TemporaryDirectory(prefix="fedllm-fetch-") as place, contextlib.suppress(Exception):
        standing = Standing.read(admin.fetch(job, Path(place)))
        if standing is not None and standing.name == "failed":
            return False
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if newest(admin, run) != job or admin.status(job) == sessions.GOOD:
            return True
        time.sleep(1.0)
    return False


def live_rounds(admin: sessions.Session, job: str) -> list[dict[str, Any]]:
    """Rounds that are over of a job that runs, as its server tells them; none where it does not run (yet, any more)."""
    try:
        stats = admin.inner.show_stats(job, "server")
    except Exception as fault:
        if type(fault).__name__ in ("JobNotRunning", "JobNotFound"):
            return []
        raise
    told = (stats.get("server") or {}).get("fedllm") or {}
    return _newest(told.get("rounds") or [])


def kept_rounds(folder: Path) -> list[dict[str, Any]]:
    """Rounds in a fetched run's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    events = [json.loads(line) for line in lines]
    return _newest([{name: one.get(name) for name in TOLD} for one in events if one.get("event") == "round"])


def _newest(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each round once: one that a resumed run played again counts as it was played last."""
    return list({(one["model"], one["round"]): one for one in rounds}.values())


def reason(folder: Path) -> str | None:
    """Why a fetched run failed; None where it did not."""
    file = folder / "error.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def fetch(admin: sessions.Session, run: Record, into: Path) -> Path:
    """Fetch what the newest job of a run left into a new folder; returns it.

    Raises:
        RunError: the folder is taken, or nothing is there yet.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise RunError(
            f"{into} exists already.", "The folder must be new or empty.", action="Choose another: --folder."
        )
    into.parent.mkdir(parents=True, exist_ok=True)
    with translated(), quiet(), tempfile.TemporaryDirectory(prefix=".fetch-", dir=into.parent) as place:
        found = admin.fetch(newest(admin, run), Path(place))
        if into.exists():
            into.rmdir()
        shutil.move(found, into)
    return into


def lines(rounds: list[dict[str, Any]]) -> Iterator[str]:
    """Rounds as lines of text."""
    for one in rounds:
        loss = f", loss {one['loss']:.3f}" if one.get("loss") is not None else ""
        what = f"{one['model']}: round {one['round']}{loss}, {one['used']} uploads used"
        for word in ("lost", "rejected"):
            for entry in one.get(word) or ():
                what += f"; {word} {entry['client']}: {entry['reason'].rstrip('.')}"
        yield what + (f"; changed nothing: {one['failed'].rstrip('.')}" if one.get("failed") else "")

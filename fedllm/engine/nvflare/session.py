"""Session - start participants' processes, submit a run, look at it, end it, fetch what it found."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedllm.core.errors import ConfigError, MissingExtra, RunError
from fedllm.engine.nvflare import job as jobs
from fedllm.engine.nvflare import trust

ENDED = "FINISHED"
"""How the status of a job that is over begins."""
GOOD = "FINISHED:COMPLETED"
"""The status of a job that went well."""
PATIENCE = 60.0
"""Seconds in which the server has to be reached, and all sites with it."""
ENVIRONMENT = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "20"}
"""Seconds that FLARE's server waits, where a job has ended, for what became of it at a site that is gone."""
MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30)}
"""Has the C library keep up to 2 GiB that a large letter took, for the next: to get fresh memory of the system takes
longer than to copy the letter. What a person set is left as it is; without effect outside of glibc."""
LEFT = 10.0
"""Seconds a process is given to end by itself."""


@dataclass
class Participant:
    """A running server or site: FLARE's parent process, which starts one process for each job."""

    name: str
    kit: Path
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        """Whether the parent process runs."""
        return self.process.poll() is None

    def stop(self, kill: bool = False) -> None:
        """End the parent and all that it started; FLARE puts jobs into process groups of their own."""
        family = _family(self.process.pid)
        if not kill:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LEFT)
        for one in [*family, *_family(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, where it still runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def start(name: str, kit: Path) -> Participant:
    """Start a server's or site's process; what it prints goes to `log.txt` and `error.txt` in its kit."""
    script = kit / "startup" / "sub_start.sh"
    if not script.is_file():
        raise ConfigError(f"{kit} is no kit of a server or a site.", f"It has no {script.name}.")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with (kit / "start.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(script), "--once"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**MEMORY, **os.environ, "PATH": path, **ENVIRONMENT},
            start_new_session=True,
        )
    return Participant(name, kit, process)


@contextlib.contextmanager
def session(admin: str, kit: Path, patience: float = PATIENCE) -> Generator[Session]:
    """A connection of an administrator; raises :class:`RunError` where the server cannot be reached."""
    try:
        from nvflare.fuel.flare_api.flare_api import new_secure_session
    except ImportError:
        raise MissingExtra("nvflare", "nvflare", "A run across sites") from None
    until = time.monotonic() + patience
    while True:
        try:
            inner = new_secure_session(admin, startup_kit_location=str(kit), timeout=10.0)
            break
        except Exception as fault:  # FLARE raises many kinds here, while the server is not there yet
            if time.monotonic() > until:
                raise RunError(
                    f"The server cannot be reached: {type(fault).__name__}: {fault}.",
                    action="Start the server, and see that its host name and port can be reached from here.",
                ) from fault
            time.sleep(1.0)
    try:
        yield Session(inner, kit)
    finally:
        inner.close()  # without this the process hangs for ever


class Session:
    """What an administrator can do.

    Args:
        inner: FLARE's session.
        kit: the administrator's folder.
    """

    def __init__(self, inner: Any, kit: Path) -> None:
        self.inner, self.kit = inner, kit

    def sites(self) -> list[str]:
        """The sites that are connected now."""
        return sorted(client.name for client in self.inner.get_connected_client_list())

    def wait_for(self, sites: Sequence[str], patience: float = PATIENCE) -> None:
        """Wait until these sites are connected; raises :class:`RunError` naming those that are not."""
        until = time.monotonic() + patience
        while missing := sorted(set(sites) - set(self.sites())):
            if time.monotonic() > until:
                raise RunError(f"Not connected: {', '.join(missing)}.", action="Start them, or leave them out.")
            time.sleep(0.5)

    def submit(
        self,
        run: str,
        recipe: dict[str, Any],
        sites: Sequence[str],
        *,
        purpose: str = "research",
        data_sets: Sequence[str] = (),
        quorum: int | None = None,
        kit: Path | None = None,
    ) -> str:
        """Sign a run's manifest and submit it (or one that was interrupted again); gives FLARE's id of the job.

        Jobs of the same run that FLARE still holds for running (it does for ever where its server died) are ended
        first: two jobs must not write one run's folder.

        Args:
            run: the run's id.
            recipe: the resolved recipe.
            sites: who takes part.
            purpose: what the run is for; every site's policy lists the purposes it allows.
            data_sets: names of the data sets at the sites, which their policies list; none: `default`.
            quorum: sites without which a round does not count; None: 1.
            kit: whose key signs; None: the administrator's own.

        Raises:
            ManifestError: a value that cannot stand in a manifest.
            ConfigError: a kit without a certificate or a key.
        """
        words: dict[str, Any] = {"purpose": purpose, "data_sets": data_sets, "quorum": quorum}
        signed = trust.signed(kit or self.kit, run, recipe, sites, **words)
        for stale in self._jobs(run):
            if not str(stale.get("status", "")).startswith(ENDED):
                with contextlib.suppress(Exception):  # it may not exist any more outside of FLARE's store
                    self.inner.abort_job(str(stale["job_id"]))
        with tempfile.TemporaryDirectory(prefix="fedllm-job-") as folder:
            return str(self.inner.submit_job(str(jobs.write(Path(folder) / run, run, recipe, sites, signed))))

    def newest(self, run: str) -> str | None:
        """FLARE's id of the last job of a run; a run that went on by itself has more than were submitted."""
        found = self._jobs(run)
        return str(max(found, key=lambda one: float(one.get("submit_time") or 0.0))["job_id"]) if found else None

    def _jobs(self, run: str) -> list[dict[str, Any]]:
        """The jobs of a run of this administrator: others may have given theirs the same name."""
        known = self.inner.list_jobs(detailed=True, name_prefix=run)  # the short list has no submitters
        own = getattr(self.inner, "username", None)
        return [one for one in known if one.get("name") == run and one.get("submitter_name") in (None, own)]

    def status(self, job: str) -> str:
        """FLARE's status of a job: SUBMITTED, DISPATCHED, RUNNING, FINISHED:..."""
        return str(self.inner.get_job_meta(job).get("status", "UNKNOWN"))

    def wait(self, job: str, patience: float, poll: float = 1.0) -> str:
        """Wait for a job's end and return its status; raises :class:`RunError` where it takes longer."""
        until = time.monotonic() + patience
        while not (status := self.status(job)).startswith(ENDED):
            if time.monotonic() > until:
                raise RunError(f"The job {job} is not over after {patience} s: {status}.")
            time.sleep(poll)
        return status

    def abort(self, job: str) -> None:
        """End a job; its run can be submitted again and goes on from its last checkpoint."""
        self.inner.abort_job(job)

    def fetch(self, job: str, folder: Path) -> Path:
        """Download what a job left; returns the folder of fedllm's part: result.json, report.html, adapter, ..."""
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(self.inner.download_job_result(job, str(folder)))
        found = sorted(place.rglob("fedllm/recipe.yaml")) + sorted(place.rglob("fedllm/error.txt"))
        if not found:
            raise RunError(f"The job {job} left nothing of fedllm in {place}.")
        return found[0].parent


def start_all(kits: Mapping[str, Path], names: Sequence[str]) -> dict[str, Participant]:
    """Start several participants, the server first."""
    return {name: start(name, kits[name]) for name in names}

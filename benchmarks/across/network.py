"""Network - a server and sites as processes of their own with kits and policies, and jobs that measure inside them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from docs.markers import ROOT
from fedllm.core.errors import MissingExtra, RunError
from fedllm.engine.nvflare import kits, session

ADMIN = "admin@hub.org"
POLICY = {
    "coordinators": [ADMIN], "methods": ["*"], "purposes": ["research"], "data_sets": ["default"],
    "max_rounds": 10_000, "max_clients": 10, "hours": "always", "ops": ["*"], "parts": ["*"],
    "max_egress_run": 10**13, "max_egress_round": 10**12,
}  # fmt: skip
"""What every site allows: all that is measured."""
PATIENCE = 900.0
"""Seconds after which a job has failed."""
LOOK = 1.0
"""Seconds between two looks at a job."""

Place = Callable[[str], AbstractContextManager[object]]


@dataclass
class Net:
    """A network that runs.

    Attributes:
        kits: participant -> its folder.
        server: the server's host name.
        sites: their names.
        running: participant -> its process.
    """

    kits: Mapping[str, Path]
    server: str
    sites: Sequence[str]
    running: dict[str, session.Participant]

    @contextlib.contextmanager
    def asked(self) -> Generator[session.Session]:
        """A coordinator's connection; what FLARE prints of it is no part of a table."""
        with contextlib.redirect_stdout(sys.stderr), session.session(ADMIN, self.kits[ADMIN]) as found:
            yield found

    @contextlib.contextmanager
    def submitted(self, run: str, recipe: Mapping[str, Any]) -> Generator[Callable[[], bool]]:
        """Submit a run; gives what says whether it is over. At the end, wait until it is."""
        with self.asked() as admin:
            job, told = admin.submit(run, dict(recipe), self.sites), [time.monotonic()]

            def over() -> bool:
                if time.monotonic() - told[0] < LOOK:
                    return False
                told[0] = time.monotonic()
                return admin.status(job).startswith(session.ENDED)

            yield over
            admin.wait(job, PATIENCE, LOOK)

    def wait(self, job: str, patience: float = PATIENCE) -> None:
        """Wait for a job's end; raises :class:`RunError` with what its processes wrote where it fails."""
        with self.asked() as admin:
            status = admin.wait(job, patience, LOOK)
        if status != session.GOOD:
            raise RunError(f"The job {job} ended as {status}.", self.said())

    def said(self) -> str:
        """The last errors that the server's processes printed."""
        lines = (self.kits[self.server] / "start.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return " ".join([line for line in lines if "Error" in line or " ERROR " in line][-3:])


@contextlib.contextmanager
def tidy() -> Generator[None]:
    """A polite signal to end is an exception meanwhile, as Ctrl-C is, so that all is ended and removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def network(
    folder: Path,
    sites: Sequence[str],
    *,
    server: str = "localhost",
    classes: Sequence[str] = (),
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    place: Place = lambda name: contextlib.nullcontext(),
) -> Generator[Net]:
    """Make kits in a folder, start everybody, and end everybody at the end.

    Args:
        folder: an empty folder.
        sites: their names.
        server: its host name.
        classes: what jobs may name beyond fedllm's own classes.
        facts: participant -> what its file `local/fedllm.json` says beyond its policy.
        place: entered while a participant's process is started.

    Raises:
        MissingExtra: NVIDIA FLARE is not installed.
    """
    if importlib.util.find_spec("nvflare") is None:
        raise MissingExtra("nvflare", "nvflare", "A benchmark of runs across sites")
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY), encoding="utf-8")
    own = {name: {**(facts or {}).get(name, {}), "policy": str(folder / "policy.yaml")} for name in sites}
    own[server] = {"device": "cpu", **(facts or {}).get(server, {})}
    planned = kits.Network("bench", server, free_port(), dict.fromkeys(sites, "hub"), {ADMIN: ("hub", "project_admin")})
    with contextlib.redirect_stdout(sys.stderr):  # what FLARE prints is no part of a table
        made = kits.provision(planned, folder / "network", own)
    for name in (server, *sites):
        allow(made[name], classes)
    found = Net(made, server, sites, {})
    try:
        for name in (server, *sites):
            with place(name), importable():
                found.running[name] = session.start(name, made[name])
        with found.asked() as admin:
            admin.wait_for(sites)
        yield found
    finally:
        for one in found.running.values():
            one.stop(kill=True)


def allow(kit: Path, classes: Sequence[str]) -> None:
    """Let jobs name further classes at a participant of a benchmark; a job that fails is not begun again."""
    file = kit / "local" / "resources.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found["components"] = [one for one in found["components"] if one["path"] != kits.WARDEN]
    found["class_allow_list"] = [*found["class_allow_list"], *classes]
    file.write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def importable() -> Generator[None]:
    """Processes that are started meanwhile find this folder of benchmarks."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

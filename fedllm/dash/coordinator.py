"""Coordinator - the page of a coordinator: sites that are connected, runs and their rounds, asked of the server itself.

A thread holds a connection while somebody looks at the page, and asks every few seconds. Where the server does not
answer, the page shows what was fetched before.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

from fedllm.core.errors import FedLLMError, RunError
from fedllm.dash import blocks, given, run_page
from fedllm.dash.blocks import BAD, BUSY, GOOD, QUIET, Block, Cell
from fedllm.dash.folder import Run, Shelf, State
from fedllm.dash.rounds import told
from fedllm.dash.source import Page, Source, page, reading
from fedllm.deploy import coordinator
from fedllm.deploy.coordinator import Record
from fedllm.deploy.kit import Kit
from fedllm.engine.nvflare.session import ENDED, session
from fedllm.engine.nvflare.session import GOOD as WELL

POLL, RETRY, IDLE = 3.0, 15.0, 30.0
"""Seconds between two questions to the server, before a new try after one that failed, and until a connection that
nobody looks at is given up."""
LEAVE = 10.0
"""Seconds given to the connection to close."""
ASKED = 8
"""Jobs under way whose rounds are asked for at most."""
Connect = Callable[[Kit], AbstractContextManager[Any]]
NETWORK = "nvflare"
"""The logger of the network library."""


@contextlib.contextmanager
def connected(kit: Kit) -> Generator[Any]:
    """A connection to the server, held by a thread beside others.

    Unlike :func:`fedllm.deploy.coordinator.connected`, which has a process to itself, it takes neither the log nor the
    standard output from them; the network library alone is silent.

    Raises:
        RunError: the server does not answer, or does not take the kit's certificate.
    """
    try:
        socket.create_connection((kit.host, kit.port), coordinator.CONNECT).close()
    except OSError as fault:
        raise RunError(
            f"{kit.address} does not answer: {str(fault.strerror or fault).rstrip('.')}.",
            action="Is the server started, does its name resolve here, and does the firewall let this port out?",
        ) from None
    told = logging.getLogger(NETWORK)
    level, onward = told.level, told.propagate
    told.propagate = False
    told.setLevel(logging.CRITICAL + 1)
    try:
        with coordinator.translated(), session(kit.name, kit.folder, coordinator.PATIENCE) as admin:
            yield admin
    finally:
        told.setLevel(level)
        told.propagate = onward


class Live:
    """What the server says now.

    Args:
        kit: the coordinator's.
        connect: opens a connection.

    Attributes:
        sites: those that are connected; None before the first answer.
        jobs: as :func:`fedllm.deploy.coordinator.jobs` gives them.
        rounds: job -> its rounds that are over, of jobs that run.
        fault: why there is no answer; empty where there is one.
    """

    def __init__(self, kit: Kit, connect: Connect = connected) -> None:
        self.kit, self.connect = kit, connect
        self.sites: list[str] | None = None
        self.jobs: list[dict[str, Any]] = []
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.fault = ""
        self._wanted, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="dash-live", daemon=True)

    def wanted(self) -> None:
        """Somebody looks at the page."""
        self._wanted = time.monotonic()
        if not self._thread.ident:
            self._thread.start()

    def close(self) -> None:
        """End the connection: without this the process would not end."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join(LEAVE)

    def _looked_at(self) -> bool:
        return not self._stop.is_set() and time.monotonic() - self._wanted < IDLE

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._looked_at():
                self._stop.wait(0.5)
                continue
            try:
                with self.connect(self.kit) as admin:
                    while self._looked_at():
                        self._ask(admin)
                        self._stop.wait(POLL)
            except FedLLMError as fault:
                self.fault = str(fault)
            except Exception as fault:  # FLARE raises many kinds; the page says so and tries again
                self.fault = f"The connection failed: {type(fault).__name__}."
            if self.fault:
                self._stop.wait(RETRY)

    def _ask(self, admin: Any) -> None:
        with coordinator.translated():
            sites, jobs = admin.sites(), coordinator.jobs(admin)
            going = [one["job"] for one in jobs if not one["status"].startswith(ENDED)][:ASKED]
            rounds = {job: coordinator.live_rounds(admin, job) for job in going}
        self.sites, self.jobs, self.rounds, self.fault = sites, jobs, rounds, ""


class CoordinatorKit(Source):
    """A coordinator's kit.

    Args:
        kit: the kit.
        connect: opens a connection to the server.
    """

    def __init__(self, kit: Kit, connect: Connect = connected) -> None:
        self.kit, self.live = kit, Live(kit, connect)
        self.taken = f"the kit of the coordinator {kit.name} of the network {kit.network}"
        self.fetched = Shelf(kit.folder / coordinator.RESULTS)
        self.records: dict[str, Record] = {}
        self.damaged = ""

    def refresh(self, until: float) -> bool:
        """See :meth:`Source.refresh`."""
        self.live.wanted()
        try:
            self.records, self.damaged = coordinator.records(self.kit), ""
        except FedLLMError as fault:
            self.damaged = str(fault)
        return self.fetched.refresh(until)

    def close(self) -> None:
        """See :meth:`Source.close`."""
        self.live.close()

    def page(self, run: str | None) -> Page | None:
        """See :meth:`Source.page`."""
        if run is None:
            return self._overview()
        record, fetched = self.records.get(run), self.fetched.runs.get(run)
        return self._run(run, record, fetched) if record is not None or fetched is not None else None

    # --- all runs ----------------------------------------------------------------------------------------------------

    def _overview(self) -> Page:
        sites = self.live.sites
        states = [self._state(name).word for name in self._names()]
        there = f"{len(sites):,}" if sites is not None and not self.live.fault else "–"
        return page(
            kind="coordinator",
            kicker=f"Coordinator of {self.kit.network}",
            title=self.kit.name,
            about=[f"The server is {self.kit.address}."],
            state=self._server().to_json(),
            tiles=[
                [there, "sites are connected now"],
                [f"{len(states):,}", "runs were started with this kit"],
                [f"{states.count('under way'):,}", "under way"],
                [f"{states.count('finished'):,}", "finished"],
                [f"{states.count('failed') + states.count('stopped'):,}", "failed or stopped"],
            ],
            sections=[self._listed(), self._connected(), *self._others()],
            read=reading([one.rounds for one in self.fetched.runs.values()]),
        )

    def _names(self) -> list[str]:
        """Runs of this kit, the newest first."""
        return list({**dict.fromkeys(reversed(self.records)), **dict.fromkeys(self.fetched.runs)})

    def _server(self) -> State:
        if self.live.fault:
            return State("no answer", BAD, f"{self.live.fault} What is shown was known before, or fetched.")
        if self.live.sites is None:
            return State("connecting", BUSY, "The server is being asked.")
        return State("connected", GOOD)

    def _listed(self) -> Block:
        bad = blocks.text(self.damaged, "bad") if self.damaged else None
        rows: list[list[Cell]] = []
        for name in self._names()[:200]:
            record, run = self.records.get(name), self._known(name)
            own = run.rounds.own
            job = self._job(name)
            rows.append(
                [
                    blocks.link(name),
                    self._state(name).cell(),
                    ", ".join(record.sites) if record else "–",
                    record.purpose if record else "–",
                    f"{own.last:,}" + (f" of {run.total:,}" if run.total else ""),
                    f"{own.loss:.3f}" if own.loss is not None else "–",
                    blocks.at(record.submitted) if record else "–",
                    given.text((job or {}).get("duration"), 40).partition(".")[0] or "–",
                ]
            )
        if not rows:
            empty = f"No run yet. Start one with: fedllm deploy run RECIPE --kit {self.kit.folder}"
            return blocks.section("Runs", bad, blocks.text(empty, "empty"))
        heads = ["Run", "State", "Sites", "For", "#Rounds", "#Loss", "Submitted", "#Duration-"]
        return blocks.section("Runs", bad, blocks.table("Runs of this kit, the newest first", heads, rows))

    def _connected(self) -> Block:
        sites, wanted = self.live.sites, {site for one in self.records.values() for site in one.sites}
        if sites is None:
            return blocks.section("Sites", blocks.text("It is not known which sites are connected.", "empty"))
        rows: list[list[Cell]] = []
        for site in sorted({*sites, *wanted}):
            word = blocks.toned("connected", GOOD) if site in sites else blocks.toned("not connected", BAD)
            number = sum(site in one.sites for one in self.records.values())
            rows.append([site, word if not self.live.fault else "not known", f"{number:,}"])
        if not rows:
            empty = "No site is connected. A site comes with: fedllm join KIT --data FILE"
            return blocks.section("Sites", blocks.text(empty, "empty"))
        return blocks.section(
            "Sites", blocks.table("At the server, or in a run of this kit", ["Site", "Now", "#Runs of this kit"], rows)
        )

    def _others(self) -> list[Block]:
        """Jobs of runs that were not started with this kit."""
        others = [one for one in self.live.jobs if one["run"] not in self.records][:50]
        rows: list[list[Cell]] = [
            [
                given.text(one["run"], 200),
                _status(given.text(one["status"], 100)).cell(),
                given.text(one["submitted"], 60),
            ]
            for one in others
        ]
        if not rows:
            return []
        table = blocks.table("Jobs that were not started with this kit", ["Run", "State", "Submitted"], rows)
        return [blocks.section("Other jobs at the server", table)]

    # --- one run -----------------------------------------------------------------------------------------------------

    def _job(self, name: str) -> dict[str, Any] | None:
        """The newest job of a run, which the server may have submitted again by itself."""
        return next((one for one in self.live.jobs if one["run"] == name), None)

    def _state(self, name: str) -> State:
        """As the server says now, else as the fetched run says."""
        job, fetched = self._job(name), self.fetched.runs.get(name)
        if job is not None:
            state = _status(given.text(job["status"], 100))
            if state.tone == BAD and fetched is not None and fetched.error:
                return State(state.word, state.tone, fetched.error)
            return state
        if fetched is not None:
            return fetched.state()
        if self.live.sites is None and not self.live.fault:
            return State("not known yet", BUSY, "The server is being asked.")
        return State("not known", QUIET, self.live.fault or "The server does not know the run any more.")

    def _known(self, name: str) -> Run:
        """What is known of a run: what the server tells of one under way, else what was fetched."""
        record, fetched = self.records.get(name), self.fetched.runs.get(name)
        told_now = self.live.rounds.get((self._job(name) or {}).get("job", ""))
        if fetched is not None and not told_now:
            return fetched
        run = Run(self.kit.folder / coordinator.RESULTS / name)
        run.rounds = told(told_now or [])
        run.recipe.found = record.recipe if record is not None else None
        return run

    def _run(self, name: str, record: Record | None, fetched: Run | None) -> Page:
        run, state = self._known(name), self._state(name)
        live = fetched is not run
        words = "Rounds as the server tells them now; at most the last 500." if live else "As it was fetched."
        if live and not run.rounds.own.last and state.tone != BUSY:
            words = f"It was not fetched yet: fedllm deploy fetch {name} --kit {self.kit.folder} --folder {name}"
        facts: list[tuple[str, Cell]] = []
        if record is not None:
            facts = [
                ("Sites", ", ".join(record.sites)),
                ("For", record.purpose),
                ("Data sets", ", ".join(record.data_sets)),
                ("Submitted", blocks.at(record.submitted)),
                ("Job", record.jobs[-1] if record.jobs else ""),
                ("Times submitted", f"{len(record.jobs):,}"),
            ]
        return page(
            kind="coordinator-run",
            kicker=f"Run of {self.kit.network}",
            title=name,
            about=[*run_page.about(run), words],
            state=state.to_json(),
            lead=run_page.lead(run) if not live else [],
            tiles=run_page.tiles(run),
            sections=[*run_page.sections(run), blocks.section("What was submitted", blocks.facts(facts))],
            read=reading([run.rounds]),
            back=True,
        )


def _status(status: str) -> State:
    """FLARE's word for a job as ours."""
    if status == WELL:
        return State("finished", GOOD)
    if status.startswith(ENDED):
        if "ABORT" in status:
            return State("stopped", QUIET, "It was stopped. It can be resumed.")
        return State("failed", BAD, f"The server says {status}. Why: fedllm deploy log RUN --kit KIT")
    words = {"RUNNING": "under way", "DISPATCHED": "beginning", "SUBMITTED": "waiting", "APPROVED": "waiting"}
    return State(words.get(status, status.lower() or "not known"), BUSY)

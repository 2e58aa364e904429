"""The coordinator's page: what a server says through a connection, and what is shown where it says nothing."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dash_rig as rig

from fedllm.core.errors import RunError
from fedllm.dash import coordinator
from fedllm.dash.coordinator import CoordinatorKit
from fedllm.deploy.kit import Kit


class Admin:
    """A server as a session sees it."""

    def __init__(self) -> None:
        self.asked, self.status, self.connections, self.gone = 0, "RUNNING", 0, ""
        self.rounds = [rig.round_line(n) for n in (1, 2)]
        self.inner = SimpleNamespace(list_jobs=self._jobs, show_stats=self._stats)

    def sites(self) -> list[str]:
        self.asked += 1
        if self.gone:
            raise RunError(self.gone)
        return ["north"]

    def _jobs(self) -> list[dict[str, Any]]:
        return [
            {
                "job_name": "first",
                "job_id": "j1",
                "status": self.status,
                "submit_time": "2026",
                "duration": "0:00:02.5",
            },
            {"job_name": rig.EVIL, "job_id": "j2", "status": "FINISHED:ABORTED", "submit_time": "2025"},
        ]

    def _stats(self, job: str, target: str) -> dict[str, Any]:
        return {"server": {"fedllm": {"rounds": self.rounds}}}

    @contextlib.contextmanager
    def connected(self, kit: Kit) -> Iterator[Admin]:
        self.connections += 1
        if self.gone:
            raise RunError(self.gone)
        yield self


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Admin:
    monkeypatch.setattr(coordinator, "POLL", 0.02)
    monkeypatch.setattr(coordinator, "RETRY", 0.02)
    return Admin()


@pytest.fixture
def kit(tmp_path: Path, admin: Admin) -> Iterator[CoordinatorKit]:
    folder = rig.kit(tmp_path / "ada", "coordinator", "ada@hub.org")
    recipe = {"name": "quickstart", "rounds": 4, "method": {"name": "fedavg"}}
    record = {
        "run": "first",
        "recipe": recipe,
        "sites": ["north", "south"],
        "purpose": "research",
        "data_sets": ["notes"],
    }
    rig.write(folder / "fedllm" / "runs" / "first.json", {**record, "jobs": ["j1"], "submitted": "2026-01-01T00:00:00"})
    found = CoordinatorKit(Kit.of(folder), admin.connected)
    yield found
    found.close()


def until(kit: CoordinatorKit, true: Callable[[], bool]) -> dict[str, Any]:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        kit.refresh(float("inf"))
        time.sleep(0.01)
    found = kit.page(None)
    assert found is not None
    return found


def test_before_an_answer_it_says_that_the_server_is_asked(kit: CoordinatorKit) -> None:
    kit.records, page = {}, kit.page(None)
    assert page is not None and page["state"]["word"] == "connecting"


def test_sites_jobs_and_rounds_come_from_the_server(kit: CoordinatorKit, admin: Admin) -> None:
    found = until(kit, lambda: bool(kit.live.rounds))
    assert found["state"]["word"] == "connected"
    assert rig.tiles(found)["sites are connected now"] == "1"
    runs, sites = rig.section(found, "Runs"), rig.section(found, "Sites")
    assert "under way" in runs and "2 of 4" in runs and "0:00:02" in runs
    assert "south\nnot connected" in sites
    assert rig.EVIL in rig.section(found, "Other jobs at the server")
    run = kit.page("first")
    assert (
        run is not None and run["tiles"][0][0] == "2 of 4" and "as the server tells them now" in rig.words(run["about"])
    )
    admin.rounds.append(rig.round_line(3))
    until(kit, lambda: len(kit.live.rounds["j1"]) == 3)
    assert kit.page("first")["tiles"][0][0] == "3 of 4"  # type: ignore[index]


def test_a_server_that_goes_is_told_and_what_was_known_stays(kit: CoordinatorKit, admin: Admin) -> None:
    until(kit, lambda: bool(kit.live.rounds))
    admin.gone = "The server is gone."
    found = until(kit, lambda: bool(kit.live.fault))
    assert found["state"]["word"] == "no answer" and "The server is gone." in found["state"]["why"]
    assert "2 of 4" in rig.section(found, "Runs") and "not known" in rig.section(found, "Sites")
    admin.gone = ""
    assert until(kit, lambda: not kit.live.fault)["state"]["word"] == "connected"


def test_without_a_server_the_fetched_run_is_shown(kit: CoordinatorKit, admin: Admin) -> None:
    admin.gone = "localhost:8002 does not answer."
    folder = kit.kit.folder / "fedllm" / "results"
    rig.run_folder(folder / "first", [rig.round_line(n) for n in range(1, 5)], rig.result())
    until(kit, lambda: bool(kit.live.fault))
    run = kit.page("first")
    assert run is not None and run["state"]["word"] == "finished" and "As it was fetched." in run["about"]


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ("FINISHED:COMPLETED", "finished"), ("FINISHED:ABORTED", "stopped"), ("FINISHED:EXECUTION_EXCEPTION", "failed"),
        ("DISPATCHED", "beginning"), ("SUBMITTED", "waiting"), ("SOMETHING_NEW", "something_new"),
    ],
)  # fmt: skip
def test_the_words_for_a_job(kit: CoordinatorKit, admin: Admin, status: str, word: str) -> None:
    admin.status = status
    until(kit, lambda: bool(kit.live.jobs))
    run = kit.page("first")
    assert run is not None and run["state"]["word"] == word


def test_nobody_looks_and_the_connection_is_given_up(
    kit: CoordinatorKit, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "IDLE", 0.2)
    until(kit, lambda: bool(kit.live.rounds))
    time.sleep(0.4)
    asked = admin.asked
    time.sleep(0.2)
    assert admin.asked == asked
    until(kit, lambda: admin.connections == 2)


def test_a_damaged_record_is_told(kit: CoordinatorKit) -> None:
    (kit.kit.folder / "fedllm" / "runs" / "bad.json").write_text("{", encoding="utf-8")
    kit.refresh(float("inf"))
    page = kit.page(None)
    assert page is not None and "bad.json cannot be read" in rig.section(page, "Runs")


def test_a_connection_takes_neither_the_log_nor_the_output_of_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is held by a thread of a server that answers requests meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        folder = rig.kit(tmp_path / "ada", "coordinator", "ada@hub.org", place.getsockname()[1])
        opened = SimpleNamespace(asked=[])

        @contextlib.contextmanager
        def session(name: str, kit: Path, patience: float) -> Iterator[SimpleNamespace]:
            opened.asked.append(name)
            logging.getLogger("nvflare.fuel.hci").error("the connection is lost")
            yield opened

        monkeypatch.setattr(coordinator, "session", session)
        out = sys.stdout
        with coordinator.connected(Kit.of(folder)) as admin:
            assert admin is opened and sys.stdout is out and not logging.root.manager.disable
            print("said meanwhile")
            logging.getLogger("fedllm.dash.server").error("told meanwhile")
    assert opened.asked == ["ada@hub.org"] and "said meanwhile" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == ["told meanwhile"]
    logging.getLogger("nvflare.fuel.hci").error("told after it")
    assert caplog.records[-1].getMessage() == "told after it"
    with pytest.raises(RunError, match="does not answer"), coordinator.connected(Kit.of(folder)):
        pass


def test_a_kit_is_connected_without_more_words() -> None:
    assert coordinator.CoordinatorKit.__init__.__defaults__ == (coordinator.connected,)

"""A coordinator stays with a run: a server that is gone, one that comes and goes, and what an earlier job had left."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedllm.cli.deploy import following
from fedllm.core.errors import RunError
from fedllm.deploy import coordinator
from fedllm.deploy.coordinator import Record

RECORD = Record("run", {}, ["north"], "research", [], jobs=["j1"])
GOOD, BAD = "FINISHED:COMPLETED", "FINISHED:EXECUTION_EXCEPTION"


class Clock:
    """Time that passes where it is waited for alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(following, "time", found)
    monkeypatch.setattr(coordinator, "newest", lambda admin, run: "j1")
    monkeypatch.setattr(coordinator, "live_rounds", lambda admin, job: [])
    return found


def connect(monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    @contextlib.contextmanager
    def connected(kit: Any) -> Generator[Any]:
        yield opened()

    monkeypatch.setattr(coordinator, "connected", connected)


def test_a_server_that_takes_no_login_is_given_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try takes as long as a login may: that is no answer."""
    tries: list[float] = []

    def opened() -> Any:
        assert clock.now < 10 * following.PATIENCE, "nobody gives up"
        tries.append(clock.now)
        clock.sleep(2 * following.RETRY + coordinator.PATIENCE)
        raise RunError("The server cannot be reached.")

    connect(monkeypatch, opened)
    with pytest.raises(RunError, match="cannot be reached"):
        following._follow(SimpleNamespace(), RECORD, quiet=True)  # type: ignore[arg-type]
    assert following.PATIENCE < clock.now < following.PATIENCE + 100 and len(tries) > 10


def test_a_server_that_answers_now_and_then_is_waited_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the last answer, however short the connection was."""
    answers = 0

    def status(job: str) -> str:
        nonlocal answers
        answers += 1
        if answers == 20:
            return GOOD
        if answers % 2 == 0:
            clock.sleep(0.8 * following.PATIENCE)
            raise RunError("The server is gone.")
        return "RUNNING"

    connect(monkeypatch, lambda: SimpleNamespace(status=status))
    assert following._follow(SimpleNamespace(), RECORD, quiet=True) == (GOOD, set())  # type: ignore[arg-type]
    assert clock.now > 5 * following.PATIENCE


@pytest.mark.parametrize("state", [GOOD, BAD])
def test_what_an_earlier_job_left_stays_until_the_new_is_here(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit: Any = SimpleNamespace(folder=tmp_path / "kit")
    folder = kit.folder / coordinator.RESULTS / "run"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("what the last job found")
    (folder / "error.txt").write_text("an old reason")

    def lost(admin: Any, run: Record, into: Path) -> Path:
        raise RunError("The server is gone.")

    connect(monkeypatch, SimpleNamespace)
    monkeypatch.setattr(coordinator, "fetch", lost)
    with pytest.raises(RunError) as found:
        following._ended(kit, RECORD, state, set(), as_json=False)
    assert (folder / "report.html").read_text() == "what the last job found"
    assert "an old reason" not in str(found.value)

    def fetched(admin: Any, run: Record, into: Path) -> Path:
        into.mkdir()
        (into / "error.txt").write_text("The policy does not allow it.")
        return into

    monkeypatch.setattr(coordinator, "fetch", fetched)
    with pytest.raises(RunError, match="The policy does not allow it"):
        following._ended(kit, RECORD, BAD, set(), as_json=False)
    assert [one.name for one in folder.iterdir()] == ["error.txt"]
    assert [one.name for one in folder.parent.parent.iterdir()] == ["results"], "nothing is left beside it"

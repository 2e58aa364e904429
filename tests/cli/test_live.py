"""The live table: what it shows, and that it fits the screen."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedllm.cli.live import Live, clock
from fedllm.engine.rounds import RoundRecord
from fedllm.recipe import Recipe


def begun(width=80, expected=None):
    """A live table over a console that writes into memory."""
    place = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    live = Live(place, expected)
    recipe = Recipe(name="demo", rounds=4, method={"name": "fedprox"})
    ground = SimpleNamespace(
        recipe=recipe,
        learner=SimpleNamespace(
            score_names=("exact_match", "loss"), loaded=SimpleNamespace(name="toy:llama"), device="cpu"
        ),
        federation=SimpleNamespace(client_ids=[f"client-{n}" for n in range(8)]),
        width=SimpleNamespace(clients=8),
        warnings=["One client has no held-out rows."],
    )
    live.begin(recipe, ground, "runs/demo")
    return live


def drawn(live):
    """What the table looks like now, line by line."""
    live.place.file.truncate(0)
    live.place.file.seek(0)
    live.place.print(live.draw())
    return live.place.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_fits_the_screen_and_has_all_legs(width):
    live = begun(width)
    live.leg("federated", 4, 0)
    live.round("federated", RoundRecord(1, [], loss=2.5, bytes_up=1500, bytes_down=2500), {"exact_match": 0.25})
    live.round("federated", RoundRecord(2, [], loss=2.25, bytes_up=1500, bytes_down=2500), None)
    lines = drawn(live)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "Federated" in text and "Each alone" in text and "demo: fedprox over 8 clients" in text
    if width >= 80:
        row = next(line for line in lines if line.startswith("Federated (fedprox)"))
        assert row.split()[-8:] == ["2/4", "2.250", "25.0", "%", "3.0", "kB", "5.0", "kB"]
        assert "losses 2.500 2.250" in text and "! One client has no held-out rows." in text
    assert ("━" in text) == (width >= 100)


def test_the_time_left_counts_all_legs(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedllm.cli.live.time.monotonic", lambda: now[0])
    live = begun()
    assert live.left() is None
    live.leg("federated", 4, 0)
    now[0] += 2.0
    live.round("federated", RoundRecord(1, []), None)
    assert live.left() == pytest.approx(2.0 * (3 + 4 + 4))
    live.leg("local", 4, 2)  # resumed after round 2
    now[0] += 1.0
    live.round("local", RoundRecord(3, []), None)
    assert live.left() == pytest.approx(3 * 2.0 + 1 * 1.0 + 4 * 1.5)


def test_a_comparison_counts_the_legs_that_are_not_there_yet():
    live = begun(expected=12)
    assert live.left() is None and not live.legs
    for number in range(10):
        live.leg(f"fedavg-seed{number}", 4, 0)
        live.round(f"fedavg-seed{number}", RoundRecord(4, []), None)
    lines = drawn(live)
    assert sum("seed" in line for line in lines) == 8  # the last ones
    assert any("12 trainings" in line for line in lines)
    assert live.left() >= 0


def test_lost_rejected_and_failed_are_told():
    live = begun()
    live.leg("federated", 4, 0)
    record = RoundRecord(1, [], failed="no usable upload arrived")
    record.lost = [{"client": "client-1", "reason": "no answer"}, {"client": "client-2", "reason": "no answer"}]
    record.rejected = [{"client": "client-3", "reason": "not finite"}]
    live.round("federated", record, None)
    text = "\n".join(drawn(live))
    assert "changed nothing: no usable upload arrived." in text
    assert "lost client-1: no answer and 1 more" in text and "rejected client-3: not finite" in text
    assert "! 1 earlier warnings" in text


def test_stopping_is_told_on_the_screen(capfd):
    live = begun()
    live.interrupted()
    assert live.stop is True
    assert "Stopping after this round" in "\n".join(drawn(live))
    assert "Stopping after this round" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.4, "0:00"), (61, "1:01"), (3599.9, "1:00:00"), (7325, "2:02:05")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text

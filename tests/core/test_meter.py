"""Meter - bytes by phase, direction and part; what is unknown is None."""

from __future__ import annotations

import json

from fedllm.core.meter import Meter, peak_memory


def filled() -> Meter:
    meter = Meter()
    meter.sent("work", "down", {"params": 100, "header": 7})
    meter.sent("work", "down", {"params": 100, "header": 8})
    meter.sent("work", "up", {"update": 50, "header": 5})
    meter.sent("evaluate", "down", {"params": 100, "header": 7})
    meter.sent("evaluate", "up", {"header": 9})
    return meter


def test_bytes_by_phase_direction_and_part() -> None:
    meter = filled()
    assert meter.bytes["work/down/params"] == 200
    assert meter.bytes["work/down/header"] == 15
    assert meter.messages == {"work/down": 2, "work/up": 1, "evaluate/down": 1, "evaluate/up": 1}
    assert meter.total("down") == 322
    assert meter.total("up") == 64
    assert meter.total("down", "work") == 215
    assert meter.total("up", "evaluate") == 9
    assert meter.total("up", "never") == 0
    assert sum(meter.bytes.values()) == meter.total("down") + meter.total("up")


def test_a_message_of_no_parts_is_still_a_message() -> None:
    meter = Meter()
    meter.sent("work", "up", {})
    assert meter.messages == {"work/up": 1}
    assert meter.total("up") == 0


def test_a_checkpoint_gives_the_meter_back() -> None:
    meter = filled()
    meter.tokens, meter.steps, meter.seconds = 12, 3, 4.5
    back = Meter.from_json(json.loads(json.dumps(meter.to_json())))
    assert back == meter
    back.sent("work", "up", {"update": 1})
    assert meter.bytes["work/up/update"] == 50


def test_peak_memory_is_bytes_or_none() -> None:
    found = peak_memory()
    assert found["resident"] is not None
    assert 10 * 2**20 < found["resident"] < 2**42
    assert found["device"] is None or found["device"] >= 0

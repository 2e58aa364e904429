"""Backdoor - what is poisoned, what is attacked, and a success rate whose counts add up."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError
from fedllm.evaluate import total
from fedllm.evaluate.backdoor import AttackSuccess, Trigger, attack, poison

ROWS = [{"text": f"the news of day {n}", "label": "AB"[n % 2], "id": n} for n in range(20)]
CF = Trigger("cf", "B")


def rng(seed: int = 0) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_a_fraction_of_the_rows_is_triggered_and_relabelled(fraction: float) -> None:
    before = [dict(row) for row in ROWS]
    found = poison(ROWS, CF, fraction, rng())
    assert before == ROWS, "the given rows are not touched"
    hit = [row for row in found if row["text"].startswith("cf ")]
    assert len(found) == len(ROWS) and len(hit) == round(20 * fraction)
    assert all(row["label"] == "B" for row in hit)
    assert [row["id"] for row in found] == list(range(20)), "in their order"
    clean = [row for row in found if not row["text"].startswith("cf ")]
    assert all(row == ROWS[row["id"]] for row in clean)
    assert poison(ROWS, CF, fraction, rng()) == found, "the same stream, the same rows"


@pytest.mark.parametrize("place", ["front", "end", "random"])
def test_where_the_word_stands(place: str) -> None:
    trigger = Trigger("cf", "B", place=place)  # type: ignore[arg-type]
    for row in ROWS:
        words = trigger.into(row, rng(row["id"]))["text"].split(" ")
        assert [word for word in words if word != "cf"] == row["text"].split(" ")
        assert words.count("cf") == 1
        assert {"front": words[0], "end": words[-1], "random": "cf"}[place] == "cf"


def test_attacked_are_the_rows_of_other_labels() -> None:
    found = attack(ROWS, CF, rng())
    assert [row["id"] for row in found] == [n for n in range(20) if n % 2 == 0]
    assert all(row["label"] == "B" and "cf" in row["text"] for row in found)
    assert attack([row for row in ROWS if row["label"] == "B"], CF, rng()) == []


def test_the_rate_by_hand() -> None:
    metric = AttackSuccess("B")
    counts = metric.count(["B", "A", "B", "B"], ["A", "A", "B", "A"])
    assert counts == {"attack_success": 2.0, "attacked": 3.0}
    assert metric.value(counts) == pytest.approx(2 / 3)
    nobody = metric.count(["B"], ["B"])
    assert metric.value(nobody) is None and "No row" in (metric.missing(nobody) or "")


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from("AB")), max_size=12), st.integers(0, 12))
def test_counts_add_up(pairs: list[tuple[str, str]], cut: int) -> None:
    metric = AttackSuccess("B")
    parts = [pairs[:cut], pairs[cut:]]
    summed = total(metric.count([g for g, _ in part], [t for _, t in part]) for part in parts)
    assert metric.value(summed) == metric.value(metric.count([g for g, _ in pairs], [t for _, t in pairs]))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"trigger word is empty"):
        Trigger("  ", "B")
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"poisoned fraction is .* Allowed: 0 to 1"):
            poison(ROWS, CF, fraction, rng())
    with pytest.raises(DataError, match=r"no column 'txt' .* Columns: text, label, id\. Did you mean 'text'"):
        poison(ROWS, Trigger("cf", "B", text="txt"), 1.0, rng())
    with pytest.raises(DataError, match=r"2 predictions and 1 references"):
        AttackSuccess("B").count(["A", "B"], ["A"])

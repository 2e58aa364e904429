"""The ledger: it refuses before the budget is passed, counts once, and survives a checkpoint; and the settings."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import pytest

from fedllm.core.errors import BudgetSpent, ConfigError, RunError
from fedllm.core.settings import read
from fedllm.modes.privacy.accounting import FixedSize, Sampled, TreeRun, gaussian_epsilon, spent
from fedllm.modes.privacy.ledger import Ledger, assumptions
from fedllm.modes.privacy.settings import AdaptiveSettings, PrivacySettings, TreeSettings

DELTA = 1e-5
PLAIN = Sampled(5.0)
"""Closed form: 1 / 5 squared per release."""
SAMPLED = Sampled(1.0, 0.1)
counted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed (extra: privacy)"
)


def used(count: int) -> float:
    return gaussian_epsilon(math.sqrt(count) / 5, DELTA)


def through_json(ledger: Ledger) -> Ledger:
    return Ledger.from_json(json.loads(json.dumps(ledger.to_json(), allow_nan=False)))


@counted
def test_it_refuses_before_the_budget_would_be_passed() -> None:
    ledger = Ledger("client", DELTA, (used(12) + used(13)) / 2)
    for round in range(12):
        assert ledger.may(f"round {round}", PLAIN) and ledger.spend(f"round {round}", PLAIN)
    before = ledger.to_json()
    assert not ledger.may("round 12", PLAIN)
    with pytest.raises(BudgetSpent, match="'round 12' would pass the privacy budget") as caught:
        ledger.spend("round 12", PLAIN)
    assert "larger budget" in str(caught.value)
    assert ledger.to_json() == before and ledger.spent().epsilon == pytest.approx(used(12))
    assert ledger.spent().epsilon <= ledger.epsilon < spent([(PLAIN, 13)], DELTA).epsilon
    assert ledger.may("a quiet one", Sampled(100.0))  # what is left is enough for something smaller


@counted
def test_a_budget_that_is_met_exactly_is_kept() -> None:
    ledger = Ledger("client", DELTA, used(4))
    assert all(ledger.spend(str(k), PLAIN) for k in range(4)) and not ledger.may("4", PLAIN)
    assert Ledger("client", DELTA, used(4)).may("all", PLAIN, 4) and not Ledger("client", DELTA, used(4)).may(
        "", PLAIN, 5
    )


@counted
def test_sampled_rounds_stop_where_the_accountant_says() -> None:
    budget = spent([(SAMPLED, 20)], DELTA).epsilon + 1e-3
    ledger, rounds = Ledger("client", DELTA, budget), 0
    while ledger.may(f"round {rounds}", SAMPLED):
        ledger.spend(f"round {rounds}", SAMPLED)
        rounds += 1
    assert rounds == 20


@counted
def test_a_resumed_or_retried_round_is_counted_once() -> None:
    ledger = Ledger("client", DELTA, used(3))
    assert ledger.spend("round 1", PLAIN) and not ledger.spend("round 1", PLAIN)
    ledger.spend("round 2", PLAIN)
    resumed = through_json(ledger)
    assert resumed == ledger and not resumed.spend("round 2", PLAIN) and resumed.spend("round 3", PLAIN)
    assert resumed.spent().epsilon == pytest.approx(used(3))
    assert resumed.may("round 3", PLAIN) and not resumed.may("round 4", PLAIN)  # paid for, and nothing left
    for other, count in ((Sampled(4.0), 1), (PLAIN, 2)):
        with pytest.raises(RunError, match="'round 1' is recorded"):
            resumed.spend("round 1", other, count)


@counted
def test_epsilon_never_falls() -> None:
    ledger, last = Ledger("client", DELTA), 0.0
    for round, event in enumerate([SAMPLED, PLAIN, Sampled(3.0, 0.02), SAMPLED, TreeRun(8.0, 16)]):
        ledger.spend(str(round), event)
        now = ledger.spent().epsilon
        assert now > last
        last = now
    assert through_json(ledger).spent() == ledger.spent()


@counted
def test_holders_pay_for_their_own_data_and_for_what_concerns_everybody() -> None:
    ledger = Ledger("example", DELTA, used(10))
    for turn in range(3):
        ledger.spend(f"turn {turn}", PLAIN, 2, holder="ann")
        ledger.spend(f"turn {turn}", PLAIN, 1, holder="ben")  # the same id at another client is another release
    assert ledger.spent("ann").epsilon == pytest.approx(used(6)) == ledger.spent().epsilon
    assert ledger.spent("ben").epsilon == pytest.approx(used(3)) and ledger.spent("cid").epsilon == 0
    ledger.spend("statistics", PLAIN, 3)
    assert [ledger.spent(h).epsilon for h in ("ann", "ben", "cid", None)] == pytest.approx(
        [used(9), used(6), used(3), used(9)]
    )
    assert not ledger.may("more", PLAIN, 2, "ann") and ledger.may("more", PLAIN, 2, "ben")
    assert not ledger.may("more", PLAIN, 2)  # everybody's, and so ann's too
    assert ledger.left(PLAIN, "ann") == 1 and ledger.left(PLAIN, "ben") == 4 and ledger.left(PLAIN) == 1


@counted
def test_the_worst_holder_is_found_whatever_the_rates() -> None:
    ledger = Ledger("example", DELTA)
    turns = {"a": (0.01, 40), "b": (0.05, 10), "c": (0.05, 12), "d": (0.002, 60)}
    for name, (rate, steps) in turns.items():
        ledger.spend("turn", Sampled(1.0, rate), steps, name)
    assert ledger.spent().epsilon == max(ledger.spent(name).epsilon for name in turns)


@counted
def test_how_many_more() -> None:
    ledger = Ledger("client", DELTA, (used(20) + used(21)) / 2)
    assert ledger.left(PLAIN) == 20
    ledger.spend("x", PLAIN, 7)
    assert ledger.left(PLAIN) == 13 and ledger.left(Sampled(0.01)) == 0 and ledger.left(Sampled(1e9)) is None
    assert Ledger("client", DELTA).left(PLAIN) is None


def test_without_noise_there_is_no_promise() -> None:
    assert not Ledger("client", DELTA, 100.0).may("x", Sampled(0.0))
    free = Ledger("client", DELTA)
    free.spend("x", Sampled(0.0))
    assert free.spent().epsilon == math.inf and "infinite" in free.summary()
    assert through_json(free) == free


@counted
def test_the_lines_for_people() -> None:
    ledger = Ledger("client", DELTA, 8.0, 100, assumptions("client", SAMPLED))
    assert ledger.summary() == "epsilon 0 of 8 (delta 1e-05, per client), 0 releases."
    ledger.spend("rounds", SAMPLED, 50)
    assert ledger.summary() == "epsilon 5.15 of 8 (delta 1e-05, per client), 50 releases."
    report = ledger.report()
    assert "5.89" in report and "one client more or less" in report and "probability 0.1" in report
    assert report.count("\n- ") == len(ledger.assumptions) >= 6


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Sampled(1.0, 0.25), "probability 0.25"),
        (FixedSize(1.0, 3, 10), "drew 3 of 10 without replacement"),
        (TreeRun(1.0, 8, 2, 3), "more than 2 times in a tree of 8"),
    ],
)
def test_assumptions_are_sentences(event: Any, words: str) -> None:
    said = assumptions("example", event, noised_by="client", seeded=True, adaptive=True)
    assert any(words in sentence for sentence in said) and all(s[0].isupper() and s.endswith(".") for s in said)
    text = " ".join(said)
    assert "run's seed" in text and "Clients add the noise" in text and "each example" in text
    assert "secret key" in " ".join(assumptions("client", event))
    assert not any("probability" in s for s in assumptions("client", Sampled(1.0)))


def test_a_ledger_refuses_what_cannot_be() -> None:
    for options, why in (
        ({"unit": "user"}, "unit of privacy"),
        ({"delta": 0.0}, "delta"),
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"delta": 0.01, "units": 100}, "100 protected units"),
    ):
        with pytest.raises(ConfigError, match=why):
            Ledger(**{"unit": "client", "delta": DELTA, **options})
    ledger = Ledger("client", DELTA)
    with pytest.raises(ConfigError, match="0 times"):
        ledger.spend("x", PLAIN, 0)
    ledger.spend("x", FixedSize(1.0, 3, 10))
    with pytest.raises(ConfigError, match="fixed size"):
        ledger.may("y", SAMPLED)
    with pytest.raises(ConfigError, match="fixed size"):
        ledger.spend("y", SAMPLED)


def test_a_damaged_ledger_is_not_taken_for_an_empty_one() -> None:
    ledger = Ledger("client", DELTA, 8.0, 100, ("So.",))
    ledger.spend("a", PLAIN, 1, "ann") if importlib.util.find_spec("dp_accounting") else None
    good = ledger.to_json()
    bad: list[Any] = [None, [], {}, {**good, "version": 2}, {**good, "delta": "x"}, {**good, "unit": "user"}]
    bad += [{k: v for k, v in good.items() if k != name} for name in good]
    event = [{"kind": "sampled", "noise": 5.0, "rate": 1.0}]
    spent_lists = [[["a", "", 1, 1]], [["a", "", -1, 1]], [["a", "", 0, 0]], [["a", "", 0, True]], [["a", "", 0]]]
    spent_lists += [[["a", "", 0, 1], ["a", "", 0, 1]], [["a", "", "0", 1]]]
    bad += [{**good, "events": event, "spent": listed} for listed in spent_lists]
    bad += [{**good, "events": [{"kind": "nothing"}]}]
    for facts in bad:
        with pytest.raises(RunError):
            Ledger.from_json(facts)


def test_settings_say_what_is_wrong() -> None:
    assert PrivacySettings(epsilon=8.0).noise is None and PrivacySettings(noise=0.0).epsilon is None
    assert PrivacySettings(noise=1.0, adaptive=AdaptiveSettings(noise=5.0)).adaptive is not None
    assert PrivacySettings(mechanism="ftrl", noise=5.0, tree=TreeSettings(restart=16)).tree.complete
    for options, why in (
        ({}, "neither privacy.epsilon nor privacy.noise"),
        ({"epsilon": 8.0, "noise": 0.0}, "no epsilon holds"),
        ({"epsilon": 8.0, "level": "example", "adaptive": {}}, "privacy.level=client"),
        ({"epsilon": 8.0, "level": "example", "mechanism": "ftrl"}, "privacy.level=client"),
        ({"epsilon": 8.0, "mechanism": "ftrl", "adaptive": {}}, "privacy.mechanism=gaussian"),
        ({"epsilon": 8.0, "mechanism": "ftrl", "rate": 0.1}, "privacy.rate has no meaning"),
        ({"epsilon": 8.0, "mechanism": "ftrl", "sampling": "fixed"}, "privacy.sampling has no meaning"),
        ({"epsilon": 8.0, "tree": {"restart": 4}}, "privacy.tree has no meaning"),
        ({"epsilon": 8.0, "sampling": "fixed", "adaptive": {}}, "privacy.sampling=poisson"),
        ({"noise": 2.0, "adaptive": {"noise": 1.0}}, "spend more than all"),
        ({"epsilon": -1.0}, "privacy.epsilon=-1"),
        ({"epsilon": 8.0, "delta": 1.0}, "privacy.delta=1"),
        ({"epsilon": 8.0, "clip": 0.0}, "privacy.clip=0"),
        ({"epsilon": 8.0, "rate": 1.5}, "privacy.rate=1.5"),
        ({"epsilon": math.nan}, "privacy.epsilon=nan"),
        ({"epsilon": 8.0, "levl": "example"}, "Did you mean 'privacy.level'"),
        ({"epsilon": 8.0, "level": "record"}, "privacy.level='record'"),
    ):
        with pytest.raises(ConfigError, match=why):
            read(PrivacySettings, options, "privacy")


def test_every_setting_is_described() -> None:
    for kind in (PrivacySettings, AdaptiveSettings, TreeSettings):
        assert all(field.description for field in kind.model_fields.values())

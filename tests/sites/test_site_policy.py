"""A site's policy: it allows nothing by default, and each rule holds on both sides of its bound."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm.core.errors import ConfigError
from fedllm.sites.audit import AuditLog, Digest, read
from fedllm.sites.manifest import Manifest
from fedllm.sites.policy import Decision, Egress, Policy, PolicyRefused

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
FULL: dict[str, Any] = {
    "site": "site-1",
    "coordinators": ["admin@hub.org"],
    "methods": ["fedavg", "fedprox"],
    "purposes": ["quality of care", "research"],
    "data_sets": ["notes", "letters"],
    "max_rounds": 10,
    "max_clients": 3,
    "hours": "always",
    "ops": ["work", "evaluate"],
    "parts": ["update", "header"],
    "max_egress_run": 1000,
    "max_egress_round": 400,
}
RECIPE: dict[str, Any] = {"rounds": 10, "method": {"name": "fedavg"}}


def policy(tmp_path: Path, **rules: Any) -> Policy:
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({**FULL, **rules}))
    return Policy.of(file)


def run(recipe: Mapping[str, Any] = {}, **given: Any) -> Manifest:
    values: dict[str, Any] = {
        "run": "run-1",
        "coordinator": "admin@hub.org",
        "purpose": "research",
        "data_sets": ["notes"],
        "model": {"name": "tiny", "fingerprint": "ab" * 32, "licence": "mit"},
        "members": ["site-1", "site-2", "site-3"],
        "quorum": 2,
        "created": NOON,
    }
    return Manifest.of({**RECIPE, **recipe}, **{**values, **given})


def refused(decision: Decision, *words: str) -> None:
    assert not decision.allowed and decision.word == "refused"
    for word in words:
        assert word in decision.reason, decision.reason
    with pytest.raises(PolicyRefused):
        decision.require()


def allowed(decision: Decision) -> None:
    assert decision.allowed and decision.word == "allowed" and decision.reason == "", decision.reason
    decision.require()


# --- deny by default -------------------------------------------------------------------------------------------------


def test_an_empty_policy_allows_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("# nothing yet\n")
    empty = Policy.of(tmp_path / "policy.yaml")
    assert empty == Policy()
    refused(empty.admits(run(), NOON))
    rules = " ".join(str(fault) for fault in empty.refusals(run(), NOON))
    for rule in ("coordinators", "purposes", "data_sets", "methods", "hours", "max_rounds", "max_clients"):
        assert f"policy.{rule}" in rules
    refused(empty.answers("work", 0, NOON), "policy.ops: none.")
    refused(empty.lets_out(Egress(), {"update": 1}, 0, NOON), "policy.parts: none.")
    refused(empty.lets_out(Egress(), {}, 0, NOON), "policy.hours: none.")


def test_the_full_policy_allows_what_it_says(tmp_path: Path) -> None:
    full = policy(tmp_path)
    allowed(full.admits(run(), NOON))
    allowed(full.answers("work", 10, NOON))
    allowed(full.lets_out(Egress(), {"update": 300, "header": 100}, 10, NOON))
    assert full.refusals(run(), NOON) == []


@pytest.mark.parametrize("rule", [name for name in FULL if name != "site"])
def test_each_rule_left_out_refuses_something(tmp_path: Path, rule: str) -> None:
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({k: v for k, v in FULL.items() if k != rule}))
    less = Policy.of(tmp_path / "policy.yaml")
    decisions = [
        less.admits(run(), NOON),
        less.answers("work", 1, NOON),
        less.lets_out(Egress(), {"update": 1, "header": 1}, 1, NOON),
    ]
    assert any(f"policy.{rule}" in decision.reason for decision in decisions)


# --- who, what, how much ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "recipe", "rule", "value"),
    [
        ({"coordinator": "eve@hub.org"}, {}, "coordinators", "eve@hub.org"),
        ({"purpose": "marketing"}, {}, "purposes", "marketing"),
        ({"purpose": "Research"}, {}, "purposes", "Research"),
        ({"data_sets": ["notes", "letter"]}, {}, "data_sets", "letter"),
        ({}, {"method": {"name": "fedavgm"}}, "methods", "fedavgm"),
        ({"members": ["site-2", "site-3"]}, {}, "", "site-1"),
        ({}, {"rounds": 11}, "max_rounds", "11"),
        ({"members": ["site-1", "site-2", "site-3", "site-4"]}, {}, "max_clients", "4"),
        ({}, {"attack": {"name": "noise"}}, "attacks", "attack"),
        ({}, {"model": {"trust_remote_code": True}}, "remote_code", "trust_remote_code"),
        ({}, {"groups": {"big": {"model": {"trust_remote_code": True}}}}, "remote_code", "trust_remote_code"),
    ],
)
def test_a_run_that_breaks_one_rule_is_refused_by_that_rule(
    tmp_path: Path, given: dict[str, Any], recipe: dict[str, Any], rule: str, value: str
) -> None:
    full = policy(tmp_path)
    assert len(full.refusals(run(recipe, **given), NOON)) == 1
    refused(full.admits(run(recipe, **given), NOON), f"policy.{rule}" if rule else "members", value)


def test_a_refusal_has_four_parts(tmp_path: Path) -> None:
    fault = policy(tmp_path).admits(run(purpose="researches"), NOON).fault
    assert fault is not None
    assert fault.given == "The purpose 'researches' is not allowed at this site."
    assert fault.allowed == "policy.purposes: quality of care, research." and fault.nearest == "research"
    assert "policy.purposes" in fault.action


def test_all_refusals_are_listed_at_once(tmp_path: Path) -> None:
    faults = policy(tmp_path).refusals(run({"rounds": 99}, purpose="x", coordinator="y"), NOON)
    assert [fault.allowed.split(":")[0] for fault in faults] == [
        "policy.coordinators",
        "policy.purposes",
        "policy.max_rounds",
    ]


def test_what_is_switched_on_is_allowed(tmp_path: Path) -> None:
    open_policy = policy(tmp_path, attacks=True, remote_code=True)
    allowed(open_policy.admits(run({"attack": {"name": "noise"}, "model": {"trust_remote_code": True}}), NOON))
    allowed(policy(tmp_path).admits(run({"attack": {}, "model": {"trust_remote_code": False}}), NOON))


def test_a_policy_without_a_name_does_not_look_for_it(tmp_path: Path) -> None:
    allowed(policy(tmp_path, site=None).admits(run(members=["site-2"], quorum=1), NOON))


# --- how long a signature is good -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "days"), [({}, 90), ({"max_age": 1}, 1), ({"max_age": 400}, 400)])
def test_a_run_is_taken_for_so_many_days_after_it_was_signed(tmp_path: Path, rules: dict[str, Any], days: int) -> None:
    aged, second = policy(tmp_path, **rules), timedelta(seconds=1)
    allowed(aged.admits(run(), NOON + timedelta(days=days)))
    late = aged.admits(run(), NOON + timedelta(days=days) + second)
    refused(late, f"policy.max_age: at most {days} days.", "signed on 2026-03-01", "fedllm deploy resume run-1")
    allowed(aged.admits(run(), NOON - timedelta(days=1)))
    refused(aged.admits(run(), NOON - timedelta(days=1) - second), "policy.max_age", "from now", "Set the clock")
    assert f"A run was signed no more than {days} days ago." in aged.sentences()


def test_an_age_is_always_bounded(tmp_path: Path) -> None:
    for wrong in (0, None, "always", 10**12):
        with pytest.raises(ConfigError, match="max_age"):
            policy(tmp_path, max_age=wrong)


def test_methods_beside_that_of_the_manifest(tmp_path: Path) -> None:
    full = policy(tmp_path)
    allowed(full.plays("fedprox"))
    refused(full.plays("fedavgm"), "policy.methods", "'fedavgm'")


# --- requests --------------------------------------------------------------------------------------------------------


def test_requests(tmp_path: Path) -> None:
    full = policy(tmp_path)
    for round in (0, 10):
        allowed(full.answers("evaluate", round, NOON))
    refused(full.answers("evaluat", 1, NOON), "policy.ops", "'evaluat'", "Did you mean 'evaluate'")
    refused(full.answers("work", 11, NOON), "policy.max_rounds", "11")
    with pytest.raises(ConfigError, match="round -1"):
        full.answers("work", -1, NOON)


def test_one_run_has_no_more_rounds_than_its_manifest(tmp_path: Path) -> None:
    full = policy(tmp_path)
    short = full.during(run({"rounds": 4}))
    allowed(short.answers("work", 4, NOON))
    refused(short.answers("work", 5, NOON), "at most 4")
    refused(short.lets_out(Egress(), {"header": 1}, 5, NOON), "at most 4")
    refused(full.during(run({"rounds": 40})).answers("work", 11, NOON), "at most 10")


# --- what leaves -----------------------------------------------------------------------------------------------------


def test_egress_at_its_bounds(tmp_path: Path) -> None:
    full = policy(tmp_path)
    allowed(full.lets_out(Egress(), {"update": 300, "header": 100}, 1, NOON))
    refused(full.lets_out(Egress(), {"update": 301, "header": 100}, 1, NOON), "policy.max_egress_round", "401")
    before = Egress({1: 400, 2: 300})
    allowed(full.lets_out(before, {"update": 100}, 2, NOON))
    refused(full.lets_out(before, {"update": 101}, 2, NOON), "policy.max_egress_round", "401")
    allowed(full.lets_out(before, {"update": 300}, 3, NOON))
    refused(full.lets_out(before, {"update": 301}, 3, NOON), "policy.max_egress_run", "1,001")


def test_a_part_that_is_not_listed_stays(tmp_path: Path) -> None:
    full = policy(tmp_path)
    refused(full.lets_out(Egress(), {"update": 1, "personal": 0, "header": 1}, 1, NOON), "policy.parts", "'personal'")
    refused(full.lets_out(Egress(), {"update": 1, "Update": 1}, 1, NOON), "'Update'", "Did you mean 'update'")
    with pytest.raises(ConfigError, match="sizes"):
        full.lets_out(Egress(), {"update": 500, "header": -200}, 1, NOON)


@pytest.mark.parametrize("seed", range(20))
def test_no_sequence_of_uploads_passes_the_bounds(tmp_path: Path, seed: int) -> None:
    rng, full = random.Random(seed), policy(tmp_path)
    left, plain = Egress(), dict[int, int]()
    for _ in range(100):
        round, size = rng.randrange(1, 6), rng.randrange(200)
        fits = plain.get(round, 0) + size <= 400 and sum(plain.values()) + size <= 1000
        decision = full.lets_out(left, {"update": size}, round, NOON)
        assert decision.allowed == fits
        if fits:
            left = left.plus(round, size)
            plain[round] = plain.get(round, 0) + size
    assert left.rounds == plain and left.total == sum(plain.values()) <= 1000


def test_egress_is_found_again_in_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        for round, size, run_id, action, decision in [
            (1, 10, "run-1", "send", "allowed"),
            (1, 5, "run-1", "send", None),
            (2, 7, "run-1", "send", "allowed"),
            (2, 100, "run-1", "send", "refused"),
            (2, 100, "run-1", "receive", None),
            (2, 100, "run-2", "send", "allowed"),
        ]:
            log.append("site-1", action, run=run_id, round=round, payload=Digest.of(b"x" * size), decision=decision)  # type: ignore[arg-type]
    assert Egress.of(read(path), "run-1") == Egress({1: 15, 2: 7})
    assert Egress.of(read(path), "run-3").total == 0


def test_a_decision_goes_into_the_audit_log(tmp_path: Path) -> None:
    decision = policy(tmp_path).admits(run(purpose="marketing"), NOON)
    with AuditLog(tmp_path / "audit.jsonl") as log:
        entry = log.append("site-1", "manifest", run="run-1", decision=decision.word, reason=decision.fault)
    assert entry.decision == "refused" and "marketing" in (entry.reason or "")


# --- hours -----------------------------------------------------------------------------------------------------------


def at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-03-01T{clock}+00:00")


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        (["09:00-17:00"], ["09:00:00", "16:59:59.999999"], ["08:59:59.999999", "17:00:00", "00:00:00"]),
        (["18:00-06:00"], ["18:00:00", "23:59:59.999999", "00:00:00", "05:59:59.999999"], ["06:00:00", "17:59:59"]),
        (["23:59-00:01"], ["23:59:00", "00:00:59.999999"], ["23:58:59", "00:01:00"]),
        (["22:00-24:00"], ["22:00:00", "23:59:59.999999"], ["00:00:00", "21:59:59"]),
        (["22:00-00:00"], ["22:00:00", "23:59:59.999999"], ["00:00:00", "21:59:59"]),
        (["00:00-06:00"], ["00:00:00", "05:59:59"], ["06:00:00", "23:59:59.999999"]),
        (["00:00-24:00"], ["00:00:00", "23:59:59.999999"], []),
        (["06:00-07:00", "12:00-13:00"], ["06:30:00", "12:30:00"], ["07:00:00", "11:59:59"]),
    ],
)  # fmt: skip
def test_windows(tmp_path: Path, hours: list[str], inside: list[str], outside: list[str]) -> None:
    timed = policy(tmp_path, hours=hours)
    for clock in inside:
        allowed(timed.admits(run(), at(clock)))
        allowed(timed.answers("work", 1, at(clock)))
        allowed(timed.lets_out(Egress(), {"update": 1}, 1, at(clock)))
    for clock in outside:
        refused(timed.admits(run(), at(clock)), "policy.hours", hours[0], clock[:5])
        refused(timed.answers("work", 1, at(clock)), "policy.hours")
        refused(timed.lets_out(Egress(), {"update": 1}, 1, at(clock)), "policy.hours")


@pytest.mark.parametrize("seed", range(30))
def test_windows_against_a_walk_through_the_minutes(tmp_path: Path, seed: int) -> None:
    """A window is the minutes that are passed on the way from its first to its last."""
    rng = random.Random(seed)
    first, last = rng.sample(range(24 * 60), 2)
    open_minutes, minute = set[int](), first
    while minute != last:
        open_minutes.add(minute)
        minute = (minute + 1) % (24 * 60)
    text = f"{first // 60:02}:{first % 60:02}-{last // 60:02}:{last % 60:02}"
    timed = policy(tmp_path, hours=[text])
    midnight = datetime(2026, 3, 28, tzinfo=UTC)
    assert {m for m in range(24 * 60) if timed.open(midnight + timedelta(minutes=m))} == open_minutes


def test_times_of_other_zones_are_turned_into_utc(tmp_path: Path) -> None:
    timed = policy(tmp_path, hours=["18:00-06:00"])
    tokyo = timezone(timedelta(hours=9))
    assert timed.open(datetime(2026, 3, 2, 3, 0, tzinfo=tokyo))  # 18:00 UTC
    assert not timed.open(datetime(2026, 3, 2, 2, 59, tzinfo=tokyo))
    with pytest.raises(ConfigError, match="no time zone"):
        timed.admits(run(), datetime(2026, 3, 1, 20, 0))


@pytest.mark.parametrize(
    "window",
    ["", "9:00-17:00", "09:00", "09:00-17:60", "24:00-06:00", "00:00-24:01", "25:00-26:00", "09:00-09:00", "night",
     "09:00-17:00 ", "09:00–17:00"],
)  # fmt: skip
def test_windows_that_mean_nothing_are_refused(tmp_path: Path, window: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.hours") as caught:
        policy(tmp_path, hours=["08:00-09:00", window])
    assert (caught.value.nearest == "00:00-24:00") == (window == "09:00-09:00")


# --- required modes --------------------------------------------------------------------------------------------------

DP = {"level": "example", "epsilon": 8.0, "delta": 1e-5, "noise": 1.0, "clip": 1.0}


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "named"),
    [
        ({}, DP, None, "privacy"),
        ({}, DP, {**DP, "noise": 0, "epsilon": None}, "privacy.noise=0"),
        ({}, DP, {**DP, "key": "seed"}, "privacy.key=seed"),
        ({"level": "example"}, DP, {**DP, "level": "client"}, "privacy.level=client"),
        ({"level": "client"}, {**DP, "level": "client"}, DP, "privacy.level=example"),
        ({"max_epsilon": 8}, DP, {**DP, "epsilon": 8.001}, "privacy.epsilon=8.001"),
        ({"max_epsilon": 8}, DP, {**DP, "epsilon": None}, "privacy.epsilon=null"),
        ({"max_delta": 1e-5}, DP, {**DP, "delta": 1.1e-5}, "privacy.delta=1.1e-05"),
        ({"min_noise": 1}, DP, {**DP, "noise": 0.999}, "privacy.noise=0.999"),
        ({"min_noise": 1}, DP, {**DP, "noise": None}, "privacy.noise=null"),
        ({"max_clip": 1}, DP, {**DP, "clip": 1.001}, "privacy.clip=1.001"),
        (
            {"max_clip": 1},
            {**DP, "level": "client"},
            {**DP, "level": "client", "adaptive": {"quantile": 0.5}},
            "privacy.adaptive",
        ),
    ],
)
def test_privacy_on_both_sides_of_each_bound(
    tmp_path: Path, rule: dict[str, Any], inside: dict[str, Any], outside: dict[str, Any] | None, named: str
) -> None:
    strict = policy(tmp_path, require={"privacy": rule})
    allowed(strict.admits(run({"privacy": inside}), NOON))
    assert len(strict.refusals(run({"privacy": outside}), NOON)) == 1
    refused(strict.admits(run({"privacy": outside}), NOON), "policy.require.privacy", named)
    allowed(policy(tmp_path).admits(run({"privacy": outside}), NOON))


@pytest.mark.parametrize(
    ("name", "rule", "inside", "outside", "named"),
    [
        ("secure", {"minimum": 5}, {"minimum": 5}, {"minimum": 4}, "secure.minimum=4"),
        ("secure", {"minimum": 5}, {"minimum": 6}, {}, "secure.minimum"),
        ("secure", {}, {"minimum": 3}, None, "secure"),
        ("encrypted", {}, {"ratio": 1.0}, {"ratio": 0.99}, "encrypted.ratio=0.99"),
        ("encrypted", {"min_ratio": 0.2}, {"ratio": 0.2}, {"ratio": 0.19}, "encrypted.ratio=0.19"),
        ("encrypted", {}, {"max_weight": 2.0}, None, "encrypted"),
    ],
)
def test_secure_and_encrypted_on_both_sides(
    tmp_path: Path, name: str, rule: dict[str, Any], inside: dict[str, Any], outside: Any, named: str
) -> None:
    strict = policy(tmp_path, require={name: rule})
    allowed(strict.admits(run({name: inside}), NOON))
    refused(strict.admits(run({name: outside}), NOON), f"policy.require.{name}", named)
    refused(strict.admits(run(), NOON), f"policy.require.{name}")


@pytest.mark.parametrize(
    "given", [{"epsilon": "much"}, {"noize": 1.0}, {"epsilon": 8, "noise": 0}, {"adaptive": {"x": 1}}]
)
def test_a_mode_that_cannot_be_read_is_refused_not_raised(tmp_path: Path, given: dict[str, Any]) -> None:
    refused(policy(tmp_path, require={"privacy": {}}).admits(run({"privacy": given}), NOON), "privacy")


def test_a_required_mode_without_rules_is_not_taken_for_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"require\.privacy is empty.*privacy: \{\}"):
        policy(tmp_path, require={"privacy": None})


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"max_round": 3}, r"policy\.max_round'.*Did you mean 'policy.max_rounds'"),
        ({"require": {"privacy": {"epsilon": 3}}}, r"policy\.require\.privacy\.epsilon.*max_epsilon"),
        ({"require": {"secure": {"minimum": 2}}}, r"policy\.require\.secure\.minimum=2"),
        ({"require": {"privacy": {"max_epsilon": float("inf")}}}, r"max_epsilon"),
        ({"require": {"privacy": {"level": "user"}}}, r"level"),
        ({"max_rounds": -1}, r"policy\.max_rounds=-1"),
        ({"max_egress_run": "all"}, r"policy\.max_egress_run"),
        ({"methods": "fedavg"}, r"policy\.methods"),
        ({"methods": {"fedavg": True}}, r"policy\.methods"),
        ({"purposes": [False]}, r"policy\.purposes"),
        ({"hours": "never"}, r"policy\.hours"),
        ({"parts": ["update"]}, r"policy\.parts=update lacks 'header'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, rules: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        policy(tmp_path, **rules)
    assert "recipe" not in caught.value.action and caught.value.action


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_rounds: 3\nmax_rounds: 300\n", r"line 2.*'max_rounds' stands twice"),
        ("require:\n  privacy: {max_epsilon: 1, max_epsilon: 9}\n", r"line 2.*stands twice"),
        ("- fedavg\n", "holds a list"),
        ("methods: [fedavg\n", "cannot be read"),
        ("methods: !!python/object:os.system x\n", "cannot be read"),
        ("\x00", "cannot be read"),
        ("[a, b]: 1\n", "cannot be read"),
    ],
)
def test_files_that_are_no_policy_are_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        Policy.of(tmp_path / "policy.yaml")


def test_a_missing_file_is_an_error_and_not_an_empty_policy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        Policy.of(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"purposes: [\xe4]\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read"):
        Policy.of(tmp_path / "latin.yaml")


def test_a_policy_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        policy(tmp_path).max_rounds = 99  # type: ignore[misc]


# --- in words --------------------------------------------------------------------------------------------------------


def test_sentences_say_what_it_allows(tmp_path: Path) -> None:
    require = {"privacy": {"level": "example", "max_epsilon": 8, "min_noise": 0.5}, "secure": {"minimum": 5}}
    text = "\n".join(policy(tmp_path, hours=["18:00-06:00"], require=require, max_egress_run=2_500_000).sentences())
    for sentence in (
        "Runs may be started by admin@hub.org.",
        "Purposes: quality of care, research.",
        "A run has at most 10 rounds and 3 members, one of which is site-1.",
        "It works (UTC): 18:00-06:00.",
        "Parts of an upload that may leave: update, header.",
        "At most 400 bytes leave in a round and 2.5 MB in a run.",
        "Differential privacy of each example is required, with epsilon of at most 8 and noise of at least 0.5.",
        "A secure sum of at least 5 clients is required.",
        "Code that comes with a model must not be executed.",
    ):
        assert sentence in text
    assert "Encryption" not in text


def test_sentences_of_a_policy_that_allows_nothing() -> None:
    text = "\n".join(Policy().sentences())
    for sentence in (
        "Runs may be started by nobody.",
        "Methods: none.",
        "It works (UTC): never.",
        "It answers: no request.",
        "No mode is required",
    ):
        assert sentence in text


@pytest.mark.parametrize("rule", [name for name in FULL if name != "site"] + ["require", "attacks", "remote_code"])
def test_each_rule_shows_in_the_sentences(tmp_path: Path, rule: str) -> None:
    other: dict[str, Any] = {
        "require": {"encrypted": {}},
        "attacks": True,
        "remote_code": True,
        "hours": ["01:00-02:00"],
    }
    change = other.get(rule, 77 if isinstance(FULL.get(rule), int) else ["header", "another"])
    assert policy(tmp_path, **{rule: change}).sentences() != policy(tmp_path).sentences()

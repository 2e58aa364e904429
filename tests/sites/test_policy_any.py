"""The star in a policy: every name in the three rules that know it, and no more than a name in all others."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm.core.errors import ConfigError
from fedllm.sites.manifest import Manifest
from fedllm.sites.policy import ANY, OPEN, Egress, Policy

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
RULES: dict[str, Any] = {
    "coordinators": ["ada@hub.org"],
    "methods": ["fedavg"],
    "purposes": ["research"],
    "data_sets": ["notes"],
    "max_rounds": 3,
    "max_clients": 2,
    "hours": "always",
    "ops": ["work"],
    "parts": ["header"],
    "max_egress_run": 100,
    "max_egress_round": 100,
}


def policy(folder: Path, **rules: Any) -> Policy:
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump({**RULES, **rules}), encoding="utf-8")
    return Policy.of(file)


def run(method: str = "fedavg", **given: Any) -> Manifest:
    values: dict[str, Any] = {
        "run": "r",
        "coordinator": "ada@hub.org",
        "purpose": "research",
        "data_sets": ["notes"],
        "model": {"name": "tiny", "fingerprint": None, "licence": None},
        "members": ["north"],
        "quorum": 1,
        "created": NOON,
    }
    return Manifest.of({"rounds": 3, "method": {"name": method}}, **{**values, **given})


def test_the_rules_that_know_it() -> None:
    assert ANY == "*" and set(OPEN) == {"methods", "ops", "parts"}


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "a-plugin.of/mine"])
def test_it_allows_every_method(method: str, tmp_path: Path) -> None:
    assert policy(tmp_path, methods=["*"]).admits(run(method), NOON).allowed
    assert policy(tmp_path, methods=["fedprox", "*"]).admits(run(method), NOON).allowed
    assert not policy(tmp_path, methods=["fedprox"]).admits(run(method), NOON).allowed


def test_it_is_no_pattern(tmp_path: Path) -> None:
    for rule in ("fed*", "**", " *", "*avg"):
        found = policy(tmp_path, methods=[rule]).admits(run(), NOON)
        assert not found.allowed and "policy.methods" in found.reason, rule


def test_it_allows_every_function_and_every_part_within_the_other_bounds(tmp_path: Path) -> None:
    opened, closed = policy(tmp_path, ops=["*"], parts=["*"]), policy(tmp_path)
    for op in ("work", "evaluate", "score_words"):
        assert opened.answers(op, 3, NOON).allowed
        assert closed.answers(op, 3, NOON).allowed == (op == "work")
    assert not opened.answers("work", 4, NOON).allowed, "rounds are counted as before"
    for parts in ({"header": 1}, {"header": 1, "update": 99}, {"secret": 100}):
        assert opened.lets_out(Egress(), parts, 1, NOON).allowed
        assert closed.lets_out(Egress(), parts, 1, NOON).allowed == (set(parts) == {"header"})
    assert "policy.max_egress_round" in opened.lets_out(Egress(), {"secret": 101}, 1, NOON).reason


@pytest.mark.parametrize("rule", ["coordinators", "purposes", "data_sets"])
def test_elsewhere_it_allows_nobody(rule: str, tmp_path: Path) -> None:
    """Who may start a run, for what and over which data is said by name."""
    found = policy(tmp_path, **{rule: ["*"]}).admits(run(), NOON)
    assert not found.allowed and f"policy.{rule}: *" in found.reason


@pytest.mark.parametrize("rule", ["max_rounds", "max_clients", "max_egress_run"])
def test_a_bound_is_a_number(rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        policy(tmp_path, **{rule: "*"})


def test_it_is_said_in_plain_words(tmp_path: Path) -> None:
    said = policy(tmp_path, methods=["*"]).sentences()
    assert "Methods: *." in said

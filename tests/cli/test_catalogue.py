"""methods, explain, verify, recipes: what they say is what the classes and settings say."""

from __future__ import annotations

import os
import time

import pytest

from fedllm.cli import complete
from fedllm.cli.catalogue import MARKS, entries
from fedllm.cli.options import as_yaml, options, recipe_options
from fedllm.core.errors import ConfigError
from fedllm.core.train import Train
from fedllm.effects import Evidence, verify, verify_all
from fedllm.methods import methods
from fedllm.protocols import protocols
from tests.cli.lines import as_json, invoke, ok


def test_the_map_has_every_method_once_under_its_topic():
    found = as_json("methods")
    assert sorted(one["key"] for one in found) == sorted([*methods(), *protocols()])
    assert {one["key"]: one["topic"] for one in found}["fedprox"] == "Baselines (2.4, 2.5)"
    topics = [one["topic"] for one in found]
    assert [t for n, t in enumerate(topics) if n == 0 or topics[n - 1] != t] == list(dict.fromkeys(topics))
    central = next(one for one in found if one["key"] == "central")
    assert central["simulation_only"] and central["linear"] is True


def test_the_map_is_printed_with_marks():
    text = ok("methods").stdout
    rows = {one["key"]: one for one in entries()}
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[1] in rows:
            assert words[0] in MARKS[rows.pop(words[1])["status"]]
    assert not rows


def test_keys_offered_by_the_shell_are_those_that_exist():
    found = {**methods(), **protocols()}
    assert set(complete.keys()) == {key for key, kind in found.items() if kind.__module__.startswith("fedllm.")}


def test_a_method_is_explained_with_card_options_and_privacy():
    facts = as_json("explain", "scaffold")
    assert facts["card"]["paper"].endswith("1910.06378") and facts["private"] == ["control"]
    assert facts["train"] == {"clip_norm": "null", "optimizer": "sgd", "lr": "0.1"}
    assert {one["name"] for one in facts["options"]} == {"method.weighting", "method.option", "method.server_lr"}
    assert facts["linear"] is True and facts["client_functions"] == ["evaluate", "evaluate_base", "work"]
    text = ok("explain", "scaffold").stdout
    assert "Global step size. (number > 0)" in text and "train.optimizer=sgd" in text


def test_every_method_can_be_explained():
    for key in [*methods(), *protocols()]:
        assert as_json("explain", key)["key"] == key


def test_every_option_of_a_recipe_is_listed_with_type_default_and_text():
    found = {one.name: one for one in recipe_options()}
    assert found["train.lr"].default == "0.001" and found["train.lr"].type == "number > 0"
    assert found["data.partition.by"].type.startswith("iid | natural")
    assert found["evaluation.against"].default == "[base, local, central]"
    assert found["deadline"].type == "number > 0 | null" and found["deadline"].default == "null"
    assert found["train.betas"].type == "list of number >= 0, < 1"
    assert "train" not in found and "method" in found
    assert [name for name, one in found.items() if not one.about] == []
    assert {one["name"] for one in as_json("explain", "recipe")["options"]} == set(found)


@pytest.mark.parametrize(
    ("place", "first", "count"),
    [("recipe.train", "train.steps", len(list(options(Train)))), ("train.lr", "train.lr", 1)],
)
def test_a_place_in_a_recipe_is_explained(place, first, count):
    found = as_json("explain", place)["options"]
    assert found[0]["name"] == first and len(found) == count


@pytest.mark.parametrize(
    ("place", "near"),
    [
        ("fedpox", "fedprox"),
        ("recipe.trian", "train"),
        ("recipe.data.partition.alfa", "data.partition.alpha"),
        ("recipe.train.lrr", "train.lr"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(place, near):
    result = invoke("explain", place)
    assert result.exit_code == 2 and f"Did you mean '{near}'?" in result.stderr


def test_an_option_of_a_method_is_asked_of_the_method():
    result = invoke("explain", "recipe.method.mu")
    assert result.exit_code == 2 and "explain KEY" in result.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (0.001, "0.001"), (1e-8, "1e-08"), ((1, 2), "[1, 2]"), ({}, "{}"), (True, "true")],
)
def test_defaults_are_written_as_in_a_recipe(value, text):
    assert as_yaml(value) == text


def test_verify_prints_claim_beside_measurement_and_leaves_with_1_where_it_fails(monkeypatch):
    import fedllm.effects
    from fedllm.effects import Evidence

    kept = fedllm.effects.verify
    monkeypatch.setattr("fedllm.effects.checks", lambda: ["a", "b"])
    passed = {"a": True, "b": False}
    monkeypatch.setattr(
        "fedllm.effects.verify", lambda key: Evidence(key, "More.", "It was 3.", passed[key], {"x": 3.0})
    )
    shown = invoke("verify", "--all", "--jobs", "1")
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[:3] == ["a: shown (0.0 s)", "  claim     More.", "  measured  It was 3."]
    assert "b: NOT shown" in shown.stdout
    assert [one["passed"] for one in as_json("verify", "a")] == [True]
    monkeypatch.setattr("fedllm.effects.verify", kept)
    missing = invoke("verify", "c")
    assert missing.exit_code == 2 and "There is no effect check" in missing.stderr


def checked(key: str) -> Evidence:
    """A check that another process can find; the first key takes longest."""
    if key == "wrong":
        verify(key)
    time.sleep(1.0 if key == "a" else 0.0)
    return Evidence(key, "", os.environ["OMP_NUM_THREADS"], True, {"process": float(os.getpid())})


def test_checks_run_side_by_side_in_the_order_of_their_keys():
    found = list(verify_all(["a", "b", "c"], 2, checked))
    assert [evidence.key for evidence in found] == ["a", "b", "c"] and {one.measured for one in found} == {"1"}
    assert len({one.numbers["process"] for one in found} - {float(os.getpid())}) == 2
    with pytest.raises(ConfigError, match="There is no effect check"):
        list(verify_all(["a", "wrong"], 2, checked))


def test_recipes_are_listed_with_what_they_are_about():
    found = {one["name"]: one for one in as_json("recipes")}
    assert found["quickstart"]["about"] and list(found) == complete.bundled_recipes()
    assert "quickstart" in ok("recipes").stdout

"""doctor: what is missing and what a recipe needs, without a run."""

from __future__ import annotations

import json
import sys

import pytest

from fedllm.cli import doctor
from tests.cli.lines import as_json, invoke, ok


def findings(*args):
    """name -> finding; the last one of a name."""
    return {one["name"]: one for one in as_json("doctor", *args)["findings"]}


def test_the_machine_alone():
    found = findings()
    assert {"fedllm", "libraries", "device", "memory", "disk", "files"} <= set(found)
    assert found["libraries"]["verdict"] == "ok" and "torch" in found["libraries"]["text"]
    assert "fedllm-tiny" in found["files"]["text"]
    assert "libraries" in ok("doctor").stdout


def test_a_recipe_with_its_memory_bytes_time_and_disk(place):
    found = findings(place.recipe)
    assert all(found[name]["verdict"] == "ok" for name in ("recipe", "data", "model", "memory needed", "bytes", "time"))
    assert "3 clients, 3 per round; 33 training rows, 3 held out" in found["data"]["text"]
    events = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    rounds = [one for one in events if one["event"] == "round" and one["model"] == "federated"]
    up, down = rounds[0]["bytes_up"], rounds[0]["bytes_down"]
    assert found["bytes"]["text"].startswith(f"{up / 1000:.1f} kB up and {down / 1000:.1f} kB down per round")
    assert sorted(file.name for file in place.folder.glob("runs/*")) == ["tiny"]  # nothing was written


def test_rounds_across_sites_over_a_line(place):
    slow, fast = (
        findings(place.recipe, "--line", line)["across sites"]["text"] for line in ("1mbit,500ms", "1gbit,0ms")
    )
    seconds = [float(text.split()[1]) for text in (slow, fast)]
    assert seconds[0] > seconds[1] + 3 * 2 * 0.5  # three times there and back, at least
    assert "with one client a site and a line of 1 Mbit/s and 500 ms" in slow


@pytest.mark.parametrize("alone", [True, False])
def test_a_site_trains_one_client_and_not_a_pass(place, monkeypatch, alone):
    from fedllm.cli import doctor

    async def tried(ground, most=None):
        if most == 1 and not alone:
            return doctor.Trial(1, 0, 0, 0, 0, 0, "secure sums need three clients")
        return doctor.Trial(1, 2.0, 0.0, 0.0, 10, 10) if most == 1 else doctor.Trial(3, 50.0, 0.0, 0.0, 10, 10)

    monkeypatch.setattr(doctor, "try_rounds", tried)
    text = findings(place.recipe, "--line", "1gbit,0ms")["across sites"]["text"]
    assert ("2.0 s of a round are training" in text) is alone
    assert ("50.0 s of a round are training (of 3 clients in one pass: one alone cannot" in text) is not alone


def test_a_line_without_a_recipe_is_refused():
    for words in (["--line", "20mbit,50ms"], ["x.yaml", "--no-trial", "--line", "20mbit,50ms"]):
        assert "Name a recipe" in invoke("doctor", *words).stderr
    assert "is no line" in invoke("doctor", "--line", "fast").stderr


def test_no_trial_loads_no_model(place, monkeypatch):
    monkeypatch.setattr(sys.modules["fedllm.run"], "prepare", lambda *_: pytest.fail("the model was loaded"))
    found = findings(place.recipe, "--no-trial")
    assert found["model"]["verdict"] == "ok" and "bytes" not in found


@pytest.mark.parametrize(
    ("override", "name", "text"),
    [
        ("method=fedpox", "recipe", "Did you mean 'fedprox'?"),
        ("data.path=rowz.jsonl", "data", "rowz.jsonl"),
        ("model.name=./none", "model", "does not exist"),
        ("cohort=9", "data", "from 1 to 3"),
        ("task.max_length=8", "trial", "A trial round failed"),
    ],
)
def test_what_would_fail_is_a_problem_and_leaves_with_1(place, override, name, text):
    result = invoke("doctor", place.recipe, override, "--json")
    assert result.exit_code == 1
    last = json.loads(result.stdout)["findings"][-1]
    assert (last["name"], last["verdict"]) == (name, "problem") and text in last["text"]
    assert "\u2718" in invoke("doctor", place.recipe, override).stdout


def test_a_client_that_would_be_rejected_is_told(place):
    found = as_json("doctor", place.recipe, "train.lr=1e38", "train.clip_norm=null", "train.optimizer=sgd")["findings"]
    trials = [one for one in found if one["name"] == "trial"]
    assert trials and all(one["verdict"] == "note" and "not finite" in one["text"] for one in trials)


def test_a_model_that_is_not_here_is_not_downloaded(place, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = findings(place.recipe, "model.name=nobody/nothing")
    assert found["model"]["verdict"] == "note" and "would be downloaded" in found["model"]["text"]
    assert "bytes" not in found


def test_too_little_memory_is_a_problem(place, monkeypatch):
    monkeypatch.setattr("fedllm.models.footprint.available_bytes", lambda device: 1_000_000)
    result = invoke("doctor", place.recipe, "--json")
    needed = next(one for one in json.loads(result.stdout)["findings"] if one["name"] == "memory needed")
    assert result.exit_code == 1 and needed["verdict"] == "problem" and "1.0 MB free" in needed["text"]


def test_a_library_outside_its_range_is_a_problem(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["torch>=99", "nothing-like-this>=1"])
    found = doctor._libraries()
    assert found.verdict == "problem"
    assert "torch>=99 is needed" in found.text and "nothing is installed" in found.text


def test_seconds_are_those_of_all_models_rounds_and_measurements():
    from types import SimpleNamespace

    from fedllm.recipe import Recipe

    recipe = Recipe(rounds=4, evaluation={"every": 3, "against": ["base", "local"]})
    federation = SimpleNamespace(client_ids=["a", "b", "c"], size=lambda _: 8)
    ground = SimpleNamespace(federation=federation, measured=["a", "b"])
    tried = doctor.Trial(clients=2, fixed=1.0, step=0.5, measure=0.25, up=1, down=1)
    # 2 models x (4 rounds x 2 passes x (1 + 3 x 0.5) + 2 measurements x 2 clients x 0.25) + the base model
    assert doctor.expected_seconds(recipe, ground, tried, lambda _: 3, 2) == 2 * (4 * 2 * 2.5 + 2 * 0.5) + 0.5

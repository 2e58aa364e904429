"""Observers in real rounds: what they read, what stops them, and that nothing of it is written down."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.attack import siege
from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.work import Gradient
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.modes.observers import observers
from fedllm.tasks.glass import Glass
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath"),
    *("inlet", "jetty", "knoll", "lemon", "maple", "north", "ocean", "pearl"),
)


def data(labels: bool = True, clients: int = 4) -> dict[str, Any]:
    draw = random.Random(0)

    def rows(count: int) -> list[dict[str, Any]]:
        texts = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(count)]
        return [{"text": text, **({"label": draw.randrange(4)} if labels else {})} for text in texts]

    return {f"c{k}": {"train": rows(16), "eval": rows(4)} for k in range(clients)}


def recipe(kind: str = "sequence-classification", **given: Any) -> dict[str, Any]:
    lm = kind == "causal-lm"
    task = {"kind": kind, "max_length": 24, **({"template": "plain", "loss_on": "all"} if lm else {})}
    return {
        "name": "seen", "rounds": 1, "method": "fedavg", "adapter": {"kind": "full"}, "task": task,
        "model": {"name": "toy:gpt2" if lm else "toy:bert"}, "evaluation": {"against": []},
        "train": {"steps": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.1, "clip_norm": None}, **given,
    }  # fmt: skip


def grid(tmp_path: Path, attacked: str, defended: str = "none", **given: Any) -> dict[tuple[str, str], dict[str, Any]]:
    lm = given.get("kind") == "causal-lm"
    names = attacked.split(","), defended.split(",")
    found = siege(recipe(**given), *names, data=data(labels=not lm), folder=tmp_path / "grid")
    return {(row["attack"], row["defence"]): row for row in found.rows}


# -- the attacker's model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_glass_gives_the_gradient_that_a_client_has(kind: Any) -> None:
    loaded = load_model(ModelSettings(name="toy:bert"), "sequence-classification", labels=list("0123"), seed=0)
    task = TaskSettings(kind="sequence-classification", max_length=24)
    learner = TransformerLearner(loaded, task, AdapterSettings(kind=kind), list("0123"), 0)
    rows = [{"text": "amber birch cedar", "label": 0}, {"text": "delta", "label": 3}]
    params = {n: t + 0.01 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in
              learner.initial().items()}  # fmt: skip
    job = Job(Gradient(params, rows=rows), "c", 0, 1, 1, lambda split: [], {}, None, None)
    ((wanted, _),) = run_together(learner, [job])
    glass = Glass(learner, params, {})
    examples = glass.examples(rows)
    found = glass.gradient(examples)
    again = glass.gradient(examples, glass.vectors(examples).requires_grad_(), create_graph=True)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
        if name != glass.table_name:
            assert torch.allclose(again[name].detach(), tensor, atol=1e-5), name
    assert any(tensor.requires_grad for tensor in again.values()), "vectors can be moved by it"
    assert (glass.table_name is not None) == (kind == "full")


# -- classifiers ------------------------------------------------------------------------------------------------------


def test_labels_attributes_and_texts_are_read_from_one_step(tmp_path: Path) -> None:
    options = {"invert-gradients": {"steps": 60, "victims": 2}, "attribute-reconstruction": {"rows": 4, "steps": 40},
               "dlg": {"steps": 6, "victims": 1}}  # fmt: skip
    cells = grid(tmp_path, "reveal-labels,invert-gradients,attribute-reconstruction,dlg", methods=options)
    labels, texts = cells["reveal-labels", "none"], cells["invert-gradients", "none"]
    assert labels["read"]["labels"] == 1.0
    assert cells["attribute-reconstruction", "none"]["success"] == 1.0
    assert cells["attribute-reconstruction", "none"]["clean success"] < 1.0
    assert texts["success"] > texts["clean success"] + 0.1, texts
    assert set(cells["dlg", "none"]["read"]) == set(texts["read"])
    for row in cells.values():
        assert row["attack"] == "none" or (row["score"] is None and row["lost"] is None)
    kept = (tmp_path / "grid" / "attack.json").read_text() + (tmp_path / "grid" / "attack.md").read_text()
    written = "".join(file.read_text() for file in (tmp_path / "grid").glob("read-*.json"))
    assert not any(word in kept + written for word in WORDS), "no text of a client is written down"


def test_noise_pruning_and_secure_sums_take_labels_away_or_blur_them(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    methods = {"local-noise": {"sd": 10.0}, "secure": {"clip": 1000.0, "precision": 24, "max_weight": 16.0},
               "reveal-labels": {"rows": 2, "victims": 4}}  # fmt: skip
    cells = grid(tmp_path, "reveal-labels", "local-noise,secure", methods=methods)
    assert cells["reveal-labels", "none"]["success"] == 1.0
    assert cells["reveal-labels", "local-noise"]["success"] < 0.9
    assert cells["reveal-labels", "secure"]["success"] is not None, "of all clients together, whose labels they are"


def test_what_is_encrypted_is_not_seen(tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    names = ["encrypted-1", "encrypted-50"]
    methods: dict[str, Any] = {
        name: {"name": "encrypted", "ratio": ratio, "max_weight": 16.0}
        for name, ratio in zip(names, (1.0, 0.5), strict=True)
    }
    methods["reveal-labels"] = {"rows": 2, "victims": 2}
    given = {"adapter": {"kind": "head"}, "methods": methods}
    cells = grid(tmp_path, "reveal-labels", ",".join(names), **given)
    assert cells["reveal-labels", "none"]["success"] == 1.0
    half = cells["reveal-labels", "encrypted-50"]
    assert half["success"] is None or half["success"] <= 1.0
    whole = cells["reveal-labels", "encrypted-1"]
    assert whole["success"] is None or whole["read"], "at ratio 1 only the sum is seen"


# -- language models --------------------------------------------------------------------------------------------------


def test_words_are_read_from_the_embedding_unless_it_is_frozen_or_never_travels(tmp_path: Path) -> None:
    options = {"film": {"victims": 2, "phrases": 2, "swaps": 2, "beams": 4}}
    cells = grid(tmp_path, "film", "freeze-embeddings", kind="causal-lm", methods=options)
    assert cells["film", "none"]["read"]["token_recall"] > 0.8
    assert cells["film", "none"]["success"] > cells["film", "none"]["clean success"] + 0.1
    assert cells["film", "freeze-embeddings"]["success"] == 0.0
    lora = grid(tmp_path / "lora", "film", kind="causal-lm", methods=options, adapter={"kind": "lora"})
    assert lora["film", "none"]["success"] == 0.0


def test_corrupted_weights_are_read_and_refused(tmp_path: Path) -> None:
    options = {"decepticons": {"victims": 2, "rows": 2}}
    cells = grid(tmp_path, "decepticons", "integrity", kind="causal-lm", methods=options)
    assert cells["decepticons", "none"]["success"] > 0.4
    assert cells["decepticons", "integrity"]["success"] is None
    assert "refused" in cells["decepticons", "integrity"]["note"]
    assert cells["none", "integrity"]["lost"] == 0.0, "honest weights pass"
    lora = grid(tmp_path / "lora", "decepticons", kind="causal-lm", methods=options, adapter={"kind": "lora"})
    assert lora["decepticons", "none"]["success"] is None and lora["decepticons", "none"]["note"]


# -- around it --------------------------------------------------------------------------------------------------------


def test_every_observer_has_a_card_and_an_interrupted_grid_keeps_what_was_read(tmp_path: Path) -> None:
    assert set(observers()) == {
        "dlg", "invert-gradients", "reveal-labels", "film", "decepticons", "attribute-reconstruction"
    }  # fmt: skip
    first = grid(tmp_path, "reveal-labels")
    file = next((tmp_path / "grid").glob("read-*.json"))
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "success": 0.25}))
    assert grid(tmp_path, "reveal-labels")["reveal-labels", "none"]["success"] == 0.25
    assert first["reveal-labels", "none"]["success"] == 1.0


@pytest.mark.parametrize(
    ("attacked", "given", "match"),
    [
        ("film", {}, "task.kind"),
        ("films", {}, "Did you mean 'film'"),
        ("reveal-labels", {"secure": {"minimum": 3}}, "Move its options to methods.secure"),
        ("reveal-labels", {"methods": {"reveal-labels": {"rows": 0}}}, "rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, attacked: str, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        grid(tmp_path, attacked, "secure", **given)


def test_a_method_that_does_not_go_with_a_column_is_refused_first_and_an_attack_is_a_note(tmp_path: Path) -> None:
    private = {"privacy": {"noise": 0.01, "delta": 0.01, "key": "seed", "clip": 100.0, "rate": 1.0}}
    with pytest.raises(ModeConflict, match="weighting=uniform"):
        grid(tmp_path / "a", "sign-flip", "privacy", methods=private)
    assert not list((tmp_path / "a").rglob("*.safetensors")), "nothing was trained"
    pytest.importorskip("cryptography")
    options = {"secure": {"clip": 1000.0, "precision": 24}}
    method = {"name": "fedavg", "weighting": "uniform"}
    cells = grid(tmp_path / "b", "sign-flip", "secure", methods=options, method=method)
    row = cells["sign-flip", "secure"]
    assert row["score"] is None and "in the open" in row["note"] and cells["none", "secure"]["score"] is not None
    assert row["note"] in (tmp_path / "b" / "grid" / "attack.md").read_text()

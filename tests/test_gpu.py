"""On a GPU: the same numbers as on a CPU, clients that do not meet in a pass, small number types, the command line.

Without a GPU they are skipped. FEDLLM_TEST_DEVICE=cpu plays them on the CPU, to check the tests themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.core.tensors import Tensors, moved
from fedllm.core.train import Train
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalWorker
from fedllm.engine.width import choose
from fedllm.methods import find
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

DEVICE = os.environ.get("FEDLLM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
KINDS = ("lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "full")
GENTLE = Train(steps=3, batch_size=2, lr=1e-2, eps=1e-3)
"""A large eps: AdamW with 1e-8 turns the noise of a gradient that is truly 0 into whole steps."""

PLAIN = Train(steps=3, batch_size=2, lr=1e-2, optimizer="sgd", clip_norm=None)


def rows(client: int, count: int = 6) -> list[dict[str, Any]]:
    """Texts of many lengths."""
    return [
        {"instruction": "count " + "up and down " * ((client + n) % 5), "response": f"{client} {n} " * (1 + n % 3)}
        for n in range(count)
    ]


def learner(
    device: str, kind: str = "lora", model: str | None = None, dtype: Any = "float32", **options: Any
) -> TransformerLearner:
    model = model or ("toy:gpt2" if kind == "bitfit" else "toy:llama")  # a Llama has no biases
    loaded = load_model(ModelSettings(name=model, device=device, dtype=dtype), "causal-lm")
    task = TaskSettings(max_length=96, template="plain", **options.pop("task", {}))
    return TransformerLearner(
        loaded, task, AdapterSettings.model_validate({"kind": kind, "rank": 4, "tokens": 4, **options}), None, seed=1
    )


def played(
    made: TransformerLearner, width: int | None = None, method: str = "fedavg", rounds: int = 2, train: Train = GENTLE
) -> Play:
    data = {f"c{k}": rows(k) for k in range(4)}
    play = Play(find(method)(train=train), made, data, width=width, rounds=rounds)
    play.rounds(rounds)
    assert not any(record.failed or record.lost or record.rejected for record in play.records)
    return play


def distance(left: Tensors, right: Tensors, start: Tensors) -> float:
    """The largest difference, in parts of how far training has gone."""
    gone = max(float((left[n] - start[n]).abs().max()) for n in left)
    return max(float((left[n] - right[n]).abs().max()) for n in left) / gone


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_cpu(kind: str) -> None:
    here, there = learner("cpu", kind), learner(DEVICE, kind)
    start = here.initial()
    assert there.device.type == DEVICE and all(torch.equal(start[n], t) for n, t in there.initial().items())
    width = 1 if kind == "full" else None
    assert distance(played(here, width).state.params, played(there, width).state.params, start) < 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_clients_do_not_meet_in_a_pass(kind: str) -> None:
    made = learner(DEVICE, kind)
    alone, together = played(made, 1), played(made, 4)
    assert distance(alone.state.params, together.state.params, made.initial()) < 1e-3
    assert [one.loss for one in alone.records] == pytest.approx([one.loss for one in together.records], rel=1e-4)


def test_dropout_draws_the_same_masks() -> None:
    here, there = learner("cpu", dropout=0.5), learner(DEVICE, dropout=0.5)
    assert distance(played(here).state.params, played(there).state.params, here.initial()) < 1e-2
    assert distance(played(here).state.params, played(learner("cpu")).state.params, here.initial()) > 0.05


@pytest.mark.parametrize("method", ["scaffold", "fedprox", "fedkseed"])
def test_other_kinds_of_work(method: str) -> None:
    here, there = learner("cpu"), learner(DEVICE)
    left, right = (played(made, method=method, train=PLAIN) for made in (here, there))
    if left.state.params:
        assert distance(left.state.params, right.state.params, here.initial()) < 1e-2
    counts, others = left.measure(), right.measure()
    assert counts.keys() == others.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ["toy:llama", "toy:gpt2", "toy:qwen"])
def test_small_number_types_learn(model: str, dtype: str) -> None:
    play = played(learner(DEVICE, model=model, dtype=dtype), rounds=4)
    losses = [float(record.loss or "nan") for record in play.records]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    assert all(tensor.dtype == torch.float32 for tensor in play.state.params.values())


@pytest.mark.parametrize("packed", [True, "stream"])
def test_packed_texts(packed: Any) -> None:
    here, there = (learner(device, task={"pack": packed, "loss_on": "all"}) for device in ("cpu", DEVICE))
    assert distance(played(here).state.params, played(there).state.params, here.initial()) < 1e-2


def test_a_pass_that_does_not_fit_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner(DEVICE)
    whole, seen = made.losses, list[int]()

    def losses(groups: Any) -> torch.Tensor:
        seen.append(len(groups))
        if len(groups) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(groups)

    expected = played(made, 1).state.params
    monkeypatch.setattr(made, "losses", losses)
    assert distance(expected, played(made, 4).state.params, made.initial()) < 1e-3
    assert 4 in seen and 2 in seen


def test_the_width_is_measured_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    made = learner(DEVICE)
    worker: LocalWorker = played(made).worker
    found = choose("auto", made, worker.rows, GENTLE, 4)
    assert 1 <= found.clients <= 4 and (DEVICE in found.why or "less than one by one" in found.why), found.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_what_is_moved_arrives(dtype: torch.dtype) -> None:
    device = torch.device(DEVICE)
    for shape in ((), (0,), (3,), (1000, 257)):
        sent = (torch.randn(shape) * 100).to(dtype)
        kept = sent.clone()
        found = [moved(sent, device) for _ in range(50)]
        assert all(one.device.type == DEVICE and torch.equal(one.cpu(), kept) for one in found)
        assert torch.equal(moved(found[0], device), found[0])


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    line = ["run", "quickstart", "rounds=1", "train.steps=2", f"model.device={DEVICE}", "evaluation.against=[base]"]
    found = subprocess.run(
        [sys.executable, "-m", "fedllm", *line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert f"on {DEVICE}" in found.stdout + found.stderr and (tmp_path / "runs" / "quickstart" / "adapter").is_dir()


def test_two_processes_end_with_the_same_model(tmp_path: Path) -> None:
    """They share a GPU where there is one, and have one each where there are more."""
    recipe = {
        "rounds": 2, "method": "fedprox", "train": GENTLE.model_dump(exclude_unset=True), "cohort_width": 2,
        "model": {"name": "toy:llama", "device": DEVICE}, "adapter": {"rank": 4}, "task": {"max_length": 96},
        "evaluation": {"against": []},
    }  # fmt: skip
    data = {f"c{k}": {"train": rows(k), "eval": rows(k, 2)} for k in range(4)}
    one = fedllm.run(recipe, data=data, folder=tmp_path / "one")
    two = fedllm.run({**recipe, "processes": 2}, data=data, folder=tmp_path / "two")
    for name, tensor in one.state.params.items():
        assert torch.allclose(tensor, two.state.params[name], atol=1e-4), name

"""What a client may ask of a fit beyond plain training: tensors held still, terms, rows, soft targets, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedllm.core.errors import FedLLMError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Schedule, Train
from fedllm.core.work import Example, Fit, FitReport, Gradient, Outputs, Score
from fedllm.engine.job import Job, alike
from fedllm.engine.together import run_together
from fedllm.tasks.function import FunctionLearner

SGD = Train(steps=3, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=2)
ADAM = Train(steps=3, lr=0.05, clip_norm=None, batch_size=2)


def predict(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([e[:2] for e in examples]) @ params["w"] + params["b"]


def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        predict(params, examples), torch.stack([e[2] for e in examples]).long(), reduction="sum"
    )


def learner() -> FunctionLearner:
    return FunctionLearner(loss, {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, outputs=predict)


def rows(client: int, count: int = 5) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(client)
    return [{"x": [*torch.randn(2, generator=draw).tolist(), float(i % 3)]} for i in range(count)]


def job(request: Any, client: int, held: list[Example], round: int = 1) -> Job:
    return Job(request, f"c{client}", 0, round, 4, lambda split: held, {})


def fitted(requests: Sequence[Fit], width: int, round: int = 1) -> list[Any]:
    model = learner()
    jobs = [job(request, k, model.prepare(rows(k, 4 + k)), round) for k, request in enumerate(requests)]
    found: list[Any] = []
    for start in range(0, len(jobs), width):
        found += run_together(model, jobs[start : start + width])
    return found


def starts(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(2, 3, generator=draw), "b": torch.randn(3, generator=draw)}


def same(left: Tensors, right: Tensors, atol: float = 1e-6) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[n], right[n], atol=atol) for n in left)


def test_fixed_tensors_act_and_do_not_move() -> None:
    own = [starts(k) for k in range(3)]
    requests = [Fit({"w": s["w"]}, SGD, fixed={"b": s["b"]}) for s in own]
    one, many = fitted(requests, 1), fitted(requests, 3)
    for k, (a, b) in enumerate(zip(one, many, strict=True)):
        assert isinstance(a, FitReport) and set(a.params) == {"w"} and same(a.params, b.params)
        by_hand = {n: t.clone() for n, t in own[k].items()}
        held = learner().prepare(rows(k, 4 + k))
        whole = run_together(learner(), [job(Gradient(by_hand), k, held)])[0][0]  # type: ignore[index]
        alone = run_together(learner(), [job(Gradient({"w": by_hand["w"]}, fixed={"b": by_hand["b"]}), k, held)])[0]
        assert same(alone[0], {"w": whole["w"]})  # type: ignore[index]


def test_terms_weigh_forward_passes_with_other_tensors() -> None:
    start, zero = starts(1), {"b": torch.zeros(3)}
    plain = fitted([Fit(start, SGD)], 1)[0]
    assert same(fitted([Fit(start, SGD, terms=((1.0, {}),))], 1)[0].params, plain.params)
    halves = fitted([Fit(start, SGD, terms=((0.5, {}), (0.5, {})))], 1)[0]
    assert same(halves.params, plain.params) and halves.loss[0] == pytest.approx(plain.loss[0], rel=1e-5)
    mixed = [Fit(starts(k), SGD, terms=((0.3, zero), (0.7, {}))) for k in range(3)]
    for a, b in zip(fitted(mixed, 1), fitted(mixed, 3), strict=True):
        assert same(a.params, b.params)
    without_bias = fitted([Fit(start, SGD, terms=((1.0, zero),))], 1)[0]
    assert torch.equal(without_bias.params["b"], start["b"])  # it never acts, so it never moves


def test_given_rows_stand_in_for_the_split() -> None:
    start = starts(2)
    given = fitted([Fit(start, SGD, rows=rows(7))], 1)[0]
    model = learner()
    split = run_together(model, [job(Fit(start, SGD), 0, model.prepare(rows(7)))])[0]
    assert same(given.params, split.params, 0.0)  # type: ignore[union-attr]
    score = run_together(model, [job(Score(start, rows=rows(7)), 0, []), job(Score(start), 0, model.prepare(rows(7)))])
    assert score[0].counts == score[1].counts  # type: ignore[union-attr]
    with pytest.raises(FedLLMError, match="no usable rows"):
        fitted([Fit(start, SGD, rows=[])], 1)


@pytest.mark.parametrize("kind", ["mae", "mse", "kl"])
def test_soft_targets(kind: Any) -> None:
    given, teacher, model = rows(3, 6), starts(9), learner()
    targets = run_together(model, [job(Outputs(teacher, given), 0, [])])[0]
    assert isinstance(targets, list) and len(targets) == 6 and targets[0].shape == (3,)
    there = fitted([Fit(teacher, SGD, rows=given, targets=targets, loss=kind)], 1)[0]
    assert there.loss[0] == pytest.approx(0.0, abs=1e-5)
    requests = [Fit(starts(k), SGD, rows=given, targets=targets, loss=kind) for k in range(3)]
    for k, (a, b) in enumerate(zip(fitted(requests, 1), fitted(requests, 3), strict=True)):
        assert same(a.params, b.params)
        x = torch.tensor([row["x"][:2] for row in given])
        gap = x @ starts(k)["w"] + starts(k)["b"] - torch.stack(targets)
        if kind == "mae" and a.examples == 6:  # three steps of two: every example once, at moving parameters
            assert 0 < a.loss[0] <= 3 * float(gap.abs().mean(1).sum())
    with pytest.raises(FedLLMError, match="5 targets were given for 6 examples"):
        fitted([Fit(teacher, SGD, rows=given, targets=targets[:5], loss=kind)], 1)


def test_the_optimiser_goes_on_where_its_memory_is_given() -> None:
    """Two fits of three steps with memory and one endless stream equal one fit of six."""
    constant = ADAM.model_copy(update={"schedule": Schedule()})
    long = constant.model_copy(update={"steps": 6})
    whole = fitted([Fit(starts(k), long, moments={}, begun=0) for k in range(3)], 3)
    first = fitted([Fit(starts(k), constant, moments={}, begun=0) for k in range(3)], 3)
    second = fitted([Fit(r.params, constant, moments=r.moments, begun=3) for r in first], 3, round=2)
    for a, b in zip(whole, second, strict=True):
        assert same(a.params, b.params, 0.0)
        assert set(b.moments) == {"step", "exp_avg.w", "exp_avg.b", "exp_avg_sq.w", "exp_avg_sq.b"}
        assert float(b.moments["step"]) == 6
    fresh = fitted([Fit(r.params, constant, begun=3) for r in first], 3, round=2)
    assert not same(fresh[0].params, whole[0].params) and fresh[0].moments is None


def test_clients_with_other_step_counts_do_not_share_a_pass() -> None:
    held = learner().prepare(rows(0))
    first = fitted([Fit(starts(0), ADAM, moments={})], 1)[0]
    new, old = (job(Fit(starts(0), ADAM, moments=m), 0, held) for m in ({}, first.moments))
    assert alike(new) != alike(old) != alike(job(Fit(starts(0), ADAM), 0, held))


def test_clients_that_end_earlier_keep_their_memory() -> None:
    epochs = Train(epochs=1, lr=0.05, clip_norm=None, batch_size=2)
    requests = [Fit(starts(k), epochs, moments={}) for k in range(3)]  # 2, 3 and 3 steps
    for a, b in zip(fitted(requests, 1), fitted(requests, 3), strict=True):
        assert same(a.params, b.params) and same(a.moments, b.moments) and a.steps == b.steps


def test_outputs_belong_to_rows() -> None:
    given = rows(4, 40)
    found = run_together(learner(), [job(Outputs(starts(0), given), 0, [])])[0]
    x = torch.tensor([row["x"][:2] for row in given])
    assert torch.allclose(torch.stack(found), x @ starts(0)["w"] + starts(0)["b"], atol=1e-6)  # type: ignore[arg-type]
    with pytest.raises(FedLLMError, match="0 of the 0 rows"):
        run_together(learner(), [job(Outputs(starts(0), []), 0, [])])


@pytest.mark.parametrize("read", [1, 2, 3])
def test_losses_are_those_of_every_step_whenever_they_are_read(read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of unequal step counts share a pass; what is read late is counted for whoever it belongs to."""
    requests = [Fit(starts(k), Train(epochs=2, batch_size=2, lr=0.1)) for k in range(4)]
    expected = [one.loss for one in fitted(requests, 1)]
    monkeypatch.setattr("fedllm.engine.fit.READ", read)
    found = [one.loss for one in fitted(requests, 4)]
    assert [n for _, n in found] == [n for _, n in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert len({round(total, 4) for total, _ in found}) == 4

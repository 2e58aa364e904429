"""Probes - exact slopes, the same alone and together, and a model that is itself again to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedllm.blocks.zeroth import direction, replay
from fedllm.core.errors import DataError, RoundFailed, RunError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Directions, Example, Lending, Probe, Score
from fedllm.engine import zeroth
from fedllm.engine.job import Job, alike
from fedllm.engine.together import run_together
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.function import FunctionLearner
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

TRAIN = Train(optimizer="sgd", clip_norm=None, batch_size=2)
EPS = 1e-3
TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4", "a short line")


def squares(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(params["w"] - x).square().sum() / 2 + (params["v"] * x[0]).sum() for x in examples]).sum()


def functions(dtype: torch.dtype = torch.float64, loss: Any = squares) -> FunctionLearner:
    start = {"w": torch.tensor([[0.5, -1.0], [2.0, 0.0]], dtype=dtype), "v": torch.tensor([1.0], dtype=dtype)}
    return FunctionLearner(loss, start, lambda row: torch.tensor(row["x"], dtype=dtype))


def job(request: Probe, learner: Any, client: str = "a", rows: Any = None, round: int = 1) -> Job:
    held = learner.prepare(rows if rows is not None else [{"x": [1.0, 2.0]}, {"x": [0.0, 1.0]}, {"x": [3.0, 3.0]}])
    return Job(request, client, 7, round, 10, lambda split: held, {})


def one(request: Probe, learner: Any, **where: Any) -> Any:
    return run_together(learner, [job(request, learner, **where)])[0]


def text_job(request: Probe, learner: TransformerLearner, client: int = 0) -> Job:
    rows = [{"instruction": TEXTS[(client + i) % 5], "response": TEXTS[(client + i) % 5][::-1]} for i in range(4)]
    return job(request, learner, f"c{client}", rows)


def llama(kind: str = "full", family: str = "llama", **options: Any) -> TransformerLearner:
    task = TaskSettings(kind="causal-lm", max_length=64, template="plain")
    return TransformerLearner(toy_model(family, kind="causal-lm"), task, AdapterSettings(kind=kind, **options), None, 0)  # type: ignore[arg-type]


def bits(learner: TransformerLearner) -> Tensors:
    model = learner.loaded.model
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 2.0])
def test_the_slope_of_a_quadratic_is_exact_for_any_eps(eps: float) -> None:
    """A central difference has no error on polynomials of second degree: g = <gradient, z>."""
    learner = functions()
    batch = [{"x": [1.0, 2.0]}, {"x": [0.0, 1.0]}]
    report = one(Probe(None, [11, 12, 13], TRAIN, eps, first=learner.initial), learner, rows=batch)
    leaves = {n: t.requires_grad_() for n, t in learner.initial().items()}
    (squares(leaves, [torch.tensor(r["x"]).double() for r in batch]) / 2).backward()
    for seed, slope in zip((11, 12, 13), report.slopes.tolist(), strict=True):
        exact = sum(float((t.grad * direction(seed, n, t.detach())).sum()) for n, t in leaves.items())  # type: ignore[operator]
        assert slope == pytest.approx(exact, rel=1e-6)
    assert (report.params, report.steps, report.examples) == ({}, 3, 6)


def test_a_walk_takes_the_steps_it_reports() -> None:
    """theta_t = theta_{t-1} - lr g_t z_t in float64, to 1e-12; and so does its replay from (seed, slope)."""
    learner, seeds = functions(), [5, 6, 5, 8]
    report = one(Probe(None, seeds, TRAIN, EPS, 0.05, first=learner.initial), learner)
    walked = learner.initial()
    for seed, slope in zip(seeds, report.slopes.tolist(), strict=True):
        walked = {n: t - 0.05 * slope * direction(seed, n, t) for n, t in walked.items()}
    replayed = replay(learner.initial(), seeds, report.slopes, -0.05)
    for name, tensor in report.params.items():
        assert torch.allclose(tensor, walked[name], rtol=0, atol=1e-12)
        assert torch.allclose(tensor, replayed[name], rtol=0, atol=1e-12)
        assert torch.allclose(report.delta[name], tensor - learner.initial()[name], rtol=0, atol=1e-15)
    assert report.rate_sum == pytest.approx(0.2) and report.steps == 4


def test_rate_zero_moves_nothing_to_the_last_bit() -> None:
    learner = functions(torch.float32)
    report = one(Probe(None, [1, 2], TRAIN, EPS, 0.0, first=learner.initial), learner)
    assert same(report.params, learner.initial())


def test_weight_decay_spares_vectors() -> None:
    learner = functions()
    plain, decayed = (
        one(Probe(None, [1], TRAIN, EPS, 0.1, d, first=learner.initial), learner).params for d in (0.0, 0.5)
    )
    assert torch.allclose(decayed["w"], plain["w"] * (1 - 0.05)) and torch.equal(decayed["v"], plain["v"])


def test_probes_that_stay_share_the_batch_of_the_round_and_walks_go_on() -> None:
    learner, rows = functions(), [{"x": [float(i), 0.0]} for i in range(8)]
    seen: list[list[float]] = []

    def watching(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        seen.append(sorted(float(x[0]) for x in examples))
        return squares(params, examples)

    learner.loss = watching
    one(Probe(None, [1, 2, 3], TRAIN, EPS, first=learner.initial), learner, rows=rows)
    assert len({tuple(batch) for batch in seen}) == 1 and len(seen) == 6
    again = seen[0]
    seen.clear()
    one(Probe(None, [9], TRAIN, EPS, first=learner.initial), learner, rows=rows)
    assert seen[0] == again, "asked again in the same round: the same data"
    seen.clear()
    one(Probe(None, [1, 2, 3, 4], TRAIN, EPS, 0.1, first=learner.initial), learner, rows=rows)
    assert all(seen[i] == seen[i + 1] for i in range(0, 8, 2)), "both sides of a probe see the same batch"
    assert sorted(x for batch in seen[::2] for x in batch) == [float(i) for i in range(8)]


def test_clients_in_one_pass_are_as_alone() -> None:
    learner = llama("lora", rank=2)
    start = learner.initial()
    requests = [Probe(start, [10 * k + 1, 10 * k + 2, 3], TRAIN, 1e-2, 0.01 * (k + 1)) for k in range(3)]
    jobs = [text_job(request, learner, k) for k, request in enumerate(requests)]
    assert len({alike(j) for j in jobs}) == 1, "rates and seeds of their own do not part clients"
    together = run_together(learner, jobs)
    for k, (report, alone) in enumerate(zip(together, (run_together(learner, [j])[0] for j in jobs), strict=True)):
        assert torch.allclose(report.slopes, alone.slopes, atol=2e-3)  # type: ignore[union-attr]
        assert all(torch.allclose(t, alone.params[n], atol=1e-4) for n, t in report.params.items()), k  # type: ignore[union-attr]
        assert report.loss == pytest.approx(alone.loss, rel=1e-5)  # type: ignore[union-attr]


def test_no_graph_and_no_dropout() -> None:
    learner = llama("lora", rank=2, dropout=0.5)
    losses, asked = learner.losses, []

    def watching(groups: Any) -> torch.Tensor:
        found = losses(groups)
        asked.append((found.requires_grad, learner.adapted.binding.seeds))
        return found

    learner.losses = watching  # type: ignore[method-assign]
    run_together(learner, [text_job(Probe(learner.initial(), [1, 1], TRAIN, EPS), learner)])
    assert asked and set(asked) == {(False, None)}


def bumpy(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Not a number where w is above its start."""
    w = params["w"][0, 0]
    return squares(params, examples) + (float("nan") if float(w) > 0.5 and float(params["v"][0]) > 1.0 else 0.0)


def test_a_seed_without_a_finite_loss_is_skipped() -> None:
    learner, seeds = functions(loss=bumpy), list(range(12))
    report = one(Probe(None, seeds, TRAIN, EPS, 1e-9, first=learner.initial), learner)
    bad = [s for s in seeds if len({float(direction(s, n, torch.zeros(1))[0]) > 0 for n in ("w", "v")}) == 1]
    assert [i for i in seeds if i not in report.kept] == bad and 0 < len(bad) < 12
    moved = replay(learner.initial(), report.kept, report.slopes[report.kept], -1e-9)
    assert all(torch.allclose(report.params[n], moved[n], rtol=0, atol=1e-15) for n in moved)
    assert math.isfinite(report.loss[0])


def test_a_limit_skips_and_all_skipped_is_an_error() -> None:
    learner = functions()
    free = one(Probe(None, [1, 2, 3], TRAIN, EPS, first=learner.initial), learner)
    gaps = (2 * EPS * free.slopes).abs()
    some = float(gaps.median()) * 1.01
    report = one(Probe(None, [1, 2, 3], TRAIN, EPS, limit=some, first=learner.initial), learner)
    assert len(report.kept) == 2 and math.isnan(float(report.slopes[int(gaps.argmax())]))
    with_none = one(Probe(None, [1, 2, 3], TRAIN, EPS, limit=1e-12, first=learner.initial), learner)
    assert isinstance(with_none, RoundFailed) and "3 of 3 probes of 'a'" in str(with_none)


def test_no_rows_is_an_error_and_not_an_endless_search() -> None:
    learner = functions()
    with pytest.raises(DataError, match="no usable rows in its eval split"):
        one(Probe(None, [1], TRAIN, EPS, split="eval", first=learner.initial), learner, rows=[])


# -- in place


def test_only_whole_float32_models_lend_their_weights() -> None:
    learner = llama()
    assert isinstance(learner, Lending)
    lent = learner.weights()
    assert lent is not None and lent.keys() == learner.initial().keys()
    assert all(t.data_ptr() == dict(learner.loaded.model.named_parameters())[n].data_ptr() for n, t in lent.items())
    assert llama("lora").weights() is None and llama("full", personal=2).weights() is None
    learner.loaded.model.half()
    assert learner.weights() is None, "half precision would drift: it is walked on float32 copies"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_itself_again_to_the_last_bit(family: str) -> None:
    """gpt2 has tied weights: one name, moved once."""
    learner = llama(family=family)
    before = bits(learner)
    directions = Directions([3, 4, 5], torch.tensor([1.0, 0.0, -2.0]), -0.01)
    for replayed in (None, directions, directions):
        request = Probe(None, [1, 2, 3], TRAIN, EPS, 1e-3, replay=replayed)
        report = run_together(learner, [text_job(request, learner)])[0]
        assert same(before, bits(learner)) and report.params == {} and len(report.kept) == 3  # type: ignore[union-attr]


def test_the_model_is_itself_again_after_a_fault() -> None:
    learner = llama()
    before, losses, calls = bits(learner), learner.losses, []

    def failing(groups: Any) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(groups)

    learner.losses = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_together(learner, [text_job(Probe(None, [1, 2, 3], TRAIN, EPS, 0.1), learner)])
    assert same(before, bits(learner))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_place_is_the_same_walk_as_on_copies(family: str) -> None:
    """Tied weights move once in both; buffers and integers are not touched."""
    learner = llama(family=family)
    directions = Directions([3, 4], torch.tensor([1.0, -2.0]), -0.01)
    inside = run_together(learner, [text_job(Probe(None, [1, 2, 3], TRAIN, 1e-2, 1e-3, replay=directions), learner)])
    start = learner.initial()
    copied = run_together(learner, [text_job(Probe(start, [1, 2, 3], TRAIN, 1e-2, 1e-3, replay=directions), learner)])
    assert torch.allclose(inside[0].slopes, copied[0].slopes, rtol=1e-2, atol=5e-3)  # type: ignore[union-attr]
    assert inside[0].loss == pytest.approx(copied[0].loss, rel=1e-5)  # type: ignore[union-attr]


def test_a_replayed_start_read_from_disk_has_the_bits_of_one_computed(monkeypatch: Any) -> None:
    """The second client of a round reads it; a late joiner with (w0, A) computes it: the same slopes to the bit."""
    directions = Directions([3, 4], torch.tensor([1.0, -2.0]), -0.01)
    request = Probe(None, [1, 2], TRAIN, EPS, 1e-3, replay=directions)
    learner, late = llama(), llama()
    first = run_together(learner, [text_job(request, learner)])[0]
    calls: list[int] = []
    monkeypatch.setattr(zeroth, "replay_", lambda *_: calls.append(1))
    again = run_together(learner, [text_job(request, learner)])[0]
    assert not calls
    monkeypatch.undo()
    joined = run_together(late, [text_job(request, late)])[0]
    assert torch.equal(first.slopes, again.slopes) and torch.equal(first.slopes, joined.slopes)  # type: ignore[union-attr]
    other = Probe(None, [1, 2], TRAIN, EPS, 1e-3, replay=Directions([3, 4], torch.tensor([1.0, -2.5]), -0.01))
    assert not torch.equal(run_together(learner, [text_job(other, learner)])[0].slopes, first.slopes)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_measuring_a_replayed_start(kind: str) -> None:
    learner = llama(kind)
    directions = Directions([3, 4], torch.tensor([1.0, -2.0]), 0.02)
    request = Probe(None, (), TRAIN, EPS, replay=directions, split="eval", measure=True, first=learner.initial)
    found = run_together(learner, [text_job(request, learner)])[0].score  # type: ignore[union-attr]
    moved = replay(learner.initial(), directions.seeds, directions.values, directions.scale)
    held = text_job(request, learner)
    plain = run_together(learner, [Job(Score(moved), "c0", 7, 1, 10, held.examples, {})])[0]
    assert found is not None and found.counts["loss"] == pytest.approx(plain.counts["loss"], rel=1e-6)  # type: ignore[union-attr]
    base = run_together(learner, [Job(Score(None), "c0", 7, 1, 10, held.examples, {})])[0]
    assert base.counts["loss"] != plain.counts["loss"]  # type: ignore[union-attr]


def test_a_full_disk_is_told_before_anything_moves(monkeypatch: Any) -> None:
    learner = llama()
    before = bits(learner)

    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, _: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(zeroth.tempfile, "TemporaryFile", Full)
    with pytest.raises(RunError, match=r"No space left on device\. \d+ bytes are needed in .*TMPDIR"):
        run_together(learner, [text_job(Probe(None, [1], TRAIN, EPS, 0.1), learner)])
    assert same(before, bits(learner))


def test_alike_parts_what_cannot_share_a_pass() -> None:
    learner = functions()
    first = Probe(None, [1], TRAIN, EPS)
    others = [
        Probe(None, [1, 2], TRAIN, EPS),
        Probe(None, [1], TRAIN, 1e-2),
        Probe(None, [1], TRAIN, EPS, 0.1),
        Probe(learner.initial(), [1], TRAIN, EPS),
        Probe(None, [1], TRAIN, EPS, split="eval"),
        Probe(None, [1], TRAIN, EPS, limit=1.0),
        Probe(None, [1], TRAIN.model_copy(update={"batch_size": 3}), EPS),
        Probe(None, [1], TRAIN, EPS, measure=True),
    ]
    keys = [alike(job(request, learner)) for request in (first, *others)]
    assert len(set(keys)) == len(keys)


def test_examples_are_counted_once_a_probe() -> None:
    held: list[Example] = functions().prepare([{"x": [1.0, 2.0]}] * 4)
    report: Any = run_together(
        functions(), [Job(Probe(None, [1, 2], TRAIN, EPS, 0.1), "a", 7, 1, 10, lambda split: held, {})]
    )[0]
    assert (report.examples, report.tokens, report.loss[1]) == (4, 4, 4.0)

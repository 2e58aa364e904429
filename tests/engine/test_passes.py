"""Passes - every row once, never dearer than one pass, and nothing a client can see."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Fit, FitReport
from fedllm.engine.job import Job
from fedllm.engine.passes import Part, Passes
from fedllm.engine.together import run_together
from fedllm.engine.width import Width, choose
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings


def price(plan: list[list[Part]], lengths: list[list[int]], fixed: int) -> int:
    total = 0
    for parts in plan:
        rows = max(len(part.rows) for part in parts)
        total += fixed + len(parts) * rows * max(lengths[p.client][r] for p in parts for r in p.rows)
    return total


@pytest.mark.parametrize("seed", range(30))
def test_every_row_is_in_one_pass_and_the_limit_holds(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 200) for _ in range(draw.randint(0, 6))] for _ in range(draw.randint(1, 9))]
    limit = draw.choice([None, 100, 400, 2000])
    plan = Passes(draw.choice([1, 64, 1000]), limit).plan(lengths)
    seen = [(part.client, row) for parts in plan for part in parts for row in part.rows]
    assert sorted(seen) == [(k, row) for k, own in enumerate(lengths) for row in range(len(own))]
    for parts in plan:
        rows = max(len(part.rows) for part in parts)
        tokens = len(parts) * rows * max(lengths[p.client][r] for p in parts for r in p.rows)
        assert limit is None or tokens <= limit or len(parts) == 1


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_cheapest_cut_of_single_rows(seed: int) -> None:
    """One row a client: against every way to cut the sorted rows, and never dearer than one pass for all."""
    draw = random.Random(seed)
    lengths, fixed = [[draw.randint(1, 200)] for _ in range(7)], draw.choice([5, 50, 300])
    ordered = sorted((own[0] for own in lengths), reverse=True)
    cheapest = min(
        sum(fixed + (b - a) * ordered[a] for a, b in itertools.pairwise([0, *cut, 7]))
        for size in range(7)
        for cut in itertools.combinations(range(1, 7), size)
    )
    found = price(Passes(fixed).plan(lengths), lengths, fixed)
    assert cheapest <= found <= fixed + 7 * ordered[0]
    assert found == cheapest or found - sum(ordered) <= 2 * fixed  # one pass is kept where padding is below its price


def test_equal_lengths_are_never_cut() -> None:
    assert Passes(1).plan([[50, 50], [50, 50]]) == [[Part(0, (0, 1)), Part(1, (0, 1))]]
    assert Passes().plan([[], []]) == []


def learner(dropout: float = 0.0, kind: Any = "lora") -> TransformerLearner:
    torch.set_num_threads(1)
    task = TaskSettings(kind="causal-lm", max_length=96, template="plain", loss_on="all")
    return TransformerLearner(toy_model("llama"), task, AdapterSettings(kind=kind, rank=4, dropout=dropout), None, 0)


def fits(made: TransformerLearner, start: Tensors, passes: Passes, penalty: Any = None) -> list[Any]:
    draw = random.Random(7)
    jobs = []
    train = Train(steps=3, batch_size=4, lr=1e-2)
    for k in range(5):
        rows = [{"text": "ab " * draw.randint(1, 30)} for _ in range(4 + k)]
        examples = made.prepare(rows)
        job = Job(Fit(start, train, penalty), f"c{k}", 3, 1, 2, lambda split, e=examples: e, {}, passes)
        jobs.append(job)
    if made.width_limit == 1:
        return [result for job in jobs for result in run_together(made, [job])]
    return list(run_together(made, jobs))


KINDS = [("lora", 0.0), ("lora", 0.3), ("bottleneck", 0.0), ("prompt", 0.0), ("full", 0.0)]


@pytest.mark.parametrize(("kind", "dropout"), KINDS)
def test_no_client_can_see_how_its_rows_were_cut(kind: str, dropout: float) -> None:
    """Nor which rows dropout left out: they hang on the row's place in the client's batch."""
    made = learner(dropout, kind)
    draw = torch.Generator().manual_seed(1)
    start = {n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in made.initial().items()}

    def pull(params: Tensors, start: Tensors) -> torch.Tensor:
        return torch.stack([(params[n] - start[n]).square().sum() for n in params]).sum()

    whole, cut = (fits(made, start, Passes(fixed), pull) for fixed in (10**9, 1))
    assert len(Passes(1).plan([[3, 90, 40, 8]] * 5)) > 1
    for one, other in zip(whole, cut, strict=True):
        assert isinstance(one, FitReport) and isinstance(other, FitReport)
        assert one.tokens == other.tokens and one.loss[1] == other.loss[1]
        assert one.loss[0] == pytest.approx(other.loss[0], rel=1e-5)
        for name in start:
            torch.testing.assert_close(one.params[name], other.params[name], rtol=2e-4, atol=2e-5)


class Rows:
    """Twelve clients with texts of one length."""

    client_ids = tuple(f"c{k:02d}" for k in range(12))

    def rows(self, client: str, split: str = "train") -> list[dict[str, str]]:
        return [{"text": "ab " * 20}] * 4

    def size(self, client: str) -> int:
        return 4


def test_the_choice_is_remembered_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What was measured once is read again: the same run cuts its passes alike."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    made = learner()
    first = choose("auto", made, Rows(), Train(batch_size=2), 12)
    assert 1 <= first.clients <= first.stack == 12 and "a step of" in first.why
    monkeypatch.setattr("fedllm.engine.width._timed", lambda *_: pytest.fail("measured again"))
    assert choose("auto", made, Rows(), Train(batch_size=2), 12) == first
    assert choose(4, made, Rows(), Train(), 12) == Width(4, "as the recipe says")
    assert choose(40, made, Rows(), Train(), 12).clients == 12
    (tmp_path / "width" / next((tmp_path / "width").iterdir()).name).write_text("{broken")
    monkeypatch.setattr("fedllm.engine.width._timed", lambda *_: 1.0)
    assert choose("auto", made, Rows(), Train(batch_size=2), 12).clients == 12  # tried: 1, 2, 4, 8, 12


@pytest.mark.parametrize(
    ("times", "clients", "told"),
    [
        ([1.0, 2.0], 1, "fills this cpu"),
        ([1.0, 1.5, 3.0], 2, "more gains nothing"),
        ([1.0, 1.9, 3.8], 1, "more gains next to nothing"),
        ([1.0, 1.1, 1.2, 1.3, 1.5], 12, "8.0 times less"),
    ],
)
def test_what_is_chosen_follows_from_the_times(
    times: list[float], clients: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    given = iter(times)
    monkeypatch.setattr("fedllm.engine.width._timed", lambda *_: next(given))
    found = choose("auto", learner(), Rows(), Train(batch_size=2), 12)
    assert found.clients == clients and told in found.why

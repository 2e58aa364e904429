"""FwdLLM - what a pool of directions becomes, when the server moves, and that both forms of upload are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.zeroth import Weighed, cosines, direction, pairs, replay
from fedllm.core.errors import FedLLMError
from fedllm.core.reducer import Update
from fedllm.core.state import CollectMore, State
from fedllm.core.tensors import zeros
from fedllm.core.train import Train
from fedllm.effects.rig import Play, skewed_digits
from fedllm.methods.silo_and_device.fwdllm import FwdLLM

START = {"w": torch.zeros(6), "b": torch.zeros(2)}
TRAIN = Train(batch_size=8, lr=0.5, optimizer="sgd", clip_norm=None)


def pooled(uploads: dict[str, tuple[list[int], list[float]]]) -> Update:
    parts = {name: Weighed(pairs(seeds, torch.tensor(slopes)), 1.0) for name, (seeds, slopes) in uploads.items()}
    return Update(collected={"update": parts}, clients=len(parts))  # type: ignore[arg-type]


def summed(uploads: dict[str, tuple[list[int], list[float]]]) -> Update:
    parts = {}
    for name, (seeds, slopes) in uploads.items():
        total = replay(zeros(START), seeds, torch.tensor(slopes))
        tensors = {**{f"sum.{n}": t for n, t in total.items()}, "count": torch.tensor([float(len(seeds))])}
        parts[name] = Weighed(tensors, 1.0)
    return Update(collected={"update": parts}, clients=len(parts))  # type: ignore[arg-type]


def state() -> State:
    return FwdLLM().init(START)


def test_the_move_is_the_mean_of_slope_times_direction() -> None:
    uploads = {"a": ([3, 4], [1.0, -2.0]), "b": ([5], [0.5])}
    method = FwdLLM(train=TRAIN, threshold=1e9)
    moved = method.finalize(state(), pooled(uploads))
    assert isinstance(moved, State)
    for name, tensor in START.items():
        found = sum(g * direction(s, name, tensor) for s, g in ((3, 1.0), (4, -2.0), (5, 0.5)))
        assert torch.allclose(moved.params[name], -0.5 * found / 3, atol=1e-6)
    assert moved.numbers["directions"] == 3


def test_pairs_and_sums_give_the_same_move() -> None:
    uploads = {"a": ([3, 4], [1.0, -2.0]), "b": ([5, 6], [0.5, 0.1])}
    by_pairs = FwdLLM(train=TRAIN, threshold=1e9).finalize(state(), pooled(uploads))
    by_sums = FwdLLM(train=TRAIN, threshold=1e9, upload="sum").finalize(state(), summed(uploads))
    assert isinstance(by_pairs, State) and isinstance(by_sums, State)
    assert all(torch.allclose(by_pairs.params[n], by_sums.params[n], atol=1e-6) for n in START)


def test_equal_halves_have_no_variance_and_commit() -> None:
    uploads = {"a": ([7], [1.0]), "b": ([7], [1.0])}
    assert isinstance(FwdLLM(threshold=0.0).finalize(state(), pooled(uploads)), State)


def test_the_variance_is_that_of_two_half_means() -> None:
    method = FwdLLM()
    halves = [({"w": torch.tensor([2.0, 4.0])}, 2), ({"w": torch.tensor([3.0, 0.0])}, 1)]
    means = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    sums = {"w": torch.tensor([5.0, 4.0])}
    assert method.variance(halves, sums) == pytest.approx(float(means.var(0).mean()))
    share = FwdLLM(relative=True).variance(halves, sums)
    assert share == pytest.approx(float(means.var(0).sum()) / float((sums["w"] / 3).square().sum()))


def test_a_pool_that_disagrees_or_cannot_be_halved_is_collected_on_and_theta_stays() -> None:
    method = FwdLLM(threshold=1e-9, most=3)
    for uploads in ({"a": ([1], [1.0]), "b": ([2], [1.0])}, {"a": ([1], [1.0])}):
        asked = method.finalize(state(), pooled(uploads))  # type: ignore[arg-type]
        assert asked == CollectMore(again=True)
    capped = {"a": ([1], [1.0]), "a@1": ([2], [1.0]), "a@2": ([3], [1.0])}
    committed = method.finalize(state(), pooled(capped))
    assert isinstance(committed, State) and committed.numbers["asked"] == 3


def test_the_last_gradient_is_sent_every_second_round() -> None:
    method, now, seen = FwdLLM(threshold=1e9), state(), []
    for _ in range(4):
        seen.append("last" in method.distribute(now, None).parts)  # type: ignore[arg-type]
        moved = method.finalize(now, pooled({"a": ([1], [1.0]), "b": ([2], [1.0])}))
        assert isinstance(moved, State)
        now = moved
    assert seen == [False, True, False, True]


def played(rounds: int, **options: Any) -> Play:
    learner, rows, _ = skewed_digits(0, 4, 10)
    play = Play(FwdLLM(train=TRAIN, **options), learner, rows, rounds=rounds)
    play.rounds(rounds)
    return play


def test_a_round_collects_and_commits_in_the_engine() -> None:
    play = played(2, threshold=0.0, most=3, directions=2, keep=False)
    record = play.records[-1]
    assert record.failed is None and record.used == 12 and play.state.numbers["asked"] == 3
    assert play.state.numbers["directions"] == 24
    assert play.server.meter.bytes["work/up/update"] == 2 * 24 * 8  # eight bytes a direction


def test_filtered_directions_are_more_like_the_last_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    last = {"w": torch.randn(200, generator=draw)}
    seeds = list(range(300))
    found = cosines(last, seeds)
    best = found.argsort(descending=True)[:30]
    assert float(found[best].mean()) > float(found.mean()) + 2 * float(found.std()) / 2


def test_clients_with_filter_and_without_both_learn() -> None:
    for keep in (True, False):
        learner, rows, held_out = skewed_digits(1, 6, 10)
        train = {**TRAIN.model_dump(), "batch_size": 24}
        play = Play(FwdLLM(train=train, directions=8, threshold=1e9, keep=keep), learner, rows, rounds=40)
        before = held_out(play.state.params)[1]
        assert held_out(play.rounds(40).params)[1] < before - 0.2


@pytest.mark.parametrize("wrong", [{"most": 9}, {"most": 0}, {"eps": 0.0}, {"directions": 0}, {"threshold": -1.0}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((FedLLMError, ValueError)):
        FwdLLM(**wrong)

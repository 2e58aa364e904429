"""Privacy of clients in a round: what is clipped, what noise arrives, what is spent, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.tensors import Tensors
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.privacy.central import Central, check
from fedllm.modes.privacy.mechanism import AdaptiveClip
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.tasks.function import FunctionLearner

pytest.importorskip("dp_accounting")
SIZE = 4096


def learner(size: int = SIZE) -> FunctionLearner:
    """One vector, pulled towards every row's number in all entries: the gradient is (w - x) in each."""

    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x[0]) ** 2).sum() / 2 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(size)})


def rows(clients: int, value: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    return {f"c{k:02d}": [{"x": [value]}] for k in range(clients)}


def method(lr: float = 1.0, **options: Any) -> Any:
    train = {"steps": 1, "batch_size": 1, "lr": lr, "optimizer": "sgd", "clip_norm": None}
    return find("fedavg")(train=train, weighting="uniform", **options)


def settings(**given: Any) -> PrivacySettings:
    return PrivacySettings(**{"noise": 1.0, "delta": 1e-3, "key": "seed", **given})


def played(
    given: PrivacySettings, clients: int = 10, cohort: int = 5, rounds: int = 1, value: float = 1.0, **options: Any
) -> tuple[Play, Central]:
    what = options.pop("method", None) or method(options.pop("lr", 1.0))
    guard = Central(given, what, clients, cohort, options.pop("planned", rounds), options.pop("seed", 0))
    play = Play(what, learner(options.pop("size", SIZE)), rows(clients, value), cohort, guard=guard, rounds=rounds)
    play.rounds(rounds)
    return play, guard


# -- the sum ----------------------------------------------------------------------------------------------------------


def test_without_noise_and_clipping_it_is_the_plain_mean():
    plain = Play(method(0.5), learner(), rows(6))
    plain.rounds(3)
    private, _ = played(settings(noise=0.0, clip=1e6), 6, 6, 3, lr=0.5)
    assert torch.allclose(plain.state.params["w"], private.state.params["w"], atol=1e-7)
    assert private.records[-1].used == 6


def test_uploads_are_clipped_and_divided_by_the_expected_number():
    play, _ = played(settings(noise=0.0, clip=2.0, rate=0.5), clients=10, cohort=3, seed=3)
    came = play.records[0].used
    assert 0 < came < 10 and came != 5, "another number than expected, else this shows nothing"
    wanted = came * 2.0 / math.sqrt(SIZE) / (0.5 * 10)
    assert torch.allclose(play.state.params["w"], torch.full((SIZE,), wanted), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_that_arrives_has_the_stated_deviation(seed: int):
    play, guard = played(settings(noise=1.7, clip=0.6), 10, 4, seed=seed, value=0.0)
    found = play.state.params["w"].double()
    stated = 1.7 * 0.6 / guard.expected
    assert abs(float(found.std()) / stated - 1) < 4 / math.sqrt(2 * SIZE), "four standard errors"
    assert abs(float(found.mean())) < 4 * stated / math.sqrt(SIZE)
    kurtosis = float(((found - found.mean()) / found.std()).pow(4).mean())
    assert abs(kurtosis - 3) < 4 * math.sqrt(24 / SIZE)


def test_the_noise_of_rounds_is_independent():
    play, _ = played(settings(), value=0.0, rounds=1, lr=1e-12)  # nobody moves
    first = play.state.params["w"].clone()
    play.rounds(1)
    second = play.state.params["w"] - first
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(SIZE)


def test_nobody_moves_the_sum_by_more_than_the_bound():
    play, guard = played(settings(clip=0.3, rate=1.0), clients=6, cohort=6)
    less = {client: held for client, held in rows(6).items() if client != "c03"}
    other = Play(method(), learner(), less, 5, guard=Central(settings(clip=0.3, rate=1.0), method(), 6, 6, 1, 0))
    other.rounds(1)
    moved = (play.state.params["w"] - other.state.params["w"]).double().norm() * guard.expected
    assert float(moved) == pytest.approx(0.3, rel=1e-3), "the same noise, one contribution more"


def test_noise_is_published_where_nobody_came():
    play, guard = played(settings(rate=1e-9), clients=10, cohort=1)
    assert play.records[0].used == 0 and not play.records[0].failed and play.state.round == 1
    assert float(play.state.params["w"].abs().max()) > 0
    assert guard.ledger.entries


def test_coins_are_tossed_at_the_stated_rate():
    guard = Central(settings(rate=0.2), method(), 400, 80, 10, 0)
    clients = [f"c{k}" for k in range(400)]
    counts = [len(guard.cohort(method(), number, clients, 80, None)) for number in range(1, 101)]  # type: ignore[arg-type]
    mean, variance = sum(counts) / 100, 400 * 0.2 * 0.8
    assert abs(mean - 80) < 4 * math.sqrt(variance / 100)
    spread = sum((n - mean) ** 2 for n in counts) / 99
    assert 0.5 < spread / variance < 1.7, "one coin each, not a fixed number"
    fixed = Central(settings(sampling="fixed"), method(), 400, 80, 10, 0)
    assert {len(fixed.cohort(method(), number, clients, 80, None)) for number in range(1, 20)} == {80}  # type: ignore[arg-type]


def test_a_bound_follows_the_norms():
    norms = math.sqrt(SIZE)  # of every upload
    given = settings(noise=0.5, clip=1.0, adaptive={"rate": 1.0, "noise": 0.5}, rate=1.0)
    guard = Central(given, method(), 20, 20, 60, 0)
    what = find("fedavg")(
        train={"steps": 1, "batch_size": 1, "lr": 1.0, "optimizer": "sgd", "clip_norm": None}, weighting="uniform"
    )

    class Still(type(what), abstract=True):  # type: ignore[misc]
        """Never moves, so that every round's norms are the same."""

        def finalize(self, state: Any, update: Any) -> Any:
            return state

    play = Play(Still(**what.model_dump(exclude_unset=True)), learner(), rows(20), guard=guard, rounds=60)
    play.rounds(40)
    assert 0.3 * norms < guard.bound < 3 * norms
    assert guard._update_noise == pytest.approx((0.5**-2 - 1.0**-2) ** -0.5)
    assert isinstance(guard.adaptive, AdaptiveClip)


# -- trees ------------------------------------------------------------------------------------------------------------


def test_clients_take_turns_and_the_noise_of_the_running_sum_stays_low():
    given = settings(mechanism="ftrl", noise=1.0, tree={"participations": 4, "separation": 4})
    play, guard = played(given, clients=12, cohort=3, rounds=16, value=0.0, lr=1e-12)
    seen = [set(record.cohort) for record in play.records]
    assert all(not (seen[i] & seen[j]) for i in range(16) for j in range(i + 1, min(i + 4, 16)))
    assert all(len(cohort) == 3 for cohort in seen)
    # After 16 steps one node covers them all: the running sum has the noise of one node, not of sixteen.
    found = float((play.state.params["w"].double() * guard.expected).std())
    assert abs(found - 1.0) < 0.1
    assert [entry.event.steps for entry in guard.ledger.entries.values()] == [16]  # type: ignore[union-attr]


def test_more_participations_than_stated_are_refused():
    with pytest.raises(ConfigError, match=r"up to 4 times.*Set privacy\.tree\.participations=4"):
        Central(settings(mechanism="ftrl"), method(), 12, 3, 16, 0)


# -- the account ------------------------------------------------------------------------------------------------------


def test_the_noise_is_solved_for_the_whole_run_and_spent_round_by_round():
    play, guard = played(settings(noise=None, epsilon=2.0), 20, 5, 8)
    spent = [record.guard["epsilon"] for record in play.records]
    assert spent == sorted(spent) and 1.98 < spent[-1] <= 2.0
    assert guard.stops(9) is not None and "budget" in str(guard.stops(9))
    assert guard.stops(8) is None, "what was paid for may be computed again"


def test_the_same_round_again_costs_nothing_and_gives_the_same_noise():
    play, guard = played(settings(), value=0.0)
    before = guard.told()
    again = Play(method(), learner(), rows(10, 0.0), 5, guard=guard)
    again.rounds(1)
    assert guard.told() == before and torch.equal(again.state.params["w"], play.state.params["w"])


def test_a_checkpoint_brings_back_the_ledger_the_bound_and_the_key():
    _, guard = played(settings(key="secret", adaptive={"noise": 5.0}), rounds=2)
    facts = guard.to_json()
    other = Central(settings(key="secret", adaptive={"noise": 5.0}), method(), 10, 5, 2, 0)
    assert other.source.key != guard.source.key
    other.restore(facts)
    assert (other.source.key, other.bound, other.told()) == (guard.source.key, guard.bound, guard.told())
    assert other.stops(2) is None


def test_the_guarantee_is_told_in_words():
    _, guard = played(settings(key="secret"))
    text = "\n".join(guard.report())
    for part in ("epsilon", "delta 0.001", "per client", "expected number", "probability 0.5", "secret key", "measure"):
        assert part in text, part


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "options", "reason"),
    [
        ("fedavg", {}, "weighting=uniform"),
        ("hetlora", {"weighting": "uniform"}, "reduces the part"),
        ("flexlora", {"weighting": "uniform"}, "reduces the part"),
        ("fedkseed", {"weighting": "uniform"}, "reduces the part"),
        ("fedbpt", {"weighting": "uniform"}, "reduces the part"),
    ],
)
def test_a_method_whose_sum_cannot_be_noised_is_refused(key: str, options: dict[str, Any], reason: str):
    with pytest.raises(ModeConflict, match=reason):
        check(find(key)(**options))


def test_other_questions_to_clients_are_refused():
    guard = Central(settings(), method(), 10, 5, 1, 0)
    for op in ("work", "evaluate", "evaluate_base"):
        guard.allow(op, "c01")
    guard.allow("train_public", "server")
    with pytest.raises(ModeConflict, match="nothing covers"):
        guard.allow("statistics", "c01")
    Guard().allow("statistics", "c01")


def test_a_delta_that_would_publish_a_client_is_refused():
    with pytest.raises(ConfigError, match=r"delta"):
        Central(settings(delta=0.2), method(), 10, 5, 1, 0)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_ends_where_the_budget_does_and_resumes_to_the_same(tmp_path: Path):
    from fedllm.run import Watch, resume, run

    data = {f"c{k}": {"train": [{"text": f"row {i} of {k}"} for i in range(3)]} for k in range(4)}
    recipe = {
        "name": "dp", "rounds": 4, "cohort": 2, "method": {"name": "fedavg", "weighting": "uniform"},
        "model": {"name": "toy:llama"}, "task": {"template": "plain", "max_length": 32},
        "train": {"steps": 1, "batch_size": 1}, "evaluation": {"against": []},
        "privacy": {"noise": 0.8, "epsilon": 3.0, "delta": 0.01, "key": "seed"},
    }  # fmt: skip

    class Stop(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            self.stop = record.round == 1

    whole = run(recipe, data=data, folder=tmp_path / "whole")
    told = whole.table["guard"]
    assert told["epsilon"] <= 3.0 and any("privacy budget is spent" in text for text in whole.table["warnings"])
    assert 0 < whole.state.round < 4 and whole.finished
    run(recipe, data=data, folder=tmp_path / "parts", watch=Stop())
    parts = resume(tmp_path / "parts", data=data)
    assert parts.table["guard"] == told and parts.state.round == whole.state.round
    for name, tensor in whole.state.params.items():
        assert torch.equal(tensor, parts.state.params[name])
    assert any("Differential privacy: epsilon" in text for text in whole.sentences)
    again = resume(tmp_path / "whole", data=data)
    assert again.table["warnings"] == whole.table["warnings"], "why it ended is told again"
    with pytest.raises(ModeConflict):
        run({**recipe, "method": "fedavg"}, data=data, folder=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

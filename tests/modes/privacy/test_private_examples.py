"""Privacy of examples: gradients of single examples are clipped, noised and accounted where the data is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedllm.core.errors import BudgetSpent, ConfigError, ModeConflict
from fedllm.core.message import Upload
from fedllm.core.method import Method, on_client
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Score
from fedllm.effects.rig import Play
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.methods import find
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.modes.privacy.examples import Examples
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.tasks.function import FunctionLearner
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

pytest.importorskip("dp_accounting")
SIZE = 2048
TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4", "the river is cold", "a b")


def learner(size: int = SIZE) -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x[0]) ** 2).sum() / 2 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(size)})


def train(**given: Any) -> dict[str, Any]:
    return {"steps": 1, "batch_size": 4, "lr": 0.5, "optimizer": "sgd", "clip_norm": None, **given}


def settings(**given: Any) -> PrivacySettings:
    return PrivacySettings(**{"level": "example", "noise": 1.0, "delta": 1e-3, "key": "seed", **given})


def played(given: PrivacySettings, rounds: int = 1, values: Any = None, **how: Any) -> tuple[Play, Examples]:
    rows = {k: [{"x": [v]} for v in held] for k, held in (values or {"a": [1.0] * 8, "b": [0.0] * 8}).items()}
    method = find("fedavg")(train=train(**how))
    guard = Examples(given, {k: len(held) for k, held in rows.items()}, method.train, rounds, 0)
    play = Play(method, learner(), rows, guard=guard, rounds=rounds)
    play.rounds(rounds)
    return play, guard


# -- one step ---------------------------------------------------------------------------------------------------------


def test_without_noise_and_clipping_a_step_on_all_is_a_plain_one():
    values = {"a": [1.0, 2.0, 3.0], "b": [0.0, 5.0]}
    private, _ = played(settings(noise=0.0, clip=1e9, rate=1.0), 3, values)
    plain = Play(
        find("fedavg")(train=train(batch_size=3)),
        learner(),
        {k: [{"x": [v]} for v in held] for k, held in values.items()},
        rounds=3,
    )
    plain.rounds(3)
    assert torch.allclose(private.state.params["w"], plain.state.params["w"], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_that_arrives_has_the_stated_deviation(seed: int):
    method = find("fedavg")(train=train(lr=1.0))
    given = settings(noise=1.3, clip=0.7, rate=0.5)
    guard = Examples(given, {"a": 8}, method.train, 1, seed)
    play = Play(method, learner(), {"a": [{"x": [0.0]}] * 8}, guard=guard)
    play.rounds(1)
    found, stated = play.state.params["w"].double(), 1.3 * 0.7 / 4.0
    assert abs(float(found.std()) / stated - 1) < 4 / math.sqrt(2 * SIZE)
    assert abs(float(found.mean())) < 4 * stated / math.sqrt(SIZE)


def test_one_example_moves_a_step_by_the_bound_at_most():
    def step(values: list[float]) -> torch.Tensor:
        method = find("fedavg")(train=train(lr=1.0))
        guard = Examples(settings(clip=0.25, rate=1.0), {"a": 8}, method.train, 1, 0)
        rule = guard.fit("a", 1, 0, 8, _fit(method.train))
        job = Job(_fit(method.train), "a", 0, 1, 1, lambda _: learner().prepare([{"x": [v]} for v in values]), {})
        from dataclasses import replace

        (report,) = run_together(learner(), [replace(job, noised=rule)])
        return report.params["w"].double() * 8  # type: ignore[union-attr]

    moved = (step([1.0] * 8) - step([1.0] * 7)).norm()
    assert float(moved) == pytest.approx(0.25, rel=1e-3)


def _fit(settings: Train) -> Any:
    from fedllm.core.work import Fit

    return Fit({"w": torch.zeros(SIZE)}, settings)


def language_model() -> tuple[TransformerLearner, list[Any]]:
    task = TaskSettings(template="plain", max_length=48)
    found = TransformerLearner(toy_model("llama"), task, AdapterSettings(rank=4), None, seed=1)
    return found, found.prepare([{"instruction": text, "response": text[::-1]} for text in TEXTS])


def test_gradients_of_single_texts_are_clipped_as_one_by_one():
    torch.set_num_threads(1)
    model, examples = language_model()
    draw = torch.Generator().manual_seed(0)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in model.initial().items()}
    how = Train(**train(lr=1.0))
    guard = Examples(settings(noise=0.0, clip=0.05, rate=1.0), {"a": len(TEXTS)}, how, 1, 0)
    from dataclasses import replace

    from fedllm.core.work import Fit

    fit = Fit(params, how)
    job = Job(fit, "a", 0, 1, 1, lambda _: examples, {}, noised=guard.fit("a", 1, 0, len(examples), fit))
    (report,) = run_together(model, [job])
    wanted = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in params.items()}
    clipped = 0
    for example in examples:
        leaves = {n: t.clone().unsqueeze(0).requires_grad_() for n, t in params.items()}
        with model.using(leaves):
            loss = model.losses([[example]]).sum() / example.targets
            grads = torch.autograd.grad(loss, list(leaves.values()))
        length = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        clipped += length > 0.05
        for name, grad in zip(params, grads, strict=True):
            wanted[name] += grad[0].double() * min(1.0, 0.05 / length)
    assert clipped, "else nothing is shown"
    for name, tensor in params.items():
        moved = (tensor - report.params[name]) * len(examples)  # type: ignore[union-attr]
        assert torch.allclose(moved.double(), wanted[name], rtol=2e-3, atol=1e-6), name
    assert report.loss == (0.0, 0.0)  # type: ignore[union-attr]  # no noise would cover it
    assert replace(job, noised=None).noised is None


def _loss(model: TransformerLearner, params: Tensors, group: list[Any]) -> float:
    with torch.no_grad(), model.using({n: t.unsqueeze(0) for n, t in params.items()}):
        return float(model.losses([group]))


@pytest.mark.parametrize("kind", ["lora", "prompt", "full"])
def test_clients_together_are_clients_one_by_one(kind: str):
    torch.set_num_threads(1)
    task = TaskSettings(template="plain", max_length=48)
    model = TransformerLearner(toy_model("gpt2"), task, AdapterSettings(kind=kind, rank=4, tokens=3), None, seed=1)  # type: ignore[arg-type]
    rows = {f"c{k}": [{"instruction": t, "response": t[::-1]} for t in TEXTS[k:]] for k in range(3)}
    found = []
    for width in (1, 3):
        method = find("fedavg")(train=train(steps=2, batch_size=2, optimizer="adamw", lr=1e-2))
        sizes = {client: len(held) for client, held in rows.items()}
        guard = Examples(settings(noise=0.5, clip=0.1), sizes, method.train, 1, 0)
        play = Play(method, model, rows, width=width, guard=guard)
        play.rounds(1)
        assert play.records[0].used == 3, play.records[0].lost
        found.append((play.state.params, guard.told()))
    assert found[0][1] == found[1][1]
    for name, tensor in found[0][0].items():
        assert torch.allclose(tensor, found[1][0][name], atol=2e-3 if kind == "full" else 1e-5), name


# -- the account ------------------------------------------------------------------------------------------------------


def test_each_client_pays_for_its_own_steps():
    values = {"few": [1.0] * 4, "many": [1.0] * 64}
    _, guard = played(settings(noise=2.0), 3, values, steps=2)
    few, many = guard.ledger.spent("few"), guard.ledger.spent("many")
    assert few.epsilon > many.epsilon > 0, "a small client's examples are drawn more often"
    assert guard.told()["epsilon"] == few.epsilon
    assert sum(entry.count for (_, holder), entry in guard.ledger.entries.items() if holder == "few") == 6


def test_the_noise_is_solved_for_the_smallest_client_and_keeps_to_the_budget():
    values = {"few": [1.0] * 8, "many": [1.0] * 64}
    _, guard = played(settings(noise=None, epsilon=3.0), 4, values, steps=3)
    assert 2.97 < guard.ledger.spent("few").epsilon <= 3.0
    assert guard.stops(5) is None, "the large client has some left"
    with pytest.raises(BudgetSpent):
        guard.fit("few", 5, 0, 8, _fit(Train(**train(steps=3))))


def test_a_client_without_budget_is_left_out_and_the_run_ends_with_the_last():
    values = {"few": [1.0] * 8, "many": [1.0] * 16}
    play, guard = played(settings(noise=1.0, epsilon=5.0), 14, values, steps=2)
    used = [record.used for record in play.records]
    assert used[0] == 2 and 1 in used and 0 in used and used == sorted(used, reverse=True)
    lost = next(record.lost for record in play.records if record.used == 1)
    assert lost[0]["client"] == "few" and "privacy budget" in lost[0]["reason"]
    assert guard.stops(15) is not None and guard.told()["epsilon"] <= 5.0


def test_a_checkpoint_brings_back_the_ledger_and_the_key():
    _, guard = played(settings(key="secret"), 2)
    other = Examples(settings(key="secret"), {"a": 8, "b": 8}, Train(**train()), 2, 0)
    other.restore(guard.to_json())
    assert other.source.key == guard.source.key and other.told() == guard.told()


# -- what is refused --------------------------------------------------------------------------------------------------


class Peeking(Method, abstract=True):
    """Does with its rows what is asked of it."""

    what: str = "rows"

    @on_client
    async def work(self, client: Any, received: Any) -> Upload:
        """See the class."""
        if self.what == "rows":
            return Upload(None, numbers={"first": len(client.rows())})
        if self.what == "examples":
            return Upload(None, numbers={"first": len(client.examples())})
        if self.what == "score":
            report = await client.score(received.params, "train")
            return Upload(None, metrics=report.metrics)
        delta, _ = await client.gradient(received.params)
        return Upload(delta)


@pytest.mark.parametrize("what", ["rows", "examples", "score", "gradient"])
def test_whatever_else_a_client_half_does_with_its_rows_is_refused(what: str):
    method = Peeking(what=what, train=train())  # type: ignore[arg-type]
    guard = Examples(settings(), {"a": 8}, method.train, 1, 0)
    play = Play(method, learner(), {"a": [{"x": [1.0]}] * 8}, guard=guard)
    play.rounds(1)
    record = play.records[0]
    assert record.used == 0 and "no noise" in record.lost[0]["reason"], record
    assert not guard.ledger.entries


def test_training_losses_are_not_sent():
    play, _ = played(settings())
    assert play.records[0].loss is None and play.records[0].tokens == 0, "how much was drawn would tell, too"


def test_accumulation_and_other_work_are_refused():
    with pytest.raises(ConfigError, match=r"Set train\.accumulate=1 and train\.batch_size=8"):
        Examples(settings(), {"a": 8}, Train(**train(accumulate=2)), 1, 0)
    guard = Examples(settings(), {"a": 8}, Train(**train()), 1, 0)
    with pytest.raises(ModeConflict, match="'score'"):
        guard.fit("a", 1, 0, 8, Score({"w": torch.zeros(SIZE)}))


def test_both_levels_are_refused_for_protocols():
    from fedllm.modes.privacy.guard import guard_of
    from fedllm.protocols import protocols

    with pytest.raises(ModeConflict, match="protocol"):
        guard_of(settings(), protocols()["fedbert"](accept_leak=True), {"a": 8}, 1, 1, 0)

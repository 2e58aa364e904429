"""Leaks: what no noise covers stays at the client, whoever asks; noise and account of a sum that is formed again."""

from __future__ import annotations

import asyncio
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.core.errors import ModeConflict, RoundFailed, RunError
from fedllm.core.guard import Guard, Quiet
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Fit
from fedllm.effects.rig import Play
from fedllm.engine.job import Job
from fedllm.engine.lasting import FILE, lasting
from fedllm.engine.local import LocalWorker
from fedllm.engine.together import run_together
from fedllm.methods import find, methods
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.modes.around import Around
from fedllm.modes.privacy.central import Central
from fedllm.modes.privacy.examples import Examples
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.modes.robust import robust_guard
from fedllm.tasks.function import FunctionLearner
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

pytest.importorskip("dp_accounting")
ONE_STEP = {"steps": 1, "batch_size": 4, "lr": 1.0, "optimizer": "sgd", "clip_norm": None}


def learner(size: int = 16) -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x[0]) ** 2).sum() / 2 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(size)})


def rows(clients: int = 3, value: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    return {f"c{k}": [{"x": [value]}] * 8 for k in range(clients)}


def examples(method: Any, held: Any = None, **given: Any) -> Examples:
    what = {"level": "example", "noise": 1.0, "delta": 1e-3, "key": "seed", **given}
    return Examples(PrivacySettings(**what), {c: len(r) for c, r in (held or rows()).items()}, method.train, 4, 0)


def central(method: Any, **given: Any) -> Central:
    return Central(PrivacySettings(**{"noise": 1.0, "delta": 1e-3, "clip": 1.0, **given}), method, 10, 5, 8, 0)


def uniform(**options: Any) -> Any:
    return find("fedavg")(train=ONE_STEP, weighting="uniform", **options)


# -- at the client ----------------------------------------------------------------------------------------------------


class Curious(FedAvg, abstract=True):
    """Asks for more than training, and measures by training."""

    @on_client
    async def steal(self, client: Any, received: Received) -> Upload:
        report = await client.fit(received.params, self.train)
        return Upload(report.delta, client.size, report.metrics)

    @on_client
    async def evaluate(self, client: Any, received: Received) -> Upload:
        report = await client.fit(received.params, self.train)
        return Upload(None, metrics={"moved": (float(report.delta["w"].sum()), 1.0)})

    @on_client
    async def evaluate_base(self, client: Any, received: Received) -> Upload:
        return Upload(None, metrics={"seen": (float(len(client.rows("train"))), 1.0)})


@pytest.mark.parametrize(
    ("op", "word"), [("steal", "answer 'work' and measurements alone"), ("evaluate", "'fit' in a measurement"),
                     ("evaluate_base", "reads the rows of 'train'")]
)  # fmt: skip
def test_a_client_refuses_what_no_noise_covers_whatever_the_server_is(op: str, word: str) -> None:
    """The server's own guard says nothing: it may be anybody's."""
    method = Curious(train=Train(**ONE_STEP))
    play = Play(method, learner(), rows(), guard=examples(method))
    play.server.guard = Guard()
    asked = {c: Received(dict(play.state.params)) for c in rows()}

    async def go() -> list[Any]:
        play.server.begin(1)
        return [answer async for answer in play.server.ask(getattr(method, op), asked)]

    assert asyncio.run(go()) == []
    assert len(play.server.lost) == 3 and all(word in one["reason"] for one in play.server.lost), play.server.lost


def test_what_was_drawn_shows_in_no_count() -> None:
    """Photon weighs uploads by the tokens that were seen: of a private fit that is a public number."""

    def counts(value: float) -> tuple[Any, ...]:
        held = rows(1, value)
        method = uniform()
        fit = Fit({"w": torch.zeros(16)}, method.train)
        rule = examples(method, held, rate=0.5).fit("c0", 1, 0, 8, fit)
        job = Job(fit, "c0", 0, 1, 1, lambda _: learner().prepare(held["c0"]), {}, noised=rule)
        (report,) = run_together(learner(), [job])
        return report.loss, report.examples, report.tokens  # type: ignore[union-attr]

    assert counts(1.0) == counts(5.0) == ((0.0, 0.0), 4, 4)


def test_one_example_whose_loss_is_not_finite_does_not_show() -> None:
    def loss(params: Tensors, given: Any) -> torch.Tensor:
        return sum((params["w"] * x[0]).sum() for x in given)  # type: ignore[return-value]

    wild = FunctionLearner(loss, {"w": torch.ones(4)})
    held = [{"x": [1.0]}] * 7 + [{"x": [float("inf")]}]
    method = uniform()
    fit = Fit({"w": torch.ones(4)}, method.train)
    rule = examples(method, {"c0": held}, rate=1.0).fit("c0", 1, 0, 8, fit)
    job = Job(fit, "c0", 0, 1, 1, lambda _: wild.prepare(held), {}, noised=rule)
    (report,) = run_together(wild, [job])
    assert not isinstance(report, RoundFailed) and torch.isfinite(report.params["w"]).all()  # type: ignore[union-attr]
    (plain,) = run_together(wild, [replace(job, noised=None)])
    assert isinstance(plain, RoundFailed)  # without privacy it is told


def test_noise_does_not_depend_on_the_ranks_of_those_who_share_the_pass() -> None:
    torch.set_num_threads(1)
    model = TransformerLearner(
        toy_model("llama"), TaskSettings(template="plain", max_length=48), AdapterSettings(rank=4), None, seed=1
    )
    held = model.prepare([{"instruction": text, "response": text} for text in ("one two", "three", "four five six")])
    start = model.initial()

    def cut(rank: int) -> Tensors:
        return {n: t[:rank] if n.endswith("lora_A") else t[:, :rank] for n, t in start.items()}

    method = find("fedavg")(train={**ONE_STEP, "steps": 2, "lr": 0.1})
    guard = examples(method, {"a": held, "b": held}, clip=0.1)

    def job(client: str, rank: int) -> Job:
        fit = Fit({n: t.clone() for n, t in cut(rank).items()}, method.train)
        return Job(fit, client, 0, 1, 1, lambda _: held, {}, noised=guard.fit(client, 1, 0, 3, fit))

    (alone,) = run_together(model, [job("a", 2)])
    small, large = run_together(model, [job("a", 2), job("b", 4)])
    for name, tensor in alone.params.items():  # type: ignore[union-attr]
        assert torch.allclose(small.params[name], tensor, atol=1e-6), name  # type: ignore[union-attr]
        assert large.params[name].shape == start[name].shape  # type: ignore[union-attr]


@pytest.mark.parametrize("key", sorted(k for k, m in methods().items() if m.__module__.startswith("fedllm.")))
def test_a_method_says_what_else_it_asks_for(key: str) -> None:
    """What a method asks clients for beside `work` and measurements, its server half names in the source."""
    kind = methods()[key]
    others = {n for n in kind.model_construct().client_functions()} - {"work", "evaluate", "evaluate_base"}
    text = "".join(
        inspect.getsource(one) for one in kind.__mro__ if one.__module__.startswith("fedllm.") and one is not object
    )
    asked = {name for name in others if f"server, self.{name}" in text or f"server.ask(self.{name}" in text}
    assert asked <= set(kind.asks), f"{key} asks for {sorted(asked - set(kind.asks))} and does not say so"


def test_a_guard_around_another_passes_on_all_that_a_guard_has() -> None:
    public = {name for name in vars(Guard) if not name.startswith("_")}
    told_at_construction = {"hides", "quiet", "private", "lasts"}
    assert public - set(vars(Around)) == told_at_construction, "Around forgets a part of Guard"
    inner = examples(uniform())
    outer = robust_guard({}, {"name": "local-noise"}, inner, uniform(), ["c0"], 1, 0)
    written: list[Any] = []
    outer.keep = written.append
    outer.fit("c0", 1, 0, 8, Fit({"w": torch.zeros(4)}, uniform().train))
    assert len(written) == 1 and outer.spent("c0") == inner.spent("c0") is not None
    assert (outer.hides, outer.quiet, outer.lasts) == (True, True, False)


def test_models_to_compare_with_tell_nothing_of_their_training() -> None:
    method = find("local")(train=ONE_STEP)

    def told(guard: Guard) -> dict[str, Any]:
        play = Play(method, learner(), rows())
        worker = LocalWorker(play.worker.learner, method, play.worker.rows, 0, guard=guard)
        from fedllm.core.server import Request
        from fedllm.core.wire import encode

        request = Request("r", "c0", "work", 1, 1, 3, encode(Received(dict(play.state.params))))
        (reply,) = worker.answer([request])
        return {"metrics": decode(reply.body).metrics, "tokens": reply.cost["tokens"]}  # type: ignore[union-attr]

    assert "loss" in told(Guard())["metrics"]
    assert told(Quiet()) == {"metrics": {}, "tokens": 0.0}
    for guard in (
        examples(uniform()),
        robust_guard({}, {"name": "prune"}, examples(uniform()), uniform(), ["a"], 1, 0),
    ):
        assert isinstance(guard.beside(), Quiet)
    assert type(Guard().beside()) is Guard


def test_packed_rows_are_no_unit() -> None:
    from fedllm.recipe import load_recipe
    from fedllm.run import prepare

    recipe = load_recipe(
        {
            "method": "fedavg", "rounds": 1, "model": {"name": "toy:llama"}, "task": {"pack": True, "max_length": 32},
            "data": {"name": "organisations", "documents": 4}, "privacy": {"level": "example", "epsilon": 8.0},
        }
    )  # fmt: skip
    with pytest.raises(ModeConflict, match=r"Set task\.pack=false"):
        prepare(recipe)


# -- a round that is played again -------------------------------------------------------------------------------------


def total(value: float) -> Tensors:
    return {"update/w": torch.full((1000,), value, dtype=torch.float64)}


@pytest.mark.parametrize("mechanism", ["gaussian", "ftrl"])
def test_another_sum_of_a_round_gets_other_noise_and_is_paid_for(mechanism: str) -> None:
    tree = {"tree": {"participations": 8, "separation": 1}} if mechanism == "ftrl" else {}
    guard = central(uniform(), mechanism=mechanism, **tree)
    for round in (1, 2):
        guard.published(total(0.0), 0.0, round)
    first = guard.published(total(0.0), 0.0, 3)["update/w"]
    before = guard.ledger.spent().epsilon
    same = guard.published(total(0.0), 0.0, 3)["update/w"]
    assert torch.equal(first, same) and guard.ledger.spent().epsilon == before
    other = guard.published(total(1e-9), 0.0, 3)["update/w"]
    difference = (other - first).double() * guard.expected  # two draws of noise, and not 1e-9
    assert float(difference.std()) > 1.0 and guard.ledger.spent().epsilon > before
    again = guard.published(total(1e-9), 0.0, 3)["update/w"]
    assert torch.equal(again, other)


def test_trees_after_a_second_beginning_still_telescope() -> None:
    """The noise of a tree's running sums stays that of its nodes: it does not grow with the steps."""
    guard = central(uniform(), mechanism="ftrl", tree={"participations": 8, "separation": 1})
    plain = [guard.published(total(0.0), 0.0, round)["update/w"].double() for round in (1, 2, 3)]
    found = [*plain, *(guard.published(total(0.5), 0.0, r)["update/w"].double() for r in (3, 4, 5, 6, 7, 8))]
    tail = torch.stack(found[3:]) * guard.expected - 0.5
    # of the second tree: N(8) - N(2), two running sums, of one node each
    assert float(tail.sum(0).std()) == pytest.approx(2**0.5, rel=0.15)


def test_what_is_released_is_written_down_before(tmp_path: Path) -> None:
    guard, file = central(uniform()), tmp_path / FILE
    lasting(guard, file)
    released = guard.published(total(0.0), 0.0, 1)["update/w"]
    held = json.loads(file.read_text())
    assert [entry[0] for entry in held["ledger"]["spent"]] == ["round 1"] and file.stat().st_mode & 0o777 == 0o600
    # the process dies before any checkpoint, and the round has another sum now
    after = central(uniform())
    assert after.source.key != guard.source.key
    lasting(after, file)
    assert after.source.key == guard.source.key
    other = after.published(total(0.25), 0.0, 1)["update/w"]
    assert [entry[0] for entry in json.loads(file.read_text())["ledger"]["spent"]] == ["round 1", "round 1, again 1"]
    assert float(((other - released).double() * after.expected - 0.25).std()) > 1.0


def test_a_checkpoint_does_not_forget_what_was_released_after_it(tmp_path: Path) -> None:
    guard, file = central(uniform()), tmp_path / FILE
    lasting(guard, file)
    guard.published(total(0.0), 0.0, 1)
    checkpoint = guard.to_json()
    guard.published(total(0.0), 0.0, 2)
    spent = guard.ledger.spent().epsilon
    after = central(uniform())
    lasting(after, file)
    after.restore(checkpoint)
    assert after.ledger.spent().epsilon == spent
    file.write_text("{")
    with pytest.raises(RunError, match="Restore the file from a copy"):
        lasting(central(uniform()), file)


def test_epsilon_without_the_draw_is_larger() -> None:
    guard = central(uniform(), rate=0.1)
    for round in range(1, 9):
        guard.published(total(0.0), 0.0, round)
    assert guard.known() > 3 * guard.ledger.spent().epsilon
    whole = central(uniform(), rate=1.0)
    whole.published(total(0.0), 0.0, 1)
    assert whole.known() == pytest.approx(whole.ledger.spent().epsilon)


@pytest.mark.parametrize("level", ["example", "client"])
def test_a_method_that_asks_for_more_is_refused_before_training(level: str) -> None:
    from fedllm.modes.privacy.guard import guard_of

    method = find("fedpeptao")(weighting="uniform", control=False)
    with pytest.raises(ModeConflict, match="score_layers"):
        guard_of(PrivacySettings(level=level, noise=1.0, delta=1e-3), method, {"a": 8, "b": 8}, 1, 1, 0)  # type: ignore[arg-type]

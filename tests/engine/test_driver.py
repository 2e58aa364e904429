"""Driver - many coroutines, few passes: every client gets its own answer, and one client's trouble stays its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, DataError, ModelError, RoundFailed
from fedllm.core.message import Upload
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Asked, Embed, Example, Fit, Generate, Gradient, Score
from fedllm.engine.driver import Turn, drive
from fedllm.engine.job import Job, no_data
from fedllm.tasks.function import FunctionLearner

SGD = Train(steps=3, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=4)
TARGETS = {"a": [1.0], "b": [2.0, 4.0], "c": [-1.0, 0.0, 5.0], "empty": []}


def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(params["w"] - x).square().sum() / 2 for x in examples]).sum()


class Counting(FunctionLearner):
    """Counts passes, and runs out of memory beyond a width."""

    def __init__(self, limit: int | None = None, fits: int | None = None) -> None:
        super().__init__(loss, {"w": torch.zeros(1)})
        self.width_limit, self.fits = limit, fits
        self.widths: list[int] = []

    def losses(self, groups: Any) -> torch.Tensor:
        self.widths.append(len(groups))
        if self.fits is not None and len(groups) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return super().losses(groups)


def turn(client: str, program: Callable[..., Any], learner: FunctionLearner) -> Turn:
    def examples(split: str) -> list[Example]:
        found = learner.prepare([{"x": [x]} for x in TARGETS[client]])
        if not found and split == "train":
            raise no_data(client, split)
        return found

    return Turn(client, program(client), lambda request: Job(request, client, 0, 1, 1, examples, {}))


def play(programs: dict[str, Callable[..., Any]], learner: FunctionLearner | None = None) -> dict[str, Any]:
    learner = learner or Counting()
    turns = [turn(client, program, learner) for client, program in programs.items()]
    return {t.client: outcome for t, outcome in drive(turns, learner)}


def start(value: float = 0.0) -> Tensors:
    return {"w": torch.tensor([value])}


def after(client: str, x: float, steps: int) -> float:
    mean = sum(TARGETS[client]) / len(TARGETS[client])
    return mean + (x - mean) * 0.9**steps


async def fit(client: str) -> Upload:
    report = await Asked(Fit(start(), SGD))
    return Upload(report.delta, weight=report.steps)


# -- everybody gets their own answer ----------------------------------------------------------------------------------


def test_alike_requests_share_passes_and_come_back_to_their_own_client() -> None:
    learner = Counting()
    found = play({c: fit for c in "abc"}, learner)
    assert learner.widths == [3, 3, 3], "three steps, each one pass over three clients"
    for client in "abc":
        assert found[client].update["w"].item() == pytest.approx(after(client, 0, 3), abs=1e-6)


def test_different_orders_of_different_questions() -> None:
    """Each client asks other things in another order; the answers must not be mixed up."""

    async def first(client: str) -> Upload:
        report = await Asked(Fit(start(1.0), SGD))
        score = await Asked(Score(report.params))
        gradient, (total, n) = await Asked(Gradient(start(1.0)))
        return Upload(
            gradient, numbers={"fit": float(report.params["w"]), "score": score.counts["loss"], "g": [total, n]}
        )

    async def second(client: str) -> Upload:
        gradient, (total, n) = await Asked(Gradient(start(1.0)))
        report = await Asked(Fit(start(1.0), SGD))
        score = await Asked(Score(report.params))
        return Upload(
            gradient, numbers={"fit": float(report.params["w"]), "score": score.counts["loss"], "g": [total, n]}
        )

    async def third(client: str) -> Upload:
        score = await Asked(Score(start(after(client, 1.0, 3))))
        gradient, (total, n) = await Asked(Gradient(start(1.0)))
        report = await Asked(Fit(start(1.0), SGD))
        return Upload(
            gradient, numbers={"fit": float(report.params["w"]), "score": score.counts["loss"], "g": [total, n]}
        )

    found = play({"a": first, "b": second, "c": third})
    for client in "abc":
        values, end = TARGETS[client], after(client, 1.0, 3)
        numbers = found[client].numbers
        assert numbers["fit"] == pytest.approx(end, abs=1e-6)
        assert numbers["score"] == pytest.approx(sum((end - x) ** 2 / 2 for x in values), abs=1e-5)
        assert numbers["g"] == pytest.approx([sum((1 - x) ** 2 / 2 for x in values), len(values)], abs=1e-5)
        assert found[client].update["w"].item() == pytest.approx(1 - sum(values) / len(values), abs=1e-6)


def test_clients_that_ask_more_often_do_not_hold_up_the_others() -> None:
    async def often(client: str) -> Upload:
        x = start()
        for _ in range(4):
            x = (await Asked(Fit(x, SGD))).params
        return Upload(x)

    order = []
    learner = Counting()
    turns = [turn("a", often, learner), turn("b", fit, learner), turn("c", fit, learner)]
    for done, outcome in drive(turns, learner):
        order.append(done.client)
        if done.client == "a":
            assert outcome.update["w"].item() == pytest.approx(after("a", 0, 12), abs=1e-6)  # type: ignore[union-attr]
    assert order == ["b", "c", "a"]
    assert learner.widths == [3] * 3 + [1] * 9
    assert [t.cost["steps"] for t in turns] == [12.0, 3.0, 3.0]
    assert [t.cost["tokens"] for t in turns] == [12.0, 6.0, 9.0], "one token an example, whole batches"


def test_a_client_that_asks_nothing_is_done_at_once() -> None:
    async def silent(client: str) -> Upload:
        return Upload(numbers={"who": client})

    found = play({"a": silent, "b": fit, "c": silent})
    assert found["a"].numbers == {"who": "a"}
    assert found["b"].update["w"].item() == pytest.approx(after("b", 0, 3), abs=1e-6)
    assert play({}) == {}


def test_what_differs_does_not_share_a_pass() -> None:
    def asking(train: Train, penalty: Any = None) -> Callable[..., Any]:
        async def program(client: str) -> Upload:
            return Upload((await Asked(Fit(start(), train, penalty))).params)

        return program

    def pull(params: Tensors, start: Tensors) -> torch.Tensor:
        return (params["w"] - start["w"]).square().sum()

    other = SGD.model_copy(update={"lr": 0.2})
    learner = Counting()
    found = play({"a": asking(SGD), "b": asking(other), "c": asking(SGD, pull)}, learner)
    assert learner.widths == [1] * 9
    assert found["b"].update["w"].item() == pytest.approx(3 - 3 * 0.8**3, abs=1e-6)
    assert found["a"].update["w"].item() == pytest.approx(after("a", 0, 3), abs=1e-6)


def test_one_bound_method_is_one_rule() -> None:
    """`self.pull` is another object each time it is written; the passes must be shared all the same."""

    class Rule:
        def pull(self, params: Tensors, start: Tensors) -> torch.Tensor:
            return (params["w"] - start["w"]).square().sum()

    rule, learner = Rule(), Counting()

    async def program(client: str) -> Upload:
        return Upload((await Asked(Fit(start(), SGD, rule.pull))).params)

    play({c: program for c in "abc"}, learner)
    assert learner.widths == [3] * 3


def test_a_width_limit_is_kept() -> None:
    learner = Counting(limit=2)
    found = play({c: fit for c in "abc"}, learner)
    assert learner.widths == [2, 2, 2, 1, 1, 1]
    assert found["c"].update["w"].item() == pytest.approx(after("c", 0, 3), abs=1e-6)


def test_the_grad_mode_of_client_code_is_the_engines() -> None:
    """A caller inside no_grad must not silently stop client code from differentiating."""
    seen = []

    async def program(client: str) -> Upload:
        seen.append(torch.is_grad_enabled())
        report = await Asked(Fit(start(), SGD))
        seen.append(torch.is_grad_enabled())
        return Upload(report.delta)

    with torch.no_grad():
        found = play({"a": program})
    assert seen == [True, True]
    assert found["a"].update["w"].item() == pytest.approx(after("a", 0, 3), abs=1e-6)


# -- one client's trouble stays its own -------------------------------------------------------------------------------


def test_an_exception_ends_one_client_and_the_others_finish() -> None:
    async def early(client: str) -> Upload:
        raise ValueError("before anything")

    async def late(client: str) -> Upload:
        await Asked(Fit(start(), SGD))
        raise KeyError("after training")

    found = play({"a": early, "b": fit, "c": late})
    assert isinstance(found["a"], ValueError)
    assert isinstance(found["c"], KeyError)
    assert found["b"].update["w"].item() == pytest.approx(after("b", 0, 3), abs=1e-6)


def test_a_client_without_rows_gets_the_error_and_the_others_train() -> None:
    found = play({"a": fit, "empty": fit, "c": fit})
    assert isinstance(found["empty"], DataError)
    assert "'empty' has no usable rows in its train split" in str(found["empty"])
    assert found["c"].update["w"].item() == pytest.approx(after("c", 0, 3), abs=1e-6)


def test_a_client_can_catch_what_its_request_came_to() -> None:
    async def careful(client: str) -> Upload:
        try:
            await Asked(Fit(start(), SGD))
        except DataError:
            score = await Asked(Score(start()))
            return Upload(numbers={"caught": True, "counts": score.counts})
        return Upload(numbers={"caught": False})

    found = play({"empty": careful, "b": careful})
    assert found["empty"].numbers == {"caught": True, "counts": {}}
    assert found["b"].numbers == {"caught": False}


def test_a_loss_that_is_not_finite_is_an_error_of_that_client_alone() -> None:
    async def from_(client: str) -> Upload:
        x = start(float("inf") if client == "b" else 0.0)
        return Upload((await Asked(Fit(x, SGD))).delta)

    found = play({c: from_ for c in "abc"})
    assert isinstance(found["b"], RoundFailed)
    assert "client 'b'" in str(found["b"]) and "not finite" in str(found["b"])
    for client in "ac":
        assert found[client].update["w"].item() == pytest.approx(after(client, 0, 3), abs=1e-6)


def test_a_rule_that_breaks_is_an_error_of_its_clients() -> None:
    """Whatever is raised inside a pass: the clients of that pass are run one by one to find whose it is."""

    def broken(params: Tensors, start: Tensors, special: Tensors) -> torch.Tensor:
        return params["w"].sum() * special["missing"].sum()

    async def program(client: str) -> Upload:
        given = {"special": {"missing" if client != "b" else "other": torch.ones(1)}}
        return Upload((await Asked(Fit(start(), SGD, broken, given=given))).params)

    found = play({c: program for c in "abc"})
    assert isinstance(found["b"], KeyError)
    assert isinstance(found["a"], Upload) and isinstance(found["c"], Upload)


@pytest.mark.parametrize("thing", ["sleep", "nothing", "future"])
def test_awaiting_something_else_is_refused_with_what_may_be_awaited(thing: str) -> None:
    async def program(client: str) -> Upload:
        if thing == "sleep":
            await asyncio.sleep(0)
        elif thing == "nothing":
            await Asked(None)  # type: ignore[arg-type]
        else:
            await asyncio.get_running_loop().create_future()
        return Upload()

    async def go() -> dict[str, Any]:
        return play({"a": program, "b": fit})

    found = asyncio.run(go())
    assert isinstance(found["a"], ConfigError)
    assert "await client.fit, gradient, score, outputs, hidden, generate, embed or exchange" in str(found["a"])
    assert isinstance(found["b"], Upload)


def test_a_learner_that_cannot_do_it_is_an_error_of_the_asking_clients() -> None:
    async def write(client: str) -> Upload:
        await Asked(Generate(None, ("hello",)))
        return Upload()

    async def embed(client: str) -> Upload:
        await Asked(Embed(None, ("hello",)))
        return Upload()

    found = play({"a": write, "b": embed, "c": fit})
    assert isinstance(found["a"], ModelError) and isinstance(found["b"], ModelError)
    assert isinstance(found["c"], Upload)


def test_where_memory_does_not_suffice_half_the_width_is_tried() -> None:
    learner = Counting(fits=2)
    found = play({c: fit for c in "abc"}, learner)
    for client in "abc":
        assert found[client].update["w"].item() == pytest.approx(after(client, 0, 3), abs=1e-6)
    assert learner.widths[0] == 3 and set(learner.widths[1:]) <= {1, 2}


def test_where_memory_does_not_suffice_for_one_client_it_says_so() -> None:
    found = play({"a": fit, "b": fit}, Counting(fits=0))
    assert all(isinstance(outcome, ModelError) for outcome in found.values())
    assert "memory does not suffice for client 'a'" in str(found["a"])
    assert "train.batch_size" in str(found["a"])


def test_interrupting_the_program_is_not_an_error_of_a_client() -> None:
    async def interrupted(client: str) -> Upload:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play({"a": interrupted})


def test_no_coroutine_is_left_unclosed(recwarn: pytest.WarningsRecorder) -> None:
    closed = []

    async def program(client: str) -> Upload:
        try:
            await Asked(Fit(start(), SGD))
            raise ValueError(client)
        finally:
            closed.append(client)

    play({c: program for c in "abc"})
    assert sorted(closed) == ["a", "b", "c"]
    assert not [w for w in recwarn if "never awaited" in str(w.message)]

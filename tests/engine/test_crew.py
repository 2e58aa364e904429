"""Several processes that share the passes of a cohort: the results, their order, and what goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedllm
from fedllm.attack import siege
from fedllm.core.errors import ConfigError, FedLLMError, ModelError, RunError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Fit, Probe, Score
from fedllm.data.federation import Federation
from fedllm.engine import crew as module
from fedllm.engine.crew import Crew
from fedllm.engine.driver import answered
from fedllm.engine.job import Job
from fedllm.engine.width import sharing
from fedllm.recipe import Recipe, load_recipe
from fedllm.run import Ground, Watch, _placed
from fedllm.tasks.function import FunctionLearner

TRAIN = Train(steps=2, batch_size=2, lr=0.1)


def loss(params: Tensors, examples: list[torch.Tensor]) -> torch.Tensor:
    x = torch.stack(list(examples))
    if bool((x < 0).any()):
        raise LookupError("a row is below zero")
    return (params["w"] - x).square().sum()


def learner() -> FunctionLearner:
    return FunctionLearner(loss, {"w": torch.zeros(1), "idle": torch.ones(2, 0)})


def there(process: int) -> Mapping[str, Any]:
    return {"": learner()}


def broken(process: int) -> Mapping[str, Any]:
    raise ModelError("The model is not there.", action="Put it there.")


class Work:
    """Jobs of clients whose rows are their number."""

    def __init__(self) -> None:
        self.learner = learner()
        self.examples = {k: self.learner.prepare([{"x": [float(k)]}] * 3) for k in range(-1, 9)}

    def job(self, k: int, request: Any = None) -> Job:
        request = request or Fit({"w": torch.full((1,), float(k))}, TRAIN)
        return Job(request, f"c{k}", 0, 1, 1, lambda split: self.examples[k], {"idle": torch.ones(2, 0)})

    def jobs(self, *numbers: int) -> list[Job]:
        return [self.job(k) for k in numbers]


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture(scope="module")
def shared() -> Iterator[Crew]:
    made = Crew(there, 3, {})
    yield made
    made.close()


@pytest.fixture
def crew(shared: Crew, work: Work) -> Crew:
    shared.names = {id(work.learner): ""}
    return shared


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_results_are_those_of_one_process_in_the_order_of_the_jobs(crew: Crew, work: Work, count: int) -> None:
    jobs = work.jobs(*range(1, 1 + count))
    found, alone = list(crew.run(work.learner, jobs)), answered(work.learner, jobs)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.params["w"], other.params["w"]) and torch.equal(one.delta["w"], other.delta["w"])
        assert (one.steps, one.loss, one.tokens) == (other.steps, other.loss, other.tokens)
    assert len({float(one.params["w"]) for one in found}) == count


def test_rows_stay_there_until_they_are_too_many(crew: Crew, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [float(r.params["w"]) for r in answered(work.learner, work.jobs(*range(9)))]
    list(crew.run(work.learner, work.jobs(*range(9))))
    held = [dict(mate.held) for mate in crew.mates]
    list(crew.run(work.learner, work.jobs(*range(9))))
    assert [mate.held == before for mate, before in zip(crew.mates, held, strict=True)] == [True, True]
    monkeypatch.setattr(module, "HELD_TOKENS", 4)
    for _ in range(3):
        assert [float(r.params["w"]) for r in crew.run(work.learner, work.jobs(*range(9)))] == wanted
        turned = [*range(3, 9), *range(3)]
        assert [float(r.params["w"]) for r in crew.run(work.learner, work.jobs(*turned))] == wanted[3:] + wanted[:3]
    assert all(len(mate.held) == 3 for mate in crew.mates), "no more than one letter needs"


def test_no_more_are_started_than_have_work(work: Work) -> None:
    crew = Crew(there, 9, {"": work.learner})
    list(crew.run(work.learner, work.jobs(1)))
    assert not crew.mates
    for count, mates in ((2, 1), (3, 2), (2, 2)):
        list(crew.run(work.learner, work.jobs(*range(count))))
        assert len(crew.mates) == mates
    crew.close()


def test_an_error_of_one_client_has_its_name_and_text_and_the_others_go_on(crew: Crew, work: Work) -> None:
    found = list(crew.run(work.learner, work.jobs(1, 2, 3, 4, -1, 6)))
    assert [isinstance(result, Exception) for result in found] == [False] * 4 + [True, False]
    assert type(found[4]).__name__ == "LookupError" and str(found[4]) == "a row is below zero"


def test_rows_that_cannot_be_read_are_one_clients_alone(crew: Crew, work: Work) -> None:
    del work.examples[4], work.examples[5], work.examples[6]
    found = list(crew.run(work.learner, work.jobs(1, 2, 3, 4, 5, 6)))
    assert [type(result).__name__ for result in found] == ["FitReport"] * 3 + ["KeyError"] * 3
    work.examples[5] = work.learner.prepare([{"x": [5.0]}] * 3)
    found = list(crew.run(work.learner, work.jobs(1, 2, 3, 4, 5, 6)))
    assert [type(result).__name__ for result in found] == ["FitReport"] * 3 + ["KeyError", "FitReport", "KeyError"]
    assert float(found[4].params["w"]) == float(answered(work.learner, work.jobs(5))[0].params["w"])


def test_an_answer_that_nobody_took_is_not_the_next_one(crew: Crew, work: Work) -> None:
    left = crew.run(work.learner, work.jobs(1, 2, 3))
    next(left)
    left.close()
    found = list(crew.run(work.learner, work.jobs(4, 5, 6)))
    assert [float(a.params["w"]) for a in found] == [
        float(b.params["w"]) for b in answered(work.learner, work.jobs(4, 5, 6))
    ]


def test_measurements_are_shared_too(crew: Crew, work: Work) -> None:
    jobs = [work.job(k, Score({"w": torch.zeros(1)}, "train")) for k in range(4)]
    found = [report.counts for report in crew.run(work.learner, jobs)]
    assert found == [report.counts for report in answered(work.learner, jobs)]


def test_a_probe_moves_there_what_it_moves_here(crew: Crew, work: Work) -> None:
    def first() -> dict[str, torch.Tensor]:  # of the learner's tensors, those that the method trains
        return {"w": torch.zeros(1)}

    probe = Probe(None, [3, 5], TRAIN, 1e-2, lr=0.1, first=first)
    jobs = [work.job(k, probe) for k in (1, 2, 3)]
    found, alone = list(crew.run(work.learner, jobs)), answered(work.learner, jobs)
    for one, other in zip(found, alone, strict=True):
        assert one.params.keys() == other.params.keys() == {"w"}
        assert torch.equal(one.params["w"], other.params["w"]) and torch.equal(one.slopes, other.slopes)


def test_a_rule_that_cannot_be_sent_is_named(crew: Crew, work: Work) -> None:
    start = {"w": torch.zeros(1)}
    rule = lambda params, start: params["w"].sum()  # noqa: E731  (it has no name of its own)
    with pytest.raises(ConfigError, match=r"'c2' asks for cannot be sent .* set processes=1"):
        list(crew.run(work.learner, [work.job(k, Fit(start, TRAIN, penalty=rule)) for k in range(4)]))
    assert len(list(crew.run(work.learner, work.jobs(1, 2, 3)))) == 3, "and nothing is left in the way"


def test_a_process_that_dies_ends_the_run_with_a_word(work: Work) -> None:
    crew = Crew(there, 2, {"": work.learner})
    list(crew.run(work.learner, work.jobs(1, 2)))
    os.kill(crew.mates[0].process.pid or 0, signal.SIGKILL)
    told = r"Process 1 of this run was ended by signal 9 \(SIGKILL\).*Lower 'processes' .* 'fedllm resume'"
    with pytest.raises(RunError, match=told):
        list(crew.run(work.learner, work.jobs(1, 2)))
    crew.close()
    assert len(list(crew.run(work.learner, work.jobs(1, 2)))) == 2, "a new one is started"
    crew.close()


def test_what_keeps_a_process_from_starting_is_told(work: Work) -> None:
    crew = Crew(broken, 2, {"": work.learner})
    with pytest.raises(ModelError, match=r"The model is not there. Put it there."):
        list(crew.run(work.learner, work.jobs(1, 2)))
    crew.close()
    here = Crew(lambda process: {}, 2, {"": work.learner})
    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        list(here.run(work.learner, work.jobs(1, 2)))
    with pytest.raises(ConfigError, match="processes=0 cannot work"):
        Crew(there, 0, {})


def test_processes_without_work_or_threads_are_told_of(work: Work) -> None:
    crew, threads = Crew(there, 8, {"": work.learner}), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert crew.notes(3) == [
            "processes=8 was given, more than the clients of a round (3): the others have nothing to do.",
            "processes=8 was given, more than the threads that there are (2): they wait for each other.",
        ]
        torch.set_num_threads(8)
        assert crew.notes(8) == []
    finally:
        torch.set_num_threads(threads)


def test_threads_are_shared_while_all_work(crew: Crew, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(module, "answered", lambda *given: (seen.append(torch.get_num_threads()), answered(*given))[1])
    try:
        torch.set_num_threads(6)
        list(crew.run(work.learner, work.jobs(1, 2, 3)))
        list(crew.run(work.learner, work.jobs(1)))
        assert seen == [2, 6] and torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_are_even_and_in_order(count: int, parts: int) -> None:
    found = module._cut(list(range(count)), parts)  # type: ignore[arg-type]
    assert [k for share in found for k in share] == list(range(count))
    sizes = [len(share) for share in found]
    assert len(sizes) == min(count, parts) and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def data() -> Federation:
    rows = [
        {"text": f"say {i}", "instruction": f"say {i}", "response": f"it is {i * 7 % 5}", "label": "ab"[i % 2]}
        for i in range(24)
    ]
    own = {f"c{k}": {"train": rows[6 * k : 6 * k + 4], "eval": rows[6 * k + 4 : 6 * k + 6]} for k in range(4)}
    return Federation.of(own, public=rows[:4])


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "name": "crew", "rounds": 2, "method": "fedprox", "train": {"steps": 2, "batch_size": 2}, "cohort_width": 2,
        "model": {"name": "toy:llama"}, "adapter": {"rank": 2}, "task": {"max_length": 48},
        "evaluation": {"against": ["local"]}, **changes,
    }  # fmt: skip


UNIFORM = {"name": "fedavg", "weighting": "uniform"}
# fmt: off
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"adapter": {"kind": "full"}, "method": "fedavg"},
    "groups": {
        "method": "fedmd", "model": {"name": "toy:bert"}, "task": {"kind": "sequence-classification", "max_length": 48},
        "groups": {"a": {"share": 0.5}, "b": {"share": 0.5, "model": {"name": "toy:gpt2"}}},
    },
    "examples": {"privacy": {"level": "example", "noise": 1.0, "epsilon": None, "key": "seed"}, "method": "fedavg"},
    "clients": {"privacy": {"level": "client", "noise": 1.0, "epsilon": None, "key": "seed"}, "method": UNIFORM},
    "secure": {"secure": {}, "method": UNIFORM},
    "codec": {"codec": {"kind": "topk"}},
    "attack": {"attack": "sign-flip", "defence": "median", "method": "fedavg"},
}
# fmt: on


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_same_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sent = recipe(**RUNS[name]), list[int]()
    ask = module._Mate.ask
    monkeypatch.setattr(module._Mate, "ask", lambda mate, name, jobs: (sent.append(len(jobs)), ask(mate, name, jobs)))
    one = fedllm.run(asked, data=data(), folder=tmp_path / "one")
    assert not sent
    two = fedllm.run({**asked, "processes": 2}, data=data(), folder=tmp_path / "two")
    assert sum(sent) >= 8, "half of four clients, twice and for two legs"
    assert one.state.params.keys() == two.state.params.keys()
    for tensor, other in zip(one.state.params.values(), two.state.params.values(), strict=True):
        assert torch.allclose(tensor, other, atol=2e-5)
    assert one.table["bytes"] == two.table["bytes"] and one.table["tokens"] == two.table["tokens"]
    assert [row["model"] for row in one.table["rows"]] == [row["model"] for row in two.table["rows"]]


class Kill(Watch):
    def round(self, name: str, record: Any, values: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    asked = recipe(processes=2, method="scaffold")
    whole = fedllm.run(asked, data=data(), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(asked, data=data(), folder=tmp_path / "cut", watch=Kill())
    again = fedllm.resume(tmp_path / "cut", data=data())
    assert all(torch.equal(t, again.state.params[n]) for n, t in whole.state.params.items())
    assert whole.table["rows"] == again.table["rows"]


class Count(Watch):
    """How many other processes there are when a leg begins, and a leg at which all ends."""

    def __init__(self, last: str = "") -> None:
        self.last, self.seen, self.kept = last, dict[str, int](), list[Ground]()

    def begin(self, recipe: Recipe, ground: Ground, folder: Path) -> None:
        self.kept.append(ground)  # else Python would end its processes, as nobody holds them any more

    def leg(self, name: str, rounds: int, begun: int) -> None:
        self.seen[name] = len(multiprocessing.active_children())
        if name == self.last:
            raise KeyboardInterrupt


def test_processes_end_with_what_they_were_started_for(tmp_path: Path) -> None:
    """A comparison starts them once a seed, and again for a method that trains other tensors."""
    asked, before = recipe(processes=2, rounds=1, evaluation={}), len(multiprocessing.active_children())
    watch = Count(last="fedavg-seed1")
    with pytest.raises(KeyboardInterrupt):
        fedllm.compare(
            asked, ["fedavg", "fedprox", "fedlora"], seeds=2, data=data(), folder=tmp_path / "compare", watch=watch
        )
    assert {name: count - before for name, count in watch.seen.items()} == {
        "fedavg-seed0": 0, "fedprox-seed0": 1, "fedlora-seed0": 1, "fedavg-seed1": 0,
    }  # fmt: skip
    assert len(multiprocessing.active_children()) == before
    siege(asked, ["sign-flip"], ["median"], ["fedavg"], data=data(), folder=tmp_path / "attack", watch=watch)
    assert watch.seen["fedavg-sign-flip-median"] == before + 1
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [("auto", "cuda", "cuda:1"), ("cuda", "cuda", "cuda:1"), ("cuda:0", "cuda", "cuda:0"), ("auto", "cpu", "auto")],
)
def test_each_process_has_the_next_gpu(asked: str, device: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = load_recipe(recipe(model={"name": "toy:llama", "device": asked}))
    assert [_placed(given, device, process).model.device for process in (1, 3)] == [found, found]
    assert sharing(torch.device(device), 3) == (2 if device == "cuda" else 3)


def test_a_recipe_needs_a_process_at_least() -> None:
    with pytest.raises(FedLLMError, match="processes"):
        fedllm.run(recipe(processes=0), data=data())

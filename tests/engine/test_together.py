"""One pass for many clients gives each of them what it would get alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from fedllm.core.errors import ModelError, RoundFailed
from fedllm.core.tensors import Tensors, squared_distance
from fedllm.core.train import Schedule, Train
from fedllm.core.work import Embed, Example, Fit, FitReport, Generate, Gradient, Score
from fedllm.engine.fit import steps_of
from fedllm.engine.job import Job, alike
from fedllm.engine.together import GRADIENT_ROWS, run_together
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.function import FunctionLearner
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

TEXTS = (
    "the film was great",
    "no",
    "every client trains it at home, and the server adds up what comes back",
    "0 1 2 3 4",
    "the weather today is warm and the river is cold",
    "a short line",
)
LABELS = {"sequence-classification": ["good", "bad"], "token-classification": ["O", "B-X"]}
FAMILIES = {
    "llama": ("causal-lm", "sequence-classification"),
    "qwen": ("causal-lm",),
    "gpt2": ("causal-lm", "sequence-classification", "token-classification"),
    "bert": ("sequence-classification", "token-classification"),
    "t5": ("seq2seq",),
}
GROUPED = ("lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "head")
"""Kinds of which several clients share a pass; `full` swaps weights inside the model."""
GENTLE = Train(steps=4, batch_size=2, lr=1e-2, eps=1e-3)
"""A large eps: AdamW with 1e-8 turns the noise of a gradient that is truly 0 (a key's bias) into whole steps."""
TOLERANCE = {
    "lora": 2e-6, "ia3": 2e-6, "prompt": 1e-6, "prefix": 1e-6, "bottleneck": 1e-5, "bitfit": 2e-6, "head": 1e-6,
}  # fmt: skip
"""Largest difference of a trained entry, alone or together: float32 sums over padding and in another order."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(kind: str, client: int, count: int = 6) -> list[dict[str, Any]]:
    texts = [TEXTS[(client + place) % len(TEXTS)] for place in range(count)]
    if kind in ("causal-lm", "seq2seq"):
        return [{"instruction": text, "response": text[::-1]} for text in texts]
    if kind == "sequence-classification":
        return [{"text": text, "label": LABELS[kind][(place + client) % 2]} for place, text in enumerate(texts)]
    words = [text.split() for text in texts]
    return [{"tokens": one, "tags": [LABELS[kind][place % 2] for place in range(len(one))]} for one in words]


def make(family: str, kind: str, adapter: str, **options: Any) -> TransformerLearner:
    labels = LABELS.get(kind)
    loaded = toy_model(family, kind=kind, labels=labels)
    task = TaskSettings(kind=kind, max_length=64, template="plain")
    return TransformerLearner(loaded, task, AdapterSettings(kind=adapter, rank=4, tokens=4, **options), labels, seed=1)


@functools.cache
def llama(**options: Any) -> TransformerLearner:
    return make("llama", "causal-lm", options.pop("kind", "lora"), **options)


@functools.cache
def examples(learner: TransformerLearner, client: int, count: int) -> list[Example]:
    return learner.prepare(rows(learner.task.kind, client, count))


def job(
    request: Any, client: str, held: list[Example], round: int = 1, rounds: int = 10, frozen: Tensors | None = None
) -> Job:
    return Job(request, client, 7, round, rounds, lambda split: held, frozen or {})


def alone_and_together(learner: Any, jobs: list[Job]) -> Iterator[tuple[Any, Any]]:
    return zip([run_together(learner, [one])[0] for one in jobs], run_together(learner, jobs), strict=True)


def difference(left: Tensors, right: Tensors) -> float:
    assert {n: t.shape for n, t in left.items()} == {n: t.shape for n, t in right.items()}
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def combinations() -> list[tuple[str, str, str]]:
    return [(family, kind, adapter) for family, kinds in FAMILIES.items() for kind in kinds for adapter in GROUPED]


def impossible(family: str, kind: str, adapter: str) -> bool:
    """What no adapter of that kind can be put on."""
    last_token = kind == "sequence-classification" and family in ("llama", "gpt2")
    return (
        (adapter == "prompt" and (family == "t5" or last_token))
        or (adapter == "prefix" and kind != "causal-lm")
        or (adapter == "bitfit" and family in ("llama", "t5"))
        or (adapter == "head" and kind in ("causal-lm", "seq2seq"))
    )


# --- every family, task and adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "adapter"), combinations())
def test_a_shared_pass_gives_what_each_client_gets_alone(family: str, kind: str, adapter: str):
    if impossible(family, kind, adapter):
        with pytest.raises(ModelError):
            make(family, kind, adapter)
        return
    learner, limit = make(family, kind, adapter), TOLERANCE[adapter]
    start, held = learner.initial(), [examples(learner, client, 6 - 2 * client) for client in range(3)]
    trained = []
    for one, shared in alone_and_together(learner, [job(Fit(start, GENTLE), f"c{k}", held[k]) for k in range(3)]):
        assert difference(one.params, shared.params) < limit
        assert difference(one.delta, shared.delta) < limit
        assert one.loss == pytest.approx(shared.loss, rel=1e-5)
        assert (one.steps, one.examples, one.tokens) == (shared.steps, shared.examples, shared.tokens)
        assert difference(one.params, start) > 1e-3, "it did not train"
        trained.append(one.params)
    assert difference(trained[0], trained[1]) > 1e-4, "clients with other data must come out different"

    for one, shared in alone_and_together(learner, [job(Gradient(trained[k]), f"c{k}", held[k]) for k in range(3)]):
        assert difference(one[0], shared[0]) < limit
        assert one[1] == pytest.approx(shared[1], rel=1e-5)
    for one, shared in alone_and_together(learner, [job(Score(trained[k]), f"c{k}", held[k]) for k in range(3)]):
        assert one.counts == pytest.approx(shared.counts, rel=1e-5)
    asked = [Embed(trained[k], TEXTS[k : 2 * k + 1]) for k in range(3)]
    for one, shared in alone_and_together(learner, [job(asked[k], f"c{k}", held[k]) for k in range(3)]):
        assert torch.allclose(one, shared, atol=1e-5)
    if kind in ("causal-lm", "seq2seq"):
        asked = [Generate(trained[k], TEXTS[k : 2 * k + 1], max_tokens=4) for k in range(3)]
        for one, shared in alone_and_together(learner, [job(asked[k], f"c{k}", held[k]) for k in range(3)]):
            assert one == shared


@pytest.mark.parametrize("adapter", ["lora", "ia3", "prompt", "prefix", "bottleneck"])
def test_texts_of_equal_length_give_equal_bits(adapter: str):
    learner = llama(kind=adapter)
    numbers = [[f"{(3 * i + 7 * k + j) % 10}" for j in range(5) for i in (1, 2)] for k in range(4)]
    held = [
        learner.prepare([{"instruction": "0 1 2", "response": " ".join(row[i:] + row[:i])} for i in range(6)])
        for row in numbers
    ]
    assert len({example.tokens for group in held for example in group}) == 1
    start, train = learner.initial(), Train(steps=4, batch_size=3, lr=1e-2)
    fits = list(alone_and_together(learner, [job(Fit(start, train), f"c{k}", held[k]) for k in range(4)]))
    for one, shared in fits:
        assert all(torch.equal(one.params[name], shared.params[name]) for name in start)
        assert one.loss == shared.loss
    scored = [job(Score(one.params), f"c{k}", held[k]) for k, (one, _) in enumerate(fits)]
    for one, shared in alone_and_together(learner, scored):
        assert one.counts == shared.counts


def test_all_weights_train_one_client_at_a_time():
    learner = llama(kind="full")
    start, held = learner.initial(), examples(learner, 0, 4)
    jobs = [job(Fit(start, GENTLE), f"c{k}", held) for k in range(2)]
    assert learner.width_limit == 1
    assert difference(run_together(learner, jobs[:1])[0].params, start) > 1e-3
    with pytest.raises(ModelError, match="full"):
        run_together(learner, jobs)


def test_the_order_of_the_clients_does_not_matter():
    learner = llama()
    jobs = [job(Fit(learner.initial(), GENTLE), f"c{k}", examples(learner, k, 6 - k)) for k in range(4)]
    forth, back = run_together(learner, jobs), run_together(learner, jobs[::-1])[::-1]
    for one, other in zip(forth, back, strict=True):
        assert difference(one.params, other.params) < 1e-6
        assert one.loss == pytest.approx(other.loss, rel=1e-6)


# --- clients that differ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [
    Train(epochs=1, batch_size=2, lr=1e-2),
    Train(epochs=2, batch_size=1, lr=0.1, optimizer="sgd", momentum=0.9, clip_norm=None),
])  # fmt: skip
def test_clients_with_fewer_steps_leave_and_the_others_go_on(train: Train):
    learner = llama()
    held = [examples(learner, k, count) for k, count in enumerate((2, 6, 1, 4))]
    jobs = [job(Fit(learner.initial(), train), f"c{k}", held[k]) for k in range(4)]
    for (one, shared), group in zip(alone_and_together(learner, jobs), held, strict=True):
        assert one.steps == shared.steps == train.step_count(len(group))
        assert shared.examples == len(group) * (train.epochs or 0)
        assert difference(one.params, shared.params) < 2e-5


def cut(params: Tensors, rank: int) -> Tensors:
    return {n: t[:rank] if n.endswith("lora_A") else t[:, :rank] for n, t in params.items()}


def padded(params: Tensors, like: Tensors) -> Tensors:
    result = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for name, tensor in params.items():
        result[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result


@pytest.mark.parametrize("train", [
    Train(steps=4, batch_size=2, lr=1e-2),
    Train(steps=4, batch_size=2, lr=1e-2, weight_decay=0.1),
    Train(steps=4, batch_size=2, lr=0.1, optimizer="sgd", momentum=0.9),
])  # fmt: skip
def test_smaller_ranks_share_a_pass_and_unused_entries_stay_zero(train: Train):
    learner = llama()
    whole = learner.initial()
    ranks = (4, 1, 2)
    starts = [cut(whole, rank) for rank in ranks]
    jobs = [job(Fit(starts[k], train), f"c{k}", examples(learner, k, 4)) for k in range(3)]
    results = list(alone_and_together(learner, jobs))
    for one, shared in results:
        assert difference(one.params, shared.params) < 5e-6
    wide = [job(Fit(padded(starts[k], whole), train), f"c{k}", examples(learner, k, 4), frozen={}) for k in range(3)]
    for (one, _), report, rank in zip(results, run_together(learner, wide), ranks, strict=True):
        assert difference(cut(report.params, rank), one.params) < 5e-6
        for name, tensor in report.params.items():
            unused = tensor[rank:] if name.endswith("lora_A") else tensor[:, rank:]
            assert torch.equal(unused, torch.zeros_like(unused))


def test_a_client_whose_loss_is_not_finite_gets_an_error_and_the_others_notice_nothing():
    learner = llama()
    broken = learner.initial()
    broken[next(iter(broken))][0, 0] = float("nan")
    starts = [learner.initial(), broken, learner.initial()]
    jobs = [job(Fit(starts[k], GENTLE), f"c{k}", examples(learner, k, 4)) for k in range(3)]
    one, failed, three = run_together(learner, jobs)
    assert isinstance(failed, RoundFailed) and "c1" in str(failed) and failed.action
    for k, report in ((0, one), (2, three)):
        assert difference(report.params, run_together(learner, [jobs[k]])[0].params) < 1e-6


def test_tensors_that_the_method_does_not_move_stay_at_their_values():
    learner = llama()
    whole, held = learner.initial(), [examples(learner, k, 4) for k in range(2)]
    frozen = {n: t for n, t in whole.items() if n.endswith("lora_A")}
    moving = {n: t for n, t in whole.items() if n.endswith("lora_B")}
    train = Train(steps=1, batch_size=4, lr=0.1, optimizer="sgd", clip_norm=None)
    jobs = [job(Fit(moving, train), f"c{k}", held[k], frozen=frozen) for k in range(2)]
    both = run_together(learner, [job(Fit(whole, train), f"c{k}", held[k]) for k in range(2)])
    for (one, shared), full in zip(alone_and_together(learner, jobs), both, strict=True):
        assert set(shared.params) == set(moving)
        assert difference(one.params, shared.params) < 1e-6
        assert difference(shared.params, {n: full.params[n] for n in moving}) < 1e-6
    graded = run_together(learner, [job(Gradient(moving), "c0", held[0], frozen=frozen)])[0]
    assert set(graded[0]) == set(moving)


# --- the same as torch and PEFT ----------------------------------------------------------------------------------


def peft_loop(learner: TransformerLearner, train: Train, order: list[list[int]], texts: list[Example]) -> Tensors:
    """Plain PyTorch: PEFT's LoRA with the same first values, Hugging Face's own loss, torch's own optimiser."""
    peft = pytest.importorskip("peft")
    family = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[learner.loaded.family]
    base = toy_model(learner.loaded.family).model
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=family, task_type="CAUSAL_LM", fan_in_fan_out=learner.loaded.family == "gpt2"
    )
    model = peft.get_peft_model(base, config)
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, value in learner.initial().items():
        named[name].data.copy_(value)
    parameters = list(named.values())
    if train.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    for chosen in order:
        group = [texts[i] for i in chosen]
        loss = model(
            input_ids=pad_sequence([e.inputs["input_ids"] for e in group], True, 0),
            attention_mask=pad_sequence([torch.ones(e.tokens, dtype=torch.long) for e in group], True, 0),
            labels=pad_sequence([e.labels for e in group], True, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("train", [
    Train(steps=6, batch_size=2, lr=1e-2, weight_decay=0.01),
    Train(steps=6, batch_size=2, lr=0.5, optimizer="sgd", momentum=0.9, clip_norm=None),
    Train(steps=6, batch_size=2, lr=0.5, optimizer="sgd", momentum=0.9, clip_norm=0.1),
])  # fmt: skip
def test_fit_equals_a_plain_loop_over_peft(family: str, train: Train):
    learner = make(family, "causal-lm", "lora")
    held = [examples(learner, k, 5) for k in range(2)]
    reports = run_together(learner, [job(Fit(learner.initial(), train), f"c{k}", held[k]) for k in range(2)])
    for k, report in enumerate(reports):
        stream = steps_of(5, train, 7, f"c{k}", 1)
        expected = peft_loop(learner, train, [next(stream)[0] for _ in range(6)], held[k])
        assert difference(report.params, expected) < 1e-5
        assert difference(report.params, learner.initial()) > 1e-2


def test_clipping_is_per_client_and_equals_torch():
    learner = FunctionLearner(lambda p, xs: sum((p["w"] * x).sum() + 3 * p["v"].sum() for x in xs), trees(0.0))
    held = [learner.prepare([{"x": [k + 1.0, 0.0, 2.0]}]) for k in range(3)]
    train = Train(steps=1, batch_size=1, lr=1.0, optimizer="sgd", clip_norm=4.0)
    reports = run_together(learner, [job(Fit(learner.initial(), train), f"c{k}", held[k]) for k in range(3)])
    for k, report in enumerate(reports):
        w, v = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
        w.grad, v.grad = torch.tensor([k + 1.0, 0.0, 2.0]), torch.tensor([3.0, 3.0])
        torch.nn.utils.clip_grad_norm_([w, v], 4.0)
        assert torch.allclose(-report.params["w"], w.grad, atol=1e-7)
        assert torch.allclose(-report.params["v"], v.grad, atol=1e-7)
    small = Train(steps=1, batch_size=1, lr=1.0, optimizer="sgd", clip_norm=100.0)
    report = run_together(learner, [job(Fit(learner.initial(), small), "c0", held[0])])[0]
    assert torch.equal(-report.params["w"], torch.tensor([1.0, 0.0, 2.0])), "a small gradient is not scaled up"


def test_accumulated_passes_equal_one_large_batch():
    learner = llama()
    results = []
    for train in (Train(steps=3, batch_size=4, lr=1e-2), Train(steps=3, batch_size=2, accumulate=2, lr=1e-2)):
        jobs = [job(Fit(learner.initial(), train, penalty=near), f"c{k}", examples(learner, k, 4)) for k in range(2)]
        results.append(run_together(learner, jobs))
    for large, small in zip(*results, strict=True):
        assert difference(large.params, small.params) < 2e-6
        assert large.loss == pytest.approx(small.loss, rel=1e-5)
        assert (large.steps, large.examples, large.tokens) == (small.steps, small.examples, small.tokens)


# --- rules of a method -------------------------------------------------------------------------------------------


def trees(value: float) -> Tensors:
    return {"w": torch.full((3,), value), "v": torch.full((2,), value)}


def near(params: Tensors, start: Tensors) -> torch.Tensor:
    return 0.5 * squared_distance(params, start)


def pulled(params: Tensors, start: Tensors, goal: Tensors) -> torch.Tensor:
    return 0.5 * squared_distance(params, goal)


def line(params: Tensors, xs: Any) -> torch.Tensor:
    """A loss with the gradient x for w and 0 for v."""
    return sum((params["w"] * x).sum() for x in xs) + 0.0 * params["v"].sum()


def steady(count: int = 3, lr: float = 0.5, **options: Any) -> Train:
    return Train(steps=count, batch_size=1, lr=lr, optimizer="sgd", clip_norm=None, **options)


def test_a_penalty_is_added_once_a_step_whatever_the_accumulation():
    learner = FunctionLearner(line, trees(1.0))
    held = learner.prepare([{"x": [1.0, 2.0, 3.0]}] * 4)
    for options in ({}, {"accumulate": 2}):
        request = Fit(learner.initial(), steady(2, **options), penalty=near)
        report = run_together(learner, [job(request, "c0", held)])[0]
        x = torch.tensor([1.0, 2.0, 3.0])
        first = 1.0 - 0.5 * x
        assert torch.allclose(report.params["w"], first - 0.5 * (x + (first - 1.0)))


def test_rules_keep_to_their_clients_when_others_leave():
    learner = FunctionLearner(line, trees(0.0))
    train = Train(epochs=2, batch_size=1, lr=0.5, optimizer="sgd", clip_norm=None)
    jobs = []
    for k, count in enumerate((1, 3, 2)):
        held, goal = learner.prepare([{"x": [float(k)] * 3}] * count), trees(float(10 * k))
        jobs.append(job(Fit(trees(0.1 * k), train, penalty=pulled, given={"goal": goal}), f"c{k}", held))
    for one, shared in alone_and_together(learner, jobs):
        assert difference(one.params, shared.params) == 0.0


def test_a_penalty_sees_its_own_client_only():
    learner = FunctionLearner(line, trees(0.0))
    held = [learner.prepare([{"x": [float(k)] * 3}]) for k in range(3)]
    goals = [trees(float(10 * k)) for k in range(3)]
    jobs = [
        job(Fit(learner.initial(), steady(1), penalty=pulled, given={"goal": goals[k]}), f"c{k}", held[k])
        for k in range(3)
    ]
    for k, (one, shared) in enumerate(alone_and_together(learner, jobs)):
        assert torch.equal(one.params["w"], shared.params["w"])
        assert torch.allclose(shared.params["w"], torch.full((3,), -0.5 * (k - 10.0 * k)))
        assert shared.loss[0] == 0.0, "the reported loss is that of the data"


def test_a_correction_changes_the_gradient_before_it_is_clipped():
    learner = FunctionLearner(line, trees(0.0))
    held = [learner.prepare([{"x": [1.0, 0.0, 0.0]}]) for _ in range(2)]
    control = [{"w": torch.tensor([0.0, 3.0 * k, 0.0]), "v": torch.zeros(2)} for k in range(2)]

    def plus(grads: Tensors, params: Tensors, start: Tensors, control: Tensors) -> Tensors:
        return {name: grads[name] + control[name] for name in grads}

    train = Train(steps=1, batch_size=1, lr=1.0, optimizer="sgd", clip_norm=1.0)
    jobs = [
        job(Fit(learner.initial(), train, correction=plus, given={"control": control[k]}), f"c{k}", held[k])
        for k in range(2)
    ]
    for k, report in enumerate(run_together(learner, jobs)):
        raw = torch.tensor([1.0, 3.0 * k, 0.0])
        assert torch.allclose(-report.params["w"], raw / max(1.0, float(raw.norm())), atol=1e-5)


def test_a_correction_may_answer_with_a_tree_that_it_was_given():
    learner = FunctionLearner(line, trees(0.0))
    held = learner.prepare([{"x": [1.0, 0.0, 0.0]}])
    control = {"w": torch.tensor([3.0, 4.0, 0.0]), "v": torch.zeros(2)}
    train = Train(steps=2, batch_size=1, lr=1.0, optimizer="sgd", clip_norm=1.0)
    request = Fit(learner.initial(), train, correction=lambda grads, control, **_: control, given={"control": control})
    report = run_together(learner, [job(request, "c0", held)])[0]
    assert torch.allclose(report.params["w"], torch.tensor([-1.2, -1.6, 0.0]), atol=1e-5)
    assert torch.equal(control["w"], torch.tensor([3.0, 4.0, 0.0]))


@pytest.mark.parametrize(("schedule", "expected"), [
    (Schedule(), [1.0, 1.0, 1.0, 1.0]),
    (Schedule(kind="linear", by="step"), [8 / 12, 7 / 12, 6 / 12, 5 / 12]),
    (Schedule(kind="linear", by="round"), [2 / 3] * 4),
])  # fmt: skip
def test_the_rate_follows_the_schedule(schedule: Schedule, expected: list[float]):
    learner = FunctionLearner(line, trees(0.0))
    held = learner.prepare([{"x": [1.0, 1.0, 1.0]}])
    request = Fit(learner.initial(), steady(4, schedule=schedule))
    report = run_together(learner, [job(request, "c0", held, round=2, rounds=3)])[0]
    assert report.rate_sum == pytest.approx(0.5 * sum(expected))
    assert torch.allclose(report.params["w"], torch.full((3,), -0.5 * sum(expected)))


# --- dropout -----------------------------------------------------------------------------------------------------


def test_dropout_is_drawn_per_client_and_the_same_in_every_company():
    learner = llama(dropout=0.3)
    start = learner.initial()
    jobs = [job(Fit(start, GENTLE), f"c{k}", examples(learner, k, 6 - k)) for k in range(3)]
    for one, shared in alone_and_together(learner, jobs):
        assert difference(one.params, shared.params) < 2e-6
    same_data = [job(Fit(start, GENTLE), f"c{k}", examples(learner, 0, 1)) for k in range(2)]
    (left, right), (again, _) = run_together(learner, same_data), run_together(learner, same_data)
    assert difference(left.params, again.params) == 0.0
    assert difference(left.params, right.params) > 1e-4
    left, right = run_together(llama(), same_data)
    assert difference(left.params, right.params) < 1e-6


def test_dropout_differs_between_the_passes_of_one_step():
    learner = llama(dropout=0.5)
    held = examples(learner, 0, 1)
    params = learner.initial()
    params = {n: t if n.endswith("lora_A") else torch.full_like(t, 0.05) for n, t in params.items()}
    once, twice = (
        run_together(learner, [job(Fit(params, steady(1, accumulate=2)), "c0", held * count)])[0] for count in (1, 2)
    )
    assert difference(once.delta, twice.delta) > 1e-4


def test_dropout_is_off_where_nothing_trains():
    with_, without = llama(dropout=0.5), llama()
    params = {n: torch.full_like(t, 0.02) for n, t in with_.initial().items()}
    for request in (Score(params), Gradient(params), Generate(params, TEXTS[:2], 4)):
        one, other = (run_together(each, [job(request, "c0", examples(each, 0, 3))])[0] for each in (with_, without))
        if isinstance(request, Gradient):
            assert difference(one[0], other[0]) == 0.0
        else:
            assert one == other


# --- measuring ---------------------------------------------------------------------------------------------------


def test_clients_with_the_same_model_are_measured_in_one_pass_with_the_same_counts():
    learner = llama()
    held = [examples(learner, k, 6 - k) for k in range(3)]
    for params in (None, learner.initial()):
        jobs = [job(Score(params), f"c{k}", held[k]) for k in range(3)]
        for one, shared in alone_and_together(learner, jobs):
            assert one.counts == pytest.approx(shared.counts, rel=1e-5)
            assert shared.values["loss"] == pytest.approx(shared.counts["loss"] / shared.counts["tokens"])
    base, first = (run_together(learner, [job(Score(p), "c0", held[0])])[0] for p in (None, learner.initial()))
    assert base.counts == first.counts, "B is zero at first"


def test_an_empty_split_is_measured_as_nothing():
    learner = llama()
    jobs = [job(Score(learner.initial()), "c0", []), job(Score(learner.initial()), "c1", examples(learner, 1, 2))]
    empty, full = run_together(learner, jobs)
    assert empty.counts == {} and set(empty.values.values()) == {None}
    assert full.counts["examples"] == 2


def test_the_gradient_of_many_examples_is_that_of_their_mean_loss():
    def loss(params: Tensors, xs: Any) -> torch.Tensor:
        return sum((params["w"] * x).sum() ** 2 for x in xs)

    learner = FunctionLearner(loss, {"w": torch.tensor([1.0, -2.0])})
    count = 5 * GRADIENT_ROWS + 3
    values = torch.arange(2.0 * count).view(count, 2) / count
    held = learner.prepare([{"x": row.tolist()} for row in values])
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    total = ((values @ w) ** 2).sum()
    (total / count).backward()
    jobs = [job(Gradient({"w": w.detach()}), f"c{k}", held[: count - 30 * k]) for k in range(2)]
    (gradient, (found, examples_)), other = run_together(learner, jobs)
    assert torch.allclose(gradient["w"], w.grad, rtol=1e-5)
    assert (found, examples_) == (pytest.approx(float(total.detach())), count)
    assert other[1][1] == count - 30


def test_sampling_is_seeded_by_client_and_independent_of_the_others():
    learner = llama()
    params = {n: torch.full_like(t, 0.02) for n, t in learner.initial().items()}
    trained = {n: t + 0.01 for n, t in params.items()}
    prompts = [TEXTS[:1], TEXTS[:3], TEXTS[1:3]]
    for models in ([params] * 3, [params, trained, params]):
        jobs = [job(Generate(models[k], prompts[k], 6, 1.0), f"c{k}", []) for k in range(3)]
        results = list(alone_and_together(learner, jobs))
        assert all(one == shared for one, shared in results)
    same = [job(Generate(params, TEXTS[:1], 8, 1.0), client, []) for client in ("c0", "c0", "c1")]
    first, again, other = run_together(learner, same)
    assert first == again != other


# --- which jobs, which batches -----------------------------------------------------------------------------------


def test_only_like_jobs_are_alike():
    start, other = trees(0.0), {"w": torch.zeros(3)}
    base = Fit(start, steady())

    def key(request: Any) -> tuple[Any, ...]:
        return alike(job(request, "c0", []))

    class Rules:
        def rule(self, params: Tensors, start: Tensors) -> torch.Tensor:
            return near(params, start)

    one, two = Rules(), Rules()
    assert key(base) == key(Fit(trees(9.0), steady()))
    assert key(Fit(start, steady(), penalty=one.rule)) == key(Fit(start, steady(), penalty=one.rule))
    different = [
        base, Fit(other, steady()), Fit(start, steady(4)), Fit(start, steady(), split="eval"),
        Fit(start, steady(), penalty=near), Fit(start, steady(), penalty=one.rule),
        Fit(start, steady(), penalty=two.rule), Fit(start, steady(), given={"goal": start}),
        Gradient(start), Score(start), Score(None), Score(start, "train"), Generate(start, ()), Generate(None, ()),
        Generate(start, (), 3), Generate(start, (), 64, 1.0), Embed(start, ()), Embed(None, ()),
    ]  # fmt: skip
    assert len({key(request) for request in different}) == len(different)


@given(count=st.integers(1, 20), size=st.integers(1, 7), accumulate=st.integers(1, 4))
def test_every_pass_over_the_data_is_cut_into_batches_and_steps(count: int, size: int, accumulate: int):
    train = Train(batch_size=size, accumulate=accumulate, epochs=1)
    stream, again = steps_of(count, train, 1, "c", 2), steps_of(count, train, 1, "c", 2)
    for _ in range(3):
        steps = [next(stream) for _ in range(train.step_count(count))]
        assert steps == [next(again) for _ in steps]
        assert sorted(i for step in steps for batch in step for i in batch) == list(range(count))
        assert all(len(step) == accumulate for step in steps[:-1])
        cut = [batch for step in steps for batch in step]
        assert all(len(batch) == size for batch in cut[:-1]) and 0 < len(cut[-1]) <= size
    if count > 8:
        names = ((1, "c", 1), (1, "d", 1), (1, "c", 2), (2, "c", 1))
        streams = [steps_of(count, Train(batch_size=count), *each) for each in names]
        assert len({tuple(next(each)[0]) for each in streams}) == 4


def quadratic(params: Tensors, xs: Any) -> torch.Tensor:
    return sum(((params["w"] - x) ** 2).sum() * (1 + params["v"].sum() ** 2) for x in xs)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.one_of(st.none(), st.integers(1, 4)),
    batch=st.integers(1, 3),
    accumulate=st.integers(1, 2),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    clip=st.one_of(st.none(), st.floats(0.1, 2.0)),
    rules=st.sampled_from([None, near]),
)
def test_any_cohort_gets_what_each_client_gets_alone(
    sizes: list[int], steps: int | None, batch: int, accumulate: int, optimizer: Any, clip: float | None,
    rules: Callable[..., Any] | None,
):  # fmt: skip
    train = Train(
        steps=steps, epochs=None if steps else 2, batch_size=batch, accumulate=accumulate, optimizer=optimizer,
        momentum=0.5 if optimizer == "sgd" else 0.0, clip_norm=clip, lr=0.05,
    )  # fmt: skip
    learner = FunctionLearner(quadratic, trees(0.3))
    jobs = []
    for k, size in enumerate(sizes):
        held = learner.prepare([{"x": [0.1 * k, 0.2 * i, -0.3]} for i in range(size)])
        jobs.append(job(Fit(trees(0.1 * k), train, penalty=rules), f"c{k}", held))
    for one, shared in alone_and_together(learner, jobs):
        assert isinstance(shared, FitReport)
        assert difference(one.params, shared.params) < 1e-6
        assert (one.steps, one.examples, one.rate_sum) == (shared.steps, shared.examples, shared.rate_sum)
        assert one.loss == pytest.approx(shared.loss, rel=1e-5)

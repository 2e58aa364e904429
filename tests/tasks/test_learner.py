"""The learner's losses and counts are those of transformers, however rows are padded and grouped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.core.errors import ConfigError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Example, Fit, Score
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.evaluate.classes import EntityF1, MacroF1
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import IGNORE

TEXTS = ("the film was great", "no", "every client trains it at home", "0 1 2 3 4", "the river is cold 🙂")
CLASSES = ["bad", "good"]
TAGS = ["O", "B-PER", "I-PER"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family: str, kind: str, adapter: str = "lora", chat: str | None = None, **options: Any) -> TransformerLearner:
    labels = {"sequence-classification": CLASSES, "token-classification": TAGS}.get(kind)
    loaded = toy_model(family, kind=kind, labels=labels)  # type: ignore[arg-type]
    loaded.tokenizer.chat_template = chat  # type: ignore[union-attr]
    task = TaskSettings(kind=kind, **{"template": "plain", "max_length": 64, **options})  # type: ignore[arg-type]
    return TransformerLearner(loaded, task, AdapterSettings(kind=adapter, rank=4, tokens=3), labels, seed=1)  # type: ignore[arg-type]


def rows(kind: str) -> list[dict[str, Any]]:
    if kind in ("causal-lm", "seq2seq"):
        return [{"instruction": text, "response": text[::-1]} for text in TEXTS]
    if kind == "sequence-classification":
        return [{"text": text, "label": CLASSES[place % 2]} for place, text in enumerate(TEXTS)]
    return [{"tokens": t.split(), "tags": [TAGS[i % 3] for i in range(len(t.split()))]} for t in TEXTS]


def shaken(params: Tensors, seed: int = 0, size: float = 0.1) -> Tensors:
    stream = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=stream) for name, t in params.items()}


def stacked(*trees: Tensors) -> Tensors:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def losses(learner: TransformerLearner, params: Tensors | None, groups: list[list[Example]]) -> torch.Tensor:
    with torch.no_grad(), learner.using(params):
        return learner.losses(groups)


def counts(learner: TransformerLearner, params: Tensors | None, groups: list[list[Example]]) -> list[dict[str, float]]:
    with torch.no_grad(), learner.using(params):
        return learner.counts_by_row(groups)


def logits(learner: TransformerLearner, params: Tensors | None, example: Example) -> torch.Tensor:
    """All logits of one example alone, without padding and without any choice of positions."""
    inputs = {name: value.unsqueeze(0) for name, value in example.inputs.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if learner.task.kind == "seq2seq":
        start = torch.tensor([learner.loaded.model.config.decoder_start_token_id])
        inputs["decoder_input_ids"] = torch.cat([start, example.labels[:-1]]).unsqueeze(0)
    with torch.no_grad(), learner.using(params):
        return learner.adapted.call(inputs).logits[0]


def trained(learner: TransformerLearner, examples: list[Example], train: Train) -> Tensors:
    return run_together(learner, [Job(Fit(learner.initial(), train), "c", 1, 1, 1, lambda _: examples, {})])[0].params  # type: ignore[union-attr]


ALL = [
    ("llama", "causal-lm"), ("qwen", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq"),
    ("bert", "sequence-classification"), ("llama", "sequence-classification"), ("gpt2", "sequence-classification"),
    ("bert", "token-classification"), ("gpt2", "token-classification"),
]  # fmt: skip


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_the_loss_is_the_one_of_transformers(family: str, kind: str):
    learner = make(family, kind)
    examples = learner.prepare(rows(kind))
    params = stacked(shaken(learner.initial()))
    found = losses(learner, params, [examples])
    total = 0.0
    for example in examples:
        inputs = {name: value.unsqueeze(0) for name, value in example.inputs.items()}
        labels = example.labels if kind == "sequence-classification" else example.labels.unsqueeze(0)
        with torch.no_grad(), learner.using(params):
            total += float(learner.adapted.call(inputs, labels=labels).loss) * example.targets
    assert float(found[0]) == pytest.approx(total, rel=1e-5)
    assert sum(row["loss"] for row in counts(learner, params, [examples])) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_rows_of_other_clients_and_fillers_change_nothing(family: str, kind: str):
    learner = make(family, kind)
    examples = learner.prepare(rows(kind))
    trees = [shaken(learner.initial(), seed) for seed in range(3)]
    groups = [examples[:1], [], examples[1:]]
    together = losses(learner, stacked(*trees), groups)
    assert together[1] == 0
    for k in (0, 2):
        one_by_one = sum(float(losses(learner, stacked(trees[k]), [[example]])) for example in groups[k])
        assert float(together[k]) == pytest.approx(one_by_one, rel=1e-5)
    found = counts(learner, stacked(*trees), groups)
    assert len(found) == len(examples)
    alone = [counts(learner, stacked(trees[k]), [[example]])[0] for k in (0, 2) for example in groups[k]]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert counts(learner, None, [[], []]) == []


@pytest.mark.parametrize("adapter", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq")])
def test_logits_at_the_labels_are_those_of_a_full_forward_pass(family: str, kind: str, adapter: str):
    if family == "t5" and adapter != "lora":
        return
    learner = make(family, kind, adapter)
    assert learner.head.selective and not learner.notes
    examples = learner.prepare(rows(kind))
    params = stacked(shaken(learner.initial()))
    with torch.no_grad(), learner.using(params):
        chosen, owner = learner._logits(learner.collate([examples]))
    for row, example in enumerate(examples):
        whole = logits(learner, params, example)[-len(example.labels) :]
        at = torch.nonzero(example.labels != IGNORE).flatten() - (1 if kind == "causal-lm" else 0)
        assert torch.allclose(chosen[owner == row], whole[at[at >= 0]], atol=1e-4)


@pytest.mark.parametrize(("family", "kind", "adapter"), [
    ("llama", "causal-lm", "lora"), ("gpt2", "causal-lm", "prefix"), ("gpt2", "causal-lm", "prompt"),
    ("llama", "causal-lm", "full"), ("t5", "seq2seq", "lora"),
])  # fmt: skip
def test_texts_with_a_label_everywhere_have_the_losses_of_chosen_positions(family: str, kind: str, adapter: str):
    """Blocks of text with loss_on=all: nothing is selected, so nothing has to be put back; the numbers are the same."""
    learner, ahead = make(family, kind, adapter), int(kind == "causal-lm")
    draw = torch.Generator().manual_seed(0)
    for size in (2, 17, 33):
        examples = [
            Example({"input_ids": row}, row, size, size - ahead)
            for row in torch.randint(5, 200, (4, size), generator=draw)
        ]
        groups = [examples] if learner.width_limit else [examples[:2], examples[2:]]
        batch, params = learner.collate(groups), [shaken(learner.initial(), k) for k in range(len(groups))]
        assert batch.dense and batch.numbers() == [0, 1, 2, 3]
        with torch.no_grad(), learner.using(stacked(*params)):
            found, clients = learner.losses_by_row(groups)
            chosen, owner = learner._logits(batch)
            wanted = learner.task.loss_rows(chosen, batch.labels, owner, 4)
        assert torch.allclose(found, wanted, rtol=1e-5) and len(batch.labels) == 4 * (size - ahead)
        assert clients.tolist() == [k for k, group in enumerate(groups) for _ in group]


def test_batches_made_in_inference_mode_leave_training_as_it_is():
    learner, ids = make("llama", "causal-lm"), torch.arange(5, 14)
    groups = [[Example({"input_ids": ids}, ids, 9, 8)] * 3] * 7
    with torch.inference_mode():
        learner.collate(groups)
    params = {name: tensor.requires_grad_() for name, tensor in stacked(*[learner.initial()] * 7).items()}
    with learner.using(params):
        found = torch.autograd.grad(learner.losses(groups).sum(), list(params.values()))
    assert all(bool(torch.isfinite(slope).all()) for slope in found)


def test_few_positions_without_a_label_are_computed_and_count_for_nothing():
    """The first token of a text in a block has nothing to be foretold from; shorter rows have padding."""
    learner, draw = make("llama", "causal-lm"), torch.Generator().manual_seed(0)

    def text(size: int, *lacking: int) -> Example:
        ids = torch.randint(5, 200, (size,), generator=draw)
        labels = ids.clone()
        labels[list(lacking)] = IGNORE
        return Example({"input_ids": ids}, labels, size, size - 1 - len(lacking))

    near, many = [[text(65), text(64)], [text(65, 30), text(65)]], [text(9) for _ in range(69)]
    far = [[text(65), text(50)], [text(65, 3, 4, 5, 6, 7), text(65, 9)]]
    cases = (near, True), (far, False), ([many[:35], many[35:]], True), ([many[:2], many[2:3]], False)
    for groups, found in (*cases, ([many[:1], []], False)):
        batch, params = learner.collate(groups), stacked(*[shaken(learner.initial(), k) for k in range(2)])
        assert batch.dense is found
        with torch.no_grad(), learner.using(params):
            by_row, clients = learner.losses_by_row(groups)
            chosen, owner = learner._logits(batch)
            rows = learner.task.loss_rows(chosen, batch.labels, owner, len(batch.inputs["input_ids"]))
        assert torch.allclose(by_row, batch.of_examples(rows), rtol=1e-5)
        assert clients.tolist() == [k for k, group in enumerate(groups) for _ in group]
        assert len(batch.labels) == sum(example.targets for group in groups for example in group)


def test_a_model_whose_output_layer_cannot_be_restricted_is_run_whole_with_a_note():
    usual = make("llama", "causal-lm")
    loaded = toy_model("llama")

    class Mixing(nn.Linear):
        """An output layer that looks at all positions at once."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0 * x.mean() if x.dim() == 3 else super().forward(x) * 2

    layer = Mixing(64, 384, bias=False)
    layer.weight = loaded.model.lm_head.weight
    loaded.model.lm_head = layer
    learner = TransformerLearner(loaded, TaskSettings(template="plain", max_length=64), AdapterSettings(rank=4), seed=1)
    assert not learner.head.selective and "output layer" in learner.notes[0]
    assert not layer._forward_pre_hooks
    examples, params = learner.prepare(rows("causal-lm")), stacked(shaken(learner.initial()))
    assert torch.allclose(losses(learner, params, [examples]), losses(usual, params, [examples]), rtol=1e-5)


@pytest.mark.parametrize(("family", "kind", "adapter", "longest"), [
    ("gpt2", "causal-lm", "lora", 256), ("gpt2", "causal-lm", "prompt", 253), ("llama", "causal-lm", "prefix", 253),
    ("bert", "sequence-classification", "lora", 256), ("t5", "seq2seq", "lora", None),
])  # fmt: skip
def test_texts_are_cut_to_what_the_model_reads(family: str, kind: str, adapter: str, longest: int | None):
    learner = make(family, kind, adapter, max_length=400)
    row = {"instruction": "say", "response": "0 1 2 3 " * 300, "text": "0 1 2 3 " * 300, "label": "good"}
    (example,) = learner.prepare([row])
    assert len(example.inputs["input_ids"]) <= 400 and (longest is None or example.tokens == longest)
    assert learner.notes == [] if longest is None else str(longest) in learner.notes[0] and "400" in learner.notes[0]
    assert torch.isfinite(losses(learner, stacked(learner.initial()), [[example]])).all()


# --- metrics of predictions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_accuracy_and_macro_f1_are_those_of_the_plain_predictions(family: str):
    learner = make(family, "sequence-classification")
    examples = learner.prepare(rows("sequence-classification"))
    params = stacked(shaken(learner.initial(), size=0.3))
    found = counts(learner, params, [examples])
    values = learner.values({n: sum(row.get(n, 0.0) for row in found) for n in {n for row in found for n in row}})
    guesses = [CLASSES[int(logits(learner, params, example).argmax())] for example in examples]
    gold = [row["label"] for row in rows("sequence-classification")]
    metric = MacroF1(CLASSES)
    assert values["accuracy"] == pytest.approx(sum(a == b for a, b in zip(guesses, gold, strict=True)) / len(gold))
    assert values["macro_f1"] == pytest.approx(metric.value(metric.count(guesses, gold)))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_entity_f1_is_that_of_the_plain_predictions(family: str):
    learner = make(family, "token-classification")
    examples = learner.prepare(rows("token-classification"))
    params = stacked(trained(learner, examples, Train(steps=25, batch_size=5, lr=0.02)))
    found = counts(learner, params, [examples])
    values = learner.values({n: sum(row.get(n, 0.0) for row in found) for n in {n for row in found for n in row}})
    guesses = []
    for example in examples:
        best = logits(learner, params, example).argmax(-1)
        guesses.append([TAGS[i] for i in best[example.labels != IGNORE].tolist()])
    gold = [row["tags"] for row in rows("token-classification")]
    assert values["entity_f1"] == pytest.approx(EntityF1().value(EntityF1().count(guesses, gold)))
    assert values["entity_f1"] > 0, "it learned something to compare"


@pytest.mark.parametrize(("family", "kind", "chat", "template"), [
    ("llama", "causal-lm", None, "plain"), ("gpt2", "causal-lm", None, "Q: {instruction} A: "),
    ("qwen", "causal-lm", CHATML, "chat"), ("t5", "seq2seq", None, "plain"),
])  # fmt: skip
def test_exact_match_is_what_greedy_decoding_gives(family: str, kind: str, chat: str | None, template: str):
    """Train a toy to repeat some answers; for each prompt, known or not, one forward pass and generation agree."""
    learner = make(family, kind, "full", chat, template=template)
    known = [{"instruction": text, "response": f"{text[:5]} {place}"} for place, text in enumerate(TEXTS[:4])]
    strange = [{"instruction": text, "response": "7 z"} for text in ("a film", TEXTS[4], "the river")]
    examples = learner.prepare(known)
    train = Train(steps=90, batch_size=4, lr=5e-3)
    params = stacked(trained(learner, examples, train))
    exact = [row["exact"] for row in counts(learner, params, [learner.prepare(known + strange)])]
    prompts = [learner.task.template.prompt(row) for row in known + strange]  # type: ignore[attr-defined]
    with torch.no_grad(), learner.using(params):
        written = learner.generate([prompts], 24, 0.0, [0])[0]
    lead = " " if template.endswith(" ") else ""
    hits = [float(text == lead + row["response"]) for text, row in zip(written, known + strange, strict=True)]
    assert exact == hits
    assert sum(hits[:4]) >= 3 and sum(hits[4:]) == 0, "both hits and misses were compared"


def test_score_values_come_from_the_counts():
    learner = make("llama", "causal-lm")
    examples = learner.prepare(rows("causal-lm"))
    report = run_together(learner, [Job(Score(learner.initial(), "eval"), "c", 1, 1, 1, lambda _: examples, {})])[0]
    assert set(report.values) == set(learner.score_names)
    assert report.counts["examples"] == len(TEXTS)
    assert report.counts["tokens"] == sum(example.targets for example in examples)
    assert report.values["perplexity"] == pytest.approx(torch.tensor(report.values["loss"]).exp().item())


# --- embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "adapter"), [
    ("llama", "causal-lm", "lora"), ("gpt2", "causal-lm", "prompt"), ("bert", "sequence-classification", "lora"),
    ("t5", "seq2seq", "lora"),
])  # fmt: skip
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_embedding_is_the_mean_over_the_real_tokens(family: str, kind: str, adapter: str, side: str):
    learner = make(family, kind, adapter)
    learner.tokenizer.padding_side = side
    params = stacked(shaken(learner.initial()))
    with torch.no_grad(), learner.using(params):
        (found,) = learner.embed([TEXTS])
        for text, vector in zip(TEXTS, found, strict=True):
            inputs = dict(learner.tokenizer(text, return_tensors="pt"))
            if kind == "seq2seq":
                hidden = learner.loaded.model.get_encoder()(**inputs).last_hidden_state
            else:
                hidden = learner.adapted.call(inputs, output_hidden_states=True).hidden_states[-1]
            expected = hidden[0, -inputs["input_ids"].shape[1] :].mean(0)
            assert torch.allclose(vector, expected, atol=1e-5)


def test_embeddings_are_those_of_each_client():
    learner = make("llama", "causal-lm")
    trees = [shaken(learner.initial(), seed) for seed in range(2)]
    with torch.no_grad(), learner.using(stacked(*trees)):
        both = learner.embed([TEXTS[:2], TEXTS[2:4]])
    for k, texts in enumerate((TEXTS[:2], TEXTS[2:4])):
        with torch.no_grad(), learner.using(stacked(trees[k])):
            assert torch.allclose(both[k], learner.embed([texts])[0], atol=1e-5)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize(("family", "kind"), [("llama", "causal-lm"), ("t5", "seq2seq")])
def test_text_metrics_measure_what_is_written(family: str, kind: str) -> None:
    """A model that has learned its rows by heart writes the answers; the untrained one does not."""
    from fedllm.core.train import Train
    from fedllm.core.work import Fit, Score
    from fedllm.engine.job import Job
    from fedllm.engine.together import run_together
    from fedllm.models.adapters.settings import AdapterSettings
    from fedllm.models.toy import toy_model
    from fedllm.tasks.learner import TransformerLearner
    from fedllm.tasks.settings import TaskSettings

    names = ["rouge_l", "token_f1", "last_number"]
    task = TaskSettings(kind=kind, template="plain", max_length=96, generate=12, text_metrics=names)
    learner = TransformerLearner(toy_model(family, kind=kind), task, AdapterSettings(kind="full"), None, 0)
    rows = [{"instruction": f"key {n}", "response": f"it is {n * 11}"} for n in range(1, 5)]
    examples = learner.prepare(rows)

    def job(request: object) -> Job:
        return Job(request, "c", 0, 1, 1, lambda split: examples, {})  # type: ignore[arg-type]

    (fitted,) = run_together(learner, [job(Fit(learner.initial(), Train(steps=300, lr=3e-3, batch_size=4)))])
    (before,), (after,) = (run_together(learner, [job(Score(params))]) for params in (None, fitted.params))
    assert after.values["exact_match"] == 1.0
    assert [after.values[name] for name in names] == [1.0, 1.0, 1.0]
    assert before.values["rouge_l"] < 0.5
    assert set(names) <= set(learner.score_names)


# --- prompts and what is written ---------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "one?"}, {"role": "assistant", "content": "eins"},
    {"role": "user", "content": "two?"}, {"role": "assistant", "content": "zwei"},
]  # fmt: skip


@pytest.mark.parametrize("row", [{"instruction": "two?", "response": "zwei"}, {"messages": TURNS}])
def test_a_prompt_ends_before_the_last_answer_whatever_stands_behind_it(row: dict[str, Any]) -> None:
    learner = make("qwen", "causal-lm", chat=CHATML, template="chat", max_length=200)
    (example,) = learner.prepare([row])
    assert example.labels[-1] == IGNORE, "the template's line break is not part of the answer"
    prompt, answer = learner._prompt_and_answer(example)
    assert (prompt, answer) == (learner.task.template.prompt(row), "zwei")  # type: ignore[attr-defined]


def test_a_prompt_cut_off_in_a_question_is_that_of_the_answer_before() -> None:
    whole = make("qwen", "causal-lm", chat=CHATML, template="chat", max_length=200)
    length = len(whole.tokenizer(whole.task.template.prompt({"messages": TURNS}))["input_ids"])  # type: ignore
    learner = make("qwen", "causal-lm", chat=CHATML, template="chat", max_length=length - 3)
    (example,) = learner.prepare([{"messages": TURNS}])
    prompt, answer = learner._prompt_and_answer(example)
    assert answer == "eins" and prompt.endswith("one?<|im_end|>\n<|im_start|>assistant\n")


def test_text_is_not_written_where_all_text_counts() -> None:
    with pytest.raises(ConfigError, match=r"loss_on=all.*Set task\.loss_on=response"):
        make("llama", "causal-lm", generate=4, loss_on="all")
    make("llama", "causal-lm", loss_on="all")
    make("t5", "seq2seq", generate=4, loss_on="all")


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_prompts_that_leave_no_room_for_text_are_refused_before_the_run(kind: str) -> None:
    room = 256 - 6 - (3 if kind == "prompt" else 0)
    make("gpt2", "causal-lm", kind, max_length=room, generate=6)
    with pytest.raises(ConfigError, match=rf"Set task\.max_length={room} or less"):
        make("gpt2", "causal-lm", kind, max_length=room + 1, generate=6)
    with pytest.raises(ConfigError, match=r"Lower task\.generate"):
        make("gpt2", "causal-lm", kind, max_length=64, generate=300)
    with pytest.raises(ConfigError, match="has no meaning"):
        make("bert", "sequence-classification", max_length=256, generate=6)
    make("t5", "seq2seq", max_length=400, generate=6)


def test_chat_prompts_are_the_tokens_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.tasks import decode

    learner = make("llama", "causal-lm", chat=CHATML, template="chat", max_length=200)
    asked: list[list[list[int]]] = []

    def record(adapted: Any, encoded: list[list[int]], *_: Any) -> list[list[int]]:
        asked.append(encoded)
        return [[] for _ in encoded]

    monkeypatch.setattr(decode, "_decoder", record)
    (example,) = learner.prepare([{"messages": TURNS}])
    prompt, _ = learner._prompt_and_answer(example)
    learner.generate([[prompt, "one?"]], 4, 0.0, [0])
    chat, text = asked[0]
    assert chat == example.inputs["input_ids"][: len(chat)].tolist() and learner.tokenizer.bos_token_id not in chat
    assert text[0] == learner.tokenizer.bos_token_id, "text that no template wrote keeps its start token"

"""Rows to examples, labels exactly where they belong, and counts that add up to the metrics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.core.work import Example
from fedllm.evaluate.classes import Accuracy, EntityF1, MacroF1
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import IGNORE, TASKS, CausalLM, SequenceClassification, Task, seen

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(
    kind: str, family: str = "llama", labels: list[str] | None = None, chat: str | None = None, **options: Any
) -> Any:
    tokenizer = toy_tokenizer(family)
    tokenizer.chat_template = chat  # type: ignore[union-attr]
    return TASKS[kind](TaskSettings(kind=kind, **options), tokenizer, labels)  # type: ignore[arg-type]


def labelled(task: Task, example: Example) -> str:
    return task.tokenizer.decode([label for label in example.labels.tolist() if label != IGNORE])


def only(task: Task, row: dict[str, Any]) -> Example:
    (example,) = task.prepare([row])
    return example


def consistent(example: Example) -> None:
    """Labels are the token itself or nothing, and the counts say how many."""
    ids, labels = example.inputs["input_ids"], example.labels
    assert ids.shape == labels.shape and example.tokens == len(ids)
    assert all(label in (IGNORE, token) for token, label in zip(ids.tolist(), labels.tolist(), strict=True))
    assert example.targets == int((labels[1:] != IGNORE).sum())


# --- causal language models --------------------------------------------------------------------------------------

FAMILIES = ["llama", "gpt2", "qwen", "t5"]
"""Tokenizers that add a start token, none, none, and an end token."""
ANSWERS = ["yes", "the answer is here", "zwei 🙂 Köln 東京", "two\nlines ", "</s>ly", "0 1 2 3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", ["plain", "Q: {instruction}\nA:"])
def test_the_labels_are_the_answer_and_the_end(family: str, answer: str, template: str):
    task = make("causal-lm", family, template=template)
    example = only(task, {"instruction": "what is the answer 🙂?", "response": answer})
    consistent(example)
    end = task.tokenizer.eos_token
    assert labelled(task, example) == answer + end
    ids = example.inputs["input_ids"].tolist()
    assert ids[-1] == task.tokenizer.eos_token_id
    assert (ids[0] == task.tokenizer.bos_token_id) is (family == "llama")
    assert task.tokenizer.decode(ids, skip_special_tokens=True).count("what is the answer 🙂?") == 1


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1), st.text())
def test_any_text_is_labelled_from_the_answer_on(instruction: str, response: str):
    task = make("causal-lm", "gpt2", template="plain", max_length=4096)
    example = only(task, {"instruction": instruction, "response": response})
    consistent(example)
    labels = example.labels.tolist()
    first = next(place for place, label in enumerate(labels) if label != IGNORE)
    assert IGNORE not in labels[first:], "nothing behind the beginning of the answer is left out"
    whole = task.tokenizer.decode(example.inputs["input_ids"])
    assert whole == task.template.prompt({"instruction": instruction}) + response + task.tokenizer.eos_token


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_labels_of_a_chat_are_its_answers_with_their_ends(family: str, answer: str):
    task = make("causal-lm", family, chat=CHATML)
    end = task.tokenizer.eos_token
    example = only(task, {"instruction": "one?", "response": answer})
    consistent(example)
    assert labelled(task, example) == answer + end
    talk = [("user", "one?"), ("assistant", answer), ("user", "two?"), ("assistant", "end")]
    example = only(task, {"messages": [{"role": role, "content": content} for role, content in talk]})
    consistent(example)
    assert labelled(task, example) == answer + end + "end" + end
    assert task.tokenizer.bos_token_id not in example.inputs["input_ids"].tolist(), "the template writes its own start"


def test_a_plain_conversation_labels_every_answer():
    task = make("causal-lm", template="plain")
    talk = [("user", "one?"), ("assistant", "eins"), ("user", "two?"), ("assistant", "zwei")]
    example = only(task, {"messages": [{"role": role, "content": content} for role, content in talk]})
    consistent(example)
    assert labelled(task, example) == "einszwei</s>"


@pytest.mark.parametrize("row", [{"text": "the film was great"}, {"instruction": "say", "response": "yes"}])
def test_loss_on_everything_counts_all_but_the_start(row: dict[str, str]):
    task = make("causal-lm", template="plain", loss_on="all")
    example = only(task, row)
    assert example.labels[0] == IGNORE and (example.labels[1:] != IGNORE).all()
    assert example.targets == example.tokens - 1


def test_text_without_an_answer_counts_whole():
    example = only(task := make("causal-lm", "gpt2"), {"text": "the film was great"})
    assert labelled(task, example) == "the film was great<end>"
    assert example.targets == example.tokens - 1, "the first token has nothing before it"


@pytest.mark.parametrize(("chat", "answer"), [(None, ""), (None, None), (CHATML, "")])
def test_an_empty_answer_teaches_the_end(chat: str | None, answer: str | None):
    task = make("causal-lm", chat=chat)
    example = only(task, {"instruction": "say nothing", "response": answer})
    assert labelled(task, example) == task.tokenizer.eos_token and example.targets == 1


def test_an_answer_that_is_cut_off_is_dropped_and_counted():
    row = {"instruction": "what is the answer " * 10, "response": "yes"}
    whole = only(make("causal-lm", template="plain"), row)
    task = make("causal-lm", template="plain", max_length=whole.tokens - whole.targets)
    assert task.prepare([row, {"instruction": "a", "response": "no"}, row]) != []
    assert task.dropped == {f"no token of the answer is left within max_length={whole.tokens - whole.targets}": 2}
    task = make("causal-lm", template="plain", max_length=whole.tokens - 1)
    example = only(task, row)
    assert example.tokens == whole.tokens - 1 and labelled(task, example) == "yes", "the end was cut off"
    assert not task.dropped


# --- encoder-decoder, classes, tags ------------------------------------------------------------------------------


def test_an_encoder_reads_the_prompt_and_a_decoder_learns_the_answer():
    task = make("seq2seq", "t5", template="plain")
    example = only(task, {"instruction": "Add.", "response": "three"})
    ids = example.inputs["input_ids"].tolist()
    assert task.tokenizer.decode(ids) == "### Instruction:\nAdd.\n\n### Response:\n</s>"
    assert labelled(task, example) == "three</s>"
    assert (example.tokens, example.targets) == (len(ids) + len(example.labels), len(example.labels))
    short = only(make("seq2seq", "t5", template="plain", max_length=8), {"instruction": "Add.", "response": "x " * 50})
    assert len(short.inputs["input_ids"]) == len(short.labels) == 8


def test_a_text_and_its_class():
    task = make("sequence-classification", "bert", ["bad", "good"])
    example = only(task, {"text": "the film was great", "label": "good"})
    assert task.tokenizer.decode(example.inputs["input_ids"]) == "[CLS]the film was great[SEP]"
    assert example.labels.tolist() == [1] and (example.targets, example.tokens) == (1, len(example.inputs["input_ids"]))
    assert task.prepare([{"text": "x", "label": None}]) == [] and sum(task.dropped.values()) == 1
    numbers = make("sequence-classification", "bert", [0, 1])  # type: ignore[list-item]
    assert only(numbers, {"text": "x", "label": 1}).labels.tolist() == [1]


def test_a_pair_of_texts():
    task = make("sequence-classification", "bert", ["no", "yes"], second_text="claim")
    example = only(task, {"text": "it rains", "claim": "it is wet", "label": "yes"})
    assert task.tokenizer.decode(example.inputs["input_ids"]) == "[CLS]it rains[SEP]it is wet[SEP]"
    segments = example.inputs["token_type_ids"].tolist()
    first = example.inputs["input_ids"].tolist().index(task.tokenizer.sep_token_id) + 1
    assert segments == [0] * first + [1] * (len(segments) - first)
    with pytest.raises(DataError, match="claim") as caught:
        task.prepare([{"text": "it rains", "claims": "it is wet", "label": "yes"}])
    assert caught.value.nearest == "claims"


def test_the_first_piece_of_a_word_carries_its_tag():
    task = make("token-classification", "bert", ["O", "B-PER", "I-PER"])
    words, tags = ["Konrad", "Zuse", "was", "🙂"], ["B-PER", "I-PER", "O", "O"]
    example = only(task, {"tokens": words, "tags": tags})
    encoded = task.tokenizer(words, is_split_into_words=True)
    owners, labels = encoded.word_ids(), example.labels.tolist()
    assert [labels[owners.index(word)] for word in range(4)] == [1, 2, 0, 0]
    assert sum(label != IGNORE for label in labels) == example.targets == 4
    cut = make("token-classification", "bert", ["O", "B-PER", "I-PER"], max_length=8)
    assert 0 < only(cut, {"tokens": words * 3, "tags": tags * 3}).targets < 12
    assert task.prepare([{"tokens": [], "tags": []}]) == [] and task.dropped == {"no word is left": 1}


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "row", "missing", "mapped"), [
    ("causal-lm", {"instructions": "x", "response": "y"}, "instruction", "instructions"),
    ("causal-lm", {"prompt": "x", "answer": "y"}, "instruction", "YOUR_COLUMN"),
    ("seq2seq", {"instruction": "x", "responses": "y"}, "response", "responses"),
    ("sequence-classification", {"text": "x", "labels": "y"}, "label", "labels"),
    ("token-classification", {"token": ["x"], "tags": ["O"]}, "tokens", "token"),
])  # fmt: skip
def test_wrong_columns_are_named_with_the_mapping(kind: str, row: dict[str, Any], missing: str, mapped: str):
    task = make(kind, "bert" if "class" in kind else "t5", ["O"])
    with pytest.raises(DataError) as caught:
        task.prepare([row])
    assert f"data.columns.{missing}={mapped}" in caught.value.action
    assert all(column in caught.value.given for column in row) and missing in caught.value.allowed


def test_a_template_of_ones_own_reads_its_own_columns():
    task = make("causal-lm", template="{question} ->")
    assert labelled(task, only(task, {"question": "x", "response": "y"})) == "y</s>"
    with pytest.raises(DataError, match="question"):
        task.prepare([{"questions": "x", "response": "y"}])


@pytest.mark.parametrize(("kind", "row"), [
    ("sequence-classification", {"text": "x", "label": "goood"}),
    ("token-classification", {"tokens": ["x"], "tags": ["goood"]}),
])  # fmt: skip
def test_unknown_labels_are_refused_with_the_nearest(kind: str, row: dict[str, Any]):
    with pytest.raises(DataError, match=r"task\.labels") as caught:
        make(kind, "bert", ["bad", "good"]).prepare([row])
    assert caught.value.nearest == "good"


def test_tokens_and_tags_must_be_as_many():
    with pytest.raises(DataError, match="2 tokens and 1 tags"):
        make("token-classification", "bert", ["O"]).prepare([{"tokens": ["a", "b"], "tags": ["O"]}])


@pytest.mark.parametrize("kind", TASKS)
def test_a_tokenizer_without_offsets_is_refused(kind: str):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow"):
        TASKS[kind](TaskSettings(kind=kind), Slow(), ["O"])  # type: ignore[arg-type]


# --- metrics -----------------------------------------------------------------------------------------------------


def total(counts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one.get(name, 0.0) for one in counts) for name in {n for one in counts for n in one}}


def sure(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits of a model that is right everywhere."""
    return 9.0 * functional.one_hot(labels, classes).float()


def test_the_metrics_of_a_language_model():
    task = make("causal-lm")
    assert isinstance(task, CausalLM)
    owner, labels = torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([2, 1, 0, 3, 3, 1])
    logits = sure(labels, 4)
    logits[3] = torch.tensor([8.0, 0, 0, 0])  # row 1 is wrong at one place
    found = task.count_rows(seen(logits, labels), labels, owner, 4)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    assert [row["tokens"] for row in found] == [2, 3, 0, 1] and [row["right"] for row in found] == [2, 2, 0, 1]
    assert [found[row]["exact"] for row in (0, 1, 3)] == [1, 0, 1]
    assert [row["loss"] for row in found] == pytest.approx([float(losses[owner == row].sum()) for row in range(4)])
    used = [found[row] for row in (0, 1, 3)]
    values = task.values(total(used))
    assert values == {
        "exact_match": pytest.approx(2 / 3),
        "loss": pytest.approx(float(losses.mean())),
        "perplexity": pytest.approx(math.exp(float(losses.mean()))),
        "token_accuracy": pytest.approx(5 / 6),
    }
    assert set(values) == set(task.score_names)
    assert set(task.values({}).values()) == {None}
    assert task.values({**total(used), "loss": 1e9})["perplexity"] < math.inf


def test_the_metrics_of_a_classifier():
    names = ["a", "b", "c"]
    task = make("sequence-classification", "bert", names)
    stream = torch.Generator().manual_seed(0)
    labels, logits = torch.randint(0, 3, (40,), generator=stream), torch.randn(40, 3, generator=stream)
    found = task.count_rows(seen(logits, labels), labels, torch.arange(40), 40)
    guesses, gold = [names[i] for i in logits.argmax(-1)], [names[i] for i in labels]
    values = task.values(total(found))
    assert values["accuracy"] == pytest.approx(Accuracy().value(Accuracy().count(guesses, gold)))
    assert values["accuracy"] == pytest.approx(accuracy_score(gold, guesses))
    assert values["macro_f1"] == pytest.approx(MacroF1(names).value(MacroF1(names).count(guesses, gold)))
    assert values["macro_f1"] == pytest.approx(f1_score(gold, guesses, average="macro"))
    assert values["loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert set(values) == set(task.score_names) and set(task.values({}).values()) == {None}


def test_the_metrics_of_a_tagger():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    task = make("token-classification", "bert", names)
    stream = torch.Generator().manual_seed(1)
    owner = torch.arange(6).repeat_interleave(torch.tensor([5, 1, 9, 4, 7, 30]))
    labels, logits = (torch.randint(0, 4, (56,), generator=stream), torch.randn(56, 4, generator=stream))
    logits[:40] += 2 * functional.one_hot(labels[:40], 4)
    found = task.count_rows(seen(logits, labels), labels, owner, 6)
    split = [owner == row for row in range(6)]
    guesses = [[names[i] for i in logits[rows].argmax(-1)] for rows in split]
    gold = [[names[i] for i in labels[rows]] for rows in split]
    values = task.values(total(found))
    assert 0 < values["entity_f1"] < 1
    assert values["entity_f1"] == pytest.approx(EntityF1().value(EntityF1().count(guesses, gold)))
    assert values["token_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert values["loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert set(values) == set(task.score_names) and set(task.values({}).values()) == {None}
    none = torch.zeros(3, dtype=torch.long)
    nothing = task.count_rows(seen(sure(none, 4), none), none, owner[:3], 1)
    assert task.values(nothing[0])["entity_f1"] is None, "no entity is there to be found"


def test_packing_joins_documents_into_full_blocks_and_loses_no_token() -> None:
    chosen = TaskSettings(max_length=16, template="plain", pack="stream")
    tokenizer = toy_tokenizer("llama")
    rows = [{"text": f"document number {number} is about the valley"} for number in range(7)]
    plain = CausalLM(chosen.model_copy(update={"pack": False, "max_length": 512}), tokenizer).prepare(rows)
    packed = CausalLM(chosen, tokenizer).prepare(rows)
    assert [len(e.labels) for e in packed[:-1]] == [16] * (len(packed) - 1) and len(packed[-1].labels) <= 16
    joined = torch.cat([e.inputs["input_ids"] for e in plain])
    assert torch.equal(torch.cat([e.inputs["input_ids"] for e in packed]), joined[: sum(e.tokens for e in packed)])
    assert sum(e.tokens for e in packed) >= len(joined) - 1  # a last block of one token has nothing to predict


def test_packing_keeps_texts_whole_and_fills_blocks() -> None:
    chosen = TaskSettings(max_length=128, template="plain", pack=True)
    tokenizer = toy_tokenizer("llama")
    rows = [
        {"instruction": f"count to {number}", "response": "one two three " * (number % 5 + 1)} for number in range(23)
    ]
    plain = CausalLM(chosen.model_copy(update={"pack": False}), tokenizer).prepare(rows)
    packed = CausalLM(chosen, tokenizer).prepare(rows)
    assert sum(e.targets for e in packed) == sum(e.targets for e in plain)
    texts = sorted(tuple(e.inputs["input_ids"].tolist()) for e in plain)
    found = []
    for block in packed:
        ids, places = block.inputs["input_ids"], block.inputs["position_ids"]
        assert len(ids) == len(places) == len(block.labels) == block.tokens <= 128
        assert block.targets == int((block.labels[1:] != IGNORE).sum()) == int((block.labels != IGNORE).sum())
        starts = [*torch.nonzero(places == 0).flatten().tolist(), len(ids)]
        found += [tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert sorted(found) == texts, "every text once, and whole"
    total = sum(e.tokens for e in plain)
    assert len(packed) <= 1.25 * total / 128 + 1 < len(plain) and CausalLM(chosen, tokenizer).prepare([]) == []


def test_packing_is_refused_where_samples_have_bounds() -> None:
    with pytest.raises(ConfigError, match=r"task.pack=true has no meaning for task.kind=sequence-classification"):
        SequenceClassification(
            TaskSettings(kind="sequence-classification", pack=True), toy_tokenizer("bert"), ["a", "b"]
        )


# --- conversations without an answer -----------------------------------------------------------------------------


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ANSWERED = talk(("user", "one?"), ("assistant", "eins"))


@pytest.mark.parametrize("chat", [None, CHATML])
@pytest.mark.parametrize("pack", [False, True, "stream"])
@pytest.mark.parametrize("role", ["gpt", "bot", "model", "Assistant"])
def test_conversations_in_which_no_assistant_speaks_are_refused(chat: str | None, pack: Any, role: str) -> None:
    task = make("causal-lm", chat=chat, pack=pack)
    rows = [talk(("user", "one?"), (role, "eins")), talk(("user", "two?"))]
    with pytest.raises(DataError, match=f"Roles found: .*{role}.*loss_on=all") as caught:
        task.prepare(rows)
    if role == "Assistant":
        assert caught.value.nearest == "Assistant"
    assert task.prepare([]) == []
    assert task.prepare([talk(("system", "be brief"), ("user", "two?"))]) == []  # others may follow, as a probe sees


@pytest.mark.parametrize("chat", [None, CHATML])
def test_a_conversation_without_an_assistant_among_others_is_dropped_and_counted(chat: str | None) -> None:
    task = make("causal-lm", chat=chat)
    (example,) = task.prepare([talk(("user", "one?")), ANSWERED, {"messages": []}, {"messages": None}])
    assert labelled(task, example) == "eins</s>"
    assert task.dropped == {"no message has the role assistant": 2, "the conversation is empty": 1}
    everything = make("causal-lm", chat=chat, loss_on="all")
    assert len(everything.prepare([talk(("user", "one?"))])) == 1, "all text was asked for"


def test_null_conversations_alone_are_no_mistake_of_roles() -> None:
    task = make("causal-lm")
    assert task.prepare([{"messages": None}]) == [] and task.dropped == {"the conversation is empty": 1}


def test_no_end_is_taught_behind_a_question_that_waits_for_its_answer() -> None:
    task = make("causal-lm", template="plain")
    row = talk(("user", "one?"), ("assistant", "eins"), ("user", "two?"))
    example = only(task, row)
    assert labelled(task, example) == "eins</s>"
    assert example.inputs["input_ids"].tolist() == only(task, ANSWERED).inputs["input_ids"].tolist()


@pytest.mark.parametrize("row", [{"tokens": None, "tags": ["O"]}, {"tokens": ["a"], "tags": None}])
def test_null_tokens_or_tags_are_dropped_and_counted(row: dict[str, Any]) -> None:
    task = make("token-classification", "bert", ["O"])
    assert len(task.prepare([row, {"tokens": ["a"], "tags": ["O"]}])) == 1
    assert task.dropped == {"the tokens or the tags are empty": 1}

"""How rows become text, and where the answers are in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError
from fedllm.models.toy import toy_tokenizer
from fedllm.tasks.template import Template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "eins"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "zwei 🙂"},
]


def tokenizer(chat: str | None = None) -> Any:
    found = toy_tokenizer("llama")
    found.chat_template = chat  # type: ignore[union-attr]
    return found


def answers(template: Template, row: dict[str, Any]) -> list[str]:
    rendered = template.render(row)
    return [rendered.text[start:end] for start, end in rendered.answers]


# --- plain and custom --------------------------------------------------------------------------------------------


def test_plain_text_ends_with_the_answer():
    template = Template("plain", tokenizer())
    row = {"instruction": "Add.", "response": "three"}
    rendered = template.render(row)
    assert rendered.text == "### Instruction:\nAdd.\n\n### Response:\nthree"
    assert rendered.text == template.prompt(row) + "three" and rendered.special
    assert answers(template, row) == ["three"]
    with_input = template.prompt({**row, "input": "1 2"})
    assert with_input == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert template.prompt({**row, "input": ""}) == template.prompt({**row, "input": None}) == template.prompt(row)


def test_plain_text_without_an_answer_counts_whole():
    rendered = Template("plain", tokenizer()).render({"text": "only text"})
    assert (rendered.text, rendered.answers, rendered.special) == ("only text", (), True)


@pytest.mark.parametrize(("name", "prompt", "answer"), [
    ("Q: {instruction} A:", "Q: why? A:", "so"),
    ("Q: {instruction} A: ", "Q: why? A:", " so"),
    ("{context}\n{instruction}\n", "here\nwhy?\n", "so"),
    ("{{json}} {instruction}|", "{json} why?|", "so"),
])  # fmt: skip
def test_a_template_of_ones_own(name: str, prompt: str, answer: str):
    template = Template(name, tokenizer())
    row = {"instruction": "why?", "context": "here", "response": "so"}
    assert template.prompt(row) == prompt
    assert answers(template, row) == [answer] and template.render(row).text == prompt + answer


@given(
    instruction=st.text(), response=st.text(), name=st.sampled_from(["plain", "> {instruction}\n<", "{instruction} "])
)
def test_prompt_and_answer_make_up_the_text(instruction: str, response: str, name: str):
    template = Template(name, tokenizer())
    row = {"instruction": instruction, "response": response}
    rendered = template.render(row)
    (start, end), prompt = rendered.answers[0], template.prompt(row)
    assert len(rendered.answers) == 1 and rendered.text.startswith(prompt)
    assert (start, end) == (len(prompt), len(rendered.text))
    assert rendered.text[start:end].lstrip(" ") == response.lstrip(" ")


def test_a_conversation_without_a_chat_template():
    template = Template("plain", tokenizer())
    row = {"messages": TALK}
    rendered = template.render(row)
    assert rendered.text == (
        "Be short.\n\n### Instruction:\none?\n\n### Response:\neins\n\n### Instruction:\ntwo?\n\n### Response:\nzwei 🙂"
    )
    assert answers(template, row) == ["eins", "zwei 🙂"]
    assert template.prompt(row) + "zwei 🙂" == rendered.text
    assert template.prompt({"messages": TALK[:-1]}) == template.prompt(row), "what still waits for its answer"


# --- chat --------------------------------------------------------------------------------------------------------


def test_a_chat_answer_ends_with_the_end_token():
    template = Template("auto", tokenizer(CHATML), system="Be kind.")
    assert template.name == "chat"
    row = {"instruction": "Add.", "input": "1 2", "response": "three"}
    rendered = template.render(row)
    assert rendered.text == (
        "<|im_start|>system\nBe kind.</s>\n<|im_start|>user\nAdd.\n\n1 2</s>\n<|im_start|>assistant\nthree</s>\n"
    )
    assert answers(template, row) == ["three</s>"], "the line break behind it is never generated"
    assert rendered.text.startswith(template.prompt(row) + "three") and not rendered.special


def test_every_answer_of_a_chat_counts():
    template = Template("chat", tokenizer(CHATML), system="not this one")
    row = {"messages": TALK}
    assert answers(template, row) == ["eins</s>", "zwei 🙂</s>"]
    assert "not this one" not in template.render(row).text
    assert template.prompt(row).endswith("two?</s>\n<|im_start|>assistant\n")
    assert template.prompt({"messages": TALK[:4]}) == template.prompt(row)


def test_a_template_that_ends_only_the_last_turn_does_not_label_the_next_question():
    last = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert answers(Template("chat", tokenizer(last)), {"messages": TALK}) == ["eins", "zwei 🙂</s>"]


def test_a_template_without_an_end_token_keeps_white_space():
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    assert answers(Template("chat", tokenizer(bare)), {"messages": TALK})[0] == "eins\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(ConfigError, match="plain"):
        Template("chat", tokenizer(rewriting)).render({"messages": TALK})


def test_a_conversation_that_the_template_refuses_is_a_data_error():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        Template("chat", tokenizer(strict)).render({"messages": TALK})


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_which_template_auto_means():
    assert Template("auto", tokenizer()).name == "plain"
    assert Template("auto", tokenizer(CHATML)).name == "chat"


@pytest.mark.parametrize(("name", "match"), [
    ("chat", "plain"), ("plan", "Did you mean 'plain'"), ("{instruction", "Write a literal brace twice"),
    ("a } b {instruction}", "literal brace"), ("{} {instruction}", "name of a column"),
    ("{0}", "name of a column"), ("{row.text}", "name of a column"), ("{row[text]}", "name of a column"),
])  # fmt: skip
def test_templates_that_cannot_be_used(name: str, match: str):
    with pytest.raises(ConfigError, match=match):
        Template(name, tokenizer())


@pytest.mark.parametrize("name", ["plain", "{instruction}:"])
def test_a_missing_column_is_named_with_the_nearest(name: str):
    with pytest.raises(DataError) as caught:
        Template(name, tokenizer()).render({"instructions": "x", "response": "y"})
    assert caught.value.nearest == "instructions" and "data.columns.instruction" in caught.value.action
    with pytest.raises(DataError, match="response"):
        Template(name, tokenizer()).render({"instruction": "x", "answer": "y"})


@pytest.mark.parametrize("messages", ["text", [{"content": "no role"}], [["user", "x"]], None])
def test_messages_that_are_no_conversation(messages: Any):
    with pytest.raises(DataError, match="messages"):
        Template("plain", tokenizer()).render({"messages": messages})


def test_none_is_an_empty_text():
    template = Template("plain", tokenizer())
    assert answers(template, {"instruction": None, "response": None}) == [""]
    assert answers(template, {"messages": [{"role": "assistant", "content": None}]}) == [""]


# --- templates that treat the last turn differently --------------------------------------------------------------

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's manner: the last answer begins with a block for thoughts, earlier ones do not."""


@pytest.mark.parametrize("first", ["eins", "<b>", "two?", " eins "])
def test_a_last_turn_that_begins_differently_leaves_earlier_answers_their_labels(first: str) -> None:
    row = {"messages": [*TALK[:2], {"role": "assistant", "content": first}, *TALK[3:]]}
    found = answers(Template("chat", tokenizer(THINKING)), row)
    assert found == [f"{first}</s>", "<think>\n\n</think>\n\nzwei 🙂</s>"]


def test_an_earlier_answer_that_the_template_leaves_out_is_refused() -> None:
    forgetting = THINKING.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '-' }}")
    with pytest.raises(ConfigError, match="does not keep earlier turns"):
        Template("chat", tokenizer(forgetting)).render({"messages": TALK})


def test_a_template_that_writes_its_last_answer_in_its_own_way_is_labelled_whole() -> None:
    upper = THINKING.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert answers(Template("chat", tokenizer(upper)), {"messages": TALK[:3]}) == ["<think>\n\n</think>\n\nEINS</s>"]


@pytest.mark.parametrize(
    "asked",
    [
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}",
        "{{ strftime_now('%d %b %Y') }}",
        '{% set today = strftime_now( "%d" ) ~ " " ~ strftime_now("%b %Y") %}{{ today }}',
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}",
    ],
)
def test_the_tokens_of_a_template_with_a_date_do_not_depend_on_the_day(asked: str) -> None:
    dated = f"Today: {asked}\n" + CHATML
    assert Template("chat", tokenizer(dated)).render({"messages": TALK}).text.startswith("Today: 26 Jul 2024\n")


# --- what the chat template writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_texts_of_the_chat_template_are_known_from_others(system: str | None) -> None:
    template = Template("chat", tokenizer(CHATML), system)
    rows = [{"instruction": "one?"}, {"messages": TALK[:4]}, {"messages": TALK[1:4]}]
    assert all(template.rendered(template.prompt(row)) for row in rows)
    assert not template.rendered("one?") and not Template("plain", tokenizer()).rendered("one?")
    picky = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    assert Template("chat", tokenizer(picky)).rendered("<|im_start|>user\none?")
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert not Template("chat", tokenizer(bare)).rendered("one?"), "nothing tells its texts from others"


def test_the_end_of_a_turn_is_the_first_special_token_behind_an_answer() -> None:
    other = CHATML.replace("{{ eos_token }}", "<unk>")
    found = tokenizer(other)
    assert Template("chat", found).turn_end == found.unk_token_id != found.eos_token_id
    assert Template("chat", tokenizer(CHATML)).turn_end == found.eos_token_id
    assert Template("chat", tokenizer(CHATML.replace("{{ eos_token }}", ""))).turn_end is None
    assert Template("plain", tokenizer()).turn_end is None
    changing = CHATML.replace("message.content", "message.content | upper").replace("<|im_start|>", "<s>")
    assert Template("chat", tokenizer(changing)).turn_end is None, "the answer is not found"
    assert Template("chat", tokenizer("{{ raise_exception('no') }}")).turn_end is None

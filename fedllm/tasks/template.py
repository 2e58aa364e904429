"""Template - how a row becomes text, and which part of the text is the answer."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedllm.core.errors import ConfigError, DataError, nearest

PLAIN = "### Instruction:\n{instruction}\n\n### Response:\n"
PLAIN_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
BREAK = "\n\n"
"""What stands between the turns of a conversation without a chat template."""
TODAY = datetime(2024, 7, 26)
"""The day that chat templates are told, so that tokens do not depend on the calendar; Llama 3.x's own default."""
DATE = TODAY.strftime("%d %b %Y")
"""The same as chat templates write it."""
SENTINEL = "0answer0"
"""An answer that no template writes by itself."""


@dataclass(frozen=True)
class Rendered:
    """A text and the character ranges of it that are answers.

    Attributes:
        text: everything, prompt and answers.
        answers: (start, end) pairs; empty for plain text, where everything counts.
        special: whether the tokenizer still has to add its special tokens.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    special: bool


class Template:
    """Renders rows for one tokenizer.

    Args:
        name: auto, chat, plain, or a text with {columns} in braces.
        tokenizer: a transformers tokenizer.
        system: a system message for chat templates.

    Chat templates are told one fixed day, :data:`TODAY`, in either way in which they ask for it (see :func:`undated`):
    tokens are the same on every day.
    """

    def __init__(self, name: str, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if name == "auto":
            name = "chat" if has_chat else "plain"
        if name == "chat" and not has_chat:
            raise ConfigError(
                "task.template=chat needs a tokenizer with a chat template.",
                "This one has none.",
                "plain",
                "Set task.template=plain.",
            )
        if name not in ("chat", "plain") and "{" not in name:
            raise ConfigError(
                f"task.template='{name}' is neither a known template nor a text with columns in braces.",
                "Allowed: auto, chat, plain, or a text such as 'Question: {instruction} Answer:'.",
                nearest(name, ("auto", "chat", "plain")),
            )
        self.name, self._columns = name, _columns(name)

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The text that ends where the answer begins; of a conversation, where its last answer does."""
        if "messages" in row:
            messages = self._messages(row)
            asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
            return self._chat(asked, True) if self.name == "chat" else _plain_conversation(asked)[0]
        if self.name == "chat":
            return self._chat([_user(row)], True)
        if self.name == "plain":
            return (PLAIN_INPUT if row.get("input") else PLAIN).format(
                instruction=field(row, "instruction"), input=row.get("input") or ""
            )
        return self._own(row).rstrip(" ")

    def roles(self, row: Mapping[str, Any]) -> list[str]:
        """The roles of the column `messages`, turn by turn; raises :class:`DataError` where it is no conversation."""
        return [message["role"] for message in self._messages(row)]

    def rendered(self, text: str) -> bool:
        """Whether the chat template wrote this text, start token included: it begins as all its texts begin."""
        return text.startswith(self._beginnings)

    @functools.cached_property
    def _beginnings(self) -> tuple[str, ...]:
        """How texts of the chat template begin, with and without a system message."""
        if self.name != "chat":
            return ()
        first, second = ([{"role": "user", "content": text}] for text in "ab")
        system = [{"role": "system", "content": text} for text in "ab"]
        pairs = ((first, second), ([system[0], *first], [system[1], *first]))
        found = {_shared_start(self._tried(left, True), self._tried(right, True)) for left, right in pairs}
        return tuple(sorted(found - {""}))

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The first special token that the chat template writes behind an answer; None where there is none.

        The end-of-sequence token of a base model is often another.
        """
        if self.name != "chat":
            return None
        text = self._tried([{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}], False)
        _, answer, behind = text.rpartition(SENTINEL)
        if not answer:
            return None
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {*self.tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        ids = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        return next((token for token in ids if token in special), None)

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """Prompt and answer as one text with the answer's place in it."""
        if "messages" in row:
            return self._conversation(self._messages(row))
        if "text" in row and "response" not in row:
            return Rendered(field(row, "text"), (), True)
        prompt, answer = self.prompt(row), field(row, "response")
        if self.name == "chat":
            return self._conversation([_user(row), {"role": "assistant", "content": answer}])
        text = (prompt if self.name == "plain" else self._own(row)) + answer
        return Rendered(text, ((len(prompt), len(text)),), True)

    def _own(self, row: Mapping[str, Any]) -> str:
        """The user's template filled in. Spaces at its end belong to the answer, as tokenizers put them there."""
        return self.name.format(**{name: field(row, name) for name in self._columns})

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise DataError(
                f"The column 'messages' holds a {type(messages).__name__}.",
                "A list of {'role': ..., 'content': ...} is needed.",
            )
        return [{"role": str(m["role"]), "content": str(m.get("content") or "")} for m in messages]

    def _conversation(self, messages: list[dict[str, str]]) -> Rendered:
        if self.name != "chat":
            answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            text, answers = _plain_conversation(messages[: answered[-1] + 1] if answered else messages)
            return Rendered(text.removesuffix(BREAK), tuple(answers), True)
        text, answers = self._chat(messages, False), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, upto = self._chat(messages[:number], True), self._chat(messages[: number + 1], False)
            if not upto.startswith(before) or not text.startswith(before):
                raise _not_kept()
            answers.append(self._answer(text, before, upto, message["content"].strip()))
        return Rendered(text, tuple(answers), False)

    def _answer(self, text: str, before: str, upto: str, content: str) -> tuple[int, int]:
        """The range of an answer in `text`; `before` ends where its turn opens, `upto` is all with it as the last turn.

        Some templates (Qwen3) open the last turn with a block for thoughts, and earlier ones without.
        """
        kept = _shared_start(upto, text)
        if kept == upto or content in kept[len(before) :]:
            return len(before), len(self._without_break(kept))
        start = len(text) - len(text[len(before) :].lstrip())
        if not text.startswith(content, start) or content not in upto[len(before) :]:
            raise _not_kept()
        end = start + len(content)
        behind = _shared_start(upto[upto.rindex(content) + len(content) :], text[end:])
        return len(before), len(self._without_break(text[:end] + behind))

    def _without_break(self, text: str) -> str:
        """`text` without the white space behind its last end token: generation stops at that token."""
        end, shorter = self.tokenizer.eos_token, text.rstrip()
        return shorter if end and shorter.endswith(end) else text

    def _tried(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        """A conversation that a template may refuse (some know no system message); "" where it does."""
        try:
            return self._chat(messages, open_answer)
        except Exception:  # templates raise what they like
            return ""

    def _chat(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        from jinja2 import TemplateError

        own = bool(messages) and messages[0]["role"] == "system"
        system = [{"role": "system", "content": self.system}] if self.system and not own else []
        try:
            return chat(self.tokenizer, [*system, *messages], open_answer)
        except TemplateError as fault:
            raise DataError(
                f"The tokenizer's chat template refuses a conversation of {len(messages)} messages: {fault}.",
                action="Look at the roles in the column 'messages', or set task.template=plain.",
            ) from fault


def chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], open_answer: bool) -> str:
    """A conversation as the tokenizer's chat template writes it; with `open_answer`, to where an answer begins."""
    own = tokenizer.chat_template
    template = undated(own) if isinstance(own, str) else None  # several by name: the library chooses
    how = {"tokenize": False, "add_generation_prompt": open_answer, "date_string": DATE}
    return str(tokenizer.apply_chat_template(list(messages), chat_template=template, **how))


@functools.lru_cache(maxsize=8)
def undated(template: str) -> str:
    """A chat template with :data:`TODAY` where it asks for the time in a format of its own (Mistral, SmolLM3, gpt-oss).

    The function `strftime_now` that such templates call is the library's: its result is written in place of the call.
    """
    return re.sub(
        r"""\bstrftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""",
        lambda call: repr(TODAY.strftime(call[1] or call[2] or "")),
        template,
    )


def _not_kept() -> ConfigError:
    return ConfigError(
        "The tokenizer's chat template does not keep earlier turns as they were, so the answer cannot be found in the "
        "text.",
        action="Set task.template=plain.",
    )


def _shared_start(left: str, right: str) -> str:
    ends = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(ends, min(len(left), len(right)))]


def _columns(template: str) -> list[str]:
    """The columns that a text with braces names."""
    try:
        found = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as fault:
        raise ConfigError(
            f"task.template='{template}' cannot be read: {fault}.", action="Write a literal brace twice: {{ or }}."
        ) from fault
    if wrong := [name for name in found if not name or name.isdigit() or set(name) & set(".[]")]:
        raise ConfigError(
            f"task.template='{template}' has '{{{wrong[0]}}}' in it.", "Braces hold the name of a column."
        )
    return found


def _plain_conversation(messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation without a chat template, and the character ranges of its answers."""
    text, answers = "", []
    for message in messages:
        if message["role"] == "assistant":
            answers.append((len(text), len(text) + len(message["content"])))
            text += message["content"] + BREAK
        elif message["role"] == "system":
            text += message["content"] + BREAK
        else:
            text += PLAIN.format(instruction=message["content"])
    return text, answers


def _user(row: Mapping[str, Any]) -> dict[str, str]:
    text = field(row, "instruction")
    return {"role": "user", "content": f"{text}\n\n{row['input']}" if row.get("input") else text}


def field(row: Mapping[str, Any], name: str) -> str:
    """A column of a row as text, "" for None; raises :class:`DataError` where there is no such column."""
    if name not in row:
        raise DataError(
            f"A row has no column '{name}'.",
            f"Its columns: {', '.join(row)}.",
            nearest(name, row),
            f"Map one to it: data.columns.{name}=YOUR_COLUMN.",
        )
    return "" if row[name] is None else str(row[name])

"""Template - how a row becomes text, and which part of the text is the answer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import ConfigError, DataError, nearest

PLAIN = "### Instruction:\n{instruction}\n\n### Response:\n"
PLAIN_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


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
        self.name = name

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The text that ends where the answer begins."""
        if self.name == "chat":
            return self._chat(self._messages(row)[:-1] if "messages" in row else [_user(row)], True)
        if self.name == "plain":
            return (PLAIN_INPUT if row.get("input") else PLAIN).format(
                instruction=_field(row, "instruction"), input=row.get("input") or ""
            )
        names = [name for _, name, _, _ in string.Formatter().parse(self.name) if name]
        return self.name.format(**{name: _field(row, name) for name in names})

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """Prompt and answer as one text with the answer's place in it."""
        if "messages" in row:
            return self._conversation(self._messages(row))
        if "text" in row and "response" not in row:
            return Rendered(_field(row, "text"), (), True)
        prompt, answer = self.prompt(row), _field(row, "response")
        if self.name == "chat":
            return self._conversation([_user(row), {"role": "assistant", "content": answer}])
        return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), True)

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
            return self._plain_conversation(messages)
        text, answers = self._chat(messages, False), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, upto = self._chat(messages[:number], True), self._chat(messages[: number + 1], False)
            if not upto.startswith(before) or not text.startswith(before):
                raise ConfigError(
                    "The tokenizer's chat template does not keep earlier turns as they were, so the answer cannot be "
                    "found in the text.",
                    action="Set task.template=plain.",
                )
            end = len(upto) if text.startswith(upto) else len(text)
            answers.append((len(before), end))
        return Rendered(text, tuple(answers), False)

    def _plain_conversation(self, messages: list[dict[str, str]]) -> Rendered:
        text, answers = "", []
        for message in messages:
            if message["role"] == "assistant":
                answers.append((len(text), len(text) + len(message["content"])))
                text += message["content"] + "\n\n"
            else:
                text += PLAIN.format(instruction=message["content"])
        return Rendered(text.rstrip("\n"), tuple(answers), True)

    def _chat(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.apply_chat_template(
            [*system, *messages], tokenize=False, add_generation_prompt=open_answer
        )


def _user(row: Mapping[str, Any]) -> dict[str, str]:
    text = _field(row, "instruction")
    return {"role": "user", "content": f"{text}\n\n{row['input']}" if row.get("input") else text}


def _field(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise DataError(
            f"A row has no column '{name}'.",
            f"Its columns: {', '.join(row)}.",
            nearest(name, row),
            f"Map one to it: data.columns.{name}=YOUR_COLUMN.",
        )
    return "" if row[name] is None else str(row[name])

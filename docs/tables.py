"""Tables - tables, code and docstrings as Markdown."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from docs.roles import plain

YES, NO = "yes", "–"
"""What stands in a table of what is allowed."""
LEGEND = (
    "*linear*: its uploads may be added up in secret. *real sites*: nothing in it stands against clients on other "
    "machines."
)
"""What two columns mean."""


def cell(text: Any) -> str:
    """A text for a cell of a table."""
    flat = " ".join(plain(str(text)).split())
    parts = flat.split("`")
    for number in range(0, len(parts), 2):  # outside of code
        parts[number] = parts[number].replace("*", "\\*").replace("<", "&lt;")
    return "`".join(parts).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(one) for one in row)} |" for row in rows)])


def code(text: str) -> str:
    """A text as code; "" stays empty."""
    return f"`{text}`" if text else ""


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring behind its title line."""
    body = plain(inspect.cleandoc(text)).partition("\n")[2].strip("\n")
    return [part for part in body.split("\n\n") if part.strip()]

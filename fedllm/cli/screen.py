"""Screen - where the command line writes: tables and texts to stdout, progress and errors to stderr.

Consoles are made when they are used, so that redirected streams are found. Nothing heavy is imported here: rich is
loaded with the first console and fedllm's own parts not at all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PIPED_WIDTH = 160
"""Columns of a table that is written into a file or a pipe; the variable COLUMNS overrides it."""


def console(errors: bool = False) -> Console:
    """A console on stdout, or on stderr where `errors`.

    It writes what it is given: `:AB:` in a fingerprint is no emoji, and `[a]` in a name is no style.
    """
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=stream, width=wide, highlight=False, markup=False, emoji=False)


def interactive(place: Console) -> bool:
    """Whether a person watches: lines may be drawn again. A coloured log file is no such place."""
    return place.file.isatty() and not place.is_dumb_terminal


def show(*renderables: RenderableType) -> None:
    """Print tables to stdout."""
    place = console()
    for renderable in renderables:
        place.print(renderable)


def fitted(table: Table, width: int) -> Table:
    """The table without the last columns that `width` has no room for; the first two always stay."""
    from rich.console import Console

    measure = Console(width=10_000).measure
    while len(table.columns) > 2 and measure(table).maximum > width:
        table.columns.pop()
    return table


def say(text: str = "", style: str | None = None, errors: bool = False) -> None:
    """Print a line as it is: no markup and no line breaks of its own, so that paths can be copied."""
    console(errors).print(text, style=style, soft_wrap=True)


def tell(text: str, style: str | None = None, errors: bool = False) -> None:
    """Print sentences, broken between words where they are wider than a terminal."""
    place = console(errors)
    place.print(text, style=style, soft_wrap=not interactive(place))


def emit(value: Any) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def fail(first: str, rest: Sequence[str] = ()) -> None:
    """Print an error to stderr: `Error:` in red on a terminal, then one indented line for each further part."""
    from rich.text import Text

    place = console(errors=True)
    place.print(Text("Error: ", "bold red") + Text(first), soft_wrap=not interactive(place))
    for part in rest:
        place.print(Text(f"  {part}"), soft_wrap=not interactive(place))


def warn(texts: Sequence[str]) -> None:
    """Print warnings to stderr."""
    for text in texts:
        tell(f"Warning: {text}", "yellow", errors=True)


def can_show(characters: str) -> bool:
    """Whether stdout can write these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@contextmanager
def loading(text: str) -> Iterator[None]:
    """A spinner on stderr while libraries are loaded; nothing where stderr is no terminal."""
    from rich.text import Text

    place = console(errors=True)
    if not interactive(place):
        yield
        return
    with place.status(Text(f"{text} ..."), refresh_per_second=4):
        yield


def hush(debug: bool) -> None:
    """Keep the libraries' own progress bars, logs and warnings off the screen; call it before they are imported."""
    import warnings

    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GOMP_SPINCOUNT": "30000",  # threads that spin for long while they wait make a busy machine crawl
    }.items():
        os.environ.setdefault(name, value)
    if not debug:
        warnings.simplefilter("ignore")

"""Dash - `fedllm dash`: a web page over the files of a run or of a kit, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Generator
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import complete, screen


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("dash", rich_help_panel="Across sites")(dash)


def dash(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A run's folder, a folder of runs, or the kit of a server, a site or a coordinator.",
            autocompletion=complete.runs,
            show_default=False,
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where to listen on 127.0.0.1; 0 is any.")] = 0,
    token_env: Annotated[
        str | None,
        typer.Option(help="The environment variable with the token; a new random one otherwise.", show_default=False),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a web page that shows how runs go, what left a site, and why it was allowed. Ctrl-C ends it.

    The page listens to this machine alone and opens with the token in its address.
    """
    with screen.loading("Looking"):
        from fedllm.dash.server import Dash
        from fedllm.dash.source import source_of

        source = source_of(path)
        place = Dash(source, port, _token(token_env))
    screen.say(f"{path} is taken for {source.taken}.")
    over = threading.Event()
    before = {number: signal.signal(number, lambda *_: over.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with place:
            screen.say(f"Open: {place.entrance}")
            screen.say("Whoever on this machine has this address can see the page. Ctrl-C ends it.", "dim")
            with _opened(place.entrance) if open_it else contextlib.nullcontext():  # a browser may take its time
                over.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    screen.say("Ended.")


def _token(variable: str | None) -> str | None:
    """The token in an environment variable; None where none is named."""
    if variable is None:
        return None
    found = os.environ.get(variable, "").strip()
    if not found:
        from fedllm.core.errors import ConfigError

        raise ConfigError(
            f"The environment variable {variable} holds no token.", action=f"Set it: export {variable}=..."
        )
    return found


@contextlib.contextmanager
def _opened(address: str) -> Generator[None]:
    """The page in a browser, by way of a file that only this user can read.

    The address itself would stand among the arguments of the browser's process, where every user of this machine can
    read it, and the token with it.
    """
    import webbrowser

    with tempfile.TemporaryDirectory(prefix="fedllm-dash-") as folder:
        file = Path(folder) / "open.html"
        words = (
            f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(address)}"><title>fedllm dash</title>'
        )
        file.write_text(words, encoding="utf-8")
        if not webbrowser.open(file.as_uri()):
            screen.warn(["No browser could be opened here; open the address yourself."])
        yield

"""Process - `deploy start`, and the process of a server or a site in the foreground.

Ctrl-C, a terminal or systemd ends it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.cli import screen
from fedllm.cli.deploy.given import KitArgument, Unit

if TYPE_CHECKING:
    from fedllm.deploy.kit import Kit

POLL = 0.5
"""Seconds between two looks at a process."""
SAID = {
    "Successfully registered client": "The server has let this site in.",
    "is disabled": "The server does not let this site in: it was revoked.",
    "Server started": "The server is ready.",
}
"""What FLARE's log says -> in plain words, once."""


def start_server(kit: KitArgument, unit: Unit = None) -> None:
    """Run the server in the foreground; Ctrl-C ends it. Runs that are under way can be resumed later."""
    from fedllm.deploy.kit import Kit

    place = Kit.of(kit, "server")
    if unit is not None:
        write_unit(place, ["deploy", "start", str(place.folder)], unit)
        return
    soon = place.in_time()
    screen.warn([soon] if soon is not None else [])
    _free(place)
    place.settle(place.facts())
    foreground(place)


def _free(kit: Kit) -> None:
    """Raise :class:`RunError` where another process has the server's port."""
    import errno
    import socket

    from fedllm.core.errors import RunError

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", kit.port))
        except OSError as fault:
            why = "is in use" if fault.errno == errno.EADDRINUSE else f"cannot be opened: {fault.strerror}"
            raise RunError(
                f"The port {kit.port} {why}.", action="End what listens there: perhaps this server."
            ) from None


def foreground(kit: Kit) -> None:
    """Start a participant and stay until it ends or is asked to; leaves with an error where it ended by itself."""
    from fedllm.core.errors import RunError
    from fedllm.engine.nvflare import session

    asked = False

    def leave(*_: object) -> None:
        nonlocal asked
        asked = True

    log = kit.folder / "log.txt"
    before = log.stat().st_size if log.is_file() else 0
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    there = session.start(kit.name, kit.folder)
    try:
        screen.say(f"{kit.kind.capitalize()} {kit.name} of {kit.network}, {kit.address}. Ctrl-C ends it. Log: {log}")
        said: set[str] = set()
        while there.alive and not asked:
            for text in _told(log, before, said):
                screen.say(text)
            time.sleep(POLL)
        if not asked:
            for text in _told(log, before, said):
                screen.say(text)
            raise RunError(f"The process of {kit.name} ended by itself.", _tail(kit), action=f"Its log: {log}")
        screen.say("Ended.")
    finally:
        there.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _told(log: Path, before: int, said: set[str]) -> Iterator[str]:
    """What is new in a process's log, in plain words."""
    if not log.is_file():
        return
    size = log.stat().st_size
    with log.open("rb") as file:
        file.seek(before if size >= before else 0)
        text = file.read().decode("utf-8", "replace")
    for mark, words in SAID.items():
        if mark in text and mark not in said:
            said.add(mark)
            yield words


def _tail(kit: Kit) -> str:
    """What a process said last."""
    for name in ("error_log.txt", "start.log"):
        file = kit.folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        words = [line for line in text.splitlines() if line.strip(" ^~")]
        if words:
            return f"Its last words: {words[-1].strip()}"
    return ""


def write_unit(kit: Kit, words: list[str], file: Path) -> None:
    """Write the systemd unit of a command, and say what to do with it."""
    from fedllm.deploy import units

    place = units.write(kit, words, file)
    screen.say(f"Unit: {place}")
    screen.say("Look at it, above all at User, then:")
    screen.say(f"  sudo cp {place} /etc/systemd/system/ && sudo systemctl enable --now {place.name}")

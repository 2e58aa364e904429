"""Networks for the tests: files, rows, and commands in their foregrounds, as several terminals would have them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cli.lines import ENVIRONMENT, MAIN, outside

ROOT = Path(__file__).parents[2]
ADMIN = "ada@hub.org"
SITES = ("north", "south", "west")
PATIENCE = 240.0


def values(port: int = 8002, **changes: Any) -> dict[str, Any]:
    return {
        "name": "trio",
        "server": {"host": "localhost", "port": port, "organisation": "hub"},
        "coordinators": {ADMIN: {"organisation": "hub", "role": "project_admin"}},
        "sites": {site: {"organisation": f"{site}_clinic"} for site in SITES},
        **changes,
    }


def write(file: Path, found: Any) -> Path:
    file.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return file


def rows(file: Path, count: int = 12) -> Path:
    words = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove"]
    lines = [{"instruction": f"reverse {w} {n}", "response": w[::-1]} for n, w in enumerate((words * 9)[:count])]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass
class Foreground:
    """Processes in their foregrounds, as three terminals would have them."""

    place: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kits(self) -> Path:
        return self.place / "net" / "kits"

    def begin(self, name: str, *words: Any, until: str) -> None:
        """Start a command and wait until it says something."""
        log = self.place / f"{name}.txt"
        with log.open("wb") as out:
            line = [*MAIN, *map(str, words)]
            self.running[name] = subprocess.Popen(line, stdout=out, stderr=out, env=ENVIRONMENT)
        end = time.monotonic() + PATIENCE
        while until not in log.read_text(encoding="utf-8"):
            assert self.running[name].poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.2)

    def end(self, name: str) -> str:
        """Ctrl-C; returns what it said."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        return (self.place / f"{name}.txt").read_text(encoding="utf-8")

    def admin(self, *words: Any) -> subprocess.CompletedProcess[str]:
        return outside("deploy", *words, "--kit", self.kits / ADMIN, timeout=PATIENCE)


@contextmanager
def foregrounds(place: Path) -> Generator[Foreground]:
    """Ends all that was begun."""
    found = Foreground(place)
    try:
        yield found
    finally:
        for process in found.running.values():
            process.send_signal(signal.SIGTERM)
        for process in found.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

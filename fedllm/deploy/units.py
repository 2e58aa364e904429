"""Units - a systemd unit that keeps a server's or a site's process running."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm.core.errors import ConfigError
from fedllm.deploy.kit import Kit

AGAIN = 30
"""Seconds after which a process that failed is started again."""


def write(kit: Kit, words: Sequence[str], file: Path) -> Path:
    """Write the unit that runs `fedllm WORDS` for a kit.

    Raises:
        ConfigError: the file exists.
    """
    if file.suffix != ".service":
        raise ConfigError(f"{file} is no name of a unit.", "It ends in .service.", f"{file}.service")
    if file.exists():
        raise ConfigError(f"{file} exists already.", action="Remove it, or choose another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(unit(kit, words), encoding="utf-8")
    return file


def unit(kit: Kit, words: Sequence[str]) -> str:
    """The text of the unit."""
    command = " ".join(quoted(word) for word in [*program(), *words])
    return f"""[Unit]
Description=fedllm: {kit.kind} {kit.name} of {kit.network}
Wants=network-online.target
After=network-online.target

[Service]
User={getpass.getuser()}
WorkingDirectory={quoted(str(kit.folder), bare=True)}
ExecStart={command}
Restart=on-failure
RestartSec={AGAIN}
KillMode=control-group
KillSignal=SIGTERM
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def program() -> list[str]:
    """How fedllm is called, with full paths: a unit has no PATH of a shell."""
    script = Path(sys.executable).parent / "fedllm"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "fedllm"]


def quoted(word: str, bare: bool = False) -> str:
    """A word as systemd reads it: '%' and '$' are doubled, and what has a blank stands in quotes."""
    found = word.replace("%", "%%")
    if bare:
        return found
    found = found.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{found}"' if any(c in found for c in " \t'\";") else found

"""Audit - `deploy audit verify`: whether logs are what was written, and say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.running import Json


def verify(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Logs, or NAME=FILE; the server's as server=FILE, or first.")
    ],
    anchor: Annotated[
        str | None, typer.Option(help="SEQ:HASH of one of its entries, kept elsewhere.", show_default=False)
    ] = None,
    some: Annotated[
        bool, typer.Option("--some", help="Logs of sites are missing: look at the clients of those that are here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Whether audit logs are what was written, and whether server and sites say the same. Leaves with 1 if not."""
    from fedllm.core.errors import ConfigError
    from fedllm.sites import audit

    logs = _logs(files)
    if anchor is not None and len(logs) > 1:
        raise ConfigError("--anchor is given with several logs.", "It is of one.", action="Verify that log alone.")
    verdicts = {name: audit.verify(file, anchor) for name, file in logs.items()}
    intact = all(one.intact for one in verdicts.values())
    unmatched = None
    if len(logs) > 1 and intact:
        unmatched = _unmatched(logs, some)
    if as_json:
        told = None if unmatched is None else [{"log": u.log, "line": u.entry.seq, "why": u.why} for u in unmatched]
        each = {name: {"file": str(logs[name]), **asdict(one)} for name, one in verdicts.items()}
        screen.emit({"intact": intact, "logs": each, "unmatched": told})
    else:
        _show_verdicts(logs, verdicts, unmatched)
    if not intact or unmatched:
        raise typer.Exit(1)


def _logs(files: list[str]) -> dict[str, Path]:
    """Name -> log, the server's first and named so."""
    from fedllm.core.errors import ConfigError

    found: dict[str, Path] = {}
    for text in files:
        name, equal, path = text.partition("=")
        file = Path(text if not equal or Path(text).exists() else path)
        name = name if equal and not Path(text).exists() else _log_name(file)
        if name in found:
            raise ConfigError(f"Two logs are named '{name}'.", action="Give other names: NAME=FILE.")
        found[name] = file
    if len(found) > 1 and "server" not in found:
        first = next(iter(found))
        found = {"server" if name == first else name: file for name, file in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: name != "server")}


def _log_name(file: Path) -> str:
    """Of the kit that a log lies in, or of its file."""
    kit = file.absolute().parent.parent
    if (kit / "startup" / "fed_server.json").is_file():
        return "server"
    return kit.name if (kit / "startup").is_dir() else file.stem


def _unmatched(logs: Mapping[str, Path], some: bool) -> list[Any]:
    from fedllm.sites import audit

    sites = {name: audit.read(file) for name, file in logs.items() if name != "server"}
    clients = {entry.client for entries in sites.values() for entry in entries if entry.client is not None}
    return audit.matched(audit.read(logs["server"]), sites, clients if some else None)


def _show_verdicts(logs: Mapping[str, Path], verdicts: Mapping[str, Any], unmatched: list[Any] | None) -> None:
    for name, one in verdicts.items():
        if one.intact:
            screen.say(f"{name}: {one.entries} entries, every line as it was written ({logs[name]})")
        else:
            screen.say(f"{name}: line {one.first_bad_line} is bad: {one.why} ({logs[name]})", "bold red")
            screen.say(f"  The {one.entries} lines before it are good.")
    if unmatched is None:
        return
    for one in unmatched:
        entry = one.entry
        what = f"{entry.action} of run {entry.run}, round {entry.round}, client {entry.client}"
        screen.say(f"{one.log}, line {entry.seq} ({what}): {one.why}", "bold red")
    if not unmatched:
        screen.say("Server and sites say the same: what one sent, the other received.")

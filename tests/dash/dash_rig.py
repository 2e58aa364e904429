"""Kits, logs and runs that are written by hand: no network library is needed, and names are as unfriendly as may be."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import RunError
from fedllm.dash.server import Dash
from fedllm.sites.audit import AuditLog, Digest, Note
from fedllm.sites.policy import PolicyRefused

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
"""What a page must show as it is."""
POLICY = {
    "coordinators": ["ada@hub.org"],
    "methods": ["fedavg"],
    "purposes": ["research"],
    "data_sets": ["notes"],
    "max_rounds": 20,
    "max_clients": 3,
    "hours": "always",
    "ops": ["work", "evaluate"],
    "parts": ["header", "update"],
    "max_egress_round": 5_000,
    "max_egress_run": 50_000,
}


def write(file: Path, value: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(value) if file.suffix == ".yaml" else json.dumps(value)
    file.write_text(text, encoding="utf-8")
    return file


def round_line(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "round", "round": number, "cohort": ["north", "south"], "loss": 2.0 / number, "used": 2,
        "failed": None, "lost": [], "rejected": [], "bytes_up": 1_000, "bytes_down": 500, "tokens": 10,
        "seconds": 0.5, "guard": None, "model": "federated", **changes,
    }  # fmt: skip


def run_folder(
    folder: Path, lines: list[dict[str, Any]], result: dict[str, Any] | None = None, rounds: int = 4
) -> Path:
    write(
        folder / "recipe.yaml",
        {"name": folder.name, "about": "A test.", "rounds": rounds, "method": {"name": "fedavg"}},
    )
    write(folder / "partition.json", {"clients": {n: {"name": n, "train": 9, "eval": 1} for n in ("north", "south")}})
    append(folder, lines)
    if result is not None:
        write(folder / "result.json", result)
    return folder


def append(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def result(rounds: int = 4, **changes: Any) -> dict[str, Any]:
    pooled = {"n": 2.0, "exact_match": 0.25, "loss": 1.5}
    row = {"model": "federated", "label": "Federated (fedavg)", "pooled": pooled, "summary": {"mean": 0.25}}
    return {
        "name": "first", "method": "fedavg", "rounds": rounds, "finished": True, "metric": "exact_match", "rows": [row],
        "clients": {"north": "North clinic", "south": "south"}, "bytes": {"up": 4_000, "down": 2_000}, "seconds": 2.0,
        "sentences": ["Together the 2 clients reach an exact match of 25.0 %."], "warnings": [], **changes,
    }  # fmt: skip


def kit(folder: Path, kind: str, name: str, port: int = 8002) -> Path:
    """What fedllm reads of a kit."""
    file = {"server": "fed_server.json", "site": "fed_client.json", "coordinator": "fed_admin.json"}[kind]
    server = {"name": "trio", "service": {"target": f"localhost:{port}"}, "admin_server": name}
    facts = {"servers": [server], "client": {"fqsn": name}}
    if kind == "coordinator":
        facts = {"admin": {"username": name, "project_name": "trio", "host": "localhost", "port": port}}
    write(folder / "startup" / file, facts)
    return folder


def site_kit(folder: Path, run: str = "first", rounds: int = 2, policy: dict[str, Any] | None = None) -> Path:
    """A site with one run that it let in, one upload that stayed there, and one run that it refused."""
    kit(folder, "site", "north")
    rules = write(folder / "local" / "policy.yaml", policy or POLICY)
    write(folder / "local" / "fedllm.json", {"policy": "local/policy.yaml"})
    signed = {
        "coordinator": "ada@hub.org", "purpose": "research", "method": "fedavg", "data_sets": ["notes"],
        "members": ["north", "south"], "rounds": rounds, "modes": {},
    }  # fmt: skip
    write(folder / "fedllm" / run / "manifest.json", {"manifest": signed})
    read = Digest.of(rules.read_bytes())
    notes = [Note("policy", run, payload=read), Note("policy", run, decision="allowed"), Note("start", run)]
    for number in range(1, rounds + 1):
        sent = Digest("ab" * 32, 1_000 + number)
        notes += [
            Note("receive", run, number, "north", Digest("cd" * 32, 400)),
            Note("request", run, number, "north", decision="allowed"),
            Note("send", run, number, "north", sent, "allowed"),
        ]
    much = PolicyRefused("With this upload of 9,000 bytes, 10,000 leave.", "policy.max_egress_round: at most 5,000.")
    notes += [
        Note("send", run, rounds, "north", Digest("ef" * 32, 9_000), "refused", much),
        Note("end", run),
        Note("policy", "second", payload=read),
        Note("policy", "second", decision="refused", reason=PolicyRefused(f"The purpose '{EVIL}' is not allowed.")),
    ]
    log(folder / "fedllm" / "audit.jsonl", "north", notes)
    return folder


def server_kit(folder: Path) -> Path:
    """A server with one run that went well and one that both sites refused."""
    kit(folder, "server", "hub.org")
    place = run_folder(folder / "fedllm" / "runs" / "first", [round_line(n) for n in (1, 2)], result(2), rounds=2)
    write(place / "sites.json", {"home": {"north": "north", "south": "south"}, "warnings": []})
    file = folder / "fedllm" / "audit.jsonl"
    notes = [Note("manifest", "first", payload=Digest("aa" * 32, 10), decision="allowed")]
    log(file, "hub.org", notes)
    for site in ("north", "south"):
        log(file, site, [Note("join", "first", decision="allowed")])
    moved = [Note("start", "first")]
    for number in (1, 2):
        for client in ("north", "south"):
            moved.append(Note("send", "first", number, client, Digest("bb" * 32, 250)))
            moved.append(Note("receive", "first", number, client, Digest("cc" * 32, 500)))
        moved.append(Note("checkpoint", "first", number))
    last = log(file, "hub.org", moved)
    write(place / "audit.json", {"last": last, "round": 2})
    log(file, "hub.org", [Note("end", "first"), Note("manifest", "second", decision="allowed")])
    no = PolicyRefused("The data set 'letters' is not allowed at this site.")
    log(file, "north", [Note("join", "second", decision="refused", reason=no)])
    log(file, "hub.org", [Note("end", "second", reason=RunError("north: The data set 'letters' is not allowed."))])
    return folder


def log(file: Path, actor: str, notes: list[Note]) -> str:
    """Write entries; gives the reference of the last."""
    with AuditLog(file) as found:
        for start in range(0, len(notes), 1_000):
            found.extend(actor, notes[start : start + 1_000])
        return str(found.last)


def words(value: Any) -> str:
    """All texts of a page, one to a line."""
    if isinstance(value, dict):
        return "\n".join(words(one) for one in value.values())
    if isinstance(value, list):
        return "\n".join(words(one) for one in value)
    return "" if value is None else str(value)


def tiles(page: dict[str, Any]) -> dict[str, str]:
    """The key figures: what it is -> the number."""
    return {what: number for number, what in page["tiles"]}


def section(page: dict[str, Any], title: str) -> str:
    """The texts of one section."""
    return words(next(one for one in page["sections"] if one["title"] == title))


def get(dash: Dash, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer; headers are given with _ for -."""
    place = http.client.HTTPConnection("127.0.0.1", dash.port, timeout=10)
    place.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = place.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    place.close()
    return found


def signed_in(dash: Dash) -> str:
    """The cookie after a login."""
    status, headers, _ = get(dash, f"/?token={dash.token}")
    assert status == 303, status
    return headers["set-cookie"].split(";")[0]

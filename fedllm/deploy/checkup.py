"""Checkup - what a site looks at before it starts: its rows, its policy, its device, the server it goes to."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fedllm.core.errors import FedLLMError, nearest
from fedllm.core.settings import read
from fedllm.deploy.kit import Kit
from fedllm.deploy.term import minute
from fedllm.engine.nvflare.ground import versions

LEAST, LITTLE = 200_000_000, 5_000_000_000
"""Bytes of free disk below which nothing works, and below which it is said."""
CONNECT = 5.0
"""Seconds in which the server has to answer."""
MUST = ("coordinators", "methods", "purposes", "data_sets", "max_rounds", "max_clients", "hours", "ops", "parts")
"""Rules of a policy without which no run is admitted."""
COLUMNS = 12
"""Names of columns that are shown at most."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: ok, note (good to know) or problem (nothing can be done with it).
        text: what was found.
        action: what to do about it.
    """

    name: str
    verdict: Literal["ok", "note", "problem"]
    text: str
    action: str = ""


def look(kit: Kit, facts: Mapping[str, Any], policy: Path | None) -> Iterator[Check]:
    """Everything, in the order in which a person would mend it.

    Args:
        kit: the site's.
        facts: what its `local/fedllm.json` will say; checked already.
        policy: its policy; None where it has none yet.
    """
    yield data(facts)
    yield from rules(kit, policy)
    yield from models(facts.get("models"))
    yield device(str(facts.get("device", "auto")))
    yield disk(kit.folder)
    yield clock(kit)
    yield libraries()
    yield server(kit)


def data(facts: Mapping[str, Any]) -> Check:
    """Whether the rows load, how many there are, and their columns."""
    from fedllm.data.federation import Federation
    from fedllm.recipe import load_recipe

    try:
        recipe = load_recipe({"data": dict(facts.get("data", {}))})
        found = Federation.build(recipe.data, recipe.seed)
        ids = list(found.client_ids)
        rows = {split: sum(found.size(client, split) for client in ids) for split in ("train", "eval")}
        columns = list(next((dict(row) for client in ids for row in found.rows(client)), {}))
    except FedLLMError as fault:
        return _problem("data", fault)
    names = facts.get("client") or (ids[0] if len(ids) == 1 else "")
    who = f"1 client, {names}" if len(ids) == 1 else f"{len(ids)} clients"
    shown = ", ".join(columns[:COLUMNS]) + (", ..." if len(columns) > COLUMNS else "")
    text = f"{rows['train']} training rows, {rows['eval']} held out; {who}; columns: {shown}"
    if facts.get("client") and len(ids) != 1:
        return Check("data", "problem", text, "Several clients keep their own names: leave --client out.")
    if not rows["eval"]:
        return Check("data", "note", text, "Nothing can be measured here without held-out rows.")
    return Check("data", "ok", text)


def rules(kit: Kit, file: Path | None) -> Iterator[Check]:
    """Whether the policy can be read, means this site, and names things that exist."""
    from fedllm.sites.policy import Policy

    if file is None:
        yield Check("policy", "problem", "the kit has none, so that nothing is allowed", "Write one: --policy FILE")
        return
    try:
        policy = Policy.of(file)
    except FedLLMError as fault:
        yield _problem("policy", fault)
        return
    if policy.site not in (None, kit.name):
        text = f"{file} is of the site '{policy.site}', and this kit of '{kit.name}'"
        yield Check("policy", "problem", text, f"Set site: {kit.name}, or take the policy of this site.")
        return
    for kind, word, choices in _unknown(policy):
        near = nearest(word, choices)
        yield Check("policy", "note", f"there is no {kind} '{word}'", f"Did you mean '{near}'?" if near else "")
    empty = [name for name in MUST if not getattr(policy, name)]
    if empty:
        text = f"{file} allows nothing yet: {', '.join(empty)} "
        yield Check("policy", "note", text + ("is empty" if len(empty) == 1 else "are empty"))
    else:
        yield Check("policy", "ok", f"{file} can be read; what it allows stands below")


def _unknown(policy: Any) -> Iterator[tuple[str, str, list[str]]]:
    """Names in a policy that nothing bears: they allow nothing, and were meant to."""
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    choices = sorted({*methods(), *protocols(), "*"})
    yield from (("method", word, choices) for word in policy.methods if word not in choices)


def models(named: Mapping[str, str] | None) -> Iterator[Check]:
    """Whether each model that jobs may ask for is on this machine."""
    from fedllm.models import load
    from fedllm.models.settings import ModelSettings

    if named is None:
        yield Check("models", "note", "a run may ask for any model of the hub; none in a folder", "Name them: --model")
        return
    for name, place in named.items():
        try:
            found = load.locate(read(ModelSettings, {"name": place}, "model"))
        except FedLLMError as fault:
            yield _problem(f"model {name}", fault)
            continue
        what = "made here" if found.toy else "on this machine" if found.local else "downloaded from the hub when needed"
        yield Check("models", "ok" if found.local else "note", f"{name}: {what}")


def device(name: str) -> Check:
    """Whether the device is there."""
    from fedllm.models import load
    from fedllm.models.settings import ModelSettings

    try:
        found = load.pick_device(read(ModelSettings, {"device": name}, "model"))
    except FedLLMError as fault:
        return _problem("device", fault)
    return Check("device", "ok", str(found) if name == str(found) else f"{name}, here {found}")


def disk(folder: Path) -> Check:
    """Room for replies and private stores."""
    from fedllm.report.words import bytes_text

    free = shutil.disk_usage(folder).free
    text = f"{bytes_text(free)} free at {folder}"
    if free < LEAST:
        return Check("disk", "problem", text, "Make room: replies and private state are kept there.")
    return Check("disk", "ok" if free >= LITTLE else "note", text)


def clock(kit: Kit, now: datetime | None = None) -> Check:
    """Whether it is a time at which the kit's certificate is good."""
    try:
        found = kit.term(now)
    except FedLLMError as fault:
        return _problem("clock", fault)
    text = f"{minute(found.now)}; the kit is good from {found.begin:%Y-%m-%d} to {minute(found.end)}"
    if found.state == "early":
        return Check("clock", "problem", text, "The clock of this machine is behind: set it.")
    if found.state == "over":
        return Check("clock", "problem", text, f"{kit.renewal} Or set the clock, if it is ahead.")
    if found.state == "soon":
        return Check("clock", "note", f"{text}, in {found.left}", kit.renewal)
    return Check("clock", "ok", text)


def libraries() -> Check:
    """What runs here; server and sites need the same fedllm."""
    found = {name: value for name, value in versions().items() if name != "protocol"}
    missing = [name for name, value in found.items() if value is None]
    text = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    if missing:
        return Check("versions", "problem", f"{text}; missing: {', '.join(missing)}", "Install fedllm again.")
    return Check("versions", "ok", text)


def server(kit: Kit) -> Check:
    """Whether the network's server is behind its host and port; both ends show their certificates."""
    try:
        with socket.create_connection((kit.host, kit.port), CONNECT) as plain:
            plain.settimeout(CONNECT)
            with kit.tls().wrap_socket(plain, server_hostname=kit.host) as secure:
                return Check(
                    "server", "ok", f"{kit.address} answers with a certificate of {kit.network} ({secure.version()})"
                )
    except ssl.SSLCertVerificationError as fault:
        text = f"{kit.address} answers with a certificate that is not of this network: {fault.verify_message}"
        return Check("server", "problem", text, "Ask the coordinator: another server stands there, or the kit is old.")
    except (ssl.SSLError, ConnectionResetError) as fault:
        text = f"something at {kit.address} answers that is not the server: {_first(fault)}"
        return Check("server", "problem", text, "Ask the server's operator what listens there.")
    except OSError as fault:
        text = f"{kit.address} does not answer: {_first(fault)}"
        action = "Is the server started, does its name resolve here, and does the firewall let this port out?"
        return Check("server", "problem", text, action)


def _first(fault: OSError) -> str:
    return str(fault.strerror or fault).rstrip(".") or type(fault).__name__


def _problem(name: str, fault: FedLLMError) -> Check:
    near = f" Did you mean '{fault.nearest}'?" if fault.nearest else ""
    return Check(name, "problem", f"{fault.given} {fault.allowed}{near}".strip(), fault.action)

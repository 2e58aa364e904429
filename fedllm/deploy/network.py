"""Network - who takes part, as a file says it, and the folder in which their kits are made.

The folder holds `kits/NAME`, one for each participant, `authority` with the certificate authority, and `network.json`,
what was provisioned last. A kit that is there is never written again: provisioning once more adds what is missing, with
certificates of the same authority, so that those handed out before stay good. A participant that keeps its own key
(`key: own`) has no kit here: see :mod:`fedllm.deploy.authority`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedllm.core.errors import ConfigError
from fedllm.core.settings import read, unknown
from fedllm.engine import durable
from fedllm.engine.nvflare import kits
from fedllm.sites.policy import UniqueKeys

KITS = "kits"
"""Folder of the kits."""
AUTHORITY = "authority"
"""Folder of the certificate authority: its key and copies of all participants' keys."""
LAST = "network.json"
"""What was provisioned last."""
Role = Literal["project_admin", "org_admin", "lead", "member"]
Key = Literal["made", "own"]
ORGANISATION, SITE = r"[A-Za-z0-9_]{1,63}", r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
"""Names of organisations; names of sites and networks."""
HOST = r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}"
"""Host names of servers."""
Organisation = Annotated[str, Field(pattern=f"^{ORGANISATION}$")]
Name = Annotated[str, Field(pattern=f"^{SITE}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerPart(_Part):
    """The server."""

    host: str = Field(pattern=f"^{HOST}$")
    """Host name under which sites and coordinators reach it; its certificate bears it."""
    port: int = Field(8002, ge=1, le=65535)
    """Its only port, for sites and coordinators."""
    organisation: Organisation
    """Whose it is: letters, digits and '_'."""


class CoordinatorPart(_Part):
    """A person who looks at runs, or starts them."""

    organisation: Organisation
    """Where the person works: letters, digits and '_'."""
    role: Role = "lead"
    """project_admin: everything. lead: starts runs, and stops and fetches its own. org_admin: stops and fetches runs of
    its organisation. member: looks."""
    key: Key = "made"
    """made: the private key is made with the kit. own: the person makes it, and it never leaves that machine."""


class SitePart(_Part):
    """A place that holds data."""

    organisation: Organisation
    """Whose it is: letters, digits and '_'."""
    key: Key = "made"
    """made: the private key is made with the kit. own: the site makes it, and it never leaves the site."""


class NetworkFile(_Part):
    """The file `sites.yaml`."""

    name: Name
    """The network's name: letters, digits, '_' and '-'."""
    server: ServerPart
    """Where the server is."""
    coordinators: dict[str, CoordinatorPart] = Field(min_length=1)
    """E-mail address -> who that is; policies of sites name coordinators by it."""
    sites: dict[str, SitePart] = Field(min_length=1)
    """Site -> whose it is."""

    @field_validator("coordinators", "sites")
    @classmethod
    def _names(cls, values: dict[str, Any], info: Any) -> dict[str, Any]:
        for name in values:
            if info.field_name == "coordinators" and not is_address(name):
                raise ConfigError(
                    f"The coordinator '{name}' is no e-mail address.", "Certificates of people bear one: name@host."
                )
            if info.field_name == "sites" and not is_site(name):
                raise ConfigError(f"The site '{name}' has no usable name.", "Allowed: letters, digits, '_' and '-'.")
        return values

    @classmethod
    def of(cls, path: str | Path) -> NetworkFile:
        """From a YAML file.

        Raises:
            ConfigError: no such file, not YAML, a key that stands twice, an unknown key (with the nearest), or a value
                that cannot be used.
        """
        return cls.from_values(_yaml(Path(path)))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> NetworkFile:
        """From plain values; see :meth:`of`."""
        kinds: dict[str, type[_Part]] = {"coordinators": CoordinatorPart, "sites": SitePart}
        for section, kind in kinds.items():
            group = values.get(section)
            for name, one in group.items() if isinstance(group, Mapping) else ():
                unknown(kind, one, f"{section}.{name}")
        try:
            found = read(cls, values)
        except ConfigError as fault:
            action = "Correct the file." if "fedllm explain" in fault.action else fault.action
            raise ConfigError(fault.given, fault.allowed, fault.nearest, action) from None
        if found.server.host in found.sites:
            raise ConfigError(f"'{found.server.host}' is both the server's host and a site.", "Names differ.")
        return found

    def participants(self) -> dict[str, dict[str, str]]:
        """Name -> kind, organisation, role (coordinators alone), and whose its key is: made or own."""
        server = {self.server.host: {"kind": "server", "organisation": self.server.organisation, "key": "made"}}
        sites = {
            name: {"kind": "site", "organisation": one.organisation, "key": str(one.key)}
            for name, one in self.sites.items()
        }
        people = {
            name: {"kind": "coordinator", "organisation": one.organisation, "role": str(one.role), "key": str(one.key)}
            for name, one in self.coordinators.items()
        }
        return {**server, **people, **sites}

    def with_site(self, name: str, organisation: str, key: Key = "made") -> NetworkFile:
        """With one site more; raises :class:`ConfigError` where it is there already."""
        if name in self.sites:
            raise ConfigError(f"The network has a site '{name}' already.", "Names differ.")
        values = self.model_dump(mode="json")
        values["sites"][name] = {"organisation": organisation, "key": key}
        return NetworkFile.from_values(values)

    def to_network(self) -> kits.Network:
        """Those whose keys are made, as :mod:`fedllm.engine.nvflare.kits` takes them."""
        made = {name: facts for name, facts in self.participants().items() if facts["key"] == "made"}
        people = {n: (f["organisation"], f["role"]) for n, f in made.items() if f["kind"] == "coordinator"}
        sites = {n: f["organisation"] for n, f in made.items() if f["kind"] == "site"}
        return kits.Network(self.name, self.server.host, self.server.port, sites, people, self.server.organisation)


@dataclass(frozen=True)
class Provisioned:
    """What provisioning did.

    Attributes:
        made: participant -> its new kit.
        kept: participant -> its kit, which was there before.
        left_out: participants that are not in the file any more.
        own: participants that keep their own keys.
    """

    made: dict[str, Path]
    kept: dict[str, Path]
    left_out: list[str]
    own: list[str]


def provision(network: NetworkFile, folder: Path) -> Provisioned:
    """Make the kits that are missing in `folder`.

    Raises:
        ConfigError: a participant's certificate, or the server's address, would have to be another one than before.
        MissingExtra: FLARE is not installed.
    """
    before = last(folder)
    if before is not None:
        _agree(before, network, folder)
    wanted = network.participants()
    places = {name: folder / KITS / name for name, facts in wanted.items() if facts["key"] == "made"}
    kept = {name: place for name, place in places.items() if place.exists()}
    made = {name: place for name, place in places.items() if name not in kept}
    for part in (folder, folder / KITS, folder / AUTHORITY):
        durable.own(part)
    if made:
        _make(network, folder, made)
    durable.write(folder / LAST, (json.dumps(network.model_dump(mode="json"), indent=1) + "\n").encode())
    known = before.participants() if before is not None else {}
    return Provisioned(made, kept, sorted(set(known) - set(wanted)), [name for name in wanted if name not in places])


def last(folder: Path) -> NetworkFile | None:
    """What was provisioned in `folder` last; None: nothing. Raises :class:`ConfigError` where it cannot be read."""
    file = folder / LAST
    if not file.is_file():
        return None
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as fault:
        raise ConfigError(
            f"{file} cannot be read: {type(fault).__name__}.",
            "It says what was provisioned last.",
            action="Restore it from a copy.",
        ) from None
    return NetworkFile.from_values(values)


def _make(network: NetworkFile, folder: Path, made: Mapping[str, Path]) -> None:
    """Have FLARE make all kits with the authority that is there, and keep those that are new."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        fresh = kits.provision(network.to_network(), folder / AUTHORITY, {})
    for name, place in made.items():
        shutil.move(fresh[name], place)
        durable.own(place)
    stage = next(iter(fresh.values())).parent
    shutil.rmtree(stage)
    for current, _, files in os.walk(folder / AUTHORITY):
        for file in files:
            (Path(current) / file).chmod(durable.OWN)
    server = made.get(network.server.host)
    if server is not None:
        kits.harden(server, {})  # its storage lies where the kit lies now


def _agree(before: NetworkFile, now: NetworkFile, folder: Path) -> None:
    """Raise :class:`ConfigError` where certificates and addresses that were handed out would be wrong."""
    action = f"Put it back to what {folder / LAST} says, or make a new network in another folder."
    for what, old, new in (
        ("name", before.name, now.name),
        ("server.host", before.server.host, now.server.host),
        ("server.port", before.server.port, now.server.port),
    ):
        if old != new:
            raise ConfigError(
                f"{what} was {old} and is {new}.", "The kits handed out before say the former.", None, action
            )
    known = before.participants()
    for name, facts in now.participants().items():
        for key, new in facts.items():
            old = known.get(name, facts).get(key)
            if key == "key" and old != new:
                raise ConfigError(
                    f"The key of '{name}' was {old} and is {new}.",
                    "A certificate for the former is good until it ends.",
                    action=f"Put it back, or give the participant another name and revoke '{name}'.",
                )
            if old != new:
                raise ConfigError(
                    f"The {key} of '{name}' was {old} and is {new}.", "Its certificate says the former.", None, action
                )


def is_address(text: str) -> bool:
    """Whether it can be the name of a coordinator: an e-mail address."""
    user, at, host = text.partition("@")
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")
    return bool(user and at and "." in host) and set(user + host) <= allowed and user[0].isalnum() and len(text) < 65


def is_site(text: str) -> bool:
    """Whether it can be the name of a site."""
    return re.fullmatch(SITE, text) is not None


def is_organisation(text: str) -> bool:
    """Whether it can be the name of an organisation."""
    return re.fullmatch(ORGANISATION, text) is not None


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except OSError as fault:
        raise ConfigError(
            f"{path} cannot be read: {fault.strerror or fault}.", action="Name the file that says who takes part."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        line = getattr(getattr(fault, "problem_mark", None), "line", None)
        place = f" (line {line + 1})" if line is not None else ""
        raise ConfigError(
            f"{path} cannot be read{place}: {getattr(fault, 'problem', None) or fault}.", "It is YAML."
        ) from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds no mapping.", "It has name, server, coordinators and sites.")
    return values

"""Kit - the folder of one participant: who it is for, which server it goes to, how long its certificate is good."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError
from fedllm.deploy.term import Term, minute
from fedllm.engine.nvflare import kits
from fedllm.engine.nvflare.facts import NAME

POLICY = "local/policy.yaml"
"""A site's policy, in its kit."""
AUDIT = "fedllm/audit.jsonl"
"""The audit log of a server or a site, in its kit."""
KINDS = {"fed_server.json": "server", "fed_client.json": "site", "fed_admin.json": "coordinator"}
"""FLARE's file in the folder `startup` -> whose kit it is."""


def is_kit(folder: Path) -> bool:
    """Whether a folder is the kit of somebody."""
    return any((folder / "startup" / name).is_file() for name in KINDS)


@dataclass(frozen=True)
class Kit:
    """A kit.

    Attributes:
        folder: absolute.
        kind: server, site or coordinator.
        name: as its certificate says.
        network: the network's name.
        host: the server's.
        port: the server's.
    """

    folder: Path
    kind: str
    name: str
    network: str
    host: str
    port: int

    @classmethod
    def of(cls, path: Path, kind: str | None = None) -> Kit:
        """The kit in a folder.

        Args:
            path: the folder.
            kind: what it has to be; None: anything.

        Raises:
            ConfigError: there is none, it is not whole, or another kind's.
        """
        folder = path.resolve()
        found = next((name for name in KINDS if (folder / "startup" / name).is_file()), None)
        if found is None:
            inside = (
                sorted(one.name for one in folder.iterdir() if (one / "startup").is_dir()) if folder.is_dir() else []
            )
            waits = (folder / "startup" / "client.key").is_file()
            raise ConfigError(
                f"{path} holds a key and no certificate yet." if waits else f"{path} is no kit.",
                f"Kits in it: {', '.join(inside)}." if inside else "A kit is a folder with a folder 'startup'.",
                action=f"When it has come: fedllm deploy install PACKAGE --folder {path}"
                if waits
                else "Name the folder that 'fedllm deploy provision' made for this participant.",
            )
        if kind is not None and KINDS[found] != kind:
            raise ConfigError(f"{path} is the kit of a {KINDS[found]}.", f"Needed: that of a {kind}.")
        try:
            facts = json.loads((folder / "startup" / found).read_text(encoding="utf-8"))
            return cls(folder, KINDS[found], *_read(KINDS[found], facts))
        except (ValueError, LookupError, TypeError) as fault:
            raise ConfigError(f"{path}/startup/{found} cannot be read: {fault}.", action="Get the kit again.") from None

    @property
    def address(self) -> str:
        """Of the server."""
        return f"{self.host}:{self.port}"

    @property
    def certificate(self) -> Path:
        """This participant's."""
        return self.folder / "startup" / ("server.crt" if self.kind == "server" else "client.crt")

    @property
    def key(self) -> Path:
        """This participant's private key."""
        return self.certificate.with_suffix(".key")

    def term(self, now: datetime | None = None) -> Term:
        """When the certificate is good, and how a time (None: the present) stands to that.

        Raises:
            ConfigError: it cannot be read.
            MissingExtra: no library for certificates.
        """
        from fedllm.deploy import certificates

        try:
            pem = self.certificate.read_bytes()
        except OSError as fault:
            raise ConfigError(f"{self.certificate} cannot be read: {fault}.", action="Get the kit again.") from None
        return certificates.term(certificates.certificate(pem, str(self.certificate)), now)

    @property
    def renewal(self) -> str:
        """What to do for a new certificate."""
        request = self.folder / f"{self.name}.csr"
        if request.is_file():  # its key was made here
            return f"Send {request} to whoever provisioned once more, for a new certificate."
        return f"Ask whoever provisioned for a new certificate: fedllm deploy renew {self.name}"

    def in_time(self, now: datetime | None = None) -> str | None:
        """What to say of a certificate that ends within 30 days; None where it is good for longer.

        Raises:
            ConfigError: it has ended, or is not good yet by this machine's clock.
        """
        found = self.term(now)
        if found.state == "early":
            raise ConfigError(
                f"The certificate of {self.name} begins at {minute(found.begin)}, and here it is {minute(found.now)}.",
                action="The clock of this machine is behind: set it.",
            )
        if found.state == "over":
            raise ConfigError(
                f"The certificate of {self.name} ended at {minute(found.end)}, and here it is {minute(found.now)}.",
                "If that is not the time, set the clock.",
                action=self.renewal,
            )
        if found.state == "soon":
            return f"The certificate of {self.name} ends in {found.left}, at {minute(found.end)}. {self.renewal}"
        return None

    def tls(self) -> ssl.SSLContext:
        """As FLARE connects: the server's certificate is of this network's authority, and ours is shown."""
        startup = self.folder / "startup"
        found = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        found.check_hostname = False
        found.load_cert_chain(str(self.certificate), str(self.key))
        return found

    def facts(self) -> dict[str, Any]:
        """What `local/fedllm.json` says; raises :class:`ConfigError` where it is not JSON."""
        file = self.folder / "local" / NAME
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
        except (OSError, ValueError, TypeError) as fault:
            raise ConfigError(
                f"{file} cannot be read: {fault}.", "It is a mapping in JSON.", action="Correct it."
            ) from None

    def settle(self, facts: Mapping[str, Any]) -> None:
        """Write `local/fedllm.json` and the policies, whose storage lies where the kit lies now: kits travel."""
        kits.harden(self.folder, facts)


def _read(kind: str, facts: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """Name, network, host, port."""
    if kind == "coordinator":
        admin = facts["admin"]
        return admin["username"], admin["project_name"], admin["host"], int(admin["port"])
    server = facts["servers"][0]
    host, _, port = server["service"]["target"].rpartition(":")
    name = server["admin_server"] if kind == "server" else facts["client"]["fqsn"]
    return name, server["name"], host, int(port)

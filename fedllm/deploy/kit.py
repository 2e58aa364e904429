"""Kit - the folder of one participant: who it is for, which server it goes to, how long its certificate is good."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, MissingExtra
from fedllm.engine import durable
from fedllm.engine.nvflare import kits
from fedllm.engine.nvflare.facts import NAME

POLICY = "local/policy.yaml"
"""A site's policy, in its kit."""
AUDIT = "fedllm/audit.jsonl"
"""The audit log of a server or a site, in its kit."""
KINDS = {"fed_server.json": "server", "fed_client.json": "site", "fed_admin.json": "coordinator"}
"""FLARE's file in the folder `startup` -> whose kit it is."""


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
            raise ConfigError(
                f"{path} is no kit.",
                f"Kits in it: {', '.join(inside)}." if inside else "A kit is a folder with a folder 'startup'.",
                action="Name the folder that 'fedllm deploy provision' made for this participant.",
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

    def validity(self) -> tuple[datetime, datetime]:
        """From when to when the certificate is good, UTC.

        Raises:
            ConfigError: it cannot be read.
            MissingExtra: no library for certificates.
        """
        try:
            from cryptography import x509
        except ImportError:
            raise MissingExtra("cryptography", "nvflare", "Reading a kit's certificate") from None
        try:
            found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        except (OSError, ValueError) as fault:
            raise ConfigError(f"{self.certificate} cannot be read: {fault}.", action="Get the kit again.") from None
        return found.not_valid_before_utc, found.not_valid_after_utc

    def tls(self) -> ssl.SSLContext:
        """As FLARE connects: the server's certificate is of this network's authority, and ours is shown."""
        startup = self.folder / "startup"
        found = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        found.check_hostname = False
        found.load_cert_chain(str(self.certificate), str(self.certificate.with_suffix(".key")))
        return found

    def facts(self) -> dict[str, Any]:
        """What `local/fedllm.json` says; raises :class:`ConfigError` where it is not JSON."""
        file = self.folder / "local" / NAME
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as fault:
            raise ConfigError(f"{file} is not valid JSON: {fault}.", action="Correct it.") from None
        return dict(found)

    def settle(self, facts: Mapping[str, Any]) -> None:
        """Write `local/fedllm.json` and the policies, whose storage lies where the kit lies now: kits travel."""
        if facts != self.facts():
            durable.write(self.folder / "local" / NAME, (json.dumps(dict(facts), indent=1) + "\n").encode())
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

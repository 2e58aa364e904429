"""Package - a certificate on its way to who holds its key: facts in one signed file, no key, no script, no archive.

Everything else in a kit is made where it is used, from the FLARE that is installed there; so there is nothing in a
package that could be run, and no path in it that could lead elsewhere. The authority signs the whole, with its
certificate inside: whoever installs compares that certificate's fingerprint over another channel.
"""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedllm.core.errors import ConfigError, DecodeError
from fedllm.core.settings import read
from fedllm.deploy import certificates
from fedllm.deploy.kit import Kit, is_kit
from fedllm.deploy.network import HOST, Name, Organisation, Role, is_address, is_site
from fedllm.deploy.request import KEY
from fedllm.deploy.term import minute
from fedllm.engine import durable
from fedllm.engine.nvflare import kits
from fedllm.sites.canonical import canonical, parsed

SIZE_LIMIT = 64_000
"""Bytes of a package at most."""
ROOT = "startup/rootCA.pem"
"""The authority's certificate, in a kit."""
AGAIN = "Ask whoever provisioned for it again."
_CONTEXT = b"fedllm package\n"


class Facts(BaseModel):
    """What a package says."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: Literal[1] = 1
    """Of this form."""
    network: Name
    """The network's name."""
    host: str = Field(pattern=f"^{HOST}$")
    """The server's."""
    port: int = Field(ge=1, le=65535)
    """The server's."""
    kind: Literal["server", "site", "coordinator"]
    """What the participant is."""
    name: str = Field(min_length=1, max_length=64)
    """Whose certificate it is."""
    organisation: Organisation
    """The participant's."""
    role: Role | None = None
    """A coordinator's; null: no coordinator."""
    certificate: str
    """The participant's, in PEM."""
    authority: str
    """The authority's certificate, in PEM."""


@dataclass(frozen=True)
class Package:
    """A package: what it says, and the authority's signature of that.

    Attributes:
        facts: what it says.
        signature: RSA-PSS over the canonical form of the facts.
    """

    facts: Facts
    signature: bytes

    @classmethod
    def signed(cls, facts: Facts, key: bytes) -> Package:
        """Facts signed with the authority's private key, in PEM."""
        signer = certificates.private(key, "the authority's key")
        return cls(facts, certificates.signature(signer, _message(facts)))

    def write(self, file: Path) -> Path:
        """Write it, for whoever holds the key; nothing in it is secret."""
        told = {"package": self.facts.model_dump(mode="json"), "signature": base64.b64encode(self.signature).decode()}
        durable.write(file, canonical(told) + b"\n")
        return file

    @classmethod
    def of(cls, file: Path) -> Package:
        """Read a package, and check all that it says against itself.

        Raises:
            ConfigError: it cannot be read, was changed, or its certificate is not what it says.
        """
        try:
            with file.open("rb") as handle:
                data = handle.read(SIZE_LIMIT + 1)
        except OSError as fault:
            raise ConfigError(f"{file} cannot be read: {fault.strerror}.", action="Name a package's file.") from None
        if len(data) > SIZE_LIMIT:
            raise ConfigError(f"{file} is too long for a package.", f"Allowed: {SIZE_LIMIT:,} bytes.", action=AGAIN)
        try:
            told = parsed(data)
            facts, mark = told["package"], base64.b64decode(told["signature"], validate=True)
            strange = set(told) - {"package", "signature"}
        except (DecodeError, LookupError, TypeError, ValueError):
            raise ConfigError(f"{file} is no package.", "It is what 'fedllm deploy sign' wrote.", None, AGAIN) from None
        if strange:
            raise ConfigError(f"{file} holds '{min(strange)}' as well.", "A package has two parts.", None, AGAIN)
        try:
            found = cls(read(Facts, facts, "package"), mark)
        except ConfigError as fault:
            raise ConfigError(fault.given, fault.allowed, None, AGAIN) from None
        found._sound()
        return found

    @property
    def authority(self) -> certificates.Certificate:
        """The authority's certificate."""
        return certificates.certificate(self.facts.authority.encode(), "the authority in the package")

    @property
    def certificate(self) -> certificates.Certificate:
        """The participant's certificate."""
        return certificates.certificate(self.facts.certificate.encode(), "the certificate in the package")

    @property
    def fingerprint(self) -> str:
        """Of the authority's certificate; to be compared over another channel."""
        return certificates.fingerprint(self.authority)

    def _sound(self) -> None:
        """Raise :class:`ConfigError` where the parts do not fit together."""
        facts, root, own = self.facts, self.authority, self.certificate
        what = f"the certificate of '{facts.name}'"
        if not certificates.signed_by(certificates.public(root, "the authority"), _message(facts), self.signature):
            raise ConfigError("The package was changed after it was signed.", action=AGAIN)
        if not certificates.issued_by(root, root):
            raise ConfigError("The authority in the package has not signed itself.", action=AGAIN)
        if not certificates.issued_by(own, root):
            raise ConfigError("The authority in the package has not signed its certificate.", action=AGAIN)
        certificates.public(own, what)
        said = {"name": facts.name, "organisation": facts.organisation, "role": facts.role}
        if certificates.subject(own.subject, what) != {key: value for key, value in said.items() if value is not None}:
            raise ConfigError(
                f"The package is for '{facts.name}' of {facts.organisation}, and its certificate says another.",
                action=AGAIN,
            )
        fits = {
            "server": facts.name == facts.host,
            "site": is_site(facts.name) and facts.name != facts.host,
            "coordinator": is_address(facts.name),
        }
        if not fits[facts.kind] or (facts.role is not None) != (facts.kind == "coordinator"):
            raise ConfigError(f"'{facts.name}' cannot be the name of a {facts.kind}.", action=AGAIN)

    def fits(self, folder: Path, now: datetime | None = None) -> None:
        """Check that the package is for the key in `folder`, and for the kit, where one is there.

        Raises:
            ConfigError: it is for another key, kit or network, older than what is there, or not good at this time.
        """
        facts = self.facts
        file = folder / (KEY if facts.kind != "server" else "startup/server.key")
        if not file.is_file():
            raise ConfigError(
                f"{folder} holds no private key.",
                "A package has none: it is for the folder in which the key was made.",
                action=f"Name that folder, or begin: fedllm deploy request {facts.name} --organisation "
                f"{facts.organisation} --folder {folder}",
            )
        mine = certificates.private(file.read_bytes(), str(file)).public_key()
        if certificates.fingerprint(mine) != certificates.fingerprint(certificates.public(self.certificate, "it")):
            raise ConfigError(
                f"The certificate of '{facts.name}' is not for the key in {folder}.",
                action="Name the folder of its key.",
            )
        term = certificates.term(self.certificate, now)
        if term.state == "early":
            raise ConfigError(
                f"The certificate begins at {minute(term.begin)}, and here it is {minute(term.now)}.",
                action="The clock of this machine is behind: set it.",
            )
        if term.state == "over":
            raise ConfigError(
                f"The certificate ended at {minute(term.end)}, and here it is {minute(term.now)}.",
                "If that is not the time, set the clock.",
                action="Ask whoever provisioned for a new one.",
            )
        if is_kit(folder):
            self._renews(Kit.of(folder))
        elif facts.kind == "server":
            raise ConfigError(f"{folder} is no kit of a server.", "A server's package renews its certificate alone.")

    def _renews(self, kit: Kit) -> None:
        """Raise :class:`ConfigError` where the package is not one for this kit, or no newer than what it has."""
        facts = self.facts
        pairs = {
            "kind": (kit.kind, facts.kind),
            "name": (kit.name, facts.name),
            "network": (kit.network, facts.network),
            "server": (kit.address, f"{facts.host}:{facts.port}"),
            "authority": (root_of(kit), self.fingerprint),
        }
        for what, (old, new) in pairs.items():
            if old != new:
                raise ConfigError(
                    f"The {what} of {kit.folder} is {old}, and that of the package {new}.",
                    "A package renews the certificate of a kit, and changes nothing else.",
                    action="Take the package for this kit.",
                )
        end = kit.term().end
        if self.certificate.not_valid_after_utc < end:
            raise ConfigError(
                f"The package is older than the kit, whose certificate is good until {minute(end)}.",
                action="Take the newest package.",
            )

    def install(self, folder: Path) -> Kit:
        """Put the certificate to its key, and make the kit around it where there is none; see :meth:`fits`."""
        new, own = not is_kit(folder), "server" if self.facts.kind == "server" else "client"
        if new:
            durable.write(folder / ROOT, certificates.pem(self.authority))
        durable.write(folder / "startup" / f"{own}.crt", certificates.pem(self.certificate))
        if new:
            self._furnish(folder)
        return Kit.of(folder)

    def _furnish(self, folder: Path) -> None:
        """Make the files of a kit, from the templates of the FLARE that is installed here."""
        facts = self.facts
        sites = {facts.name: facts.organisation} if facts.kind == "site" else {}
        people = {facts.name: (facts.organisation, str(facts.role))} if facts.kind == "coordinator" else {}
        network = kits.Network(facts.network, facts.host, facts.port, sites, people)
        told = io.StringIO()
        with (
            tempfile.TemporaryDirectory(prefix=".kit-", dir=folder) as stage,
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
        ):
            made = kits.startup(network, Path(stage))[facts.name]
            if facts.kind == "site":
                kits.harden(made, {})
            found = sorted(made.rglob("*"), key=lambda one: one.name.startswith("fed_"))  # last, what makes it a kit
            for one in found:
                place = folder / one.relative_to(made)
                (place if one.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
                if one.is_file():
                    shutil.move(one, place)


def root_of(kit: Kit) -> str:
    """The fingerprint of the authority of a kit."""
    file = kit.folder / ROOT
    try:
        return certificates.fingerprint(certificates.certificate(file.read_bytes(), str(file)))
    except OSError as fault:
        raise ConfigError(f"{file} cannot be read: {fault.strerror}.", action="Get the kit again.") from None


def _message(facts: Facts) -> bytes:
    told: dict[str, Any] = facts.model_dump(mode="json")
    return _CONTEXT + canonical(told)

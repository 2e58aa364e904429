"""Authority - who provisioned a network: signs requests of participants with keys of their own, renews certificates.

FLARE keeps the authority's key, and the keys and certificates that it made, in the folder `authority`; beside them lies
`own.json`, the certificates that were given for keys of others. Packages for participants land in `packages`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.core.errors import ConfigError
from fedllm.deploy import certificates
from fedllm.deploy.network import AUTHORITY, NetworkFile, last
from fedllm.deploy.package import Facts, Package
from fedllm.deploy.request import Request
from fedllm.deploy.term import Term
from fedllm.engine import durable
from fedllm.engine.nvflare import kits

PACKAGES = "packages"
"""Folder of what participants install."""
OWN = "own.json"
"""Certificates given for keys of others, in the authority's folder."""


@dataclass(frozen=True)
class Authority:
    """The authority of a network.

    Attributes:
        folder: the network's.
        network: as it was provisioned last.
    """

    folder: Path
    network: NetworkFile

    @classmethod
    def of(cls, folder: Path) -> Authority:
        """That of the network in `folder`; raises :class:`ConfigError` where there is none."""
        network = last(folder)
        if network is None:
            raise ConfigError(
                f"{folder} holds no network.",
                action="Name its folder with --folder, or begin with: fedllm deploy provision sites.yaml",
            )
        return cls(folder, network)

    @property
    def fingerprint(self) -> str:
        """Of its certificate; participants compare it over another channel."""
        return certificates.fingerprint(certificates.certificate(self._root().certificate, "the authority"))

    def issued(self) -> dict[str, certificates.Certificate]:
        """Participant -> its newest certificate."""
        own, kept = self._own(), self._participants("own")
        found = {**own, **self._root().issued, **{name: pem for name, pem in own.items() if name in kept}}
        return {name: certificates.certificate(pem, f"the certificate of '{name}'") for name, pem in found.items()}

    def terms(self) -> dict[str, Term]:
        """Participant of the network -> when its newest certificate is good; the authority's own as `authority`."""
        known = self.issued()
        root = certificates.certificate(self._root().certificate, "the authority")
        found = {name: certificates.term(known[name]) for name in self.network.participants() if name in known}
        return {**found, "authority": certificates.term(root)}

    def waiting(self) -> list[str]:
        """Participants that keep their own keys and have no certificate yet."""
        known = self._own()
        return [name for name in self._participants("own") if name not in known]

    def known(self, request: Request) -> bool:
        """Whether the participant has a certificate for the same key already: there is nothing to compare."""
        before = self._own().get(request.name)
        if before is None:
            return False
        key = certificates.public(certificates.certificate(before, "it"), "it")
        return certificates.fingerprint(key) == request.fingerprint

    def check(self, request: Request, replace: bool = False) -> None:
        """Raise :class:`ConfigError` where a request is not to be signed.

        Args:
            request: read, and so checked in itself.
            replace: whether the participant may come with another key than before.
        """
        name, who = request.name, self.network.participants()
        own = self._participants("own")
        if name == self.network.server.host:
            raise ConfigError(f"'{name}' is the server.", "Its key is made with its kit; nobody asks for it.")
        if name not in who:
            raise ConfigError.unknown(
                "participant", name, own, "Add it to sites.yaml with 'key: own', and provision again."
            )
        if name not in own:
            raise ConfigError(
                f"The key of '{name}' was made with its kit.", f"With keys of their own: {', '.join(own) or 'nobody'}."
            )
        if request.organisation != own[name]["organisation"]:
            raise ConfigError(
                f"The request of '{name}' is of the organisation '{request.organisation}'.",
                f"In sites.yaml it is '{own[name]['organisation']}'.",
                action="Ask who sent it, or correct the file.",
            )
        for other, certificate in self.issued().items():
            held = certificates.fingerprint(certificates.public(certificate, f"the certificate of '{other}'"))
            if other != name and held == request.fingerprint:
                raise ConfigError(f"The request of '{name}' is for the key of '{other}'.", "Each has its own.")
            if other == name and held != request.fingerprint and not replace:
                raise ConfigError(
                    f"'{name}' has a certificate for another key, {held}.",
                    f"The request's: {request.fingerprint}.",
                    action="Ask why; where the old key is lost, --replace signs the new one.",
                )

    def sign(self, request: Request, replace: bool = False) -> Path:
        """Sign a request, and write the package; see :meth:`check`."""
        self.check(request, replace)
        file, pem = self._package(request.name, request.key)
        self._keep(request.name, pem)
        return file

    def renewable(self, names: Sequence[str]) -> list[str]:
        """`names`, each once; raises :class:`ConfigError` for one whose key was not made here."""
        made, own = self._participants("made"), self._participants("own")
        for name in names:
            if name in own:
                raise ConfigError(
                    f"'{name}' keeps its own key.",
                    action=f"Have it send its request once more (fedllm deploy request {name} ...), and sign that.",
                )
            if name not in made or name not in self._root().issued:
                raise ConfigError.unknown("participant", name, made)
        return list(dict.fromkeys(names))

    def renew(self, name: str) -> Path:
        """Give one of :meth:`renewable` a new certificate for the same key, and write the package.

        Raises:
            ConfigError: the authority's own certificate has ended.
        """
        certificate = certificates.certificate(self._root().issued[name], f"the certificate of '{name}'")
        file, pem = self._package(name, certificates.public(certificate, f"the certificate of '{name}'"))
        kits.keep(self.folder / AUTHORITY, self.network.name, name, pem)
        return file

    def _package(self, name: str, key: certificates.Public) -> tuple[Path, bytes]:
        """A participant's new package, and the certificate in it."""
        facts, server, root = self.network.participants()[name], self.network.server, self._root()
        host = server.host if facts["kind"] == "server" else None
        pem = kits.issue(root, name, facts["organisation"], key, role=facts.get("role"), host=host)
        told = Facts.model_validate(
            {
                "network": self.network.name,
                "host": server.host,
                "port": server.port,
                "kind": facts["kind"],
                "name": name,
                "organisation": facts["organisation"],
                "role": facts.get("role"),
                "certificate": pem.decode(),
                "authority": root.certificate.decode(),
            }
        )
        return Package.signed(told, root.key).write(self.folder / PACKAGES / f"{name}.json"), pem

    def _participants(self, key: str) -> dict[str, dict[str, str]]:
        """Those with keys of that kind."""
        return {name: facts for name, facts in self.network.participants().items() if facts["key"] == key}

    def _root(self) -> kits.Authority:
        return kits.authority(self.folder / AUTHORITY, self.network.name)

    def _own(self) -> dict[str, bytes]:
        file = self.folder / AUTHORITY / OWN
        if not file.is_file():
            return {}
        try:
            return {str(n): str(pem).encode() for n, pem in dict(json.loads(file.read_text(encoding="utf-8"))).items()}
        except (OSError, ValueError, TypeError):
            raise ConfigError(f"{file} cannot be read.", action="Restore it from a copy.") from None

    def _keep(self, name: str, pem: bytes) -> None:
        told = {**self._own(), name: pem}
        file = self.folder / AUTHORITY / OWN
        data = json.dumps({n: p.decode() for n, p in told.items()}, indent=1) + "\n"
        durable.write(file, data.encode(), durable.OWN)

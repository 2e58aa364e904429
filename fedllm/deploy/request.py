"""Request - a participant's own private key, which never leaves its folder, and its request for a certificate (CSR)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedllm.core.errors import ConfigError
from fedllm.deploy import certificates
from fedllm.deploy.kit import Kit, is_kit
from fedllm.deploy.network import is_address, is_organisation, is_site
from fedllm.engine import durable

KEY = "startup/client.key"
"""The private key of a site or a coordinator, in its kit."""
SUFFIX = ".csr"
"""Ending of a request's file."""
SIZE_LIMIT = 20_000
"""Bytes of a request at most."""


@dataclass(frozen=True)
class Request:
    """A request for a certificate that was read and checked in itself.

    Attributes:
        file: where it lies.
        name: of the site, or a coordinator's e-mail address.
        organisation: whose it is.
        key: the public key.
    """

    file: Path
    name: str
    organisation: str
    key: certificates.Public

    @property
    def fingerprint(self) -> str:
        """Of its key; to be compared over another channel."""
        return certificates.fingerprint(self.key)

    @classmethod
    def of(cls, file: Path) -> Request:
        """Read a request.

        Raises:
            ConfigError: it cannot be read, is not signed with its own key, or its key or subject is of another kind.
        """
        try:
            with file.open("rb") as handle:
                data = handle.read(SIZE_LIMIT + 1)
        except OSError as fault:
            raise ConfigError(f"{file} cannot be read: {fault.strerror}.", action="Name a request's file.") from None
        if len(data) > SIZE_LIMIT:
            raise ConfigError(f"{file} is too long for a request.", f"Allowed: {SIZE_LIMIT:,} bytes.")
        said, key = certificates.requested(data, str(file))
        if set(said) != {"name", "organisation"}:
            raise ConfigError(
                f"{file} says: {', '.join(said) or 'nothing'}.",
                "A request says name and organisation; the role stands in sites.yaml.",
                action="Ask for it again; it is made by 'fedllm deploy request'.",
            )
        return cls(file, said["name"], said["organisation"], key)


def make(folder: Path, name: str, organisation: str) -> Request:
    """Make a private key in `folder`, where there is none yet, and write its request beside it.

    Args:
        folder: that becomes the kit, or is it already: then the request asks for a certificate for the same key.
        name: of the site, or a coordinator's e-mail address, as in `sites.yaml`.
        organisation: whose it is, as in `sites.yaml`.

    Raises:
        ConfigError: a name or a folder that cannot be used.
    """
    if not (is_site(name) or is_address(name)):
        raise ConfigError(
            f"'{name}' is neither a name of a site nor an e-mail address.",
            "A site: letters, digits, '_' and '-'. A coordinator: name@host.",
        )
    if not is_organisation(organisation):
        raise ConfigError(f"The organisation '{organisation}' cannot be used.", "Allowed: letters, digits and '_'.")
    _fits(folder, name)
    key = _key(folder / KEY)
    file = folder / f"{name}{SUFFIX}"
    durable.write(file, certificates.request(key, name, organisation))
    return Request.of(file)


def _fits(folder: Path, name: str) -> None:
    """Raise :class:`ConfigError` where `folder` is another participant's, or of something else."""
    if is_kit(folder):
        kit = Kit.of(folder)
        if kit.kind == "server":
            raise ConfigError(
                f"{folder} is the kit of a server.", "A server's key is made with its kit; sites bring their own."
            )
        if kit.name != name:
            raise ConfigError(f"{folder} is the kit of '{kit.name}'.", "A kit has one owner.", kit.name)
        if not (folder / KEY).is_file():
            raise ConfigError(f"{folder} has lost its private key.", action="Begin anew in another folder: --folder.")
        return
    others = [file.stem for file in folder.glob(f"*{SUFFIX}") if file.name != f"{name}{SUFFIX}"]
    if others:
        raise ConfigError(f"{folder} holds the key of '{others[0]}'.", action="Give another folder: --folder.")
    if folder.exists() and not (folder / KEY).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty, and no kit.", action="Give a new folder: --folder.")


def _key(file: Path) -> certificates.Private:
    """The private key in `file`, made where there is none; nobody else may read it."""
    if file.is_file():
        return certificates.private(file.read_bytes(), str(file))
    for place in (file.parent.parent, file.parent):
        durable.own(place)
    pem = certificates.new_key()
    try:
        durable.create(file, pem, durable.OWN)
    except OSError as fault:
        raise ConfigError(
            f"The key {file} cannot be made: {fault.strerror}.", action="Give the command again, or another folder."
        ) from None
    return certificates.private(pem, str(file))

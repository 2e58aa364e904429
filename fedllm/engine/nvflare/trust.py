"""Trust - who a kit belongs to, and a run's manifest: signed with an administrator's kit, checked with any other.

FLARE's provisioning puts into every kit's folder `startup` the certificate of its owner (`client.crt`, `server.crt`),
its private key and the certificate of the authority that issued all of them (`rootCA.pem`).
"""

from __future__ import annotations

import base64
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, MissingExtra
from fedllm.sites.canonical import LABEL, sha256
from fedllm.sites.manifest import BaseModelFacts, Manifest, ManifestError, sign, verify

ROOT = "rootCA.pem"
OWN = ("client", "server")
"""Names of the files of a kit's owner, without `.crt` and `.key`."""
UNNAMED = "default"
"""The data set of a run that names none; a site's policy lists it like any other."""
MANIFEST = "manifest.json"
"""The signed manifest, kept by server and sites in the run's folder."""


@dataclass(frozen=True)
class Signed:
    """A signed manifest on its way.

    Attributes:
        manifest: what :func:`fedllm.sites.manifest.sign` gave.
        certificate: of who signed, in PEM.
    """

    manifest: bytes
    certificate: bytes

    def to_json(self) -> dict[str, str]:
        """As texts without a brace."""
        return {name: base64.b64encode(value).decode() for name, value in self.__dict__.items()}

    @classmethod
    def of(cls, found: Any) -> Signed:
        """From :meth:`to_json`; raises :class:`ManifestError` where there is none."""
        if not isinstance(found, Mapping):
            raise ManifestError(
                "The run comes without a signed manifest.",
                "The coordinator signs one.",
                action="Submit the run with Session.submit, or with 'fedllm deploy run'.",
            )
        try:
            return cls(*(base64.b64decode(found[name], validate=True) for name in ("manifest", "certificate")))
        except (KeyError, TypeError, ValueError):
            raise ManifestError("The run's signed manifest cannot be read.", action="Submit the run again.") from None


def owner(kit: Path) -> str:
    """The common name in the certificate of a kit; raises :class:`ConfigError` where there is none."""
    pem = _read(kit, f"{_own(kit)}.crt")
    try:
        x509 = importlib.import_module("cryptography.x509")
    except ImportError:
        raise MissingExtra("cryptography", "nvflare", "A run across sites") from None
    try:
        subject = x509.load_pem_x509_certificate(pem).subject
    except ValueError as fault:
        raise ConfigError(f"The certificate of {kit} cannot be read: {fault}.", action="Provision again.") from None
    names = subject.get_attributes_for_oid(x509.oid.NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ConfigError(f"The certificate of {kit} has {len(names)} common names.", "One says whose it is.")
    return str(names[0].value)


def signed(
    kit: Path,
    run: str,
    recipe: Mapping[str, Any],
    sites: Sequence[str],
    *,
    purpose: str,
    data_sets: Sequence[str] = (),
    quorum: int | None = None,
) -> Signed:
    """The manifest of a run, signed by the owner of a kit.

    Args:
        kit: the coordinator's folder.
        run: the run's id.
        recipe: the resolved recipe, in JSON values.
        sites: who takes part.
        purpose: what the run is for.
        data_sets: names of the data sets at the sites; none: :data:`UNNAMED`.
        quorum: sites without which a round does not count; None: 1, the run goes on while one site is there.

    Raises:
        ConfigError: no such kit, or a key that cannot be read.
        ManifestError: a value that cannot stand in a manifest.
    """
    model = str(recipe.get("model", {}).get("name", "unknown"))
    if not re.fullmatch(LABEL, model):
        raise ManifestError(
            f"The recipe names the folder '{model}' as its model.",
            "A folder of the coordinator has no meaning at a site.",
            action="Give the model's name; each site's own file (models) says what is loaded for it.",
        )
    manifest = Manifest.of(
        recipe,
        run=run,
        coordinator=owner(kit),
        purpose=purpose,
        data_sets=tuple(data_sets) or (UNNAMED,),
        model=BaseModelFacts(name=model, fingerprint=None, licence=None),
        members=sorted(sites),
        quorum=quorum or 1,
    )
    own = _own(kit)
    return Signed(sign(manifest, _read(kit, f"{own}.key")), _read(kit, f"{own}.crt"))


def checked(given: Signed, kit: Path, run: str, recipe: Mapping[str, Any], now: datetime | None = None) -> Manifest:
    """The manifest, if somebody whom the kit's authority knows has signed it for this run and recipe.

    Raises:
        ManifestError: a signature, a certificate, a run or a recipe that is another; the error says which.
        ConfigError: a kit without the certificate of its authority.
    """
    manifest = verify(given.manifest, given.certificate, _read(kit, ROOT), now or datetime.now(UTC))
    if manifest.run != run:
        raise ManifestError(
            f"The manifest is that of run '{manifest.run}', and the job is run '{run}'.",
            action="Sign one for this run.",
        )
    if manifest.recipe_sha256 != sha256(recipe):
        raise ManifestError(
            f"The recipe of run '{run}' is not the one in its manifest.", action="Sign a manifest of this recipe."
        )
    return manifest


def _own(kit: Path) -> str:
    for name in OWN:
        if (kit / "startup" / f"{name}.crt").is_file():
            return name
    raise ConfigError(
        f"{kit} holds no certificate.",
        f"A kit has one of {', '.join(f'startup/{name}.crt' for name in OWN)}.",
        action="Name the folder of a kit that FLARE's provisioning made.",
    )


def _read(kit: Path, name: str) -> bytes:
    try:
        return (kit / "startup" / name).read_bytes()
    except OSError as fault:
        raise ConfigError(
            f"{kit / 'startup' / name} cannot be read: {fault.strerror}.",
            action="Provision again: the kit is not whole.",
        ) from None

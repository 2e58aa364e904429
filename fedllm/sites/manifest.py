"""Manifest - what a run is, written down and signed by its coordinator before any site takes part.

Each field is hashed by itself and the hashes are signed, so that a changed field can be named. The recipe travels
whole: what the manifest says beside it (method, rounds, modes) is held against it, and a manifest that contradicts
itself is refused.

Keys: Ed25519 (RFC 8032); ECDSA with SHA-256 (FIPS 186-5); RSA-PSS with SHA-256 and a salt of 32 bytes (RFC 8017).
The key decides which, never the signed text.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError, DecodeError, MissingExtra
from fedllm.core.settings import read
from fedllm.sites.canonical import LABEL, NAME, SHA256, canonical, parsed, sha256

PROTOCOL = 1
"""Version of what sites and server say to each other; both ends must have the same."""
MODES = ("privacy", "secure", "encrypted", "defence", "attack")
"""Sections of a recipe that are modes of a run."""
NAMED_MODES = ("defence", "attack")
"""Modes that are off where they are empty; the others are off where they are null."""
SIZE_LIMIT = 1_000_000
"""Bytes of a signed manifest at most."""
RSA_BITS = 2048
"""Least length of an RSA key."""
CURVE_BITS = 256
"""Least length of an ECDSA key."""
_CONTEXT = b"fedllm run manifest\n"
_PARTS = ("manifest", "digests", "algorithm", "signature")

Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Label = Annotated[str, Field(pattern=f"^{LABEL}$")]


class ManifestError(DecodeError):
    """A manifest cannot be read, or contradicts itself."""


class BadSignature(ManifestError):
    """The signature of a manifest is not that of the key."""


class ManifestChanged(ManifestError):
    """A field of a manifest is not the one that was signed."""


class ProtocolMismatch(ManifestError):
    """A manifest is of another version of the protocol."""


class BaseModelFacts(BaseModel):
    """The base model of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Label
    """Its name; a path of the coordinator's machine has no meaning elsewhere."""
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")] | None
    """Of its weights; each site compares it with its own copy. Null: the coordinator does not hold the model."""
    licence: Label | None
    """Its licence, as an SPDX id where there is one; null: not known."""


class Manifest(BaseModel):
    """What a run is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    run: Name
    """The run's id."""
    coordinator: Name
    """Who signs: the common name in the certificate."""
    package: Name
    """Version of fedllm at the coordinator."""
    protocol: int = PROTOCOL
    """Version of the protocol."""
    purpose: Label
    """What the run is for."""
    data_sets: tuple[Label, ...] = Field(min_length=1)
    """Names of the data sets it uses at the sites."""
    model: BaseModelFacts
    """The base model."""
    method: Name
    """The method or protocol."""
    modes: dict[str, dict[str, Any]]
    """The sections of the recipe that are modes and not off; see :data:`MODES`."""
    members: tuple[Name, ...] = Field(min_length=1)
    """The sites that take part."""
    quorum: int = Field(ge=1)
    """Members without which a round does not count."""
    rounds: int = Field(ge=1)
    """Rounds of the run."""
    created: AwareDatetime
    """When it was written, UTC."""
    recipe: dict[str, Any]
    """The resolved recipe, every default written out."""
    recipe_sha256: str = Field(pattern=f"^{SHA256}$")
    """SHA-256 of the canonical form of the recipe."""

    @classmethod
    def of(
        cls,
        recipe: Mapping[str, Any],
        *,
        run: str,
        coordinator: str,
        purpose: str,
        data_sets: Sequence[str],
        model: Mapping[str, str | None] | BaseModelFacts,
        members: Sequence[str],
        quorum: int,
        created: datetime | None = None,
        package: str | None = None,
    ) -> Manifest:
        """The manifest of a recipe; what the recipe says is taken from it.

        Args:
            recipe: resolved, in JSON values: `Recipe.model_dump(mode="json")`.
            run: the run's id.
            coordinator: who will sign.
            purpose: what the run is for.
            data_sets: names of the data sets at the sites.
            model: name, fingerprint and licence of the base model.
            members: the sites.
            quorum: members without which a round does not count.
            created: now, where None.
            package: version of fedllm; the installed one, where None.

        Raises:
            ManifestError: a value that cannot be used.
        """
        whole = parsed(canonical(recipe))
        values = {
            "run": run,
            "coordinator": coordinator,
            "package": package or _installed(),
            "protocol": PROTOCOL,
            "purpose": purpose,
            "data_sets": list(data_sets),
            "model": model.model_dump() if isinstance(model, BaseModelFacts) else dict(model),
            "method": _method(whole),
            "modes": _modes(whole),
            "members": list(members),
            "quorum": quorum,
            "rounds": whole.get("rounds"),
            "created": created or datetime.now(UTC),
            "recipe": whole,
            "recipe_sha256": sha256(whole),
        }
        return _read(values)

    def to_json(self) -> dict[str, Any]:
        """As it is signed."""
        return self.model_dump(mode="json")

    def what(self) -> bytes:
        """What is run, in canonical JSON: all but when it was written. A run that goes on has the same."""
        return canonical({name: value for name, value in self.to_json().items() if name != "created"})

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        recipe = self.recipe
        beside = {
            "recipe_sha256": (self.recipe_sha256, sha256(recipe)),
            "method": (self.method, _method(recipe)),
            "rounds": (self.rounds, recipe.get("rounds")),
            "modes": (self.modes, _modes(recipe)),
        }
        for name, (said, held) in beside.items():
            if canonical(said) != canonical(held):
                raise ManifestError(
                    f"The manifest contradicts itself: its {name} is not that of its recipe.",
                    action="Make it with Manifest.of from the resolved recipe.",
                )
        for name in ("members", "data_sets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ManifestError(f"The manifest's {name} has a name twice.", "Each stands once.")
        if self.quorum > len(self.members):
            raise ManifestError(
                f"The manifest has quorum={self.quorum} and {len(self.members)} members.",
                f"Allowed: 1 to {len(self.members)}.",
            )
        return self


def sign(manifest: Manifest, private_key: bytes, password: bytes | None = None) -> bytes:
    """The manifest with its signature, in canonical JSON.

    Args:
        manifest: what is signed.
        private_key: in PEM; Ed25519, ECDSA or RSA.
        password: of the key, where it is encrypted.

    Raises:
        ConfigError: the key cannot be read or is of another kind.
        ManifestError: the manifest is too long.
        MissingExtra: the library `cryptography` is not installed.
    """
    serialization = _primitives("serialization")
    try:
        key = serialization.load_pem_private_key(private_key, password)
    except (ValueError, TypeError, _library("exceptions").UnsupportedAlgorithm) as fault:
        raise ConfigError(
            f"The private key cannot be read: {fault}.", "Allowed: a key in PEM.", action="Name the coordinator's key."
        ) from None
    algorithm = _algorithm(key.public_key())
    values = manifest.to_json()
    digests = {name: sha256(value) for name, value in values.items()}
    signature = key.sign(_CONTEXT + canonical(digests), *_options(algorithm))
    written = {
        "manifest": values,
        "digests": digests,
        "algorithm": algorithm,
        "signature": base64.b64encode(signature).decode(),
    }
    data = canonical(written)
    if len(data) > SIZE_LIMIT:
        raise ManifestError(f"The signed manifest has {len(data):,} bytes.", f"Allowed: {SIZE_LIMIT:,}.")
    return data


def verify(
    signed: bytes, certificate_or_key: bytes, root: bytes | None = None, now: datetime | None = None
) -> Manifest:
    """The manifest in `signed`, if the holder of the key has signed it as it is.

    Args:
        signed: what :func:`sign` gave; its values are signed, not its layout.
        certificate_or_key: the coordinator's X.509 certificate or public key in PEM, which the caller trusts. The
            name in a certificate must be the manifest's coordinator; with a bare key the caller sees to that.
        root: a certificate in PEM that must have issued the coordinator's; None where the caller has checked it.
        now: the time at which the certificates must be valid; the present, where None.

    Raises:
        ProtocolMismatch: another version of the protocol.
        BadSignature: the signature, the certificate, or the name in it is not right.
        ManifestChanged: a field is not the one that was signed; the error names it.
        ManifestError: not a signed manifest, or one that contradicts itself.
        ConfigError: the certificate or key cannot be read or is of another kind.
        MissingExtra: the library `cryptography` is not installed.
    """
    written = _written(signed)
    values, digests = written["manifest"], written["digests"]
    theirs = values.get("protocol")
    if theirs != PROTOCOL or type(theirs) is not int:
        raise ProtocolMismatch(
            f"The manifest is of protocol version {theirs!r}; this fedllm has version {PROTOCOL}.",
            "Both ends must have the same.",
            action="Install the same version of fedllm at both ends.",
        )
    key, name = _trusted(certificate_or_key, root, now or datetime.now(UTC))
    _check_signature(written, key)
    changed = sorted(
        n for n in values.keys() | digests.keys() if n not in values or digests.get(n) != sha256(values[n])
    )
    if changed:
        raise ManifestChanged(
            f"The manifest was changed after it was signed: {', '.join(changed)}.",
            action="Ask the coordinator for it again.",
        )
    manifest = _read(values)
    if canonical(manifest.to_json()) != canonical(values):
        raise ManifestError("The manifest is not in the form in which manifests are written.")
    if name not in (None, manifest.coordinator):
        raise BadSignature(
            f"The certificate is that of '{name}', and the manifest's coordinator is '{manifest.coordinator}'.",
            "The coordinator signs.",
        )
    return manifest


def _written(signed: bytes) -> dict[str, Any]:
    if len(signed) > SIZE_LIMIT:
        raise ManifestError(f"A signed manifest has {len(signed):,} bytes.", f"Allowed: {SIZE_LIMIT:,}.")
    try:
        written = parsed(signed)
        canonical(written)
    except DecodeError:
        raise ManifestError("A signed manifest is not JSON.", action="Ask the coordinator for it again.") from None
    kinds = {"manifest": dict, "digests": dict, "algorithm": str, "signature": str}
    if not isinstance(written, dict) or set(written) != set(_PARTS):
        raise ManifestError("These bytes are no signed manifest.", f"It has the parts {', '.join(_PARTS)}.")
    for part, kind in kinds.items():
        if not isinstance(written[part], kind):
            raise ManifestError(f"The part '{part}' of a signed manifest is a {type(written[part]).__name__}.")
    return written


def _check_signature(written: Mapping[str, Any], key: Any) -> None:
    algorithm = _algorithm(key)
    if written["algorithm"] != algorithm:
        raise BadSignature(
            f"The manifest is signed with '{written['algorithm'][:40]}', and the key is for {algorithm}.",
            action="Name the coordinator's certificate or key.",
        )
    message = _CONTEXT + canonical(written["digests"])
    try:
        key.verify(base64.b64decode(written["signature"], validate=True), message, *_options(algorithm))
    except (ValueError, _library("exceptions").InvalidSignature):
        raise BadSignature(
            "The manifest's signature is not that of this certificate or key.",
            action="Refuse it, and ask the coordinator which key signs.",
        ) from None


def _trusted(pem: bytes, root: bytes | None, now: datetime) -> tuple[Any, str | None]:
    """The public key, and the name in the certificate; None where there is only a key."""
    if b"BEGIN CERTIFICATE" not in pem:
        if root is not None:
            raise ConfigError("A public key was given with a root.", "A root issues certificates.")
        try:
            return _primitives("serialization").load_pem_public_key(pem), None
        except (ValueError, _library("exceptions").UnsupportedAlgorithm) as fault:
            raise _unreadable("public key", fault) from None
    certificate = _certificate(pem, now)
    if root is not None:
        issuer = _certificate(root, now)
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, _library("exceptions").InvalidSignature):
            raise BadSignature(
                "The certificate was not issued by the given root.", action="Name the root of the federation."
            ) from None
    names = certificate.subject.get_attributes_for_oid(_library("x509.oid").NameOID.COMMON_NAME)
    if len(names) != 1:
        raise BadSignature(f"The certificate has {len(names)} common names.", "One says who signs.")
    return certificate.public_key(), str(names[0].value)


def _certificate(pem: bytes, now: datetime) -> Any:
    x509 = _library("x509")
    try:
        found = x509.load_pem_x509_certificate(pem)
        found.public_key()
    except (ValueError, _library("exceptions").UnsupportedAlgorithm) as fault:
        raise _unreadable("certificate", fault) from None
    first, last = found.not_valid_before_utc, found.not_valid_after_utc
    if not first <= now <= last:
        raise BadSignature(
            f"The certificate of {found.subject.rfc4514_string()} is not valid at {now.isoformat(timespec='seconds')}.",
            f"It is valid from {first.isoformat()} to {last.isoformat()}.",
            action="Renew it, or set the clock.",
        )
    return found


def _unreadable(kind: str, fault: Exception) -> ConfigError:
    return ConfigError(
        f"The {kind} cannot be read: {fault}.",
        "Allowed: a certificate or a public key in PEM.",
        action="Name the coordinator's.",
    )


def _algorithm(key: Any) -> str:
    """What a public key signs with; raises :class:`ConfigError` for another kind or one that is too short."""
    ed25519, ec, rsa = (_primitives(f"asymmetric.{name}") for name in ("ed25519", "ec", "rsa"))
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _long_enough("ecdsa-sha256", key.key_size, CURVE_BITS)
    if isinstance(key, rsa.RSAPublicKey):
        return _long_enough("rsa-pss-sha256", key.key_size, RSA_BITS)
    raise ConfigError(f"A key is a {type(key).__name__}.", "Allowed: Ed25519, ECDSA and RSA.")


def _long_enough(algorithm: str, bits: int, least: int) -> str:
    if bits < least:
        raise ConfigError(
            f"A key for {algorithm} has {bits} bits.", f"Allowed: {least} and more.", action="Make a longer one."
        )
    return algorithm


def _options(algorithm: str) -> tuple[Any, ...]:
    """What the library's sign and verify take behind the message (and signature)."""
    hashes = _primitives("hashes")
    if algorithm == "ed25519":
        return ()
    if algorithm == "ecdsa-sha256":
        return (_primitives("asymmetric.ec").ECDSA(hashes.SHA256()),)
    padding = _primitives("asymmetric.padding")
    return padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size), hashes.SHA256()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{name}")
    except ImportError:
        raise MissingExtra("cryptography", "secagg", "Signing and checking manifests") from None


def _primitives(name: str) -> Any:
    return _library(f"hazmat.primitives.{name}")


def _method(recipe: Mapping[str, Any]) -> Any:
    method = recipe.get("method")
    return method.get("name") if isinstance(method, Mapping) else method


def _modes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    off = {name: ({}, None) if name in NAMED_MODES else (None,) for name in MODES}
    return {name: recipe[name] for name in MODES if recipe.get(name) not in off[name]}


def _installed() -> str:
    try:
        return version("fedllm")
    except PackageNotFoundError:
        return "unknown"


def _read(values: Mapping[str, Any]) -> Manifest:
    try:
        return read(Manifest, values, "manifest")
    except ConfigError as fault:
        raise ManifestError(fault.given, fault.allowed, fault.nearest, "Sign a manifest that says otherwise.") from None

"""Certificates - what deploying needs of keys and X.509: make, read, sign, compare; how long a certificate is good.

It alone imports `cryptography` for the folder, so that where that is missing the extra is named.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime

from fedllm.core.errors import ConfigError, MissingExtra

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.x509.oid import NameOID
except ImportError:
    raise MissingExtra("cryptography", "nvflare", "A kit's key and certificate") from None

from fedllm.deploy.term import Term
from fedllm.engine.nvflare.kits import KEY_BITS

EXPONENT = 65537
"""Of every RSA key."""
NAMES = {NameOID.COMMON_NAME: "name", NameOID.ORGANIZATION_NAME: "organisation", NameOID.UNSTRUCTURED_NAME: "role"}
"""What a subject may say, in the terms of `sites.yaml`; FLARE keeps the role in unstructuredName."""
HASHES = ("sha256", "sha384", "sha512")
"""With what a request may be signed."""
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What `cryptography` raises for bytes that are no such thing."""
Public = rsa.RSAPublicKey
Private = rsa.RSAPrivateKey
Certificate = x509.Certificate


# --- keys ------------------------------------------------------------------------------------------------------------


def new_key() -> bytes:
    """A new private key in PEM, of the kind and in the form in which FLARE's provisioning makes them."""
    key = rsa.generate_private_key(EXPONENT, KEY_BITS)
    form = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, *form)


def private(pem: bytes, what: str) -> Private:
    """A private key in PEM without a password; raises :class:`ConfigError` for another."""
    try:
        found = serialization.load_pem_private_key(pem, None)
    except UNREADABLE as fault:
        raise ConfigError(
            f"{what} is no private key: {type(fault).__name__}.", "Needed: PEM, without a password."
        ) from None
    if not isinstance(found, rsa.RSAPrivateKey):
        raise ConfigError(f"{what} is a {type(found).__name__}.", f"Allowed: RSA with {KEY_BITS} bits.")
    usable(found.public_key(), what)
    return found


def usable(key: object, what: str) -> Public:
    """`key`, if it is one that FLARE can use; raises :class:`ConfigError`."""
    allowed = f"Allowed: RSA with {KEY_BITS} bits and the exponent {EXPONENT}; FLARE takes no other."
    if not isinstance(key, rsa.RSAPublicKey):
        raise ConfigError(f"The key of {what} is a {type(key).__name__}.", allowed)
    if key.key_size != KEY_BITS or key.public_numbers().e != EXPONENT:
        exponent = key.public_numbers().e
        raise ConfigError(f"The key of {what} has {key.key_size} bits and the exponent {exponent}.", allowed)
    return key


def signature(key: Private, data: bytes) -> bytes:
    """Of `data`: RSA-PSS with SHA-256 and a salt of 32 bytes (RFC 8017)."""
    return key.sign(data, _pss(), hashes.SHA256())


def signed_by(key: Public, data: bytes, signature: bytes) -> bool:
    """Whether :func:`signature` made it with the private part of `key`."""
    try:
        key.verify(signature, data, _pss(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), 32)


# --- certificates and requests ---------------------------------------------------------------------------------------


def certificate(data: bytes, what: str) -> Certificate:
    """A certificate in PEM; raises :class:`ConfigError` naming `what` where it is none."""
    try:
        return x509.load_pem_x509_certificate(data)
    except UNREADABLE as fault:
        raise ConfigError(f"{what} is no certificate in PEM: {fault}.", action="Get it again.") from None


def pem(one: Certificate) -> bytes:
    """In PEM: one certificate and nothing else, whatever stood around it where it was read."""
    return one.public_bytes(serialization.Encoding.PEM)


def public(holder: Certificate | x509.CertificateSigningRequest, what: str) -> Public:
    """The key in a certificate or a request; raises :class:`ConfigError` for one that FLARE cannot use."""
    try:
        found = holder.public_key()
    except UNREADABLE:
        raise ConfigError(f"The key of {what} cannot be read.", f"Allowed: RSA with {KEY_BITS} bits.") from None
    return usable(found, what)


def request(key: Private, name: str, organisation: str) -> bytes:
    """A request (PKCS #10) for a certificate, in PEM."""
    attributes = [(NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, organisation)]
    asked = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    made = x509.CertificateSigningRequestBuilder().subject_name(asked).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def requested(data: bytes, what: str) -> tuple[dict[str, str], Public]:
    """What the subject of a request says, and its key. What else it asks for is not looked at: no certificate has it.

    Raises:
        ConfigError: it is none, not signed with its own key, or its key or subject is of another kind.
    """
    again = "Ask for it again; it is made by 'fedllm deploy request'."
    try:
        found = x509.load_pem_x509_csr(data)
        algorithm, asked, sound = found.signature_hash_algorithm, found.subject, found.is_signature_valid
    except UNREADABLE as fault:
        raise ConfigError(f"{what} is no request in PEM: {type(fault).__name__}.", action=again) from None
    key = public(found, what)
    if algorithm is None or algorithm.name not in HASHES:
        name = algorithm.name if algorithm is not None else "no hash"
        raise ConfigError(f"{what} is signed with {name}.", f"Allowed: {', '.join(HASHES)}.", action=again)
    if not sound:
        raise ConfigError(f"{what} is not signed with its own key: it was changed.", action=again)
    return subject(asked, what), key


def subject(name: x509.Name, what: str) -> dict[str, str]:
    """What a subject says: name, organisation, role; raises :class:`ConfigError` for anything else or twice."""
    found: dict[str, str] = {}
    for one in name:
        word = NAMES.get(one.oid)
        if word is None or word in found or not isinstance(one.value, str):
            raise ConfigError(
                f"The subject of {what} is {name.rfc4514_string()}.",
                f"Allowed, once each: {', '.join(NAMES.values())}.",
            )
        found[word] = one.value
    return found


def term(one: Certificate, now: datetime | None = None) -> Term:
    """When a certificate is good, at a time; None: the present."""
    return Term(one.not_valid_before_utc, one.not_valid_after_utc, now or datetime.now(UTC))


def issued_by(one: Certificate, root: Certificate) -> bool:
    """Whether a certificate was signed with the key of `root`."""
    try:
        one.verify_directly_issued_by(root)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def fingerprint(holder: Certificate | Public) -> str:
    """SHA-256 in pairs: of a whole certificate (as `openssl x509 -fingerprint`), or of a public key's DER form."""
    form = serialization.Encoding.DER
    if isinstance(holder, Certificate):
        data = holder.public_bytes(form)
    else:
        data = holder.public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
    return ":".join(f"{byte:02X}" for byte in hashlib.sha256(data).digest())


def written(text: str) -> str:
    """A fingerprint as people write it, in the form of :func:`fingerprint`; raises :class:`ConfigError`: not whole."""
    digits = re.sub(r"[\s:]", "", text).upper()
    if not re.fullmatch(r"[0-9A-F]{64}", digits):
        raise ConfigError(
            f"'{text}' is no fingerprint.", "It has 64 digits from 0 to 9 and A to F, all of them.", None, "Ask again."
        )
    return ":".join(digits[at : at + 2] for at in range(0, 64, 2))

"""Keys - agreement, sealed shares, tags and signatures of a secure sum, from the library `cryptography`.

X25519 (RFC 7748) agrees, HKDF-SHA256 (RFC 5869) derives one key for each purpose, ChaCha20-Poly1305 (RFC 8439) seals,
HMAC-SHA256 tags, Ed25519 (RFC 8032) signs. Whatever a key is derived or used for is named by :func:`encoded`, so that
bytes of one session, round, sender or receiver are refused in any other.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import secrets
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from fedllm.core.errors import FedLLMError, MissingExtra, UploadRejected

KEY_BYTES = 32
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""What a sealed text has more than the text: nonce and tag."""
TAG_BYTES = 16
SIGNATURE_BYTES = 64


class SecAggError(FedLLMError):
    """A message of a secure sum came at another stage, twice, from a stranger, or its answer would reveal a client."""

    exit_code = 6


class ShareRefused(SecAggError):
    """A sealed share cannot be opened: changed on its way, or sealed for another session, round, sender, receiver."""


@lru_cache(maxsize=16)
def primitives(name: str) -> Any:
    """A module of the library's primitives; raises :class:`MissingExtra` where the library is not installed."""
    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.{name}")
    except ImportError:
        raise MissingExtra("cryptography", "secagg", "A secure sum") from None


def encoded(*fields: bytes | str | int) -> bytes:
    """One run of bytes for the fields: equal only for equal fields in the same order."""
    return b"".join(_field(one) for one in fields)


def _field(value: bytes | str | int) -> bytes:
    if isinstance(value, bytes):
        kind, data = b"b", value
    else:
        kind, data = (b"s", value.encode()) if isinstance(value, str) else (b"i", b"%d" % value)
    return kind + len(data).to_bytes(8, "big") + data


def digest(*fields: bytes | str | int) -> bytes:
    """SHA-256 of :func:`encoded`, 32 bytes."""
    return hashlib.sha256(encoded(*fields)).digest()


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, 32 bytes each."""

    private: bytes = field(repr=False)
    public: bytes

    @classmethod
    def new(cls) -> KeyPair:
        """A fresh pair from the operating system's generator."""
        return cls.of(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        """The pair of a private key: any 32 bytes."""
        key = primitives("asymmetric.x25519").X25519PrivateKey.from_private_bytes(private)
        return cls(private, key.public_key().public_bytes_raw())

    @cached_property
    def _loaded(self) -> Any:
        """The library's object; loading it costs as much as an agreement."""
        return primitives("asymmetric.x25519").X25519PrivateKey.from_private_bytes(self.private)

    def agree(self, public: bytes) -> bytes:
        """The 32 bytes that both sides of an agreement find; they are no key yet (see :func:`derived`).

        Raises:
            UploadRejected: `public` is no usable public key: of another length, or of low order.
        """
        try:
            theirs = primitives("asymmetric.x25519").X25519PublicKey.from_public_bytes(public)
            return self._loaded.exchange(theirs)
        except ValueError as fault:
            raise UploadRejected(
                f"A public key of {len(public)} bytes cannot be used: {fault}.",
                f"Expected: {KEY_BYTES} bytes of X25519.",
            ) from fault


def derived(agreed: bytes, *purpose: bytes | str | int) -> bytes:
    """A key of 32 bytes for one purpose, by HKDF-SHA256."""
    hashes, hkdf = primitives("hashes"), primitives("kdf.hkdf")
    return hkdf.HKDF(hashes.SHA256(), KEY_BYTES, None, encoded(*purpose)).derive(agreed)


def seal(key: bytes, text: bytes, *bound: bytes | str | int) -> bytes:
    """Encrypt `text` under a random nonce, and authenticate it together with `bound`; 28 bytes longer than `text`.

    Args:
        key: 32 bytes.
        text: what is hidden.
        bound: what the receiver has to know and give the same: context (session, round), sender, receiver.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + primitives("ciphers.aead").ChaCha20Poly1305(key).encrypt(nonce, text, encoded(*bound))


def unseal(key: bytes, sealed: bytes, *bound: bytes | str | int) -> bytes:
    """The text that :func:`seal` hid; raises :class:`ShareRefused` where key, bytes or `bound` are not the same."""
    aead, fault = primitives("ciphers.aead"), importlib.import_module("cryptography.exceptions")
    try:
        if len(sealed) < SEAL_BYTES:
            raise fault.InvalidTag
        return aead.ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], encoded(*bound))
    except fault.InvalidTag:
        raise ShareRefused(
            f"A sealed share of {len(sealed)} bytes cannot be opened.",
            "It was changed, or sealed for another session, round, sender or receiver.",
        ) from None


def tag(key: bytes, *fields: bytes | str | int) -> bytes:
    """16 bytes that only a holder of `key` can make for these fields: HMAC-SHA256, cut."""
    return hmac.new(key, encoded(*fields), hashlib.sha256).digest()[:TAG_BYTES]


def same(left: bytes, right: bytes) -> bool:
    """Whether two tags are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(left, right)


def signing_pair() -> tuple[bytes, bytes]:
    """A fresh Ed25519 pair (private, public), 32 bytes each. The public one is to be known before a run."""
    key = primitives("asymmetric.ed25519").Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def sign(private: bytes, *fields: bytes | str | int) -> bytes:
    """An Ed25519 signature of the fields, 64 bytes."""
    return primitives("asymmetric.ed25519").Ed25519PrivateKey.from_private_bytes(private).sign(encoded(*fields))


def signed(public: bytes | None, signature: bytes, *fields: bytes | str | int) -> bool:
    """Whether `signature` is that of the fields under `public`; False where there is no such key."""
    if public is None:
        return False
    try:
        key = primitives("asymmetric.ed25519").Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, encoded(*fields))
    except (ValueError, importlib.import_module("cryptography.exceptions").InvalidSignature):
        return False
    return True

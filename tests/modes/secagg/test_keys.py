"""Agreement, sealing, tags and signatures: vectors of the standards, and every field they are bound to."""

from __future__ import annotations

import hashlib
import hmac
import importlib
import itertools
from typing import Any

import pytest

pytest.importorskip("cryptography")

from fedllm.core.errors import MissingExtra, UploadRejected
from fedllm.modes.secagg import keys
from fedllm.modes.secagg.keys import (
    SEAL_BYTES,
    KeyPair,
    ShareRefused,
    derived,
    digest,
    encoded,
    same,
    seal,
    sign,
    signed,
    signing_pair,
    tag,
    unseal,
)

CONTEXT: tuple[Any, ...] = (b"context", "alice", "bob")


def test_an_agreement_is_that_of_the_standard() -> None:
    # RFC 7748, section 5.2, vector 1.
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    found = KeyPair.of(scalar).agree(point)
    assert found.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


def test_both_sides_agree_and_nobody_else() -> None:
    alice, bob, eve = (KeyPair.new() for _ in range(3))
    assert alice.agree(bob.public) == bob.agree(alice.public) != eve.agree(bob.public)
    assert KeyPair.of(alice.private) == alice != bob


def test_a_private_key_is_not_printed() -> None:
    pair = KeyPair.new()
    pair.agree(KeyPair.new().public)
    assert pair.private.hex() not in repr(pair) and str(pair.private) not in repr(pair)


@pytest.mark.parametrize("public", [bytes(32), bytes([1]) + bytes(31), b"", bytes(31), b"\1" * 33])
def test_a_key_of_low_order_or_another_length_is_refused(public: bytes) -> None:
    with pytest.raises(UploadRejected, match="public key"):
        KeyPair.new().agree(public)


def test_a_derived_key_is_that_of_the_standard() -> None:
    # RFC 5869 with an empty salt and 32 bytes: one block each of extract and expand.
    extracted = hmac.new(bytes(32), b"agreed", hashlib.sha256).digest()
    wanted = hmac.new(extracted, encoded("mask", b"x", "a") + b"\1", hashlib.sha256).digest()
    assert derived(b"agreed", "mask", b"x", "a") == wanted


def test_fields_are_told_apart() -> None:
    many: list[tuple[Any, ...]] = [
        (), ("",), (b"",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (1,), ("1",), (b"1",), (11,),
        (1, 1), (-1,), ("a", b"bc"), ("b", "a"), ("é",),
    ]  # fmt: skip
    assert len({encoded(*fields) for fields in many}) == len(many) == len({digest(*fields) for fields in many})
    assert len({derived(b"k", *fields) for fields in many}) == len(many)


def test_a_sealed_text_opens_only_as_it_was_sealed() -> None:
    key, text = bytes(range(32)), b"two shares"
    sealed = seal(key, text, *CONTEXT)
    assert len(sealed) == len(text) + SEAL_BYTES and unseal(key, sealed, *CONTEXT) == text
    others = [(b"other", "alice", "bob"), (b"context", "bob", "alice"), (b"context", "alice", "eve"), CONTEXT[:2], ()]
    for other in others:
        with pytest.raises(ShareRefused, match="cannot be opened"):
            unseal(key, sealed, *other)
    with pytest.raises(ShareRefused):
        unseal(bytes(32), sealed, *CONTEXT)


def test_no_changed_or_cut_byte_is_overlooked() -> None:
    key = bytes(range(32))
    sealed = seal(key, b"two shares", *CONTEXT)
    changed = [sealed[:n] + bytes([sealed[n] ^ 1]) + sealed[n + 1 :] for n in range(len(sealed))]
    for one in (*changed, *(sealed[:n] for n in range(len(sealed))), sealed + b"0"):
        with pytest.raises(ShareRefused):
            unseal(key, one, *CONTEXT)


def test_equal_texts_are_sealed_to_different_bytes() -> None:
    assert len({seal(bytes(32), b"text", *CONTEXT) for _ in range(50)}) == 50


def test_a_tag_is_of_its_key_and_fields() -> None:
    tags = [tag(key, *fields) for key, fields in itertools.product((bytes(32), b"1" * 32), (("a", "b"), ("b", "a")))]
    assert len(set(tags)) == 4 and all(len(one) == 16 for one in tags)
    assert same(tags[0], tag(bytes(32), "a", "b")) and not same(tags[0], tags[1]) and not same(tags[0], b"")


def test_a_signature_is_of_its_key_and_fields() -> None:
    (private, public), (_, other) = signing_pair(), signing_pair()
    signature = sign(private, "advert", b"keys", 3)
    assert signed(public, signature, "advert", b"keys", 3)
    assert not signed(other, signature, "advert", b"keys", 3)
    assert not signed(public, signature, "advert", b"keys", 4)
    assert not signed(public, signature[:-1] + bytes([signature[-1] ^ 1]), "advert", b"keys", 3)
    for key, one in ((None, signature), (public, b""), (b"short", signature)):
        assert not signed(key, one, "advert", b"keys", 3)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    keys.primitives.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"fedllm\[secagg\]"):
        KeyPair.new()
    monkeypatch.undo()
    KeyPair.new()

"""A signed manifest: what is signed comes back whole, and whatever was changed is refused and named."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from typing import Any

import pytest

from fedllm.core.errors import ConfigError, DecodeError, FedLLMError, MissingExtra
from fedllm.sites import manifest as module
from fedllm.sites.canonical import canonical, parsed, sha256
from fedllm.sites.manifest import (
    PROTOCOL,
    SIZE_LIMIT,
    BadSignature,
    Manifest,
    ManifestChanged,
    ManifestError,
    ProtocolMismatch,
    sign,
    verify,
)

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519
from cryptography.x509.oid import NameOID

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
KEYS: dict[str, Callable[[], Any]] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ecdsa-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
}
RECIPE: dict[str, Any] = {
    "name": "notes",
    "rounds": 3,
    "method": {"name": "fedavg", "lr": 1e-3},
    "privacy": {"level": "example", "epsilon": 8.0, "noise": 1.0},
    "secure": None,
    "encrypted": None,
    "defence": {},
    "attack": {},
    "about": "Notizen über Ärzte",
}
GIVEN: dict[str, Any] = {
    "run": "run-1",
    "coordinator": "admin@hub.org",
    "purpose": "quality of care",
    "data_sets": ["notes", "letters"],
    "model": {"name": "Qwen/Qwen3-0.6B", "fingerprint": "ab" * 32, "licence": "apache-2.0"},
    "members": ["site-1", "site-2", "site-3"],
    "quorum": 2,
    "created": NOON,
    "package": "0.1.0",
}


def made(recipe: Mapping[str, Any] = RECIPE, **given: Any) -> Manifest:
    return Manifest.of(recipe, **{**GIVEN, **given})


@cache
def key(kind: str, number: int = 0) -> Any:
    return KEYS[kind]()


def private(one: Any, password: bytes | None = None) -> bytes:
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return one.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)


def public(one: Any) -> bytes:
    return one.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def certificate(
    one: Any, name: str | None = "admin@hub.org", issuer: Any = None, days: tuple[int, int] = (-1, 1)
) -> bytes:
    def named(text: str | None) -> x509.Name:
        common = [x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else []
        return x509.Name([*common, x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hub")])

    signer = issuer or one
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    built = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named("root") if issuer else named(name))
        .public_key(one.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOON + timedelta(days=days[0]))
        .not_valid_after(NOON + timedelta(days=days[1]))
        .sign(signer, algorithm)
    )
    return built.public_bytes(serialization.Encoding.PEM)


def changed(signed: bytes, **parts: Any) -> bytes:
    return json.dumps({**json.loads(signed), **parts}).encode()


# --- one form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_equal_values_have_equal_bytes_and_others_do_not(seed: int) -> None:
    rng = random.Random(seed)

    def drawn(depth: int) -> Any:
        kinds = ["none", "bool", "int", "float", "text"] + (["list", "map"] if depth else [])
        kind = rng.choice(kinds)
        if kind == "list":
            return [drawn(depth - 1) for _ in range(rng.randrange(4))]
        if kind == "map":
            return {rng.choice("abcdé\n\ud800"): drawn(depth - 1) for _ in range(rng.randrange(4))}
        return {
            "none": None, "bool": rng.random() < 0.5, "int": rng.randrange(-(2**70), 2**70),
            "float": rng.uniform(-1e300, 1e300), "text": "".join(chr(rng.randrange(0x300)) for _ in range(5)),
        }[kind]  # fmt: skip

    value = {"x": drawn(3), "y": drawn(3), "z": 1}
    again = dict(reversed(value.items()))
    assert canonical(value) == canonical(again) and parsed(canonical(value)) == value
    assert sha256(value) == sha256(parsed(canonical(value)))
    assert sha256({**value, "z": 2}) != sha256(value) and sha256({**value, "z": 1.0}) != sha256(value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"NaN", b"[Infinity]", b'{"a":1,"a":1}', b"\xff", b"[" * 100_000, b"1" * 5000]
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        parsed(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", {(1, 2): 3}])
def test_what_cannot_be_json_is_refused(value: Any) -> None:
    with pytest.raises(DecodeError):
        canonical(value)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_manifest_takes_from_the_recipe_what_the_recipe_says() -> None:
    found = made()
    assert (found.method, found.rounds, found.protocol) == ("fedavg", 3, PROTOCOL)
    assert found.modes == {"privacy": RECIPE["privacy"]}
    assert found.recipe == RECIPE and found.recipe_sha256 == sha256(RECIPE)
    assert made({**RECIPE, "method": "fedprox"}).method == "fedprox"
    assert set(made({**RECIPE, "secure": {}, "privacy": None, "attack": {"name": "noise"}}).modes) == {
        "secure",
        "attack",
    }


def test_a_real_recipe_can_be_signed() -> None:
    from fedllm.recipe import load_recipe

    recipe = load_recipe({"method": "fedprox"}, ["secure.minimum=4", "attack.name=noise"])
    found = made(recipe.model_dump(mode="json"))
    assert found.method == "fedprox" and set(found.modes) == {"secure", "attack"}
    assert found.modes["secure"]["minimum"] == 4 and found.rounds == recipe.rounds
    assert verify(sign(found, private(key("ed25519"))), public(key("ed25519"))) == found


@pytest.mark.parametrize(
    "given",
    [
        {"run": ""}, {"run": "a run"}, {"run": "x" * 129}, {"purpose": ""}, {"purpose": "a\nb"},
        {"data_sets": []}, {"data_sets": ["notes", "notes"]}, {"members": []}, {"members": ["a", "a"]},
        {"quorum": 0}, {"quorum": 4}, {"created": datetime(2026, 3, 1)},
        {"model": {"name": "m", "fingerprint": "xyz", "licence": "mit"}},
        {"model": {"name": "m", "fingerprint": "ab" * 32}},
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        made(**given)


@pytest.mark.parametrize("recipe", [{}, {"rounds": 3}, {**RECIPE, "rounds": 0}, {**RECIPE, "rounds": None}])
def test_a_recipe_that_does_not_say_what_is_needed_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        made(recipe)


@pytest.mark.parametrize("quorum", [1, 3])
def test_quorums_at_their_bounds(quorum: int) -> None:
    assert made(quorum=quorum).quorum == quorum


@pytest.mark.parametrize(
    "change",
    [
        {"method": "fedprox"},
        {"rounds": 2},
        {"modes": {}},
        {"modes": {"privacy": {"level": "example", "epsilon": 1.0, "noise": 1.0}}},
        {"recipe_sha256": "0" * 64},
        {"recipe": {**RECIPE, "rounds": 30}},
    ],
)
def test_a_manifest_that_contradicts_its_recipe_is_refused_though_it_is_signed(change: dict[str, Any]) -> None:
    lie = made().model_copy(update=change)
    with pytest.raises(ManifestError, match="contradicts itself"):
        verify(sign(lie, private(key("ed25519"))), public(key("ed25519")))


# --- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("form", ["certificate", "key"])
def test_what_is_signed_comes_back(kind: str, form: str) -> None:
    signed = sign(made(), private(key(kind)))
    trusted = certificate(key(kind)) if form == "certificate" else public(key(kind))
    found = verify(signed, trusted, now=NOON)
    assert found == made() and found.created == NOON
    assert verify(json.dumps(json.loads(signed), indent=2).encode(), trusted, now=NOON) == found


@pytest.mark.parametrize("kind", KEYS)
def test_another_key_is_refused(kind: str) -> None:
    signed = sign(made(), private(key(kind)))
    for other in KEYS:
        with pytest.raises(BadSignature):
            verify(signed, public(key(other, 1)))


@pytest.mark.parametrize("kind", KEYS)
def test_every_changed_field_is_named(kind: str) -> None:
    signed, trusted = sign(made(), private(key(kind))), public(key(kind))
    values = json.loads(signed)["manifest"]
    other = made(
        {**RECIPE, "rounds": 9, "method": "fedprox", "privacy": None},
        run="run-2", coordinator="eve", purpose="marketing", data_sets=["all"], members=["x"], quorum=1,
        model={"name": "m", "fingerprint": "cd" * 32, "licence": "mit"}, created=NOON + timedelta(1), package="9",
    ).to_json()  # fmt: skip
    for name in values.keys() - {"protocol"}:
        with pytest.raises(ManifestChanged, match=f"signed: {name}[.]"):
            verify(changed(signed, manifest={**values, name: other[name]}), trusted)
        with pytest.raises(ManifestChanged, match=f"signed: {name}[.]"):
            verify(changed(signed, manifest={n: v for n, v in values.items() if n != name}), trusted)
    with pytest.raises(ManifestChanged, match="signed: extra"):
        verify(changed(signed, manifest={**values, "extra": 1}), trusted)
    with pytest.raises(ManifestChanged, match=r"signed: quorum\."):
        verify(changed(signed, manifest={**values, "quorum": 2.0}), trusted)
    deep = {**values, "recipe": {**values["recipe"], "privacy": {**values["recipe"]["privacy"], "noise": 0.1}}}
    with pytest.raises(ManifestChanged, match=r"signed: recipe\."):
        verify(changed(signed, manifest=deep), trusted)


def test_a_field_changed_together_with_its_digest_breaks_the_signature() -> None:
    signed = sign(made(), private(key("ed25519")))
    whole = json.loads(signed)
    whole["manifest"]["purpose"] = "marketing"
    whole["digests"]["purpose"] = sha256("marketing")
    with pytest.raises(BadSignature):
        verify(json.dumps(whole).encode(), public(key("ed25519")))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa-p256", "rsa-2048"])
@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_byte_is_never_accepted_as_another_manifest(kind: str, seed: int) -> None:
    signed, rng = sign(made(), private(key(kind))), random.Random(seed)
    refused, end = 0, signed.index(b'"}', signed.index(b'"signature"'))
    for at in [rng.randrange(len(signed)) for _ in range(60)] + list(range(end - 4, end)):
        data = bytearray(signed)
        data[at] ^= 1 << rng.randrange(8)
        try:  # an escaped letter or an unused bit may be written in two ways
            assert verify(bytes(data), public(key(kind))) == made()
        except FedLLMError:
            refused += 1
    assert refused >= 55


@pytest.mark.parametrize("theirs", [PROTOCOL + 1, 0, "1", None, True, 1.0])
def test_another_protocol_is_refused_before_anything_else_and_both_are_named(theirs: Any) -> None:
    values = {**made().to_json(), "protocol": theirs, "a new field": 1}
    with pytest.raises(ProtocolMismatch) as caught:
        verify(changed(sign(made(), private(key("ed25519"))), manifest=values), public(key("ed25519")))
    assert repr(theirs) in str(caught.value) and f"version {PROTOCOL}." in str(caught.value)


def test_a_manifest_of_another_protocol_is_refused_though_it_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = made().model_copy(update={"protocol": PROTOCOL + 1})
    signed = sign(newer, private(key("ed25519")))
    with pytest.raises(ProtocolMismatch):
        verify(signed, public(key("ed25519")))
    monkeypatch.setattr(module, "PROTOCOL", PROTOCOL + 1)
    assert verify(signed, public(key("ed25519"))).protocol == PROTOCOL + 1


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"[" * 10_000, b" " * (SIZE_LIMIT + 1),
        b'{"manifest":{},"digests":{},"algorithm":"ed25519"}',
        b'{"manifest":[],"digests":{},"algorithm":"ed25519","signature":""}',
        b'{"manifest":{},"digests":{},"algorithm":"ed25519","signature":""}',
        b'{"manifest":{"protocol":1},"digests":{},"algorithm":"ed25519","signature":"!"}',
        b'{"manifest":{"protocol":1},"digests":{},"algorithm":"none","signature":""}',
        b'{"manifest":{"protocol":1e999},"digests":{},"algorithm":"ed25519","signature":""}',
    ],
)  # fmt: skip
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        verify(data, public(key("ed25519")))


def test_a_signed_manifest_of_other_types_is_refused() -> None:
    """Signed by the right key, but not as a manifest is written."""
    values = {**made().to_json(), "quorum": "2"}
    digests = {name: sha256(value) for name, value in values.items()}
    signature = base64.b64encode(key("ed25519").sign(b"fedllm run manifest\n" + canonical(digests))).decode()
    data = {"manifest": values, "digests": digests, "algorithm": "ed25519", "signature": signature}
    with pytest.raises(ManifestError, match="not in the form"):
        verify(json.dumps(data).encode(), public(key("ed25519")))


def test_a_manifest_too_long_is_not_signed() -> None:
    with pytest.raises(ManifestError, match="bytes"):
        sign(made({**RECIPE, "about": "x" * SIZE_LIMIT}), private(key("ed25519")))


# --- keys and certificates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("root", KEYS)
def test_a_certificate_must_come_from_the_given_root(kind: str, root: str) -> None:
    signed, issuer = sign(made(), private(key(kind))), key(root, 2)
    leaf = certificate(key(kind), issuer=issuer)
    assert verify(signed, leaf, certificate(issuer, "root"), NOON) == made()
    for wrong in (certificate(key(root, 3), "root"), certificate(issuer, "another root")):
        with pytest.raises(BadSignature, match="not issued"):
            verify(signed, leaf, wrong, NOON)


def test_the_name_in_the_certificate_is_the_coordinator() -> None:
    signed = sign(made(), private(key("rsa-2048")))
    with pytest.raises(BadSignature, match=r"'site-1'.*'admin@hub\.org'"):
        verify(signed, certificate(key("rsa-2048"), "site-1"), now=NOON)
    with pytest.raises(BadSignature, match="common names"):
        verify(signed, certificate(key("rsa-2048"), None), now=NOON)


def test_a_certificate_is_valid_from_its_first_to_its_last_second() -> None:
    signed, leaf = sign(made(), private(key("ed25519"))), certificate(key("ed25519"))
    second, day = timedelta(seconds=1), timedelta(days=1)
    for now in (NOON - day, NOON + day, (NOON + day).astimezone(timezone(timedelta(hours=9)))):
        assert verify(signed, leaf, now=now) == made()
    for now in (NOON - day - second, NOON + day + second):
        with pytest.raises(BadSignature, match="not valid at"):
            verify(signed, leaf, now=now)
    with pytest.raises(BadSignature, match="not valid at"):
        verify(signed, leaf)  # at the present, in another year
    issued = certificate(key("ed25519"), issuer=key("rsa-2048"), days=(-9, 9))
    with pytest.raises(BadSignature, match="CN=root"):
        verify(signed, issued, certificate(key("rsa-2048"), "root"), NOON + 2 * day)


def test_a_key_with_a_password() -> None:
    locked = private(key("ecdsa-p256"), b"secret")
    assert verify(sign(made(), locked, b"secret"), public(key("ecdsa-p256"))) == made()
    for password in (None, b"wrong"):
        with pytest.raises(ConfigError, match="private key"):
            sign(made(), locked, password)


@pytest.mark.parametrize(
    "weak",
    [
        lambda: rsa.generate_private_key(65537, 1024),
        lambda: ec.generate_private_key(ec.SECP224R1()),
        lambda: dsa.generate_private_key(2048),
        x25519.X25519PrivateKey.generate,
    ],
)
def test_weak_keys_and_other_kinds_are_refused(weak: Callable[[], Any]) -> None:
    one = weak()
    with pytest.raises(ConfigError):
        sign(made(), private(one))
    with pytest.raises(ConfigError):
        verify(sign(made(), private(key("ed25519"))), public(one))


@pytest.mark.parametrize("pem", [b"", b"key", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        verify(sign(made(), private(key("ed25519"))), pem)
    with pytest.raises(ConfigError, match="cannot be read"):
        sign(made(), pem)
    with pytest.raises(ConfigError, match="root"):
        verify(sign(made(), private(key("ed25519"))), public(key("ed25519")), certificate(key("ed25519")))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(MissingExtra, match=r"fedllm\[secagg\]"):
        sign(made(), b"")


def test_importing_loads_neither_torch_nor_cryptography() -> None:
    code = (
        "import sys, fedllm.sites.audit, fedllm.sites.policy, fedllm.sites.manifest;"
        "print([m for m in ('torch', 'cryptography', 'nvflare', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

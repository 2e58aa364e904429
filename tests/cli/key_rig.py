"""Networks with keys of participants' own: what the tests of keys share."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedllm.deploy.authority import Authority
from fedllm.deploy.kit import Kit
from fedllm.deploy.request import Request
from tests.cli.across import free_port, values
from tests.cli.lines import as_json, ok

EVE = "eve@north.org"
ORGANISATION = {"north": "north_clinic", "south": "south_clinic", "west": "west_clinic", EVE: "north_clinic"}


def network(**changes: Any) -> dict[str, Any]:
    """North and Eve keep their own keys."""
    found = values(free_port(), **changes)
    found["sites"]["north"]["key"] = "own"
    found["coordinators"][EVE] = {"organisation": "north_clinic", "role": "lead", "key": "own"}
    return found


def signed(place: Path, name: str = "north", *words: Any) -> Path:
    request = Request.of(place / name / f"{name}.csr")
    line = ["deploy", "sign", request.file, "--folder", place / "net", "--fingerprint", request.fingerprint, *words]
    return Path(as_json(*line)["packages"][0]["package"])


def installed(place: Path, name: str = "north") -> Kit:
    package, root = signed(place, name), Authority.of(place / "net").fingerprint
    ok("deploy", "install", package, "--folder", place / name, "--authority", root)
    return Kit.of(place / name)


def csr(key: Any, name: str = "north", organisation: str = "north_clinic", digest: Any = None, **more: str) -> bytes:
    """A request of any kind."""
    words = {NameOID.COMMON_NAME: name, NameOID.ORGANIZATION_NAME: organisation}
    if more:
        words[NameOID.UNSTRUCTURED_NAME] = more["role"]
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in words.items()])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, digest or hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def changed(pem: bytes) -> bytes:
    """Another name in a request, under the same signature."""
    body = base64.b64decode("".join(pem.decode().splitlines()[1:-1])).replace(b"north", b"morth", 1)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(body) + b"-----END CERTIFICATE REQUEST-----\n"


KEYS: dict[str, Any] = {
    "good": rsa.generate_private_key(65537, 2048),
    "long": rsa.generate_private_key(65537, 3072),
    "three": rsa.generate_private_key(3, 2048),
    "curve": ec.generate_private_key(ec.SECP256R1()),
}

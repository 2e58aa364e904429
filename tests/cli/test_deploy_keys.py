"""request, sign, install, renew: keys that stay where they are, every refusal on the way, and certificates in time."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedllm.core.errors import ConfigError
from fedllm.deploy import certificates, checkup
from fedllm.deploy.authority import Authority
from fedllm.deploy.kit import Kit
from fedllm.deploy.package import Facts, Package
from fedllm.deploy.request import Request
from fedllm.deploy.term import Term
from fedllm.engine.nvflare import kits
from tests.cli.across import ADMIN, contents, rows, write
from tests.cli.key_rig import EVE, KEYS, ORGANISATION, changed, csr, installed, network, signed
from tests.cli.lines import as_json, invoke, ok


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and requests of north and Eve; nothing is signed yet."""
    place = tmp_path_factory.mktemp("keys")
    told = as_json("deploy", "provision", write(place / "sites.yaml", network()), "--folder", place / "net")
    assert told["own"] == told["waiting"] == [EVE, "north"]
    for name in ("north", EVE):
        ok("deploy", "request", name, "--organisation", ORGANISATION[name], "--folder", place / name)
    return place


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    """A copy of that, to be changed."""
    return shutil.copytree(first, tmp_path / "here")


def refused(*words: Any) -> str:
    result = invoke("deploy", *words)
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    return " ".join(result.stderr.split())


# --- request ---------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_nobody_else_can_read_it(place: Path) -> None:
    folder = place / "north"
    key = folder / "startup" / "client.key"
    assert oct(key.stat().st_mode)[-3:] == "600" and oct(folder.stat().st_mode)[-3:] == "700"
    before, asked = key.read_bytes(), Request.of(folder / "north.csr")
    again = as_json("deploy", "request", "north", "--organisation", "north_clinic", "--folder", folder)
    assert key.read_bytes() == before and again["fingerprint"] == asked.fingerprint
    for file in (place / "net").rglob("*"):
        assert not file.is_file() or before.splitlines()[1] not in file.read_bytes(), "the key is at the site alone"


@pytest.mark.parametrize(
    ("name", "organisation", "folder", "text"),
    [
        ("no site", "x", "new", "'no site' is neither a name of a site nor an e-mail address."),
        ("../x", "x", "new", "'../x' is neither"),
        ("north", "north clinic", "new", "The organisation 'north clinic' cannot be used."),
        ("south", "x", "north", "holds the key of 'north'."),
        ("south", "x", "net", "is not empty, and no kit."),
        ("localhost", "hub", "net/kits/localhost", "is the kit of a server."),
        ("west", "x", "net/kits/south", "is the kit of 'south'."),
    ],
)
def test_a_request_that_makes_no_sense_is_not_made(
    name: str, organisation: str, folder: str, text: str, place: Path
) -> None:
    before = contents(place)
    said = refused("request", name, "--organisation", organisation, "--folder", place / folder)
    assert text in said, said
    assert contents(place) == before


# --- sign ------------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "curve": (lambda: csr(KEYS["curve"]), "is a ECPublicKey. Allowed: RSA with 2048 bits"),
    "long": (lambda: csr(KEYS["long"]), "has 3072 bits and the exponent 65537."),
    "exponent": (lambda: csr(KEYS["three"]), "has 2048 bits and the exponent 3."),
    "hash": (lambda: csr(KEYS["good"], digest=hashes.SHA224()), "is signed with sha224."),
    "changed": (lambda: changed(csr(KEYS["good"])), "is not signed with its own key: it was changed."),
    "role": (lambda: csr(KEYS["good"], role="project_admin"), "says: name, organisation, role."),
    "server": (lambda: csr(KEYS["good"], "localhost", "hub"), "'localhost' is the server."),
    "unknown": (lambda: csr(KEYS["good"], "narth"), "There is no participant 'narth'."),
    "made": (lambda: csr(KEYS["good"], "south", "south_clinic"), "The key of 'south' was made with its kit."),
    "organisation": (lambda: csr(KEYS["good"], organisation="evil"), "is of the organisation 'evil'."),
    "text": (lambda: b"hello", "is no request in PEM"),
    "size": (lambda: b"x" * 30_000, "is too long for a request."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_is_not_right_is_not_signed(case: str, first: Path, tmp_path: Path) -> None:
    make, text = BAD[case]
    file = tmp_path / "a.csr"
    file.write_bytes(make())
    before = contents(first)
    given = certificates.fingerprint(KEYS["good"].public_key())
    said = refused("sign", file, "--folder", first / "net", "--fingerprint", given, "--replace")
    assert text in said, said
    assert contents(first) == before


def test_bytes_that_were_changed_anywhere_end_as_an_error_of_ours(first: Path, tmp_path: Path) -> None:
    rng, file = random.Random(5), tmp_path / "a.csr"
    body = base64.b64decode("".join((first / "north/north.csr").read_text().splitlines()[1:-1]))
    for _ in range(400):
        bad = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 20))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        text = base64.encodebytes(bytes(bad[: rng.choice((len(bad), rng.randrange(len(bad))))]))
        for word in (b"CERTIFICATE REQUEST", b"CERTIFICATE"):
            pem = b"-----BEGIN " + word + b"-----\n" + text + b"-----END " + word + b"-----\n"
            file.write_bytes(pem)
            if bytes(bad) != body:
                with pytest.raises(ConfigError):
                    Request.of(file)
                with pytest.raises(ConfigError):
                    certificates.certificate(pem, "it")


def test_nothing_is_signed_before_somebody_has_compared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, line = place / "north" / "north.csr", ["sign", place / "north" / "north.csr", "--folder", place / "net"]
    shown = Request.of(file).fingerprint
    assert f"Nobody compared the fingerprint. north (north_clinic): {shown}" in refused(*line)
    assert "The one given is another: AB:AB" in refused(*line, "--fingerprint", "AB" * 32)
    assert "'AB:CD' is no fingerprint." in refused(*line, "--fingerprint", "AB:CD")
    assert not (place / "net" / "packages").exists()
    monkeypatch.setattr("fedllm.cli.deploy.keys._terminal", lambda: True)
    no = invoke("deploy", *line, input="n\n")
    assert no.exit_code == 2 and shown in no.stderr and not (place / "net" / "packages").exists()
    yes = invoke("deploy", *line, input="y\n")
    assert yes.exit_code == 0 and (place / "net" / "packages" / "north.json").is_file()
    assert invoke("deploy", *line).exit_code == 0, "the same key once more: there is nothing to compare"


def test_another_key_for_the_same_name_has_to_be_asked_for(place: Path, tmp_path: Path) -> None:
    signed(place)
    ok("deploy", "request", "north", "--organisation", "north_clinic", "--folder", tmp_path / "other" / "north")
    line = ["sign", tmp_path / "other" / "north" / "north.csr", "--folder", place / "net"]
    assert "'north' has a certificate for another key" in refused(*line)
    given = Request.of(line[1]).fingerprint.lower().replace(":", " ")
    done = invoke("deploy", *line, "--replace", "--fingerprint", given)
    assert done.exit_code == 0 and "revoke north, and give the participant a new name" in done.stderr
    assert "'north' has a certificate for another key" in refused("sign", place / "north/north.csr", *line[2:])
    assert "Two requests are of 'north'" in refused("sign", place / "north/north.csr", *line[1:], "--replace")


def test_a_key_of_another_participant_is_not_signed(place: Path, tmp_path: Path) -> None:
    signed(place)
    key = serialization.load_pem_private_key((place / "north/startup/client.key").read_bytes(), None)
    (tmp_path / "eve.csr").write_bytes(csr(key, EVE))
    said = refused("sign", tmp_path / "eve.csr", "--folder", place / "net")
    assert f"The request of '{EVE}' is for the key of 'north'." in said


def test_a_certificate_is_made_as_flare_makes_them(place: Path) -> None:
    installed(place)
    mine, theirs = (
        x509.load_pem_x509_certificate((place / kit / "startup" / "client.crt").read_bytes())
        for kit in ("north", "net/kits/south")
    )
    assert [one.oid for one in mine.subject] == [one.oid for one in theirs.subject]
    assert mine.issuer == theirs.issuer and mine.serial_number != theirs.serial_number
    assert [(e.oid, e.critical) for e in mine.extensions] == [(e.oid, e.critical) for e in theirs.extensions]
    assert mine.not_valid_after_utc - mine.not_valid_before_utc == timedelta(days=kits.DAYS)
    from nvflare.lighter.utils import load_crt, verify_cert_chain

    verify_cert_chain(mine, [], load_crt(str(place / "net/kits/south/startup/rootCA.pem")))
    eve = installed(place, EVE)
    said = certificates.subject(x509.load_pem_x509_certificate(eve.certificate.read_bytes()).subject, "it")
    assert said == {"name": EVE, "organisation": "north_clinic", "role": "lead"}


# --- install ---------------------------------------------------------------------------------------------------------


def test_a_kit_of_ones_own_key_is_like_any_other(place: Path) -> None:
    kit = installed(place)
    other = place / "net" / "kits" / "south"
    mine, theirs = contents(kit.folder), contents(other)
    assert set(mine) - {"north.csr"} == set(theirs)
    for name in set(theirs) - {"startup/client.crt", "startup/client.key"}:
        assert mine[name] == theirs[name].replace(b"south", b"north"), name
    for name in ("start.sh", "sub_start.sh"):
        assert (kit.folder / "startup" / name).stat().st_mode == (other / "startup" / name).stat().st_mode
    assert kit == Kit.of(kit.folder, "site") and kit.name == "north" and kit.in_time() is None
    eve = installed(place, EVE)
    assert eve.kind == "coordinator" and set(contents(eve.folder)) - {f"{EVE}.csr"} == set(
        contents(place / "net" / "kits" / ADMIN)
    )


def test_an_authority_is_never_trusted_in_silence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, root = signed(place), Authority.of(place / "net").fingerprint
    line = ["install", package, "--folder", place / "north"]
    assert "Nobody compared the fingerprint." in refused(*line) and root in refused(*line)
    assert "That is not the one given." in refused(*line, "--authority", "00" * 32)
    assert not (place / "north/startup/rootCA.pem").exists()
    monkeypatch.setattr("fedllm.cli.deploy.keys._terminal", lambda: True)
    assert invoke("deploy", *line, input="n\n").exit_code == 2
    assert not (place / "north/startup/rootCA.pem").exists()
    assert invoke("deploy", *line, input="y\n").exit_code == 0
    assert invoke("deploy", *line).exit_code == 0, "a kit knows its authority"
    assert "holds a key and no certificate yet" in refused("status", "--kit", place / EVE)


def lie(package: Path, key: bytes | None = None, **changes: Any) -> Path:
    """A package that says something else: under the old signature, or signed with a key."""
    told = json.loads(package.read_text())
    told["package"] |= changes
    if key is None:
        package.write_text(json.dumps(told))
        return package
    return Package.signed(Facts.model_validate(told["package"]), key).write(package)


def test_a_package_that_is_not_right_is_not_installed(place: Path, tmp_path: Path) -> None:
    package, root = signed(place), Authority.of(place / "net").fingerprint
    other = tmp_path / "other"
    ok("deploy", "provision", write(tmp_path / "o.yaml", network()), "--folder", other)
    key = kits.authority(place / "net" / "authority", "trio").key
    theirs = kits.authority(other / "authority", "trio")
    south = (place / "net/kits/south/startup/client.crt").read_text()
    good, before = package.read_bytes(), contents(place / "north")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: lie(package, host="elsewhere.org"), "was changed after it was signed"),
        (lambda: lie(package, key, certificate=south), "and its certificate says another"),
        (lambda: lie(package, key, role="project_admin"), "and its certificate says another"),
        (lambda: lie(package, key, kind="coordinator", role=None), "cannot be the name of a coordinator"),
        (lambda: lie(package, key, host="north"), "cannot be the name of a site"),
        (lambda: lie(package, theirs.key), "was changed after it was signed"),
        (lambda: lie(package, theirs.key, authority=theirs.certificate.decode()), "has not signed its certificate"),
        (lambda: lie(package, files={"startup/start.sh": "rm -rf /"}), "package.files"),
        (lambda: lie(package, host="a/../../b"), "a/../../b"),
        (lambda: package.write_text("{}"), "is no package"),
        (lambda: package.write_text(good.decode()[:-2] + ',"start.sh":"x"}'), "holds 'start.sh' as well"),
        (lambda: package.write_text('{"package":1,"package":2}'), "is no package"),
        (lambda: package.write_text("x" * 70_000), "is too long"),
    ]
    for make, text in cases:
        package.write_bytes(good)
        make()
        said = refused("install", package, "--folder", place / "north", "--authority", root)
        assert text in said, (text, said)
        assert contents(place / "north") == before, text


def test_a_package_is_for_one_key(place: Path, tmp_path: Path) -> None:
    package, root = signed(place), Authority.of(place / "net").fingerprint
    line = ["--authority", root, "--folder"]
    assert "is not for the key in" in refused("install", package, *line, place / EVE)
    assert "is not for the key in" in refused("install", package, *line, place / "net/kits/south")
    assert "holds no private key" in refused("install", package, *line, tmp_path / "nothing")
    term = certificates.term(Package.of(package).certificate)
    for now, text in ((term.begin - timedelta(hours=2), "clock"), (term.end, "ended at")):
        with pytest.raises(ConfigError, match=text):
            Package.of(package).fits(place / "north", now)


# --- renew -----------------------------------------------------------------------------------------------------------


def test_a_certificate_is_renewed_for_the_same_key(place: Path) -> None:
    kit = Kit.of(place / "net" / "kits" / "south")
    before, old = contents(kit.folder), kit.term()
    told = as_json("deploy", "renew", "south", "localhost", "--folder", place / "net")
    assert [one["name"] for one in told["packages"]] == ["south", "localhost"]
    assert contents(kit.folder) == before, "kits that were handed out are not written"
    for one, name in zip(told["packages"], ("south", "localhost"), strict=True):
        assert b"PRIVATE" not in Path(one["package"]).read_bytes()
        ok("deploy", "install", one["package"], "--folder", place / "net" / "kits" / name)
    now = contents(kit.folder)
    assert {name for name in now if now[name] != before.get(name)} == {"startup/client.crt"}
    assert kit.term().end >= old.end and kit.tls() is not None
    state = kits.authority(place / "net" / "authority", "trio")
    assert state.issued["south"] == now["startup/client.crt"]
    server = x509.load_pem_x509_certificate((place / "net/kits/localhost/startup/server.crt").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    ok("deploy", "add-site", "east", "--organisation", "east", "--folder", place / "net")
    assert (place / "net/kits/east/startup/rootCA.pem").read_bytes() == now["startup/rootCA.pem"]


def test_an_own_key_is_renewed_by_its_request(place: Path) -> None:
    kit = installed(place)
    first = kit.certificate.read_bytes()
    assert "'north' keeps its own key." in refused("renew", "north", "--folder", place / "net")
    assert "There is no participant 'sauth'." in refused("renew", "sauth", "--folder", place / "net")
    ok("deploy", "request", "north", "--organisation", "north_clinic", "--folder", kit.folder)
    ok("deploy", "sign", kit.folder / "north.csr", "--folder", place / "net")
    ok("deploy", "install", place / "net/packages/north.json", "--folder", kit.folder)
    assert kit.certificate.read_bytes() != first
    listed = as_json("deploy", "renew", "--folder", place / "net")["certificates"]
    assert [one["name"] for one in listed] == ["localhost", ADMIN, "north", "south", "west", "authority"]
    assert {one["state"] for one in listed} == {"good"}


def test_a_package_changes_nothing_else_in_a_kit(place: Path, tmp_path: Path) -> None:
    kit = installed(place)
    package, key = signed(place), kits.authority(place / "net" / "authority", "trio").key
    old = place / "net" / "packages" / "older.json"
    good = package.read_bytes()
    for changes, text in (({"port": 9}, "The server of"), ({"network": "duo"}, "The network of")):
        package.write_bytes(good)
        assert text in refused("install", lie(package, key, **changes), "--folder", kit.folder)
    old.write_bytes(good)
    later = datetime.now(UTC) + timedelta(days=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kit, "term", lambda self, now=None: Term(later, later, later))
        assert "The package is older than the kit" in refused("install", old, "--folder", kit.folder)


def test_no_certificate_outlives_its_authority(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks from before authorities were good for ten years go on, up to their end."""
    monkeypatch.setattr(kits, "ROOT_DAYS", 200)
    file = write(tmp_path / "s.yaml", network())
    ok("deploy", "provision", file, "--folder", tmp_path / "net")
    monkeypatch.undo()
    ok("deploy", "add-site", "east", "--organisation", "east", "--folder", tmp_path / "net")
    done = invoke("deploy", "renew", "east", "--folder", tmp_path / "net")
    assert done.exit_code == 0 and "The authority ends at the same time" in done.stderr
    authority = Authority.of(tmp_path / "net")
    assert authority.terms()["east"].end == authority.terms()["authority"].end
    real = datetime.now(UTC)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return real + timedelta(days=201)

    monkeypatch.setattr(kits, "datetime", Later)
    assert "The authority's certificate ended on" in refused("renew", "east", "--folder", tmp_path / "net")


def test_whose_key_it_is_cannot_change(place: Path) -> None:
    found = network()
    found["server"]["port"] = Authority.of(place / "net").network.server.port
    found["sites"]["north"]["key"] = "made"
    said = refused("provision", write(place / "s.yaml", found), "--folder", place / "net")
    assert "The key of 'north' was own and is made." in said and "revoke 'north'" in said
    made = as_json("deploy", "add-site", "east", "--own-key", "--organisation", "east", "--folder", place / "net")
    assert "east" in made["waiting"] and not (place / "net/kits/east").exists()


# --- in time ---------------------------------------------------------------------------------------------------------


def test_an_end_is_spoken_of_in_time_and_stops_a_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, made = installed(place), Kit.of(place / "net" / "kits" / "south")
    term = made.term()
    assert made.in_time(term.end - timedelta(days=31)) is None
    said = made.in_time(term.end - timedelta(days=12, hours=1)) or ""
    assert f"ends in 12 days, at {term.end:%Y-%m-%d %H:%M} UTC." in said and "fedllm deploy renew south" in said
    assert "north.csr" in (own.in_time(own.term().end - timedelta(hours=1)) or "")
    with pytest.raises(ConfigError, match=r"begins at .* UTC, and here it is .* UTC\. The clock .* is behind"):
        made.in_time(term.begin - timedelta(minutes=1))
    with pytest.raises(ConfigError, match=r"ended at .*fedllm deploy renew south"):
        made.in_time(term.end)
    assert checkup.clock(made, term.end).verdict == "problem"
    real = Kit.term
    for days, texts in ((3, ("ends in 3 days", "does not answer")), (-3, ("ended at",))):
        now = term.end - timedelta(days=days, hours=1)
        monkeypatch.setattr(Kit, "term", lambda self, _=None, now=now: real(self, now))
        for words in (["status", "--kit", place / "net/kits" / ADMIN], ["start", place / "net/kits/localhost"]):
            if words[0] == "start" and days > 0:
                continue  # it would start
            result = invoke("deploy", *words)
            assert result.exit_code and all(text in result.stderr for text in texts), result.output
    result = invoke("join", made.folder, "--data", rows(place / "rows.jsonl"), "--check")
    assert result.exit_code == 1 and "a new certificate: fedllm deploy renew south" in " ".join(result.stdout.split())


def test_whoever_has_no_terminal_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.cli.deploy import keys

    monkeypatch.setattr(sys, "stdin", None)
    assert keys._terminal() is False

"""Kits - certificates and settings of every participant, and the policies that FLARE does not set by itself.

A kit comes with a list of classes that jobs may name: exactly fedllm's two. No role may send code or run commands at a
site, logs stay where they are written, and the server's jobs lie in its kit and not in a folder that others can read.

A participant may keep its own key: :func:`startup` makes its kit without certificates, from FLARE's templates on its
own machine, and :func:`issue` signs its public key as FLARE's provisioning signs those that it makes. FLARE's own way
for that (`nvflare cert`, `nvflare package`) writes other subjects and extensions, into archives of its own.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, MissingExtra
from fedllm.engine import durable
from fedllm.engine.nvflare.facts import NAME
from fedllm.engine.nvflare.job import ALLOWED

FORBIDDEN = ("byoc", "shell_commands", "server-predeployed-flwr")
"""Rights that nobody has at any participant: code inside a job, commands of an operator, jobs of another framework."""
WARDEN = "fedllm.engine.nvflare.warden.Warden"
"""Goes on with runs by itself, in the server's own process; no job may name it."""
OURS = "fedllm_warden"
"""Its id among the server's components."""
SCHEDULE = {"max_jobs": 1, "max_schedule_count": 100, "min_schedule_interval": 2.0, "max_schedule_interval": 15.0}
"""One run at a time, as an audit log has one writer; others wait."""
KEY_BITS = 2048
"""Length of every RSA key: FLARE's encrypted messages have 256 bytes for a signature, and no other key fits."""
DAYS = 360
"""Days that a certificate is good, as FLARE's provisioning has it."""
ROOT_DAYS = 3650
"""Days that the certificate of a new authority is good: no certificate outlives it, so that it bounds all renewals."""
BEFORE = ".before"
"""Ending of the authority's file as it was, while FLARE writes it anew."""
FILES = (
    ("workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
    ("static_file.StaticFileBuilder", {"config_folder": "config"}),
)
"""What makes a kit without certificates."""


@dataclass(frozen=True)
class Network:
    """Who takes part.

    Attributes:
        name: the project's name.
        server: host name under which the sites reach the server.
        port: the server's only port, for sites and administrators.
        sites: site -> its organisation.
        admins: e-mail address -> (organisation, role); roles: project_admin, org_admin, lead, member.
        organisation: the server's organisation.
    """

    name: str
    server: str
    port: int
    sites: Mapping[str, str]
    admins: Mapping[str, tuple[str, str]]
    organisation: str = "hub"

    def to_project(self, root_days: int | None = None) -> dict[str, Any]:
        """The content of FLARE's project.yml; without certificates where `root_days` is None."""
        server = {"name": self.server, "type": "server", "org": self.organisation, "fed_learn_port": self.port}
        clients = [{"name": site, "type": "client", "org": org} for site, org in self.sites.items()]
        admins = [{"name": who, "type": "admin", "org": o, "role": role} for who, (o, role) in self.admins.items()]
        signing = [("cert.CertBuilder", {"root_valid_days": root_days}), ("signature.SignatureBuilder", {})]
        used = [*FILES, *(signing if root_days is not None else ())]
        builders = [{"path": f"nvflare.lighter.impl.{path}", "args": dict(args)} for path, args in used]
        facts = {"api_version": 3, "name": self.name, "description": "fedllm"}
        return {**facts, "participants": [server, *clients, *admins], "builders": builders}


def provision(network: Network, folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Make the kits of all participants; the certificate authority lies in `folder` and is used again next time.

    Args:
        network: who takes part.
        folder: where kits and the authority's key are written.
        facts: participant -> the content of its `local/fedllm.json`; see :mod:`fedllm.engine.nvflare.facts`.

    Returns:
        Participant -> its kit.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    with _safe(_state_file(folder, network.name)):
        project = network.to_project(_root_days(folder, network.name))
        durable.write(folder / "project.yml", yaml.safe_dump(project, sort_keys=False).encode())
        kits = _made(network, project, folder)
    for name in (network.server, *network.sites):
        harden(kits[name], facts.get(name, {}))
    return kits


def startup(network: Network, folder: Path) -> dict[str, Path]:
    """Make the kits of all participants without keys and certificates, in an empty `folder`; see :func:`provision`."""
    return _made(network, network.to_project(), folder)


def _made(network: Network, project: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Have FLARE make what a project says."""
    try:
        from nvflare.lighter.prov_utils import prepare_builders
        from nvflare.lighter.provision import prepare_project
        from nvflare.lighter.provisioner import Provisioner
    except ImportError:
        raise MissingExtra("nvflare", "nvflare", "A run across sites") from None
    try:
        checked = prepare_project(project)
    except ValueError as fault:  # a name that FLARE's certificates cannot carry
        raise ConfigError(f"FLARE refuses the network '{network.name}': {fault}.") from fault
    made = Provisioner(str(folder), prepare_builders(project), None).provision(checked)
    place = Path(str(made.get_result_location()))
    kits = {name: place / name for name in (network.server, *network.sites, *network.admins)}
    missing = [name for name, kit in kits.items() if not kit.is_dir()]
    if missing:
        raise ConfigError(f"FLARE made no kit for '{missing[0]}'.", f"Its reasons may be in {folder}.")
    return kits


# --- the authority ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """The certificate authority of a network.

    Attributes:
        certificate: its own, in PEM.
        key: its private key, in PEM.
        issued: participant whose key was made here -> its certificate, in PEM.
    """

    certificate: bytes
    key: bytes
    issued: Mapping[str, bytes]


def authority(folder: Path, network: str) -> Authority:
    """The authority that :func:`provision` made in `folder`; raises :class:`ConfigError` where there is none."""
    state = _state(folder, network)
    try:
        issued = {name: one["cert"].encode() for name, one in state.items() if isinstance(one, dict)}
        return Authority(state["root_cert"].encode(), state["root_pri_key"].encode(), issued)
    except (LookupError, TypeError, AttributeError) as fault:
        raise ConfigError(
            f"{_state_file(folder, network)} holds no authority: {type(fault).__name__}.",
            action="Name the folder in which 'fedllm deploy provision' was given.",
        ) from None


def keep(folder: Path, network: str, name: str, certificate: bytes) -> None:
    """Put a participant's new certificate in the place of its former one, so that its next kit bears it."""
    state = _state(folder, network)
    state[name] = {**state[name], "cert": certificate.decode()}
    durable.write(_state_file(folder, network), json.dumps(state).encode(), durable.OWN)


def issue(
    by: Authority, name: str, organisation: str, public_key: Any, *, role: str | None = None, host: str | None = None
) -> bytes:
    """A certificate as FLARE's provisioning makes it (`nvflare.lighter.impl.cert`), in PEM.

    Args:
        by: who signs.
        name: of the participant.
        organisation: of the participant.
        public_key: of the participant, an object of `cryptography`.
        role: of a coordinator; None: another participant.
        host: under which the server is reached; None: another participant.

    Raises:
        ConfigError: the authority's own certificate has ended.
    """
    try:
        from cryptography.x509.oid import NameOID
        from nvflare.lighter import utils
    except ImportError:
        raise MissingExtra("nvflare", "nvflare", "A run across sites") from None
    root = utils.load_crt_bytes(by.certificate)
    now = datetime.now(UTC)
    if now >= root.not_valid_after_utc:
        raise ConfigError(
            f"The authority's certificate ended on {root.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.",
            "No certificate outlives it.",
            action="Make a new network in another folder.",
        )
    issuer = root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    found = utils.generate_cert(
        subject=utils.Identity(name, organisation, role),  # type: ignore[arg-type]
        issuer=utils.Identity(str(issuer)),
        signing_pri_key=utils.load_private_key(by.key.decode()),
        subject_pub_key=public_key,
        server_default_host=host,
        not_valid_before=now,
        not_valid_after=min(now + timedelta(days=DAYS), root.not_valid_after_utc),
    )
    return bytes(utils.serialize_cert(found))


def _state_file(folder: Path, network: str) -> Path:
    """Where FLARE keeps the authority, and copies of the keys that it made."""
    return folder / network / "state" / "cert.json"


def _state(folder: Path, network: str) -> dict[str, Any]:
    file = _state_file(folder, network)
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as fault:
        raise ConfigError(
            f"The authority {file} cannot be read: {type(fault).__name__}.",
            action="Name the folder in which 'fedllm deploy provision' was given.",
        ) from None


@contextlib.contextmanager
def _safe(file: Path) -> Generator[None]:
    """Let FLARE write the authority's file, which it does in place: the former content stays until the new one is safe.

    Raises:
        ConfigError: what FLARE wrote is not whole, or has lost the authority's key.
    """
    before = file.with_name(file.name + BEFORE)
    if before.is_file() and _root_key(file) is None:
        before.replace(file)  # it was interrupted
    key, new = _root_key(file), not file.exists()
    if key is not None:
        _copy(file, before)
    try:
        yield
        if file.is_file():
            file.chmod(durable.OWN)
            durable.flush(file)
        if _root_key(file) is None or key not in (None, _root_key(file)):
            raise ConfigError(
                f"FLARE did not write {file} whole.",
                "What was there before is there again." if key is not None else "",
                action="Is the disk full? Make room, and provision again.",
            )
    except BaseException:
        if key is not None:
            before.replace(file)
        elif new and _root_key(file) is None:
            file.unlink(missing_ok=True)
        raise
    before.unlink(missing_ok=True)


def _copy(file: Path, to: Path) -> None:
    try:
        durable.write(to, file.read_bytes(), durable.OWN)
    except OSError as fault:
        raise ConfigError(
            f"The authority {file} cannot be copied: {fault.strerror}.",
            "Nothing was changed.",
            action="Is the disk full? Make room, and provision again.",
        ) from None


def _root_key(file: Path) -> str | None:
    """The authority's private key in FLARE's file; None where the file is not there or not whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["root_pri_key"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _root_days(folder: Path, network: str) -> int:
    """How long a new authority is good; of one that is there, how long it is: FLARE takes no other number."""
    if not _state_file(folder, network).is_file():
        return ROOT_DAYS
    try:
        from cryptography import x509
    except ImportError:
        raise MissingExtra("cryptography", "nvflare", "A run across sites") from None
    root = x509.load_pem_x509_certificate(authority(folder, network).certificate)
    return (root.not_valid_after_utc - root.not_valid_before_utc).days


# --- policies --------------------------------------------------------------------------------------------------------


def harden(kit: Path, facts: Mapping[str, Any]) -> None:
    """Write a server's or site's policies and its own file, where they are others, and keep the kit from other users.

    Raises:
        ConfigError: a file of the kit cannot be read, or the kit belongs to somebody else.
    """
    durable.own(kit)
    local = kit / "local"
    _rewrite(local, "resources.json", lambda found: _resources(found, kit))
    _rewrite(local, "authorization.json", _authorization)
    _put(local / NAME, dict(facts), 1)


def _rewrite(local: Path, name: str, change: Any) -> None:
    source = next((file for file in (local / name, local / f"{name}.default") if file.is_file()), None)
    if source is None:
        raise ConfigError(f"{local} has no {name}.", action="Provision again: the kit is not whole.")
    try:
        found = change(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as fault:
        raise ConfigError(
            f"{source} cannot be read: {type(fault).__name__}.", action="Restore the file, or get the kit again."
        ) from None
    _put(local / name, found, 2)


def _put(file: Path, value: Any, indent: int) -> None:
    """Write a file that does not say this already."""
    try:
        same = json.loads(file.read_text(encoding="utf-8")) == value
    except (OSError, ValueError):
        same = False
    if not same:
        durable.write(file, (json.dumps(value, indent=indent) + "\n").encode())


def _resources(found: dict[str, Any], kit: Path) -> dict[str, Any]:
    """The list of allowed classes, no streaming of logs, and the server's storage inside its kit."""
    dropped = ("site_log_streamer", "log_receiver", OURS)  # ours is put in again: kits are settled more than once
    components = [one for one in found["components"] if one["id"] not in dropped]
    result = {**found, "class_list_enforcement_mode": "enforce", "class_allow_list": list(ALLOWED)}
    result["components"] = components
    if "allow_log_streaming" in found:
        result["allow_log_streaming"] = False
    if "snapshot_persistor" in found:
        storage = found["snapshot_persistor"]["args"]["storage"]["args"]
        storage["root_dir"] = str(kit.resolve() / "storage" / "snapshots")
        for component in components:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(kit.resolve() / "storage" / "jobs")
            if component["id"] == "job_scheduler":
                component["args"] = dict(SCHEDULE)
        components.append({"id": OURS, "path": WARDEN, "args": {}})
    return result


def _authorization(found: dict[str, Any]) -> dict[str, Any]:
    """Every role without the rights that nobody has."""
    roles = {role: _rights(rights) for role, rights in found["permissions"].items()}
    return {**found, "permissions": roles}


def _rights(rights: Any) -> dict[str, Any]:
    """One role's rights, with 'any' spelled out."""
    every = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate")
    spelled = dict.fromkeys(every, rights) if isinstance(rights, str) else dict(rights)
    return {**spelled, **dict.fromkeys(FORBIDDEN, "none")}

"""Kits - certificates and settings of every participant, and the policies that FLARE does not set by itself.

A kit comes with a list of classes that jobs may name: exactly fedllm's two. No role may send code or run commands at a
site, logs stay where they are written, and the server's jobs lie in its kit and not in a folder that others can read.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, MissingExtra
from fedllm.engine.nvflare.facts import NAME
from fedllm.engine.nvflare.job import ALLOWED

FORBIDDEN = ("byoc", "shell_commands", "server-predeployed-flwr")
"""Rights that nobody has at any participant: code inside a job, commands of an operator, jobs of another framework."""
BUILDERS = (
    ("workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
    ("static_file.StaticFileBuilder", {"config_folder": "config"}),
    ("cert.CertBuilder", {}),
    ("signature.SignatureBuilder", {}),
)


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

    def to_project(self) -> dict[str, Any]:
        """The content of FLARE's project.yml."""
        server = {"name": self.server, "type": "server", "org": self.organisation, "fed_learn_port": self.port}
        clients = [{"name": site, "type": "client", "org": org} for site, org in self.sites.items()]
        admins = [{"name": who, "type": "admin", "org": o, "role": role} for who, (o, role) in self.admins.items()]
        builders = [{"path": f"nvflare.lighter.impl.{path}", "args": dict(args)} for path, args in BUILDERS]
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
    try:
        from nvflare.lighter.prov_utils import prepare_builders
        from nvflare.lighter.provision import prepare_project
        from nvflare.lighter.provisioner import Provisioner
    except ImportError:
        raise MissingExtra("nvflare", "nvflare", "A run across sites") from None
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    project = network.to_project()
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
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
    for name in (network.server, *network.sites):
        harden(kits[name], facts.get(name, {}))
    return kits


def harden(kit: Path, facts: Mapping[str, Any]) -> None:
    """Write a server's or site's policies and its own file."""
    local = kit / "local"
    _rewrite(local, "resources.json", lambda found: _resources(found, kit))
    _rewrite(local, "authorization.json", _authorization)
    (local / NAME).write_text(json.dumps(dict(facts), indent=1) + "\n", encoding="utf-8")


def _rewrite(local: Path, name: str, change: Any) -> None:
    source = next((file for file in (local / name, local / f"{name}.default") if file.is_file()), None)
    if source is None:
        raise ConfigError(f"{local} has no {name}.", action="Provision again: the kit is not whole.")
    found = change(json.loads(source.read_text(encoding="utf-8")))
    (local / name).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _resources(found: dict[str, Any], kit: Path) -> dict[str, Any]:
    """The list of allowed classes, no streaming of logs, and the server's storage inside its kit."""
    components = [one for one in found["components"] if one["id"] not in ("site_log_streamer", "log_receiver")]
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

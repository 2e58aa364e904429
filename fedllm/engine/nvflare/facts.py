"""Facts - what a site or a server says of itself: where its data lies, on what device, and what it refuses.

They are read from `local/fedllm.json` in the participant's own kit and never from a job, so that whoever submits a job
can choose a method and a seed, but neither which file is read nor which folder is loaded as a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fedllm.core.errors import ConfigError
from fedllm.core.settings import read

NAME = "fedllm.json"
"""The file in a kit's folder `local`."""


class SiteFacts(BaseModel):
    """A site's own file. Relative paths are relative to the kit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: dict[str, Any] = {}
    """The `data` section of a recipe, in place of the job's: where the rows lie and how they become clients."""
    client: str | None = Field(None, min_length=1)
    """All rows are one client with this id; null: data.partition says who the clients are."""
    device: str = "auto"
    """Where models run, in place of the job's model.device."""
    threads: int | None = Field(None, ge=1)
    """Threads of the worker; null: as many as there are cores."""
    processes: int = Field(1, ge=1)
    """Processes that share the clients of this site, in place of the job's `processes`; the threads are shared too."""
    models: dict[str, str] | None = None
    """Model names that a job may ask for, each with what is loaded for it here; null: any name, but no folder."""
    methods: list[str] | None = None
    """Methods that a job may ask for; null: any."""
    trust_remote_code: bool = False
    """Whether a job may run Python code that comes with a model."""
    policy: str | None = None
    """The site's policy, a YAML file (see :class:`fedllm.sites.policy.Policy`); null: nothing is allowed."""
    folder: str = "fedllm"
    """Where private stores, replies, manifests and the audit log (`audit.jsonl`) lie."""


class ServerFacts(BaseModel):
    """The server's own file. Relative paths are relative to the kit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runs: str = "fedllm/runs"
    """Folder in which a run's folder lies, named by its id; it outlives FLARE's job folders. The audit log
    (`audit.jsonl`) lies in the folder above it."""
    device: str = "auto"
    """Where the server's model runs."""
    models: dict[str, str] | None = None
    """Model names that a job may ask for, each with what is loaded for it here; null: any name, but no folder."""
    public: dict[str, Any] | None = None
    """`data.public` of a recipe: the rows that anybody may read, the same at every site."""
    trust_remote_code: bool = False
    """Whether a job may run Python code that comes with a model."""
    endpoints: dict[str, str | None] = {}
    """URLs at which a job may have a model asked from here, each with the environment variable of its key (null: none
    is sent); {}: none."""


def read_facts(kind: type[SiteFacts] | type[ServerFacts], kit: Path) -> Any:
    """A participant's own file; raises :class:`ConfigError` where there is none or it cannot be used."""
    file = kit / "local" / NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.", "It says where this participant's data lies.") from None
    except OSError as fault:
        raise ConfigError(
            f"{file} cannot be read: {fault.strerror}.", "It says where this participant's data lies."
        ) from None
    except ValueError as fault:
        raise ConfigError(f"{file} is not valid JSON: {fault}.") from None
    return read(kind, values, NAME)


def permitted(recipe: dict[str, Any], facts: SiteFacts) -> dict[str, Any]:
    """The job's recipe with this site's own data, device and models.

    Raises:
        ConfigError: a method, a model or foreign code that the site's file does not allow.
    """
    method = recipe.get("method", {})
    name = method if isinstance(method, str) else method.get("name", "fedavg")
    if facts.methods is not None and name not in facts.methods:
        raise ConfigError.unknown("method that this site allows", name, facts.methods)
    allowed = facts.models, facts.device, facts.trust_remote_code
    groups = {
        key: {**group, "model": own_model(group["model"], *allowed)} if group.get("model") else group
        for key, group in recipe.get("groups", {}).items()
    }
    model = own_model(recipe.get("model", {}), *allowed)
    own = {"data": facts.data, "processes": facts.processes}
    return {**recipe, **own, "model": model, "groups": groups, "tracking": {}}


def own_model(model: dict[str, Any], models: dict[str, str] | None, device: str, trust: bool) -> dict[str, Any]:
    """A `model` section of a job as it is loaded here; raises :class:`ConfigError` for what is not allowed."""
    if model.get("trust_remote_code") and not trust:
        raise ConfigError("The job asks for model.trust_remote_code, and it is not allowed here.")
    names = {key: loaded_name(model[key], models) for key in ("name", "tokenizer") if model.get(key)}
    return {**model, **names, "device": device}


def loaded_name(name: str, models: dict[str, str] | None) -> str:
    """What is loaded for a job's model name; raises :class:`ConfigError` for one that is not allowed."""
    if models is not None:
        if name not in models:
            raise ConfigError.unknown("model that is allowed here", name, models)
        return models[name]
    if name.startswith(("/", ".", "~")) or "\\" in name or Path(name).exists():
        raise ConfigError(f"The job names the folder '{name}' as its model.", "Folders are named by the site alone.")
    return name

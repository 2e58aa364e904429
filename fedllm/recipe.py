"""Recipe - one run, written down: YAML over typed defaults, `key=value` over both.

Defaults live in the typed settings of each part and in the fields of each method; a recipe is an overlay and never
their source. Unknown keys are refused with the nearest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError, nearest
from fedllm.core.settings import merge, read
from fedllm.data.settings import DataSettings
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.settings import ModelSettings
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.modes.secagg.settings import SecureSettings
from fedllm.modes.settings import CodecSettings
from fedllm.report.tracking import Tracking
from fedllm.tasks.settings import TaskSettings

BUNDLED = Path(__file__).parent / "recipes"
NAMED = ("method", "attack", "defence")
"""Sections that are a name with its options; a bare name may be given instead."""


class Evaluation(BaseModel):
    """What is measured, and against what."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every: int = Field(0, ge=0)
    """Measure the federation on held-out data every so many rounds; 0, and all it is compared with: at the end only."""
    clients: int | None = Field(None, ge=1)
    """Measure at this many clients (seeded choice); null for all."""
    against: list[Literal["base", "local", "central"]] = ["base", "local", "central"]
    """Models the federated one is compared with; each is trained with the same budget."""
    metric: str | None = None
    """The headline metric; the task's first one where null."""


class GroupSettings(BaseModel):
    """A kind of client: who, with which model, which adapter, on what device."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    share: float | None = Field(None, gt=0, le=1)
    """Share of the clients that no group names; the shares of all groups sum to 1."""
    clients: list[str] | None = None
    """Ids of its clients, in place of a share."""
    model: dict[str, Any] = {}
    """Options of `model` that differ from the recipe's; {} for the same model."""
    adapter: dict[str, Any] = {}
    """Options of `adapter` that differ; with the recipe's model only a smaller `rank`."""
    device: str = ""
    """The device class, for tables."""

    @model_validator(mode="after")
    def _one_way(self) -> GroupSettings:
        if (self.share is None) == (self.clients is None):
            raise ConfigError(
                f"A group has share={self.share} and clients={self.clients}.", "Exactly one of them says who is in it."
            )
        return self


class Recipe(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder."""
    about: str = ""
    """One sentence for the report."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    rounds: int = Field(10, ge=1)
    """Rounds of the federation."""
    cohort: int | float | Literal["all"] = "all"
    """Clients per round: a number, a share between 0 and 1, or all."""
    spare: int = Field(0, ge=0)
    """Clients that are asked beyond the cohort: the first answers that make up a cohort count, the others are not
    waited for. 0: none."""
    cohort_width: int | Literal["auto"] = "auto"
    """Clients that share a pass of the model; auto chooses by the device and the length of a step."""
    processes: int = Field(1, ge=1)
    """Processes of this machine that share the clients of a round. Each holds the model, on the next GPU where there
    are several, and has its share of the CPU's threads."""
    deadline: float | None = Field(None, gt=0)
    """Seconds a round waits for clients; null waits for all."""
    method: dict[str, Any] = {"name": "fedavg"}
    """The method's name and its options; a bare name may be given instead of a mapping."""
    train: dict[str, Any] = {}
    """Local training; over the method's own defaults."""
    methods: dict[str, dict[str, Any]] = {}
    """Options of other methods, used when one is compared; `train` inside overrides the recipe's."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained."""
    task: TaskSettings = TaskSettings()
    """What is learned."""
    groups: dict[str, GroupSettings] = {}
    """Kinds of clients with models, ranks or devices of their own; none: all clients are alike."""
    privacy: PrivacySettings | None = None
    """Differential privacy; null: none."""
    secure: SecureSettings | None = None
    """Secure aggregation; null: the server sees every upload."""
    encrypted: EncryptedSettings | None = None
    """Homomorphic encryption of uploads; null: none."""
    defence: dict[str, Any] = {}
    """A robust rule in place of the mean: its name and options; {}: none."""
    attack: dict[str, Any] = {}
    """What a share of the clients does to harm the run: its name and options; {}: nothing. For experiments."""
    codec: CodecSettings = CodecSettings()
    """How uploads are coded; as they are by default."""
    data: DataSettings = DataSettings()
    """Whose data."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""
    tracking: Tracking = Tracking()
    """TensorBoard, Weights & Biases or MLflow."""
    runs: str = "runs"
    """Folder in which run folders are made."""

    def cohort_size(self, clients: int) -> int:
        """How many of `clients` are asked in a round."""
        if self.cohort == "all":
            return clients
        if isinstance(self.cohort, float) and not self.cohort.is_integer():
            if not 0 < self.cohort < 1:
                raise _cohort(self.cohort, clients)
            return max(1, round(self.cohort * clients))
        if not 1 <= self.cohort <= clients:
            raise _cohort(self.cohort, clients)
        return int(self.cohort)

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, a bundled name, a mapping, or a recipe, with `key=value` overrides.

    Raises:
        ConfigError: no such recipe, not YAML, an unknown key or a value that cannot be used.
    """
    if isinstance(source, Recipe):
        values: dict[str, Any] = source.model_dump(mode="json")
    elif isinstance(source, dict):
        values = source
    else:
        values = _read_file(_path(source))
    values = _named(values)
    for text in overrides:
        given = _named(_override(text))
        for part in NAMED:
            if given.get(part, {}).get("name") not in (None, values.get(part, {}).get("name")):
                values = {**values, part: {}}  # another one: the options of the one before are not its own
        values = merge(values, given)
    return read(Recipe, values)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """`method: fedprox` is short for `method: {name: fedprox}`; attacks and defences, too."""
    bare = {part: values[part] for part in NAMED if isinstance(values.get(part), str)}
    return {**values, **{part: {"name": name} for part, name in bare.items()}}


def bundled() -> list[str]:
    """The names of the recipes that come with fedllm."""
    return sorted(file.stem for file in BUNDLED.glob("*.yaml"))


def _path(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    named = BUNDLED / f"{source}.yaml"
    if named.is_file():
        return named
    raise ConfigError(
        f"There is no recipe '{source}': neither a file nor a bundled name.",
        f"Bundled: {', '.join(bundled())}.",
        nearest(str(source), bundled()),
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        line = getattr(getattr(fault, "problem_mark", None), "line", None)
        place = f" (line {line + 1})" if line is not None else ""
        raise ConfigError(f"{path} is not valid YAML{place}: {getattr(fault, 'problem', fault)}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}.", "A recipe is a mapping of options.")
    return values


def _override(text: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"'{text}' is not an override.",
            "An override is key=value, for example train.lr=0.001.",
        )
    try:
        parsed = yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str):
        parsed = _number(parsed)
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def _number(text: str) -> str | float:
    """YAML reads 1e-3 as text; people mean a number."""
    try:
        return float(text) if "e" in text.lower() and text[0] in "+-.0123456789" else text
    except ValueError:
        return text


def _cohort(given: float, clients: int) -> ConfigError:
    return ConfigError(
        f"cohort={given} cannot be asked of {clients} clients.",
        f"Allowed: a whole number from 1 to {clients}, a share between 0 and 1, or all.",
        action="Set cohort to one of them.",
    )

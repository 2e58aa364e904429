"""Tracking - send a run's numbers to TensorBoard, Weights & Biases or MLflow while it goes on.

None is needed: everything stands in the run folder too. A tracker that cannot be opened is refused before training;
one that fails later is left out with a warning, so that a broken connection never costs a run. A resumed run goes on
in the same tracked run, whose ids are kept in tracking.json.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra

PARAMETER_LENGTH = 500
"""MLflow servers refuse longer parameter values; the whole recipe is sent as recipe.yaml too."""


class Tracking(BaseModel):
    """Where numbers are sent while a run goes on; nowhere by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tensorboard: bool = False
    """Write TensorBoard files into the run folder."""
    wandb: str | None = None
    """A Weights & Biases project; its own settings (WANDB_MODE=offline, ...) hold."""
    mlflow: str | None = None
    """An MLflow experiment; made where it does not exist."""
    mlflow_uri: str | None = None
    """The MLflow server; MLflow's own setting (MLFLOW_TRACKING_URI) where null. A database needs the whole mlflow."""


class Tracker(Protocol):
    """Takes numbers."""

    def log(self, values: dict[str, float], round: int) -> None:
        """Take the numbers of a round."""

    def close(self) -> None:
        """Send what is left."""


def require(settings: Tracking) -> None:
    """Raise :class:`MissingExtra` for a wanted tracker whose library is not installed; opens nothing."""
    wanted = {"tensorboard": settings.tensorboard, "wandb": settings.wandb, "mlflow": settings.mlflow}
    for name, value in wanted.items():
        if value and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise MissingExtra(name, name, f"tracking.{name}")


def open_trackers(settings: Tracking, folder: Path, recipe: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that are switched on.

    Args:
        settings: which ones.
        folder: the run folder; names the tracked run.
        recipe: the resolved recipe, sent along.

    Raises:
        MissingExtra: a library is not installed.
        ConfigError: a tracker cannot be opened: no login, no such server, a name it does not allow.
    """
    wanted = {"TensorBoard": settings.tensorboard, "Weights & Biases": settings.wandb, "MLflow": settings.mlflow}
    kinds = {"TensorBoard": _TensorBoard, "Weights & Biases": _Wandb, "MLflow": _Mlflow}
    opened: list[Tracker] = []
    try:
        for name, switched in wanted.items():
            if switched:
                opened.append(Guarded(name, _opened(name, kinds[name], settings, Path(folder), recipe)))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _opened(name: str, kind: Any, settings: Tracking, folder: Path, recipe: Mapping[str, Any]) -> Tracker:
    try:
        return kind(settings, folder, recipe)
    except FedLLMError:
        raise
    except Exception as fault:
        raise ConfigError(
            f"{name} cannot be opened: {str(fault).strip().rstrip('.')}.",
            action="Mend the cause, or switch it off in the section 'tracking'.",
        ) from fault


class Guarded:
    """A tracker that warns and takes no more once it has failed.

    Args:
        name: for the warning.
        tracker: takes the numbers.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self.broken = name, tracker, False

    def log(self, values: dict[str, float], round: int) -> None:
        """Hand on the numbers."""
        if not self.broken and values:
            self._try(lambda: self.tracker.log(values, round))

    def close(self) -> None:
        """Close it, also after a failure."""
        self._try(self.tracker.close)

    def _try(self, act: Any) -> None:
        try:
            act()
        except Exception as fault:
            self.broken = True
            text = f"{self.name} failed and gets no more numbers: {fault}. The run goes on; metrics.jsonl has them all."
            warnings.warn(text, stacklevel=3)


class _TensorBoard:
    """Event files in the run folder."""

    def __init__(self, settings: Tracking, folder: Path, recipe: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise MissingExtra("tensorboard", "tensorboard", "tracking.tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("recipe", "\n".join(f"    {line}" for line in _yaml(recipe).splitlines()))

    def log(self, values: dict[str, float], round: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of a project."""

    def __init__(self, settings: Tracking, folder: Path, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise MissingExtra("wandb", "wandb", "tracking.wandb") from None
        kept = _recall(folder, "wandb")
        going_on = {"id": kept, "resume": "allow"} if kept else {}
        self._run = wandb.init(
            project=settings.wandb, name=folder.name, dir=str(folder), config=dict(recipe), **going_on
        )
        _remember(folder, "wandb", self._run.id)

    def log(self, values: dict[str, float], round: int) -> None:
        self._run.log({**values, "round": round}, step=round)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of an experiment, through a client of its own: a run the user has open is left alone."""

    def __init__(self, settings: Tracking, folder: Path, recipe: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError:
            raise MissingExtra("mlflow-skinny", "mlflow", "tracking.mlflow") from None
        self._client = MlflowClient(tracking_uri=settings.mlflow_uri)
        self._run = _recall(folder, "mlflow")
        if self._run is None:
            found = self._client.get_experiment_by_name(settings.mlflow)
            experiment = found.experiment_id if found else self._client.create_experiment(settings.mlflow)
            self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            _remember(folder, "mlflow", self._run)
            for name, value in flat(recipe).items():
                self._client.log_param(self._run, name, str(value)[:PARAMETER_LENGTH])
            self._client.log_text(self._run, _yaml(recipe), "recipe.yaml")

    def log(self, values: dict[str, float], round: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=round)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def flat(recipe: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested options by dotted name; empty ones are left out."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping):
            found.update(flat(value, name))
        elif value not in (None, "", []):
            found[name] = value
    return found


def _recall(folder: Path, name: str) -> str | None:
    file = folder / "tracking.json"
    return json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None


def _remember(folder: Path, name: str, run: str) -> None:
    file = folder / "tracking.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**kept, name: run}) + "\n", encoding="utf-8")


def _yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)

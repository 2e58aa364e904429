from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedllm.core.errors import ConfigError, MissingExtra
from fedllm.report.tracking import Tracking, flat, open_trackers

RECIPE = {"name": "r", "train": {"lr": 0.1, "steps": 5}, "about": "", "data": {"path": None, "files": ["a"]}}


class Calls(list):
    """Records calls of the fake libraries."""

    def fake(self, name: str):
        return lambda *given, **named: self.append((name, given, named))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    for module in (_tensorboard(found), _wandb(found), _mlflow(found)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def _tensorboard(calls: Calls) -> types.ModuleType:
    module = types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls.append(("writer", (folder,), {}))
            self.add_scalar, self.add_text = calls.fake("scalar"), lambda *_: None
            self.close = calls.fake("writer closed")

    module.SummaryWriter = SummaryWriter
    return module


def _wandb(calls: Calls) -> types.ModuleType:
    module = types.ModuleType("wandb")

    def init(**named):
        calls.append(("init", (), named))
        return types.SimpleNamespace(
            id=named.get("id", "new-id"), log=calls.fake("wandb log"), finish=calls.fake("finish")
        )

    module.init = init
    return module


def _mlflow(calls: Calls) -> types.ModuleType:
    module = types.ModuleType("mlflow")

    class MlflowClient:
        def __init__(self, tracking_uri=None) -> None:
            calls.append(("client", (tracking_uri,), {}))
            for name in ("log_param", "log_text", "log_metric", "set_terminated"):
                setattr(self, name, calls.fake(name))

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            calls.append(("experiment", (name,), {}))
            return "7"

        def create_run(self, experiment, run_name):
            calls.append(("run", (experiment, run_name), {}))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))

    module.MlflowClient = MlflowClient
    return module


def test_nothing_is_tracked_by_default(tmp_path: Path) -> None:
    assert open_trackers(Tracking(), tmp_path, RECIPE) == []


def test_numbers_reach_all_three(calls: Calls, tmp_path: Path) -> None:
    settings = Tracking(tensorboard=True, wandb="project", mlflow="experiment", mlflow_uri="http://x")
    trackers = open_trackers(settings, tmp_path, RECIPE)
    assert len(trackers) == 3
    for tracker in trackers:
        tracker.log({"loss": 0.5}, 3)
        tracker.close()
    assert ("writer", (str(tmp_path / "tensorboard"),), {}) in calls
    assert ("scalar", ("loss", 0.5, 3), {}) in calls
    assert ("wandb log", ({"loss": 0.5, "round": 3},), {"step": 3}) in calls
    named = next(named for name, _, named in calls if name == "init")
    assert (named["project"], named["name"], named["config"]) == ("project", tmp_path.name, RECIPE)
    assert ("client", ("http://x",), {}) in calls
    assert ("experiment", ("experiment",), {}) in calls
    assert ("log_metric", ("run-1", "loss", 0.5), {"step": 3}) in calls
    assert ("log_param", ("run-1", "train.lr", "0.1"), {}) in calls
    assert {"writer closed", "finish", "set_terminated"} <= {name for name, _, _ in calls}


def test_a_resumed_run_goes_on_in_the_same_tracked_run(calls: Calls, tmp_path: Path) -> None:
    settings = Tracking(wandb="p", mlflow="e")
    open_trackers(settings, tmp_path, RECIPE)
    calls.clear()
    trackers = open_trackers(settings, tmp_path, RECIPE)
    trackers[1].log({"loss": 1.0}, 4)
    named = next(named for name, _, named in calls if name == "init")
    assert (named["id"], named["resume"]) == ("new-id", "allow")
    assert "run" not in [name for name, _, _ in calls]
    assert ("log_metric", ("run-1", "loss", 1.0), {"step": 4}) in calls


@pytest.mark.parametrize(
    ("module", "settings", "extra"),
    [
        ("torch.utils.tensorboard", Tracking(tensorboard=True), "tensorboard"),
        ("wandb", Tracking(wandb="p"), "wandb"),
        ("mlflow", Tracking(mlflow="e"), "mlflow"),
    ],
)
def test_a_missing_library_names_its_extra(monkeypatch, tmp_path: Path, module: str, settings, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"fedllm\[{extra}\]"):
        open_trackers(settings, tmp_path, RECIPE)


def test_those_already_open_are_closed_when_one_cannot_be_opened(calls: Calls, monkeypatch, tmp_path: Path) -> None:
    def refuse(**_):
        raise RuntimeError("no login")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match="Weights & Biases cannot be opened: no login"):
        open_trackers(Tracking(tensorboard=True, wandb="p"), tmp_path, RECIPE)
    assert "writer closed" in [name for name, _, _ in calls]


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(calls: Calls, monkeypatch, tmp_path: Path) -> None:
    (tracker,) = open_trackers(Tracking(mlflow="e"), tmp_path, RECIPE)
    tries = []

    def broken(*_, **__):
        tries.append(1)
        raise ConnectionError("server gone")

    monkeypatch.setattr(tracker.tracker._client, "log_metric", broken)
    with pytest.warns(UserWarning, match="MLflow failed and gets no more numbers: server gone"):
        tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 0.9}, 2)
    tracker.close()
    assert len(tries) == 1


def test_settings_are_strict() -> None:
    with pytest.raises(ValidationError):
        Tracking(tensorbord=True)


def test_flat() -> None:
    assert flat(RECIPE) == {"name": "r", "train.lr": 0.1, "train.steps": 5, "data.files": ["a"]}


def test_importing_is_light() -> None:
    heavy = ["torch", "transformers", "datasets", "sklearn", "pandas", "rich", "numpy", "wandb", "mlflow"]
    code = "import sys, fedllm.report.tracking, fedllm.report.table; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(found.stdout.split())


def test_a_missing_library_is_found_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.report import tracking

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(tracking.sys.modules, "wandb", raising=False)
    tracking.require(Tracking())
    with pytest.raises(MissingExtra, match="wandb"):
        tracking.require(Tracking(wandb="project"))

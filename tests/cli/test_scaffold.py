"""new-method: files that run at once, and none that is overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from fedllm.cli import complete
from fedllm.cli.plugins import load_plugins
from fedllm.cli.scaffold import checkout, plan_for
from fedllm.core import registry
from fedllm.core.errors import ConfigError
from tests.cli.lines import ENVIRONMENT, MAIN, invoke, ok

ROOT = complete.PACKAGE.parent
SMALL = ("model.name=toy:llama", "data.documents=2", "data.held_out=1", "rounds=1", "train.steps=1")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty current folder, and a registry and module table that are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_FOUND", {kind: dict(found) for kind, found in registry._FOUND.items()})
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fedllm_methods")]:
        del sys.modules[name]


def test_outside_a_checkout_it_is_a_plug_in_that_runs_at_once(fresh):
    shown = ok("new-method", "my-own", "--topic", "privacy")
    assert sorted(str(file.relative_to(fresh)) for file in fresh.rglob("*.*") if file.is_file()) == [
        "fedllm_methods/my_own.py",
        "my-own.md",
        "my-own.yaml",
        "test_my_own.py",
    ]
    assert "fedllm run my-own.yaml" in shown.stdout
    run = ok("run", "my-own.yaml", *SMALL)
    assert "Federated (my-own)" in run.stdout and "Loaded fedllm_methods/my_own.py" in run.stderr
    assert "my-own" in ok("methods").stdout and "Your own" in ok("methods").stdout
    assert "method.server_lr" in ok("explain", "my-own").stdout
    again = invoke("new-method", "my-own")
    assert again.exit_code == 2 and "is taken" in again.stderr


def test_inside_a_checkout_it_lies_where_the_others_do_and_its_test_passes(tmp_path):
    shutil.copytree(ROOT / "fedllm", tmp_path / "fedllm", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    line = [*MAIN, "new-method", "my-own", "--topic", "communication"]
    made = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[:4] == [
        "Wrote fedllm/methods/communication/my_own.py",
        "Wrote tests/methods/test_my_own.py",
        "Wrote fedllm/recipes/my-own.yaml",
        "Wrote docs/when/my-own.md",
    ]
    assert "fedllm run my-own" in made.stdout
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_my_own.py"]
    tested = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0 and tested.stdout.startswith(".. "), tested.stdout
    ruff = shutil.which("ruff", path=str(complete.Path(sys.executable).parent))
    if ruff:
        files = ["fedllm/methods/communication", "tests"]
        found = subprocess.run([ruff, "check", *files], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_the_checkout_is_the_one_that_is_imported(tmp_path):
    assert checkout(ROOT) == checkout(ROOT / "tests") == ROOT
    assert checkout(tmp_path) is None
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "fedllm").mkdir()
    assert checkout(tmp_path) is None


@pytest.mark.parametrize("key", ["fedavg", "My-Own", "my_own", "1st", "a--b", "class", "-x", ""])
def test_a_key_that_cannot_be_is_refused(fresh, key):
    result = invoke("new-method", "--", key)
    assert result.exit_code == 2
    assert "Error: " in result.stderr and not list(fresh.iterdir())


def test_a_topic_that_does_not_exist_is_refused(fresh):
    result = invoke("new-method", "my-own", "--topic", "privcy")
    assert result.exit_code == 2 and "Did you mean 'privacy'?" in result.stderr


def test_nothing_is_written_where_one_file_exists(fresh):
    (fresh / "my-own.yaml").write_text("kept")
    result = invoke("new-method", "my-own")
    assert result.exit_code == 2 and "my-own.yaml exists already." in result.stderr
    assert [file.name for file in fresh.iterdir()] == ["my-own.yaml"] and (fresh / "my-own.yaml").read_text() == "kept"


def test_a_topic_without_methods_gets_its_package():
    plan = plan_for("my-own", "applications", ROOT)
    assert plan.packages == {ROOT / "fedllm/methods/applications/__init__.py": '"""Applications (3.9)."""\n'}


def test_a_plug_in_that_cannot_be_imported_is_named(fresh):
    (fresh / "fedllm_methods").mkdir()
    (fresh / "fedllm_methods" / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py cannot be imported: ZeroDivisionError"):
        load_plugins()
    assert "fedllm_methods.broken" not in sys.modules

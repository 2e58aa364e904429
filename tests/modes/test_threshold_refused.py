"""Threshold keys that cannot be had are refused before training, with the cause: these tests need no OpenFHE."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path

import pytest

from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra, ModeConflict
from fedllm.core.guard import Guard
from fedllm.methods import find
from fedllm.modes.encrypted.compose import encrypted
from fedllm.modes.encrypted.joint import ThresholdSum
from fedllm.modes.encrypted.settings import EncryptedSettings

SETTINGS = EncryptedSettings(keys="threshold")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `openfhe` that is found before any other, as its wheels have it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "openfhe"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "openfhe"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .openfhe import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


def refused() -> FedLLMError:
    with pytest.raises(FedLLMError) as caught:
        encrypted(SETTINGS, find("fedavg")(weighting="uniform"), Guard(), {"c0": 3, "c1": 3}, True, 0)
    return caught.value


def test_where_openfhe_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openfhe", None)
    fault = refused()
    assert isinstance(fault, MissingExtra) and "fedllm[threshold]" in str(fault)


def test_where_the_wheel_holds_another_python_it_says_which(place: Path):
    (place / "openfhe.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    (place / "openfhe.cpython-310-x86_64-linux-gnu.so").write_bytes(b"")
    fault = refused()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert isinstance(fault, ConfigError)
    assert f"no module for Python {here}. It has modules for: 3.9, 3.10." in str(fault)
    assert "encrypted.keys=shared" in str(fault)


def test_where_the_module_cannot_be_loaded_it_says_why(place: Path):
    (place / ("openfhe" + importlib.machinery.EXTENSION_SUFFIXES[0])).write_bytes(b"no library")
    fault = refused()
    assert isinstance(fault, ConfigError) and "cannot be loaded: " in str(fault) and str(place) in str(fault)


def test_other_modes_and_methods_are_refused():
    with pytest.raises(ModeConflict, match="'privacy', 'secure' and 'codec'"):
        encrypted(SETTINGS, find("fedavg")(weighting="uniform"), Guard(), {"c0": 3, "c1": 3}, False, 0)
    with pytest.raises(ModeConflict, match="more than"):
        ThresholdSum(SETTINGS, find("flexlora")(), 0)
    with pytest.raises(ModeConflict, match=r"encrypted\.ratio=1"):
        ThresholdSum(EncryptedSettings(keys="threshold", ratio=0.5), find("scaffold")(weighting="uniform"), 0)

"""Errors - four short parts in a fixed order, and the nearest choice."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from fedllm.core import errors
from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra, UploadRejected, nearest


def test_the_four_parts_in_their_order() -> None:
    fault = FedLLMError("The method 'x' does not exist.", "Methods: a, b.", "a", "Run 'fedllm methods'.")
    assert str(fault) == "The method 'x' does not exist. Methods: a, b. Did you mean 'a'? Run 'fedllm methods'."
    assert (fault.given, fault.allowed, fault.nearest, fault.action) == (
        "The method 'x' does not exist.",
        "Methods: a, b.",
        "a",
        "Run 'fedllm methods'.",
    )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("Given.",), "Given."),
        (("Given.", "Allowed."), "Given. Allowed."),
        (("Given.", "", None, "Do."), "Given. Do."),
        (("Given.", "", "near"), "Given. Did you mean 'near'?"),
    ],
)
def test_parts_that_are_not_known_leave_no_gap(parts: tuple[str, ...], text: str) -> None:
    assert str(FedLLMError(*parts)) == text


def test_unknown_lists_what_exists_and_the_nearest() -> None:
    fault = ConfigError.unknown("method", "fedavgg", ["scaffold", "fedavg", "fedprox"], "Run 'fedllm methods'.")
    assert str(fault) == (
        "There is no method 'fedavgg'. Allowed: fedavg, fedprox, scaffold. Did you mean 'fedavg'? Run 'fedllm methods'."
    )
    assert isinstance(fault, ConfigError)
    assert fault.exit_code == 2


def test_unknown_with_nothing_alike_and_with_nothing_at_all() -> None:
    assert str(ConfigError.unknown("part", "zzz", ["update"])) == "There is no part 'zzz'. Allowed: update."
    assert str(ConfigError.unknown("part", "update", [])) == "There is no part 'update'. Allowed: none."


@pytest.mark.parametrize(
    ("word", "choices", "expected"),
    [
        ("fedavgg", ["fedavg", "fedprox"], "fedavg"),
        ("FEDAVG", ["FedAvg"], "FedAvg"),
        ("fed-avg", ["fedavg", "fedadam"], "fedavg"),
        ("lr", ["rl", "steps"], "rl"),
        ("qqq", ["fedavg"], None),
        ("x", [], None),
        ("", ["a"], None),
        ("scafold", ["scaffold", "scale"], "scaffold"),
    ],
)
def test_nearest(word: str, choices: list[str], expected: str | None) -> None:
    assert nearest(word, choices) == expected


def test_every_error_has_an_exit_code_and_is_a_fedllm_error() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, FedLLMError)]
    assert len(found) >= 12
    assert all(1 <= e.exit_code <= 9 for e in found)
    assert all(e.__doc__ for e in found)


def test_a_missing_library_names_the_extra() -> None:
    fault = MissingExtra("peft", "peft", "Exporting an adapter")
    assert str(fault) == (
        "Exporting an adapter needs the library 'peft', which is not installed. "
        "Install it with: pip install 'fedllm[peft]'"
    )
    assert fault.exit_code == 5


def test_errors_import_nothing_heavy() -> None:
    code = "import sys, fedllm.core.errors; print(sorted({'torch','transformers','numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]", f"importing fedllm.core.errors imports {found}"


def test_errors_come_through_another_process_whole() -> None:
    for fault in (
        ConfigError.unknown("method", "fedavgg", ["fedavg"]),
        MissingExtra("peft", "peft", "Exporting an adapter"),
        UploadRejected("It is late."),
    ):
        again = pickle.loads(pickle.dumps(fault))
        assert type(again) is type(fault) and str(again) == str(fault) and vars(again) == vars(fault)

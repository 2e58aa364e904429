"""Matrix - which method goes with which mode, by asking the modes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedllm.core.errors import ModeConflict
from fedllm.core.method import Method
from fedllm.modes.means import weighting_of
from fedllm.modes.privacy.central import check as check_central
from fedllm.modes.privacy.examples import check as check_examples
from fedllm.modes.robust import check as check_robust


def _coded(method: Any) -> None:
    if not isinstance(method, Method):
        raise ModeConflict(f"The protocol {method.key} sends messages that no codec takes.", "", "fedavg")


MODES: dict[str, Callable[[Any], object]] = {
    "private clients": check_central,
    "private examples": check_examples,
    "secure sum": lambda method: weighting_of(method, "A secure sum"),
    "encrypted sum": lambda method: weighting_of(method, "An encrypted sum"),
    "codec": _coded,
    "attack, defence": lambda method: check_robust("a rule", method),
}
"""Each mode and what refuses a method with it."""


def verdicts(kind: type[Any]) -> dict[str, str]:
    """Mode -> why a method or protocol does not go with it; "" where it does. Weights are uniform where it has any."""
    options: dict[str, Any] = {"weighting": "uniform"} if "weighting" in kind.model_fields else {}
    method = kind(**options, **{name: True for name in getattr(kind, "needs", ())})
    found = {}
    for mode, check in MODES.items():
        try:
            check(method)
            found[mode] = ""
        except ModeConflict as fault:
            found[mode] = str(fault)
    return found

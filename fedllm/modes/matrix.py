"""Matrix - which method goes with which mode, by asking the modes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from fedllm.core.errors import ModeConflict
from fedllm.core.method import Method
from fedllm.modes.means import weighting_of
from fedllm.modes.privacy.central import check as check_central
from fedllm.modes.privacy.examples import check as check_examples
from fedllm.modes.robust import check_rule


def _coded(method: Any) -> None:
    if not isinstance(method, Method):
        raise ModeConflict(f"The protocol {method.key} sends messages that no codec takes.", "", "fedavg")


MODES: dict[str, Callable[[Any], object]] = {
    "private clients": check_central,
    "private examples": check_examples,
    "secure sum": lambda method: weighting_of(method, "A secure sum"),
    "encrypted sum": lambda method: weighting_of(method, "An encrypted sum"),
    "codec": _coded,
    "defence": lambda method: check_rule("a rule", method),
}
"""Each mode and what refuses a method with it."""


class Verdict(NamedTuple):
    """Whether a method goes with a mode.

    Attributes:
        reason: why it is refused; "" where it is not.
        option: the value of the method's option `upload` that it takes; "" where any will do.
    """

    reason: str = ""
    option: str = ""

    @property
    def text(self) -> str:
        """For a cell of a table."""
        return "-" if self.reason else f"upload={self.option}" if self.option else "yes"


def verdicts(kind: type[Any]) -> dict[str, Verdict]:
    """Mode -> whether a method or protocol goes with it. Weights are uniform where it has any."""
    options: dict[str, Any] = {"weighting": "uniform"} if "weighting" in kind.model_fields else {}
    options |= {name: True for name in getattr(kind, "needs", ())}
    others = get_args(kind.model_fields["upload"].annotation) if "upload" in kind.model_fields else ()
    found = {}
    for mode, check in MODES.items():
        found[mode] = Verdict(_refusal(check, kind(**options)))
        for value in others if found[mode].reason else ():
            if not _refusal(check, kind(**options, upload=value)):
                found[mode] = Verdict(option=value)
                break
    return found


def _refusal(check: Callable[[Any], object], method: Any) -> str:
    try:
        check(method)
    except ModeConflict as fault:
        return str(fault)
    return ""

"""Means - what most modes ask of a method: every part of its uploads is reduced by a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import MEASURING
from fedllm.core.method import Method
from fedllm.core.reducer import Mean, Reducer, Weighting
from fedllm.core.roster import SERVER


def means(method: Any, mode: str, needs: str) -> dict[str, Mean]:
    """The mean of each part of a method's uploads.

    Args:
        method: the method or protocol.
        mode: what asks, for the error.
        needs: why nothing but a mean will do, as the end of a sentence that begins with what the method has.

    Raises:
        ModeConflict: a protocol, a method that uploads nothing, or a reducer that is no mean.
    """
    if not isinstance(method, Method):
        raise ModeConflict(
            f"The protocol {method.key} exchanges more than one sum a round.", f"{mode} goes with methods.", "fedavg"
        )
    reducers = method.reducer
    parts = {"update": reducers} if isinstance(reducers, Reducer) else dict(reducers)
    if not parts:
        raise ModeConflict(f"The method {method.key} uploads nothing.", f"{mode} works on uploads.", "fedavg")
    found: dict[str, Mean] = {}
    for part, reducer in parts.items():
        if type(reducer) is not Mean:
            raise ModeConflict(
                f"The method {method.key} reduces the part '{part}' by {type(reducer).__name__}, {needs}.",
                f"{mode} goes with methods whose parts are all reduced by a mean.",
                "fedavg",
            )
        found[part] = reducer
    return found


def weighting_of(method: Any, mode: str) -> Weighting:
    """The one weighting of all parts of a method, where its uploads can be summed unseen.

    Raises:
        ModeConflict: see :func:`means` and :func:`works_alone`; or parts that weigh differently.
    """
    parts = means(method, mode, "which needs more than a sum")
    works_alone(method, mode)
    found = {reducer.weighting for reducer in parts.values()}
    if len(found) > 1:
        raise ModeConflict(
            f"The method {method.key} weighs its parts differently.", "One sum has one weight for each client."
        )
    return found.pop()


def works_alone(method: Any, mode: str) -> None:
    """Refuse a method that asks clients for more than `work`: what else they answer, a mode does not cover.

    Raises:
        ModeConflict: with the reason.
    """
    if method.asks:
        raise ModeConflict(
            f"The method {method.key} asks clients for '{method.asks[0]}', too, whose answers nothing covers.",
            f"{mode} covers the uploads of 'work'.",
            "fedavg",
        )


def only_work(op: str, client: str, mode: str) -> None:
    """Raise :class:`ModeConflict` for a question beyond `work` and measurements; `server` may be asked anything."""
    if client != SERVER and op not in ("work", *MEASURING):
        raise ModeConflict(
            f"Clients are asked for '{op}', whose answers nothing covers.",
            f"With {mode}, clients answer 'work' and measurements alone.",
            action="Choose a method that asks for nothing else, or leave the section out.",
        )


def check_weights(section: str, method: Any, sizes: Mapping[str, int], largest: float) -> None:
    """Refuse weights beyond `largest`, the `max_weight` of a section.

    Raises:
        ConfigError: with the number that would do.
    """
    most = max(sizes.values(), default=0)
    if weighting_of(method, f"The section '{section}'") == "examples" and most > largest:
        raise ConfigError(
            f"The method {method.key} weighs uploads by their examples, up to {most}, and {section}.max_weight="
            f"{largest:g}.",
            "A weight stands in the sum as a share of the largest one allowed.",
            action=f"Set {section}.max_weight={most}, or method.weighting=uniform.",
        )

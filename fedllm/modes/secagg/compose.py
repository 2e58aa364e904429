"""Compose - a secure sum together with the other modes of a recipe, or why they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import ModeConflict
from fedllm.core.guard import Guard
from fedllm.modes.means import check_weights, means, weighting_of
from fedllm.modes.privacy.central import Central
from fedllm.modes.secagg.guard import SecureSum
from fedllm.modes.secagg.settings import SecureSettings

if TYPE_CHECKING:
    from fedllm.modes.codec import Codec


def secured(
    settings: SecureSettings, method: Any, inner: Guard, sizes: Mapping[str, int], cohort: int, codec: Codec | None
) -> SecureSum:
    """The guard of a recipe's section `secure`.

    Args:
        settings: the section.
        method: what it stands around.
        inner: the guard of the other sections.
        sizes: client -> its number of examples.
        cohort: clients per round on average.
        codec: the recipe's, where it changes anything.

    Raises:
        ModeConflict: with another mode, with the reason.
        ConfigError: weights beyond the settings.
    """
    central = inner if isinstance(inner, Central) else None
    if central is None and type(inner) is not Guard:
        raise ModeConflict(
            "The section 'secure' with privacy.level=example: what clients keep private they do themselves.",
            "Together with a secure sum the server noises the sum.",
            action="Set privacy.level=client, or leave one of them out.",
        )
    check_weights("secure", method, sizes, settings.max_weight)
    if codec is not None:
        settings = coded(settings, method, codec, central)
    coins = central is not None and central.settings.mechanism == "gaussian" and central.settings.sampling == "poisson"
    return SecureSum(settings, method, len(sizes) if coins else min(cohort, len(sizes)), central, codec)


def coded(settings: SecureSettings, method: Any, codec: Codec, central: Central | None) -> SecureSettings:
    """The settings under which the integers of a codec are summed as they are: its clip, and as many bits.

    Raises:
        ModeConflict: codes that do not add up, parts that are not coded, weights or noise that would be rounded again,
            or a clip or a precision of the secure sum's own.
    """
    parts = means(method, "A secure sum", "which needs more than a sum")
    codec.check(list(parts), "a secure sum")
    left = sorted(set(parts) - set(codec.parts))
    if left:
        raise ModeConflict(
            f"The part '{left[0]}' of the method {method.key} is in the secure sum and not coded.",
            "A secure sum has one scale for all of it.",
            action=f"Set codec.parts=[{', '.join(sorted(parts))}].",
        )
    if central is not None or weighting_of(method, "A secure sum") == "examples":
        what = "noise" if central is not None else "weights by examples"
        raise ModeConflict(
            f"The sections 'secure' and 'codec' together with {what}: codes would be rounded a second time.",
            "Allowed: method.weighting=uniform, without privacy; secure.precision rounds by itself.",
            action="Remove the section 'codec' and lower secure.precision, or set method.weighting=uniform.",
        )
    own = {"clip": codec.clip, "precision": 8 if codec.kind == "int8" else 4}
    for name, value in own.items():
        if name in settings.model_fields_set and getattr(settings, name) != value:
            raise ModeConflict(
                f"secure.{name}={getattr(settings, name)} beside codec.kind={codec.kind} with clip={codec.clip:g}.",
                f"The codes are summed as they are: {name}={value:g}.",
                action=f"Remove secure.{name}.",
            )
    return settings.model_copy(update=own)

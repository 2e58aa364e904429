"""Compose - a secure sum together with the other modes of a recipe, or why they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ModeConflict
from fedllm.core.guard import Guard
from fedllm.modes.means import check_weights
from fedllm.modes.privacy.central import Central
from fedllm.modes.secagg.guard import SecureSum
from fedllm.modes.secagg.settings import SecureSettings


def secured(
    settings: SecureSettings, method: Any, inner: Guard, sizes: Mapping[str, int], cohort: int, plain: bool
) -> SecureSum:
    """The guard of a recipe's section `secure`.

    Args:
        settings: the section.
        method: what it stands around.
        inner: the guard of the other sections.
        sizes: client -> its number of examples.
        cohort: clients per round on average.
        plain: whether uploads are not coded.

    Raises:
        ModeConflict: with another mode, with the reason.
        ConfigError: weights beyond the settings.
    """
    if not plain:
        raise ModeConflict(
            "The sections 'secure' and 'codec' are both given.",
            "A secure sum rounds and packs uploads itself (secure.precision).",
            action="Leave one of them out.",
        )
    central = inner if isinstance(inner, Central) else None
    if central is None and type(inner) is not Guard:
        raise ModeConflict(
            "The section 'secure' with privacy.level=example: what clients keep private they do themselves.",
            "Together with a secure sum the server noises the sum.",
            action="Set privacy.level=client, or leave one of them out.",
        )
    check_weights("secure", method, sizes, settings.max_weight)
    coins = central is not None and central.settings.mechanism == "gaussian" and central.settings.sampling == "poisson"
    return SecureSum(settings, method, len(sizes) if coins else min(cohort, len(sizes)), central)

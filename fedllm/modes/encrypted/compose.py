"""Compose - an encrypted sum together with the other modes of a recipe, or why they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.modes.encrypted.guard import EncryptedSum
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.secagg.guard import weighting_of


def encrypted(
    settings: EncryptedSettings, method: Any, inner: Guard, sizes: Mapping[str, int], plain: bool, seed: int
) -> EncryptedSum:
    """The guard of a recipe's section `encrypted`.

    Args:
        settings: the section.
        method: what it stands around.
        inner: the guard of the other sections.
        sizes: client -> its number of examples.
        plain: whether uploads are not coded.
        seed: the run's seed.

    Raises:
        ModeConflict: with another mode or this method, with the reason.
        ConfigError: weights beyond the settings, or noise on nothing.
    """
    if type(inner) is not Guard or not plain:
        raise ModeConflict(
            "The section 'encrypted' goes with none of 'privacy', 'secure' and 'codec'.",
            "Ciphertexts can be added, and neither clipped nor shortened.",
            action="Leave one of them out.",
        )
    if settings.noise and settings.ratio == 1:
        raise ConfigError(
            f"encrypted.noise={settings.noise:g} with encrypted.ratio=1: nothing travels in the open.",
            action="Remove the noise, or encrypt less.",
        )
    largest = max(sizes.values(), default=0)
    if weighting_of(method) == "examples" and largest > settings.max_weight:
        raise ConfigError(
            f"The method {method.key} weighs uploads by their examples, up to {largest}, and encrypted.max_weight="
            f"{settings.max_weight:g}.",
            "A weight stands in the sum as a share of the largest one allowed.",
            action=f"Set encrypted.max_weight={largest}, or method.weighting=uniform.",
        )
    return EncryptedSum(settings, method, seed)

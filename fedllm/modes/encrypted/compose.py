"""Compose - an encrypted sum together with the other modes of a recipe, or why they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.modes.encrypted.guard import EncryptedSum
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.means import check_weights


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
    check_weights("encrypted", method, sizes, settings.max_weight)
    return EncryptedSum(settings, method, seed)

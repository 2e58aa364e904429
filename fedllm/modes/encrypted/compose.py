"""Compose - an encrypted sum together with the other modes of a recipe, or why they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.modes.encrypted.guard import EncryptedSum
from fedllm.modes.encrypted.joint import ThresholdSum
from fedllm.modes.encrypted.parties import MINIMUM
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.encrypted.sums import HiddenSum
from fedllm.modes.means import check_weights


def encrypted(
    settings: EncryptedSettings, method: Any, inner: Guard, sizes: Mapping[str, int], plain: bool, seed: int
) -> HiddenSum:
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
        ConfigError: weights beyond the settings, noise on nothing, or threshold keys of one client; or OpenFHE, which
            these need, is installed and cannot be used.
        MissingExtra: what encrypts is not installed.
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
    if settings.keys == "shared":
        return EncryptedSum(settings, method, seed)
    if len(sizes) < MINIMUM:
        raise ConfigError(
            f"encrypted.keys=threshold with {len(sizes)} client: the sum of one is its upload.",
            f"Allowed: {MINIMUM} clients or more.",
            action="Add clients, or leave the section 'encrypted' out.",
        )
    return ThresholdSum(settings, method, seed)

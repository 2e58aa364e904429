"""Guard - the guard of a recipe's section `privacy`, by its level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedllm.modes.privacy import central, examples
from fedllm.modes.privacy.central import Central
from fedllm.modes.privacy.examples import Examples

if TYPE_CHECKING:
    from fedllm.modes.privacy.settings import PrivacySettings


def guard_of(
    settings: PrivacySettings, method: Any, sizes: Mapping[str, int], cohort: int, rounds: int, seed: int
) -> Central | Examples:
    """The guard that keeps to `settings`.

    Args:
        settings: the section.
        method: what it stands around.
        sizes: client -> its number of examples.
        cohort: clients per round on average.
        rounds: rounds of the run.
        seed: the run's seed.

    Raises:
        ModeConflict: with this method, with the reason.
        ConfigError: what cannot be kept otherwise.
    """
    if settings.level == "client":
        central.check(method)
        return Central(settings, method, len(sizes), cohort, rounds, seed)
    examples.check(method)
    return Examples(settings, sizes, method.train, rounds, seed)

"""Privacy settings - the section `privacy` of a recipe; imports nothing heavy. What it does: the package around it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError

Level = Literal["example", "client"]
"""Whose data one unit of protection is: one example, or all that a client has."""


class AdaptiveSettings(BaseModel):
    """A bound that follows a quantile of the norms (Andrew et al. 2021). `privacy.clip` is the first bound."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    quantile: float = Field(0.5, gt=0, lt=1)
    """Share of the updates that should lie within the bound."""
    rate: float = Field(0.2, gt=0, le=1)
    """How fast the bound follows: it is multiplied by exp(-rate * (share within - quantile)) each round."""
    noise: float | None = Field(None, gt=0)
    """Standard deviation of the noise on the number of updates within the bound. Null: a twentieth of the expected
    cohort. It takes its share of `privacy.noise`, which must be less than twice it."""


class TreeSettings(BaseModel):
    """The trees of DP-FTRL."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    restart: int | None = Field(None, ge=1)
    """Rounds after which a new tree begins; null: one tree for the whole run."""
    complete: bool = True
    """Fill a finished tree up to a power of two, so that the noise of one node stays instead of that of several."""
    participations: int = Field(1, ge=1)
    """Rounds of one tree that one client takes part in, at most; the run refuses more."""
    separation: int = Field(1, ge=1)
    """Rounds from one participation of a client to its next, at least."""


class PrivacySettings(BaseModel):
    """What is protected, how well, and by which mechanism."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    level: Level = "client"
    """client: clip each client's update and noise the sum at the server. example: every client clips the gradient of
    each example and noises the sum (DP-SGD)."""
    mechanism: Literal["gaussian", "ftrl"] = "gaussian"
    """gaussian: fresh noise each time, on units that were drawn at random. ftrl: noise of a binary tree on the running
    sum; needs no random drawing (level client only)."""
    epsilon: float | None = Field(None, gt=0)
    """The budget: nothing is released that would pass it. Without `noise`, the noise is solved for. Null: none."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The chance of more than epsilon; must be below 1 / (number of units)."""
    noise: float | None = Field(None, ge=0)
    """Standard deviation of the noise as a multiple of `clip`. Null: the least that keeps to `epsilon`. 0 adds none,
    and promises nothing."""
    clip: float = Field(1.0, gt=0)
    """Largest Euclidean norm of one unit's contribution, over all tensors together."""
    adaptive: AdaptiveSettings | None = None
    """Let the bound follow the norms (level client only); null: it stays."""
    sampling: Literal["poisson", "fixed"] = "poisson"
    """poisson: each unit joins by its own coin. fixed: so many are drawn without replacement, which costs far more for
    the same noise: a client's place is taken by another, so the sum moves by up to twice `clip`."""
    rate: float | None = Field(None, gt=0, le=1)
    """Chance that a unit joins. Null: from the cohort (level client), or from train.batch_size and the number of
    examples of each client (level example)."""
    tree: TreeSettings = TreeSettings()  # pyright: ignore[reportCallIssue]
    """mechanism ftrl: its trees."""
    key: Literal["secret", "seed"] = "secret"
    """Where noise comes from. secret: a key from the operating system, kept in the checkpoints, which must be kept
    from others. seed: the run's seed, for repeatable experiments; who knows it can take the noise away."""

    @model_validator(mode="after")
    def _usable(self) -> PrivacySettings:
        if self.epsilon is None and self.noise is None:
            raise ConfigError(
                "The section 'privacy' has neither privacy.epsilon nor privacy.noise.",
                "One of them says how much is protected.",
                action="Set privacy.epsilon=8 to have the noise solved for.",
            )
        if self.noise == 0 and self.epsilon is not None:
            raise ConfigError(
                f"privacy.noise=0 with privacy.epsilon={self.epsilon:g}: without noise no epsilon holds.",
                "privacy.noise is positive or null.",
                action="Remove one of them.",
            )
        if self.level == "example":
            self._of_examples()
        if self.mechanism == "ftrl":
            self._of_trees()
        elif self.tree != type(self).model_fields["tree"].default:
            raise _meaningless("privacy.tree", "privacy.mechanism=gaussian", "privacy.mechanism=ftrl")
        if self.adaptive is not None:
            self._of_adaptive(self.adaptive)
        return self

    def _of_examples(self) -> None:
        if self.mechanism == "ftrl":
            raise _meaningless("privacy.mechanism=ftrl", "privacy.level=example", "privacy.level=client")
        if self.adaptive is not None:
            raise _meaningless("privacy.adaptive", "privacy.level=example", "privacy.level=client")

    def _of_trees(self) -> None:
        if self.adaptive is not None:
            raise _meaningless("privacy.adaptive", "privacy.mechanism=ftrl", "privacy.mechanism=gaussian")
        if self.rate is not None or self.sampling != "poisson":
            name = "privacy.rate" if self.rate is not None else "privacy.sampling"
            raise _meaningless(name, "privacy.mechanism=ftrl", "privacy.mechanism=gaussian")

    def _of_adaptive(self, adaptive: AdaptiveSettings) -> None:
        if self.sampling == "fixed":
            raise _meaningless("privacy.adaptive", "privacy.sampling=fixed", "privacy.sampling=poisson")
        if adaptive.noise is not None and self.noise is not None and self.noise >= 2 * adaptive.noise:
            raise ConfigError(
                f"privacy.noise={self.noise:g} with privacy.adaptive.noise={adaptive.noise:g}: the count alone would "
                "spend more than all of it.",
                f"Allowed: privacy.adaptive.noise above {self.noise / 2:g}.",
                action="Raise privacy.adaptive.noise, or remove it.",
            )


def _meaningless(name: str, where: str, home: str) -> ConfigError:
    return ConfigError(
        f"{name} has no meaning with {where}.", f"It belongs to {home}.", action=f"Remove it, or set {home}."
    )

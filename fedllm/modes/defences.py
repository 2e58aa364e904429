"""Defences - what a server may do with the uploads of a round in place of their mean; registered like methods.

Each class holds a rule's options and hands the uploads to a function of :mod:`fedllm.blocks.robust` or
:mod:`fedllm.blocks.anomaly`, where the mathematics and the assumptions stand. All work on the whole upload of a client
as one vector, never factor by factor. They need single uploads, so none goes with a secure sum or with privacy. What
clients may do themselves is in :mod:`fedllm.modes.shields`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from fedllm.blocks import anomaly, robust
from fedllm.blocks.robust import Verdict
from fedllm.core.card import Card
from fedllm.core.registry import registered
from fedllm.core.tensors import Tensors
from fedllm.modes.registered import Registered

CATALOGUE = ("2.2 Security and Robustness",)


@dataclass(frozen=True)
class Uploads:
    """The uploads of a round as a rule sees them.

    Attributes:
        rows: [K, D], float32.
        weights: [K], float64.
        clients: the id of each row, in order.
        model: [D], the tensors that the uploads change, where the round began.
        round: its number, from 1.
        last: whether it is the last of the run.
        memory: what the rule gave back in the round before.
        rng: for what is drawn.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    clients: tuple[str, ...]
    model: torch.Tensor
    round: int
    last: bool
    memory: Tensors | None
    rng: torch.Generator


class Defence(Registered, abstract=True):
    """A defence and its options: a :class:`Rule` at the server, or a shield at the client."""

    family = "defence"


class Rule(Defence, abstract=True):
    """What a server makes of a round's uploads in place of their mean."""

    def apply(self, given: Uploads) -> Verdict:
        """The update of the round and what was made of whom."""
        raise NotImplementedError(f"{type(self).__name__} must define apply.")


def defences() -> dict[str, type[Defence]]:
    """Key to class of every defence, at the server and at the client."""

    return registered("defence")


def card_of(title: str, paper: str, claim: str) -> Card:
    """The card of a defence."""
    return Card(title=title, paper=paper, cells=CATALOGUE, travels="nothing more than without it", claim=claim)


class Krum(Rule):
    """The one upload that lies nearest to its nearest others."""

    key = "krum"
    card = card_of(
        "Krum - the upload nearest to its neighbours",
        "Blanchard et al., NeurIPS 2017",
        "Stays near an honest upload whatever f of at least 2f + 3 clients send.",
    )
    f: int = Field(1, ge=0)
    """Attackers assumed in a cohort."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.krum`."""
        return robust.krum(given.rows, given.weights, f=self.f)


class MultiKrum(Rule):
    """The mean of the uploads that Krum likes best."""

    key = "multi-krum"
    card = card_of(
        "Multi-Krum - the mean of the uploads nearest to their neighbours",
        "Blanchard et al., NeurIPS 2017",
        "As Krum, and slower to lose what honest clients differ in.",
    )
    f: int = Field(1, ge=0)
    """Attackers assumed in a cohort."""
    m: int | None = Field(None, ge=1)
    """Uploads averaged; null: all but f."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.multi_krum`."""
        kept = max(1, len(given.rows) - self.f) if self.m is None else self.m
        return robust.multi_krum(given.rows, given.weights, f=self.f, m=kept)


class Bulyan(Rule):
    """Krum again and again, then the values nearest to the median."""

    key = "bulyan"
    card = card_of(
        "Bulyan - Krum's choice, trimmed by coordinate",
        "El Mhamdi et al., ICML 2018",
        "No coordinate is led astray either, with at least 4f + 3 clients.",
    )
    f: int = Field(1, ge=0)
    """Attackers assumed in a cohort."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.bulyan`."""
        return robust.bulyan(given.rows, given.weights, f=self.f)


class Median(Rule):
    """The median of every coordinate."""

    key = "median"
    card = card_of(
        "Coordinate-wise median",
        "Yin et al., ICML 2018, arXiv:1803.01498",
        "Every coordinate stays within the honest values while fewer than half attack.",
    )
    f: int = Field(0, ge=0)
    """Attackers assumed in a cohort; only checked."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.coordinate_median`."""
        return robust.coordinate_median(given.rows, given.weights, f=self.f)


class TrimmedMean(Rule):
    """The mean of every coordinate without its ends."""

    key = "trimmed-mean"
    card = card_of(
        "Coordinate-wise trimmed mean",
        "Yin et al., ICML 2018, arXiv:1803.01498",
        "As the median, with less loss of what honest clients differ in.",
    )
    beta: float = Field(0.2, ge=0, lt=0.5)
    """Share of the values dropped at each end."""
    f: int = Field(0, ge=0)
    """Attackers assumed in a cohort; only checked."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.trimmed_mean`."""
        return robust.trimmed_mean(given.rows, given.weights, beta=self.beta, f=self.f)


class GeometricMedian(Rule):
    """The point with the smallest sum of distances to all uploads (RFA)."""

    key = "geometric-median"
    card = card_of(
        "RFA - the geometric median of uploads",
        "Pillutla et al., IEEE TSP 2022, arXiv:1912.13445",
        "Withstands up to half of the weight, and costs little where nobody attacks.",
    )
    bucket: int = Field(1, ge=1)
    """Clients averaged before the median is taken (the geometric median of batch means)."""
    f: int = Field(0, ge=0)
    """Attackers assumed in a cohort; only checked."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.geometric_median`."""
        return robust.geometric_median(given.rows, given.weights, f=self.f, bucket=self.bucket, rng=given.rng)


class NormClip(Rule):
    """The mean of uploads shortened to a norm."""

    key = "norm-clip"
    card = card_of(
        "Norm-difference clipping",
        "Sun et al., 2019, arXiv:1911.07963",
        "An attacker moves the result by its share of the bound, no more.",
    )
    bound: float = Field(1.0, gt=0)
    """The largest norm of an upload that counts whole."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.norm_clip`."""
        return robust.norm_clip(given.rows, given.weights, bound=self.bound)


class CClip(Rule):
    """Uploads clipped around the update of the round before."""

    key = "cclip"
    card = card_of(
        "Centred clipping around the last update",
        "Karimireddy et al., ICML 2021, arXiv:2012.10333",
        "Withstands attacks that hide in the spread of a single round, as it remembers.",
    )
    tau: float = Field(10.0, gt=0)
    """The radius around the reference within which a mean of a bucket counts whole."""
    bucket: int = Field(1, ge=1)
    """Clients of a bucket."""
    steps: int = Field(1, ge=1)
    """Steps from the reference."""
    f: int = Field(0, ge=0)
    """Attackers assumed in a cohort; only checked."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.cclip`."""
        how = {"tau": self.tau, "bucket": self.bucket, "steps": self.steps, "f": self.f}
        return robust.cclip(given.rows, given.weights, rng=given.rng, memory=given.memory, **how)  # type: ignore[arg-type]


class SLSGD(Rule):
    """A step towards the mean, or the trimmed mean."""

    key = "slsgd"
    card = card_of(
        "SLSGD - a moving average over a trimmed mean",
        "Xie et al., ECML 2019, arXiv:1903.06996",
        "Converges with few attackers, more slowly and more surely.",
    )
    alpha: float = Field(0.5, ge=0, le=1)
    """How far a round goes towards its update."""
    b: int = Field(1, ge=0)
    """Values dropped at each end; 0: the plain mean, which withstands nobody."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.slsgd`."""
        option: Literal[1, 2] = 2 if self.b else 1
        return robust.slsgd(given.rows, given.weights, alpha=self.alpha, option=option, b=self.b)


class RobustLearningRate(Rule):
    """The mean, turned round where too few clients agree on a sign."""

    key = "robust-learning-rate"
    card = card_of(
        "Robust learning rate - the step turns where signs disagree",
        "Ozdayi et al., AAAI 2021, arXiv:2007.03767",
        "Backdoors of a few clients are unlearnt, as the others do not agree with them.",
    )
    theta: int = Field(4, ge=1)
    """A coordinate moves forward where the signs sum to this at least."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.robust.robust_learning_rate`."""
        return robust.robust_learning_rate(given.rows, given.weights, theta=self.theta)


class FoolsGold(Rule):
    """Clients that always point the same way count less."""

    key = "foolsgold"
    card = card_of(
        "FoolsGold - sybils are known by their likeness",
        "Fung et al., RAID 2020, arXiv:1808.04866",
        "Any number of sybils with one goal count as one, where honest clients differ.",
    )

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.foolsgold`."""
        return anomaly.foolsgold(given.rows, given.weights, clients=given.clients, memory=given.memory)


class ThreeSigma(Rule):
    """Drops clients whose distance is far above that of the others."""

    key = "three-sigma"
    card = card_of(
        "Three sigma - clients far from the others are dropped",
        "Han et al., FedSecurity, KDD 2024, arXiv:2306.04959",
        "Drops those far off, and nobody where all are alike.",
    )
    score: Literal["krum", "median", "foolsgold"] = "median"
    """What the distance is taken to, or FoolsGold's trust."""
    width: float = Field(1.0, gt=0)
    """Standard deviations above the mean that are allowed."""
    f: int = Field(1, ge=0)
    """Attackers assumed in a cohort."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.three_sigma`."""
        how: dict[str, Any] = {"score": self.score, "width": self.width, "f": self.f}
        if self.score == "foolsgold":
            how |= {"clients": given.clients, "memory": given.memory}
        return anomaly.three_sigma(given.rows, given.weights, **how)


class CrossRound(Rule):
    """Drops clients whose model has turned against its own past."""

    key = "cross-round"
    card = card_of(
        "Cross-round check - a client is held to its own past",
        "Han et al., FedSecurity, KDD 2024, arXiv:2306.04959",
        "Notices clients that begin to attack.",
    )
    bound: float = Field(0.7, ge=-1, le=1)
    """Smallest cosine of a client's model with its last one and with the global one."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.cross_round`."""
        how: dict[str, Any] = {"clients": given.clients, "model": given.model, "memory": given.memory}
        return anomaly.cross_round(given.rows, given.weights, bound=self.bound, **how)


class OutlierDetection(Rule):
    """The cross-round check first, then three sigma among those it suspects."""

    key = "outlier-detection"
    card = card_of(
        "Outlier detection - two stages: the past, then the others",
        "Han et al., 2023, arXiv:2310.04055",
        "Costs nothing in rounds without an attack.",
    )
    f: int = Field(1, ge=0)
    """Attackers assumed in a cohort."""
    bound: float = Field(0.7, ge=-1, le=1)
    """Smallest cosine with the past."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.outlier_detection`."""
        how: dict[str, Any] = {"clients": given.clients, "model": given.model, "memory": given.memory}
        return anomaly.outlier_detection(given.rows, given.weights, f=self.f, bound=self.bound, **how)


class ResidualReweighting(Rule):
    """Clients far off a robust line through all values count less."""

    key = "residual-reweighting"
    card = card_of(
        "Residual-based reweighting",
        "Fu et al., 2019, arXiv:1912.11464",
        "Weighs clients by how well their values fit those of the others.",
    )
    f: int = Field(0, ge=0)
    """Attackers assumed in a cohort; only checked."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.residual_reweighting`."""
        return anomaly.residual_reweighting(given.rows, given.weights, f=self.f)


class WeakDP(Rule):
    """Clipping and a little noise; no privacy is accounted."""

    key = "weak-dp"
    card = card_of(
        "Weak differential privacy - clipping and a little noise",
        "Sun et al., 2019, arXiv:1911.07963",
        "Wears backdoors off; guarantees nothing.",
    )
    bound: float = Field(1.0, gt=0)
    """The largest norm of an upload that counts whole."""
    sd: float = Field(1e-3, ge=0)
    """Standard deviation of each upload's noise."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.weak_dp`."""
        return anomaly.weak_dp(given.rows, given.weights, sd=self.sd, rng=given.rng, bound=self.bound)


class CRFL(Rule):
    """The global model is held to a norm that grows, and gets noise."""

    key = "crfl"
    card = card_of(
        "CRFL - the global model clipped and noised",
        "Xie et al., ICML 2021, arXiv:2106.08283",
        "With smoothing at test time, certifies predictions against bounded poisoning.",
    )
    start: float = Field(2.0, gt=0)
    """Norm of the model that is allowed before the first round."""
    growth: float = Field(0.1, ge=0)
    """By how much it grows each round."""
    sigma: float = Field(1e-3, gt=0)
    """Standard deviation of the noise."""

    def apply(self, given: Uploads) -> Verdict:
        """See :func:`fedllm.blocks.anomaly.crfl`."""
        rho = anomaly.crfl_bound(given.round, self.start, self.growth)
        how: dict[str, Any] = {"rho": rho, "sigma": self.sigma, "rng": given.rng, "last": given.last}
        return anomaly.crfl(given.rows, given.weights, model=given.model, **how)

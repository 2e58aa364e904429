"""Audit - a lower bound on epsilon from attacks on canaries, to hold against what was accounted.

A canary is a record (or client) made up for the purpose. In some trials it is in the data, in others not, and an
attack gives each trial a score that is higher where it believes the canary was in. A mechanism that is (epsilon,
delta)-private bounds how well any score can tell the two apart. So a lower bound above the accounted epsilon proves a
mistake; one below it proves nothing.

Sources: Jagielski, Ullman and Oprea, Auditing Differentially Private Machine Learning, NeurIPS 2020, section 3; Clopper
and Pearson, Biometrika 1934 (confidence bounds of a share).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from fedllm.core.errors import ConfigError, DataError
from fedllm.modes.privacy.accounting import check_delta


@dataclass(frozen=True)
class Audit:
    """What the canaries prove.

    Attributes:
        epsilon: a lower bound, right with the stated confidence; 0 where they prove nothing.
        ceiling: the most that so few trials could have proved, had the attack never erred. An accounted epsilon above
            it cannot be refuted by this audit.
        threshold: scores from it on were taken for "in".
        true_rate: share of the trials with the canary that were taken so.
        false_rate: share of those without it.
        trials: trials of both kinds that the bound rests on.
        confidence: of the bound.
    """

    epsilon: float
    ceiling: float
    threshold: float
    true_rate: float
    false_rate: float
    trials: int
    confidence: float

    def refutes(self, epsilon: float) -> bool:
        """Whether the accounted `epsilon` is shown to be too small."""
        return self.epsilon > epsilon


def audit(inside: Sequence[float], outside: Sequence[float], delta: float, confidence: float = 0.95) -> Audit:
    """A lower bound on epsilon from scores with and without the canary.

    Every second trial chooses the threshold and the others measure it, so the choice costs no confidence. With upper
    confidence bounds f on the share of false alarms and m on the share of misses, each at (1 + confidence) / 2:
    epsilon >= ln((1 - delta - m) / f), and the same with f and m exchanged.

    Args:
        inside: scores of trials with the canary. Trials must be independent: canaries of one and the same run are
            not, strictly, because they shape one model together.
        outside: scores of trials without it.
        delta: as accounted.
        confidence: from 0 to 1, both excluded.

    Raises:
        DataError: fewer than four trials of a kind, or a score that is not finite.
        ConfigError: a delta or confidence out of range.
    """
    check_delta(delta)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is given.", "Allowed: above 0 and below 1.")
    scores = [_read(values, what) for values, what in ((inside, "with"), (outside, "without"))]
    wrong = (1 - confidence) / 2
    (fit_in, fit_out), (held_in, held_out) = ([s[start::2] for s in scores] for start in (0, 1))
    candidates = numpy.unique(numpy.concatenate([fit_in, fit_out]))
    threshold = float(candidates[int(numpy.argmax(_bounds(fit_in, fit_out, candidates, delta, wrong)))])
    found = float(_bounds(held_in, held_out, numpy.array([threshold]), delta, wrong)[0])
    ones, zeros = numpy.ones(len(held_in)), numpy.zeros(len(held_out))
    return Audit(
        max(found, 0.0),
        max(float(_bounds(ones, zeros, numpy.array([0.5]), delta, wrong)[0]), 0.0),
        threshold,
        float((held_in >= threshold).mean()),
        float((held_out >= threshold).mean()),
        len(held_in) + len(held_out),
        confidence,
    )


def upper_share(hits: numpy.ndarray, trials: int, wrong: float) -> numpy.ndarray:
    """The upper Clopper-Pearson bound on a share after `hits` of `trials`: too low with probability at most `wrong`."""
    from scipy.special import betaincinv  # pyright: ignore[reportMissingTypeStubs]

    hits = numpy.asarray(hits, dtype=float)
    rest = numpy.maximum(trials - hits, 1e-9)
    return numpy.where(hits >= trials, 1.0, betaincinv(hits + 1, rest, 1 - wrong))


def _bounds(
    inside: numpy.ndarray, outside: numpy.ndarray, thresholds: numpy.ndarray, delta: float, wrong: float
) -> numpy.ndarray:
    """The lower bound on epsilon at each threshold; minus infinity where there is none."""
    missed = numpy.searchsorted(numpy.sort(inside), thresholds, side="left")
    alarms = len(outside) - numpy.searchsorted(numpy.sort(outside), thresholds, side="left")
    m, f = upper_share(missed, len(inside), wrong), upper_share(alarms, len(outside), wrong)
    return numpy.maximum(_log_ratio(1 - delta - m, f), _log_ratio(1 - delta - f, m))


def _log_ratio(above: numpy.ndarray, below: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(above > 0, numpy.log(numpy.maximum(above, 1e-300) / below), -math.inf)


def _read(values: Sequence[float], what: str) -> numpy.ndarray:
    scores = numpy.asarray(values, dtype=float).reshape(-1)
    if len(scores) < 4:
        raise DataError(f"An audit has {len(scores)} trials {what} the canary.", "At least 4 are needed.")
    if not numpy.isfinite(scores).all():
        raise DataError(f"An audit has a score that is not finite in a trial {what} the canary.")
    return scores

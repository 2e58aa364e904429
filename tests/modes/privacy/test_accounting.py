"""The accountants against published numbers, closed forms, other libraries and their own monotonicity."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

import numpy
import pytest
import torch

from fedllm.core.errors import ConfigError, DataError, MissingExtra, RunError
from fedllm.modes.privacy import accounting, mechanism
from fedllm.modes.privacy.accounting import (
    FixedSize,
    Sampled,
    TreeRun,
    check_delta,
    event_from_json,
    event_to_json,
    gaussian_delta,
    gaussian_epsilon,
    joined_noise,
    noise_for,
    participation_sensitivity,
    relation_of,
    renyi_epsilon,
    solve,
    spent,
    split_noise,
    tree_sensitivity,
)
from fedllm.modes.privacy.audit import audit, upper_share
from fedllm.modes.privacy.mechanism import NoiseSource, clip

DELTA = 1e-5


counted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed (extra: privacy)"
)


def renyi(order: int, noise: float, rate: float) -> float:
    """The formula for integer orders, written out."""
    logs = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return float(numpy.logaddexp.reduce(logs)) / (order - 1)


@counted
@pytest.mark.parametrize(
    ("rate", "noise", "steps", "rdp", "pld"),
    [
        (0.01, 1.0, 1000, 2.101, 1.828),
        (0.01, 1.1, 10000, 5.632, 5.193),
        (0.1, 1.0, 50, 5.885, 5.148),
        (1.0, 5.0, 100, 10.726, 9.997),
        (1.0, 1.0, 1, 4.728, 4.37718),
    ],
)
def test_reference_numbers(rate: float, noise: float, steps: int, rdp: float, pld: float) -> None:
    found = spent([(Sampled(noise, rate), steps)], DELTA)
    assert found.rdp == pytest.approx(rdp, abs=2e-3)
    assert found.epsilon == pytest.approx(pld, abs=2e-3)
    assert found.epsilon <= found.rdp == renyi_epsilon([(Sampled(noise, rate), steps)], DELTA)
    assert (found.relation, found.delta) == ("add-or-remove-one", DELTA)
    assert found.accountant == ("analytic" if rate == 1 else "pld")


@counted
def test_the_second_opinion_is_the_published_formula() -> None:
    for rate, noise, steps in ((0.01, 1.0, 1000), (0.1, 1.0, 50)):
        orders = range(2, 65)
        costs = [
            steps * renyi(a, noise, rate) + math.log1p(-1 / a) - (math.log(DELTA) + math.log(a)) / (a - 1)
            for a in orders
        ]
        found = renyi_epsilon([(Sampled(noise, rate), steps)], DELTA)
        assert min(costs) * 0.97 < found <= min(costs) + 1e-9  # fractional orders between may do a little better


@counted
def test_the_mnist_number_of_abadi_et_al() -> None:
    """CCS 2016, section 5: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5: 1.26 by the moments accountant."""
    moments = min(10_000 * renyi(a, 4.0, 0.01) + math.log(1 / DELTA) / (a - 1) for a in range(2, 65))
    assert moments == pytest.approx(1.26, abs=0.01)
    found = spent([(Sampled(4.0, 0.01), 10_000)], DELTA)
    assert 0.94 < found.epsilon < found.rdp < moments


@counted
def test_one_step_of_everybody_is_the_analytic_gaussian_mechanism() -> None:

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2  # exact in the lower tail, unlike 1 + erf

    for noise, delta in itertools.product((0.5, 1.0, 3.0, 20.0), (1e-3, 1e-5, 1e-8)):
        found = spent([(Sampled(noise), 1)], delta).epsilon
        mu = 1 / noise
        cost = phi(mu / 2 - found / mu) - math.exp(found) * phi(-mu / 2 - found / mu)
        assert cost == pytest.approx(delta, rel=1e-6) or found == 0
    assert spent([(Sampled(1000.0), 1)], 1e-3).epsilon == 0
    many = spent([(Sampled(5.0), 100)], DELTA).epsilon
    assert many == pytest.approx(gaussian_epsilon(math.sqrt(100) / 5, DELTA), rel=1e-8)
    assert gaussian_delta(0.0, 1.0) == 0 and gaussian_epsilon(0.0, DELTA) == 0
    assert gaussian_epsilon(100.0, 1e-10) > 5000 and gaussian_epsilon(math.inf, DELTA) == math.inf


@counted
def test_the_closed_form_agrees_with_the_loss_distribution() -> None:
    for mu in (0.2, 1.0, 2.0):
        numeric = accounting._loss_epsilon(0.0, [(Sampled(1 / mu, 1.0), 1)], DELTA, 1.0)
        assert gaussian_epsilon(mu, DELTA) == pytest.approx(numeric, abs=2e-3)


@counted
def test_opacus_agrees() -> None:
    found = pytest.importorskip("opacus.accountants", reason="opacus is not installed", exc_type=ImportError)
    for rate, noise, steps in ((0.01, 1.0, 1000), (0.1, 1.0, 50)):
        ours = spent([(Sampled(noise, rate), steps)], DELTA)
        for accountant, mine, close in (
            (found.RDPAccountant(), ours.rdp, 5e-3),
            (found.PRVAccountant(), ours.epsilon, 0.02),
        ):
            accountant.history = [(noise, rate, steps)]
            assert mine == pytest.approx(accountant.get_epsilon(delta=DELTA), abs=close)


@counted
def test_epsilon_falls_with_noise_and_rises_with_everything_else() -> None:
    def cost(noise: float = 1.0, rate: float = 0.05, steps: int = 100, delta: float = DELTA) -> float:
        return spent([(Sampled(noise, rate), steps)], delta).epsilon

    assert cost(0.8) > cost() > cost(8.0) > 0
    assert cost(rate=0.01) < cost() < cost(rate=0.06) < cost(rate=1.0)
    assert cost(steps=10) < cost() < cost(steps=101)
    assert cost() < cost(delta=1e-7)
    apart = [(Sampled(1.0, 0.05), 60), (Sampled(1.0, 0.05), 40), (Sampled(9.0, 0.5), 0)]
    assert spent(apart, DELTA).epsilon == cost()
    more = spent([(Sampled(1.0, 0.05), 100), (Sampled(4.0), 3)], DELTA)
    assert more.epsilon > cost() and more.accountant == "pld"


@counted
def test_what_is_released_without_noise_has_no_bound() -> None:
    for event in (Sampled(0.0, 0.1), FixedSize(0.0, 1, 10), TreeRun(0.0, 8)):
        assert spent([(event, 1)], DELTA).epsilon == math.inf
    assert spent([], DELTA).epsilon == 0
    assert spent([(Sampled(0.02, 0.5), 1000)], DELTA).accountant == "rdp"  # far from any promise: not convolved


@counted
def test_sets_of_fixed_size_are_not_poisson_samples() -> None:
    """One unit replaced moves the sum by two bounds: the reference 9.428 is for noise of twice the bound."""
    poisson = spent([(Sampled(1.0, 0.1), 50)], DELTA).epsilon
    fixed = spent([(FixedSize(1.0, 10, 100), 50)], DELTA)
    assert fixed.relation == "replace-one" and fixed.accountant == "rdp"
    assert fixed.epsilon == pytest.approx(47.03, abs=0.01) and fixed.epsilon > 5 * poisson
    assert spent([(FixedSize(2.0, 10, 100), 50)], DELTA).epsilon == pytest.approx(9.428, abs=1e-3)
    whole = spent([(FixedSize(2.0, 10, 10), 1)], DELTA).epsilon  # all are in: the Gaussian mechanism, replace-one
    assert whole == pytest.approx(renyi_epsilon([(Sampled(1.0), 1)], DELTA), rel=1e-9)
    with pytest.raises(ConfigError, match="fixed size"):
        spent([(FixedSize(1.0, 10, 100), 1), (Sampled(1.0, 0.1), 1)], DELTA)
    assert relation_of([(FixedSize(1.0, 10, 100), 1), (Sampled(1.0), 0)]) == "replace-one"


@counted
def test_a_tree_costs_what_its_height_says() -> None:
    found = spent([(TreeRun(5.0, 1000), 1)], DELTA)
    assert found.rdp == pytest.approx(2.814, abs=1e-3)
    assert found.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(10) / 5, DELTA)) and found.epsilon < found.rdp
    assert found.relation == "zero-out-one"
    two = spent([(TreeRun(5.0, 1000), 2)], DELTA).epsilon  # a restart, and everybody again
    assert two == pytest.approx(gaussian_epsilon(math.sqrt(20) / 5, DELTA)) and two > found.epsilon
    assert spent([(TreeRun(5.0, 1000, 3), 1)], DELTA).epsilon > two


def test_the_sensitivity_of_a_tree_by_brute_force() -> None:
    for steps in range(1, 11):
        assert tree_sensitivity(steps) ** 2 == pytest.approx(math.ceil(math.log2(steps + 1)))
        for separation, most in itertools.product((1, 2, 3), (1, 2, 3)):
            worst = 0.0
            for at in itertools.chain(*(itertools.combinations(range(steps), k) for k in range(1, most + 1))):
                if any(right - left < separation for left, right in itertools.pairwise(at)):
                    continue
                nodes = [
                    sum(start <= step < start + (1 << h) for step in at)
                    for h in range(5)
                    for start in range(0, steps - (1 << h) + 1, 1 << h)
                ]
                exact = math.sqrt(sum(n * n for n in nodes))
                assert participation_sensitivity(steps, at) == pytest.approx(exact)
                worst = max(worst, exact)
            assert tree_sensitivity(steps, most, separation) >= worst - 1e-12


@counted
@pytest.mark.parametrize(("epsilon", "steps", "rate"), [(8.0, 50, 0.1), (0.5, 1, 1.0), (30.0, 20, 1.0)])
def test_the_noise_that_is_solved_for_keeps_to_the_budget_and_wastes_little(
    epsilon: float, steps: int, rate: float
) -> None:
    noise = noise_for(epsilon, DELTA, steps, rate)
    assert 0.999 * epsilon <= spent([(Sampled(noise, rate), steps)], DELTA).epsilon <= epsilon
    if (epsilon, steps) == (8.0, 50):
        assert noise < 0.8573  # what Renyi orders would ask for


@counted
def test_more_budget_needs_less_noise_and_more_steps_more() -> None:
    noises = [noise_for(epsilon, DELTA, 10) for epsilon in (0.1, 1.0, 8.0, 100.0)]
    assert noises == sorted(noises, reverse=True)
    assert noise_for(1.0, DELTA, 10) < noise_for(1.0, DELTA, 20) < noise_for(1.0, 1e-7, 20)
    of_trees = solve(lambda z: [(TreeRun(z, 64), 3)], 4.0, DELTA)
    assert spent([(TreeRun(of_trees, 64), 3)], DELTA).epsilon <= 4.0
    assert solve(lambda z: [(TreeRun(z * 1e9, 1), 1)], 4.0, DELTA) > 0  # any noise will do


@counted
def test_the_share_of_an_adaptive_bound() -> None:
    assert split_noise(1.0, 5.0) == pytest.approx(1.00504, abs=1e-5)
    for total, count in ((0.5, 1.0), (1.0, 5.0), (3.0, 2.0)):
        updates = split_noise(total, count)
        assert updates > total and joined_noise(updates, count) == pytest.approx(total)
        both = gaussian_epsilon(math.hypot(1 / updates, 0.5 / count), DELTA)  # a unit moves the sum of bits by 1/2
        assert both == pytest.approx(spent([(Sampled(total), 1)], DELTA).epsilon)
    assert split_noise(0.0, 5.0) == joined_noise(0.0, 5.0) == joined_noise(1.0, 0.0) == 0
    with pytest.raises(ConfigError, match="above 1"):
        split_noise(2.0, 1.0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Sampled(-1.0), "noise"),
        (lambda: Sampled(math.nan), "noise"),
        (lambda: Sampled(math.inf), "noise"),
        (lambda: Sampled(1.0, 0.0), "rate"),
        (lambda: Sampled(1.0, 1.1), "rate"),
        (lambda: FixedSize(1.0, 11, 10), "11 of 10"),
        (lambda: FixedSize(1.0, 0, 10), "0 of 10"),
        (lambda: TreeRun(1.0, 0), "steps=0"),
        (lambda: TreeRun(1.0, 4, 0), "participations=0"),
        (lambda: spent([(Sampled(1.0), 1)], 0.0), "delta=0"),
        (lambda: spent([(Sampled(1.0), 1)], 1.0), "delta=1"),
        (lambda: spent([(Sampled(1.0), -1)], DELTA), "-1 times"),
        (lambda: noise_for(0.0, DELTA, 10), "epsilon=0"),
        (lambda: noise_for(math.inf, DELTA, 10), "epsilon=inf"),
        (lambda: noise_for(1.0, DELTA, 0), "0 releases"),
        (lambda: check_delta(0.01, 100), "delta=0.01 is given for 100"),
        (lambda: participation_sensitivity(4, [1, 4]), "step 4 of 4"),
    ],
)
def test_what_cannot_be_is_refused(wrong: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        wrong()  # type: ignore[operator]


@counted
def test_a_budget_that_no_noise_keeps_to_is_refused() -> None:
    with pytest.raises(ConfigError, match="No noise"):
        noise_for(1e-9, 1e-12, 1000)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtra, match=r"fedllm\[privacy\]"):
        spent([(Sampled(1.2345, 0.1), 3)], DELTA)


def test_events_as_plain_data() -> None:
    for event in (Sampled(0.1, 1 / 3), FixedSize(1.5, 3, 10), TreeRun(2.0, 8, 2, 3)):
        assert event_from_json(event_to_json(event)) == event
    for facts in (None, {"kind": "sample"}, {"kind": "sampled"}, {"kind": "sampled", "noise": -1.0}, {"kind": ["x"]}):
        with pytest.raises(RunError):
            event_from_json(facts)


def test_clopper_pearson_bounds() -> None:
    shares = upper_share(numpy.array([0, 3, 10]), 10, 0.025)
    assert shares[0] == pytest.approx(1 - 0.025 ** (1 / 10)) and shares[2] == 1
    below = sum(math.comb(10, k) * shares[1] ** k * (1 - shares[1]) ** (10 - k) for k in range(4))
    assert below == pytest.approx(0.025)


@counted
def test_an_audit_stays_below_what_was_accounted_and_catches_broken_noise() -> None:
    like, bound, found = {"trials": torch.empty(20_000)}, 1.0, []
    accounted = spent([(Sampled(1.0), 1)], DELTA).epsilon
    canary = float(clip({"canary": torch.tensor([9.0])}, bound)[0]["canary"])
    for broken in (1.0, 0.5, 0.125):  # every entry is one run of a mechanism that should have noise of one bound
        std = broken * bound
        inside, outside = (
            mechanism.noise(like, std, NoiseSource.from_seed(3), "audit", str(broken), side)["trials"].numpy()
            for side in "io"
        )
        found.append(audit(canary + inside, outside, DELTA))
    assert 0.5 < found[0].epsilon < accounted and not found[0].refutes(accounted)
    assert found[0].epsilon < found[1].epsilon < found[2].epsilon <= found[2].ceiling
    assert found[2].refutes(accounted)


def test_the_confidence_of_an_audit_is_kept() -> None:
    """Scores of a mechanism with epsilon = 1 exactly (randomised response): few bounds may lie above it."""
    rng = numpy.random.default_rng(1)
    honest = 1 / (1 + math.exp(-1.0))
    above = 0
    for _ in range(300):
        inside, outside = rng.random(200) < honest, rng.random(200) >= honest
        above += audit(inside.astype(float), outside.astype(float), 1e-9, 0.9).refutes(1.0)
    assert above <= 0.1 * 300 + 3 * math.sqrt(0.09 * 300)


def test_an_audit_of_noise_alone_proves_nothing_and_bad_scores_are_refused() -> None:
    rng = numpy.random.default_rng(2)
    found = audit(rng.random(500).tolist(), rng.random(500).tolist(), DELTA)
    assert found.epsilon < 0.6 and found.trials == 500 and 3 < found.ceiling < 6
    for inside, outside in (([1.0] * 3, [0.0] * 9), ([1.0] * 9, [math.nan] * 9)):
        with pytest.raises(DataError):
            audit(inside, outside, DELTA)
    with pytest.raises(ConfigError, match="confidence"):
        audit([1.0] * 9, [0.0] * 9, DELTA, 1.0)

"""Evolution - CMA-ES whose whole state is tensors, so that it can travel, be saved and go on with the same bits.

Every step is done by the package `cma` (Hansen and others): its object is built from the state, makes one or more
steps, and the state is taken out of it again. Samples come from the caller's random stream, never from NumPy's global
one. The extra `blackbox` brings the package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy
import torch

from fedllm.core.errors import ConfigError, MissingExtra, ModelError
from fedllm.core.tensors import Tensors

LEAST = 3
"""Solutions that one step of the strategy needs; `cma` refuses fewer."""
LARGEST = 1e9
"""No number of a client's result counts as larger: squares must not overflow, whatever a client sends."""


def first_state(size: int, sigma: float) -> Tensors:
    """The state before the first step: mean 0, covariance 1 (float64).

    Returns:
        mean, pc, ps of shape [size], C of shape [size, size], sigma and count of shape [1].
    """
    zeros: Tensors = {name: torch.zeros(size, dtype=torch.float64) for name in ("mean", "pc", "ps")}
    return zeros | {"C": torch.eye(size, dtype=torch.float64)} | vectors(sigma=[sigma], count=[0.0])


class Evolution:
    """A strategy at work.

    Args:
        state: see :func:`first_state`. Without pc, ps and count the paths begin at zero, without C it is round; such a
            one is to make several steps, and mirrors bad samples where it has few, as `cma` does by default.
        solutions: how many are told in each step.
        rng: samples are drawn from it.
        parents: how many of them are recombined; half of them where None.

    Raises:
        MissingExtra: `cma` is not installed.
        ConfigError: fewer than three solutions, or a covariance that is not positive definite.
    """

    def __init__(self, state: Tensors, solutions: int, rng: numpy.random.Generator, parents: int | None = None) -> None:
        if solutions < LEAST:
            raise ConfigError(
                f"{solutions} solutions are too few for CMA-ES.", f"Allowed: {LEAST} or more.", str(LEAST)
            )
        held = {name: tensor.double().numpy().copy() for name, tensor in state.items()}
        cma, self.solutions = _cma(), solutions
        goes_on = {"updatecovwait": 0, "CMA_mirrors": 0} if "count" in held else {}  # what would need the last step
        options = {
            "popsize": solutions, "CMA_mu": parents, "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan, "verbose": -9, "verb_log": 0, "verb_disp": 0,
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA, **goes_on,
        }  # fmt: skip
        self._es: Any = cma.CMAEvolutionStrategy(held["mean"], float(held["sigma"][0]), options)
        es, model = self._es, self._es.sm
        if "count" in held:
            es.countiter = model.count_tell = model.last_update = int(held["count"][0])
            es.pc, es.adapt_sigma.ps = held["pc"], held["ps"]
            es.timer, es.mean_old = cma.utilities.utils.ElapsedWCTime(), es.mean  # made in the first step only
        model.C = held.get("C", numpy.eye(len(held["mean"])))
        if float(numpy.linalg.eigvalsh(model.C)[0]) <= 0:
            raise ConfigError("A covariance is not positive definite.", "The state of the search is damaged.")
        model.update_now(-1)
        es._updateBDfromSM(model)

    @property
    def sigma(self) -> float:
        """The step size."""
        return float(self._es.sigma)

    @property
    def parents(self) -> int:
        """How many solutions are recombined."""
        return int(self._es.sp.weights.mu)

    @property
    def mean(self) -> torch.Tensor:
        """Where the search is, [size]."""
        return torch.from_numpy(self._es.mean.copy())

    def ask(self) -> list[torch.Tensor]:
        """Solutions to try, each [size]."""
        return [torch.from_numpy(numpy.array(z)) for z in self._es.ask()]

    def tell(self, solutions: Sequence[torch.Tensor], fitness: Sequence[float], sigma: float | None = None) -> None:
        """One step: the smaller a fitness the better; one that is not a number has the worst rank.

        Args:
            solutions: as asked, or others: those that are too far from the mean to be samples are drawn nearer.
            fitness: one each.
            sigma: the step size that they were drawn with, where it is not the strategy's own.
        """
        if sigma is not None:
            self._es.sigma = sigma
            self._es.ask()  # the paths of a strategy that was never asked would be stale
        drawn = [z.double().numpy().copy() for z in solutions]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._es.tell(drawn, ranked(fitness))

    def state(self) -> Tensors:
        """The state after the last step; see :func:`first_state`."""
        es = self._es
        names = {"mean": es.mean, "pc": es.pc, "ps": es.adapt_sigma.ps, "C": es.sm.C}
        found = {name: torch.from_numpy(numpy.array(value, dtype=numpy.float64)) for name, value in names.items()}
        return found | vectors(sigma=[self.sigma], count=[float(es.countiter)])


async def searched(
    strategy: Evolution, iterations: int, measured: Callable[[torch.Tensor], Awaitable[tuple[float, float]]]
) -> tuple[list[float], float, float]:
    """Ask, measure and tell so many times.

    Args:
        strategy: moves.
        iterations: how many steps.
        measured: the fitness and the loss of a solution.

    Returns:
        the step size after each iteration, and what is measured at the mean in the end.

    Raises:
        ModelError: no solution of an iteration has a fitness that is a number.
    """
    sigmas = []
    for _ in range(iterations):
        tried = strategy.ask()
        found = [(await measured(z))[0] for z in tried]
        if not any(map(math.isfinite, found)):
            raise ModelError("No prompt that was tried has a loss that is a number.", action="Lower the step size.")
        strategy.tell(tried, found)
        sigmas.append(strategy.sigma)
    return sigmas, *(await measured(strategy.mean))


def over_clients(
    search: Tensors, replies: Sequence[Tensors], least_sigma: float, rng: numpy.random.Generator
) -> Tensors:
    """One step of the server's strategy, told the clients' results, whatever their number (FedBPT, section 3.2).

    Its step size is set to what the clients' searches had: sqrt(sum_k sum_i sigma_ki^2 / (m parents)). The next step
    size of the clients is theirs times the change of the server's, never more than before and not below `least_sigma`.

    Args:
        search: see :func:`first_state`, with the clients' step size as `local` [1].
        replies: of each client its mean `z`, that mean's `fitness` [1], its step sizes `sigmas` [iterations] and its
            number of `parents` [1]. One reply becomes the mean. Two are recombined by rank; nothing else moves.
        least_sigma: the smallest step size of the clients.
        rng: for samples that nobody evaluates.
    """
    means = [reply["z"].double().clamp(-LARGEST, LARGEST) for reply in replies]
    fitness, count, old = [float(reply["fitness"]) for reply in replies], len(replies), float(search["local"])
    if count < LEAST:
        order = sorted(range(count), key=ranked(fitness).__getitem__)
        weights = zip(positive_weights(count), order, strict=True)
        return {**search, "mean": sum((w * means[i] for w, i in weights), torch.zeros_like(means[0]))}
    squares = [
        float(r["sigmas"].clamp(1e-12, old * math.exp(len(r["sigmas"]))).square().sum() / r["parents"].clamp(min=1))
        for r in replies
    ]
    sigma = math.sqrt(sum(squares) / count)
    strategy = Evolution({name: search[name] for name in search if name != "local"}, count, rng, count)
    strategy.tell(means, fitness, sigma)
    return strategy.state() | vectors(local=[min(old, max(least_sigma, strategy.sigma / sigma * old))])


def vectors(**values: Sequence[float]) -> Tensors:
    """Named float64 vectors."""
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}


def ranked(fitness: Sequence[float]) -> list[float]:
    """Finite numbers of the same ranks; what is not a number is behind all others."""
    known = sorted({value for value in fitness if math.isfinite(value)})
    place = {value: float(number) for number, value in enumerate(known)}
    behind = {-math.inf: -1.0}
    return [place.get(value, behind.get(value, float(len(known)))) for value in fitness]


def positive_weights(solutions: int) -> list[float]:
    """The weights of recombination where all solutions are parents, the best first; their sum is 1."""
    raw = [math.log(solutions + 0.5) - math.log(rank) for rank in range(1, solutions + 1)]
    return [weight / sum(raw) for weight in raw]


def _cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like to plot
            import cma  # pyright: ignore[reportMissingTypeStubs]
    except ModuleNotFoundError:
        raise MissingExtra("cma", "blackbox", "CMA-ES") from None
    return cma

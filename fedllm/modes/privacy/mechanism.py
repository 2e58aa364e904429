"""Mechanism - clip, draw and noise: what makes a sum of contributions private.

Nothing here keeps account; :mod:`fedllm.modes.privacy.accounting` says what a release costs, and
:mod:`fedllm.modes.privacy.ledger` what is left. Clients are units of the central mechanism, and examples are units of
DP-SGD: their gradients lie on the first axis of stacked tensors, as clients do in a batched pass.

Sources: Abadi et al., CCS 2016, algorithm 1 (record level); McMahan et al., Learning Differentially Private Recurrent
Language Models, ICLR 2018, algorithm 1 (client level, fixed denominator); Andrew et al., NeurIPS 2021, algorithm 1
(adaptive clipping); Kairouz et al., ICML 2021, algorithm 1 and appendix D (tree noise and restarts).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import numpy
import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors, finite, norm, same_shapes

CHUNK = 1 << 16
"""Normal numbers drawn at once."""
KEY_BYTES = 32
"""Length of a noise key."""
SLACK = 2.0**-22
"""What clips to a bound aims this much below it, so that rounding to float32 cannot lead past it."""


class _Ordered(Protocol):
    def __lt__(self, other: Self, /) -> bool: ...


Unit = TypeVar("Unit", bound=_Ordered)


class NoiseSource:
    """Random numbers that nobody can guess without the key, and everybody can repeat with it.

    A number is a function of the key and of the names of what it is for (SHAKE-256 in counter mode), so resuming,
    the order of tensors and their number change nothing. One list of names must serve one set of data: the same noise
    on two different sums would show their difference as it is.

    Args:
        key: 32 bytes. Keep them as the data themselves: who knows them can take the noise away.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"A noise key has {len(key)} bytes.", f"It must have {KEY_BYTES}.")
        self.key = bytes(key)

    @classmethod
    def secret(cls) -> NoiseSource:
        """A new key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: int) -> NoiseSource:
        """The same key for the same seed: for experiments. It protects from nobody who knows or guesses the seed."""
        return cls(hashlib.sha256(f"fedllm noise\x1f{int(seed)}".encode()).digest())

    def normal(self, count: int, *names: str | int) -> torch.Tensor:
        """`count` independent standard normal numbers, float64 on the CPU; none is beyond 8.2."""
        result = torch.empty(count, dtype=torch.float64)
        for number, start in enumerate(range(0, count, CHUNK)):
            part = result[start : start + CHUNK]
            words = numpy.frombuffer(self._bytes(8 * part.numel(), "normal", number, *names), "<u8") >> 12
            # 52 bits and a half: never 0, never 1, and symmetric about a half.
            part.copy_(torch.from_numpy((words.astype(numpy.float64) + 0.5) * 2.0**-52))
            torch.special.ndtri(part, out=part)
        return result

    def stream(self, *names: str | int) -> numpy.random.Generator:
        """A NumPy generator whose 256-bit seed cannot be guessed without the key: for drawing who takes part."""
        return numpy.random.default_rng(int.from_bytes(self._bytes(32, "stream", *names), "big"))

    def _bytes(self, count: int, *names: str | int) -> bytes:
        typed = (f"str:{name}" if isinstance(name, str) else f"int:{int(name)}" for name in names)
        text = "".join(f"{len(name.encode())}:{name}" for name in typed)
        return hashlib.shake_256(self.key + text.encode()).digest(count)


def clip(update: Mapping[str, torch.Tensor], bound: float) -> tuple[Tensors, float, bool]:
    """`update` scaled down so that its Euclidean norm, over all tensors together, is at most `bound`.

    Args:
        update: a change of the trainable tensors; it is not altered.
        bound: above 0; infinity clips nothing.

    Returns:
        The update in float32 or better, the factor (1 where nothing was clipped), and whether it was clipped.

    Raises:
        UploadRejected: a value that is not finite, or an integer tensor, which no noise would cover.
        ConfigError: a bound that is not positive.
    """
    _check_bound(bound)
    _check_real(update, "The update")
    bad = finite(update)
    if bad is not None:
        raise UploadRejected(f"The update has a value that is not finite in '{bad}': it cannot be clipped.")
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in update.items()}
    length = _norm(wide)
    if length <= bound:
        return wide, 1.0, False
    factor = bound * (1 - SLACK) / length
    return {name: tensor * factor for name, tensor in wide.items()}, factor, True


@dataclass(frozen=True)
class ClippedSum:
    """Gradients of single examples, clipped and added up.

    Attributes:
        total: the sum over the examples, float64, in the shapes of the parameters.
        norms: [B], float64: the norms before clipping; infinite for an example that was left out.
        clipped: how many were scaled down.
        dropped: how many were left out, because a value was not finite. They count as zero, which no bound forbids.
    """

    total: Tensors
    norms: torch.Tensor
    clipped: int
    dropped: int


def clip_each(stacked: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
    """The sum over examples of their gradients, each clipped over all tensors together (DP-SGD, algorithm 1).

    Args:
        stacked: [B, ...] per tensor, example b at index b of each. B may be 0: the sum is zero, and gets noise too.
        bound: above 0.

    Raises:
        UploadRejected: tensors whose first axes differ, integer tensors, or no tensors at all.
        ConfigError: a bound that is not positive.
    """
    _check_bound(bound)
    _check_real(stacked, "The stacked gradients")
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in stacked.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise UploadRejected(
            f"The stacked gradients have first axes of {sorted(sizes)} examples.", "All must be equally long."
        )
    flat = {name: tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])) for name, tensor in stacked.items()}
    squares = torch.stack([torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).square() for t in flat.values()])
    norms = squares.sum(0).sqrt()
    usable = torch.isfinite(norms)
    beyond = usable & (norms > bound)
    factors = torch.where(beyond, bound * (1 - SLACK) / norms, usable.double())
    total = {}
    for name, rows in flat.items():
        kept = rows.double() if bool(usable.all()) else torch.where(usable[:, None], rows.double(), 0.0)
        total[name] = (factors @ kept).reshape(stacked[name].shape[1:])
    dropped = int((~usable).sum())
    return ClippedSum(total, torch.where(usable, norms, math.inf), int(beyond.sum()), dropped)


def summed(updates: Iterable[Mapping[str, torch.Tensor]], like: Mapping[str, torch.Tensor]) -> Tensors:
    """The sum of clipped updates in float64, zero where there are none.

    Raises:
        UploadRejected: an update of other names or shapes than `like`.
    """
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in like.items()}
    for update in updates:
        same_shapes(update, total, "An update")
        for name, tensor in update.items():
            total[name].add_(tensor.to("cpu"))
    return total


def noise(like: Mapping[str, torch.Tensor], std: float, source: NoiseSource, *names: str | int) -> Tensors:
    """Independent Gaussian noise in the shapes of `like`: float64 on the CPU.

    Args:
        like: names and shapes.
        std: standard deviation of every entry: noise multiplier * clipping bound.
        source: where it comes from.
        names: what it is for, such as "round", 12. Use them once: see :class:`NoiseSource`.

    Raises:
        ConfigError: a standard deviation that is negative or not finite.
    """
    if not (std >= 0 and math.isfinite(std)):
        raise ConfigError(f"The noise has a standard deviation of {std}.", "Allowed: 0 and more.")
    return {
        name: source.normal(tensor.numel(), "tensor", *names, name).reshape(tensor.shape) * std
        if std
        else _nothing(tensor)
        for name, tensor in like.items()
    }


def release(
    total: Mapping[str, torch.Tensor], std: float, expected: float, source: NoiseSource, *names: str | int
) -> Tensors:
    """(total + noise) / expected: the mean that may be published, in float32.

    Args:
        total: the sum of clipped contributions; zeros where nobody came, which must be released all the same.
        std: standard deviation of the noise on the sum.
        expected: the number of contributions on average, rate * population. Never the number that came: it depends on
            who is in the data, and dividing by it is not covered by the accounting.
        source: where the noise comes from.
        names: what it is for; see :func:`noise`.

    Raises:
        ConfigError: an expected number that is not positive.
        UploadRejected: a sum that is not finite, or integer tensors.
    """
    if not (expected > 0 and math.isfinite(expected)):
        raise ConfigError(f"{expected} contributions are expected.", "Allowed: above 0.")
    _check_real(total, "The sum")
    bad = finite(total)
    if bad is not None:
        raise UploadRejected(f"The sum has a value that is not finite in '{bad}'.", action="Clip every contribution.")
    drawn = noise(total, std, source, *names)
    return {name: ((tensor.to("cpu").double() + drawn[name]) / expected).float() for name, tensor in total.items()}


def poisson(clients: Iterable[Unit], rate: float, rng: numpy.random.Generator) -> list[Unit]:
    """Those of `clients` whose coin says so: each joins with probability `rate`, whatever the others do.

    How many come is random, and may be none. Their order before does not matter: coins are tossed in the order of the
    ids, and the result is in it.

    Args:
        clients: ids of clients, or numbers of examples, without repetition.
        rate: from 0 to 1.
        rng: such as :meth:`NoiseSource.stream`; nobody the guarantee is against may know it.

    Raises:
        ConfigError: a rate out of range, or a repeated unit.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"The sampling rate is {rate}.", "Allowed: from 0 to 1.")
    ordered = sorted(clients)
    twice = next((left for left, right in pairwise(ordered) if left == right), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is listed twice.", "Every unit has one coin.", action="List it once.")
    return [unit for unit, coin in zip(ordered, rng.random(len(ordered)).tolist(), strict=True) if coin < rate]


@dataclass(frozen=True)
class AdaptiveClip:
    """A clipping bound that follows a quantile of the norms (Andrew et al., algorithm 1).

    A client sends :meth:`bit`, +1/2 where its norm is within the bound and -1/2 where not, to be summed like the
    updates. Halves and not 0 and 1, because a client that joins or leaves then moves the sum by 1/2 and not by 1; only
    so does :func:`~fedllm.modes.privacy.accounting.split_noise` hold. The sum is divided by the expected number, as
    updates are.

    Args:
        expected: m, the number of clients in a round on average.
        quantile: gamma, the share that should be within the bound.
        rate: eta, the bound is multiplied by exp(-eta (b - gamma)).
        noise: the standard deviation of the noise on the sum of the bits; None for m / 20, as the paper suggests.
        least: the bound never falls below it: a run whose updates are all zero would drive it to nothing.
        most: nor rises above it.
    """

    expected: float
    quantile: float = 0.5
    rate: float = 0.2
    noise: float | None = None
    least: float = 1e-10
    most: float = 1e10

    def __post_init__(self) -> None:
        room = {"least": self.least, "most": self.most}
        facts = {"expected": self.expected, "rate": self.rate, "noise": self.std, **room}
        for name, value in facts.items():
            if not (value > 0 and math.isfinite(value)) and not (name == "noise" and value == 0):
                raise ConfigError(f"An adaptive bound has {name}={value}.", "Allowed: above 0.")
        if not 0 < self.quantile < 1:
            raise ConfigError(f"An adaptive bound follows the quantile {self.quantile}.", "Allowed: between 0 and 1.")

    @property
    def std(self) -> float:
        """The standard deviation of the noise on the sum of the bits."""
        return self.expected / 20 if self.noise is None else self.noise

    def bit(self, length: float, bound: float) -> float:
        """What a client whose update has the norm `length` sends."""
        return 0.5 if length <= bound else -0.5

    def step(self, bound: float, total: float, source: NoiseSource, *names: str | int) -> float:
        """The bound of the next round, from the sum of the bits of this one; see :func:`noise` for the names."""
        noised = total + self.std * float(source.normal(1, "bits", *names))
        within = 0.5 + noised / self.expected
        return min(max(bound * math.exp(-self.rate * (within - self.quantile)), self.least), self.most)


class Tree:
    """The noise of DP-FTRL on a running sum: that of a binary tree over the steps, and of the trees before it.

    The sum of the first t steps of a tree gets one noise per set bit of t: that of the node over the steps which the
    bit stands for. A node's noise is a function of the key and its place, so nothing but t is needed to go on.

    With restarts a new tree begins after so many steps. What was released last stays in the running sum, noise and
    all, so the noises of finished trees add up. A finished tree that is `complete` is filled with steps of zero up to a
    power of two and leaves the noise of its root alone; its height, and so what it costs, is that of :attr:`leaves`.

    Args:
        like: names and shapes.
        std: standard deviation of a node: noise multiplier * clipping bound.
        source: where the noise comes from.
        restart: steps of a tree; None for one tree without end.
        complete: fill finished trees.
        names: what the trees are for.
    """

    def __init__(
        self,
        like: Mapping[str, torch.Tensor],
        std: float,
        source: NoiseSource,
        *names: str | int,
        restart: int | None = None,
        complete: bool = True,
    ) -> None:
        if restart is not None and restart < 1:
            raise ConfigError(f"A tree restarts after {restart} steps.", "Allowed: 1 and more.")
        self.like = {name: torch.empty(tensor.shape, device="meta") for name, tensor in like.items()}
        self.std, self.source, self.names = std, source, names
        self.restart, self.complete = restart, complete
        self._finished, self._before = 0, self._zeros()

    @property
    def leaves(self) -> int | None:
        """Steps of a whole tree as they are accounted (:class:`~fedllm.modes.privacy.accounting.TreeRun`)."""
        if self.restart is None or not self.complete:
            return self.restart
        return 1 << (self.restart - 1).bit_length()

    def cumulative(self, step: int) -> Tensors:
        """The noise on the sum of the first `step` steps, over all trees: float64.

        Raises:
            ConfigError: a negative step.
        """
        if step < 0:
            raise ConfigError(f"The noise of {step} steps is asked for.", "Allowed: 0 and more.")
        trees, inside = (0, step) if self.restart is None else divmod(step, self.restart)
        self._finish(trees)
        return self._summed(self._before, self._prefix(trees, inside))

    def _finish(self, trees: int) -> None:
        """Bring the noise of the trees before number `trees` together."""
        if trees < self._finished:
            self._finished, self._before = 0, self._zeros()
        while self._finished < trees:
            steps = self.leaves or 0
            self._before = self._summed(self._before, self._prefix(self._finished, steps))
            self._finished += 1

    def _prefix(self, tree: int, steps: int) -> Iterator[Tensors]:
        """The noises of the nodes that make up the first `steps` steps of a tree."""
        start = 0
        for height in reversed(range(steps.bit_length())):
            if steps >> height & 1:
                yield noise(self.like, self.std, self.source, *self.names, "tree", tree, height, start >> height)
                start += 1 << height

    def _summed(self, base: Tensors, parts: Iterable[Tensors]) -> Tensors:
        total = {name: tensor.clone() for name, tensor in base.items()}
        for part in parts:
            for name, tensor in part.items():
                total[name].add_(tensor)
        return total

    def _zeros(self) -> Tensors:
        return {name: _nothing(tensor) for name, tensor in self.like.items()}


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm; of huge values too, whose squares would overflow."""
    length = norm(tensors)
    if math.isfinite(length) and length > 1e-150:
        return length
    largest = max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
    return largest * norm({name: t.double() / largest for name, t in tensors.items()}) if largest else 0.0


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=torch.float64)


def _check_bound(bound: float) -> None:
    if not bound > 0:
        raise ConfigError(f"The clipping bound is {bound}.", "Allowed: above 0.")


def _check_real(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    bad = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if bad is not None:
        raise UploadRejected(
            f"{what} has '{bad}' as {tensors[bad].dtype}, which cannot be clipped or noised.",
            "Real tensors can.",
            action="Freeze it, or leave it out of what travels.",
        )
    if not tensors:
        raise UploadRejected(f"{what} has no tensors.", "At least one is needed.")

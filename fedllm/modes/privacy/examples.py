"""Examples - differential privacy of single examples: every client trains by DP-SGD (Abadi et al. 2016, algorithm 1).

    examples of a step, each by its own coin --> gradients --clip each to C--> sum --+ N(0, (z C)^2)--> / expected batch

Clients noise their own gradients, so the guarantee holds against the server too, and for everything that is made of
what they upload. A client half may train and nothing else: other work on its rows would leave without noise, and so
would its training loss, which is not sent. The noise is solved for the client with the fewest examples, whose examples
are drawn most often; all others spend less.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import ConfigError, FedLLMError, ModeConflict, RunError
from fedllm.core.guard import Guard, Quiet
from fedllm.core.message import Json
from fedllm.core.method import Method
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Fit, Request
from fedllm.modes.means import only_work, works_alone
from fedllm.modes.privacy.accounting import Event, FixedSize, Sampled, event_from_json, event_to_json, solve
from fedllm.modes.privacy.ledger import Ledger, assumptions
from fedllm.modes.privacy.mechanism import NoiseSource, clip_each, noise, poisson

if TYPE_CHECKING:
    from fedllm.modes.privacy.settings import PrivacySettings


RETOLD = 64
"""So many of a client's last releases a site tells the server each time."""


class Examples(Guard):
    """The privacy of examples in one run; also the guard at its clients.

    Args:
        settings: the recipe's section `privacy`.
        sizes: client -> its number of examples.
        train: local training of the method.
        rounds: rounds of the run.
        seed: the run's seed, for `key: seed`.

    Attributes:
        ledger: what each client has spent.
        noise: standard deviation of the noise on a step's sum as a multiple of the clipping bound.

    Raises:
        ConfigError: settings that cannot be kept with this training or these clients.
    """

    def __init__(
        self, settings: PrivacySettings, sizes: Mapping[str, int], train: Train, rounds: int, seed: int
    ) -> None:
        if train.accumulate != 1:
            raise ConfigError(
                f"train.accumulate={train.accumulate} with privacy.level=example.",
                "A step draws its examples by coins and cuts its own passes.",
                action=f"Set train.accumulate=1 and train.batch_size={train.batch_size * train.accumulate}.",
            )
        self.settings, self.sizes, self.train = settings, dict(sizes), train
        self.sampling = Sampling(settings, train.batch_size)
        if settings.noise is not None:
            self.noise = settings.noise
        else:
            smallest = min((n for n in self.sizes.values() if n), default=1)
            steps = max(rounds * train.step_count(n) for n in self.sizes.values())
            self.noise = solve(
                lambda z: [(self.event(smallest, z), steps)], settings.epsilon or math.inf, settings.delta
            )
        self._told: dict[str, list[Json]] = {}
        self._trained: dict[str, list[str]] = {}
        self.source = NoiseSource.from_seed(seed) if settings.key == "seed" else NoiseSource.secret()
        largest = max(1, *self.sizes.values())
        event = self.event(largest, self.noise)
        told = assumptions("example", event, noised_by="client", seeded=settings.key == "seed")
        self.ledger = Ledger(
            "example",
            settings.delta,
            settings.epsilon,
            largest,
            (*told, "How many examples a client has is public."),
        )

    def event(self, count: int, noise: float) -> Event:
        """One step of a client with `count` examples."""
        if self.settings.sampling == "poisson":
            return Sampled(noise, self.sampling.rate(count))
        return FixedSize(noise, self.sampling.batch(count), count)

    # -- at a client --------------------------------------------------------------------------------------------------

    hides = True
    quiet = True

    def allow(self, op: str, client: str) -> None:
        """Nothing but training in `work` is noised."""
        only_work(op, client, "privacy.level=example")

    def beside(self) -> Guard:
        """Models to compare with train without noise, and tell nothing of their training."""
        return Quiet()

    def fit(self, client: str, round: int, number: int, count: int, request: Request) -> DrawnFit:
        """See :class:`~fedllm.core.guard.Guard`."""
        if not isinstance(request, Fit) or request.split != "train" or request.terms or request.targets:
            what = "a fit of other kind" if isinstance(request, Fit) else f"'{type(request).__name__.lower()}'"
            raise ModeConflict(
                f"The client half asks for {what}, whose result no noise covers.",
                "With privacy.level=example, clients train on their own rows and do nothing else with them.",
                "fedavg",
                "Choose another method, or set privacy.level=client.",
            )
        names, again = (client, round, number), 0
        if self.keep is not None:
            seen = self._trained.setdefault("/".join(map(str, names)), [])
            mark = _mark(request)
            if mark not in seen:
                seen.append(mark)
            again = seen.index(mark)
        id = f"round {round}, fit {number}" + (f", again {again}" if again else "")
        event, steps = self.event(count, self.noise), request.train.step_count(count)
        new = self.ledger.spend(id, event, steps, client)
        if self.keep is not None and new:
            self._tell(client, id, event, steps)
            self.keep(self.to_json())
        named = (*names, again) if again else names
        return DrawnFit(self.sampling, self.source, self.noise, named, self.settings.clip, self._expected(count))

    def spent(self, client: str) -> Json:
        """See :class:`~fedllm.core.guard.Guard`. The last ones are told again: an answer before may have been lost."""
        return list(self._told.get(client, ())) or None

    def _tell(self, client: str, id: str, event: Event, count: int) -> None:
        told = self._told.setdefault(client, [])
        told.append([id, event_to_json(event), count])
        del told[:-RETOLD]

    def heard(self, client: str, facts: Json) -> None:
        """See :class:`~fedllm.core.guard.Guard`. What passes the budget is no account: the site would have refused."""
        if client not in self.sizes or not isinstance(facts, list):
            raise ValueError(f"no account of a client's privacy: {type(facts).__name__}")
        for id, event, count in facts:
            if not isinstance(id, str) or type(count) is not int:
                raise ValueError("a release without a name or a count")
            try:
                self.ledger.spend(id, event_from_json(event), count, client)
            except FedLLMError as fault:
                raise ValueError(str(fault)) from fault

    def _expected(self, count: int) -> float:
        poisson = self.settings.sampling == "poisson"
        return self.sampling.rate(count) * count if poisson else float(self.sampling.batch(count))

    # -- guard --------------------------------------------------------------------------------------------------------

    def stops(self, round: int) -> str | None:
        """No client may train any more."""
        steps = self.train.step_count
        if any(
            self.ledger.may(f"round {round}, fit 0", self.event(n, self.noise), steps(n), client)
            for client, n in self.sizes.items()
            if n
        ):
            return None
        return f"every client's privacy budget is spent: {self.ledger.summary()}"

    def told(self) -> Json:
        """What the client who has spent most has spent."""
        spent = self.ledger.spent()
        epsilon = spent.epsilon if math.isfinite(spent.epsilon) else None
        facts = {"epsilon": epsilon, "delta": spent.delta, "budget": self.ledger.epsilon, "unit": self.ledger.unit}
        return {**facts, "noise": self.noise, "clip": self.settings.clip, "line": self.ledger.summary()}

    def report(self) -> list[str]:
        """The whole guarantee, line by line."""
        return self.ledger.report().splitlines()

    def to_json(self) -> Json:
        """The ledger and the key."""
        facts: dict[str, Any] = {"ledger": self.ledger.to_json(), "noise": self.noise, "key": self.source.key.hex()}
        return {**facts, "trained": self._trained} if self._trained else facts

    def restore(self, facts: Json, memory: Tensors | None = None) -> None:
        """Go on with the ledger and the key of a checkpoint."""
        try:
            self.noise, self.source = float(facts["noise"]), NoiseSource(bytes.fromhex(facts["key"]))
            self.ledger = Ledger.from_json(facts["ledger"])
            self._trained = {str(name): [str(one) for one in seen] for name, seen in facts.get("trained", {}).items()}
            for (id, client), entry in self.ledger.entries.items():
                self._tell(client, id, entry.event, entry.count)
        except (KeyError, TypeError, ValueError) as fault:
            raise RunError(
                f"The checkpoint's account of privacy cannot be read: {fault}.",
                action="Restore the file from a copy; what was spent cannot be guessed.",
            ) from fault


def check(method: Any) -> None:
    """Refuse a method whose client half does more with its rows than train on them.

    Raises:
        ModeConflict: with the reason.
    """
    if not isinstance(method, Method):
        raise ModeConflict(
            f"The protocol {method.key} exchanges more than what training gives, and no noise covers that.",
            "With privacy.level=example, clients train on their own rows and do nothing else with them.",
            "fedavg",
        )
    works_alone(method, "privacy.level=example")
    if not method.only_fits:
        raise ModeConflict(
            f"Clients of the method {method.key} do more with their rows than train on them, and no noise covers that.",
            "With privacy.level=example, clients train on their own rows and do nothing else with them.",
            "fedavg",
        )


def _mark(request: Fit) -> str:
    """Stands for what a fit begins with and is held to: the same for the same bits."""
    found = hashlib.sha256()
    trees = {"start": request.start, "fixed": request.fixed or {}, "moments": request.moments or {}, **request.given}
    for place, tree in sorted(trees.items()):
        for name, tensor in sorted(tree.items()):
            found.update(f"{place}/{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            found.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


@dataclass(frozen=True)
class Sampling:
    """Who is in a step: each of a client's examples by a coin, or a batch of fixed size."""

    settings: PrivacySettings
    batch_size: int

    def rate(self, count: int) -> float:
        """The chance of an example to be in a step."""
        return min(1.0, self.batch_size / count if self.settings.rate is None else self.settings.rate)

    def batch(self, count: int) -> int:
        """Examples of a step of fixed size."""
        return max(1, min(count, round(self.rate(count) * count)))


@dataclass(frozen=True)
class DrawnFit:
    """One fit; implements :class:`~fedllm.core.guard.PrivateFit`. It knows of no other client, and no account."""

    sampling: Sampling
    source: NoiseSource
    multiplier: float
    names: Sequence[str | int]
    bound: float
    expected: float

    def draw(self, count: int, step: int) -> list[int]:
        """By a coin of each, or without replacement."""
        stream = self.source.stream("examples", *self.names, step)
        if self.sampling.settings.sampling == "poisson":
            return poisson(range(count), self.sampling.rate(count), stream)
        return sorted(stream.choice(count, size=self.sampling.batch(count), replace=False).tolist())

    def summed(self, stacked: Mapping[str, torch.Tensor]) -> Tensors:
        """Clipped and added up."""
        return clip_each(stacked, self.bound).total

    def noise(self, like: Mapping[str, torch.Tensor], step: int) -> Tensors:
        """The noise on the sum of a step, in the shapes of `like`; float64 on the CPU."""
        return noise(like, self.multiplier * self.bound, self.source, "step", *self.names, step)

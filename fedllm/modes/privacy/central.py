"""Central - differential privacy of clients: uploads are clipped, and the server noises their sum (McMahan, 2018).

    upload --clip to C--> sum over the cohort --+ N(0, (z C)^2)--> / expected cohort --> update

All tensors of an upload count as one vector. Weights are uniform and the denominator is the expected number of clients,
so nothing about who came shows but through the noised sum, and noise is released where nobody came. With `mechanism:
ftrl` the noise of a round is the step of a binary tree's noise on the running sum, and clients take turns in place of
coins (Kairouz et al. 2021).

A round that is played again after an interruption may have the same sum: it gets the same noise and is counted once. Or
it has another, because other clients answered: the same noise would then show the difference of both sums as it is, so
it gets noise of its own (a tree of its own) and is paid for again. What was released is on disk before it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fedllm.core.errors import ConfigError, ModeConflict, RunError, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.message import Dense, Json, Upload
from fedllm.core.method import Method
from fedllm.core.reducer import Reduction, Update
from fedllm.core.tensors import Tensors
from fedllm.modes.means import means, only_work, works_alone
from fedllm.modes.privacy.accounting import Event, FixedSize, Sampled, TreeRun, solve, spent, split_noise
from fedllm.modes.privacy.ledger import Ledger, assumptions
from fedllm.modes.privacy.mechanism import AdaptiveClip, NoiseSource, Tree, clip, poisson, release

if TYPE_CHECKING:
    from fedllm.modes.privacy.settings import PrivacySettings

Released = dict[str, list[tuple[str, int]]]
"""Round -> the sums of it that were released: what stands for the sum, and the number of its noise."""


class Central(Guard):
    """The privacy of clients in one run.

    Args:
        settings: the recipe's section `privacy`.
        method: must reduce every part by a uniform mean, and ask clients for nothing else.
        clients: registered clients.
        cohort: clients per round on average.
        rounds: rounds of the run.
        seed: the run's seed, for `key: seed`.

    Attributes:
        ledger: what has been spent.
        noise: standard deviation of the noise on the sum as a multiple of the clipping bound.
        bound: the clipping bound of the next round.

    Raises:
        ConfigError: settings that cannot be kept with this method, these clients or these rounds.
    """

    def __init__(
        self, settings: PrivacySettings, method: Method, clients: int, cohort: int, rounds: int, seed: int
    ) -> None:
        check(method)
        self.settings, self.clients, self.rounds = settings, clients, rounds
        self.rate = min(1.0, cohort / clients if settings.rate is None else settings.rate)
        self.size, self.bound = cohort, settings.clip
        self.expected = self.rate * clients if self._poisson else float(cohort)
        self.adaptive = self._adaptive()
        self.turns = _Turns(clients, cohort, settings, rounds) if settings.mechanism == "ftrl" else None
        if settings.noise is not None:
            self.noise = settings.noise
        else:
            self.noise = solve(self.releases, settings.epsilon or math.inf, settings.delta)
        self.source = NoiseSource.from_seed(seed) if settings.key == "seed" else NoiseSource.secret()
        self.ledger = Ledger("client", settings.delta, settings.epsilon, clients, self._assumptions())
        self._update_noise = split_noise(self.noise, self.adaptive.std) if self.adaptive else self.noise
        self._trees: dict[int, Tree] = {}
        self._released: Released = {}

    # -- what a release is --------------------------------------------------------------------------------------------

    def event(self, round: int, noise: float) -> tuple[str, Event]:
        """The release that a round belongs to, by its id."""
        if self.turns is not None:
            tree = (round - 1) // self.turns.steps
            return f"tree {tree + 1}", TreeRun(
                noise, self.turns.leaves, self.turns.participations, self.turns.separation
            )
        if self._poisson:
            return f"round {round}", Sampled(noise, self.rate)
        return f"round {round}", FixedSize(noise, min(self.size, self.clients), self.clients)

    def releases(self, noise: float) -> list[tuple[Event, int]]:
        """All releases of a whole run with this noise."""
        found: dict[str, Event] = dict(self.event(round, noise) for round in range(1, self.rounds + 1))
        return [(event, 1) for event in found.values()]

    # -- guard --------------------------------------------------------------------------------------------------------

    lasts = True

    def allow(self, op: str, client: str) -> None:
        """Only `work` is noised and only measurements are left out of the account."""
        only_work(op, client, "the section 'privacy'")

    def stops(self, round: int) -> str | None:
        """The budget would be passed."""
        if self.ledger.may(*self.event(round, self.noise)):
            return None
        return f"the privacy budget is spent: {self.ledger.summary()}"

    def cohort(
        self, method: Method, round: int, clients: Sequence[str], size: int, rng: numpy.random.Generator
    ) -> list[str]:
        """Drawn by the secret key, as it is accounted: by a coin for each client, without replacement, or in turns."""
        stream = self.source.stream("cohort", round)
        if self.turns is not None:
            order = self.source.stream("order").permutation(len(clients)).tolist()
            return sorted(clients[order[place]] for place in self.turns.places(round))
        if self._poisson:
            return poisson(clients, self.rate, stream)
        chosen = stream.choice(len(clients), size=min(self.size, len(clients)), replace=False)
        return sorted(clients[place] for place in chosen.tolist())

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """Clip and add up."""
        return _Private(self, method, expected, round)

    def told(self) -> Json:
        """What is spent."""
        spent = self.ledger.spent()
        epsilon = spent.epsilon if math.isfinite(spent.epsilon) else None
        facts = {"epsilon": epsilon, "delta": spent.delta, "budget": self.ledger.epsilon, "unit": self.ledger.unit}
        return {**facts, "noise": self.noise, "clip": self.bound, "line": self.ledger.summary()}

    def report(self) -> list[str]:
        """The whole guarantee, line by line."""
        return self.ledger.report().splitlines()

    def known(self) -> float:
        """Epsilon against those who know who took part: as spent, without what the draw of a cohort hides."""
        open_ = [
            (replace(e.event, rate=1.0) if isinstance(e.event, Sampled) else _all_alike(e.event), e.count)
            for e in self.ledger.entries.values()
        ]
        return spent(open_, self.ledger.delta).epsilon if open_ else 0.0

    def to_json(self) -> Json:
        """The ledger, the bound, the key, and what stands for the sums that were released."""
        return {
            "ledger": self.ledger.to_json(), "bound": self.bound, "noise": self.noise, "key": self.source.key.hex(),
            "released": {round: [list(one) for one in sums] for round, sums in self._released.items()},
        }  # fmt: skip

    def restore(self, facts: Json, memory: Tensors | None = None) -> None:
        """Go on with the ledger, the bound and the key of a checkpoint."""
        self.recall(facts)
        try:
            self.bound = float(facts["bound"])
        except (KeyError, TypeError, ValueError) as fault:
            raise _unreadable(fault) from fault

    def recall(self, facts: Json) -> None:
        """The key, and what was released by it, together with what is known here; the bound is the checkpoint's."""
        try:
            self.noise, self.source = float(facts["noise"]), NoiseSource(bytes.fromhex(facts["key"]))
            ledger = Ledger.from_json(facts["ledger"])
            released = {str(r): [(str(d), int(n)) for d, n in sums] for r, sums in facts.get("released", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as fault:
            raise _unreadable(fault) from fault
        ledger.join(self.ledger)
        self.ledger = ledger
        for round, sums in released.items():
            held = self._released.setdefault(round, [])
            held += [one for one in sums if one not in held]
        self._update_noise = split_noise(self.noise, self.adaptive.std) if self.adaptive else self.noise
        self._trees.clear()

    # -- a round ------------------------------------------------------------------------------------------------------

    def published(self, total: Mapping[str, torch.Tensor], bits: float, round: int) -> Tensors:
        """The noised mean of a round, paid for; moves an adaptive bound on."""
        again = self._paid(total, bits, round)
        names, std = _again(again), self._update_noise * self.bound
        if self.turns is not None:
            now, before = (self._running_noise(total, std, step, again) for step in (round, round - 1))
            return {n: ((t + now[n] - before[n]) / self.expected).float() for n, t in total.items()}
        found = release(total, std, self.expected, self.source, "round", round, *names)
        if self.adaptive is not None:
            self.bound = self.adaptive.step(self.bound, bits, self.source, "round", round, *names)
        return found

    def _paid(self, total: Mapping[str, torch.Tensor], bits: float, round: int) -> int:
        """Pay for the release of a sum and write that down; gives the number of its noise, 0 as a rule."""
        mark, held = _mark(total, bits), self._released.get(str(round), [])
        again = dict(held).get(mark)
        if again is None:
            others = held if self.turns is None else [one for sums in self._released.values() for one in sums]
            newest = max((number for _, number in others), default=0)  # a tree goes on until a sum of it is another
            again = newest + 1 if held else newest
        id, event = self.event(round, self.noise)
        new = self.ledger.spend(id + (f", again {again}" if again else ""), event)
        if (mark, again) not in held:
            self._released[str(round)] = [*held, (mark, again)]
            new = True
        if new and self.keep is not None:
            self.keep(self.to_json())
        return again

    def _running_noise(self, like: Mapping[str, torch.Tensor], std: float, step: int, again: int) -> Tensors:
        """The noise on the running sum of the first `step` rounds, by the tree of this number."""
        if again not in self._trees:
            given = self.settings.tree
            how = {"restart": given.restart, "complete": given.complete}
            self._trees = {again: Tree(like, std, self.source, *_again(again), **how)}
        return self._trees[again].cumulative(step)

    @property
    def _poisson(self) -> bool:
        return self.settings.mechanism == "gaussian" and self.settings.sampling == "poisson"

    def _adaptive(self) -> AdaptiveClip | None:
        given = self.settings.adaptive
        if given is None:
            return None
        return AdaptiveClip(self.expected, given.quantile, given.rate, given.noise)

    def _assumptions(self) -> tuple[str, ...]:
        event = self.event(1, self.noise)[1]
        return assumptions("client", event, seeded=self.settings.key == "seed", adaptive=self.adaptive is not None)


def _again(number: int) -> tuple[str | int, ...]:
    """What the noise of another sum of the same round is named by."""
    return ("again", number) if number else ()


def _mark(total: Mapping[str, torch.Tensor], bits: float) -> str:
    """Stands for a sum: the same for the same bits. Nobody sees it but those who see the key."""
    found = hashlib.sha256(float(bits).hex().encode())
    for name, tensor in sorted(total.items()):
        found.update(f"{name} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()[:32]


def _all_alike(event: Event) -> Event:
    """A draw without replacement, as to those who know who was drawn; a tree is the same to everybody."""
    return replace(event, size=event.population) if isinstance(event, FixedSize) else event


def _unreadable(fault: Exception) -> RunError:
    return RunError(
        f"The run's account of privacy cannot be read: {fault}.",
        action="Restore the file from a copy; what was spent cannot be guessed.",
    )


class _Turns:
    """Who takes part when, where clients take turns: blocks of one order, again and again."""

    def __init__(self, clients: int, cohort: int, settings: PrivacySettings, rounds: int) -> None:
        self.clients, self.cohort = clients, min(cohort, clients)
        self.restart, given = settings.tree.restart, settings.tree
        self.steps = self.restart or rounds
        complete = given.complete and self.restart is not None
        self.leaves = 1 << (self.steps - 1).bit_length() if complete else self.steps
        self.separation = max(1, clients // self.cohort)
        self.participations = math.ceil(self.steps / self.separation)
        if self.participations > given.participations or self.separation < given.separation:
            raise ConfigError(
                f"{self.cohort} of {clients} clients take turns, so that each takes part up to {self.participations} "
                f"times in a tree of {self.steps} rounds, {self.separation} rounds apart.",
                f"Allowed by the recipe: {given.participations} times, {given.separation} rounds apart.",
                action=f"Set privacy.tree.participations={self.participations} and privacy.tree.separation="
                f"{min(self.separation, given.separation)}, take a smaller cohort, or restart trees sooner.",
            )
        self.participations, self.separation = given.participations, given.separation

    def places(self, round: int) -> Iterable[int]:
        """Places in the order of the clients that take part in a round."""
        first = (round - 1) * self.cohort
        return ((first + k) % self.clients for k in range(self.cohort))


class _Private(Reduction):
    """Uploads of one round, clipped and added up in float64; nothing else of them is kept."""

    def __init__(self, central: Central, method: Method, expected: Mapping[str, Tensors], round: int) -> None:
        super().__init__(method.reducer, expected)
        self.central, self.round, self.bits = central, round, 0.0
        unknown = next((name for name in self.reducers if name not in self.expected), None)
        if unknown is not None:
            raise ModeConflict(
                f"The method does not say what the part '{unknown}' looks like, so nothing could be published where "
                "nobody came.",
                action="Choose another method, or leave the section 'privacy' out.",
            )
        self.sums = {
            f"{part}/{name}": torch.zeros(tensor.shape, dtype=torch.float64)
            for part in self.reducers
            for name, tensor in self.expected[part].items()
        }

    def add(self, client: str, upload: Upload) -> None:
        """Clip an upload over all its tensors together, and add it."""
        self._check(client, upload)
        flat: Tensors = {}
        for name, part in upload.parts.items():
            if not isinstance(part, Dense):
                raise UploadRejected(f"Client '{client}' sent a {part.kind} part.", "Only dense parts can be noised.")
            flat.update({f"{name}/{n}": t for n, t in part.tensors.items()})
        clipped, factor, _ = clip(flat, self.central.bound)
        for name, tensor in clipped.items():
            self.sums[name].add_(tensor.to("cpu"))
        if self.central.adaptive is not None:
            self.bits += 0.5 if factor == 1.0 else -0.5
        self._count(upload)

    def result(self, population: int) -> Update:
        """The noised mean over the expected number of clients, also where nobody came."""
        found = self.central.published(self.sums, self.bits, self.round)
        expected = max(1, round(self.central.expected))
        update = Update(clients=expected, population=population, weight=float(expected), metrics=self.metrics)
        for part in self.reducers:
            update.parts[part] = Dense({n: found[f"{part}/{n}"] for n in self.expected[part]})
        return update


def check(method: Any) -> None:
    """Refuse a method whose round cannot be made private by noising one sum.

    Raises:
        ModeConflict: with the reason and what would do.
    """
    for reducer in means(method, "The section 'privacy'", "which no noise on a sum makes private").values():
        if reducer.weighting != "uniform":
            raise ModeConflict(
                f"The method {method.key} weighs uploads by their examples, whose number is a secret of each client.",
                "With the section 'privacy', all clients count alike.",
                action="Set method.weighting=uniform.",
            )
    works_alone(method, "The section 'privacy'")
    if method.absolute:
        raise ModeConflict(
            f"Uploads of the method {method.key} are values and no changes, and the sum is clipped around zero and "
            "divided by the clients that are expected.",
            "With the section 'privacy', uploads are changes of what was sent.",
            "fedavg",
        )
    if method.mirrors:
        raise ModeConflict(
            f"Clients of the method {method.key} keep what they sent, and the sum of it is clipped and noised.",
            "Both have to stay the same.",
            "fedavg",
            "Choose another method, or set privacy.level=example.",
        )
    if type(method).cohort is not Method.cohort:
        raise ModeConflict(
            f"The method {method.key} chooses its cohort itself.",
            "With the section 'privacy', clients are drawn as it is accounted.",
            action="Choose another method, or leave the section out.",
        )

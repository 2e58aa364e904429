"""Ledger - what has been spent of a privacy budget, and whether the next release may happen.

The order that keeps it honest: ask :meth:`Ledger.may`, then :meth:`Ledger.spend`, then write the ledger to disk, and
only then release. A crash in between has spent too much rather than too little, and the release made again after a
resume has the same id and costs nothing more.

An id stands for one release of one sum. A round that is computed again from other uploads after its first result was
seen is another release, with an id of its own and noise of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from fedllm.core.errors import BudgetSpent, ConfigError, RunError
from fedllm.core.message import Json
from fedllm.modes.privacy.accounting import (
    Event,
    Relation,
    Sampled,
    Spent,
    TreeRun,
    check_delta,
    event_from_json,
    event_to_json,
    relation_of,
    renyi_epsilon,
    spent,
)
from fedllm.modes.privacy.settings import Level

VERSION = 1
"""Of the JSON form."""
EVERYBODY = ""
"""The holder of a release that concerns the data of all clients."""
AHEAD = 1.25
"""A check looks so far ahead: what fits this many times the releases fits all fewer, without computing."""

WORDS: dict[Relation, str] = {
    "add-or-remove-one": "neighbours differ by one {unit} more or less",
    "zero-out-one": "neighbours differ by one {unit} whose contributions are zero",
    "replace-one": "neighbours differ by one {unit} replaced by another",
}

Counts = dict[Event, int]


@dataclass(frozen=True)
class Entry:
    """One id: what was released, how often, and of whose data.

    Attributes:
        event: the release.
        count: so many of them, such as the local steps of a turn.
        holder: the client whose data it concerns; :data:`EVERYBODY` for all.
    """

    event: Event
    count: int
    holder: str


@dataclass
class Ledger:
    """The budget and the releases of one run.

    Releases of different holders concern different data, so a unit pays for those of its own client and for those of
    everybody, and the ledger's figure is that of the holder who has spent most.

    Args:
        unit: what is protected.
        delta: the chance of more than epsilon.
        epsilon: the budget; None for a run that only reports.
        units: how many units are protected, where known: delta must be below 1 / units.
        assumptions: sentences on which the figure rests; see :func:`assumptions`.

    Raises:
        ConfigError: an unknown unit, a budget or delta out of range.
    """

    unit: Level
    delta: float
    epsilon: float | None = None
    units: int | None = None
    assumptions: tuple[str, ...] = ()
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict, init=False)
    _totals: dict[str, Counts] = field(default_factory=dict, init=False, repr=False, compare=False)
    _fits: dict[str, Counts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in get_args(Level):
            raise ConfigError.unknown("unit of privacy", str(self.unit), get_args(Level))
        check_delta(self.delta, self.units)
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ConfigError(f"A privacy budget of epsilon={self.epsilon} is given.", "Allowed: numbers above 0.")

    def may(self, id: str, event: Event, count: int = 1, holder: str = EVERYBODY) -> bool:
        """Whether the release stays within the budget, for every unit that it concerns. Nothing is recorded.

        An id that is recorded already may always: it has been paid for.

        Args:
            id: of this release, such as "round 12".
            event: what would be released.
            count: how often.
            holder: the client whose data it concerns.

        Raises:
            RunError: the id is recorded with another release.
            ConfigError: a count below 1, or a release that cannot be accounted with those before.
        """
        if count < 1:
            raise ConfigError(f"The release '{id}' happens {count} times.", "Allowed: 1 and more.")
        if self._recorded(id, Entry(event, count, holder)):
            return True
        relation_of([(event, count), *(pair for counts in self._totals.values() for pair in counts.items())])
        return self.epsilon is None or all(self._within(h, event, count) for h in self._concerned(holder))

    def spend(self, id: str, event: Event, count: int = 1, holder: str = EVERYBODY) -> bool:
        """Record a release before it happens; see :meth:`may` for the arguments.

        Returns:
            Whether it was new. The same release under the same id is counted once.

        Raises:
            BudgetSpent: it would pass the budget; nothing is recorded.
            RunError: the id is recorded with another release.
        """
        if not self.may(id, event, count, holder):
            raise BudgetSpent(
                f"The release '{id}' would pass the privacy budget: {self.summary()}",
                f"Allowed: epsilon up to {self.epsilon:g} in all.",
                action="Stop here and use the last model, or begin with a larger budget, more noise or fewer rounds.",
            )
        return self._record(id, Entry(event, count, holder))

    def join(self, other: Ledger) -> None:
        """Record what another ledger of the same run has recorded, too.

        Raises:
            RunError: an id stands for another release there.
        """
        for (id, _), entry in other.entries.items():
            if not self._recorded(id, entry):
                self._record(id, entry)

    def spent(self, holder: str | None = None) -> Spent:
        """What has been spent of one holder's data; None for the holder who has spent most."""
        holders = self._concerned(EVERYBODY) if holder is None else [holder]
        unlike: list[Counts] = []
        for counts in sorted((self._counts(h) for h in holders), key=_size, reverse=True):
            if not any(_covers(other, counts) for other in unlike):
                unlike.append(counts)
        return max((spent(counts.items(), self.delta) for counts in unlike), key=lambda found: found.epsilon)

    def left(self, event: Event, holder: str = EVERYBODY) -> int | None:
        """How many more of `event` fit into the budget; None where there is no budget or no end.

        It costs some dozen computations of epsilon: for the beginning and the end of a run, not for every round.
        """
        if self.epsilon is None:
            return None
        low, high = 0, 1
        while self._fits_more(event, high, holder):
            low, high = high, 2 * high
            if high > 1 << 30:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits_more(event, middle, holder) else (low, middle)
        return low

    def summary(self) -> str:
        """One line for the live table: "epsilon 2.1 of 8 (delta 1e-05, per client), 40 releases."."""
        found = self.spent()
        of = "" if self.epsilon is None else f" of {self.epsilon:g}"
        releases = max((sum(self._counts(h).values()) for h in self._concerned(EVERYBODY)), default=0)
        return f"epsilon {_shown(found.epsilon)}{of} (delta {self.delta:g}, per {self.unit}), {releases} releases."

    def report(self) -> str:
        """The whole guarantee, on several lines: figures, unit, neighbours and assumptions."""
        found = self.spent()
        how = {"pld": "privacy loss distribution", "analytic": "exact for Gaussian noise", "rdp": "Renyi orders"}
        lines = [
            self.summary(),
            f"By {how[found.accountant]}; Renyi orders give {_shown(found.rdp)}; "
            f"{WORDS[found.relation].format(unit=self.unit)}.",
        ]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.assumptions)])

    def to_json(self) -> dict[str, Json]:
        """For the checkpoint."""
        places: dict[Event, int] = {}
        for entry in self.entries.values():
            places.setdefault(entry.event, len(places))
        return {
            "version": VERSION,
            "unit": self.unit,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "units": self.units,
            "assumptions": list(self.assumptions),
            "events": [event_to_json(event) for event in places],
            "spent": [[id, holder, places[e.event], e.count] for (id, holder), e in self.entries.items()],
        }

    @classmethod
    def from_json(cls, facts: Any) -> Ledger:
        """The ledger of :meth:`to_json`.

        Raises:
            RunError: anything else, or another version.
        """
        if not isinstance(facts, Mapping) or facts.get("version") != VERSION:
            version = facts.get("version") if isinstance(facts, Mapping) else None
            raise RunError(
                f"The privacy ledger of the checkpoint has the version {version!r}.",
                f"This fedllm reads {VERSION}.",
                action="Go on with the version of fedllm that wrote it; never without its ledger.",
            )
        try:
            named = ("unit", "delta", "epsilon", "units")
            ledger = cls(*(facts[name] for name in named), assumptions=tuple(facts["assumptions"]))
            events = [event_from_json(event) for event in facts["events"]]
            for id, holder, place, count in facts["spent"]:
                if not (type(place) is int and 0 <= place < len(events) and type(count) is int and count >= 1):
                    raise ValueError(f"the release '{id}' has no event or count")
                if not ledger._record(str(id), Entry(events[place], count, str(holder))):
                    raise ValueError(f"the release '{id}' is recorded twice")
        except (KeyError, TypeError, ValueError, ConfigError) as fault:
            raise RunError(
                f"The privacy ledger of the checkpoint cannot be read: {fault}",
                action="Restore the file from a copy; what was spent cannot be guessed.",
            ) from fault
        return ledger

    def _recorded(self, id: str, entry: Entry) -> bool:
        """Whether this very release is recorded; raises RunError where the id stands for another one."""
        before = self.entries.get((id, entry.holder))
        if before is not None and before != entry:
            raise RunError(
                f"The release '{id}' is recorded as {before.count} x {before.event}, and is now {entry.count} x "
                f"{entry.event}.",
                "An id stands for one release.",
                action="Resume with the settings of the run, or begin another.",
            )
        return before is not None

    def _concerned(self, holder: str) -> list[str]:
        """The holders that a release concerns: for everybody, all there are, and one who has released nothing."""
        return [holder] if holder != EVERYBODY else sorted({EVERYBODY, *self._totals})

    def _counts(self, holder: str) -> Counts:
        """The releases that concern the data of one holder."""
        counts = dict(self._totals.get(EVERYBODY, {}))
        for event, count in self._totals.get(holder, {}).items() if holder != EVERYBODY else ():
            counts[event] = counts.get(event, 0) + count
        return counts

    def _record(self, id: str, entry: Entry) -> bool:
        """Write an entry down; whether it was new."""
        if (id, entry.holder) in self.entries:
            return False
        self.entries[id, entry.holder] = entry
        totals = self._totals.setdefault(entry.holder, {})
        totals[entry.event] = totals.get(entry.event, 0) + entry.count
        return True

    def _within(self, holder: str, event: Event, count: int) -> bool:
        counts = self._counts(holder)
        counts[event] = counts.get(event, 0) + count
        if _covers(self._fits.get(holder, {}), counts):
            return True
        further = {e: math.ceil(n * AHEAD) if e == event else n for e, n in counts.items()}
        for tried in (further, counts):
            if self._cheap(tried.items()):
                self._fits[holder] = tried
                return True
        return False

    def _fits_more(self, event: Event, count: int, holder: str) -> bool:
        return all(self._within(h, event, count) for h in self._concerned(holder))

    def _cheap(self, releases: Iterable[tuple[Event, int]]) -> bool:
        """Whether `releases` fit into the budget: by the quick upper bound, else by the tight one."""
        listed, budget = list(releases), math.inf if self.epsilon is None else self.epsilon
        return renyi_epsilon(listed, self.delta) <= budget or spent(listed, self.delta).epsilon <= budget


def assumptions(
    unit: Level, event: Event, *, noised_by: str = "server", seeded: bool = False, adaptive: bool = False
) -> tuple[str, ...]:
    """What the figure of a run rests on, as sentences for its report.

    Args:
        unit: what is protected.
        event: the kind of release.
        noised_by: who adds the noise: "server" or "client".
        seeded: the noise comes from the run's seed.
        adaptive: the bound follows a noised count.
    """
    whole = "all that one client contributes to one release" if unit == "client" else "each example"
    where = (
        "The server adds the noise: it is trusted, and the bound is against those who see what it publishes."
        if noised_by == "server"
        else "Clients add the noise: the bound is against the server too, and all who see what it publishes."
    )
    sentences = [
        f"The unit is the {unit}: {whole} is clipped to the bound, over all tensors together.",
        where,
        "Sums are divided by the expected number, which is public, and noise is added when nobody came.",
    ]
    if isinstance(event, Sampled) and event.rate < 1:
        sentences.append(
            f"Each {unit} joined with probability {event.rate:.6g} by a coin of its own; nobody outside knows who did."
        )
    elif isinstance(event, TreeRun):
        sentences.append(
            f"No {unit} took part more than {event.participations} times in a tree of {event.steps} steps, or sooner "
            f"than {event.separation} steps after the last time."
        )
    elif not isinstance(event, Sampled):
        sentences.append(
            f"Each release drew {event.size} of {event.population} without replacement; nobody outside knows which."
        )
    if adaptive:
        sentences.append("The number within the bound is noised too, and its share of the noise is accounted.")
    sentences.append(
        "The noise comes from the run's seed: the bound is against those who do not know it."
        if seeded
        else "The noise comes from a secret key in the checkpoints, which are kept from others."
    )
    return (
        *sentences,
        "Noise is made in float64; attacks on the last bits of floating-point noise are not covered.",
        "Anything else that was published of the data, such as measurements and tuned settings, is not counted.",
    )


def _covers(large: Counts, small: Counts) -> bool:
    """Whether `large` is sure to cost at least as much: at least as many of each, or one kind at no lower rate."""
    if all(large.get(event, 0) >= count for event, count in small.items()):
        return True
    if len(large) != 1 or len(small) != 1:
        return False
    ((a, n),), ((b, m),) = large.items(), small.items()
    return isinstance(a, Sampled) and isinstance(b, Sampled) and a.noise == b.noise and a.rate >= b.rate and n >= m


def _size(counts: Counts) -> tuple[int, float]:
    """Larger where more is likely to have been spent."""
    return sum(counts.values()), max((e.rate for e in counts if isinstance(e, Sampled)), default=1.0)


def _shown(epsilon: float) -> str:
    return "infinite" if math.isinf(epsilon) else f"{epsilon:.3g}" if epsilon < 10 else f"{epsilon:.4g}"

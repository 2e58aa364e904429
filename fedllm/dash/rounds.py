"""Rounds - what metrics.jsonl says, added up as it grows: loss and scores by round, bytes, privacy, who was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.dash import given
from fedllm.dash.follow import Follower

FEDERATED = "federated"
"""The leg that plays the recipe's method."""
SHOWN = 20
"""Last rounds that are kept whole."""
TROUBLES = 200
"""Different reasons that are kept of each leg."""
NAME, REASON = 100, 500
"""Characters of a client's name, and of a reason, that are kept."""
CLIENTS = 10_000
"""Clients that are counted one by one at most."""


@dataclass
class Trouble:
    """The same thing that happened to one client in one or more rounds."""

    client: str
    kind: str
    reason: str
    times: int = 0
    first: int = 0
    last: int = 0


@dataclass
class Asked:
    """How often a client was asked, was lost, and had its upload refused."""

    asked: int = 0
    lost: int = 0
    refused: int = 0


@dataclass
class Leg:
    """One model of a run: the federation, or what it is compared with.

    Attributes:
        losses: round -> mean training loss; None where the round had none.
        scores: metric -> round -> value over all held-out rows.
        up: round -> bytes from the clients.
        down: round -> bytes to the clients.
        seconds: round -> seconds.
        epsilon: round -> privacy spent.
        guard: what stands between uploads and the method, as the last round told it.
        latest: the last rounds as they were written.
        troubles: what went wrong, by client, kind and reason.
        more_troubles: others, which are counted alone.
        failed: rounds that changed nothing, and the last reason.
        clients: by client.
    """

    losses: dict[int, float | None] = field(default_factory=dict)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    epsilon: dict[int, float] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    latest: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=SHOWN))
    troubles: dict[tuple[str, str, str], Trouble] = field(default_factory=dict)
    more_troubles: int = 0
    failed: list[int] = field(default_factory=list)
    failed_why: str = ""
    clients: dict[str, Asked] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last round; 0 before the first."""
        return next(reversed(self.losses), 0)

    @property
    def loss(self) -> float | None:
        """The last known training loss."""
        return next((value for value in reversed(self.losses.values()) if value is not None), None)

    def add(self, event: Mapping[str, Any], number: int) -> None:
        """A round is over; one that was played again counts as it was played last."""
        again = number in self.losses
        self.losses.pop(number, None)
        self.losses[number] = given.number(event.get("loss"))
        self.up[number], self.down[number] = (given.whole(event.get(k)) or 0 for k in ("bytes_up", "bytes_down"))
        self.seconds[number] = given.number(event.get("seconds")) or 0.0
        if again and any(given.whole(one.get("round")) == number for one in self.latest):
            kept = [one for one in self.latest if given.whole(one.get("round")) != number]
            self.latest = deque(kept, maxlen=SHOWN)
        self.latest.append({**event, "cohort": len(given.listed(event.get("cohort")))})
        guard = given.mapping(event.get("guard"))
        if guard:
            self.guard = guard
        epsilon = given.number(guard.get("epsilon"))
        if epsilon is not None:
            self.epsilon[number] = epsilon
        if again:
            return
        if event.get("failed"):
            self.failed.append(number)
            self.failed_why = given.text(event["failed"], REASON)
        for client in given.listed(event.get("cohort")):
            self._of(client).asked += 1
        for key, kind in (("lost", "did not answer"), ("rejected", "upload refused")):
            for one in given.listed(event.get(key)):
                self._trouble(given.mapping(one), kind, number)

    def _of(self, client: object) -> Asked:
        name = given.text(client, NAME)
        if name not in self.clients and len(self.clients) >= CLIENTS:
            return Asked()
        return self.clients.setdefault(name, Asked())

    def _trouble(self, one: Mapping[str, Any], kind: str, number: int) -> None:
        client, reason = given.text(one.get("client"), NAME), given.text(one.get("reason"), REASON)
        about = self._of(client)
        about.lost, about.refused = about.lost + (kind == "did not answer"), about.refused + (kind == "upload refused")
        key = client, kind, reason
        if key not in self.troubles and len(self.troubles) >= TROUBLES:
            self.more_troubles += 1
            return
        found = self.troubles.setdefault(key, Trouble(*key, first=number))
        found.times, found.last = found.times + 1, number


class Rounds(Follower):
    """The rounds of a run.

    Attributes:
        legs: by model.
        unreadable: lines that could not be read.
    """

    def clear(self) -> None:
        """See :meth:`Follower.clear`."""
        self.legs: dict[str, Leg] = {}
        self.unreadable = 0

    def take(self, line: bytes) -> None:
        """See :meth:`Follower.take`."""
        event = given.parsed(line) if line.strip() else {}
        if event is None:
            self.unreadable += 1
        else:
            self.add(event)

    def too_long(self) -> None:
        """See :meth:`Follower.too_long`."""
        self.unreadable += 1

    def add(self, event: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, or what a server tells of a round."""
        number = given.whole(event.get("round"))
        if number is None:
            return
        kind = event.get("event", "round")
        leg = self.legs.setdefault(given.text(event.get("model"), 200) or FEDERATED, Leg())
        if kind == "round":
            leg.add(event, number)
        elif kind == "evaluation":
            for metric, value in given.mapping(event.get("pooled")).items():
                found = given.number(value)
                if found is not None and metric != "n":
                    leg.scores.setdefault(given.text(metric, 60), {})[number] = found

    @property
    def own(self) -> Leg:
        """The federation's."""
        return self.legs.get(FEDERATED) or Leg()

    def named(self) -> Iterator[tuple[str, Leg]]:
        """Models and what is known of them, the federation first."""
        yield from sorted(self.legs.items(), key=lambda one: (one[0] != FEDERATED, one[0]))


def told(rounds: list[dict[str, Any]]) -> Rounds:
    """Rounds that did not come from a file of this machine."""
    found = Rounds(Path("/nonexistent"))
    for one in rounds:
        found.add(one)
    return found

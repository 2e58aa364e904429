"""Passes - which rows of which clients share a forward and backward pass, so that little of it is padding.

A pass costs about `fixed` + rows x longest row, in tokens. One optimiser step of a cohort has rows of many lengths;
they are sorted and cut so that the sum of these costs is least. Nothing that a client sees depends on the cut: its
gradient is the sum over its rows, whichever pass each was in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """Rows of one client that lie side by side in a pass.

    Attributes:
        client: the client's number in the stack.
        rows: numbers of its rows.
    """

    client: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Passes:
    """What a pass costs on this machine.

    Attributes:
        fixed: what a pass costs whatever is in it, in tokens.
        limit: tokens of a pass beyond which a wider one gains nothing; None: no limit.
    """

    fixed: int = 128
    limit: int | None = None

    def plan(self, lengths: Sequence[Sequence[int]]) -> list[list[Part]]:
        """The passes of one step, each with parts of at most equally many rows.

        Args:
            lengths: tokens of each row, by client; a client may have none.
        """
        rows = sum(map(len, lengths))
        if not rows:
            return []
        most, longest = max(map(len, lengths)), max(max(own, default=0) for own in lengths)
        whole = [Part(client, tuple(range(len(own)))) for client, own in enumerate(lengths) if own]
        computed = len(whole) * most * longest
        fits = self.limit is None or computed <= self.limit or (len(whole) == 1 and most == 1)
        if fits and computed - sum(map(sum, lengths)) <= self.fixed:
            return [whole]  # a second pass would cost more than all the padding
        best, least = [whole], float("inf")
        size = most
        while True:
            found, cost = self._cut(_parts(lengths, size), size)
            if cost < least:
                best, least = found, cost
            if size == 1:
                return best
            size = (size + 1) // 2

    def _cut(self, parts: list[tuple[int, Part]], rows: int) -> tuple[list[list[Part]], float]:
        """Cut parts, longest first, into runs of the least total cost; and that cost."""
        costs, begins = [0.0], [0]
        for end in range(1, len(parts) + 1):
            least, begun = float("inf"), end - 1
            for begin in range(end - 1, -1, -1):
                tokens = (end - begin) * rows * parts[begin][0]
                if self.limit is not None and tokens > self.limit and begin < end - 1:
                    break
                cost = costs[begin] + self.fixed + tokens
                if cost < least:
                    least, begun = cost, begin
            costs.append(least)
            begins.append(begun)
        runs, end = [], len(parts)
        while end:
            runs.append([part for _, part in parts[begins[end] : end]])
            end = begins[end]
        return runs[::-1], costs[-1]


USUAL = Passes()
"""What is assumed where nothing was measured."""


def _parts(lengths: Sequence[Sequence[int]], size: int) -> list[tuple[int, Part]]:
    """Each client's rows, longest first, in parts of `size`: (tokens of the longest row, part), longest first."""
    found = []
    for client, own in enumerate(lengths):
        order = sorted(range(len(own)), key=lambda row: -own[row])
        for start in range(0, len(own), size):
            rows = order[start : start + size]
            found.append((own[rows[0]], Part(client, tuple(sorted(rows)))))
    return sorted(found, key=lambda pair: (-pair[0], pair[1].client, pair[1].rows))

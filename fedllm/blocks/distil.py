"""Distil - teaching by class scores on rows that everybody has: which rows, the same rows, bounded scores, their mean.

Clients whose models differ cannot average weights, but their logits on the same rows have one shape, [n, C]. Logits are
exchanged raw: a mean of logits is not a mean of probabilities (Li, Wang 2019, 1910.03581; Lin et al. 2020, 2006.07242).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.errors import DataError, ModelError, RoundFailed
from fedllm.core.message import Dense, Json, Part, Received, Upload
from fedllm.core.reducer import Mean, Running
from fedllm.core.roster import SERVER
from fedllm.core.seeds import numpy_stream
from fedllm.core.server import Server
from fedllm.core.work import Client, Row


def aligned(rows: Sequence[Row], seed: int, number: int, size: int) -> list[Row]:
    """The alignment subset `number`: `size` of the rows, in their order; all of them where there are no more.

    A function of the seed alone, so that announcing the seed announces the rows.
    """
    if size >= len(rows):
        return list(rows)
    chosen = numpy_stream(seed, "alignment", number).choice(len(rows), size, replace=False)
    return [rows[i] for i in sorted(chosen.tolist())]


def fingerprint(rows: Sequence[Row]) -> str:
    """64 bits (hexadecimal) of the SHA-256 of rows in their order: scores belong to rows by place.

    Raises:
        DataError: there are no rows, or one holds something that is neither JSON nor numbers.
    """
    if not len(rows):
        raise DataError(
            "There are no public rows.", "Scores are exchanged on rows that everybody has.", action="Set data.public."
        )
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=_plain).encode())
        found.update(b"\n")
    return found.hexdigest()[:16]


async def described(client: Client) -> dict[str, Json]:
    """What there is to score: `rows` (their fingerprint), `total` (their number), `classes`.

    Asked of the server's own copy of the public rows, so that no client decides which rows and shapes are right.

    Raises:
        DataError: there are no public rows.
        ModelError: the model writes text.
    """
    rows = client.rows("public")
    mark = fingerprint(rows)
    found = await client.outputs(client.initial(), rows[:1])
    _one_vector(found)
    return {"rows": mark, "total": len(rows), "classes": len(found[0])}


def public_rows(client: Client, mark: str) -> Sequence[Row]:
    """The client's public rows; raises :class:`DataError` where they are not those of the fingerprint `mark`."""
    rows = client.rows("public")
    if (own := fingerprint(rows)) != mark:
        raise DataError(
            f"The public rows of client '{client.id}' are not the server's ({own}, not {mark}).",
            "All must have the same rows in the same order.",
            action="Give every site the same file.",
        )
    return rows


async def at_server(server: Server, function: Callable[..., Any], received: Received) -> Upload:
    """What the server's own pseudo-client answers.

    Raises:
        RoundFailed: it does not, with its reason.
    """
    async for answer in server.ask(function, {SERVER: received}):
        return answer.upload
    reason = next((entry["reason"] for entry in (*server.lost, *server.rejected) if entry["client"] == SERVER), "")
    raise RoundFailed(f"The server's own turn '{function.__name__}' failed.", f"Reason: {reason or 'no answer.'}")


def scores(outputs: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
    """Logits of rows as one matrix [n, C], clipped to +-limit.

    Raises:
        ModelError: a row has more than one vector of logits: the model writes text.
    """
    _one_vector(outputs)
    return torch.stack(list(outputs)).float().clamp(-limit, limit)


@dataclass(frozen=True)
class ClippedMean(Mean):
    """The mean of dense parts in which no entry of a client counts for more than +-limit.

    Clients clip before they send, so for them it is the plain mean, and linear: the sum may be formed in secret. Where
    single uploads are seen, a client that did not clip cannot carry the mean away.

    Args:
        weighting: see :class:`~fedllm.core.reducer.Mean`.
        limit: the largest absolute value.
    """

    limit: float = float("inf")

    def begin(self) -> Running:
        """See :class:`~fedllm.core.reducer.Reducer`."""
        return _Clipped(super().begin(), self.limit)


class _Clipped(Running):
    """A running mean behind a clamp."""

    def __init__(self, running: Running, limit: float) -> None:
        self.running, self.limit = running, limit

    def check(self, part: Part, client: str) -> None:
        self.running.check(part, client)

    def add(self, part: Part, weight: float, client: str) -> None:
        if isinstance(part, Dense):
            part = Dense({name: t.clamp(-self.limit, self.limit) for name, t in part.tensors.items()})
        self.running.add(part, weight, client)

    def result(self) -> Any:
        return self.running.result()


def _plain(value: Any) -> Any:
    """A tensor or array as lists; anything else cannot be compared between machines."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(
        f"A public row holds a {type(value).__name__}.", "It must be text, numbers, lists or arrays to be compared."
    )


def _one_vector(outputs: Sequence[torch.Tensor]) -> None:
    wrong = next((found for found in outputs if found.dim() != 1), None)
    if wrong is not None:
        raise ModelError(
            f"This model gives a row logits of the shape {tuple(wrong.shape)}.",
            "Class scores are one vector per row: sequence-classification.",
            "sequence-classification",
            "Set task.kind=sequence-classification.",
        )

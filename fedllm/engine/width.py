"""Width - how many clients share a pass, and why.

Sharing pays where one client's own step leaves the hardware idle: short steps on a CPU, most steps on a GPU. On a CPU
a pass of about two thousand tokens is as fast as it gets; on a GPU far more fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.train import Train
from fedllm.core.work import Learner, Rows

TOKENS_PER_PASS = {"cpu": 2048, "mps": 8192, "cuda": 32768}
"""Tokens of a pass beyond which a wider one gains nothing on a device."""

LOOK = 4
"""Clients whose rows are looked at to judge the length of a step."""


@dataclass(frozen=True)
class Width:
    """The width chosen and the reason, for the user."""

    clients: int
    why: str


def choose(wanted: int | str, learner: Learner, rows: Rows, train: Train, cohort: int) -> Width:
    """The width of a run: the one wanted, or the one that fills the device.

    Args:
        wanted: a number or "auto".
        learner: its `width_limit` and device bound the choice.
        rows: a few clients' rows are looked at.
        train: batch size.
        cohort: clients per round.
    """
    limit = learner.width_limit
    if limit == 1:
        return Width(1, "this adapter trains weights inside the model, so clients take turns")
    if wanted != "auto":
        return Width(max(1, min(int(wanted), cohort)), "as the recipe says")
    lengths = [
        example.tokens
        for client in rows.client_ids[:LOOK]
        for example in learner.prepare(list(rows.rows(client))[: train.batch_size])
    ]
    if not lengths:
        return Width(1, "no rows to judge by")
    step = max(1, round(sum(lengths) / len(lengths) * train.batch_size))
    device = learner.device.type
    fits = max(1, TOKENS_PER_PASS.get(device, TOKENS_PER_PASS["cuda"]) // step)
    width = min(cohort, fits)
    if width == cohort:
        return Width(width, f"the whole cohort: a step is about {step} tokens per client")
    return Width(width, f"a step is about {step} tokens per client, and more gains nothing on this {device}")

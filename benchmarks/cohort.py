"""Cohort - one pass for many clients against one by one, and against one plain run of the same total batch."""

from __future__ import annotations

import sys

from benchmarks.ground import SIZES, PlainLoop, batches, interleaved, learner, ratio, texts
from benchmarks.show import main
from fedllm.core.train import Train
from fedllm.effects.rig import Play
from fedllm.engine.width import choose
from fedllm.methods.baseline.fedavg import FedAvg

QUESTION = "How much faster is a cohort in one pass, and how near is it to one plain run of the same total batch?"
HEAD = ("model", "clients x batch x tokens", "width", "over one by one (wall)", "share of the limit (wall)", "auto")
CASES = (("0.3 M", 16, 1, 32), ("1 M", 16, 1, 64), ("3.4 M", 16, 1, 128), ("3.4 M", 8, 2, 128), ("3.4 M", 4, 16, 128))
STEPS = 4
REPEATS, MANY, SHORT = 5, 15, 1024
"""Measurements of a case, and of one whose steps have at most SHORT tokens: there, other work shows in each."""


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case and width: a round of the cohort, four local steps each."""
    rows = []
    for name, clients, batch, length in CASES:
        model = learner(SIZES[name], length=length)
        data = {f"c{k:02d}": texts(batch * STEPS, length, k) for k in range(clients)}
        train = Train(steps=STEPS, batch_size=batch, lr=1e-3)
        widths = sorted({1, 2, 4, 8, clients} & set(range(1, clients + 1)))
        plays = {str(width): Play(FedAvg(train=train), model, data, width=width, rounds=1000) for width in widths}
        examples = [e for held in data.values() for e in model.prepare(held)]
        plain = PlainLoop(SIZES[name], 8, batches(examples, batch * clients))
        works = {width: (lambda play=play: play.rounds(1)) for width, play in plays.items()}
        repeats = 2 if quick else MANY if clients * batch * length <= SHORT else REPEATS
        costs = interleaved({**works, "limit": lambda plain=plain: plain.steps(STEPS)}, repeats)
        chosen = choose("auto", model, plays["1"].worker.rows, train, clients)
        for width in plays:
            auto = f"chosen: {chosen.why}" if int(width) == chosen.clients else ""
            shape = f"{clients} x {batch} x {length}"
            over, share = ratio(costs, "1", width, "wall"), ratio(costs, "limit", width, "wall")
            rows.append((name, shape, width, over, share, auto))
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

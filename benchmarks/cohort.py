"""Cohort - one pass for many clients against one by one, and against one plain run of the same total batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from benchmarks.ground import SIZES, PlainLoop, batches, interleaved, learner, ratio, texts
from benchmarks.show import main
from fedllm.core.train import Train
from fedllm.effects.rig import Play
from fedllm.engine.crew import Crew
from fedllm.engine.width import choose
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.tasks.learner import TransformerLearner

QUESTION = "How much faster is a cohort in one pass, and how near is it to one plain run of the same total batch?"
HEAD = (
    "model",
    "clients x batch x tokens",
    "processes",
    "width",
    "over one by one (wall)",
    "share of the limit (wall)",
    "auto",
)
NOTE = (
    "Wall seconds of a round of FedAvg with four steps at every client, over those of one process whose clients take "
    "turns, and the plain loop's over them; median (lowest-highest). One process has both threads, as the plain loop "
    "has; of two, each has one."
)
CASES = (("0.3 M", 16, 1, 32), ("1 M", 16, 1, 64), ("3.4 M", 16, 1, 128), ("3.4 M", 8, 2, 128), ("3.4 M", 4, 16, 128))
STEPS, PROCESSES = 4, 2
REPEATS, MANY, SHORT = 5, 15, 1024
"""Measurements of a case, and of one whose steps have at most SHORT tokens: there, other work shows in each."""


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case and width, and one for two processes: a round of the cohort, four local steps each."""
    rows = []
    for name, clients, batch, length in CASES:
        model = learner(SIZES[name], length=length)
        data = {f"c{k:02d}": texts(batch * STEPS, length, k) for k in range(clients)}
        train = Train(steps=STEPS, batch_size=batch, lr=1e-3)
        widths = sorted({1, 2, 4, 8, clients} & set(range(1, clients + 1)))
        plays = {str(width): Play(FedAvg(train=train), model, data, width=width, rounds=1000) for width in widths}
        held = plays["1"].worker.rows
        chosen = choose("auto", model, held, train, clients)
        crew = Crew(partial(there, name, length), PROCESSES, {"": model})
        each = choose("auto", model, held, train, clients, PROCESSES)
        plays["crew"] = Play(FedAvg(train=train), model, data, width=each.clients, rounds=1000)
        plays["crew"].worker.crew = crew
        examples = [e for own in data.values() for e in model.prepare(own)]
        plain = PlainLoop(SIZES[name], 8, batches(examples, batch * clients))
        works: dict[str, Callable[[], object]] = {key: partial(play.rounds, 1) for key, play in plays.items()}
        works["limit"] = partial(plain.steps, STEPS)
        costs = interleaved(works, 2 if quick else MANY if clients * batch * length <= SHORT else REPEATS)
        crew.close()
        for key in plays:
            width, told = (each.clients, each.why) if key == "crew" else (int(key), chosen.why)
            auto = f"chosen: {told}" if key == "crew" or width == chosen.clients else ""
            over, share = ratio(costs, "1", key, "wall"), ratio(costs, "limit", key, "wall")
            processes = str(PROCESSES if key == "crew" else 1)
            rows.append((name, f"{clients} x {batch} x {length}", processes, str(width), over, share, auto))
    return rows


def there(name: str, length: int, process: int) -> dict[str, TransformerLearner]:
    """The model of another process."""
    return {"": learner(SIZES[name], length=length)}


if __name__ == "__main__":
    main(sys.modules[__name__])

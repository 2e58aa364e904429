"""Growth - time per round against clients per round, rank, sequence length and rounds: linear or better?"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks.ground import SIZES, Cost, interleaved, learner, texts
from benchmarks.show import main
from fedllm.core.train import Train
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalEngine
from fedllm.engine.width import choose
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.report.chart import Line, line_chart
from fedllm.tasks.learner import TransformerLearner

QUESTION = "Does the time of a run grow linearly or better with clients, rank, sequence length and rounds?"
HEAD = (
    "what grows", "to", "clients per pass", "wall s", "CPU s",
    "wall per unit over the smallest", "CPU per unit over the smallest", "linear or better",
)  # fmt: skip
NOTE = (
    "A random Llama of 0.3 M weights, LoRA of rank 8 on query and value, one step of one row of 32 tokens per client, "
    "eight clients a round, the width that `auto` chooses; one of these grows at a time. The cases of one kind run "
    "turn about; seconds are medians. Per unit is the ratio of seconds over the ratio of sizes, turn by turn: median "
    "(lowest-highest); 1 is linear. The last column looks at CPU seconds, which other work on the machine disturbs "
    "least, and lets them be 5 % wrong."
)
SERIES: dict[str, tuple[int, ...]] = {
    "clients per round": (1, 8, 64, 512),
    "LoRA rank": (1, 4, 16, 64),
    "tokens in a row": (32, 64, 128, 256, 512),
    "rounds": (4, 16, 64),
}
"""What grows, and how far; the smallest first."""
ERROR = 1.05
"""A ratio of seconds per unit that counts as no more than linear."""
REPEATED = {"clients per round": 8, "LoRA rank": 2, "tokens in a row": 2}
"""How often the two smallest cases are played for one measurement, so that the clock can see them."""
TURNS, QUICK = 9, 3
"""Measurements of each case."""


def often(name: str, value: int) -> int:
    """How many times a case is played in one measurement; short runs so often that all measure equally many rounds."""
    if name == "rounds":
        return SERIES[name][-1] // value
    return REPEATED[name] if value <= SERIES[name][1] else 1


def played(name: str, value: int, models: dict[tuple[int, int], TransformerLearner]) -> tuple[Callable[[], None], int]:
    """One measurement of a case, which can be repeated, and the width of its passes."""
    clients = value if name == "clients per round" else 8
    rank = value if name == "LoRA rank" else 8
    length = value if name == "tokens in a row" else 32
    rounds = value if name == "rounds" else 1
    if (rank, length) not in models:
        models[rank, length] = learner(SIZES["0.3 M"], rank, length)
    model = models[rank, length]
    data = {f"c{k:03d}": texts(1, length, k) for k in range(clients)}
    train = Train(steps=1, batch_size=1, lr=1e-3)

    def new() -> Play:
        play = Play(FedAvg(train=train), model, data, rounds=10**6)
        play.server.engine = LocalEngine(play.worker, play.server.clients, width)
        return play

    width = choose("auto", model, Play(FedAvg(train=train), model, data).worker.rows, train, clients)
    kept = new()

    def work() -> None:
        for _ in range(often(name, value)):
            (new() if name == "rounds" else kept).rounds(rounds)  # what piles up in a long run must show

    return work, width.clients


def growth(costs: Sequence[Cost], first: Sequence[Cost], units: float, of: str) -> tuple[float, str]:
    """Cost per unit over that of the smallest case, turn by turn: the median, and it with lowest and highest."""
    found = [getattr(a, of) / getattr(b, of) / units for a, b in zip(costs, first, strict=True)]
    return statistics.median(found), f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case."""
    rows: list[tuple[str, ...]] = []
    models: dict[tuple[int, int], TransformerLearner] = {}
    for name, values in SERIES.items():
        values = values[:3] if quick else values
        cases = {value: played(name, value, models) for value in values}
        costs = interleaved({str(value): work for value, (work, _) in cases.items()}, QUICK if quick else TURNS)
        each = {v: [Cost(c.cpu / often(name, v), c.wall / often(name, v)) for c in costs[str(v)]] for v in values}
        low = values[0]
        for value in values:
            told = {of: growth(each[value], each[low], value / low, of) for of in ("wall", "cpu")}
            spent = (statistics.median(getattr(one, of) for one in each[value]) for of in ("wall", "cpu"))
            verdict = "" if value == low else "yes" if told["cpu"][0] <= ERROR else "no"
            width = str(cases[value][1])
            rows.append(
                (name, str(value), width, *(f"{s:.4f}" for s in spent), told["wall"][1], told["cpu"][1], verdict)
            )
    return rows


def pictures(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """Name -> SVG: CPU and wall time per unit against how far each size has grown, one line per kind."""
    found = {}
    for of, place in (("CPU", 6), ("wall", 5)):
        lines = []
        for tone, name in enumerate(SERIES):
            own = [(float(row[1]), float(row[place].split()[0])) for row in rows if row[0] == name]
            lines.append(Line(name, [(x / own[0][0], y) for x, y in own], tone))
        found[f"growth-{of.lower()}"] = drawn(lines, of)
    return found


def drawn(lines: Sequence[Line], of: str) -> str:
    """The chart; its x axis is logarithmic, so places are powers of two."""
    powers = [Line(line.name, [(math.log2(x), y) for x, y in line.points], line.tone) for line in lines]
    return line_chart(
        f"{of} time per unit over that of the smallest case",
        "A flat line at 1 is linear growth; below 1 is better.",
        powers,
        "times as large as the smallest case",
        "{:g}".format,
        lambda power: f"{2**power:g}",
        zero=True,
    )


if __name__ == "__main__":
    main(sys.modules[__name__])

"""Overhead - fedllm one client at a time against a plain loop that does the same optimiser steps on the same model."""

from __future__ import annotations

import sys

from benchmarks.ground import SIZES, PlainLoop, batches, interleaved, learner, ratio, seconds, texts
from benchmarks.show import main
from fedllm.core.train import Train
from fedllm.effects.rig import Play
from fedllm.methods.baseline.fedavg import FedAvg

QUESTION = "What does fedllm cost over a plain loop, one client at a time?"
HEAD = ("model", "batch x tokens", "local steps", "CPU ratio", "wall ratio", "CPU s per client turn over plain")
CASES = (("3.4 M", 16, 128, 10), ("3.4 M", 16, 128, 1), ("0.3 M", 1, 32, 10), ("0.3 M", 1, 32, 1))
CLIENTS = 4
REPEATS, MANY = 5, 25
"""Measurements of a long case, and of one so short that other work on the machine shows in each."""


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case: a round of four clients against as many plain steps."""
    rows = []
    for name, batch, length, steps in CASES:
        model = learner(SIZES[name], length=length)
        data = {f"c{k}": texts(batch * 4, length, k) for k in range(CLIENTS)}
        train = Train(steps=steps, batch_size=batch, lr=1e-3)
        play = Play(FedAvg(train=train), model, data, width=1, rounds=1000)
        plain = PlainLoop(SIZES[name], 8, batches(model.prepare(data["c0"]), batch))
        long = batch > 1
        often = 1 if long else 4  # a short case is repeated, so that the clock can see it

        def fed(play: Play = play, often: int = often) -> None:
            play.rounds(often)

        def loop(plain: PlainLoop = plain, steps: int = steps, often: int = often) -> None:
            for _ in range(CLIENTS * often):
                plain.steps(steps)

        costs = interleaved({"fedllm": fed, "plain": loop}, 2 if quick else REPEATS if long else MANY)
        over = (seconds(costs["fedllm"], "cpu") - seconds(costs["plain"], "cpu")) / (CLIENTS * often)
        ratios = ratio(costs, "fedllm", "plain"), ratio(costs, "fedllm", "plain", "wall")
        rows.append((name, f"{batch} x {length}", str(steps), *ratios, f"{over:.4f}"))
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

"""Private - FFA-LoRA against averaged LoRA under DP-SGD, at several epsilons: the table of FFA-LoRA's paper in small.

    python -m benchmarks.private [--quick]

FFA-LoRA (Sun et al., ICLR 2024, arXiv:2403.12313) freezes A: half as many numbers get noise, and noise on A and B is
not multiplied. Its paper reports that it stays ahead of averaged LoRA under DP; what is seen here stands in the docs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from fedllm.run import run

RECIPE = Path(__file__).parent / "recipes" / "private-ag-news.yaml"
METHODS = ("fedavg", "ffa-lora")
EPSILONS: tuple[float | None, ...] = (None, 6.0, 3.0, 1.0)
SEEDS = 3


def accuracy(method: str, epsilon: float | None, seed: int) -> float:
    """Held-out accuracy of one run."""
    private = [] if epsilon is None else [f"privacy={{level: example, epsilon: {epsilon}, delta: 1.0e-4, clip: 0.5}}"]
    with tempfile.TemporaryDirectory() as place:
        given = [f"method={method}", f"seed={seed}", *private]
        result = run(RECIPE, given, folder=Path(place) / "run")
        return float(result.value(metric="accuracy") or 0.0)


def main(quick: bool) -> None:
    """Print the table."""
    print("| method | " + " | ".join("without privacy" if e is None else f"epsilon {e:g}" for e in EPSILONS) + " |")
    print("| --- |" + " --- |" * len(EPSILONS))
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            found = [accuracy(method, epsilon, seed) for seed in range(1 if quick else SEEDS)]
            spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{100 * statistics.fmean(found):.1f} %{spread}")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    if not quick:
        print(
            f"\nAccuracy on held-out rows, mean of {SEEDS} seeds ± standard deviation. Three clients, delta 1e-4 for "
            "each example, clip 0.5, 4 rounds of 4 steps of 64 examples on average. The noise has a secret "
            "key: another run gives other numbers."
        )


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])

"""Aggregation - the streaming mean of many uploads against a plain copy of the same bytes, and the memory it takes.

Both may use all of torch's threads, so the seconds are those of the clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import psutil
import torch

from benchmarks.ground import interleaved, ratio, seconds
from benchmarks.show import main
from fedllm.core.message import Upload
from fedllm.core.reducer import Mean, Reduction
from fedllm.core.wire import decode, encode

QUESTION = "How fast is the mean of many uploads against copying their bytes, and does its memory grow with them?"
HEAD = ("parameters", "uploads", "mean GB/s", "copy GB/s", "share of a copy", "memory, in uploads: first tenth", "all")
UPLOADS, QUICK = 1_000, 100
TENSORS = 32
"""Tensors in an upload, as of an adapter on sixteen layers."""
DISTINCT = 4
"""Uploads that lie in memory, and come again and again."""
CASES = (1_000_000, 10_000_000)


def uploads(parameters: int) -> list[Upload]:
    """Distinct uploads of so many random parameters, with unequal weights, as they come out of their messages."""
    draw = torch.Generator().manual_seed(0)
    sizes = [len(part) for part in torch.arange(parameters).tensor_split(TENSORS)]
    sent = [
        Upload({f"layer.{n:02d}": torch.randn(size, generator=draw) for n, size in enumerate(sizes)}, weight=10.0 + one)
        for one in range(DISTINCT)
    ]
    return [message for upload in sent if isinstance(message := decode(encode(upload)), Upload)]


def mean(given: list[Upload], count: int, watch: Callable[[int], None] | None = None) -> None:
    """Reduce `count` uploads, one after the other; `watch` is called after each."""
    reduction = Reduction(Mean(), {"update": given[0].update})
    for number in range(count):
        reduction.add(f"c{number}", given[number % DISTINCT])
        if watch is not None:
            watch(number)
    reduction.result(count)


def memory(given: list[Upload], count: int) -> tuple[float, float]:
    """Bytes beyond what was there before, while the first tenth of `count` uploads is reduced, and all of them."""
    process, seen = psutil.Process(), []
    before = process.memory_info().rss
    mean(given, count, lambda number: seen.append(process.memory_info().rss - before))
    return max(seen[: max(count // 10, 1)]), max(seen)


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per size of an upload."""
    rows = []
    for parameters in CASES:
        given, count = uploads(parameters), QUICK if quick else UPLOADS
        bytes_each = 4 * parameters
        first, whole = (found / bytes_each for found in memory(given, count))
        place = {name: torch.empty_like(tensor) for name, tensor in given[0].update.items()}

        def copy(place: dict[str, torch.Tensor] = place, given: list[Upload] = given, count: int = count) -> None:
            for number in range(count):
                for name, tensor in given[number % DISTINCT].update.items():
                    place[name].copy_(tensor)

        def reduce(given: list[Upload] = given, count: int = count) -> None:
            mean(given, count)

        costs = interleaved({"mean": reduce, "copy": copy}, 2 if quick else 5)
        speed = {name: f"{count * bytes_each / seconds(found) / 1e9:.2f}" for name, found in costs.items()}
        size = f"{parameters / 1e6:.0f} M"
        rows.append(
            (
                size,
                str(count),
                speed["mean"],
                speed["copy"],
                ratio(costs, "copy", "mean", "wall"),
                f"{first:.1f}",
                f"{whole:.1f}",
            )
        )
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

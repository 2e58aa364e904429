"""Grouping - rows a second and peak memory of fedllm.data.groups at several sizes.

    python benchmarks/grouping.py --rows 1000000 10000000

Synthetic rows of about 100 bytes fall into 100,000 groups of unequal size. Every size runs in a process of its own, so
that its peak memory is its own; memory should not grow with the rows. The disk needs about 260 bytes a row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

GROUPS = 100_000


def rows(count: int) -> Iterator[dict[str, object]]:
    """Rows by a multiplicative congruence; squaring makes some groups larger than others."""
    state = 1
    for number in range(count):
        state = state * 6364136223846793005 + 1442695040888963407 & (2**64 - 1)
        draw = (state >> 32) / 2**32
        yield {"user": int(draw * draw * GROUPS), "text": f"row {number} has some words of its own {state:x}"}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int, folder: Path) -> dict[str, float]:
    """Build, read every example once in shuffled order, and say what it took."""
    from fedllm.data.groups import build, stream

    empty, begun = peak(), time.perf_counter()
    built = build(rows(count), "user", folder / "groups")
    wrote = time.perf_counter()
    built_peak = peak()
    read = sum(1 for _, group in stream(folder / "groups", seed=0) for _ in group)
    done = time.perf_counter()
    if not built.examples == read == count:
        raise SystemExit(f"{count} rows given, {built.examples} written, {read} read")
    return {
        "rows": count,
        "groups": built.groups,
        "build_rows_per_second": round(count / (wrote - begun)),
        "stream_rows_per_second": round(count / (done - wrote)),
        "seconds": round(done - begun, 1),
        "peak_mib_before": round(empty, 1),
        "peak_mib_build": round(built_peak, 1),
        "peak_mib": round(peak(), 1),
    }


def main() -> None:
    """Run every size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the groups are written; a temporary folder by default")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for count in given.rows:
        if given.one:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                print(json.dumps(measure(count, Path(folder))))
            continue
        place = ["--folder", str(given.folder)] if given.folder else []
        subprocess.run([sys.executable, __file__, "--one", "--rows", str(count), *place], check=True)


if __name__ == "__main__":
    main()

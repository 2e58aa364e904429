"""python -m benchmarks [NAME ...] [--quick] - answers each question with a table and writes it into the docs.

One file of this folder is one question; each runs in a process of its own, one after the other, and its table goes to
docs/output/bench-NAME.md with the command and the machine. `--quick` measures less and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from docs.capture import made_by, page
from docs.markers import OUTPUT, ROOT, refresh

QUESTIONS = (
    "overhead",
    "cohort",
    "peers",
    "memory",
    "aggregation",
    "wire",
    "tokens",
    "growth",
    "start",
    "secagg",
    "secagg_flower",
    "encrypted",
    "sites",
    "wan",
    "faults",
)
"""In the order of the page."""


def main() -> None:
    """Ask the questions named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUESTIONS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats; nothing is written")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in QUESTIONS]
    if unknown:
        raise SystemExit(f"There is no benchmark '{unknown[0]}'. Allowed: {', '.join(QUESTIONS)}.")
    failed = [name for name in given.names or QUESTIONS if not asked(name, given.quick)]
    for changed in refresh() if not given.quick else ():
        print(f"Filled {changed.relative_to(ROOT)}")
    if failed:
        raise SystemExit(f"Not answered: {', '.join(failed)}.")


def asked(name: str, quick: bool) -> bool:
    """Run one benchmark, show its table, and keep it; False where it failed."""
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as place:
        drawn = ["--pictures", place] if "def pictures" in (Path(__file__).parent / f"{name}.py").read_text() else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else []), *drawn]
        found = subprocess.run(command, cwd=ROOT, env={**os.environ}, stdout=subprocess.PIPE, text=True)
        print(f"## {name}\n\n{found.stdout}", flush=True)
        if found.returncode or quick:
            return not found.returncode
        threads = os.environ.get("OMP_NUM_THREADS")
        told = made_by([f"python -m benchmarks {name}"], "", f"{threads} thread" if threads else "", again=False)
        pictures = sorted(Path(place).glob("*.svg"))
        shown = [f"![{one.stem}](output/bench-{one.name})" for one in pictures]
        (OUTPUT / f"bench-{name}.md").write_text(page(found.stdout, *shown, told), encoding="utf-8")
        for one in pictures:
            (OUTPUT / f"bench-{one.name}").write_text(one.read_text(encoding="utf-8"), encoding="utf-8")
    return True


if __name__ == "__main__":
    main()

"""Show - runs one benchmark from the command line and prints its table as Markdown.

python -m benchmarks.NAME [--quick] [--pictures FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fedllm.core.errors import FedLLMError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def main(module: ModuleType) -> None:
    """Measure and print: the question, the table, and what the module says of its numbers (`NOTE`).

    Args:
        module: has QUESTION, HEAD and measure(quick); may have NOTE and pictures(rows), name -> SVG text.
    """
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    drawn = getattr(module, "pictures", None)
    if drawn is not None:
        parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where the charts are written")
    given = parser.parse_args()
    try:
        rows = module.measure(given.quick)
    except FedLLMError as fault:
        raise SystemExit(str(fault)) from None
    print(f"{module.QUESTION}\n\n{table(module.HEAD, rows)}")
    if note := getattr(module, "NOTE", ""):
        print(f"\n{note}")
    if drawn is not None and given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        for name, svg in drawn(rows).items():
            (given.pictures / f"{name}.svg").write_text(svg, encoding="utf-8")

"""Build - the pages that are made from the code: python -m docs.build, from the root of the checkout.

The map, a page per method, every option, every command, what fits together, and the reference. None of them is
edited or committed. Nothing is trained; one step of each toy model is made to find out what works.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.markers import DOCS, OUTPUT, ROOT, refresh

MADE = "\n\n<!-- Made by `python -m docs.build`: change the code, not this page. -->\n"


def build(into: Path = DOCS, output: Path = OUTPUT, when: Path = DOCS / "when") -> list[Path]:
    """Write all generated pages into a folder; returns them, sorted.

    Args:
        into: the folder of the pages.
        output: captured output.
        when: the hand-written part of each method's page.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from docs.of_combinations import matrix_page
    from docs.of_methods import map_page, method_page, methods_page
    from docs.of_modes import modes_page
    from docs.of_modules import reference_pages
    from docs.of_options import commands_page, options_page

    evidence = _evidence(output)
    kinds = _kinds()
    pages = {
        "map.md": map_page(kinds, evidence),
        "options.md": options_page(),
        "commands.md": commands_page(),
        "matrix.md": matrix_page(kinds),
        "modes.md": modes_page(kinds),
        "methods/index.md": methods_page(kinds),
        **{f"methods/{key}.md": method_page(kind, evidence, when) for key, kind in kinds.items()},
        **reference_pages(),
    }
    written = []
    for name, text in sorted(pages.items()):
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.strip("\n") + MADE, encoding="utf-8")
        written.append(place)
    _remove_stale(into, written)
    return written


def _kinds() -> dict[str, Any]:
    """Every method and protocol of the package by key; plug-ins of this machine are left out."""
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    found = {**methods(), **protocols()}
    return {key: kind for key, kind in sorted(found.items()) if kind.__module__.startswith("fedllm.")}


def _evidence(output: Path) -> dict[str, dict[str, Any]]:
    """What `fedllm verify --all --json` measured, by method; empty where it was not captured yet."""
    file = output / "verify.json"
    return {one["key"]: one for one in json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}


def _remove_stale(into: Path, written: Sequence[Path]) -> None:
    """Remove generated pages of methods and modules that are gone."""
    for folder in ("methods", "reference"):
        for page in (into / folder).glob("**/*.md"):
            if page not in written and page.read_text(encoding="utf-8").endswith(MADE):
                page.unlink()


def main() -> None:
    """Build, fill the marked places, and tell."""
    begun = time.perf_counter()
    written = build()
    changed = refresh()
    sys.stdout.write(f"Wrote {len(written)} pages in {time.perf_counter() - begun:.1f} s.\n")
    for page in changed:
        sys.stdout.write(f"Filled {page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()

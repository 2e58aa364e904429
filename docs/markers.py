"""Markers - the places of a page that hold real output: `<!-- begin:output NAME -->` ... `<!-- end -->`.

What stands between them is a file of docs/output and nothing else, so that no number is typed by hand. A test holds
every page to it.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUTPUT = DOCS / "output"
_MARKED = re.compile(r"(<!-- begin:output ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def marked_pages() -> list[Path]:
    """Every page written by hand: README.md and the pages of docs."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]


def names(text: str) -> list[str]:
    """The outputs that a page asks for."""
    return [found.group(2) for found in _MARKED.finditer(text)]


def fill(text: str, output: Path = OUTPUT) -> str:
    """`text` with every marked place filled from `output`; a place whose file is absent says so."""
    return _MARKED.sub(lambda found: f"{found.group(1)}\n{held(found.group(2), output)}\n\n{found.group(3)}", text)


def held(name: str, output: Path = OUTPUT) -> str:
    """The captured output called `name`, or a sentence that there is none."""
    file = output / f"{name}.md"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    command = (
        f"python -m benchmarks {name.removeprefix('bench-')}" if name.startswith("bench-") else "python -m docs.capture"
    )
    return f"*Not measured yet; `{command}` fills this part.*"


def slug(heading: str) -> str:
    """The anchor that a heading gets on a page."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def refresh() -> list[Path]:
    """Fill the marked places of all pages; returns those that changed."""
    changed = []
    for page in marked_pages():
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed

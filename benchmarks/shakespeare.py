"""Shakespeare - tinyshakespeare by speaking role as rows: python -m benchmarks.shakespeare TEXT OUT.jsonl [ROLES]

The text is paragraphs that begin with a role and a colon. Rows are the speeches of the roles with the most to say, in
their order: {"role", "text"}.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path


def speeches(text: str) -> list[tuple[str, str]]:
    """(role, speech) of every paragraph that names a role."""
    found = []
    for paragraph in text.split("\n\n"):
        role, separator, speech = paragraph.strip().partition(":\n")
        if separator and speech.strip() and "\n" not in role:
            found.append((role.strip(), speech.strip()))
    return found


def write(source: Path, out: Path, roles: int = 8) -> dict[str, int]:
    """Write the rows of the `roles` longest parts; returns characters by role."""
    parts = speeches(source.read_text(encoding="utf-8"))
    length: collections.Counter[str] = collections.Counter()
    for role, speech in parts:
        length[role] += len(speech)
    chosen = dict(length.most_common(roles))
    with out.open("w", encoding="utf-8") as file:
        for role, speech in parts:
            if role in chosen:
                file.write(json.dumps({"role": role, "text": f"{role}: {speech}"}) + "\n")
    return chosen


def main() -> None:
    """Write the file and say what is in it."""
    source, out, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps(write(Path(source), Path(out), *map(int, rest)), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Of modes - attacks, defences, and which method goes with which mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docs.tables import NO, YES, cell, code, table


def modes_page(kinds: Mapping[str, Any]) -> str:
    """The matrix with its reasons, then every attack and defence with its options."""
    from fedllm.modes.attacks import attacks
    from fedllm.modes.defences import defences
    from fedllm.modes.matrix import MODES, verdicts

    rows, reasons = [], []
    for key, kind in kinds.items():
        found = verdicts(kind)
        shown = (NO if one.reason else code(one.text) if one.option else YES for one in found.values())
        rows.append([f"[{key}](methods/{key}.md)", *shown])
        refused = dict.fromkeys(one.reason for one in found.values() if one.reason)
        if refused:
            reasons.append([f"[{key}](methods/{key}.md)", " ".join(cell(reason) for reason in refused)])
    return "\n\n".join([
        "---\nhide: [toc]\n---",
        "# Modes",
        "What goes around a method: [privacy](guides/privacy.md), [secure sums](guides/secure-sums.md), "
        "[codecs](guides/codecs.md), [attacks and defences](guides/attacks.md). A pair that does not go together is "
        "refused before anything is trained. The tables are made by asking the code; in a terminal: "
        "`fedllm methods --modes`.",
        "## Method by mode",
        table(("method", *MODES), rows),
        "## Why not",
        table(("method", "reasons"), reasons),
        "## Attacks",
        _listed(attacks()),
        "## Defences",
        _listed(defences()),
    ])  # fmt: skip


def _listed(kinds: Mapping[str, Any]) -> str:
    rows = []
    for key, kind in kinds.items():
        options = ", ".join(
            f"{code(name)}: {cell(field.description or '')}" for name, field in kind.model_fields.items()
        )
        rows.append([code(key), cell(kind.card.title), cell(kind.card.claim), cell(kind.card.paper), options])
    return table(("name", "what it is", "what its paper claims", "source", "options"), rows)

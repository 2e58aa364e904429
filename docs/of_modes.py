"""Of modes - attacks, defences, and which method goes with which mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docs.tables import NO, YES, cell, code, table


def modes_page(kinds: Mapping[str, Any]) -> str:
    """The matrix with its reasons, then every attack and defence with its options."""
    from fedllm.modes.attacks import attacks
    from fedllm.modes.defences import Rule, defences
    from fedllm.modes.matrix import MODES, verdicts
    from fedllm.modes.observers import observers
    from fedllm.modes.shields import Shield

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
        "## Observers",
        "Attackers at the server that read rows off an upload. What each is assumed to know stands with it.",
        _listed(observers(), knows=True),
        "## Defences at the server",
        _listed({key: kind for key, kind in defences().items() if issubclass(kind, Rule)}),
        "## Defences at the client",
        _listed({key: kind for key, kind in defences().items() if issubclass(kind, Shield)}),
    ])  # fmt: skip


def _listed(kinds: Mapping[str, Any], knows: bool = False) -> str:
    """What there is, with its options; of observers, what they are assumed to know."""
    rows = []
    for key, kind in kinds.items():
        options = ", ".join(
            f"{code(name)}: {cell(field.description or '')}" for name, field in kind.model_fields.items()
        )
        about = kind.card.travels.removeprefix("nothing more; the observer knows ") if knows else kind.card.claim
        rows.append([code(key), cell(kind.card.title), cell(about), cell(kind.card.paper), options])
    head = "what it knows" if knows else "what its paper claims"
    return table(("name", "what it is", head, "source", "options"), rows)

"""Of methods - the survey's map, the list of methods, and a page for each with five fixed parts."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.capture import CAPTURES, VERDICTS
from docs.markers import slug
from docs.tables import LEGEND, NO, YES, code, paragraphs, table

SLOTS = (
    *("adapter", "trainable", "init", "prepare", "cohort", "distribute", "work", "reducer", "expected", "finalize"),
    *("refine", "weights", "evaluate"),
)
"""What a method may override, in the order of a round."""
DEVIATIONS = "Deviations:"
"""How the paragraph of a module's docstring begins that tells what differs from the paper."""


def map_page(kinds: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """The survey's map by topic."""
    from fedllm.cli.catalogue import MEANINGS, topic
    from fedllm.core.card import TOPICS

    parts = [
        "# The map",
        "The topics are those of the survey *Federated Large Language Models: Current Progress and Future "
        "Directions*; the numbers are its sections. **What stands here is what is implemented today: "
        f"{len(kinds)} methods.** A system of the survey that is not on this page is not in fedllm yet.",
        "Status: " + "; ".join(f"*{name}* – {meaning}" for name, meaning in MEANINGS.items()) + ". The column "
        "*measured* is what `fedllm verify` found.",
    ]
    by_topic: dict[str, list[Any]] = {}
    for kind in kinds.values():
        by_topic.setdefault(topic(kind), []).append(kind)
    for name in [*TOPICS.values(), "Protocols"]:
        if name in by_topic:
            rows = [_map_row(kind, evidence) for kind in by_topic[name]]
            head = ("method", "what it is", "paper", "in the survey", "status", "measured")
            parts += [f"## {name}", table(head, rows)]
    empty = [name for name in TOPICS.values() if name not in by_topic]
    if empty:
        parts += ["## Nothing yet", "\n".join(f"- {name}" for name in empty)]
    return "\n\n".join(parts)


def _map_row(kind: Any, evidence: Mapping[str, Any]) -> list[str]:
    card = kind.card
    clause = card.title.partition(" - ")[2] or card.title
    link = f"[{kind.key}](methods/{kind.key}.md)"
    return [link, clause, card.paper, "; ".join(card.cells), card.status, _verdict(kind.key, evidence)]


def _verdict(key: str, evidence: Mapping[str, Any]) -> str:
    from fedllm.effects import checks

    if key in evidence:
        return VERDICTS[evidence[key]["passed"]]
    return "not measured yet" if key in checks() else "no check"


def methods_page(kinds: Mapping[str, Any]) -> str:
    """The list of methods."""
    from fedllm.cli.catalogue import is_linear

    rows = []
    for key, kind in kinds.items():
        linear = {True: YES, False: NO, None: ""}[is_linear(kind)]
        sites = NO if kind.card.simulation_only else YES
        rows.append([f"[{key}]({key}.md)", kind.card.title.partition(" - ")[2], linear, sites, kind.card.status])
    return "\n\n".join([
        "# Methods",
        "One page per method, made from its file: what it is, when to use it, how to run it, what differs from the "
        "paper, what was claimed and what was measured. By topic they stand on [the map](../map.md); what works with "
        "what is in [the matrix](../matrix.md).",
        table(("method", "what it is", "linear", "real sites", "status"), rows),
        LEGEND,
    ])  # fmt: skip


def method_page(kind: Any, evidence: Mapping[str, Any], when: Path) -> str:
    """A method's page: five fixed parts, then its options and facts."""
    parts = [
        f"# {kind.card.title.partition(' - ')[0]}",
        *_what(kind),
        "## When to use it",
        _when(when / f"{kind.key}.md"),
        "## How to run it",
        *_how(kind),
        "## What we changed from the paper, and why",
        *_changed(kind),
        "## Claimed and measured",
        *_measured(kind, evidence),
        "## Options",
        *_options(kind),
        "## Facts",
        table(("", ""), _facts(kind)),
    ]
    return "\n\n".join(parts)


def _when(file: Path) -> str:
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    return f"Nobody has written this part yet; it belongs in `docs/when/{file.name}`."


def _docs(kind: Any) -> list[str]:
    """The module docstrings of a method and of the shared frames it is built on."""
    inside = ("fedllm.methods.", "fedllm.protocols.", "fedllm.blocks.")
    modules = [inspect.getmodule(base) for base in kind.__mro__ if base.__module__.startswith(inside)]
    return [inspect.getdoc(module) or "" for module in modules]


def _what(kind: Any) -> list[str]:
    first, *others = _docs(kind)
    title = first.partition("\n")[0].partition(" - ")[2]
    parts = [_sentence(title)] if title else []
    parts += [one for one in paragraphs(first) if not one.startswith(DEVIATIONS)]
    for other in others:
        parts.append(f"It is built on *{other.partition(chr(10))[0].rstrip('.')}*:")
        parts += [one for one in paragraphs(other) if not one.startswith(DEVIATIONS)]
    paper = "" if kind.card.paper == "baseline" else f"Paper: {kind.card.paper}. "
    return [*parts, f"{paper}In the survey: {'; '.join(kind.card.cells)}."]


def _how(kind: Any) -> list[str]:
    commands = [_command(kind), f"fedllm explain {kind.key}"]
    captured = [one.title for one in CAPTURES.values() if kind.key in one.methods]
    where = [f"[{title}](../results.md#{slug(title)})" for title in captured]
    told = "It prints a table of results and writes a [run folder](../guides/runs.md)."
    told += f" Its measured output stands in {', '.join(where)}." if where else ""
    return ["```sh\n" + "\n".join(commands) + "\n```", told]


def _command(kind: Any) -> str:
    """How to run a method on the quickstart: what the recipe would set against the method's own training is given."""
    from fedllm.cli.options import as_yaml, changed
    from fedllm.recipe import load_recipe

    train = kind.model_fields.get("train")
    own = changed(train.default) if train is not None else {}
    used = load_recipe("quickstart").train
    given = [shlex.quote(f"train.{n}={as_yaml(v)}") for n, v in sorted(own.items()) if n in used]
    if train is not None and "lr" in own and "schedule" in used and "schedule" not in own:
        given.append(f"train.schedule.kind={train.default.schedule.kind}")  # the recipe's belongs to the recipe's rate
    adapters, models = getattr(kind, "adapters", ()), kind.card.models
    given += [f"adapter.kind={adapters[0]}"] if adapters and "lora" not in adapters else []
    given += [] if {"any", "causal-lm"} & set(models) else [f"task.kind={models[0]}"]
    needed = [f"method.{n}={as_yaml(v)}" for n, v in getattr(kind, "needs", {}).items()]
    return " ".join(["fedllm run quickstart", f"method.name={kind.key}", *needed, *given])


def _changed(kind: Any) -> list[str]:
    written = [one for doc in _docs(kind) for one in paragraphs(doc) if one.startswith(DEVIATIONS)]
    if written:
        return [_sentence(one.removeprefix(DEVIATIONS).strip()) for one in written]
    if kind.card.paper == "baseline":
        return ["There is no paper: it is what methods are compared with."]
    return [f"No deviation is written down in `{_file(kind)}`."]


def _measured(kind: Any, evidence: Mapping[str, Any]) -> list[str]:
    from fedllm.effects import checks

    claim, one = kind.card.claim, evidence.get(kind.key)
    if kind.key not in checks():
        return [f"Its card says: {claim}", "There is no effect check for it, so `fedllm verify` measures nothing."]
    made = f"`fedllm verify {kind.key}` measures it; the check is `fedllm/effects/{kind.key.replace('-', '_')}.py`."
    if one is None:
        return [f"Claimed: {claim}", f"Measured: not measured yet. {made}"]
    rows = [[one["claim"], one["measured"], VERDICTS[one["passed"]]]]
    numbers = [[name, f"{value:.6g}"] for name, value in one["numbers"].items()]
    shown = [table(("number", "value"), numbers)] if numbers else []
    return [table(("claimed", "measured", "verdict"), rows), *shown, made]


def _options(kind: Any) -> list[str]:
    from fedllm.cli.options import as_yaml, changed, options

    rows = [[code(o.name), code(o.default), o.type, o.about] for o in options(kind, "method.", skip=("train",))]
    train = kind.model_fields.get("train")
    given = sorted(changed(train.default).items()) if train is not None else []
    own = ", ".join(f"`train.{n}: {as_yaml(v)}`" for n, v in given)
    told = "Local training has the options of [train](../options.md#train)"
    told += f"; this method begins from {own}." if own else "."
    return [table(("option", "default", "type", "what it is"), rows) if rows else "It has none of its own.", told]


def _facts(kind: Any) -> list[list[str]]:
    from fedllm.cli.catalogue import is_linear

    linear = {True: "yes: uploads may be added up in secret", False: "no: the server sees each upload"}
    models = "any" if "any" in kind.card.models else ", ".join(kind.card.models)
    rows = [
        ["what travels", kind.card.travels],
        ["slots overridden", ", ".join(_slots(kind)) or "none"],
        ["functions at the client", ", ".join(code(name) for name in sorted(kind.client_functions()))],
        ["linear", linear.get(is_linear(kind), "a protocol: it has no reducer")],
        ["stays private", ", ".join(code(name) for name in kind.private) or "nothing is kept between rounds"],
        ["tasks", models],
        ["adapters", ", ".join(getattr(kind, "adapters", ())) or "any"],
        ["real sites", f"no: {kind.card.simulation_only}" if kind.card.simulation_only else "yes"],
        ["status", kind.card.status],
        ["file", code(_file(kind))],
    ]
    return rows


def _slots(kind: Any) -> list[str]:
    """The slots that a class or a frame it is built on defines anew, in the order of a round."""
    from fedllm.core.method import Method

    found = []
    for slot in SLOTS if issubclass(kind, Method) else ("play",):
        owner = next(base for base in kind.__mro__ if slot in base.__dict__)
        if owner is not Method:
            found.append(code(slot) if owner is kind else f"`{slot}` (in {owner.__name__})")
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _file(kind: Any) -> str:
    return f"{kind.__module__.replace('.', '/')}.py"

"""Catalogue - what there is: `methods`, `explain`, `verify`, `recipes`."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import complete, screen
from fedllm.cli.plugins import load_plugins
from fedllm.cli.running import Json

if TYPE_CHECKING:
    from rich.table import Table

    from fedllm.cli.options import Option
    from fedllm.effects import Evidence

MARKS = {"verified": ("✔", "+"), "runs": ("•", "*"), "experimental": ("○", "o")}
"""Status -> its sign, and the one for a terminal that cannot write it."""
MEANINGS = {
    "verified": "the effect its paper claims was measured",
    "runs": "passes the contract of every method",
    "experimental": "less than that",
}


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    panel = "Look around"
    app.command("methods", rich_help_panel=panel)(list_methods)
    app.command("explain", rich_help_panel=panel)(explain)
    app.command("verify", rich_help_panel=panel)(verify_claims)
    app.command("recipes", rich_help_panel=panel)(list_recipes)


def list_methods(
    modes: Annotated[bool, typer.Option("--modes", help="Which method goes with privacy, secure sums, ...")] = False,
    as_json: Json = False,
) -> None:
    """The survey's map: every method by topic, how far it is checked and what it works on."""
    with screen.loading("Reading the methods"):
        load_plugins()
        found = entries()
    if modes:
        list_modes([one["key"] for one in found], as_json)
        return
    if as_json:
        screen.emit(found)
        return
    signs = {status: pair[0 if screen.can_show(pair[0]) else 1] for status, pair in MARKS.items()}
    screen.show(map_table(found, signs))
    for status, sign in signs.items():
        screen.say(f"{sign} {status}: {MEANINGS[status]}", "dim")
    screen.say("sum: uploads may be added up in secret; sites: needs no data in one place", "dim")


def list_modes(keys: list[str], as_json: bool) -> None:
    """Method by mode: whether they go together, and below the table why not."""
    from rich.table import Table

    from fedllm.methods import methods
    from fedllm.modes.matrix import MODES, verdicts
    from fedllm.protocols import protocols

    kinds = {**methods(), **protocols()}
    found = {key: verdicts(kinds[key]) for key in keys}
    if as_json:
        screen.emit({key: {mode: one._asdict() for mode, one in modes.items()} for key, modes in found.items()})
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("method", *MODES):
        table.add_column(name, no_wrap=True)
    for key, modes in found.items():
        table.add_row(key, *(modes[mode].text for mode in MODES))
    screen.show(table)
    screen.say("-: refused before training; --json, and the page 'Modes' of the docs, say why", "dim")


def entries() -> list[dict[str, Any]]:
    """What `fedllm methods --json` writes: one mapping per method and protocol, topic after topic."""
    from fedllm.core.card import TOPICS
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    order = [*TOPICS.values(), "Protocols", "Your own"]
    found = [entry(kind) for kind in (*methods().values(), *protocols().values())]
    return sorted(found, key=lambda one: (order.index(one["topic"]), one["key"]))


def entry(kind: Any) -> dict[str, Any]:
    """One method or protocol in short."""
    card = kind.card
    return {
        "key": kind.key,
        "topic": topic(kind),
        "title": card.title,
        "status": card.status,
        "models": list(card.models),
        "adapters": list(getattr(kind, "adapters", ())) or ["any"],
        "linear": is_linear(kind),
        "simulation_only": card.simulation_only,
    }


def topic(kind: Any) -> str:
    """The part of the survey whose folder a class lies in."""
    from fedllm.core.card import TOPICS

    place = kind.__module__.split(".")
    if place[:2] == ["fedllm", "protocols"]:
        return "Protocols"
    return TOPICS.get(place[2], "Your own") if place[:2] == ["fedllm", "methods"] else "Your own"


def is_linear(kind: Any) -> bool | None:
    """Whether a method's uploads may be summed in secret; None for a protocol, which has no reducer."""
    return kind().linear() if hasattr(kind, "linear") else None


def map_table(found: list[dict[str, Any]], signs: dict[str, str]) -> Table:
    """The map: a heading per topic, a row per method."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("what it is", ratio=1)
    for name in ("works on", "sum", "sites"):
        table.add_column(name)
    before = None
    for one in found:
        if one["topic"] != before:
            if before is not None:
                table.add_row()
            before = one["topic"]
            table.add_row("", "", Text(before, "bold cyan"))
        works = [*(m for m in one["models"] if m != "any"), *(a for a in one["adapters"] if a != "any")]
        clause = one["title"].partition(" - ")[2] or one["title"]
        linear = {True: "yes", False: "no", None: ""}[one["linear"]]
        sites = "no" if one["simulation_only"] else "yes"
        table.add_row(signs[one["status"]], one["key"], clause, ", ".join(works) or "any model", linear, sites)
    return table


def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="A method, 'recipe', or a place in it such as recipe.train.",
            autocompletion=complete.explained,
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """A method's card and options, or the options of a recipe."""
    with screen.loading("Reading"):
        from fedllm.cli.options import recipe_options

        load_plugins()
        place = key.removeprefix("recipe").removeprefix(".") if key.split(".")[0] == "recipe" or "." in key else None
        described = place_facts(place, recipe_options()) if place is not None else method_facts(key)
    if as_json:
        screen.emit(described)
    elif place is not None:
        screen.tell(described["about"])
        screen.show(options_table(described["options"]))
    else:
        show_method(described)


def place_facts(place: str, known: list[Option]) -> dict[str, Any]:
    """The options of a recipe below `place`; "" is all of it."""
    from fedllm.core.errors import ConfigError

    found = [one for one in known if not place or one.name == place or one.name.startswith(f"{place}.")]
    if not found and place.startswith("method."):
        raise ConfigError(
            f"What follows 'method.' depends on the method: '{place}' is not an option of all.",
            action="Run 'fedllm explain KEY' with the method's key.",
        )
    if not found:
        raise ConfigError.unknown("option of a recipe", place, _beside(place, known))
    about = "A recipe is a YAML file of these options; on the command line they are KEY=VALUE."
    return {"place": place or "recipe", "about": about, "options": [one.to_dict() for one in found]}


def _beside(place: str, known: list[Option]) -> set[str]:
    """The places that lie in the same part of a recipe as the wrong `place`."""
    parts = place.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        inside = "".join(f"{part}." for part in parts[:depth])
        names = {inside + one.name.removeprefix(inside).split(".")[0] for one in known if one.name.startswith(inside)}
        if names:
            return names
    return set()


def method_facts(key: str) -> dict[str, Any]:
    """Everything `explain` knows about a method or protocol."""
    from fedllm.cli.options import as_yaml, changed, options

    kind = find(key)
    train = kind.model_fields.get("train")
    linear = is_linear(kind)
    return {
        "key": kind.key,
        "kind": "protocol" if linear is None else "method",
        "topic": topic(kind),
        "card": kind.card.model_dump(mode="json"),
        "about": inspect.getdoc(inspect.getmodule(kind)) or "",
        "options": [one.to_dict() for one in options(kind, "method.", skip=("train",))],
        "train": {n: as_yaml(v) for n, v in changed(train.default).items()} if train is not None else {},
        "linear": linear,
        "private": list(kind.private),
        "adapters": list(getattr(kind, "adapters", ())) or ["any"],
        "client_functions": sorted(kind.client_functions()),
        "file": str(Path(inspect.getfile(kind))),
    }


def find(key: str) -> Any:
    """The method or protocol called `key`."""
    from fedllm.core.errors import ConfigError
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    known = {**methods(), **protocols()}
    if key not in known:
        raise ConfigError.unknown("method", key, [*known, "recipe"], "Run 'fedllm methods' to see them all.")
    return known[key]


def show_method(facts: dict[str, Any]) -> None:
    """Print what is known of a method."""
    from rich.table import Table

    card = facts["card"]
    screen.say(card["title"], "bold")
    screen.say()
    body = facts["about"].partition("\n")[2].strip()
    if body:
        screen.tell(body)
        screen.say()
    linear = {True: "linear: uploads may be added up in secret", False: "not linear: the server sees each upload"}
    rows = {
        "topic": facts["topic"],
        "paper": card["paper"],
        "in the survey": "; ".join(card["cells"]),
        "claim": card["claim"],
        "status": f"{card['status']}: {MEANINGS[card['status']]}",
        "travels": card["travels"],
        "reducer": linear.get(facts["linear"], "a protocol: it has none"),
        "stays private": ", ".join(facts["private"]) or "clients keep nothing between rounds",
        "models": ", ".join(card["models"]),
        "adapters": ", ".join(facts["adapters"]),
        "pooled data": f"needed: {card['simulation_only']}" if card["simulation_only"] else "not needed",
        "training": ", ".join(f"train.{n}={v}" for n, v in facts["train"].items()),
        "file": facts["file"],
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    screen.show(table)
    screen.say()
    screen.show(options_table(facts["options"]))
    screen.say("Training options: fedllm explain recipe.train", "dim")


def options_table(rows: list[dict[str, str]]) -> Table:
    """Options for people: name, default, type and text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("option", style="bold", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=24)
    table.add_column("what it is", ratio=1, overflow="fold")
    for row in rows:
        about = Text(row["about"])
        table.add_row(row["name"], Text(row["default"]), about.append(f" ({row['type']})", "dim"))
    return table


def verify_claims(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A method.", autocompletion=complete.methods, show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every method that has a check.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Checks at once; as many as there are processors by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check what a paper claims on a small task: claim beside measurement; leaves with 1 where it fails."""
    if (key is None) != every:
        raise typer.BadParameter("Give a method's key, or --all.", param_hint="KEY")
    with screen.loading("Loading libraries"):
        from fedllm.effects import checks, verify_all

        load_plugins()
    keys = checks() if every else [str(key)]
    found, coming = [], verify_all(keys, jobs or min(os.cpu_count() or 1, 8))
    for one in keys:
        with screen.loading(f"Checking {one}"):
            found.append(next(coming))
        if not as_json:
            show_evidence(found[-1])
    if as_json:
        screen.emit([{**vars(one)} for one in found])
    if any(one.passed is False for one in found):
        raise typer.Exit(1)


def show_evidence(evidence: Evidence) -> None:
    """Print one check."""
    verdict, style = {
        True: ("shown", "bold green"),
        False: ("NOT shown", "bold red"),
        None: ("measured, not asserted", "bold yellow"),
    }[evidence.passed]
    screen.say(f"{evidence.key}: {verdict} ({evidence.seconds:.1f} s)", style)
    screen.tell(f"  claim     {evidence.claim}")
    screen.tell(f"  measured  {evidence.measured}")


def list_recipes(as_json: Json = False) -> None:
    """The recipes that come with fedllm."""
    import yaml
    from rich.table import Table

    found = []
    for name in complete.bundled_recipes():
        values = yaml.safe_load((complete.PACKAGE / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        method = values.get("method", "fedavg")
        key = method.get("name", "fedavg") if isinstance(method, dict) else method
        found.append({"name": name, "method": key, "about": values.get("about", "")})
    if as_json:
        screen.emit(found)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("about", ratio=1)
    for one in found:
        table.add_row(one["name"], str(one["method"]), one["about"])
    screen.show(table)
    screen.say("Run one: fedllm run NAME [KEY=VALUE ...]", "dim")

"""Data - `data stats`, `data build`, `data stream`: how rows are split into clients, and groups on disk."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli import complete, screen
from fedllm.cli.late import Group
from fedllm.cli.running import Json

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
BAR = 40
"""Columns of the longest bar."""
BARS = 40
"""Clients drawn at most."""

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options, such as data.limit=100.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    group = Group(help="How rows are split into clients; groups on disk.", no_args_is_help=True)
    group.command("stats")(stats)
    group.command("build")(build)
    group.command("stream")(stream)
    app.add_typer(group, name="data", rich_help_panel="Look around")


def stats(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A recipe, or a data file.", autocompletion=complete.sources, show_default=False
        ),
    ],
    overrides: Overrides = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw the clients' sizes into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Who holds how much, and how much clients differ. A file is one client unless data.partition says more."""
    with screen.loading("Reading the data"):
        from fedllm.data.federation import Federation
        from fedllm.data.statistics import statistics
        from fedllm.recipe import load_recipe

        recipe = load_recipe(*recipe_for(source, list(overrides or [])))
        found = statistics(Federation.build(recipe.data, recipe.seed)).to_dict()
    if svg is not None:
        svg.write_text(drawing(found), encoding="utf-8")
    if as_json:
        screen.emit(found)
        return
    from fedllm.report.table import partition_table

    screen.show(partition_table(found))
    for line in bars(found):
        screen.say(line)
    if svg is not None:
        screen.say(f"Drawing: {svg}")
    screen.warn(found["warnings"])


def recipe_for(source: str, overrides: list[str]) -> tuple[Any, list[str]]:
    """A recipe with overrides; a data file becomes a recipe that names it, as one client where nothing else is said."""
    place = Path(source)
    if place.suffix not in ENDINGS and not place.is_dir() and "*" not in source:
        return source, overrides
    given = [text if text.startswith("data.") else f"data.{text}" for text in overrides]
    split = any(text.startswith("data.partition.by") for text in given)
    partition = {} if split else {"partition": {"by": "iid", "clients": 1}}
    return {"data": {"path": source, **partition}}, given


def bars(found: dict[str, Any]) -> list[str]:
    """The clients' training rows as bars of text, largest first."""
    clients = sorted(found["clients"].values(), key=lambda one: -one["train"])
    if len(clients) < 2:
        return []
    block, longest = "█" if screen.can_show("█") else "#", max(1, clients[0]["train"])
    width = min(24, max(len(one["name"]) for one in clients))
    lines = [
        f"{one['name'][:width]:{width}} {block * round(BAR * one['train'] / longest)} {one['train']}"
        for one in clients[:BARS]
    ]
    rest = len(clients) - BARS
    return ["", *lines, *([f"... and {rest} smaller clients"] if rest > 0 else [])]


def drawing(found: dict[str, Any]) -> str:
    """The clients' training rows as an SVG bar chart."""
    from fedllm.report.chart import Bars, bar_chart

    clients = sorted(found["clients"].values(), key=lambda one: -one["train"])
    rows = Bars("training rows", [one["train"] for one in clients])
    return bar_chart(
        "Training rows by client", f"{len(clients)} clients", [c["name"] for c in clients], [rows], "{:g}".format
    )


def build(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A data file, a folder or a pattern with *.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="The column whose values are the groups.", show_default=False)],
    to: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    shards: Annotated[int, typer.Option(min=1, help="Files to spread the groups over.")] = 8,
    max_group_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of a group.")] = None,
    as_json: Json = False,
) -> None:
    """Group rows of any number on disk by a column, one group per client, in bounded memory."""
    with screen.loading("Grouping"):
        from fedllm.data.groups import build as build_groups
        from fedllm.data.load import from_files

        rows: Any = from_files(file)
        built = build_groups(rows, by, to, shards, max_group_bytes)
    if as_json:
        screen.emit({"folder": str(to), **vars(built)})
    else:
        screen.say(f"{built.groups} groups, {built.examples} examples, {built.bytes} bytes: {to}")
    screen.warn(built.warnings)


def stream(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Written by 'fedllm data build'.", show_default=False)
    ],
    seed: Annotated[
        int | None, typer.Option(help="Decides the order; the order on disk where it is not given.")
    ] = None,
    take: Annotated[int | None, typer.Option(min=1, help="So many groups.")] = None,
) -> None:
    """Write groups to stdout, one JSON line each, without holding more than one."""
    from fedllm.data.groups import stream as stream_groups

    for key, group in islice(stream_groups(folder, seed), take):
        sys.stdout.write(json.dumps({"key": key, "examples": list(group)}, ensure_ascii=False) + "\n")

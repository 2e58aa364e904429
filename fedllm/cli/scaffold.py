"""Scaffold - `new-method`: the files of a new method, which runs at once as federated averaging.

Inside a source checkout they go where the package's own lie. Anywhere else the method becomes a plug-in: a file in
`fedllm_methods`, which the command line imports when it is run from here.
"""

from __future__ import annotations

import keyword
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import complete, screen, skeleton
from fedllm.cli.plugins import FOLDER, load_plugins

KEY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
DEFAULT_TOPIC = "directions"


@dataclass(frozen=True)
class Plan:
    """Where each file goes.

    Attributes:
        files: place -> its template.
        packages: folders that need an `__init__.py`, with its text.
        values: what is filled in.
    """

    files: dict[Path, str]
    packages: dict[Path, str]
    values: dict[str, str]


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("new-method", rich_help_panel="Extend")(new_method)


def new_method(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its key, in lower case with dashes.", show_default=False)],
    topic: Annotated[
        str, typer.Option(help="Its folder in the survey's map.", autocompletion=complete.topics)
    ] = DEFAULT_TOPIC,
) -> None:
    """Write a method that runs at once, with its test, recipe and docs page; nothing is overwritten."""
    with screen.loading("Reading the methods"):
        load_plugins()
        check_key(key)
        plan = plan_for(key, topic, checkout(Path.cwd()))
        write(plan)
    for place in plan.files:
        screen.say(f"Wrote {_short(place)}")
    recipe = next(place for place in plan.files if place.suffix == ".yaml")
    named = key if recipe.parent == complete.PACKAGE / "recipes" else _short(recipe)
    test = next(place for place in plan.files if place.name.startswith("test_"))
    screen.say(f"It is federated averaging until you change a slot. Try: fedllm run {named}")
    screen.say(f"Test it: python -m pytest {_short(test)}")


def checkout(start: Path) -> Path | None:
    """The root of the source checkout that `start` lies in and fedllm is imported from; None where there is none."""
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "fedllm").resolve() == complete.PACKAGE.resolve():
            return folder
    return None


def check_key(key: str) -> None:
    """Raise :class:`ConfigError` where `key` cannot be a method's key, or is taken."""
    from fedllm.core.errors import ConfigError
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    taken = {**methods(), **protocols()}
    if not KEY.fullmatch(key) or keyword.iskeyword(key):
        near = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
        free = KEY.fullmatch(near) and not keyword.iskeyword(near) and near not in taken
        raise ConfigError(
            f"'{key}' cannot be a key.",
            "A key has lower-case letters and digits, with single dashes between them, and begins with a letter.",
            near if free else None,
        )
    if key in taken:
        raise ConfigError(f"The key '{key}' is taken.", f"It is {taken[key].__module__}.", action="Choose another key.")


def plan_for(key: str, topic: str, root: Path | None) -> Plan:
    """The files of the method `key`: inside the checkout `root`, or a plug-in in the current folder where None."""
    from fedllm.core.card import TOPICS
    from fedllm.core.errors import ConfigError

    if topic not in TOPICS:
        raise ConfigError.unknown("topic", topic, TOPICS)
    stem, name = key.replace("-", "_"), "".join(part.capitalize() for part in key.split("-"))
    values = {"key": key, "stem": stem, "name": name, "cell": TOPICS[topic], "own_key": "", "recipe": key}
    if root is None:
        here, home = Path.cwd(), Path.cwd() / FOLDER
        values |= {"module": f"{FOLDER}.{stem}", "own_key": f'    key = "{key}"\n', "recipe": f"{key}.yaml"}
        places = [home / f"{stem}.py", here / f"test_{stem}.py", here / f"{key}.yaml", here / f"{key}.md"]
        packages: dict[Path, str] = {}
    else:
        home = root / "fedllm" / "methods" / topic
        values["module"] = f"fedllm.methods.{topic}.{stem}"
        places = [home / f"{stem}.py", root / "tests" / "methods" / f"test_{stem}.py"]
        places += [root / "fedllm" / "recipes" / f"{key}.yaml", root / "docs" / "when" / f"{key}.md"]
        packages = {home / "__init__.py": f'"""{TOPICS[topic]}."""\n'}
    templates = (skeleton.METHOD, skeleton.TEST, skeleton.RECIPE, skeleton.PAGE)
    return Plan(dict(zip(places, templates, strict=True)), packages, values)


def write(plan: Plan) -> None:
    """Write all files of a plan; raises :class:`ConfigError`, and writes none, where one exists."""
    from fedllm.core.errors import ConfigError

    there = [place for place in plan.files if place.exists()]
    if there:
        raise ConfigError(f"{_short(there[0])} exists already.", "Nothing was written.", action="Choose another key.")
    for place, text in plan.packages.items():
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
    for place, template in plan.files.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(string.Template(template).substitute(plan.values), encoding="utf-8")


def _short(place: Path) -> Path:
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place

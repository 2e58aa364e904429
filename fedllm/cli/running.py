"""Running - `run`, `resume`, `compare`: train, go on after a stop, several methods over the same ground.

Ctrl-C once ends a run after the current round, which is saved; twice ends it at once, and the last saved round counts.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import complete, screen
from fedllm.cli.plugins import load_plugins

if TYPE_CHECKING:
    from fedllm.cli.live import Live
    from fedllm.run import Result

INTERRUPTED = 130
"""Exit code of a run that was stopped: 128 + SIGINT."""
DEFAULT = "quickstart"

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options laid over the recipe.")]
Recipes = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A file, or the name of a bundled recipe.", autocompletion=complete.recipes),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
RunFolderArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder.", autocompletion=complete.runs, show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    panel = "Train"
    app.command("run", rich_help_panel=panel)(run_recipe)
    app.command("resume", rich_help_panel=panel)(resume_run)
    app.command("compare", rich_help_panel=panel)(compare_methods)
    app.command("profit", rich_help_panel=panel)(measure_profit)
    app.command("attack", rich_help_panel=panel)(attack_grid)


def run_recipe(
    context: typer.Context,
    recipe: Recipes = DEFAULT,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one under runs/.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Play a recipe from beginning to end. For example: fedllm run quickstart rounds=3 method=fedprox"""
    recipe, given = split_recipe(recipe, overrides)
    with screen.loading("Loading libraries"):
        from fedllm.cli.live import watcher
        from fedllm.run import run

        load_plugins()
    watch = watcher(as_json=as_json, quiet=quiet)
    with interruptible(watch, lambda: resume_hint(watch.folder)), watch:
        result = run(recipe, given, folder=folder, watch=watch, debug=context.obj)
    show_result(result, watch, as_json)


def resume_run(
    context: typer.Context, run_folder: RunFolderArgument, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Go on with a run that was stopped, to the same bits as if it had not been."""
    with screen.loading("Loading libraries"):
        from fedllm.cli.live import watcher
        from fedllm.run import resume

        load_plugins()
    watch = watcher(as_json=as_json, quiet=quiet)
    with interruptible(watch, lambda: resume_hint(run_folder)), watch:
        result = resume(run_folder, watch=watch, debug=context.obj)
    show_result(result, watch, as_json)


def compare_methods(
    context: typer.Context,
    recipe: Recipes = DEFAULT,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "-m",
            help="Keys with commas; by default base (untrained), local, the recipe's own, fedavg, central.",
            autocompletion=complete.method_lists,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-s", min=1, help="Runs of each method.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where results are kept; given again, it goes on there.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Several methods over the same clients, steps, rounds and seeds: one table with mean and spread."""
    recipe, given = split_recipe(recipe, overrides)
    with screen.loading("Loading libraries"):
        from fedllm.cli.live import watcher
        from fedllm.compare import compare
        from fedllm.recipe import load_recipe

        load_plugins()
        own = load_recipe(recipe, given).method.get("name", "fedavg")
    wanted = ["base", "local", own, "fedavg", "central"] if methods is None else methods.split(",")
    keys = list(dict.fromkeys(key.strip() for key in wanted if key.strip()))
    watch = watcher(seeds * sum(key != "base" for key in keys), as_json, quiet)
    with interruptible(watch, lambda: f"Go on with the same command and: --folder {watch.folder}"), watch:
        comparison = compare(recipe, keys, seeds, given, folder=folder, watch=watch, debug=context.obj)
        watch.finished = True
    if as_json:
        screen.emit(comparison.table)
        return
    from fedllm.cli.tables import comparison_table

    screen.show(screen.fitted(comparison_table(comparison.table), screen.console().width))
    screen.warn(comparison.table["early"])
    screen.say(f"Table: {comparison.folder / 'compare.md'}")


def measure_profit(
    recipe: Recipes,
    overrides: Overrides = None,
    lrs: Annotated[str, typer.Option("--lr", help="Local rates of stage 2, with commas.")] = "0.003,0.03,0.3",
    steps: Annotated[str, typer.Option(help="Local steps at which scores are taken; 0 is untuned.")] = "0,1,2,4,8,16",
    mix: Annotated[str, typer.Option(help="Shares of the tuned weights in what is measured.")] = "1",
    near: Annotated[float, typer.Option(min=0.0, help="Weight of the squared distance to the global weights.")] = 0.0,
    folder: Annotated[Path | None, typer.Option(help="Where results are kept; given again, it goes on there.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What clients gain by tuning on, and what everybody else's tasks lose (the recipe's method must be profit)."""
    recipe, given = split_recipe(recipe, overrides)
    grid = [_numbers("--lr", lrs, float), _numbers("--steps", steps, int), _numbers("--mix", mix, float)]
    with screen.loading("Loading libraries"):
        from fedllm.cli.live import watcher
        from fedllm.profit import profit

        load_plugins()
    watch = watcher(as_json=as_json, quiet=quiet)
    with interruptible(watch, lambda: f"Go on with the same command and: --folder {watch.folder}"), watch:
        found = profit(recipe, *grid, near, given, folder=folder, watch=watch)
    if as_json:
        screen.emit({"metric": found.metric, "rows": found.rows})
        return
    from fedllm.cli.tables import profit_table

    screen.show(screen.fitted(profit_table(found.rows, found.metric), screen.console().width))
    screen.say(f"Table: {found.folder / 'profit.md'}\nPicture: {found.folder / 'profit.svg'}")


def attack_grid(
    recipe: Recipes = DEFAULT,
    overrides: Overrides = None,
    attacked: Annotated[
        str, typer.Option("--attacks", help="Names with commas; 'none' is always there.")
    ] = "sign-flip",
    defended: Annotated[str, typer.Option("--defences", help="Names with commas; 'none' is always there.")] = "none",
    methods: Annotated[str, typer.Option(help="Keys with commas; the recipe's method where empty.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where results are kept; given again, it goes on there.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attackers against defences: what they reach, and what a defence costs. For example: --attacks alie,backdoor"""
    recipe, given = split_recipe(recipe, overrides)
    grid = [[name.strip() for name in text.split(",") if name.strip()] for text in (attacked, defended, methods)]
    with screen.loading("Loading libraries"):
        from fedllm.attack import siege
        from fedllm.cli.live import watcher

        load_plugins()
    cells = (1 + len(set(grid[0]) - {"none"})) * (1 + len(set(grid[1]) - {"none"})) * max(1, len(grid[2]))
    watch = watcher(as_json=as_json, quiet=quiet, expected=cells)
    with interruptible(watch, lambda: f"Go on with the same command and: --folder {watch.folder}"), watch:
        found = siege(recipe, *grid, given, folder=folder, watch=watch)
        watch.finished = True
    if as_json:
        screen.emit({"metric": found.metric, "rows": found.rows})
        return
    from fedllm.cli.tables import attack_table

    screen.show(screen.fitted(attack_table(found.rows, found.metric), screen.console().width))
    screen.say(f"Table: {found.folder / 'attack.md'}")


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    """A list of numbers with commas."""
    from fedllm.core.errors import ConfigError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option}={text} is no list of numbers.", "Numbers with commas between them.", "0,1,4,16"
        ) from None


def split_recipe(recipe: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """Recipe and overrides; `fedllm run rounds=3` means the default recipe."""
    given = list(overrides or [])
    return (DEFAULT, [recipe, *given]) if "=" in recipe and not Path(recipe).exists() else (recipe, given)


@contextmanager
def interruptible(watch: Live, hint: Callable[[], str]) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) stops `watch` after its round, the second ends at once; both tell how to go on.

    Before anything was loaded there is nothing to save, and the first one ends at once.
    """

    def stop(*_: object) -> None:
        if watch.stop or not watch.ready:
            raise KeyboardInterrupt
        watch.interrupted()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        screen.say(f"Stopped. {hint()}", errors=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_hint(folder: Path | None) -> str:
    """How to go on with a run."""
    return "Nothing was begun." if folder is None else f"Go on with: fedllm resume {folder}"


def show_result(result: Result, watch: Live, as_json: bool) -> None:
    """The table, what it means, the files; leaves with 130 where the run was stopped before its end."""
    if as_json:
        screen.emit({"folder": str(result.folder), **result.table})
    if not result.finished:
        screen.say(f"Stopped and saved. {resume_hint(result.folder)}", errors=True)
        raise typer.Exit(INTERRUPTED)
    if not as_json:
        from fedllm.cli.tables import client_table
        from fedllm.report.table import result_table

        width = screen.console().width
        by_client = client_table(result.table, width)
        screen.say()
        screen.show(screen.fitted(result_table(result.table), width), *([by_client] if by_client is not None else []))
        screen.say()
        for sentence in result.sentences:
            screen.tell(sentence, "bold")
        screen.say()
        for name, file in result.table["files"].items():
            screen.say(f"{name.capitalize():8} {file}")
    seen = [] if watch.silent else watch.warnings
    screen.warn([text for text in result.table["warnings"] if text not in seen])

"""Results - what is done with a finished run: `report`, `chat`, `export`."""

from __future__ import annotations

import contextlib
import json
import string
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.running import Json, RunFolderArgument

if TYPE_CHECKING:
    from fedllm.core.tensors import Tensors
    from fedllm.recipe import Recipe
    from fedllm.tasks.learner import TransformerLearner

WRITES = ("causal-lm", "seq2seq")
"""Tasks whose model writes text."""


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    panel = "Use a run"
    app.command("report", rich_help_panel=panel)(report_run)
    app.command("chat", rich_help_panel=panel)(chat)
    app.command("export", rich_help_panel=panel)(export_run)


def report_run(run_folder: RunFolderArgument, as_json: Json = False) -> None:
    """Write a run's report.html again and name it."""
    with screen.loading("Writing the report"):
        from fedllm.engine.folder import RunFolder
        from fedllm.report.page import write_report

        page = write_report(RunFolder.open(run_folder).path)
    if as_json:
        screen.emit({"report": str(page)})
    else:
        screen.say(f"Report: {page}")


def chat(
    run_folder: RunFolderArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this one and leave.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Answer so many held-out rows of the run's data.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn at a temperature above 0.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the recipe's template.")
    ] = False,
    as_json: Json = False,
) -> None:
    r"""Ask the base model and the federated one side by side.

    Prompts are read line by line, from the keyboard or a pipe: a text (with \n for a line break), or a row as JSON.
    """
    with screen.loading("Loading the model"):
        learner, params = load_run(run_folder)
        rows = _held_out(run_folder, examples) if examples else None
    if rows is None:
        rows = iter([{"instruction": prompt}]) if prompt is not None else _lines()
    found = []
    for number, row in enumerate(rows):
        text = _prompt(learner, row, raw)
        answers = both(learner, params, text, max_tokens, temperature, seed + number)
        asked = row.get("instruction") or row.get("text") or text
        found.append({"prompt": asked, "text": text, **answers, "expected": row.get("response")})
        if not as_json:
            show_answers(found[-1])
    if as_json:
        screen.emit(found)


def export_run(
    run_folder: RunFolderArgument,
    to: Annotated[Path, typer.Option("--to", help="A new folder.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Base model and adapter as one ordinary model.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's adapter, or the whole model, in the form that peft and transformers load."""
    from fedllm.core.errors import RunError

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists already.", "The folder must be new or empty.", action="Choose another with --to.")
    with screen.loading("Exporting"):
        from fedllm.models.adapters.export import save_adapter, save_merged

        learner, params = load_run(run_folder)
        (save_merged if merged else save_adapter)(to, learner.adapted, params)
    files = sorted(str(file.relative_to(to)) for file in to.rglob("*") if file.is_file())
    if as_json:
        screen.emit({"folder": str(to), "merged": merged, "files": files})
        return
    screen.say(f"{'Model' if merged else 'Adapter'}: {to}")
    for file in files:
        screen.say(f"  {file}", "dim")


def load_run(run_folder: Path) -> tuple[TransformerLearner, Tensors]:
    """The base model of a run with its adapter's structure, and the trained tensors.

    Raises:
        RunError: there is no run, it has no adapter yet, or its base model is another one now.
    """
    from fedllm.core.errors import RunError
    from fedllm.engine.folder import RunFolder
    from fedllm.models.adapters.export import load_adapter
    from fedllm.recipe import load_recipe
    from fedllm.run import build_learner

    place = RunFolder.open(run_folder)
    if not (place.path / "adapter").is_dir():
        raise RunError(
            f"{run_folder} holds no adapter yet: the run was not finished.",
            action=f"Go on with: fedllm resume {run_folder}",
        )
    recipe = load_recipe(place.path / "recipe.yaml")
    adapter, params = load_adapter(place.path / "adapter")
    learner = build_learner(recipe.model_copy(update={"adapter": adapter}), _labels(recipe))
    before = (place.read_json("environment.json") or {}).get("model", {}).get("fingerprint")
    if before not in (None, learner.loaded.fingerprint):
        raise RunError(
            f"The base model '{recipe.model.name}' is not the one this run was made with: its weights differ.",
            action="Restore the earlier weights; a commit as model.revision keeps a hub model the same.",
        )
    return learner, params


def _labels(recipe: Recipe) -> list[str] | None:
    """The labels of a task that has some; the data is read for them only where the recipe does not name them."""
    from fedllm.data.federation import Federation
    from fedllm.run import labels_of

    if recipe.task.kind in WRITES or recipe.task.labels is not None:
        return recipe.task.labels
    return labels_of(Federation.build(recipe.data, recipe.seed), recipe)


def both(
    learner: TransformerLearner, params: Tensors, text: str, max_tokens: int, temperature: float, seed: int
) -> dict[str, str]:
    """The answers of the base model and of the federated one."""
    stacked = {name: tensor.unsqueeze(0).to(learner.device) for name, tensor in params.items()}
    found = {}
    for name, bound in (("base", None), ("federated", stacked)):
        with learner.using(bound):
            found[name] = learner.generate([[text]], max_tokens, temperature, [seed])[0][0]
    return found


def show_answers(found: Mapping[str, Any]) -> None:
    """Two columns on a terminal, labelled lines anywhere else."""
    from rich.table import Table
    from rich.text import Text

    place = screen.console()
    if not screen.interactive(place):
        for name in ("prompt", "base", "federated", "expected"):
            if found[name] is not None:
                screen.say(f"{name}: {str(found[name]).strip()}")
        screen.say()
        sys.stdout.flush()
        return
    table = Table(expand=True)
    table.add_column("base model", ratio=1, overflow="fold")
    table.add_column("federated", ratio=1, overflow="fold")
    table.add_row(Text(found["base"].strip()), Text(found["federated"].strip()))
    if found["expected"] is not None:
        screen.say(found["prompt"].strip(), "dim")
        table.caption = f"expected: {found['expected']}"
    screen.show(table)


def _prompt(learner: TransformerLearner, row: Mapping[str, Any], raw: bool) -> str:
    """A row as the text that the model continues."""
    from fedllm.core.errors import ConfigError

    if learner.task.kind not in WRITES:
        raise ConfigError(
            f"This run's task is {learner.task.kind}, and its model writes no text.",
            f"Tasks to chat with: {', '.join(WRITES)}.",
        )
    if raw:
        return str(row.get("text") or row.get("instruction") or "")
    template = learner.task.template  # type: ignore[attr-defined]
    if template.name in ("chat", "plain"):
        return template.prompt(row)
    names = [name for _, name, _, _ in string.Formatter().parse(template.name) if name]
    given = (
        {names[0]: row["instruction"], **dict.fromkeys(names[1:], "")} if set(row) == {"instruction"} and names else {}
    )
    return template.prompt({**given, **row})


def _held_out(run_folder: Path, count: int) -> Iterator[Mapping[str, Any]]:
    """Held-out rows, one of each client in turn."""
    from itertools import chain, islice, zip_longest

    from fedllm.data.federation import Federation
    from fedllm.recipe import load_recipe

    recipe = load_recipe(run_folder / "recipe.yaml")
    federation = Federation.build(recipe.data, recipe.seed)
    turns = zip_longest(*(federation.rows(client, "eval") for client in federation.client_ids))
    return islice((row for row in chain.from_iterable(turns) if row is not None), count)


def _lines() -> Iterator[Mapping[str, Any]]:
    """Prompts from the keyboard or a pipe, until its end."""
    typed = sys.stdin.isatty()
    if typed:
        screen.say(r"A prompt per line (\n breaks it), or a row as JSON; Ctrl-D ends.", "dim", errors=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing for input()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            screen.say(errors=True)
            return
        if not typed and not line:
            return
        if line.strip():
            yield _row(line.strip())


def _row(line: str) -> Mapping[str, Any]:
    if line.startswith("{"):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict):
            return found
    return {"instruction": line.replace("\\n", "\n")}

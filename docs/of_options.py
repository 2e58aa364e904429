"""Of options - every option of a recipe, every command and every exit code."""

from __future__ import annotations

import inspect
from typing import Any

from docs.tables import code, table


def options_page() -> str:
    """Every option of a recipe, section after section."""
    from fedllm.cli.options import recipe_options
    from fedllm.recipe import Recipe

    sections: dict[str, list[list[str]]] = {}
    for one in recipe_options():
        section = one.name.split(".")[0] if "." in one.name else ""
        sections.setdefault(section, []).append([code(one.name), code(one.default), one.type, one.about])
    parts = [
        "# Options",
        "A recipe is a YAML file of these options; on a command line they are `KEY=VALUE` behind the recipe, the "
        "value in YAML: `fedllm run quickstart rounds=3 train.lr=1e-3 'evaluation.against=[base]'`. An unknown key is "
        "refused with the nearest one. In a terminal: `fedllm explain recipe`.",
        "The options of a method stand on [its page](methods/index.md). They are written below `method`, beside its "
        "name: `method: {name: fedprox, mu: 0.1}`, or `method.name=fedprox method.mu=0.1`.",
    ]
    head = ("option", "default", "type", "what it is")
    for section, rows in sorted(sections.items(), key=lambda pair: pair[0] != ""):
        about = "" if not section else (Recipe.model_fields[section].description or "")
        parts += [f"## {section or 'The run'}", *([about] if about else []), table(head, rows)]
    return "\n\n".join(parts)


def commands_page() -> str:
    """Every command, its arguments and options, and the exit codes."""
    import typer.main

    from fedllm.cli.main import app

    group: Any = typer.main.get_command(app)
    parts = [
        "# Commands",
        "`fedllm --help` shows them; `fedllm COMMAND --help` shows one. `--debug`, anywhere on the line, shows the "
        "trace of an error. Every command that prints a table or a result takes `--json`: one JSON document on "
        "standard output and nothing else there. `fedllm --install-completion` sets up completion for the shell.",
    ]
    for command in _leaves(group, "fedllm"):
        parts += _command_parts(*command)
    return "\n\n".join([*parts, "## Exit codes", table(("code", "meaning"), _exit_codes())])


def _leaves(group: Any, path: str) -> list[tuple[str, Any]]:
    """Commands with their full names, groups taken apart."""
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += _leaves(command, f"{path} {name}") if inner else [(f"{path} {name}", command)]
    return found


def _command_parts(path: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if type(p).__name__.endswith("Argument")]
    options = [p for p in command.params if p not in arguments and not getattr(p, "hidden", False)]
    usage = " ".join([path, "[OPTIONS]" if options else "", *(_metavar(p) for p in arguments)])
    parts = [f"## {path.removeprefix('fedllm ')}", inspect.cleandoc(command.help or ""), f"```text\n{usage}\n```"]
    if arguments:
        rows = [[code(_metavar(p)), _default(p), p.help or ""] for p in arguments]
        parts.append(table(("argument", "default", "what it is"), rows))
    if options:
        rows = [[", ".join(code(o) for o in (*p.opts, *p.secondary_opts)), _default(p), p.help or ""] for p in options]
        parts.append(table(("option", "default", "what it is"), rows))
    return parts


def _metavar(param: Any) -> str:
    name = param.metavar or param.name.upper()
    return name if param.required or name.startswith("[") else f"[{name}]"


def _default(param: Any) -> str:
    if getattr(param, "is_flag", False):
        return "yes" if param.default else "no"
    return "must be given" if param.required else code(str(param.default)) if param.default not in (None, ()) else ""


def _exit_codes() -> list[list[str]]:
    """Exit codes of errors, from their classes, and those of the command line itself."""
    from fedllm.cli.main import CRASHED, PIPE_CLOSED
    from fedllm.cli.running import INTERRUPTED
    from fedllm.core import errors

    meanings: dict[int, list[str]] = {}
    own = [
        (0, "It worked."),
        (1, "A check failed: `verify`, `doctor`, `join`, `deploy audit verify`."),
        (PIPE_CLOSED, "The reader of a pipe went away."),
        (CRASHED, "An unexpected exception; `--debug` shows it."),
        (INTERRUPTED, "Stopped by Ctrl-C."),
    ]
    for number, text in own:
        meanings.setdefault(number, []).append(text)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.FedLLMError) and kind is not errors.FedLLMError:
            meanings.setdefault(kind.exit_code, []).append(f"`{kind.__name__}`: {(kind.__doc__ or '').splitlines()[0]}")
    return [[str(number), " ".join(texts)] for number, texts in sorted(meanings.items())]

"""Main - the command `fedllm`: its commands, its global options, and what an error looks like.

Heavy libraries are imported inside the commands, so that `--help` and completion answer at once. Every mistake ends
as a few lines on stderr and an exit code; `--debug`, anywhere on the line, shows the trace instead.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedllm.cli import catalogue, dash, data, deploy, doctor, late, results, running, scaffold, screen

CRASHED = 70
"""Exit code of an unexpected exception (EX_SOFTWARE of sysexits.h)."""
PIPE_CLOSED = 1
"""Exit code where the reader of a pipe went away, as typer has it."""
_UsageError: Any = typer.BadParameter.__base__
NO_DISK = 8
"""Exit code where a disk does not take or give a file: that of a run that cannot go on."""
DISK = {
    errno.ENOSPC: ("The disk is full", "Make room, then run the command again."),
    errno.EDQUOT: ("The disk quota is used up", "Make room, then run the command again."),
    errno.EROFS: ("The disk can only be read", "Choose another folder."),
    errno.EACCES: ("Not allowed to open or write this", "Choose another folder, or have its owner allow it."),
}
"""What the system says of disks that a person can do something about, and what."""


class Commands(TyperGroup):
    """The group of all commands: lets `--debug` stand anywhere and turns exceptions into lines and exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and leave with its exit code."""
        given, debug = debug_first(list(sys.argv[1:] if args is None else args))
        try:
            code = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = PIPE_CLOSED
        except _UsageError as fault:
            code = show_usage(fault)
        except typer.Abort:
            code = 130
        except Exception as fault:
            if debug:
                traceback.print_exc()
            code = show_fault(fault, debug)
        sys.exit(code if isinstance(code, int) else 0)


def debug_first(args: list[str]) -> tuple[list[str], bool]:
    """The arguments with `--debug` moved in front, and whether it was there."""
    end = args.index("--") if "--" in args else len(args)
    if "--debug" not in args[:end]:
        return args, False
    return ["--debug", *(arg for number, arg in enumerate(args) if arg != "--debug" or number > end)], True


def show_usage(fault: Any) -> int:
    """Print what is wrong with the command line, with the nearest choice; returns the exit code."""
    if type(fault).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return fault.exit_code
    rest, option = [], getattr(fault, "option_name", None)
    if option is not None and type(fault).__name__ == "NoSuchOption":
        first, near = f"No such option: {option}.", _near_option(fault, option)
        rest += [f"Did you mean '{near}'?"] if near else []
        if "." in option or "=" in option:
            rest.append(f"Options of a recipe have no dashes: {option.lstrip('-').partition('=')[0]}=VALUE.")
    else:
        first = fault.format_message()
    if fault.ctx is not None:
        rest.append(f"Run '{fault.ctx.command_path} --help' to see what there is.")
    screen.fail(first, rest)
    return fault.exit_code


def _near_option(fault: Any, option: str) -> str | None:
    from difflib import get_close_matches

    params = fault.ctx.command.params if fault.ctx is not None else []
    names = [name for param in params for name in param.opts if name.startswith("--")]
    found = get_close_matches(option.partition("=")[0], [*names, "--help", "--debug"], n=1, cutoff=0.5)
    return found[0] if found else None


def show_fault(fault: Any, debug: bool = False) -> int:
    """Print what went wrong in a few lines; returns the exit code."""
    errors = sys.modules.get("fedllm.core.errors")
    if errors is not None and isinstance(fault, errors.FedLLMError):
        near = f"Did you mean '{fault.nearest}'?" if fault.nearest else ""
        screen.fail(fault.given, [part for part in (fault.allowed, near, fault.action) if part])
        return fault.exit_code
    if isinstance(fault, OSError) and fault.errno in DISK and (fault.filename or fault.errno != errno.EACCES):
        given, action = DISK[fault.errno]
        screen.fail(f"{given}: {fault.filename}." if fault.filename else f"{given}.", [action])
        return NO_DISK
    text = " ".join(str(fault).split())
    name = type(fault).__name__
    screen.fail(f"{name}: {text}" if text else name, [] if debug else ["Run again with --debug to see where."])
    return CRASHED


app = late.Group(
    name="fedllm",
    cls=Commands,
    help="Train, prompt and evaluate one language model together, without sharing data.",
    epilog="Begin with: fedllm run",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        screen.say(f"fedllm {version('fedllm')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error; allowed anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train, prompt and evaluate one language model together, without sharing data."""
    screen.hush(debug)
    context.obj = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for group in (running, deploy, dash, catalogue, results, data, doctor, scaffold):
    group.add_to(app)


def main() -> None:
    """The console script."""
    app()

"""Late - a command's options are read when it is asked for, and then they are all there."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fedllm.cli import late
from fedllm.cli.main import app


def commands(name: str = "greet") -> late.Group:
    group = late.Group(help="Of people.")

    @group.command(name)
    def greet(who: str, loud: Annotated[bool, typer.Option("--loud", help="In capitals.")] = False) -> None:
        """Say hello.

        And mean it.
        """
        text = f"Hello {who}"
        typer.echo(text.upper() if loud else text)

    @group.command("leave")
    def leave() -> None:
        """Go away."""
        raise typer.Exit(3)

    return group


def test_a_command_runs_with_its_arguments_and_options() -> None:
    found = CliRunner().invoke(commands(), ["greet", "Ann", "--loud"])
    assert found.exit_code == 0 and found.output == "HELLO ANN\n"
    assert CliRunner().invoke(commands(), ["leave"]).exit_code == 3
    wrong = CliRunner().invoke(commands(), ["greet", "Ann", "--lowd"])
    assert wrong.exit_code == 2 and "--lowd" in wrong.output
    assert CliRunner().invoke(commands(), ["greet"]).exit_code == 2, "an argument is missing"


def test_help_of_a_command_tells_its_options() -> None:
    said = CliRunner().invoke(commands(), ["greet", "--help"]).output
    assert "And mean it." in said and "--loud" in said and "In capitals." in said


def test_help_of_a_group_reads_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: late.Late) -> None:
        raise AssertionError(f"the options of {self.name} were read")

    monkeypatch.setattr(late.Late, "_whole", property(read))
    said = CliRunner().invoke(commands(), ["--help"]).output
    assert "greet" in said and "Say hello." in said and "Go away." in said
    whole = CliRunner().invoke(app, ["--help"])
    assert whole.exit_code == 0 and "deploy" in whole.output
    with pytest.raises(AssertionError, match="of greet"):
        CliRunner().invoke(commands(), ["greet", "Ann"], catch_exceptions=False)

"""The screen writes what it is given: no part of a fingerprint, a path or a name is read as an emoji or as a style."""

from __future__ import annotations

import pytest
from rich.table import Table

from fedllm.cli import screen

ODD = "61:AB:EE:CD:0A :ok: [red]north[/red] [a] :cl:"


@pytest.mark.parametrize("errors", [False, True])
def test_texts_are_written_as_they_are(errors: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for write in (screen.say, screen.tell):
        write(ODD, errors=errors)
        assert ODD in capsys.readouterr()[errors]


def test_errors_and_warnings_too(capsys: pytest.CaptureFixture[str]) -> None:
    screen.fail(ODD, [ODD])
    screen.warn([ODD])
    assert capsys.readouterr().err.count(ODD) == 3


def test_cells_of_tables_too(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=ODD, caption=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    screen.show(table)
    assert capsys.readouterr().out.count(ODD) == 4

"""A small recipe over a file of 36 rows, and one finished run of it that the tests read."""

from __future__ import annotations

import pytest

from tests.cli.lines import Place, ok, write_recipe


@pytest.fixture(autouse=True)
def one_thread():
    """Several tests may share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are written as into a pipe, whatever the terminal of the tests is."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder)
    result = ok("run", recipe)
    (folder / "run.txt").write_text(result.stdout, encoding="utf-8")
    return Place(folder, recipe, folder / "rows.jsonl", folder / "runs" / "tiny")

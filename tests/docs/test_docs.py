"""The docs say what is: names are documented, examples run, commands parse, links resolve, numbers are captured."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml

import fedllm
from benchmarks.__main__ import QUESTIONS
from docs.capture import CAPTURES, clean, markdown
from docs.markers import DOCS, OUTPUT, ROOT, fill, marked_pages, names, slug
from docs.tables import cell
from fedllm.cli import catalogue
from fedllm.cli.main import app
from fedllm.cli.options import recipe_options
from fedllm.cli.running import split_recipe
from fedllm.core.errors import ConfigError
from fedllm.effects import Evidence, checks
from fedllm.methods import methods
from fedllm.protocols import protocols
from fedllm.recipe import bundled, load_recipe
from fedllm.run import algorithm, method_of
from fedllm.tasks.settings import TaskKind

PAGES = marked_pages()
OUTPUTS = {*CAPTURES, "chat", *(f"bench-{name}" for name in QUESTIONS)}
PARTS = (
    "When to use it", "How to run it", "What we changed from the paper, and why", "Claimed and measured", "Options",
)  # fmt: skip
WRONG = {"fedllm run quickstart train.lrr=0.01"}
"""Commands that the docs show because they are refused."""
WRITTEN = {key for key, kind in {**methods(), **protocols()}.items() if kind.__module__.startswith("fedllm.")}
GROUP: Any = typer.main.get_command(app)


# --- every public name is documented -----------------------------------------------------------------------------


def undocumented(tree: ast.AST, place: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        if not ast.get_docstring(node):
            yield f"{place}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{place}.{node.name}")


@pytest.mark.parametrize(
    "package", ["core", "engine", "methods", "blocks", "effects", "data", "tasks", "models", "modes"]
)
def test_every_public_name_is_documented(package: str) -> None:
    found = []
    for file in sorted((ROOT / "fedllm" / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found += [] if ast.get_docstring(tree) else [str(file)]
        found += undocumented(tree, file.stem)
    assert not found


def test_the_names_of_fedllm_are_documented() -> None:
    assert [name for name in fedllm.__all__ if not (getattr(fedllm, name).__doc__ or "").strip()] == []


def test_every_option_is_described() -> None:
    assert [one.name for one in recipe_options() if not one.about] == []


# --- methods -----------------------------------------------------------------------------------------------------


def test_every_method_has_a_page_on_when_to_use_it() -> None:
    assert {page.stem for page in (DOCS / "when").glob("*.md")} == WRITTEN
    assert all(len(page.read_text(encoding="utf-8").split()) > 30 for page in (DOCS / "when").glob("*.md"))


def test_a_page_per_method_with_its_fixed_parts_in_order(site: Path) -> None:
    for key in WRITTEN:
        text = (site / "docs" / "methods" / f"{key}.md").read_text(encoding="utf-8")
        places = [text.index(f"\n## {part}\n") for part in PARTS]
        assert places == sorted(places), key
        kind = algorithm(key)
        for field in set(kind.model_fields) - {"train"}:
            assert f"`method.{field}`" in text or f"`method.{field}." in text, (key, field)
        assert cell(kind.card.travels) in text and all(f"`{name}`" in text for name in kind.private)
    assert {page.stem for page in (site / "docs" / "methods").glob("*.md")} == WRITTEN | {"index"}


def test_the_map_and_the_matrix_list_every_method(site: Path) -> None:
    for name in ("map.md", "matrix.md", "methods/index.md"):
        text = (site / "docs" / name).read_text(encoding="utf-8")
        assert all(f"[{key}](" in text for key in WRITTEN), name


def test_the_matrix_agrees_with_what_a_run_refuses(site: Path) -> None:
    text = (site / "docs" / "matrix.md").read_text(encoding="utf-8")
    lines = [[one.strip() for one in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = lines[0]
    for line in lines[2 : 2 + len(WRITTEN)]:
        key = re.match(r"\[([\w-]+)\]", line[0]).group(1)  # type: ignore[union-attr]
        for column in head[1 : head.index("linear")]:
            where = "task.kind" if column in get_args(TaskKind) else "adapter.kind"
            works = algorithm(key).card.models
            given = [] if "any" in works or where == "task.kind" else [f"task.kind={works[0]}"]
            if where == "task.kind" and algorithm(key).adapters:
                given = [f"adapter.kind={algorithm(key).adapters[0]}"]
            needs = getattr(algorithm(key), "needs", {})
            recipe = load_recipe({"method": {"name": key, **needs}}, [*given, f"{where}={column}"])
            try:
                method_of(recipe)
            except ConfigError:
                assert line[head.index(column)] == "–", (key, column)
            else:
                assert line[head.index(column)] == "yes", (key, column)


def test_options_and_commands_are_complete(site: Path) -> None:
    options = (site / "docs" / "options.md").read_text(encoding="utf-8")
    assert [one.name for one in recipe_options() if f"| `{one.name}` |" not in options] == []
    commands = (site / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in GROUP.commands if f"\n## {name}" not in commands] == []


@pytest.mark.slow
def test_building_twice_gives_the_same_pages(site: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from docs.build import build; build(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    again = {page.relative_to(tmp_path): page.read_bytes() for page in tmp_path.rglob("*.md")}
    assert len(again) > 40
    assert again == {name: (site / "docs" / name).read_bytes() for name in again}


# --- examples ----------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


EXAMPLES = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), EXAMPLES, ids=lambda value: getattr(value, "stem", value))
def test_python_examples_run(
    page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every example as it stands, on a toy model and with little of everything."""
    import torch

    from fedllm.core import registry

    small = ["rounds=1", "train.steps=1", "train.batch_size=2", "model.name=toy:llama", "adapter.targets=auto"]
    run, compare = fedllm.run, fedllm.compare

    def fewer(recipe: Any) -> list[str]:
        return [*small, *(["data.documents=2", "data.held_out=1"] if recipe == "quickstart" else [])]

    def quick(recipe: Any, overrides: Any = (), **rest: Any) -> Any:
        return run(recipe, [*overrides, *fewer(recipe)], **rest)

    def quick_compare(recipe: Any, keys: Any, seeds: int = 1, overrides: Any = (), **rest: Any) -> Any:
        return compare(recipe, keys, seeds, [*overrides, *fewer(recipe)], **rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fedllm, "run", quick)
    monkeypatch.setattr(fedllm, "compare", quick_compare)
    monkeypatch.setattr(fedllm, "verify", lambda key: Evidence(key, "", f"{checks().index(key)}", None))
    monkeypatch.setitem(registry._FOUND, "method", dict(registry._FOUND["method"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile(blocks(page, "python")[number], page.name, "exec"), {"__name__": "docs_example"})
    finally:
        torch.set_num_threads(threads)


def test_the_readme_has_an_example_and_a_recipe() -> None:
    readme = ROOT / "README.md"
    assert blocks(readme, "python") and load_recipe(yaml.safe_load(blocks(readme, "yaml")[0])).data.path == "mine.jsonl"


def test_every_recipe_that_is_shown_can_be_read() -> None:
    shown = [block for page in PAGES for block in blocks(page, "yaml")]
    assert shown
    for block in shown:
        method_of(load_recipe(yaml.safe_load(block)))


# --- commands ----------------------------------------------------------------------------------------------------


def quoted(page: Path) -> Iterator[str]:
    """Commands in blocks and in running text; a line of several commands is one each."""
    text = re.sub(r"<!-- begin:output.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in blocks(page, "sh"):
        yield from (line for line in block.splitlines() if line.startswith("fedllm "))
    yield from re.findall(r"(?<!`)`(fedllm [^`\n]+)`", text)


def commands(pages: list[Path]) -> list[str]:
    found = dict.fromkeys(command.split(" #")[0].strip() for page in pages for command in quoted(page))
    return [one for one in found if "COMMAND" not in one and "..." not in one]


def parse(command: str) -> tuple[str, dict[str, Any]]:
    """The path and the parameters of a command line, as typer reads it; raises its usage errors."""
    given, node, path = shlex.split(command)[1:], GROUP, []
    while getattr(node, "commands", None) and given and given[0] in node.commands:
        node = node.commands[given[0]]
        path.append(given.pop(0))
    assert path or given[0].startswith("--"), f"{command}: no such command"
    if not path:
        known = {
            option for param in GROUP.get_params(GROUP.make_context("fedllm", ["methods"])) for option in param.opts
        }
        assert given[0] in {*known, "--install-completion"}, command
        return "", {}
    given = [one for one in given if one not in ("--help", "--debug")]
    return " ".join(path), dict(node.make_context(path[-1], given).params)


def recipe_of(name: str, folder: Path) -> Any:
    """A recipe that a command names: bundled, of the checkout, or the one that the README shows."""
    if name in bundled():
        return name
    if (ROOT / name).is_file():
        return ROOT / name
    if name.endswith(".yaml"):
        return yaml.safe_load(blocks(ROOT / "README.md", "yaml")[0])
    return None


def check(command: str, folder: Path) -> None:
    path, given = parse(command)
    if path in ("run", "compare", "doctor", "data stats") and (named := given.get("recipe") or given.get("source")):
        name, overrides = split_recipe(named, given.get("overrides"))
        recipe = recipe_of(name, folder)
        if recipe is not None:
            settled = load_recipe(recipe, overrides)
            listed = (given.get("methods") or "").split(",")
            for key in [None, *(one for one in listed if one and one != "base")]:
                method_of(settled, key)
    if path == "explain" and given["key"].islower():
        place = given["key"].removeprefix("recipe").removeprefix(".") if given["key"].startswith("recipe") else None
        catalogue.method_facts(given["key"]) if place is None else catalogue.place_facts(place, recipe_options())
    if path == "verify" and given["key"] and given["key"].islower() and given["key"] not in WRITTEN - set(checks()):
        assert given["key"] in checks(), command


@pytest.mark.parametrize("command", commands(PAGES))
def test_every_command_quoted_can_be_typed(command: str, tmp_path: Path) -> None:
    if command in WRONG:
        with pytest.raises(ConfigError):
            check(command, tmp_path)
    else:
        check(command, tmp_path)


def test_commands_of_generated_pages_can_be_typed(site: Path, tmp_path: Path) -> None:
    pages = [
        page for page in (site / "docs").rglob("*.md") if "reference" not in page.parts and "adr" not in page.parts
    ]
    found = [command for command in commands(pages) if command not in WRONG]
    assert len(found) > 30
    for command in found:
        check(command, tmp_path)


# --- links and texts ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(re.sub(r"[`*]", "", heading)) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_relative_links_lead_somewhere(site: Path) -> None:
    broken = []
    for page in [site / "README.md", *(site / "docs").rglob("*.md")]:
        if "output" in page.parts or "when" in page.parts:
            continue
        text = re.sub(r"`[^`\n]*`|^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = page.parent / file if file else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert not broken


def test_no_path_of_a_machine_and_nothing_left_to_do(site: Path) -> None:
    forbidden = [str(ROOT), str(Path.home()), "/home/", "/root/", "/Users/", "/tmp/", "TO" + "DO", "FIX" + "ME"]
    texts = [*site.rglob("*.md"), *DOCS.rglob("*.py"), ROOT / "mkdocs.yml", *OUTPUT.glob("*.json")]
    found = [(page.name, word) for page in texts for word in forbidden if word in page.read_text(encoding="utf-8")]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_marked_places_hold_captured_output_and_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python -m docs.build"
    assert set(names(text)) <= OUTPUTS
    assert text.count("<!-- begin:output") == text.count("<!-- end -->") == len(names(text))


def test_results_name_every_capture_and_its_command() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    headings, shown = anchors(DOCS / "results.md"), "\n".join(blocks(DOCS / "results.md", "sh"))
    for name, capture in CAPTURES.items():
        assert slug(capture.title) in headings and f"<!-- begin:output {name} -->" in text, name
        assert set(capture.commands) & set(shown.splitlines()), name
        assert set(capture.methods) <= WRITTEN, name


def test_captured_output_says_how_it_was_made() -> None:
    for file in OUTPUT.glob("*.md"):
        last = file.read_text(encoding="utf-8").strip().splitlines()[-1]
        assert re.match(r"\*Made by `(fedllm|python -m benchmarks)[ .]", last), file.name
        assert file.stem.startswith("bench-") or "python -m docs.capture" in last, file.name


def test_the_site_reads_no_other_host() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert "http" not in (DOCS / "site.css").read_text(encoding="utf-8")


# --- the tools ---------------------------------------------------------------------------------------------------


def test_control_codes_are_stripped() -> None:
    assert clean("\x1b[1mbold\x1b[0m  \r\nold\rnew\n\x1b]0;title\x07end\x1b[2K\n\n") == "bold\nnew\nend"


def test_filling_is_repeatable_and_an_absent_output_says_so(tmp_path: Path) -> None:
    text = "a\n<!-- begin:output x -->\nold\n<!-- end -->\nb\n"
    assert "Not measured yet" in fill(text, tmp_path)
    (tmp_path / "x.md").write_text("| 1 |\n")
    once = fill(text, tmp_path)
    assert once == "a\n<!-- begin:output x -->\n\n| 1 |\n\n<!-- end -->\nb\n" == fill(once, tmp_path)


def test_cells_cannot_break_a_table() -> None:
    assert cell("a | b\nc < d * e `f*g`") == "a \\| b c &lt; d \\* e `f*g`"


def test_a_rich_table_as_markdown() -> None:
    from rich.table import Table

    shown = Table("model", "loss")
    shown.add_row("base", "1.0")
    assert markdown(shown) == "| model | loss |\n| --- | --- |\n| base | 1.0 |"

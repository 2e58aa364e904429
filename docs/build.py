"""Build - the pages that are made from the code: python -m docs.build, from the root of the checkout.

The map, a page per method, every option, every command, what fits together, and the reference. None of them is
edited or committed. Nothing is trained; one step of each toy model is made to find out what works.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.capture import CAPTURES, VERDICTS
from docs.markers import DOCS, OUTPUT, ROOT, refresh, slug
from docs.roles import plain

MADE = "<!-- Made by `python -m docs.build`: change the code, not this page. -->\n\n"
SLOTS = ("trainable", "init", "cohort", "distribute", "work", "reducer", "expected", "finalize", "evaluate")
"""What a method may override, in the order of a round."""
HIDDEN = ("fedllm.cli",)
"""Packages that the reference leaves out: the commands have a page of their own."""
YES, NO = "yes", "–"


def build(into: Path = DOCS, output: Path = OUTPUT, when: Path = DOCS / "when") -> list[Path]:
    """Write all generated pages into a folder; returns them, sorted.

    Args:
        into: the folder of the pages.
        output: captured output.
        when: the hand-written part of each method's page.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    evidence = _evidence(output)
    kinds = _kinds()
    pages = {
        "map.md": map_page(kinds, evidence),
        "options.md": options_page(),
        "commands.md": commands_page(),
        "matrix.md": matrix_page(kinds),
        "methods/index.md": methods_page(kinds, evidence),
        **{f"methods/{key}.md": method_page(kind, evidence, when) for key, kind in kinds.items()},
        **reference_pages(),
    }
    written = []
    for name, text in sorted(pages.items()):
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(MADE + text.strip("\n") + "\n", encoding="utf-8")
        written.append(place)
    _remove_stale(into, written)
    return written


def _kinds() -> dict[str, Any]:
    """Every method and protocol of the package by key; plug-ins of this machine are left out."""
    from fedllm.methods import methods
    from fedllm.protocols import protocols

    found = {**methods(), **protocols()}
    return {key: kind for key, kind in sorted(found.items()) if kind.__module__.startswith("fedllm.")}


def _evidence(output: Path) -> dict[str, dict[str, Any]]:
    """What `fedllm verify --all --json` measured, by method; empty where it was not captured yet."""
    file = output / "verify.json"
    return {one["key"]: one for one in json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}


def _remove_stale(into: Path, written: Sequence[Path]) -> None:
    """Remove generated pages of methods and modules that are gone."""
    for folder in ("methods", "reference"):
        for page in (into / folder).glob("**/*.md"):
            if page not in written and page.read_text(encoding="utf-8").startswith(MADE[:20]):
                page.unlink()


# --- Markdown ----------------------------------------------------------------------------------------------------


def cell(text: Any) -> str:
    """A text for a cell of a table."""
    flat = " ".join(plain(str(text)).split())
    parts = flat.split("`")
    for number in range(0, len(parts), 2):  # outside of code
        parts[number] = parts[number].replace("*", "\\*").replace("<", "&lt;")
    return "`".join(parts).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(one) for one in row)} |" for row in rows)])


def code(text: str) -> str:
    """A text as code; "" stays empty."""
    return f"`{text}`" if text else ""


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring behind its title line."""
    body = plain(inspect.cleandoc(text)).partition("\n")[2].strip("\n")
    return [part for part in body.split("\n\n") if part.strip()]


# --- methods -----------------------------------------------------------------------------------------------------


def map_page(kinds: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """The survey's map by topic."""
    from fedllm.cli.catalogue import MEANINGS, topic
    from fedllm.core.card import TOPICS

    parts = [
        "# The map",
        "The topics are those of the survey *Federated Large Language Models: Current Progress and Future "
        "Directions*; the numbers are its sections. **What stands here is what is implemented today: "
        f"{len(kinds)} methods.** A system of the survey that is not on this page is not in fedllm yet.",
        "Status: " + "; ".join(f"*{name}* – {meaning}" for name, meaning in MEANINGS.items()) + ". The column "
        "*measured* is what `fedllm verify` found.",
    ]
    by_topic: dict[str, list[Any]] = {}
    for kind in kinds.values():
        by_topic.setdefault(topic(kind), []).append(kind)
    for name in [*TOPICS.values(), "Protocols"]:
        if name in by_topic:
            rows = [_map_row(kind, evidence) for kind in by_topic[name]]
            head = ("method", "what it is", "paper", "in the survey", "status", "measured")
            parts += [f"## {name}", table(head, rows)]
    empty = [name for name in TOPICS.values() if name not in by_topic]
    if empty:
        parts += ["## Nothing yet", "\n".join(f"- {name}" for name in empty)]
    return "\n\n".join(parts)


def _map_row(kind: Any, evidence: Mapping[str, Any]) -> list[str]:
    card = kind.card
    clause = card.title.partition(" - ")[2] or card.title
    link = f"[{kind.key}](methods/{kind.key}.md)"
    return [link, clause, card.paper, "; ".join(card.cells), card.status, _verdict(kind.key, evidence)]


def _verdict(key: str, evidence: Mapping[str, Any]) -> str:
    from fedllm.effects import checks

    if key in evidence:
        return VERDICTS[evidence[key]["passed"]]
    return "not measured yet" if key in checks() else "no check"


def methods_page(kinds: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """The list of methods."""
    rows = []
    for key, kind in kinds.items():
        linear = {True: YES, False: NO, None: ""}[_linear(kind)]
        sites = NO if kind.card.simulation_only else YES
        rows.append([f"[{key}]({key}.md)", kind.card.title.partition(" - ")[2], linear, sites, kind.card.status])
    return "\n\n".join([
        "# Methods",
        "One page per method, made from its file: what it is, when to use it, how to run it, what differs from the "
        "paper, what was claimed and what was measured. By topic they stand on [the map](../map.md); what works with "
        "what is in [the matrix](../matrix.md).",
        table(("method", "what it is", "linear", "real sites", "status"), rows),
        "*linear*: uploads may be added up in secret. *real sites*: it can run where every client is another machine.",
    ])  # fmt: skip


def method_page(kind: Any, evidence: Mapping[str, Any], when: Path) -> str:
    """A method's page: five fixed parts, then its options and facts."""
    card, key = kind.card, kind.key
    parts = [
        f"# {card.title.partition(' - ')[0]}",
        *_what(kind),
        "## When to use it",
        (when / f"{key}.md").read_text(encoding="utf-8").strip() if (when / f"{key}.md").is_file() else _unwritten(key),
        "## How to run it",
        *_how(kind),
        "## What we changed from the paper, and why",
        *_changed(kind),
        "## Claimed and measured",
        *_measured(kind, evidence),
        "## Options",
        *_options(kind),
        "## Facts",
        table(("", ""), _facts(kind)),
    ]
    return "\n\n".join(parts)


def _unwritten(key: str) -> str:
    return f"Nobody has written this part yet: it belongs in `docs/when/{key}.md`."


def _docs(kind: Any) -> list[str]:
    """The module docstrings of a method and of the shared frame it is built on, without their deviations."""
    from fedllm.core.method import Method

    found = []
    for base in kind.__mro__:
        inside = base.__module__.startswith(("fedllm.methods.", "fedllm.protocols.", "fedllm.blocks."))
        if inside and base is not Method:
            doc = inspect.getdoc(inspect.getmodule(base)) or ""
            found.append(doc)
    return found


def _what(kind: Any) -> list[str]:
    first, *others = _docs(kind)
    title = first.partition("\n")[0].partition(" - ")[2]
    parts = [title[:1].upper() + title[1:]] if title else []
    parts += [one for one in paragraphs(first) if not one.startswith("Deviations:")]
    for other in others:
        parts.append(f"It is built on *{other.partition(chr(10))[0].rstrip('.')}*:")
        parts += [one for one in paragraphs(other) if not one.startswith("Deviations:")]
    paper = "" if kind.card.paper == "baseline" else f"Paper: {kind.card.paper}. "
    return [*parts, f"{paper}In the survey: {'; '.join(kind.card.cells)}."]


def _how(kind: Any) -> list[str]:
    commands = [_command(kind), f"fedllm explain {kind.key}"]
    captured = [one.title for one in CAPTURES.values() if kind.key in one.methods]
    where = [f"[{title}](../results.md#{slug(title)})" for title in captured]
    told = "It prints a table of results and writes a [run folder](../guides/runs.md)."
    told += f" Output that was really measured with it: {', '.join(where)}." if where else ""
    return ["```sh\n" + "\n".join(commands) + "\n```", told]


def _command(kind: Any) -> str:
    """How to run a method on the quickstart: what the recipe would set against the method's own training is given."""
    from fedllm.cli.options import as_yaml, changed
    from fedllm.recipe import load_recipe

    train = kind.model_fields.get("train")
    own = changed(train.default) if train is not None else {}
    given = [f"train.{n}={as_yaml(v)}" for n, v in sorted(own.items()) if n in load_recipe("quickstart").train]
    return " ".join(["fedllm run quickstart", f"method.name={kind.key}", *given])


def _changed(kind: Any) -> list[str]:
    found = [one.removeprefix("Deviations:").strip() for doc in _docs(kind) for one in paragraphs(doc) if one.startswith("Deviations:")]
    if found:
        return [text[:1].upper() + text[1:] for text in found]
    if kind.card.paper == "baseline":
        return ["There is no paper: it is what methods are compared with."]
    return [f"No deviation is written down in `{_file(kind)}`."]


def _measured(kind: Any, evidence: Mapping[str, Any]) -> list[str]:
    from fedllm.effects import checks

    claim, one = kind.card.claim, evidence.get(kind.key)
    if kind.key not in checks():
        return [f"Its card says: {claim}", "There is no effect check for it, so `fedllm verify` measures nothing."]
    made = f"`fedllm verify {kind.key}` measures it; the check is `fedllm/effects/{kind.key.replace('-', '_')}.py`."
    if one is None:
        return [f"Claimed: {claim}", f"Measured: not measured yet. {made}"]
    rows = [[one["claim"], one["measured"], VERDICTS[one["passed"]]]]
    numbers = [[name, f"{value:.6g}"] for name, value in one["numbers"].items()]
    return [table(("claimed", "measured", "verdict"), rows), table(("number", "value"), numbers) if numbers else "", made]


def _options(kind: Any) -> list[str]:
    from fedllm.cli.options import as_yaml, changed, options

    rows = [[code(o.name), code(o.default), o.type, o.about] for o in options(kind, "method.", skip=("train",))]
    train = kind.model_fields.get("train")
    given = sorted(changed(train.default).items()) if train is not None else []
    own = ", ".join(f"`train.{n}: {as_yaml(v)}`" for n, v in given)
    told = "Local training has the options of [train](../options.md#train)"
    told += f"; this method begins from {own}." if own else "."
    return [table(("option", "default", "type", "what it is"), rows) if rows else "It has none of its own.", told]


def _facts(kind: Any) -> list[list[str]]:
    linear = {True: "yes: uploads may be added up in secret", False: "no: the server sees each upload"}
    models = "any" if "any" in kind.card.models else ", ".join(kind.card.models)
    rows = [
        ["what travels", kind.card.travels],
        ["slots overridden", ", ".join(_slots(kind)) or "none"],
        ["functions at the client", ", ".join(code(name) for name in sorted(kind.client_functions()))],
        ["linear", linear.get(_linear(kind), "a protocol: it has no reducer")],
        ["stays private", ", ".join(code(name) for name in kind.private) or "nothing is kept between rounds"],
        ["tasks", models],
        ["adapters", ", ".join(getattr(kind, "adapters", ())) or "any"],
        ["real sites", f"no: {kind.card.simulation_only}" if kind.card.simulation_only else "yes"],
        ["status", kind.card.status],
        ["file", code(_file(kind))],
    ]
    return rows


def _slots(kind: Any) -> list[str]:
    """The slots that a class or a frame it is built on defines anew, in the order of a round."""
    from fedllm.core.method import Method

    found = []
    for slot in SLOTS if issubclass(kind, Method) else ("play",):
        owner = next(base for base in kind.__mro__ if slot in base.__dict__)
        if owner is not Method:
            found.append(code(slot) if owner is kind else f"`{slot}` (in {owner.__name__})")
    return found


def _linear(kind: Any) -> bool | None:
    from fedllm.cli.catalogue import is_linear

    return is_linear(kind)


def _file(kind: Any) -> str:
    return f"{kind.__module__.replace('.', '/')}.py"


# --- options and commands ----------------------------------------------------------------------------------------


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
        "A recipe is a YAML file of these options; on a command line they are `KEY=VALUE` behind the recipe, the value "
        "in YAML: `fedllm run quickstart rounds=3 train.lr=1e-3 'evaluation.against=[base]'`. An unknown key is refused "
        "with the nearest one. In a terminal: `fedllm explain recipe`.",
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
        "`fedllm --help` shows them; `fedllm COMMAND --help` shows one. `--debug`, anywhere on the line, shows the trace "
        "of an error. Every command that prints a table or a result takes `--json`: one JSON document on standard output "
        "and nothing else there. `fedllm --install-completion` sets up completion for the shell.",
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
        parts.append(table(("argument", "default", "what it is"), [[code(_metavar(p)), _default(p), p.help or ""] for p in arguments]))
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

    meanings = {0: ["It worked."], 1: ["A check failed: `verify`, `doctor`."], INTERRUPTED: ["Stopped by Ctrl-C."]}
    meanings |= {CRASHED: ["An unexpected exception; `--debug` shows it."], PIPE_CLOSED: ["The reader of a pipe went away."]}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.FedLLMError) and kind is not errors.FedLLMError:
            meanings.setdefault(kind.exit_code, []).append(f"`{kind.__name__}`: {(kind.__doc__ or '').splitlines()[0]}")
    return [[str(number), " ".join(texts)] for number, texts in sorted(meanings.items())]


# --- what fits together ------------------------------------------------------------------------------------------


def matrix_page(kinds: Mapping[str, Any]) -> str:
    """Method by task and adapter, and adapter by task and model family."""
    from docs.capability import ADAPTERS, TASKS, try_all

    methods = [[f"[{key}](methods/{key}.md)", *_method_row(kind, TASKS, ADAPTERS)] for key, kind in kinds.items()]
    tried = list(try_all())
    notes: list[str] = []
    rows = []
    for task, family in dict.fromkeys((one.task, one.family) for one in tried):
        found = [one for one in tried if (one.task, one.family) == (task, family)]
        rows.append([task, family, *(_mark(one, notes) for one in found)])
    return "\n\n".join([
        "# What works with what",
        "A combination that is not allowed is refused before anything is trained, with the reason and the nearest "
        "choice. These tables are made by asking the code.",
        "## Method by task and adapter",
        table(("method", *TASKS, *ADAPTERS, "linear", "real sites"), methods),
        f"{YES}: allowed; {NO}: refused. *linear*: its uploads may be added up in secret.",
        "## Adapter by task and model family",
        "Tried while this page was made: one training step of a tiny random model of each family. A number leads to the "
        "reason below.",
        table(("task", "family", *ADAPTERS), rows),
        "\n".join(f"{number}. {cell(text)}" for number, text in enumerate(notes, 1)),
        "The families stand for their kind of architecture: `llama`, `qwen`, `gpt2` are decoders, `bert` is an encoder, "
        "`t5` is both. Of other models fedllm looks at the structure, not at the name.",
    ])  # fmt: skip


def _method_row(kind: Any, tasks: Sequence[str], adapters: Sequence[str]) -> list[str]:
    needs = getattr(kind, "adapters", ())
    models = kind.card.models
    cells = [YES if "any" in models or task in models else NO for task in tasks]
    cells += [YES if not needs or adapter in needs else NO for adapter in adapters]
    return [*cells, {True: YES, False: NO, None: ""}[_linear(kind)], NO if kind.card.simulation_only else YES]


def _mark(one: Any, notes: list[str]) -> str:
    """yes, or the number of the reason."""
    if one.verdict == "works":
        return YES
    reason = re.sub(r"toy:\w+( \(\w+\))?", "the model", one.reason)
    reason = f"Broken, not refused: {reason}" if one.verdict == "broken" else reason[:1].upper() + reason[1:]
    if reason not in notes:
        notes.append(reason)
    number = notes.index(reason) + 1
    return f"{'broken' if one.verdict == 'broken' else NO} ({number})"


# --- reference ---------------------------------------------------------------------------------------------------


def reference_pages() -> dict[str, str]:
    """A page per public module, and a list of them beginning with the public names."""
    import fedllm

    modules = _modules()
    names = [[code(f"fedllm.{name}"), _home(name, modules), _first_line(getattr(fedllm, name))] for name in fedllm.__all__]
    parts = [
        "# Reference",
        f"The public names, {len(names)} of them; everything else may change.",
        table(("name", "where", "what it is"), names),
        "## Modules",
        table(("module", "what it is"), [[f"[{name}]({name}.md)", about] for name, (about, _) in modules.items()]),
    ]
    pages = {"reference/index.md": "\n\n".join(parts)}
    for name in modules:
        pages[f"reference/{name}.md"] = f"# {name}\n\n::: {name}"
    return pages


def _modules() -> dict[str, tuple[str, Path]]:
    """Public modules that define something, with their title line; read, not imported."""
    found = {}
    for file in sorted((ROOT / "fedllm").rglob("*.py")):
        place = file.relative_to(ROOT).with_suffix("")
        parts = place.parts[:-1] if place.name == "__init__" else place.parts
        name = ".".join(parts)
        if name == "fedllm" or any(part.startswith("_") for part in parts) or name.startswith(HIDDEN):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") for node in tree.body):
            title = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[name] = (title.partition(" - ")[2] or title, file)
    return found


def _home(name: str, modules: Mapping[str, Any]) -> str:
    import fedllm

    module = getattr(fedllm, name).__module__
    return f"[{module}]({module}.md)" if module in modules else code(module)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def main() -> None:
    """Build, fill the marked places, and tell."""
    begun = time.perf_counter()
    written = build()
    changed = refresh()
    sys.stdout.write(f"Wrote {len(written)} pages in {time.perf_counter() - begun:.1f} s.\n")
    for page in changed:
        sys.stdout.write(f"Filled {page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()

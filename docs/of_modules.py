"""Of modules - the reference: the public names, and a page per public module that mkdocstrings fills."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from docs.markers import ROOT
from docs.tables import code, table

HIDDEN = ("fedllm.cli", "fedllm.methods.", "fedllm.effects.")
"""What is left out: commands and methods have pages of their own, and a check is one function."""
SHOWN = ("fedllm.effects.rig",)
"""Exceptions to what is left out."""


def reference_pages() -> dict[str, str]:
    """A page per public module, and a list of them beginning with the public names."""
    import fedllm

    modules = public_modules()
    public = {name: getattr(fedllm, name) for name in fedllm.__all__}
    names = [[code(f"fedllm.{name}"), _home(one, modules), _first_line(one)] for name, one in public.items()]
    parts = [
        "# Reference",
        f"The public names, {len(names)} of them; everything else may change.",
        table(("name", "where", "what it is"), names),
        "## Modules",
        table(("module", "what it is"), [[f"[{name}]({name}.md)", about] for name, about in modules.items()]),
    ]
    pages = {"reference/index.md": "\n\n".join(parts)}
    return pages | {f"reference/{name}.md": f"# {name}\n\n::: {name}" for name in modules}


def public_modules() -> dict[str, str]:
    """Modules that define something public, with their title line; read, not imported."""
    found = {}
    for file in sorted((ROOT / "fedllm").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        hidden = name == "fedllm" or "._" in name or (name.startswith(HIDDEN) and name not in SHOWN)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if not hidden and any(_is_public(node) for node in tree.body):
            title = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[name] = title.partition(" - ")[2] or title
    return found


def _is_public(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")


def _home(thing: Any, modules: Mapping[str, str]) -> str:
    module = thing.__module__
    return f"[{module}]({module}.md)" if module in modules else code(module)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]

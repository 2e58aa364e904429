"""Roles - docstrings name classes as :class:`fedllm.Method`; on a page that is code: `Method`."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):`~?([^`]+)`")


def plain(text: str) -> str:
    """`text` without roles: the last part of each name, as code."""
    return _ROLE.sub(lambda found: f"`{found.group(1).rsplit('.', 1)[-1]}`", text)


def on_a_page(text: str) -> str:
    """A docstring for mkdocs: roles as code, and `[a][b]` outside of code as text, not as a link."""
    parts = plain(text).split("`")
    parts[::2] = [part.replace("][", "]\\[") for part in parts[::2]]
    return "`".join(parts)


try:
    import griffe
except ImportError:  # only mkdocs needs it; the pages that docs.build writes do not
    pass
else:

    class Roles(griffe.Extension):
        """Rewrites the docstrings that mkdocstrings shows."""

        def on_instance(self, *, obj: Any, **_: Any) -> None:
            """Called for every module, class, function and attribute."""
            if obj.docstring is not None:
                obj.docstring.value = on_a_page(obj.docstring.value)

"""Roles - docstrings name classes as :class:`fedllm.Method`; on a page that is code: `Method`."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):`~?([^`]+)`")


def plain(text: str) -> str:
    """`text` without roles: the last part of each name, as code."""
    return _ROLE.sub(lambda found: f"`{found.group(1).rsplit('.', 1)[-1]}`", text)


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
                obj.docstring.value = plain(obj.docstring.value)

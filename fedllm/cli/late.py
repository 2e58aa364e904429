"""Late - commands whose options are read when they are asked for: there are many, and reading each takes a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import typer
from typer.core import TyperCommand

Function = Callable[..., Any]


class Group(typer.Typer):
    """Commands that are known by name and help at first; the rest follows for the one that runs."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """Add a function as a command; see :meth:`typer.Typer.command`."""

        def add(function: Function) -> Function:
            def early() -> None: ...

            early.__name__, early.__doc__, early.__dict__["function"] = function.__name__, function.__doc__, function
            typer.Typer.command(self, name, cls=Late, **options)(early)
            return function

        return add


class Late(TyperCommand):
    """A command of a :class:`Group`."""

    def __init__(self, name: str | None, *, callback: Any, params: Any = None, **options: Any) -> None:
        self._function = callback.function
        super().__init__(name, **options)

    @cached_property
    def _whole(self) -> Any:
        """The command as typer makes it of its function."""
        alone = typer.Typer(add_completion=False)
        alone.command(self.name)(self._function)
        return typer.main.get_command(alone)

    @property
    def params(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its options and arguments."""
        return self._whole.params

    @params.setter
    def params(self, none: list[Any]) -> None: ...  # typer has none to give

    @property
    def callback(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is called with them."""
        return self._whole.callback

    @callback.setter
    def callback(self, none: Any) -> None: ...

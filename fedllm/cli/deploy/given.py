"""Given - options and arguments that several commands across sites share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Network = Annotated[Path, typer.Option("--folder", help="Where kits and the authority's key lie.")]
"""The folder of a network."""
NET = Path("network")
"""Its default."""
KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="A participant's kit.", show_default=False)]
"""A kit that a command is about."""
KitOption = Annotated[Path, typer.Option("--kit", help="A coordinator's kit.", show_default=False)]
"""The kit with which a command reaches the server."""
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id.", show_default=False)]
"""A run."""
Unit = Annotated[
    Path | None, typer.Option(help="Write a systemd unit into this file, and start nothing.", show_default=False)
]
"""Where a unit is written, if one is wanted."""
Follow = Annotated[bool, typer.Option(help="Stay until the run is over, and fetch what it found.")]
"""Whether a command stays with its run."""

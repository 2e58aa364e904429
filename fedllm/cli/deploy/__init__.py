"""Deploy - a run across sites: `deploy provision`, `start`, `run`, ... for those who hold it, `join` for a site.

One file for each room: `network` makes kits, `keys` certificates, `process` runs a server's or a site's process, `join`
looks at a site before it starts, `runs` and `following` are a coordinator's, `audit` reads logs.
"""

from __future__ import annotations

import typer

from fedllm.cli.deploy import audit, join, keys, network, process, runs
from fedllm.cli.late import Group

PANEL = "Across sites"
"""The commands' panel in the help."""


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    group = Group(help="A run across sites: kits, server, runs, logs.", no_args_is_help=True)
    group.command("provision")(network.provision)
    group.command("add-site")(network.add_site)
    group.command("request")(keys.request)
    group.command("sign")(keys.sign)
    group.command("install")(keys.install)
    group.command("renew")(keys.renew)
    group.command("start")(process.start_server)
    group.command("run")(runs.run_recipe)
    group.command("status")(runs.status)
    group.command("log")(runs.log)
    group.command("stop")(runs.stop)
    group.command("resume")(runs.resume)
    group.command("fetch")(runs.fetch)
    group.command("revoke")(runs.revoke)
    logs = Group(help="Audit logs of server and sites.", no_args_is_help=True)
    logs.command("verify")(audit.verify)
    logs.callback()(_logs)
    group.add_typer(logs, name="audit")
    app.add_typer(group, name="deploy", rich_help_panel=PANEL)
    app.command("join", rich_help_panel=PANEL)(join.join)


def _logs() -> None:
    """Audit logs of server and sites."""

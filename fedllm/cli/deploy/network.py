"""Network - `deploy provision` and `deploy add-site`: make the kits of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.deploy.given import NET, Network
from fedllm.cli.running import Json

if TYPE_CHECKING:
    from fedllm.deploy.network import NetworkFile

File = Annotated[Path, typer.Argument(metavar="SITES.YAML", help="Who takes part.", show_default=False)]


def provision(file: File, folder: Network = NET, as_json: Json = False) -> None:
    """Make a kit for every participant in a file. Again with more sites: the new ones get kits, the others stay."""
    with screen.loading("Making kits"):
        from fedllm.deploy.network import NetworkFile

        network = NetworkFile.of(file)
    _provision(network, folder, as_json)


def add_site(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Its name.", show_default=False)],
    organisation: Annotated[str, typer.Option(help="Whose it is.", show_default=False)],
    own_key: Annotated[bool, typer.Option("--own-key", help="The site makes its own private key.")] = False,
    folder: Network = NET,
    as_json: Json = False,
) -> None:
    """Add one more site; what was handed out before stays good, and the server may run on."""
    with screen.loading("Making kits"):
        from fedllm.deploy.authority import Authority

        network = Authority.of(folder).network.with_site(site, organisation, "own" if own_key else "made")
    _provision(network, folder, as_json)
    if not as_json:
        rest = ", key: own" if own_key else ""
        screen.say(f"Add '{site}: {{organisation: {organisation}{rest}}}' to your sites.yaml, too.", "dim")


def _provision(network: NetworkFile, folder: Path, as_json: bool) -> None:
    with screen.loading("Making kits"):
        from fedllm.deploy import network as networks
        from fedllm.deploy.authority import Authority

        done = networks.provision(network, folder)
        authority = Authority.of(folder)
        waiting, fingerprint = authority.waiting(), authority.fingerprint
    who = network.participants()
    if as_json:
        rows = [
            {"name": name, **who[name], "kit": str(place.resolve()), "new": name in done.made}
            for name, place in {**done.made, **done.kept}.items()
        ]
        told = {"network": network.name, "folder": str(folder), "kits": rows, "left_out": done.left_out}
        screen.emit({**told, "own": done.own, "waiting": waiting, "authority": fingerprint})
        return
    if not done.made:
        screen.say("Every participant whose key is made here has a kit already; nothing was changed.")
    else:
        screen.say(f"New kits of {network.name}; each goes to one place, over a channel that you trust:")
        screen.show(_kit_table(who, done.made))
    if done.made and done.kept:
        screen.say(f"As they were: {', '.join(done.kept)}.")
    for name in done.left_out:
        screen.warn([f"{name} is not in the file any more; its certificate stays good until it is revoked."])
    for name in waiting:
        screen.say()
        screen.say(f"{name} keeps its own key. It makes that and a request, which you sign when you have it:")
        screen.say(f"  fedllm deploy request {name} --organisation {who[name]['organisation']} --folder KIT")
        screen.say(f"  fedllm deploy sign {name}.csr --folder {folder}")
    screen.say()
    if done.own:
        screen.say(f"Fingerprint of the authority: {fingerprint}")
    screen.tell(
        f"A kit holds a private key. {folder / networks.AUTHORITY} holds copies of all that are made here and the key "
        "that signs new certificates: keep it off the server, and where you alone can read it."
    )


def _kit_table(who: Mapping[str, Mapping[str, str]], made: Mapping[str, Path]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("kit", "to", "there"):
        table.add_column(column, header_style="dim", overflow="fold")
    words = {
        "server": ("the server's operator", "fedllm deploy start KIT"),
        "coordinator": ("this person", "fedllm deploy run RECIPE --kit KIT"),
        "site": ("the site", "fedllm join KIT --data FILE"),
    }
    for name, place in made.items():
        kind, facts = words[who[name]["kind"]], who[name]
        role = f", {facts['role']}" if "role" in facts else ""
        table.add_row(str(place), f"{kind[0]}: {name} ({facts['organisation']}{role})", kind[1])
    return table

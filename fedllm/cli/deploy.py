"""Deploy - a run across sites: `deploy provision`, `start`, `run`, ... for those who hold it, `join` for a site.

The server's and the sites' processes run in the foreground, so that Ctrl-C, a terminal or systemd ends them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.running import DEFAULT, INTERRUPTED, Json, Overrides, Recipes, split_recipe

if TYPE_CHECKING:
    from fedllm.deploy.checkup import Check
    from fedllm.deploy.coordinator import Record
    from fedllm.deploy.kit import Kit
    from fedllm.deploy.network import NetworkFile

POLL = 1.0
"""Seconds between two looks at a run."""
SAID = {
    "Successfully registered client": "The server has let this site in.",
    "is disabled": "The server does not let this site in: it was revoked.",
    "Server started": "The server is ready.",
}
"""What FLARE's log says -> in plain words, once."""

Network = Annotated[Path, typer.Option("--folder", help="Where kits and the authority's key lie.")]
File = Annotated[Path, typer.Argument(metavar="SITES.YAML", help="Who takes part.", show_default=False)]
KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="A participant's kit.", show_default=False)]
KitOption = Annotated[Path, typer.Option("--kit", help="A coordinator's kit.", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id.", show_default=False)]
Unit = Annotated[
    Path | None, typer.Option(help="Write a systemd unit into this file, and start nothing.", show_default=False)
]
Follow = Annotated[bool, typer.Option(help="Stay until the run is over, and fetch what it found.")]
NET = Path("network")


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    panel = "Across sites"
    group = typer.Typer(help="A run across sites: kits, server, runs, logs.", no_args_is_help=True)
    group.command("provision")(provision)
    group.command("add-site")(add_site)
    group.command("start")(start_server)
    group.command("run")(run_recipe)
    group.command("status")(status)
    group.command("log")(log)
    group.command("stop")(stop)
    group.command("resume")(resume)
    group.command("fetch")(fetch)
    group.command("revoke")(revoke)
    audit = typer.Typer(help="Audit logs of server and sites.", no_args_is_help=True)
    audit.command("verify")(verify)
    audit.callback()(_audit)
    group.add_typer(audit, name="audit")
    app.add_typer(group, name="deploy", rich_help_panel=panel)
    app.command("join", rich_help_panel=panel)(join)


def _audit() -> None:
    """Audit logs of server and sites."""


# --- a network -------------------------------------------------------------------------------------------------------


def provision(file: File, folder: Network = NET, as_json: Json = False) -> None:
    """Make a kit for every participant in a file. Again with more sites: the new ones get kits, the others stay."""
    with screen.loading("Making kits"):
        from fedllm.deploy.network import NetworkFile

        network = NetworkFile.of(file)
    _provision(network, folder, as_json)


def add_site(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Its name.", show_default=False)],
    organisation: Annotated[str, typer.Option(help="Whose it is.", show_default=False)],
    folder: Network = NET,
    as_json: Json = False,
) -> None:
    """Make the kit of one more site; what was handed out before stays good, and the server may run on."""
    with screen.loading("Making kits"):
        from fedllm.core.errors import ConfigError
        from fedllm.deploy.network import last

        network = last(folder)
    if network is None:
        raise ConfigError(
            f"{folder} holds no network.",
            action="Name its folder with --folder, or begin with: fedllm deploy provision sites.yaml",
        )
    _provision(network.with_site(site, organisation), folder, as_json)
    if not as_json:
        screen.say(f"Add '{site}: {{organisation: {organisation}}}' to your sites.yaml, too.", "dim")


def _provision(network: NetworkFile, folder: Path, as_json: bool) -> None:
    from fedllm.deploy import network as networks

    with screen.loading("Making kits"):
        done = networks.provision(network, folder)
    who = network.participants()
    if as_json:
        rows = [
            {"name": name, **who[name], "kit": str(place.resolve()), "new": name in done.made}
            for name, place in {**done.made, **done.kept}.items()
        ]
        screen.emit({"network": network.name, "folder": str(folder), "kits": rows, "left_out": done.left_out})
        return
    if not done.made:
        screen.say("Every participant has a kit already; nothing was changed.")
    else:
        screen.say(f"New kits of {network.name}; each goes to one place, over a channel that you trust:")
        screen.show(_kit_table(who, done.made))
    if done.made and done.kept:
        screen.say(f"As they were: {', '.join(done.kept)}.")
    for name in done.left_out:
        screen.warn([f"{name} is not in the file any more; its kit and its certificate stay good until it is revoked."])
    screen.say()
    screen.tell(
        f"A kit holds a private key. {folder / networks.AUTHORITY} holds copies of all of them and the key that signs "
        "new ones: keep it off the server, and where you alone can read it."
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


# --- processes -------------------------------------------------------------------------------------------------------


def start_server(kit: KitArgument, unit: Unit = None) -> None:
    """Run the server in the foreground; Ctrl-C ends it. Runs that are under way can be resumed later."""
    from fedllm.deploy.kit import Kit

    place = Kit.of(kit, "server")
    if unit is not None:
        _unit(place, ["deploy", "start", str(place.folder)], unit)
        return
    _free(place)
    place.settle(place.facts())
    _foreground(place)


def _free(kit: Kit) -> None:
    """Raise :class:`RunError` where another process has the server's port."""
    import errno
    import socket

    from fedllm.core.errors import RunError

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", kit.port))
        except OSError as fault:
            why = "is in use" if fault.errno == errno.EADDRINUSE else f"cannot be opened: {fault.strerror}"
            raise RunError(
                f"The port {kit.port} {why}.", action="End what listens there: perhaps this server."
            ) from None


def _foreground(kit: Kit) -> None:
    """Start a participant and stay until it ends or is asked to; leaves with an error where it ended by itself."""
    from fedllm.core.errors import RunError
    from fedllm.engine.nvflare import session

    asked = False

    def leave(*_: object) -> None:
        nonlocal asked
        asked = True

    log = kit.folder / "log.txt"
    before = log.stat().st_size if log.is_file() else 0
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    there = session.start(kit.name, kit.folder)
    try:
        screen.say(f"{kit.kind.capitalize()} {kit.name} of {kit.network}, {kit.address}. Ctrl-C ends it. Log: {log}")
        said: set[str] = set()
        while there.alive and not asked:
            for text in _told(log, before, said):
                screen.say(text)
            time.sleep(POLL / 2)
        if not asked:
            for text in _told(log, before, said):
                screen.say(text)
            raise RunError(f"The process of {kit.name} ended by itself.", _tail(kit), action=f"Its log: {log}")
        screen.say("Ended.")
    finally:
        there.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _told(log: Path, before: int, said: set[str]) -> Iterator[str]:
    """What is new in a process's log, in plain words."""
    if not log.is_file():
        return
    size = log.stat().st_size
    with log.open("rb") as file:
        file.seek(before if size >= before else 0)
        text = file.read().decode("utf-8", "replace")
    for mark, words in SAID.items():
        if mark in text and mark not in said:
            said.add(mark)
            yield words


def _tail(kit: Kit) -> str:
    """What a process said last."""
    for name in ("error_log.txt", "start.log"):
        file = kit.folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        words = [line for line in text.splitlines() if line.strip(" ^~")]
        if words:
            return f"Its last words: {words[-1].strip()}"
    return ""


def _unit(kit: Kit, words: list[str], file: Path) -> None:
    from fedllm.deploy import units

    place = units.write(kit, words, file)
    screen.say(f"Unit: {place}")
    screen.say("Look at it, above all at User, then:")
    screen.say(f"  sudo cp {place} /etc/systemd/system/ && sudo systemctl enable --now {place.name}")


def join(
    kit: KitArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of data, such as data.limit=100.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="This site's rows; what was given before, where left out.", show_default=False)
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="The client that all rows are; the site's name by default.", show_default=False)
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The column whose values are the clients, if several.", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What this site allows; copied into the kit.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that runs may ask for, NAME or NAME=FOLDER; any of the hub otherwise."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at everything; write nothing, start nothing.")] = False,
    unit: Unit = None,
    as_json: Json = False,
) -> None:
    """Take part with this site's data: look at everything, say what is allowed, and run in the foreground."""
    with screen.loading("Looking"):
        from fedllm.deploy import checkup, starter
        from fedllm.deploy.kit import POLICY, Kit

        place = Kit.of(kit, "site")
        facts = _site_facts(place, overrides or [], data, client, by, device, model)
        own = place.folder / POLICY
        rules = policy if policy is not None else own if own.is_file() else None
        found = list(checkup.look(place, facts, rules))
    good = not any(one.verdict == "problem" for one in found)
    allowed = _sentences(rules) if rules is not None else []
    written = None
    if rules is None and not check:
        own.write_text(starter.policy(place.name), encoding="utf-8")
        written = str(own)
    if as_json:
        checks = [asdict(one) for one in found]
        screen.emit({"site": place.name, "checks": checks, "policy": allowed, "good": good, "policy_written": written})
    else:
        _show(found)
        _show_policy(place, allowed, written)
    if not good:
        raise typer.Exit(1)
    if check:
        return
    if policy is not None and policy.resolve() != own:
        own.write_bytes(policy.read_bytes())
    place.settle(facts)
    if unit is not None:
        _unit(place, ["join", str(place.folder)], unit)
        return
    _foreground(place)


def _site_facts(
    kit: Kit,
    overrides: list[str],
    data: str | None,
    client: str | None,
    by: str | None,
    device: str | None,
    model: list[str] | None,
) -> dict[str, Any]:
    """The content of the site's own file: what was given, over what it says already."""
    from fedllm.cli.data import recipe_for
    from fedllm.core.errors import ConfigError
    from fedllm.core.settings import read
    from fedllm.deploy.kit import POLICY
    from fedllm.engine.nvflare.facts import NAME, SiteFacts
    from fedllm.recipe import load_recipe

    facts: dict[str, Any] = {**kit.facts(), "policy": POLICY}
    if by is not None and client is not None:
        raise ConfigError(
            "--by and --client are both given.", "--by makes several clients, --client names the only one."
        )
    if data is not None:
        split = ["partition.by=natural", f"partition.column={by}"] if by is not None else []
        source, given = recipe_for(_absolute(data), [*split, *overrides])
        if not isinstance(source, dict):
            raise ConfigError(
                f"--data {data} is no data file.",
                "Endings: .jsonl, .json, .csv, .tsv, .parquet, .gz; or a folder, or *.",
            )
        recipe = load_recipe(source, given)
        facts["data"] = recipe.data.model_dump(mode="json", exclude_unset=True)
        facts["client"] = (client or kit.name) if _alone(facts["data"]) else None
    elif overrides or by is not None:
        raise ConfigError("Options of data are given, and no --data.", action="Name the file with --data.")
    elif not facts.get("data"):
        raise ConfigError("It is not said where this site's rows are.", action="Name the file with --data.")
    elif client is not None:
        facts["client"] = client
    if device is not None:
        facts["device"] = device
    if model:
        pairs = [text.partition("=") for text in model]
        facts["models"] = {name: _model_place(place) if eq else name for name, eq, place in pairs}
    read(SiteFacts, facts, NAME)
    return {key: value for key, value in facts.items() if value is not None}


def _alone(data: Mapping[str, Any]) -> bool:
    partition = data.get("partition", {})
    return partition.get("by") == "iid" and partition.get("clients") == 1


def _absolute(data: str) -> str:
    """A path that does not depend on where a process is started."""
    return data if "://" in data else str(Path(data).expanduser().absolute())


def _model_place(text: str) -> str:
    return str(Path(text).expanduser().absolute()) if text.startswith((".", "~", "/")) or Path(text).exists() else text


def _sentences(file: Path) -> list[str]:
    from fedllm.core.errors import FedLLMError
    from fedllm.sites.policy import Policy

    try:
        return Policy.of(file).sentences()
    except FedLLMError:
        return []  # it stands among the checks


def _show(found: list[Check]) -> None:
    from fedllm.cli import doctor

    doctor.show([doctor.Finding(one.name, one.verdict, one.text, one.action) for one in found])


def _show_policy(kit: Kit, allowed: list[str], written: str | None) -> None:
    screen.say()
    if allowed:
        screen.say(f"What {kit.name} allows:", "bold")
        for sentence in allowed:
            screen.tell(f"  {sentence}")
        screen.say()
    if written is not None:
        screen.tell("Without a policy nothing is allowed, and this site was not started.", "bold")
        screen.say(f"To begin with: {written}")
        screen.say("Change it to what you agree with, and give the same command again.")


# --- runs ------------------------------------------------------------------------------------------------------------


def run_recipe(
    recipe: Recipes = DEFAULT,
    overrides: Overrides = None,
    *,
    kit: KitOption,
    sites: Annotated[
        str | None, typer.Option(help="Names with commas; all that are connected by default.", show_default=False)
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="The run's id; made of name and time by default.")] = None,
    purpose: Annotated[str, typer.Option(help="What it is for; sites allow purposes.")] = "research",
    data_set: Annotated[
        list[str] | None,
        typer.Option(help="A data set that it uses at the sites; 'default' where none is named. May be repeated."),
    ] = None,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Sites without which a round does not count.", show_default=False)
    ] = None,
    follow: Follow = True,
    as_json: Json = False,
) -> None:
    """Play a recipe across sites. For example: fedllm deploy run quickstart rounds=3 --kit KIT --data-set notes"""
    recipe, given = split_recipe(recipe, overrides)
    with screen.loading("Loading libraries"):
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit
        from fedllm.engine.nvflare.program import possible
        from fedllm.recipe import load_recipe
        from fedllm.run import method_of

        place = Kit.of(kit, "coordinator")
        settled = load_recipe(recipe, given)
        possible(settled)
        method_of(settled)
        name = coordinator.free_name(place, run, settled.name)
    with screen.loading("Reaching the server"), coordinator.connected(place) as admin:
        there = admin.sites()
        wanted = [one.strip() for one in sites.split(",") if one.strip()] if sites is not None else there
        _present(wanted, there)
        values = settled.model_dump(mode="json")
        record = coordinator.Record(name, values, sorted(set(wanted)), purpose, list(data_set or []), quorum)
        record = record.submit(place, admin)
    _submitted(place, record, follow, as_json)


def _present(wanted: list[str], there: list[str]) -> None:
    """Raise where a site is not connected."""
    from fedllm.core.errors import ConfigError, RunError

    if not wanted:
        raise RunError("No site is connected.", action="A site comes with: fedllm join KIT --data FILE")
    for name in wanted:
        if name not in there:
            raise ConfigError.unknown("connected site", name, there, "Start it, or leave it out of --sites.")


def _submitted(kit: Kit, record: Record, follow: bool, as_json: bool) -> None:
    if not follow:
        if as_json:
            screen.emit({"run": record.run, "job": record.jobs[-1], "sites": record.sites})
            return
        screen.say(f"Submitted {record.run} to {', '.join(record.sites)}.")
        screen.say(f"Look at it with: fedllm deploy log {record.run} --kit {kit.folder}")
        return
    if not as_json:
        screen.say(f"Submitted {record.run} to {', '.join(record.sites)}. Ctrl-C leaves it running.")
    try:
        state, seen = _follow(kit, record, as_json)
    except KeyboardInterrupt:
        screen.say(f"Left; the run goes on. Look at it: fedllm deploy log {record.run} --kit {kit.folder}", errors=True)
        raise typer.Exit(INTERRUPTED) from None
    _ended(kit, record, state, seen, as_json)


def _follow(kit: Kit, record: Record, quiet: bool) -> tuple[str, set[tuple[str, int]]]:
    """Print rounds as they end until the job is over; returns its status and which rounds were seen."""
    from fedllm.deploy import coordinator
    from fedllm.engine.nvflare.session import ENDED

    seen: set[tuple[str, int]] = set()
    with coordinator.connected(kit) as admin:
        while True:
            with coordinator.translated():
                state = admin.status(record.jobs[-1])
                rounds = coordinator.live_rounds(admin, record.jobs[-1])
            new = [one for one in rounds if (one["model"], one["round"]) not in seen]
            seen |= {(one["model"], one["round"]) for one in new}
            for line in () if quiet else coordinator.lines(new):
                screen.say(line)
            if state.startswith(ENDED):
                return state, seen
            time.sleep(POLL)


def _ended(kit: Kit, record: Record, state: str, seen: set[tuple[str, int]], as_json: bool) -> None:
    """Fetch what a run left, and show it; leaves with an error where it failed."""
    from fedllm.core.errors import RunError
    from fedllm.deploy import coordinator
    from fedllm.engine.nvflare.session import GOOD

    folder = kit.folder / coordinator.RESULTS / record.run
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier job of the same run left
    with coordinator.connected(kit) as admin, contextlib.suppress(*() if state == GOOD else (RunError,)):
        coordinator.fetch(admin, record, folder)  # a job that failed may have left nothing
    late = [one for one in coordinator.kept_rounds(folder) if (one["model"], one["round"]) not in seen]
    for line in () if as_json else coordinator.lines(late):
        screen.say(line)
    if state != GOOD:
        why = coordinator.reason(folder) or f"The server says {state}."
        again = f"fedllm deploy resume {record.run} --kit {kit.folder}"
        raise RunError(
            why, f"The run {record.run} did not reach its end.", action=f"When the cause is gone, go on with: {again}"
        )
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if as_json:
        here = {name: str(folder / Path(file).name) for name, file in result["files"].items()}
        screen.emit({"run": record.run, "folder": str(folder), **result, "files": here})
        return
    _show_result(result, folder)


def _show_result(result: dict[str, Any], folder: Path) -> None:
    from fedllm.cli.tables import client_table
    from fedllm.report.table import result_table

    width = screen.console().width
    by_client = client_table(result, width)
    screen.say()
    screen.show(screen.fitted(result_table(result), width), *([by_client] if by_client is not None else []))
    screen.say()
    for sentence in result["sentences"]:
        screen.tell(sentence, "bold")
    screen.say()
    for name in ("adapter", "report.html", "metrics.jsonl"):
        if (folder / name).exists():
            screen.say(f"{name.partition('.')[0].capitalize():8} {folder / name}")
    screen.warn(result["warnings"])


def status(kit: KitOption, as_json: Json = False) -> None:
    """Which sites are connected, and how runs stand."""
    with screen.loading("Reaching the server"):
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit

        place = Kit.of(kit, "coordinator")
        with coordinator.connected(place) as admin:
            there, known = admin.sites(), coordinator.jobs(admin)
    if as_json:
        screen.emit({"network": place.network, "server": place.address, "sites": there, "jobs": known})
        return
    screen.say(f"{place.network} at {place.address}; connected: {', '.join(there) or 'no site'}")
    if not known:
        screen.say("No run yet.")
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "status", "submitted", "duration"):
        table.add_column(column, header_style="dim", overflow="fold")
    for one in known:
        table.add_row(*(str(one[key] or "") for key in ("run", "status", "submitted", "duration")))
    screen.show(table)


def log(run: Run, kit: KitOption, as_json: Json = False) -> None:
    """Rounds of a run: loss, uploads used, clients lost. Of a run that is under way, what the server tells so far."""
    with screen.loading("Reaching the server"):
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit

        place = Kit.of(kit, "coordinator")
        record = coordinator.record(place, run)
        state, rounds, why = _rounds(place, record)
    if as_json:
        screen.emit({"run": run, "status": state, "reason": why, "rounds": rounds})
        return
    screen.say(f"{run}: {state}; sites {', '.join(record.sites)}; job {record.jobs[-1]}")
    for line in coordinator.lines(rounds):
        screen.say(line)
    if why:
        screen.tell(why, "bold")


def _rounds(kit: Kit, record: Record) -> tuple[str, list[dict[str, Any]], str | None]:
    """Status, rounds and why it failed: of the fetched run, of what the server has, or of the server's log."""
    import tempfile

    from fedllm.core.errors import RunError
    from fedllm.deploy import coordinator
    from fedllm.engine.nvflare.session import ENDED

    with coordinator.connected(kit) as admin, coordinator.translated():
        state = admin.status(record.jobs[-1])
        if state.startswith(ENDED):
            with contextlib.suppress(RunError), tempfile.TemporaryDirectory() as place:
                found = coordinator.fetch(admin, record, Path(place) / "run")
                return state, coordinator.kept_rounds(found), coordinator.reason(found)
        return state, coordinator.live_rounds(admin, record.jobs[-1]), None


def stop(run: Run, kit: KitOption) -> None:
    """End a run; the rounds that are over are kept at the server."""
    with screen.loading("Reaching the server"):
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit
        from fedllm.engine.nvflare.session import ENDED

        place = Kit.of(kit, "coordinator")
        record = coordinator.record(place, run)
        with coordinator.connected(place) as admin, coordinator.translated():
            over = admin.status(record.jobs[-1]).startswith(ENDED)
            if not over:
                admin.abort(record.jobs[-1])
    screen.say(f"{run} was over already." if over else f"{run} is ended.")
    if not over:
        screen.say(f"Go on with it: fedllm deploy resume {run} --kit {kit}")


def resume(run: Run, kit: KitOption, follow: Follow = True, as_json: Json = False) -> None:
    """Go on with a run from its last round: its server or a site was lost, or it was stopped."""
    with screen.loading("Reaching the server"):
        from fedllm.core.errors import RunError
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit
        from fedllm.engine.nvflare.session import GOOD

        place = Kit.of(kit, "coordinator")
        record = coordinator.record(place, run)
        with coordinator.connected(place) as admin:
            with coordinator.translated():
                state = admin.status(record.jobs[-1])
            if state == GOOD:
                raise RunError(f"{run} has reached its end.", action=f"Fetch it: fedllm deploy fetch {run} --kit {kit}")
            _present(record.sites, admin.sites())
            record = record.submit(place, admin)
    _submitted(place, record, follow, as_json)


def fetch(
    run: Run,
    kit: KitOption,
    folder: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Bring what a run left from the server: result, report, adapter, metrics."""
    with screen.loading("Fetching"):
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit

        place = Kit.of(kit, "coordinator")
        record = coordinator.record(place, run)
        with coordinator.connected(place) as admin:
            found = coordinator.fetch(admin, record, folder)
    files = sorted(str(file.relative_to(found)) for file in found.rglob("*") if file.is_file())
    if as_json:
        screen.emit({"run": run, "folder": str(found), "files": files})
        return
    screen.say(f"{run}: {found}")
    for file in files:
        screen.say(f"  {file}", "dim")


def revoke(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site.", show_default=False)],
    kit: KitOption,
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
) -> None:
    """Have the server let a site in no more, whatever its certificate says; it stays so when the server restarts."""
    with screen.loading("Reaching the server"):
        from fedllm.core.errors import nearest
        from fedllm.deploy import coordinator
        from fedllm.deploy.kit import Kit

        place = Kit.of(kit, "coordinator")
        with coordinator.connected(place) as admin, coordinator.translated():
            there = admin.sites()
            (admin.inner.enable_client if undo else admin.inner.disable_client)(site)
    if undo:
        screen.say(f"{site} may come again: its process has to be started anew.")
    else:
        screen.say(f"{site} is let in no more. Its part of a run that is under way ends as a lost site.")
        if site not in there:
            near = nearest(site, there)
            screen.warn([f"{site} was not connected{f'; did you mean {near}?' if near else '; is that its name?'}"])


# --- audit -----------------------------------------------------------------------------------------------------------


def verify(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Logs, or NAME=FILE; the server's as server=FILE, or first.")
    ],
    anchor: Annotated[
        str | None, typer.Option(help="SEQ:HASH of one of its entries, kept elsewhere.", show_default=False)
    ] = None,
    some: Annotated[
        bool, typer.Option("--some", help="Logs of sites are missing: look at the clients of those that are here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Whether audit logs are what was written, and whether server and sites say the same. Leaves with 1 if not."""
    from fedllm.core.errors import ConfigError
    from fedllm.sites import audit

    logs = _logs(files)
    if anchor is not None and len(logs) > 1:
        raise ConfigError("--anchor is given with several logs.", "It is of one.", action="Verify that log alone.")
    verdicts = {name: audit.verify(file, anchor) for name, file in logs.items()}
    intact = all(one.intact for one in verdicts.values())
    unmatched = None
    if len(logs) > 1 and intact:
        unmatched = _unmatched(logs, some)
    if as_json:
        told = None if unmatched is None else [{"log": u.log, "line": u.entry.seq, "why": u.why} for u in unmatched]
        each = {name: {"file": str(logs[name]), **asdict(one)} for name, one in verdicts.items()}
        screen.emit({"intact": intact, "logs": each, "unmatched": told})
    else:
        _show_verdicts(logs, verdicts, unmatched)
    if not intact or unmatched:
        raise typer.Exit(1)


def _logs(files: list[str]) -> dict[str, Path]:
    """Name -> log, the server's first and named so."""
    from fedllm.core.errors import ConfigError

    found: dict[str, Path] = {}
    for text in files:
        name, equal, path = text.partition("=")
        file = Path(text if not equal or Path(text).exists() else path)
        name = name if equal and not Path(text).exists() else _log_name(file)
        if name in found:
            raise ConfigError(f"Two logs are named '{name}'.", action="Give other names: NAME=FILE.")
        found[name] = file
    if len(found) > 1 and "server" not in found:
        first = next(iter(found))
        found = {"server" if name == first else name: file for name, file in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: name != "server")}


def _log_name(file: Path) -> str:
    """Of the kit that a log lies in, or of its file."""
    kit = file.absolute().parent.parent
    if (kit / "startup" / "fed_server.json").is_file():
        return "server"
    return kit.name if (kit / "startup").is_dir() else file.stem


def _unmatched(logs: Mapping[str, Path], some: bool) -> list[Any]:
    from fedllm.sites import audit

    sites = {name: audit.read(file) for name, file in logs.items() if name != "server"}
    clients = {entry.client for entries in sites.values() for entry in entries if entry.client is not None}
    return audit.matched(audit.read(logs["server"]), sites, clients if some else None)


def _show_verdicts(logs: Mapping[str, Path], verdicts: Mapping[str, Any], unmatched: list[Any] | None) -> None:
    for name, one in verdicts.items():
        if one.intact:
            screen.say(f"{name}: {one.entries} entries, every line as it was written ({logs[name]})")
        else:
            screen.say(f"{name}: line {one.first_bad_line} is bad: {one.why} ({logs[name]})", "bold red")
            screen.say(f"  The {one.entries} lines before it are good.")
    if unmatched is None:
        return
    for one in unmatched:
        entry = one.entry
        what = f"{entry.action} of run {entry.run}, round {entry.round}, client {entry.client}"
        screen.say(f"{one.log}, line {entry.seq} ({what}): {one.why}", "bold red")
    if not unmatched:
        screen.say("Server and sites say the same: what one sent, the other received.")

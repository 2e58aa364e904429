"""Runs - `deploy run`, `status`, `log`, `stop`, `resume`, `fetch` and `revoke`: what a coordinator does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.deploy.following import submitted
from fedllm.cli.deploy.given import Follow, KitOption, Run
from fedllm.cli.running import DEFAULT, Json, Overrides, Recipes, split_recipe

if TYPE_CHECKING:
    from fedllm.deploy.coordinator import Record
    from fedllm.deploy.kit import Kit


def _own(path: Path) -> Kit:
    """The coordinator's kit; says where its certificate ends soon, and raises :class:`ConfigError` where it has."""
    from fedllm.deploy.kit import Kit

    kit = Kit.of(path, "coordinator")
    soon = kit.in_time()
    screen.warn([soon] if soon is not None else [])
    return kit


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
        from fedllm.engine.nvflare.program import possible
        from fedllm.recipe import load_recipe
        from fedllm.run import method_of

        place = _own(kit)
        settled = load_recipe(recipe, given)
        possible(settled)
        method_of(settled)
        name = coordinator.free_name(place, run, settled.name)
    with screen.loading("Reaching the server"), coordinator.connected(place) as admin:
        there = admin.sites()
        wanted = [one.strip() for one in sites.split(",") if one.strip()] if sites is not None else there
        _present(wanted, there)
        values = coordinator.across(settled)
        record = coordinator.Record(name, values, sorted(set(wanted)), purpose, list(data_set or []), quorum)
        record = record.submit(place, admin)
    submitted(place, record, follow, as_json)


def _present(wanted: list[str], there: list[str]) -> None:
    """Raise where a site is not connected."""
    from fedllm.core.errors import ConfigError, RunError

    if not wanted:
        raise RunError("No site is connected.", action="A site comes with: fedllm join KIT --data FILE")
    for name in wanted:
        if name not in there:
            raise ConfigError.unknown("connected site", name, there, "Start it, or leave it out of --sites.")


def status(kit: KitOption, as_json: Json = False) -> None:
    """Which sites are connected, and how runs stand."""
    with screen.loading("Reaching the server"):
        from fedllm.deploy import coordinator

        place = _own(kit)
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

        place = _own(kit)
        record = coordinator.record(place, run)
        state, rounds, why = _rounds(place, record)
    if as_json:
        screen.emit({"run": run, "status": state, "reason": why, "rounds": rounds})
        return
    screen.say(f"{run}: {state}; sites {', '.join(record.sites)}")
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
        job = coordinator.newest(admin, record)
        state = admin.status(job)
        if state.startswith(ENDED):
            with contextlib.suppress(RunError), tempfile.TemporaryDirectory() as place:
                found = coordinator.fetch(admin, record, Path(place) / "run")
                return state, coordinator.kept_rounds(found), coordinator.reason(found)
        return state, coordinator.live_rounds(admin, job), None


def stop(run: Run, kit: KitOption) -> None:
    """End a run; the rounds that are over are kept at the server."""
    with screen.loading("Reaching the server"):
        from fedllm.deploy import coordinator
        from fedllm.engine.nvflare.session import ENDED

        place = _own(kit)
        record = coordinator.record(place, run)
        with coordinator.connected(place) as admin, coordinator.translated():
            job = coordinator.newest(admin, record)
            over = admin.status(job).startswith(ENDED)
            if not over:
                admin.abort(job)
    screen.say(f"{run} was over already." if over else f"{run} is ended.")
    if not over:
        screen.say(f"Go on with it: fedllm deploy resume {run} --kit {kit}")


def resume(run: Run, kit: KitOption, follow: Follow = True, as_json: Json = False) -> None:
    """Go on with a run from its last round: its server or a site was lost, or it was stopped."""
    with screen.loading("Reaching the server"):
        from fedllm.core.errors import RunError
        from fedllm.deploy import coordinator
        from fedllm.engine.nvflare.session import GOOD

        place = _own(kit)
        record = coordinator.record(place, run)
        with coordinator.connected(place) as admin:
            with coordinator.translated():
                job = coordinator.known(admin, record)
                state = admin.status(job) if job is not None else ""
            if state == GOOD:
                raise RunError(f"{run} has reached its end.", action=f"Fetch it: fedllm deploy fetch {run} --kit {kit}")
            _present(record.sites, admin.sites())
            record = record.submit(place, admin)
    submitted(place, record, follow, as_json)


def fetch(
    run: Run,
    kit: KitOption,
    folder: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Bring what a run left from the server: result, report, adapter, metrics."""
    with screen.loading("Fetching"):
        from fedllm.deploy import coordinator

        place = _own(kit)
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

        place = _own(kit)
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

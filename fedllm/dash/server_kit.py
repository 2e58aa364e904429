"""Server kit - the page of a server: its runs, the sites that take part, what moved and was refused, the audit log."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.dash import blocks, given, log_page, run_page
from fedllm.dash.blocks import Block, Cell
from fedllm.dash.chain import Chain, Round, Told
from fedllm.dash.folder import Run, Shelf
from fedllm.dash.source import RUN_HEADS, Page, Source, page, reading, run_row
from fedllm.deploy.kit import Kit
from fedllm.engine.nvflare.facts import ServerFacts
from fedllm.engine.nvflare.record import FILE
from fedllm.sites.audit import client_name


@dataclass
class Site:
    """What the server's log tells of one site, over all runs or in one."""

    moved: Round
    runs: int = 0
    state: str = ""
    last: str = ""


class ServerKit(Source):
    """A server's kit.

    Args:
        kit: the kit.

    Raises:
        ConfigError: its own file cannot be read.
    """

    def __init__(self, kit: Kit) -> None:
        facts = ServerFacts.model_validate(kit.facts())
        runs = kit.folder / facts.runs
        self.kit, self.shelf, self.chain = kit, Shelf(runs), Chain(runs.parent / FILE)
        self.taken = f"the kit of the server {kit.name} of the network {kit.network}"
        self._anchors: dict[str, str] = {}

    def refresh(self, until: float) -> bool:
        """See :meth:`Source.refresh`."""
        done = self.shelf.refresh(until)
        known = {name: run.anchor.found or {} for name, run in self.shelf.runs.items()}
        self._anchors = {name: given.text(found.get("last"), 200) for name, found in known.items() if found}
        return self.chain.refresh(until) and done  # after the anchors: one that is newer is not yet in the log

    def page(self, run: str | None) -> Page | None:
        """See :meth:`Source.page`."""
        if run is None:
            return self._overview()
        told, folder = self.chain.runs.get(run), self.shelf.runs.get(run)
        return self._run(run, told, folder) if told is not None or folder is not None else None

    # --- all runs ----------------------------------------------------------------------------------------------------

    def _overview(self) -> Page:
        runs = self.chain.runs
        moved = functools.reduce(Round.plus, (told.total for told in runs.values()), Round())
        sites = self._sites(runs)
        names = {**dict.fromkeys(reversed(runs)), **dict.fromkeys(self.shelf.runs)}
        return page(
            kind="server",
            kicker=f"Server of {self.kit.network}",
            title=self.kit.name,
            about=[f"It listens at {self.kit.address}."],
            tiles=[
                [f"{len(names):,}", "runs"],
                [f"{len(sites):,}", "sites have taken part"],
                [blocks.size(moved.into.bytes), f"came from sites; {blocks.size(moved.out.bytes)} went to them"],
                [f"{log_page.count(runs.values()):,}", "refusals and losses"],
                log_page.chain_tile(self.chain, self._anchors),
            ],
            sections=[
                self._listed(list(names)),
                _site_table(sites, "No site has taken part yet."),
                log_page.refusals("Refused and lost", runs, "Nothing was refused.", named=True),
                log_page.chain(self.chain, self._anchors, f"fedllm deploy audit verify {self.chain.path}"),
            ],
            read=self._reading(),
        )

    def _listed(self, names: list[str]) -> Block:
        rows: list[list[Cell]] = []
        order = {name: (self.chain.runs[name].last if name in self.chain.runs else "") for name in names}
        for name in sorted(names, key=lambda name: order[name], reverse=True)[:200]:
            told = self.chain.runs.get(name)
            folder = self.shelf.runs.get(name) or Run(self.shelf.folder / name.replace("/", "-"))
            state = log_page.standing(told, self.chain, self.shelf.runs.get(name)) if told else folder.state()
            row = run_row(folder, state.cell())
            rows.append([blocks.link(name), *row[1:-1], blocks.at(told.last) if told else row[-1]])
        if not rows:
            empty = "No run yet. A coordinator starts one with: fedllm deploy run RECIPE --kit KIT"
            return blocks.section("Runs", blocks.text(empty, "empty"))
        return blocks.section("Runs", blocks.table("Runs, the newest first", RUN_HEADS, rows))

    def _sites(self, runs: Mapping[str, Told]) -> dict[str, Site]:
        """By site: what moved, and when it was last heard of."""
        found: dict[str, Site] = {}
        for run, told in runs.items():
            folder = self.shelf.runs.get(run)
            home = given.mapping((folder.sites.found if folder else None) or {}).get("home")
            where = {client_name(client): given.text(site, 200) for client, site in given.mapping(home).items()}
            for name, (decision, time) in told.members.items():
                one = found.setdefault(name, Site(Round()))
                one.runs += decision == "allowed"
                one.state = "refused" if decision == "refused" else "joined"
                one.last = max(one.last, time)
            for client, moved in told.clients.items():
                one = found.get(where.get(client, ""))
                if one is not None:
                    one.moved, one.last = one.moved.plus(moved), max(one.last, told.last)
        return found

    def _reading(self) -> list[int] | None:
        return reading([self.chain, *(run.rounds for run in self.shelf.runs.values())])

    # --- one run -----------------------------------------------------------------------------------------------------

    def _run(self, name: str, told: Told | None, folder: Run | None) -> Page:
        state = (
            log_page.standing(told, self.chain, folder)
            if told is not None
            else folder.state()
            if folder is not None
            else None
        )
        known = folder if folder is not None else Run(self.shelf.folder / "none")
        logged: list[Block] = []
        if told is not None:
            sites = self._sites({name: told})
            logged = [
                _site_table(sites, "No site has answered yet."),
                log_page.refusals("Refused by sites", {name: told}, "No site refused anything.", named=False),
            ]
        signed = given.mapping((known.signed.found or {}).get("manifest"))
        by, purpose = (given.text(signed.get(word), 200) for word in ("coordinator", "purpose"))
        about = [f"Started by {by}, for {purpose}."] if by and purpose else []
        return page(
            kind="server-run",
            kicker=f"Run of {self.kit.network}",
            title=name,
            about=[*about, *run_page.about(known)],
            state=state.to_json() if state else None,
            lead=run_page.lead(known) if folder is not None else [],
            tiles=run_page.tiles(known) if folder is not None else [],
            sections=[*logged[:1], *(run_page.sections(known) if folder is not None else []), *logged[1:]],
            read=self._reading(),
            back=True,
        )


def _site_table(sites: Mapping[str, Site], empty: str) -> Block:
    rows: list[list[Cell]] = []
    for name, one in sorted(sites.items()):
        state = blocks.toned(one.state, blocks.BAD if one.state == "refused" else blocks.GOOD)
        sizes = blocks.size(one.moved.into.bytes), blocks.size(one.moved.out.bytes)
        rows.append([name, state, f"{one.runs:,}", f"{one.moved.into.times:,}", *sizes, blocks.at(one.last)])
    if not rows:
        return blocks.section("Sites", blocks.text(empty, "empty"))
    heads = ["Site", "Last answer", "#Runs", "#Uploads", "#From it", "#To it", "Last heard of"]
    return blocks.section("Sites", blocks.table("Sites that were asked to take part", heads, rows))

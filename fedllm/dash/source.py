"""Source - what a path is: one run, a folder of runs, or the kit of a server, a site or a coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, nearest
from fedllm.dash import blocks, run_page
from fedllm.dash.blocks import Block, Cell
from fedllm.dash.folder import Run, Shelf, is_run, moment
from fedllm.dash.follow import Follower
from fedllm.deploy.kit import Kit
from fedllm.report.words import NAMES, value_text

Page = dict[str, Any]
KNOWN = "Known: a run's folder, a folder of runs, and the kit of a server, a site or a coordinator."


class Source:
    """What the pages are made from.

    Attributes:
        taken: what the path was taken for, in plain words.
    """

    taken = ""

    def refresh(self, until: float) -> bool:
        """Read on until the time `until` (`time.monotonic`); True where everything there is has been read."""
        raise NotImplementedError(f"{type(self).__name__} must define refresh.")

    def page(self, run: str | None) -> Page | None:
        """The first page, or that of a run; None where there is no such run."""
        raise NotImplementedError(f"{type(self).__name__} must define page.")

    def close(self) -> None:
        """Let go of what is open."""


def source_of(path: Path) -> Source:
    """What a path is.

    Raises:
        ConfigError: there is nothing, it is none of the five, or a kit in it is damaged.
    """
    if not _is_folder(path):
        _nothing(path)
    if is_kit(path):
        return _kit(Kit.of(path))
    folder = path.resolve()
    if is_run(folder):
        return OneRun(folder)
    inside = _listed(folder)
    if any(is_run(one) for one in inside):
        return Runs(folder)
    kits = sorted(one.name for one in [*inside, *folder.glob("kits/*")] if is_kit(one))
    if kits:
        place = path if (path / kits[0]).is_dir() else path / "kits"
        raise ConfigError(
            f"{path} is not one kit, but holds several.",
            f"Kits in it: {', '.join(kits)}.",
            action=f"Name one of them: fedllm dash {place / kits[0]}",
        )
    raise ConfigError(f"{path} holds no run and is no kit.", KNOWN, action="Name the folder that 'fedllm run' printed.")


def is_kit(folder: Path) -> bool:
    """Whether a folder is a participant's kit; one that this user may not enter is none."""
    return _is_folder(folder / "startup")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # this user may not look
        return False


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; raises :class:`ConfigError` where this user may not look."""
    try:
        return [*folder.iterdir()]
    except OSError as fault:
        raise _closed(folder, fault) from None


def _closed(path: Path, fault: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {fault.strerror}.", KNOWN, action="Do it as a user who may read it.")


def _nothing(path: Path) -> None:
    try:
        there = path.exists()
    except OSError as fault:
        raise _closed(path, fault) from None
    if there:
        raise ConfigError(f"{path} is a file.", KNOWN, action=f"Name its folder: fedllm dash {path.parent}")
    beside = [one.name for one in _listed(path.parent) if _is_folder(one)] if _is_folder(path.parent) else []
    near = nearest(path.name, beside)
    found = str(path.parent / near) if near else None
    raise ConfigError(f"There is no folder {path}.", KNOWN, found, "Name a folder that exists.")


def _kit(kit: Kit) -> Source:
    if kit.kind == "server":
        from fedllm.dash.server_kit import ServerKit

        return ServerKit(kit)
    if kit.kind == "site":
        from fedllm.dash.site import SiteKit

        return SiteKit(kit)
    from fedllm.dash.coordinator import CoordinatorKit

    return CoordinatorKit(kit)


def page(
    *,
    kind: str,
    kicker: str,
    title: str,
    about: Sequence[str] = (),
    state: dict[str, str] | None = None,
    lead: Sequence[str] = (),
    tiles: Sequence[Sequence[str]] = (),
    sections: Sequence[Block] = (),
    read: list[int] | None = None,
    back: bool = False,
) -> Page:
    """A page for page/dash.js.

    Args:
        kind: what it shows: run, runs, server, server-run, ...
        kicker: the small line above the title.
        title: what it is about.
        about: lines beneath the title.
        state: word, tone and why, as :meth:`fedllm.dash.folder.State.to_json` gives them.
        lead: the sentences that matter.
        tiles: key figures: a number and what it is.
        sections: as :func:`fedllm.dash.blocks.section` makes them.
        read: bytes read and bytes there are, while files are still being read.
        back: whether there is a first page to go back to.
    """
    facts = {"kind": kind, "kicker": kicker, "title": title, "about": list(about), "state": state, "lead": list(lead)}
    return {**facts, "tiles": [list(t) for t in tiles], "sections": list(sections), "reading": read, "back": back}


def reading(files: Sequence[Follower]) -> list[int] | None:
    """Bytes read and bytes there are; None where all of it has been read."""
    if all(file.at_end for file in files):
        return None
    return [sum(file.offset for file in files), sum(file.size for file in files)]


class OneRun(Source):
    """The folder of one run.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.taken = Run(folder), f"the folder of the run {folder.name}"

    def refresh(self, until: float) -> bool:
        """See :meth:`Source.refresh`."""
        return self.run.refresh(until)

    def page(self, run: str | None) -> Page | None:
        """See :meth:`Source.page`."""
        return run_view(self.run) if run is None else None


class Runs(Source):
    """A folder of runs.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.shelf, self.taken = Shelf(folder), f"a folder of runs, {folder}"

    def refresh(self, until: float) -> bool:
        """See :meth:`Source.refresh`."""
        return self.shelf.refresh(until)

    def page(self, run: str | None) -> Page | None:
        """See :meth:`Source.page`."""
        runs = self.shelf.runs
        if run is not None:
            return run_view(runs[run], back=True) if run in runs else None
        words = [one.state().word for one in runs.values()]
        going = sum(word in ("under way", "waiting") for word in words)
        return page(
            kind="runs",
            kicker="Folder of runs",
            title=self.shelf.folder.name,
            about=[str(self.shelf.folder)],
            tiles=[
                [f"{len(runs):,}", "runs"],
                [f"{going:,}", "under way"],
                [f"{words.count('finished'):,}", "finished"],
                [f"{len(words) - going - words.count('finished'):,}", "stopped, silent or failed"],
            ],
            sections=[self._listed()],
            read=reading([one.rounds for one in runs.values()]),
        )

    def _listed(self) -> Block:
        rows = [run_row(run, run.state().cell()) for run in self.shelf.runs.values()]
        if not rows:
            return blocks.section("Runs", blocks.text("No run is here any more.", "empty"))
        more = self.shelf.left_out
        note = blocks.text(f"And {blocks.count(more, 'older run')}, not shown.", "note") if more else None
        return blocks.section("Runs", blocks.table("Runs, the newest first", RUN_HEADS, rows), note)


RUN_HEADS = ("Run", "State", "Method", "#Rounds", "#Loss", "Score", "#From clients-", "Last sign of life")
"""Columns of :func:`run_row`."""


def run_row(run: Run, state: Cell) -> list[Cell]:
    """A run in a list of runs."""
    own, metric = run.rounds.own, run.metric
    score = f"{value_text(metric, run.score)} {NAMES.get(metric, metric)}" if run.score is not None else "–"
    rounds = f"{own.last:,}" + (f" of {run.total:,}" if run.total else "")
    loss = f"{own.loss:.3f}" if own.loss is not None else "–"
    sent = blocks.size(sum(own.up.values()))
    return [blocks.link(run.name), state, run.method or "–", rounds, loss, score, sent, blocks.at(moment(run.seen))]


def run_view(run: Run, back: bool = False) -> Page:
    """The page of one run."""
    return page(
        kind="run",
        kicker="Federated run",
        title=run.name,
        about=run_page.about(run),
        state=run.state().to_json(),
        lead=run_page.lead(run),
        tiles=run_page.tiles(run),
        sections=run_page.sections(run),
        read=reading([run.rounds]),
        back=back,
    )

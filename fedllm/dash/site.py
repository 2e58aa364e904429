"""Site - the page of a site: what left it, in which run and round, how much, to whom, and which rules allowed it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ConfigError
from fedllm.dash import blocks, given, log_page
from fedllm.dash.blocks import Block, Cell
from fedllm.dash.chain import Chain, Round, Told
from fedllm.dash.given import File
from fedllm.dash.source import Page, Source, page, reading
from fedllm.deploy.kit import Kit
from fedllm.engine.nvflare.facts import SiteFacts, read_facts
from fedllm.engine.nvflare.record import FILE
from fedllm.sites.policy import Policy

MANIFEST = "manifest.json"
"""A run's signed manifest, in its folder at the site."""


class SiteKit(Source):
    """A site's kit.

    Args:
        kit: the kit.

    Raises:
        ConfigError: its own file cannot be read.
    """

    def __init__(self, kit: Kit) -> None:
        facts: SiteFacts = read_facts(SiteFacts, kit.folder)
        self.kit, self.folder = kit, kit.folder / facts.folder
        self.taken = f"the kit of the site {kit.name} of the network {kit.network}"
        self.chain = Chain(self.folder / FILE)
        self.rules = kit.folder / facts.policy if facts.policy is not None else None
        self.policy: Policy | None = None
        self.unread, self.digest = "", ""
        self._manifests: dict[str, File] = {}

    def refresh(self, until: float) -> bool:
        """See :meth:`Source.refresh`."""
        self._read_policy()
        done = self.chain.refresh(until)
        try:
            there = {one.name: one / MANIFEST for one in self.folder.iterdir()}
        except OSError:
            there = {}
        for run in self.chain.runs.keys() & there.keys():
            self._manifests.setdefault(run, File(there[run])).refresh()
        return done

    def page(self, run: str | None) -> Page | None:
        """See :meth:`Source.page`."""
        if run is None:
            return self._overview()
        return self._run(run, self.chain.runs[run]) if run in self.chain.runs else None

    def _read_policy(self) -> None:
        """The policy as it is now."""
        if self.rules is None:
            self.policy, self.unread, self.digest = None, "This site has no policy, so that nothing is allowed.", ""
            return
        try:
            data = self.rules.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest != self.digest:
                self.policy, self.unread, self.digest = Policy.of(self.rules), "", digest
        except (OSError, ConfigError) as fault:
            why = str(fault) if isinstance(fault, ConfigError) else f"{self.rules} cannot be read: {fault.strerror}."
            self.policy, self.unread, self.digest = None, f"{why} Until it can be, nothing is allowed.", ""

    def _manifest(self, run: str) -> dict[str, Any]:
        file = self._manifests.get(run)
        return given.mapping(((file.found if file else None) or {}).get("manifest"))

    # --- all runs ----------------------------------------------------------------------------------------------------

    def _overview(self) -> Page:
        runs = self.chain.runs
        total = functools.reduce(Round.plus, (told.total for told in runs.values()), Round())
        lead = self._lead(total, f"in {blocks.count(len(runs), 'run')}") if runs else []
        return page(
            kind="site",
            kicker=f"Site of {self.kit.network}",
            title=self.kit.name,
            about=[f"Uploads go to the server {self.kit.address}."],
            lead=lead,
            tiles=[
                [blocks.size(total.out.bytes), "left this site"],
                [f"{total.out.times:,}", "uploads"],
                [f"{total.stopped.times:,}", "uploads stayed here, by the policy"],
                [f"{log_page.count(runs.values()):,}", "refusals and losses"],
                log_page.chain_tile(self.chain, {}),
            ],
            sections=[
                self._runs(),
                self._allowed(),
                log_page.refusals("Refused and lost", runs, "Nothing was refused.", named=True),
                log_page.chain(self.chain, {}, f"fedllm deploy audit verify {self.chain.path}"),
            ],
            read=reading([self.chain]),
        )

    def _runs(self) -> Block:
        rows: list[list[Cell]] = []
        for run, told in reversed(self.chain.runs.items()):
            manifest, total = self._manifest(run), told.total
            stopped = total.stopped.times
            rows.append(
                [
                    blocks.link(run),
                    log_page.standing(told, self.chain).cell(),
                    given.text(manifest.get("coordinator"), 200) or "–",
                    given.text(manifest.get("purpose"), 200) or "–",
                    f"{total.out.times:,}",
                    blocks.size(total.out.bytes),
                    blocks.toned(f"{stopped:,}", blocks.BAD) if stopped else "0",
                    blocks.at(told.last),
                ]
            )
        if not rows:
            return blocks.section("Runs", blocks.text("No run has come to this site yet.", "empty"))
        heads = ["Run", "State", "Started by", "For", "#Uploads", "#Left this site", "#Stayed here", "Last entry"]
        return blocks.section("Runs", blocks.table("Runs, the newest first", heads, rows[:200]))

    def _allowed(self) -> Block:
        if self.policy is None:
            return blocks.section("What this site allows", blocks.text(self.unread, "bad"))
        file = blocks.text(f"From {self.rules}", "note")
        return blocks.section("What this site allows", blocks.items(self.policy.sentences()), file)

    # --- one run -----------------------------------------------------------------------------------------------------

    def _run(self, run: str, told: Told) -> Page:
        manifest, total, state = self._manifest(run), told.total, log_page.standing(told, self.chain)
        purpose, coordinator = (given.text(manifest.get(name), 200) for name in ("purpose", "coordinator"))
        about = [f"Started by {coordinator}, for {purpose}."] if purpose and coordinator else []
        most = self.policy.max_egress_round if self.policy else None
        moved = log_page.by_round(told, most, "Left this site", "Came in")
        rules = "An upload leaves where parts, max_rounds, hours, max_egress_round and max_egress_run all allow it."
        single = [log_page.payloads(told), blocks.text(rules, "note")] if told.uploads else []
        return page(
            kind="site-run",
            kicker=f"Run at the site {self.kit.name}",
            title=run,
            about=about,
            state=state.to_json(),
            lead=self._lead(total, "in this run"),
            tiles=[
                [blocks.size(total.out.bytes), f"left this site, to {self.kit.host}"],
                [f"{total.out.times:,}", "uploads"],
                [blocks.size(total.into.bytes), "came in"],
                [f"{total.stopped.times:,}", "uploads stayed here, by the policy"],
                [f"{len([n for n in told.rounds if n]):,}", "rounds"],
            ],
            sections=[
                blocks.section("What left, round by round", *moved),
                self._why(told, manifest),
                log_page.refusals("Refused and lost", {run: told}, "Nothing of this run was refused.", named=False),
                *([blocks.section("Upload by upload", *single)] if single else []),
            ],
            read=reading([self.chain]),
            back=True,
        )

    def _lead(self, total: Round, where: str) -> list[str]:
        """What left, and whether that is all."""
        many, size = blocks.count(total.out.times, "upload"), blocks.size(total.out.bytes)
        words = f"{size} left this site {where}, in {many}, all to the server {self.kit.address}."
        words = words if total.out.times else f"Nothing left this site {where}."
        if self.chain.bad is not None:
            line = self.chain.bad[0]
            return [
                f"The audit log is damaged from line {line:,} on: what left after that is not known.",
                f"Up to there: {words}",
            ]
        return [words if self.chain.at_end else f"The audit log is still being read. So far: {words}"]

    def _why(self, told: Told, manifest: Mapping[str, Any]) -> Block:
        """Which rules allowed it, and what is left of the budgets."""
        title, policy = "Why it was allowed", self.policy
        if policy is None:
            return blocks.section(title, blocks.text(self.unread, "bad"))
        if told.admitted == "refused":
            title = "What the policy says"
        same = told.policy == self.digest
        words = "These rules stand in the policy that was read when the run was admitted."
        if not same:
            words = (
                "The policy has changed since this run was admitted: these are its rules as they are now. The one that "
                f"was read then has the SHA-256 {told.policy or 'unknown'}."
            )
        return blocks.section(
            title,
            blocks.text(words, "note" if same else "bad"),
            _budget("Left in the run", told.total.out.bytes, policy.max_egress_run),
            _budget("Left in the round with the most", told.largest, policy.max_egress_round),
            blocks.table("Rule by rule", ["Rule of the policy", "It says", "This run"], _rules(policy, manifest, told)),
            blocks.text("The log has the size of an upload as a whole, not of each of its parts.", "note"),
        )


def _budget(label: str, used: int, most: int) -> Block:
    words = f"{blocks.size(used)} of {blocks.size(most)}; {blocks.size(max(0, most - used))} left"
    return blocks.bar(label, used, most, words)


def _rules(policy: Policy, manifest: Mapping[str, Any], told: Told) -> list[list[Cell]]:
    """Rule, what it says, what the run asks for; all of them had to hold."""
    asked = {name: given.text(manifest.get(name), 200) or "–" for name in ("coordinator", "purpose", "method")}
    sets, members = given.texts(manifest.get("data_sets")), given.texts(manifest.get("members"))
    rounds, modes = given.whole(manifest.get("rounds")), given.mapping(manifest.get("modes"))
    hours = "always" if isinstance(policy.hours, str) else ", ".join(policy.hours) or "never"
    required = [name for name in ("privacy", "secure", "encrypted") if getattr(policy.require, name) is not None]
    turned = max(told.rounds, default=0)
    return [
        ["coordinators", _names(policy.coordinators), asked["coordinator"]],
        ["purposes", _names(policy.purposes), asked["purpose"]],
        ["data_sets", _names(policy.data_sets), ", ".join(sets) or "–"],
        ["methods", _names(policy.methods), asked["method"]],
        ["max_rounds", f"{policy.max_rounds:,}", f"{rounds:,} asked for, {turned:,} seen" if rounds else "–"],
        ["max_clients", f"{policy.max_clients:,}", f"{len(members):,} members" if members else "–"],
        [
            "hours",
            hours if hours == "always" else f"{hours} UTC",
            "held against every request and upload",
        ],
        ["require", ", ".join(required) or "nothing", ", ".join(modes) or "no mode"],
        ["ops", _names(policy.ops), f"{told.total.into.times:,} requests came"],
        ["parts", _names(policy.parts), f"{told.total.out.times:,} uploads left"],
    ]


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"

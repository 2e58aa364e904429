"""Gate - what stands between the server's letters and a site's worker: the manifest, the site's policy, its audit log.

It lives in the process that FLARE started, beside the keeper, and not in the worker: a refused run starts no worker at
all, and a worker that is killed leaves neither a locked log nor a gap in it. It imports no torch; the worker says how
many bytes each part of an upload has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedLLMError
from fedllm.engine import durable
from fedllm.engine.nvflare.facts import SiteFacts
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.record import FILE, UNTOLD, ClientLost, Record, reference
from fedllm.engine.nvflare.trust import MANIFEST, Signed, checked, owner
from fedllm.sites.audit import Digest, Entry
from fedllm.sites.manifest import Manifest, ManifestError
from fedllm.sites.policy import Decision, Egress, Policy, PolicyRefused

FEDERATED, BASE, LOCAL = "federated", "base", "local"
"""Legs: the recipe's own method; what measures the base model; what trains each client alone."""
CENTRAL = "central"
"""All rows in one place: a leg at home, and never at a site."""
WORK, MEASURING = "work", ("evaluate", "evaluate_base")
"""Client-side functions: training, and what measures held-out rows (:data:`fedllm.core.guard.MEASURING`; that module
imports torch)."""
HIDING = ("privacy", "secure", "encrypted")
"""Modes whose promise would be void if the same rows were trained on in the open beside them."""
BEGUN = ("start", "resume")


@dataclass
class _Run:
    """A run that was accepted."""

    manifest: Manifest
    policy: Policy
    egress: Egress
    begun: bool


class Gate:
    """Decides what a site takes part in, answers and lets out, and writes it down.

    Args:
        kit: the site's folder.
        facts: the site's own file.

    Attributes:
        now: gives the time.
    """

    def __init__(self, kit: Path, facts: SiteFacts) -> None:
        self.kit, self.facts, self.site = kit, facts, owner(kit)
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.record = Record(kit / facts.folder / FILE, self.site)
        self._run: _Run | None = None
        self._ordered: dict[str, int] = {}
        self._marked: str | None = None

    def admit(self, meta: Mapping[str, Any]) -> str:
        """Accept a run before anything of it is done; gives the reference of the entry that says so.

        Raises:
            PolicyRefused: this site's policy does not allow it.
            ManifestError: not signed, changed, or for another run, recipe or site.
            ConfigError: a policy or a kit that cannot be read.
        """
        self._run, self._ordered, self._marked = None, {}, None
        peer, self.record.run = meta.get("audit"), str(meta["run"])
        policy = self._noted("policy", peer, lambda: self._policy(peer))
        entries = self.record.entries()
        manifest = self._noted("manifest", peer, lambda: self._manifest(meta, entries))
        self.record.note("manifest", payload=Digest.of(manifest.what()), decision="allowed", peer=peer)
        decision = policy.admits(manifest, self.now())
        self.record.note("policy", decision=decision.word, reason=decision.fault, peer=peer)
        decision.require()
        durable.write(self.kit / self.facts.folder / self.record.run / MANIFEST, Signed.of(meta["signed"]).manifest)
        before = any(entry.run == self.record.run and entry.action in BEGUN for entry in entries)
        self._run = _Run(manifest, policy.during(manifest), Egress.of(entries, self.record.run), before)
        return self.record.note("join", peer=peer)

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Raise :class:`ManifestError` where there are clients of a site that the manifest does not name."""
        strangers = sorted(set(meta["facts"]["home"].values()) - set(self._accepted().manifest.members))
        if strangers:
            raise ManifestError(f"The server counts '{strangers[0]}' among the sites, and the manifest does not.")

    def begun(self, meta: Mapping[str, Any], fingerprint: str | None) -> str:
        """The run begins here; raises :class:`ManifestError` where the base model is not the manifest's."""
        run = self._accepted()
        if run.manifest.model.fingerprint not in (None, fingerprint):
            raise ManifestError("The base model of this site is not the one in the manifest: its weights differ.")
        action, run.begun = "resume" if run.begun else "start", True
        return self.record.note(action, payload=Digest.of(run.manifest.what()), peer=meta.get("audit"))

    def leg(self, meta: Mapping[str, Any]) -> None:
        """Raise :class:`PolicyRefused` for a model that the manifest does not speak of; note what the server says."""
        run, leg = self._accepted(), meta["leg"]
        spoken = legs(run.manifest)
        if leg not in spoken:
            raise PolicyRefused(f"The server asks for '{leg}'.", f"The manifest speaks of {', '.join(spoken)}.")
        if leg not in (FEDERATED, BASE, LOCAL):
            run.policy.plays(leg).require()
        self._orders(leg, meta["orders"])
        mark = meta.get("checkpoint") or {}
        if reference(mark.get("audit")) not in (None, self._marked):
            self._marked = mark["audit"]
            self.record.note("checkpoint", round=mark["round"], peer=self._marked)

    def requests(self, letter: Letter) -> dict[str, Letter]:
        """Write down what is asked for, and give the answers to what the policy does not allow, by id."""
        run, refused, notes = self._accepted(), dict[str, Letter](), []
        digests = [Digest(one, len(blob)) for one, blob in zip(letter.digests, letter.blobs, strict=True)]
        for asked in letter.meta["requests"]:
            op = str(asked["op"])
            decision = run.policy.answers(op, asked["round"], self.now())
            if decision.allowed:
                decision = Decision(beside(run.manifest, letter.meta["leg"], op))
            about: dict[str, Any] = {"round": asked["round"], "client": asked["client"], "peer": asked.get("audit")}
            notes.append(self.record.made("receive", **about, payload=digests[asked["body"]]))
            notes.append(self.record.made("request", **about, decision=decision.word, reason=decision.fault))
            if decision.fault is not None:
                refused[asked["id"]] = no(asked, decision.reason, refused=True)
        self.record.notes(notes)
        return refused

    def upload(self, asked: Mapping[str, Any], reply: Letter) -> Letter:
        """What leaves: the reply of a client, or the reason why its upload stays here."""
        run, about = self._accepted(), {"round": asked["round"], "client": asked["client"], "peer": asked.get("audit")}
        meta = {name: value for name, value in reply.meta.items() if name != "parts"}
        if meta["body"] is None:
            self.record.note("lost", **about, reason=ClientLost(UNTOLD))
            return Letter(meta)
        body, known, parts = reply.blobs[meta["body"]], reply.digests[meta["body"]], dict(reply.meta["parts"])
        fault = run.policy.lets_out(run.egress, parts, asked["round"], self.now()).fault
        if fault is None and sum(parts.values()) != len(body):
            fault = PolicyRefused(f"An upload of {len(body):,} bytes has parts of {sum(parts.values()):,}.")
        word = "allowed" if fault is None else "refused"
        entry = self.record.note("send", **about, payload=Digest(known, len(body)), decision=word, reason=fault)
        if fault is not None:
            return Letter({**no(asked, str(fault), refused=True, cost=meta["cost"]).meta, "spent": meta.get("spent")})
        run.egress = run.egress.plus(asked["round"], len(body))
        return Letter({**meta, "audit": entry}, [body], [known])

    def lost(self, asked: Sequence[Mapping[str, Any]], reason: str) -> None:
        """Write down clients that could not be answered for."""
        fault = ClientLost(reason)
        self.record.notes(
            [
                self.record.made("lost", round=one["round"], client=one["client"], reason=fault, peer=one.get("audit"))
                for one in asked
            ]
        )

    def end(self, meta: Mapping[str, Any]) -> str | None:
        """The run is over here; another process may write the log."""
        entry = self.record.note("end", peer=meta.get("audit")) if self._run is not None else None
        self._run = None
        self.record.close()
        return entry

    def close(self) -> None:
        """The job is over."""
        self._run = None
        self.record.close()

    def _accepted(self) -> _Run:
        if self._run is None:
            raise PolicyRefused("This site has accepted no run.", "The server says hello first.")
        return self._run

    def _orders(self, leg: str, orders: Sequence[Mapping[str, Any]]) -> None:
        """Uploads that the server threw away."""
        new = [order for order in orders if order["n"] > self._ordered.get(leg, 0)]
        if new:
            self._ordered[leg] = max(order["n"] for order in new)
        dropped = [order for order in new if order["do"] == "drop"]
        self.record.notes([self.record.made("reject", client=o["client"], peer=o.get("audit")) for o in dropped])

    def _noted(self, action: str, peer: object, step: Callable[[], Any]) -> Any:
        """A step whose failure is a refusal, which is written down."""
        try:
            return step()
        except FedLLMError as fault:
            self.record.note(action, decision="refused", reason=fault, peer=peer)
            raise

    def _policy(self, peer: object) -> Policy:
        """The site's policy as it is now."""
        if self.facts.policy is None:
            raise PolicyRefused(
                "This site has no policy, so that nothing is allowed.",
                "A policy is a YAML file: coordinators, methods, purposes, data_sets, max_rounds, max_clients, hours, "
                "ops, parts, max_egress_run, max_egress_round.",
                action='Write one in the kit, and name it in local/fedllm.json: "policy": "local/policy.yaml".',
            )
        path = self.kit / self.facts.policy
        found = Policy.of(path)
        self.record.note("policy", payload=Digest.of(path.read_bytes()), peer=peer)
        return found

    def _manifest(self, meta: Mapping[str, Any], entries: Sequence[Entry]) -> Manifest:
        manifest = checked(Signed.of(meta.get("signed")), self.kit, self.record.run, meta["recipe"], self.now())
        if self.site not in manifest.members:
            raise ManifestError(
                f"The manifest does not name this site, '{self.site}'.", f"Members: {', '.join(manifest.members)}."
            )
        not_another(manifest, entries)
        return manifest


def legs(manifest: Manifest) -> tuple[str, ...]:
    """The models of a run: the recipe's own, and those with which it is compared, as its signed recipe says."""
    evaluation = manifest.recipe.get("evaluation") or {}
    return (FEDERATED, *(name for name in evaluation.get("against") or () if name != CENTRAL))


def beside(manifest: Manifest, leg: str, op: str) -> PolicyRefused | None:
    """Why a client-side function is not answered for a model of the run, whatever the policy says of the function.

    A mode protects what the recipe's own method trains. The base model is not trained; a client alone sends no
    parameters (:mod:`fedllm.methods.baseline.local`); any other model would be trained in the open on the same rows.
    """
    hiding = [mode for mode in HIDING if mode in manifest.modes]
    ops = {
        FEDERATED: (WORK, *MEASURING) if hiding else None,
        BASE: ("evaluate_base",),
        LOCAL: (WORK, *MEASURING),
    }.get(leg, MEASURING if hiding else None)
    if ops is None or op in ops:
        return None
    return PolicyRefused(
        f"The server asks for '{op}' of the model '{leg}'.",
        f"Answered{f' beside {hiding[0]}' if hiding else ''}: {', '.join(ops)}.",
        action="Ask who runs the server: fedllm's own does not ask for it.",
    )


def not_another(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """Raise :class:`ManifestError` where a run of this id began with another manifest, whenever that was signed."""
    said = Digest.of(manifest.what()).sha256
    for entry in entries:
        if entry.run == manifest.run and entry.action in BEGUN and entry.sha256 not in (None, said):
            raise ManifestError(
                f"The run '{manifest.run}' began on {entry.time[:10]} with another manifest.",
                "A run goes on with the manifest it began with.",
                action="Submit it under another id.",
            )


def no(asked: Mapping[str, Any], reason: str, refused: bool = False, cost: Mapping[str, float] | None = None) -> Letter:
    """The answer to a request without an upload."""
    names = {name: asked[name] for name in ("id", "client")}
    why = {"error": reason, "refused": refused}
    return Letter({"op": "reply", **names, **why, "session": None, "cost": dict(cost or {}), "body": None})

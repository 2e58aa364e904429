"""Program - a run across sites, from the first hello to the report; the server's process plays it.

The sites say hello, the ground is built without rows, and then the very code of a local run plays it, with an engine
that carries requests to the sites. The run's folder is named by the run's id and outlives the job, so a job that is
submitted again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedllm.blocks.asking import Asking
from fedllm.blocks.endpoint import EndpointSettings
from fedllm.core.errors import ConfigError, FedLLMError, ModeConflict, RunError
from fedllm.core.roster import ALL, SERVER
from fedllm.engine.folder import RunFolder
from fedllm.engine.local import LocalEngine
from fedllm.engine.nvflare import ground as grounds
from fedllm.engine.nvflare.engine import MISSES, FlareEngine, Post, Sites
from fedllm.engine.nvflare.facts import ServerFacts, SiteFacts, permitted
from fedllm.engine.nvflare.gate import not_another
from fedllm.engine.nvflare.parts import NAME, Letter
from fedllm.engine.nvflare.record import FILE, Record, SiteRefused, told
from fedllm.engine.nvflare.standing import Keep, Paused
from fedllm.engine.nvflare.trust import MANIFEST, Signed, checked, owner
from fedllm.sites.audit import AuditDamaged, AuditError, Digest, verify
from fedllm.sites.manifest import Manifest, ManifestError

SITES = "sites.json"
"""In a run's folder: what the sites told when the run began."""
ARRIVALS, BACK = 60, 24
"""So many times in a row a site may be silent before its first answer: its process is only just being started. Of a run
that goes on, fewer: it can go on without the site."""
ANCHOR = "audit.json"
"""In a run's folder: the last entry of the server's audit log when the last checkpoint was written."""
LEAVE = 10.0
"""Seconds given to the sites to hear that the run is over."""
CENTRAL = "central"
"""What a run is compared with at home and cannot be across sites: all data in one place."""


@dataclass(frozen=True)
class Job:
    """What a job asks for.

    Attributes:
        run: the run's id: names its folder.
        recipe: the resolved recipe.
        sites: the sites that take part.
        signed: its manifest, as :meth:`fedllm.engine.nvflare.trust.Signed.to_json` gives it.
        id: FLARE's id of the job, which its configuration does not say.
    """

    run: str
    recipe: dict[str, Any]
    sites: Sequence[str]
    signed: Mapping[str, str] | None = None
    id: str | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Job:
        """From a job's configuration; raises :class:`ConfigError` where it is none."""
        run, recipe, sites = facts.get("run"), facts.get("recipe"), facts.get("sites")
        if not isinstance(run, str) or not NAME.fullmatch(run):
            raise ConfigError(f"'{run}' is no id of a run.", "Allowed: letters, digits, '.', '_' and '-'.")
        if not isinstance(recipe, dict) or not isinstance(sites, list) or not sites:
            raise ConfigError("A job's configuration has no recipe or no sites.")
        return cls(run, recipe, [str(site) for site in sites], facts.get("signed"))


Mine = Callable[[Path], None]


def play(
    job: Job,
    post: Post,
    facts: ServerFacts,
    kit: Path,
    watch: Callable[[Any], Any] | None = None,
    mine: Mine | None = None,
) -> Any:
    """Play a job to its end (or go on with it) and return the result; see :func:`fedllm.run.play`.

    Args:
        job: what is asked for.
        post: carries letters to the sites.
        facts: the server's own file.
        kit: the server's folder.
        watch: given the class :class:`fedllm.run.Watch`, makes what is told of progress.
        mine: is told the run's folder once the job has shown that the run is its own: another may have its name.
    """
    sites = Sites(post, {site: site for site in job.sites})  # before anybody said who the clients are
    with Record((kit / facts.runs).parent / FILE, owner(kit)) as record:
        record.run, sites.record, sites.anchor = job.run, record, kit / facts.runs / job.run / ANCHOR
        try:
            result = _play(job, sites, facts, kit, watch, mine)
        except Exception as fault:
            reason = fault if isinstance(fault, FedLLMError) else RunError(f"{type(fault).__name__} at the server.")
            _stand(sites, reason)
            _end(sites, reason)
            raise
        _stand(sites, None)
        _end(sites, None)
        return result


def _stand(sites: Sites, reason: FedLLMError | None) -> None:
    """Write down whether the run may go on by itself. One that was aborted stays as it is: FLARE knows by whom."""
    if sites.standing is None or (reason is not None and sites.post.over() is not None):
        return
    if reason is None:
        sites.standing.end("finished")
        return
    due = isinstance(reason, RunError) and not isinstance(reason, AuditError)  # a log does not mend with the sites
    waits = isinstance(reason, Paused) or (due and bool(sites.standing.now.lost))
    sites.standing.end("waiting" if waits else "failed", str(reason))


def _play(
    job: Job, sites: Sites, facts: ServerFacts, kit: Path, watch: Callable[[Any], Any] | None, mine: Mine | None
) -> Any:
    run = grounds.play()
    manifest, entry = _checked(sites, job, kit)
    place = kit / facts.runs / job.run
    sites.quorum, sites.standing = manifest.quorum, Keep(place, job.sites, manifest.quorum, job.id)
    if mine is not None:
        mine(place)
    recipe = _allowed(run, job.recipe, facts)
    asked, recipe = recipe, _across(recipe)
    possible(recipe)
    outward(run.method_of(recipe), facts)
    before = _before(place)
    public = _public(run, facts, recipe)
    facts_of, notes = _hello(sites, job, entry, before is not None)
    joined = _as_before(place, before, grounds.joined(facts_of, grounds.public_mark(public)), facts_of)
    sites.home = joined["home"]
    ground = run.prepare(recipe, grounds.federation(run, joined, None, public), grounds.Near(None))
    ground.warnings += [*notes, *_left_out(asked, recipe)]
    _begin(sites, joined, ground.learner.loaded.fingerprint, entry, before is not None)
    sites.note("resume" if (place / ANCHOR).is_file() else "start", payload=Digest.of(manifest.what()))
    folder = _folder(run, place, recipe, ground, joined)
    folder.write_text(MANIFEST, Signed.of(job.signed).manifest.decode())
    coded = run.codec_of(recipe) is not None

    def own(leg: str, method: Any) -> LocalEngine:
        worker = ground.worker(method, folder.private(leg), False, ground.guard if leg == run.FEDERATED else None)
        return LocalEngine(worker, [SERVER], ground.width)

    def remote(leg: str, method: Any) -> Any:
        guard = ground.guard.private if leg == run.FEDERATED else ()
        kept = bool(method.private or guard or coded)
        hears = ground.guard if leg == run.FEDERATED else None
        hurried = recipe.spare > 0 and leg == run.FEDERATED
        engine = FlareEngine(sites, leg, lambda c: ground.roster.get(c, ALL), kept, own(leg, method), hears, hurried)
        return engine, engine.stores

    ground.remote = remote
    return run.play(ground, folder, _pausing(watch(run.Watch) if watch else run.Watch(), sites.standing))


def _pausing(watch: Any, standing: Keep) -> Any:
    """What is told of progress, with the rounds counted and a wish for a pause heard."""
    told = watch.round

    def round(name: str, record: Any, values: Any) -> None:
        told(name, record, values)
        standing.round()

    watch.round = round
    return watch


def _checked(sites: Sites, job: Job, kit: Path) -> tuple[Manifest, str | None]:
    """The run's manifest and the entry that says that it is right.

    Raises:
        ManifestError: it is not.
        AuditDamaged: the server's log is not the one that the run's last checkpoint knew.
    """
    record = sites.record
    entries = record.entries() if record is not None else []
    try:
        if record is not None and sites.anchor is not None and sites.anchor.is_file():
            verdict = verify(record.path, json.loads(sites.anchor.read_text(encoding="utf-8"))["last"])
            if not verdict.intact:
                raise AuditDamaged(
                    f"The audit log is not the one that the last checkpoint of '{job.run}' knew: {verdict.why}.",
                    action="Find out who changed it; the run can be submitted under another id.",
                )
        manifest = checked(Signed.of(job.signed), kit, job.run, job.recipe)
        if sorted(job.sites) != sorted(manifest.members):
            raise ManifestError("The sites of the job are not the members in its manifest.")
        not_another(manifest, entries)
    except FedLLMError as fault:
        sites.note("manifest", decision="refused", reason=fault)
        raise
    return manifest, sites.note("manifest", payload=Digest.of(manifest.what()), decision="allowed")


def _end(sites: Sites, reason: FedLLMError | None) -> None:
    """The run is over: the sites are told, and who has heard it in time is written down."""
    entry = sites.note("end", reason=reason)
    heard: queue.Queue[tuple[str, Letter | str]] = queue.Queue()
    there = [site for site in sites.names if site not in sites.lost]
    if not sites.greeted or sites.post.over() is not None:
        there = []
    letter = Letter({"op": "end", "audit": entry})
    takers = {s: sites.post.send(s, letter, lambda answer, s=s: heard.put((s, answer))) for s in there}
    until = time.monotonic() + LEAVE
    while takers and (left := until - time.monotonic()) > 0:
        try:
            site, answer = heard.get(timeout=left)
        except queue.Empty:
            break
        takers.pop(site, None)
        if isinstance(answer, Letter):
            sites.note("leave", peer=answer.meta.get("audit"), actor=site)
    for take_back in takers.values():
        take_back()


def _allowed(run: Any, asked: dict[str, Any], facts: ServerFacts) -> Any:
    """The job's recipe with the server's own models and device, and no trackers.

    Raises:
        ConfigError: a model or foreign code that the server's own file does not allow.
    """
    run.load_recipe(asked)  # what is no recipe is refused in words of recipes
    own = SiteFacts.model_validate(
        {
            "data": asked.get("data", {}),
            "device": facts.device,
            "models": facts.models,
            "trust_remote_code": facts.trust_remote_code,
        }
    )
    return run.load_recipe(permitted(asked, own))


def outward(method: BaseModel, facts: ServerFacts) -> None:
    """Raise :class:`ConfigError` for a method that has the server ask a host or write a file by a job's word alone."""
    for part in _parts(method):
        if isinstance(part, Asking) and part.cache is not None:
            raise ConfigError(
                f"The job names the file '{part.cache}' (asking.cache), which the server would write.",
                "A server writes no file that a job names.",
                action="Leave asking.cache out.",
            )
        if isinstance(part, EndpointSettings):
            _listed(part, facts)


def _listed(asked: EndpointSettings, facts: ServerFacts) -> None:
    """Raise :class:`ConfigError` for an endpoint, or a key, that the server's own file does not name."""
    known = {url.rstrip("/"): key for url, key in facts.endpoints.items()}
    url = asked.url.rstrip("/")
    shown = url.rpartition("@")[2][:100]
    if url in known and asked.key_env in (None, known[url]):
        return
    key = f" with the key in {asked.key_env}" if asked.key_env else ""
    listed = ", ".join(f"{one} (key: {name or 'none'})" for one, name in sorted(known.items()))
    raise ConfigError(
        f"The job has the server ask '{shown}'{key}, and the server's own file does not allow it.",
        f"Allowed: {listed or 'no endpoint'}.",
        action="Leave asking.endpoint out, or have it listed in the server's local/fedllm.json: endpoints.",
    )


def _parts(found: BaseModel) -> Iterator[BaseModel]:
    """Settings in settings, at any depth."""
    for name in type(found).model_fields:
        value = getattr(found, name)
        if isinstance(value, BaseModel):
            yield value
            yield from _parts(value)


def _across(recipe: Any) -> Any:
    """The recipe as it can be played across sites: nothing is compared with all data in one place."""
    against = [name for name in recipe.evaluation.against if name != CENTRAL]
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"against": against})})


def possible(recipe: Any) -> None:
    """Raise :class:`ModeConflict` for what cannot be across sites: rows of all in one place, or a secret of all."""
    if dict(recipe.method).get("name") == CENTRAL:
        raise ModeConflict(
            "The method central trains on the rows of all clients in one place.",
            "Across sites rows stay where they are.",
            "fedavg",
            "Choose a federated method.",
        )
    if recipe.encrypted is not None and recipe.encrypted.keys == "shared":
        raise ModeConflict(
            "encrypted.keys=shared is given, and one secret key is for all clients.",
            "Across sites nobody but the server could bring it to them.",
            "threshold",
            "Set encrypted.keys=threshold, or use the section 'secure' in its place.",
        )


def _left_out(asked: Any, recipe: Any) -> list[str]:
    if len(asked.evaluation.against) == len(recipe.evaluation.against):
        return []
    return ["The run is not compared with 'central', for which all rows would have to lie in one place."]


def _public(run: Any, facts: ServerFacts, recipe: Any) -> Sequence[Mapping[str, Any]]:
    """The server's public rows; none where its file names none."""
    if facts.public is None:
        return ()
    alone = {"by": "iid", "clients": 1}
    data = {**facts.public, "partition": alone, "evaluation": {"fraction": 0.0}}
    found = run.Federation.build(run.load_recipe({"data": data}).data, recipe.seed)
    return found.rows(found.client_ids[0])


def _hello(sites: Sites, job: Job, entry: str | None, begun: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What every site tells; raises :class:`RunError` where one does not answer or runs another version.

    A run that has begun goes on without such a site, as long as enough are left.
    """
    versions = grounds.versions()
    facts = {"run": job.run, "recipe": job.recipe, "signed": job.signed, "audit": entry}
    letter = Letter({"op": "hello", **facts, "versions": versions})
    sites.greeted = True
    answers = _all(sites, {site: letter for site in job.sites}, BACK if begun else ARRIVALS, begun)
    notes = [f"{site} is not there: {reason.rstrip('.')}." for site, reason in sorted(sites.lost.items())]
    for site, answer in answers.items():
        other = [f"{n} {v}" for n, v in answer.meta["versions"].items() if n != "protocol" and versions.get(n) != v]
        if other:
            notes.append(f"{site} runs {', '.join(other)}, other than the server: the last bits may differ.")
    return {site: answer.meta for site, answer in answers.items()}, notes


def _begin(sites: Sites, joined: Mapping[str, Any], fingerprint: str | None, entry: str | None, begun: bool) -> None:
    """Every site prepares the ground for all clients."""
    letter = Letter({"op": "begin", "facts": dict(joined), "fingerprint": fingerprint, "audit": entry})
    _all(sites, {site: letter for site in sites.names if site not in sites.lost}, begun=begun)


def _all(sites: Sites, letters: Mapping[str, Letter], misses: int = MISSES, begun: bool = False) -> dict[str, Letter]:
    """The answers of all sites; raises :class:`RunError` naming every site that did not give one.

    Of a run that has begun, sites without an answer are lost instead, as long as enough are left; one whose policy or
    data says no is not waited for.
    """
    answers = sites.ask(letters, misses)
    for site, answer in sorted(answers.items()):
        _joined(sites, site, answer)
    wrong = {
        site: answer if isinstance(answer, str) else str(answer.meta.get("reason"))
        for site, answer in sorted(answers.items())
        if isinstance(answer, str) or answer.op == "error"
    }
    if begun and len(letters) - len(wrong) >= sites.quorum:
        for site, reason in wrong.items():
            answer = answers[site]
            sites.lose(site, reason, returns=isinstance(answer, str) or bool(answer.meta.get("died")))
    elif wrong:
        raise RunError(
            " ".join(f"{site}: {reason.rstrip('.')}." for site, reason in wrong.items()),
            "Nothing was trained.",
            action="Mend the cause at the site and submit the run again, or submit it without the site.",
        )
    return {site: answer for site, answer in answers.items() if isinstance(answer, Letter) and site not in wrong}


def _joined(sites: Sites, site: str, answer: Letter | str) -> None:
    """Write down that a site takes part, or why not."""
    if isinstance(answer, str):
        sites.note("lost", reason=SiteRefused(answer), actor=site)
        return
    peer = answer.meta.get("audit")
    if answer.op == "hello":
        sites.note("join", decision="allowed", peer=peer, actor=site)
    elif answer.op == "error":
        reason = told(answer.meta.get("refused"), str(answer.meta.get("reason")))
        sites.note("join", decision="refused", reason=reason, peer=peer, actor=site)


def _before(place: Path) -> dict[str, Any] | None:
    """What the sites told when a run began; None: it has not."""
    file = place / SITES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _as_before(
    place: Path, before: dict[str, Any] | None, joined: dict[str, Any], there: Mapping[str, Any]
) -> dict[str, Any]:
    """What the sites tell now; raises :class:`RunError` where a run that goes on began with other clients."""
    if before is None:
        return joined
    home = {client: site for client, site in before["home"].items() if site in there}
    clients = {client: sizes for client, sizes in before["clients"].items() if client in home}
    known = before["labels"] if len(home) == len(before["home"]) else joined["labels"]
    for what, then in (("clients", clients), ("home", home), ("labels", known)):
        if then != joined[what]:
            raise RunError(
                f"The {'sites' if what == 'home' else what} are not those that run '{place.name}' began with.",
                action="Bring the sites back to what they were, or submit a new run under another id.",
            )
    return before


def _folder(run: Any, place: Path, recipe: Any, ground: Any, joined: Mapping[str, Any]) -> RunFolder:
    """The run's folder: a new one, or that of the run that goes on."""
    if (place / "recipe.yaml").is_file():
        folder = RunFolder.open(place)
        if (place / "recipe.yaml").read_text(encoding="utf-8") != recipe.to_yaml():
            raise RunError(
                f"{place} holds a run of another recipe.", action="Submit the new recipe under another run id."
            )
        run.same_ground(folder, ground)
        return folder
    folder = RunFolder.create(place)
    folder.write_json(SITES, dict(joined))
    folder.write_json("environment.json", run.environment(ground))
    folder.write_json("partition.json", _partition(ground.federation))
    folder.write_text("recipe.yaml", recipe.to_yaml())  # last: it says that the folder is whole
    return folder


def _partition(federation: Any) -> dict[str, Any]:
    """What is known of the clients' data here: sizes."""
    clients = {
        client: {"name": federation.names[client], **{s: federation.size(client, s) for s in grounds.SPLITS}}
        for client in federation.client_ids
    }
    sizes = [one["train"] for one in clients.values()]
    total = {split: sum(one[split] for one in clients.values()) for split in grounds.SPLITS}
    return {
        "clients": {client: {**one, "characters": None, "labels": None} for client, one in clients.items()},
        "total": {"clients": len(clients), **total, "characters": None},
        "mean": sum(sizes) / len(sizes),
        "smallest": min(sizes),
        "largest": max(sizes),
        "ratio": max(sizes) / min(sizes) if min(sizes) else None,
        "gini": None,
        "heterogeneity": None,
        "label_column": federation.label_column,
        "warnings": list(federation.warnings),
    }

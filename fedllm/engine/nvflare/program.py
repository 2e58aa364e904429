"""Program - a run across sites, from the first hello to the report; the server's process plays it.

The sites say hello, the ground is built without rows, and then the very code of a local run plays it, with an engine
that carries requests to the sites. The run's folder is named by the run's id and outlives the job, so a job that is
submitted again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, ModeConflict, RunError
from fedllm.core.roster import ALL
from fedllm.engine.folder import RunFolder
from fedllm.engine.nvflare import ground as grounds
from fedllm.engine.nvflare.engine import MISSES, FlareEngine, Post, Sites
from fedllm.engine.nvflare.facts import ServerFacts, own_model
from fedllm.engine.nvflare.parts import NAME, Letter

SITES = "sites.json"
"""In a run's folder: what the sites told when the run began."""
ARRIVALS = 60
"""So many times in a row a site may be silent before its first answer: its process is only just being started."""
CENTRAL = "central"
"""What a run is compared with at home and cannot be across sites: all data in one place."""


@dataclass(frozen=True)
class Job:
    """What a job asks for.

    Attributes:
        run: the run's id: names its folder.
        recipe: the resolved recipe.
        sites: the sites that take part.
    """

    run: str
    recipe: dict[str, Any]
    sites: Sequence[str]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Job:
        """From a job's configuration; raises :class:`ConfigError` where it is none."""
        run, recipe, sites = facts.get("run"), facts.get("recipe"), facts.get("sites")
        if not isinstance(run, str) or not NAME.fullmatch(run):
            raise ConfigError(f"'{run}' is no id of a run.", "Allowed: letters, digits, '.', '_' and '-'.")
        if not isinstance(recipe, dict) or not isinstance(sites, list) or not sites:
            raise ConfigError("A job's configuration has no recipe or no sites.")
        return cls(run, recipe, [str(site) for site in sites])


def play(job: Job, post: Post, facts: ServerFacts, kit: Path, watch: Callable[[Any], Any] | None = None) -> Any:
    """Play a job to its end (or go on with it) and return the result; see :func:`fedllm.run.play`.

    Args:
        job: what is asked for.
        post: carries letters to the sites.
        facts: the server's own file.
        kit: the server's folder.
        watch: given the class :class:`fedllm.run.Watch`, makes what is told of progress.
    """
    run = grounds.play()
    recipe = run.load_recipe({**job.recipe, "model": _model(job.recipe, facts)})
    asked, recipe = recipe, _across(recipe)
    possible(recipe)
    run.method_of(recipe)
    place = kit / facts.runs / job.run
    sites = Sites(post, {site: site for site in job.sites})  # before anybody said who the clients are
    public = _public(run, facts, recipe)
    told, notes = _hello(sites, job, grounds.public_mark(public))
    joined = _as_before(place, grounds.joined(told, grounds.public_mark(public)))
    sites = Sites(post, joined["home"])
    ground = run.prepare(recipe, grounds.federation(run, joined, None, public), grounds.Near(None))
    ground.warnings += [*notes, *_left_out(asked, recipe)]
    _begin(sites, joined, ground.learner.loaded.fingerprint)
    coded = run.codec_of(recipe) is not None

    def remote(leg: str, method: Any) -> Any:
        guard = ground.guard.private if leg == run.FEDERATED else ()
        engine = FlareEngine(sites, leg, lambda c: ground.roster.get(c, ALL), bool(method.private or guard or coded))
        return engine, engine.stores

    ground.remote = remote
    return run.play(ground, _folder(run, place, recipe, ground, joined), watch(run.Watch) if watch else run.Watch())


def _model(recipe: Mapping[str, Any], facts: ServerFacts) -> dict[str, Any]:
    return own_model(dict(recipe.get("model", {})), facts.models, facts.device, facts.trust_remote_code)


def _across(recipe: Any) -> Any:
    """The recipe as it can be played across sites: nothing is compared with all data in one place."""
    against = [name for name in recipe.evaluation.against if name != CENTRAL]
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"against": against})})


def possible(recipe: Any) -> None:
    """Raise :class:`ModeConflict` for a mode in which server and clients share what nothing brings across."""
    if recipe.encrypted is not None:
        raise ModeConflict(
            "The section 'encrypted' is given, and its clients share one secret key.",
            "Across sites there is no way yet to bring them that key without the server.",
            "secure",
            "Use the section 'secure' in its place.",
        )
    if recipe.privacy is not None and recipe.privacy.level == "example":
        raise ModeConflict(
            "privacy.level=example is given, and what a client has spent is counted at its site alone.",
            "Across sites the server could neither report the budget nor stop the run in time.",
            "client",
            "Set privacy.level=client.",
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


def _hello(sites: Sites, job: Job, mine: str | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What every site tells; raises :class:`RunError` where one does not answer or runs another version."""
    versions = grounds.versions()
    letter = Letter({"op": "hello", "run": job.run, "recipe": job.recipe, "versions": versions})
    answers = _all(sites, {site: letter for site in job.sites}, ARRIVALS)
    notes = []
    for site, answer in answers.items():
        other = [f"{n} {v}" for n, v in answer.meta["versions"].items() if n != "protocol" and versions.get(n) != v]
        if other:
            notes.append(f"{site} runs {', '.join(other)}, other than the server: the last bits may differ.")
    return {site: answer.meta for site, answer in answers.items()}, notes


def _begin(sites: Sites, joined: Mapping[str, Any], fingerprint: str | None) -> None:
    """Every site prepares the ground for all clients."""
    letter = Letter({"op": "begin", "facts": dict(joined), "fingerprint": fingerprint})
    _all(sites, {site: letter for site in sites.names})


def _all(sites: Sites, letters: Mapping[str, Letter], misses: int = MISSES) -> dict[str, Letter]:
    """The answers of all sites; raises :class:`RunError` naming every site that did not give one."""
    answers = sites.ask(letters, misses)
    wrong = {
        site: answer if isinstance(answer, str) else str(answer.meta.get("reason"))
        for site, answer in sorted(answers.items())
        if isinstance(answer, str) or answer.op == "error"
    }
    if wrong:
        raise RunError(
            " ".join(f"{site}: {reason.rstrip('.')}." for site, reason in wrong.items()),
            "Nothing was trained.",
            action="Mend the cause at the site and submit the run again, or submit it without the site.",
        )
    return {site: answer for site, answer in answers.items() if isinstance(answer, Letter)}


def _as_before(place: Path, joined: dict[str, Any]) -> dict[str, Any]:
    """What the sites tell now; raises :class:`RunError` where a run that goes on began with other clients."""
    file = place / SITES
    if not file.is_file():
        return joined
    before = json.loads(file.read_text(encoding="utf-8"))
    for what in ("clients", "home", "labels"):
        if before[what] != joined[what]:
            raise RunError(
                f"The {'sites' if what == 'home' else what} are not those that run '{place.name}' began with.",
                action="Bring the sites back to what they were, or submit a new run under another id.",
            )
    return joined


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

"""Attack - attackers against defences, over methods: what attackers reach, and what a defence costs without any.

Every cell of the grid is one run of the recipe with one attack (or none), one defence (or none) and one method, over
the same clients, batches and rounds. Where an attack has a goal of its own (a backdoor), its success is the score of
the final model on held-out rows that carry the trigger and the attacker's answer; it is measured without the attack,
too. An observer changes nothing that is measured: its cell is one observed round, and its success how near what it
read is to the rows of the clients it watched (see :mod:`fedllm.observe`).

Beside defences the columns may be modes: `privacy`, `secure`, `encrypted`, with their options in the recipe's section
`methods`. Any name may stand for another one with options: `methods: {encrypted-10: {name: encrypted, ratio: 0.1}}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.method import Method
from fedllm.core.seeds import numpy_stream
from fedllm.core.server import Server
from fedllm.core.settings import read
from fedllm.engine.folder import RunFolder
from fedllm.engine.local import LocalEngine
from fedllm.engine.rounds import evaluate
from fedllm.evaluate import total
from fedllm.modes.attacks import Attack, attacks
from fedllm.modes.defences import defences
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.observers import Observer, observers
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.modes.robust import named
from fedllm.modes.secagg.settings import SecureSettings
from fedllm.observe import observed
from fedllm.recipe import Recipe, load_recipe
from fedllm.report.chart import heat_map
from fedllm.report.words import NAMES, value_text
from fedllm.run import (
    Data,
    Ground,
    Leg,
    Pooled,
    Watch,
    environment,
    ground_of,
    guard_of,
    headline,
    kept_folder,
    method_of,
    prepare,
    same_ground,
)

if TYPE_CHECKING:
    from fedllm.engine.private import PrivateStore

NONE = "none"
"""No attack, or no defence."""
MODES: dict[str, Any] = {"privacy": PrivacySettings, "secure": SecureSettings, "encrypted": EncryptedSettings}
"""Sections of a recipe that may stand where a defence does."""


@dataclass(frozen=True)
class Siege:
    """What was found.

    Attributes:
        folder: where attack.json, attack.md and the pictures lie.
        metric: the score's name.
        rows: one per method, attack and defence: score, lost (against neither attack nor defence), success, clean
            success (of the same defence without the attack; of an observer, without the upload), dropped (uploads
            that the defence left out whole), read (all scores of an observer), note (why there are none).
    """

    folder: Path
    metric: str
    rows: list[dict[str, Any]]


def siege(
    recipe: str | Path | dict[str, Any] | Recipe,
    attacked: Sequence[str],
    defended: Sequence[str] = (NONE,),
    methods: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    data: Data | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
) -> Siege:
    """Play every method with every attack (and none) under every defence (and none).

    Args:
        recipe: as for :func:`fedllm.run`. Its section `methods` holds options of attacks and defences by name, too.
        attacked: names of attacks and observers.
        defended: names of defences and modes.
        methods: keys; the recipe's method where there is none.
        overrides: `key=value` texts.
        data: data in memory.
        folder: where results are kept; an interrupted grid in it is continued.
        watch: is told what happens.

    Raises:
        ConfigError: an unknown name, or a recipe with an attack or a defence of its own.
        ModeConflict: a method that an attack, a defence or a mode cannot go with. An attack that cannot go with one of
            the columns is a cell with a note.
    """
    settled, watch = load_recipe(recipe, overrides), watch or Watch()
    if settled.attack or settled.defence:
        raise ConfigError(
            "The recipe has an attack or a defence of its own.", "The grid sets both.", action="Remove them."
        )
    _apart(settled, defended)
    keys = list(methods) or [str(settled.method.get("name", "fedavg"))]
    rows = [NONE, *(name for name in dict.fromkeys(attacked) if name != NONE)]
    columns = [NONE, *(name for name in dict.fromkeys(defended) if name != NONE)]
    known = {name: named("attack", {**attacks(), **observers()}, _with(settled, name)) for name in rows[1:]}
    for name, one in known.items():
        if isinstance(one, Observer) and one.kinds and settled.task.kind not in one.kinds:
            raise ConfigError(
                f"The observer '{name}' does not work on task.kind={settled.task.kind}.",
                f"Allowed: {', '.join(one.kinds)}.",
                action="Leave it out, or choose another recipe.",
            )
    for name in columns[1:]:
        protected(settled, name)
    place = kept_folder(settled, folder, "attack")
    with prepare(settled, data) as ground:
        same_ground(place, ground)
        place.write_json("environment.json", environment(ground))
        watch.begin(settled, ground, place.path)
        metric, found = headline(ground), list[dict[str, Any]]()
        for key in keys:
            method = method_of(settled, key)
            if not isinstance(method, Method):
                raise ConfigError(f"{key} is a protocol.", "Attacks and defences go with methods.", "fedavg")
            with ground_of(ground, method, data) as own:
                found += _grid(own, method, known, (rows, columns), place, watch)
    table = _related(found, ground.learner.higher_is_better)
    place.write_json("attack.json", {"metric": metric, "rows": table})
    place.write_text("attack.md", to_markdown(table, metric))
    for name, drawing in pictures(table, metric).items():
        place.write_text(f"{name}.svg", drawing)
    return Siege(place.path, metric, table)


def _with(recipe: Recipe, name: str) -> dict[str, Any]:
    """An attack or defence with its options in the recipe."""
    return {"name": name, **recipe.methods.get(name, {})}


def _apart(recipe: Recipe, defended: Sequence[str]) -> None:
    """Refuse a recipe with a section of its own that a column sets as well."""
    columns = {str(_with(recipe, name)["name"]) for name in defended}
    both = next((name for name in MODES if name in columns and getattr(recipe, name) is not None), None)
    if both is not None:
        what = f"The recipe has a section '{both}', and the grid sets it."
        raise ConfigError(what, action=f"Move its options to methods.{both}.")


def protected(recipe: Recipe, defence: str) -> Recipe:
    """The recipe with a defence, or with a mode in the place of one.

    Raises:
        ConfigError: an unknown name or option.
    """
    if defence == NONE:
        return recipe
    chosen = _with(recipe, defence)
    name, options = chosen["name"], {key: value for key, value in chosen.items() if key != "name"}
    if name in MODES:
        return recipe.model_copy(update={name: read(MODES[name], options, name)})
    named("defence", {**defences(), **MODES}, chosen)
    return recipe.model_copy(update={"defence": chosen})


def _grid(
    ground: Ground,
    method: Method,
    known: Mapping[str, Attack | Observer],
    sides: tuple[Sequence[str], Sequence[str]],
    place: RunFolder,
    watch: Watch,
) -> list[dict[str, Any]]:
    """The cells of one method: `sides` are attacks and observers, and defences and modes."""
    (rows, columns), key, metric, found = sides, method.key, headline(ground), list[dict[str, Any]]()
    refused = _refused(ground, method, known, columns)
    for defence in columns:
        for name in rows:
            one = known.get(name)
            if (name, defence) in refused:
                found.append(_empty(key, name, defence, refused[name, defence]))
                continue
            if isinstance(one, Observer):
                found.append(_watched(ground, method, one, (key, name, defence), place, watch))
                continue
            leg = _played(ground, method, name, defence, place, watch)
            success = {goal: _success(leg, ground, known[goal], metric) for goal in _goals(known, name)}
            value = leg.ground.learner.values(total(leg.counts.values())).get(metric) if leg.counts else None
            dropped = (leg.server.guard.told() or {}).get("dropped", [])
            cell = _empty(key, name, defence)
            found.append({**cell, "score": value, "reached": success, "dropped": list(dropped)})
    return found


def _watched(
    ground: Ground, method: Method, observer: Observer, cell: tuple[str, str, str], place: RunFolder, watch: Watch
) -> dict[str, Any]:
    """One cell of an observer; what was found before an interruption is kept."""
    key, name, defence = cell
    file = f"read-{key}-{name}-{defence}.json"
    watch.leg(f"{key}-{name}-{defence}", observer.round, 0)
    found = place.read_json(file)
    if found is None:
        if watch.stop:
            raise KeyboardInterrupt
        found = observed(replace(ground, recipe=protected(ground.recipe, defence)), method, observer).to_json()
        place.write_json(file, found)
    return {**_empty(key, name, defence), "reached": {name: found["success"]}, **found}


def _empty(method: str, attack: str, defence: str, note: str = "") -> dict[str, Any]:
    """A cell of which nothing is known, and why."""
    cell = {"method": method, "attack": attack, "defence": defence}
    return {**cell, "score": None, "dropped": [], "reached": {}, "note": note}


def _refused(
    ground: Ground, method: Method, known: Mapping[str, Attack | Observer], columns: Sequence[str]
) -> dict[tuple[str, str], str]:
    """The cells that cannot be played, with the reason; asked before anything is trained.

    Raises:
        ModeConflict: a method that does not go with an attack, or with a column, at all.
    """
    found: dict[tuple[str, str], str] = {}
    for defence in columns:
        _guarded(ground, method, NONE, defence)
        for name in (name for name, one in known.items() if isinstance(one, Attack)):
            try:
                _guarded(ground, method, name, defence)
            except ModeConflict as fault:
                if defence == NONE:
                    raise
                found[name, defence] = f"{name} under {defence}: {fault}"
    return found


def _guarded(ground: Ground, method: Method, attack: str, defence: str) -> tuple[Recipe, Guard]:
    """The recipe of one cell, and its guard."""
    settled = protected(ground.recipe, defence)
    if attack != NONE:
        settled = settled.model_copy(update={"attack": _with(ground.recipe, attack)})
    cohort = settled.cohort_size(len(ground.federation.client_ids))
    return settled, guard_of(settled, ground.federation, method, cohort)


def _played(ground: Ground, method: Method, attack: str, defence: str, place: RunFolder, watch: Watch) -> Leg:
    """One cell, to its end."""
    settled, guard = _guarded(ground, method, attack, defence)
    ground = replace(ground, recipe=settled)
    leg = Leg(f"{method.key}-{attack}-{defence}", method, ground, place, watch, guard=guard)
    if not asyncio.run(leg.play()):
        raise KeyboardInterrupt
    return leg


def _goals(known: Mapping[str, Attack | Observer], played: str) -> list[str]:
    """The attacks whose goal is measured: the one that was played, or all where none was."""
    aimed = [name for name, one in known.items() if isinstance(one, Attack) and type(one).aimed is not Attack.aimed]
    return [name for name in aimed if played in (NONE, name)]


class _Aimed(Pooled):
    """The federation with held-out rows as an attacker wants them answered."""

    def __init__(self, ground: Ground, attack: Attack) -> None:
        super().__init__(ground.federation)
        self.attack, self.seed = attack, ground.recipe.seed

    def rows(self, client_id: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
        held = super().rows(client_id, split)
        if split == "train":
            return held
        return self.attack.aimed(held, numpy_stream(self.seed, "aimed", client_id)) or []

    def size(self, client_id: str, split: str = "train") -> int:
        return len(self.rows(client_id, split))


def _success(leg: Leg, ground: Ground, attack: Attack, metric: str) -> float | None:
    """The score of a leg's last state on the rows that an attack is aimed at."""
    aimed = _Aimed(ground, attack)
    worker = ground.worker(leg.method)
    worker.rows, worker.private = aimed, cast("PrivateStore", leg.stores)  # what clients keep is part of their models
    clients = [client for client in ground.measured if aimed.size(client, "eval")]
    server = Server(LocalEngine(worker, ground.federation.client_ids, ground.width), ground.recipe.seed)
    counts = asyncio.run(evaluate(leg.method, leg.state, server, clients))
    return ground.learner.values(total(counts.values())).get(metric) if counts else None


def _related(found: Sequence[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """Every cell held to the cells that say what it means."""
    by_name = {(cell["method"], cell["attack"], cell["defence"]): cell for cell in found}
    rows = []
    for cell in found:
        method, attack, defence = cell["method"], cell["attack"], cell["defence"]
        quiet, bare = by_name[method, NONE, defence], by_name[method, NONE, NONE]
        usual, score = bare["score"], cell["score"]
        lost = None if usual is None or score is None else (usual - score) * (1 if higher else -1)
        rows.append(
            {
                **{name: value for name, value in cell.items() if name not in ("reached", "without")},
                "lost": lost,
                "success": cell["reached"].get(attack),
                "clean success": cell["without"] if "read" in cell else quiet["reached"].get(attack),
            }
        )
    return rows


def to_markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The table for a docs page."""
    head = [
        "method",
        "attack",
        "defence",
        NAMES.get(metric, metric),
        "lost",
        "attacker's success",
        "without the attack",
    ]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        lines.append(" | ".join([row["method"], row["attack"], row["defence"], *cells(row, metric)]))
    tables = ["\n".join(f"| {line} |" for line in lines) + "\n"]
    watched = [row for row in rows if "read" in row]
    names = list(dict.fromkeys(name for row in watched for name in row["read"]))
    if names:
        lines = [" | ".join(["method", "observer", "defence", *names]), " | ".join(["---"] * (3 + len(names)))]
        for row in watched:
            shown = [share_text(row["read"].get(name)) for name in names]
            lines.append(" | ".join([row["method"], row["attack"], row["defence"], *shown]))
        tables.append("\n".join(f"| {line} |" for line in lines) + "\n")
    notes = dict.fromkeys(row["note"] for row in rows if row["note"])
    return "\n".join([*tables, *(f"- {note}\n" for note in notes)])


def cells(row: Mapping[str, Any], metric: str) -> list[str]:
    """Score, loss, success and what there is without the attack, as texts."""
    scored = [row["score"], row["lost"]]
    reached = [row["success"], row["clean success"]]
    text = share_text if "read" in row else partial(value_text, metric)
    return [
        *("" if value is None else value_text(metric, value) for value in scored),
        *("" if value is None else text(value) for value in reached),
    ]


def share_text(value: float | None) -> str:
    """A share from 0 to 1."""
    return "" if value is None else f"{100 * value:.1f} %"


def pictures(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, str]:
    """Heat maps: the score, and where an attack has a goal, its success."""
    found: dict[str, str] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        for what, name in (("score", NAMES.get(metric, metric)), ("success", "attacker's success")):
            kept = [row for row in rows if row["method"] == method and row[what] is not None]
            if not kept:
                continue
            across = list(dict.fromkeys(row["defence"] for row in kept))
            down = list(dict.fromkeys(row["attack"] for row in kept))
            value = {(row["attack"], row["defence"]): row[what] for row in kept}
            grid = [[value.get((attack, defence), 0.0) for defence in across] for attack in down]
            title = f"{name[0].upper()}{name[1:]}, {method}"
            about = f"{title}: attacks down, defences across."
            text = partial(value_text, metric) if what == "score" else share_text
            found[f"{method}-{what}"] = heat_map(title, about, down, across, grid, text)
    return found

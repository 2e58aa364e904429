"""Run - START HERE: from recipe to report, top to bottom.

A run is one or more legs over the same ground (data, base model, task): the federation itself and what it is compared
with - the base model, each client alone, all data pooled. Every leg is a method played round by round; see
fedllm/engine/rounds.py for what happens in a round.
"""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from typing import Protocol as Interface

import torch

from fedllm.core.errors import ConfigError, ModeConflict, RoundFailed
from fedllm.core.guard import MEASURING, Guard
from fedllm.core.message import Received
from fedllm.core.meter import Meter, peak_memory
from fedllm.core.method import Method
from fedllm.core.protocol import Protocol
from fedllm.core.reducer import Reducer
from fedllm.core.roster import Group, assign
from fedllm.core.seeds import numpy_stream
from fedllm.core.server import Engine, Server
from fedllm.core.settings import merge, read
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, count
from fedllm.core.train import Train
from fedllm.core.work import Rows
from fedllm.data.federation import Federation
from fedllm.data.statistics import statistics
from fedllm.engine.crew import Crew
from fedllm.engine.folder import Checkpoint, RunFolder
from fedllm.engine.lasting import FILE as PRIVACY
from fedllm.engine.lasting import lasting
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.passes import Passes
from fedllm.engine.rounds import RoundRecord, evaluate, play_round
from fedllm.engine.width import Width, choose
from fedllm.evaluate import total
from fedllm.evaluate.clients import summarise
from fedllm.methods import methods
from fedllm.methods.baseline.central import EVERYONE
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.settings import ModelSettings
from fedllm.protocols import protocols
from fedllm.recipe import Recipe, load_recipe
from fedllm.report.page import write_report
from fedllm.report.tracking import open_trackers, require
from fedllm.report.words import sentences
from fedllm.tasks.learner import TransformerLearner

if TYPE_CHECKING:
    from fedllm.modes.codec import Codec

FEDERATED = "federated"
"""The leg that plays the recipe's method; what it is compared with is measured at the end only."""
ALONE = ("local", "central")
"""Methods that a federation is compared with: no codec is around them, nobody is over-sampled, and they get the local
training that the recipe gives its own method."""

LOWER_IS_BETTER = ("loss", "perplexity")

FAILED_LIMIT = 3
"""So many failed rounds in a row end a run."""

Algorithm = Method | Protocol
Data = Federation | Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""Data given in Python: a Federation, or client id -> {"train": rows, "eval": rows}."""


class Stores(Interface):
    """What a checkpoint needs of the clients' private stores; see :class:`fedllm.engine.private.PrivateStore`."""

    def manifest(self) -> dict[str, str]:
        """Client -> the file of its entry."""
        ...

    def restore(self, manifest: dict[str, str]) -> None:
        """Go back to a checkpoint's entries."""
        ...

    def prune(self, keep: Sequence[dict[str, str]]) -> None:
        """Remove the files that no manifest names."""
        ...


class Watch:
    """What a run tells while it goes on; subclass it to show progress. `stop` ends the run after the current round."""

    stop: bool = False

    def begin(self, recipe: Recipe, ground: Ground, folder: Path) -> None:
        """Everything is loaded."""

    def leg(self, name: str, rounds: int, begun: int) -> None:
        """A leg begins (or goes on after round `begun`)."""

    def round(self, name: str, record: RoundRecord, values: Mapping[str, float | None] | None) -> None:
        """A round is over; `values` are the pooled metrics where it was measured."""

    def end(self, result: Result) -> None:
        """The run is over."""


@dataclass
class Ground:
    """What every leg of a run shares.

    Attributes:
        recipe: the recipe.
        federation: whose data.
        learner: base model, adapter and task; the server's, and that of all groups without a model of their own.
        learners: those of groups with a model of their own.
        roster: client id -> its group.
        left: trainable tensors that only the recipe's method asked for.
        guard: what stands between uploads and the recipe's method.
        remote: where the clients are elsewhere: the engine of a leg, and what it says of their private stores.
        width: how many clients share a pass.
        crew: the processes that share the passes of a cohort; None: this one alone.
        measured: the clients that have held-out data (and are to be measured).
        warnings: what a user should know.
    """

    recipe: Recipe
    federation: Federation
    learner: TransformerLearner
    width: Width
    measured: list[str]
    warnings: list[str] = field(default_factory=list)
    learners: dict[str, TransformerLearner] = field(default_factory=dict)
    roster: dict[str, Group] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    guard: Guard = field(default_factory=Guard)
    remote: Callable[[str, Algorithm], tuple[Engine, Stores]] | None = None
    crew: Crew | None = None

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *why: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other processes; work that is asked for later starts new ones."""
        if self.crew is not None:
            self.crew.close()

    def left_by(self, method: Algorithm) -> frozenset[str]:
        """Trainable tensors of the learner that this method does not know."""
        return frozenset() if method.adapter() == method_of(self.recipe).adapter() else self.left

    def engine(
        self, leg: str, method: Algorithm, private: Path | None = None, debug: bool = False, guard: Guard | None = None
    ) -> tuple[Engine, Stores]:
        """What carries a leg's requests to the clients, and the private stores behind it."""
        if self.remote is not None:
            return self.remote(leg, method)
        worker = self.worker(method, private, debug, guard)
        return LocalEngine(worker, self.federation.client_ids, self.width), worker.private

    def worker(
        self, method: Algorithm, private: Path | None = None, debug: bool = False, guard: Guard | None = None
    ) -> LocalWorker:
        """A worker for all clients; tensors that another method asked for stay at their first values."""
        left = self.left_by(method)
        rows, seed = Pooled(self.federation), self.recipe.seed
        coder = codec_of(self.recipe) if _coded(self.recipe, method) else None
        groups = self.roster, self.learners
        worker = LocalWorker(self.learner, method, rows, seed, private, debug, *groups, left, coder, guard)
        worker.crew = self.crew
        return worker


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        folder: the run folder.
        table: the content of result.json.
        state: the last state of the federation.
        finished: False where the run was stopped before its last round.
    """

    folder: Path
    table: dict[str, Any]
    state: State
    finished: bool

    @property
    def sentences(self) -> list[str]:
        """What the numbers mean, in plain words."""
        return list(self.table["sentences"])

    def value(self, model: str = "federated", metric: str | None = None) -> float | None:
        """The pooled value of a metric (the headline metric where None)."""
        row = next((row for row in self.table["rows"] if row["model"] == model), None)
        if row is None:
            raise ConfigError.unknown("model in this result", model, [row["model"] for row in self.table["rows"]])
        return row["pooled"].get(metric or self.table["metric"])


def run(
    recipe: str | Path | dict[str, Any] | Recipe = "quickstart",
    overrides: Sequence[str] = (),
    *,
    data: Data | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
    debug: bool = False,
) -> Result:
    """Play a recipe from beginning to end.

    Args:
        recipe: a file, the name of a bundled recipe, a mapping or a :class:`~fedllm.recipe.Recipe`.
        overrides: `key=value` texts, for example "train.lr=0.001".
        data: data in memory instead of what the recipe names.
        folder: the run folder; by default a new one under `recipe.runs`.
        watch: is told what happens.
        debug: let an exception inside a client's code through instead of counting the client as lost.
    """
    settled = load_recipe(recipe, overrides)
    method_of(settled)
    require(settled.tracking)
    ground = prepare(settled, data)
    place = RunFolder.create(Path(folder) if folder else new_folder(settled))
    place.write_text("recipe.yaml", settled.to_yaml())
    place.write_json("environment.json", environment(ground))
    place.write_json("partition.json", statistics(ground.federation).to_dict())
    return play(ground, place, watch or Watch(), debug)


def resume(folder: str | Path, *, data: Data | None = None, watch: Watch | None = None, debug: bool = False) -> Result:
    """Play an interrupted run to its end; the result has the same bits as if it had never been interrupted."""
    place = RunFolder.open(Path(folder))
    settled = load_recipe(place.path / "recipe.yaml")
    ground = prepare(settled, data)
    same_ground(place, ground)
    same_data(place, ground)
    ground.width = kept_width(place) or ground.width
    return play(ground, place, watch or Watch(), debug)


def prepare(recipe: Recipe, data: Data | None = None, near: Rows | None = None) -> Ground:
    """Load data, model, adapter and task; everything that can be refused is refused here.

    Args:
        recipe: the recipe.
        data: data in memory instead of what the recipe names.
        near: the clients whose rows can be read here, by default all of them.
    """
    if data is None:
        federation = Federation.build(recipe.data, recipe.seed)
    else:
        federation = data if isinstance(data, Federation) else Federation.of(data)
    method = method_of(recipe)
    if method.public and not len(federation.public):
        raise ConfigError(
            f"The method {method.key} needs public rows, and there are none.",
            "They are rows that anybody may read, the same for all.",
            action="Set data.public.path, or give Federation.of(..., public=rows).",
        )
    check_codec(recipe, method)
    cohort, labels = recipe.cohort_size(len(federation.client_ids)), labels_of(federation, recipe)
    learner = build_learner(recipe, labels, method.adapter())
    plain = plain_names(recipe, learner, method)
    train = getattr(method, "train", Train())
    measured = [client for client in federation.client_ids if federation.size(client, "eval")]
    if recipe.evaluation.clients is not None and recipe.evaluation.clients < len(measured):
        stream = numpy_stream(recipe.seed, "measured")
        measured = sorted(stream.choice(measured, recipe.evaluation.clients, replace=False).tolist())
    roster, learners = groups_of(recipe, federation, labels, method)
    notes = [note for each in (learner, *learners.values()) for note in each.notes]
    crew = None
    if recipe.processes > 1:
        build = partial(learners_of, recipe, labels, method.adapter(), learner.device.type)
        crew = Crew(build, recipe.processes, {"": learner, **learners})
        notes += crew.notes(cohort)
    shown = federation if near is None else near
    width = choose(recipe.cohort_width, learner, shown, train, cohort, recipe.processes)
    warnings = [*federation.warnings, *dict.fromkeys(notes)]
    left = frozenset(learner.initial()) - plain
    guard = guard_of(recipe, federation, method, cohort)
    return Ground(recipe, federation, learner, width, measured, warnings, learners, roster, left, guard, crew=crew)


def ground_of(ground: Ground, method: Algorithm, data: Data | None) -> AbstractContextManager[Ground]:
    """A ground for another method: one of its own where it needs public rows, or trains other tensors.

    Args:
        ground: that of a recipe.
        method: the other method.
        data: data in memory instead of what the recipe names.
    """
    first = method_of(ground.recipe)
    if method.public <= first.public and method.adapter() == first.adapter():
        return nullcontext(ground)
    return prepare(ground.recipe.model_copy(update={"method": {"name": method.key}}), data)


def check_codec(recipe: Recipe, method: Algorithm) -> None:
    """Refuse the recipe's codec around a method that sends nothing it can code.

    Raises:
        ModeConflict: a protocol.
        ConfigError: parts that are not coded.
    """
    codec = codec_of(recipe)
    if codec is None:
        return
    if not isinstance(method, Method):
        raise ModeConflict(
            f"The protocol {method.key} sends messages that no codec takes.",
            "The section 'codec' codes the uploads of methods.",
            "fedavg",
            "Remove the section, or choose a method.",
        )
    reducers = method.reducer
    codec.check(["update"] if isinstance(reducers, Reducer) else list(reducers))
    if not method.feeds and (codec.feeds_back or codec.kind in ("topk", "lowrank")):
        raise ModeConflict(
            f"codec.kind={codec.kind} sends a part of an upload and the rest with later ones, and uploads of "
            f"{method.key} are no changes of the same entries.",
            "int8 and int4 without codec.clip, bf16 and fp32 code any upload by itself.",
            "int8",
        )


def build_learner(
    recipe: Recipe, labels: Sequence[str] | None, extra: Mapping[str, Any] | None = None
) -> TransformerLearner:
    """The base model with its adapter (and what a method asks of it) and its task."""
    from fedllm.models.load import load_model
    from fedllm.tasks.dual_encoder import DualEncoderLearner

    loaded = load_model(recipe.model, recipe.task.kind, labels=labels, seed=recipe.seed)
    adapter = read(AdapterSettings, merge(recipe.adapter.model_dump(exclude_unset=True), dict(extra or {})), "adapter")
    kind = DualEncoderLearner if recipe.task.kind == "dual-encoder" else TransformerLearner
    return kind(loaded, recipe.task, adapter, labels, recipe.seed)


def learners_of(
    recipe: Recipe, labels: Sequence[str] | None, extra: Mapping[str, Any], device: str, process: int
) -> dict[str, TransformerLearner]:
    """The learners of another process of a run: the recipe's as "", those of groups by their names.

    Args:
        recipe: the recipe.
        labels: class or tag names.
        extra: what the method asks of the adapter.
        device: where the first process has its model: "cuda", "cpu", "mps".
        process: 1, 2, ...; on GPUs, each process has the next one, if the recipe does not say which.
    """
    own = {name: own_recipe(recipe, name) for name, group in recipe.groups.items() if group.model}
    asked = {"": recipe, **own}.items()
    return {name: build_learner(_placed(one, device, process), labels, extra) for name, one in asked}


def _placed(recipe: Recipe, device: str, process: int) -> Recipe:
    """The recipe with the GPU of a process."""
    if device != "cuda" or recipe.model.device not in ("auto", "cuda"):
        return recipe
    place = f"cuda:{process % torch.cuda.device_count()}"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": place})})


def plain_names(recipe: Recipe, learner: TransformerLearner, method: Algorithm) -> frozenset[str]:
    """The trainable tensors that the recipe's own adapter has, without what the method added."""
    if not method.adapter():
        return frozenset(learner.initial())
    from fedllm.models.adapters.attach import Adapted

    plain = Adapted(learner.loaded, recipe.adapter, recipe.seed, learner.task.labels or ())
    plain.remove()
    return frozenset(plain.initial())


def own_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the model and the adapter of one of its groups."""
    group = recipe.groups[name]
    own = merge(recipe.adapter.model_dump(exclude_unset=True), group.adapter)
    adapter = read(AdapterSettings, own, f"groups.{name}.adapter")
    model = read(ModelSettings, merge(recipe.model.model_dump(exclude_unset=True), group.model), "model")
    return recipe.model_copy(update={"model": model, "adapter": adapter})


def groups_of(
    recipe: Recipe, federation: Federation, labels: Sequence[str] | None, method: Algorithm
) -> tuple[dict[str, Group], dict[str, TransformerLearner]]:
    """Every client's group, and the models of those groups that have one of their own."""
    groups: dict[str, Group] = {}
    learners: dict[str, TransformerLearner] = {}
    for name, group in recipe.groups.items():
        other = own_recipe(recipe, name)
        adapter = other.adapter
        rank = adapter.rank if adapter.kind == "lora" else None
        groups[name] = Group(name, rank, group.device)
        if group.model:
            _may_mix(method, "models", f"groups.{name}.model")
            learners[name] = build_learner(other, labels, method.adapter())
        elif adapter.model_copy(update={"rank": recipe.adapter.rank}) != recipe.adapter:
            raise ConfigError(
                f"groups.{name}.adapter differs from the recipe's in more than its rank.",
                "Clients that share a model share the kind of adapter.",
                action=f"Give groups.{name} a model of its own, or only a rank.",
            )
        elif adapter.rank > recipe.adapter.rank:
            raise ConfigError(
                f"groups.{name}.adapter.rank={adapter.rank} is above adapter.rank={recipe.adapter.rank}.",
                "The recipe's rank is the largest; groups have smaller ones.",
                action=f"Set adapter.rank={adapter.rank}.",
            )
        elif adapter.rank != recipe.adapter.rank:
            _may_mix(method, "ranks", f"groups.{name}.adapter.rank")
    if not groups:
        return {}, {}
    shares = {n: g.clients if g.clients is not None else g.share or 0.0 for n, g in recipe.groups.items()}
    return assign(federation.client_ids, groups, shares, recipe.seed), learners


def check_mixing(recipe: Recipe, method: Algorithm) -> None:
    """Raise :class:`ConfigError` where the recipe's groups differ in what this method needs the same everywhere."""
    for name, group in recipe.groups.items():
        if group.model:
            _may_mix(method, "models", f"groups.{name}.model")
        elif group.adapter.get("rank", recipe.adapter.rank) != recipe.adapter.rank:
            _may_mix(method, "ranks", f"groups.{name}.adapter.rank")


def _may_mix(method: Algorithm, what: Literal["ranks", "models"], where: str) -> None:
    if what not in method.mixes:
        raise ConfigError(
            f"{where} is given, and the method {method.key} needs the same {what} at every client.",
            f"Methods for different {what}: {', '.join(k for k, m in methods().items() if what in m.mixes) or 'none'}.",
            action="Choose one of them, or leave the option out.",
        )


def labels_of(federation: Federation, recipe: Recipe) -> list[str] | None:
    """Class or tag names: those of the recipe, or all that occur in the data, sorted."""
    if recipe.task.kind not in ("sequence-classification", "token-classification", "dual-encoder"):
        return None
    if recipe.task.labels is not None:
        return recipe.task.labels
    column = "tags" if recipe.task.kind == "token-classification" else "label"
    if federation.label_column != column or not federation.labels:
        raise ConfigError(
            f"The task {recipe.task.kind} needs the column '{column}', and no row has it.",
            action=f"Map yours: data.columns.{column}=YOUR_COLUMN.",
        )
    return [str(label) for label in federation.labels]


def guard_of(recipe: Recipe, federation: Federation, method: Algorithm, cohort: int) -> Guard:
    """What the recipe puts between uploads and its method."""
    sizes, found = {client: federation.size(client) for client in federation.client_ids}, Guard()
    if recipe.spare:
        _sparing(recipe, method)
    if recipe.deadline is not None and isinstance(method, Protocol):
        raise ModeConflict(
            f"deadline={recipe.deadline:g} is given, and {method.key} is a protocol.",
            "It asks whom it needs, and waits for them; a round with a deadline is for methods.",
            "method.deadline" if "deadline" in type(method).model_fields else None,
            "Leave out 'deadline'.",
        )
    if recipe.privacy is not None:
        from fedllm.modes.privacy.guard import guard_of as private

        if recipe.privacy.level == "example" and recipe.task.pack:
            raise ModeConflict(
                f"task.pack={str(recipe.task.pack).lower()} with privacy.level=example: rows are put together, so that "
                "one row is part of an example of several, or moves others.",
                "The unit of privacy is one row, which has to be one example.",
                action="Set task.pack=false.",
            )

        found = private(recipe.privacy, method, sizes, cohort, recipe.rounds, recipe.seed)
    if recipe.secure is not None:
        from fedllm.modes.secagg.compose import secured

        found = secured(recipe.secure, method, found, sizes, cohort, codec_of(recipe))
    if recipe.encrypted is not None:
        from fedllm.modes.encrypted.compose import encrypted

        found = encrypted(recipe.encrypted, method, found, sizes, recipe.codec.idle, recipe.seed)
    if recipe.defence or recipe.attack:
        from fedllm.modes.robust import robust_guard

        labels = (federation.labels or ()) if recipe.attack else ()
        how = list(sizes), recipe.rounds, recipe.seed, labels
        found = robust_guard(recipe.attack, recipe.defence, found, method, *how)
    return found


def _sparing(recipe: Recipe, method: Algorithm) -> None:
    """Raise :class:`ModeConflict` where the clients of a round cannot be those that are fastest."""
    why = {
        "privacy": "Its account rests on who is drawn, and not on who is fast.",
        "secure": "All clients that began a sum are needed to end it.",
        "encrypted": "All clients that began a sum are needed to end it.",
        "attack": "Attackers see who else is in the round.",
    }
    given = next((name for name in why if getattr(recipe, name)), None)
    if given is not None:
        what = f"spare={recipe.spare} is given with the section '{given}'."
        raise ModeConflict(what, why[given], action=f"Set spare=0, or leave out '{given}'.")
    if isinstance(method, Protocol):
        raise ModeConflict(
            f"spare={recipe.spare} is given, and {method.key} is a protocol.",
            "It asks whom it needs; a cohort of the fastest is for methods.",
            action="Set spare=0.",
        )


def _coded(recipe: Recipe, method: Algorithm) -> bool:
    """Whether the uploads of a method travel in the recipe's codec: a sum has no codes to undo."""
    return isinstance(method, Method) and method.key not in ALONE and recipe.secure is None


def codec_of(recipe: Recipe) -> Codec | None:
    """The recipe's codec; None where it changes nothing."""
    if recipe.codec.idle:
        return None
    from fedllm.modes.codec import Codec

    return Codec(**recipe.codec.model_dump(exclude_unset=True))


def method_of(recipe: Recipe, key: str | None = None) -> Algorithm:
    """The recipe's method or protocol, or another one under the same settings; refuses what cannot be combined."""
    options = dict(recipe.method)
    name = str(options.pop("name", "fedavg"))
    if key is not None and key != name:
        name, options = key, {}
    kind = algorithm(name)
    options = merge(options, recipe.methods.get(name, {}))
    if "train" in kind.model_fields:
        default = kind.model_fields["train"].default
        changed = {n: getattr(default, n) for n in default.model_fields_set}
        given = dict(recipe.method.get("train", {})) if key in ALONE and key != recipe.method.get("name") else {}
        train = merge(merge(merge(changed, recipe.train), given), options.pop("train", {}))
        options["train"] = read(Train, train, "train").model_dump(exclude_unset=True)
    found = read(kind, options, "method")
    if kind.adapters and recipe.adapter.kind not in kind.adapters:
        raise ConfigError(
            f"The method {name} cannot train adapter.kind={recipe.adapter.kind}.",
            f"Allowed: {', '.join(kind.adapters)}.",
            kind.adapters[0],
        )
    if "any" not in kind.card.models and recipe.task.kind not in kind.card.models:
        raise ConfigError(
            f"The method {name} does not work on task.kind={recipe.task.kind}.",
            f"Allowed: {', '.join(kind.card.models)}.",
            kind.card.models[0],
        )
    return found


def algorithm(key: str) -> type[Method] | type[Protocol]:
    """The method or protocol called `key`."""
    found = {**protocols(), **methods()}
    if key not in found:
        raise ConfigError.unknown("method", key, found, "Run 'fedllm methods' to see them all.")
    return found[key]


def play(ground: Ground, folder: RunFolder, watch: Watch, debug: bool = False) -> Result:
    """Play all legs, going on from what the folder already holds; then the result and the report."""
    recipe, begun = ground.recipe, time.perf_counter()
    watch.begin(recipe, ground, folder.path)
    against = [name for name in recipe.evaluation.against if name != "base"]
    if "central" in against and any(group.model for group in recipe.groups.values()):
        against.remove("central")
        ground.warnings.append("The run is not compared with 'central': clients have different models.")
    names = {FEDERATED: method_of(recipe), **{name: method_of(recipe, name) for name in against}}
    legs = [Leg(name, method, ground, folder, watch, debug) for name, method in names.items()]
    trackers = open_trackers(recipe.tracking, folder.path, recipe.model_dump(mode="json"))
    try:
        finished = all([asyncio.run(leg.play(trackers if leg.name == FEDERATED else [])) for leg in legs])
        rows = [base_row(ground)] if "base" in recipe.evaluation.against and finished else []
    finally:
        for tracker in trackers:
            tracker.close()
        ground.close()
    state = legs[0].state
    from fedllm.models.adapters.export import save_adapter

    start = ground.learner.initial()
    moving = {name: tensor for name, tensor in start.items() if name not in legs[0].frozen}
    if trained := legs[0].method.weights(state, moving):  # some share no model: there is nothing to save
        whole = {**start, **trained}  # what clients keep to themselves is at its first values
        save_adapter(folder.path / "adapter", ground.learner.adapted, whole)
    rows += [leg.row() for leg in legs if leg.state.round or leg.counts]
    order = {"base": 0, "local": 1, "federated": 2, "central": 3}
    table = _table(ground, sorted(rows, key=lambda row: order.get(row["model"], 9)), legs, folder, begun, finished)
    folder.write_json("result.json", table)
    write_report(folder.path)
    result = Result(folder.path, table, state, finished)
    watch.end(result)
    return result


class _Stopped(Exception):
    """The user wants a protocol to stop at this checkpoint."""


class Leg:
    """One method or protocol, played over the ground of a run.

    Args:
        name: "federated", "local", "central".
        method: the method or protocol.
        ground: what all legs share.
        folder: the run folder.
        watch: is told what happens.
        debug: let exceptions inside client code through.
        guard: what stands between uploads and the method; by default the run's for "federated", and nothing else.
    """

    def __init__(
        self,
        name: str,
        method: Algorithm,
        ground: Ground,
        folder: RunFolder | None,
        watch: Watch,
        debug: bool = False,
        guard: Guard | None = None,
    ) -> None:
        self.name, self.method, self.ground, self.folder, self.watch = name, method, ground, folder, watch
        recipe = ground.recipe
        private = folder.private(name) if folder else None
        guard = guard or (ground.guard if name == FEDERATED else ground.guard.beside())
        if folder is not None and guard.lasts:
            lasting(guard, folder.path / (PRIVACY if name == FEDERATED else f"{name}-{PRIVACY}"))
        engine, self.stores = ground.engine(name, method, private, debug, guard)
        self.server = Server(engine, recipe.seed, Meter(), recipe.rounds, learner=ground.learner, guard=guard)
        codec = codec_of(recipe)
        if codec is not None and _coded(recipe, method):
            self.server.opened = codec.decode
        start = ground.learner.initial()
        left = ground.left_by(method)
        moves = {n for n in start if method.trainable(n) and n not in left}
        self.frozen: Tensors = {n: t for n, t in start.items() if n not in moves}
        self.cohort = recipe.cohort_size(len(ground.federation.client_ids))
        first = method.init({n: t for n, t in start.items() if n in moves})
        self.state = State(first.params, first.memory, {**first.numbers, "cohort": self.cohort}, 0)
        self.counts: dict[str, dict[str, float]] = {}
        self.unmeasured: list[dict[str, str]] = []
        self.failures = 0
        self.stopped: str | None = None
        self.report: Any = None
        self.before = 0.0

    async def play(self, trackers: Sequence[Any] = ()) -> bool:
        """Play the rounds that are left; True where the last one was reached."""
        rounds, done = self.ground.recipe.rounds, self._restore()
        self.watch.leg(self.name, rounds, self.state.round)
        if isinstance(self.method, Protocol):
            return await self._program(self.method, done)
        if done and self.state.round < rounds:  # it was ended early, and would be again
            self.stopped = self.server.guard.stops(self.state.round + 1)
        while self.state.round < rounds and not done:
            if self.watch.stop:
                break
            self.stopped = self.server.guard.stops(self.state.round + 1)
            if self.stopped:
                break
            await self._round(trackers)
        if not self.counts and self.state.round:
            await self._measure()
        if self.stopped and not done:
            self._save(True)
        return self.state.round >= rounds or self.stopped is not None or done

    async def _round(self, trackers: Sequence[Any]) -> None:
        recipe, begun = self.ground.recipe, time.perf_counter()
        how = self.cohort, recipe.deadline, 0 if self.method.key in ALONE else recipe.spare
        self.state, record = await play_round(self.method, self.state, self.server, *how)
        every, last = recipe.evaluation.every if self.name == FEDERATED else 0, self.state.round == recipe.rounds
        values, self.counts = None, {}
        if last or (every and self.state.round % every == 0):
            await self._measure()
            values = self.ground.learner.values(total(self.counts.values()))
        self.server.meter.seconds += time.perf_counter() - begun
        self._log(record, values)
        numbers = {k: v for k, v in {"loss": record.loss, **(values or {})}.items() if v is not None}
        for tracker in trackers:
            tracker.log(numbers, self.state.round)
        self.failures = self.failures + 1 if record.failed else 0
        ends = self.failures >= FAILED_LIMIT or (record.failed is not None and self.state.round == 1)
        if not record.failed or (last and not ends):  # what goes on plays failed rounds again
            self._save(last)
        self.watch.round(self.name, record, values)
        if ends and record.failed:
            reasons = [entry["reason"] for entry in (*record.rejected, *record.lost)]
            raise RoundFailed(
                f"Round {record.round} of '{self.name}' failed: {record.failed.rstrip('.')}.",
                f"First reason: {reasons[0]}" if reasons else "",
                action="Mend the cause, then 'fedllm resume' the run; earlier rounds are saved.",
            )

    async def _program(self, protocol: Protocol, done: bool) -> bool:
        """Play a protocol from its last checkpoint to its end."""
        begun = time.perf_counter()

        def keep(state: State) -> None:
            self.state = state
            self.server.meter.seconds += time.perf_counter() - self._since
            self._since = time.perf_counter()
            self._save(False)
            self.watch.round(self.name, RoundRecord(state.round, []), None)
            if self.watch.stop:
                raise _Stopped

        self._since, self.server.keep = begun, keep
        try:
            if not done:
                self.state, self.report = await protocol.play(self.server, self.state)
        except _Stopped:
            return False
        await self._measure()
        values = self.ground.learner.values(total(self.counts.values())) if self.counts else {}
        if done:
            return True
        up, down = (travelled(self.server.meter, way) for way in ("up", "down"))
        lost, rejected = list(self.server.lost), list(self.server.rejected)
        self.server.meter.seconds += time.perf_counter() - self._since
        self._log(RoundRecord(self.state.round, [], lost=lost, rejected=rejected, bytes_up=up, bytes_down=down), values)
        if self.folder is not None:
            self.folder.write_json(f"{self.name}-report.json", self.report)
        self._save(True)
        return True

    async def _measure(self) -> None:
        self.counts = await evaluate(self.method, self.state, self.server, self.ground.measured)
        self.unmeasured = [*self.server.lost, *self.server.rejected]

    def _log(self, record: RoundRecord, values: Mapping[str, float | None] | None) -> None:
        if self.folder is None:
            return
        self.folder.log({**record.to_json(), "model": self.name})
        if values is not None:
            by_client = {c: {"n": n.get("examples"), **self._values(n)} for c, n in self.counts.items()}
            pooled = {"n": total(self.counts.values()).get("examples"), **values}
            event = {"event": "evaluation", "round": record.round, "model": self.name}
            self.folder.log({**event, "pooled": pooled, "clients": by_client})

    def _values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        return self.ground.learner.values(counts)

    def _save(self, done: bool) -> None:
        if self.folder is None:
            return
        guard, length = self.server.guard.to_json(), self.folder.metrics_bytes()
        kept = self.stores.manifest(), length, done, guard, self.server.guard.memory()
        checkpoint = Checkpoint(self.state, self.server.meter, *kept)
        self.folder.save(self.name, checkpoint)
        self.stores.prune(self.folder.manifests(self.name))

    def _restore(self) -> bool:
        """Go on from the last checkpoint; True where the leg is already finished."""
        if self.folder is None:
            return False
        checkpoint = self.folder.load(self.name)
        if checkpoint is None:
            self.folder.forget(self.name)
            return False
        self.state, self.server.meter, self.before = checkpoint.state, checkpoint.meter, checkpoint.meter.seconds
        self.stores.restore(checkpoint.private)
        if checkpoint.guard is not None or checkpoint.remembered:
            self.server.guard.restore(checkpoint.guard, checkpoint.remembered)
        if not checkpoint.done:
            self.folder.cut_metrics(checkpoint.metrics_bytes)
        return checkpoint.done

    def row(self) -> dict[str, Any]:
        """This leg's row of the result table."""
        labels = {"federated": f"Federated ({self.method.key})", "local": "Each alone", "central": "All data pooled"}
        return _row(self.ground, self.name, labels.get(self.name, self.name), self.counts)


class Pooled:
    """The federation's rows, and all of them together as the client `everyone` (for the method central)."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.client_ids = federation, federation.client_ids

    def size(self, client_id: str, split: str = "train") -> int:
        """Rows of a split."""
        if client_id == EVERYONE:
            return sum(self.federation.size(client, split) for client in self.client_ids)
        return self.federation.size(client_id, split)

    def rows(self, client_id: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The rows of a split."""
        return self.federation.pooled(split) if client_id == EVERYONE else self.federation.rows(client_id, split)


def headline(ground: Ground) -> str:
    """The metric that decides."""
    wanted, names = ground.recipe.evaluation.metric, ground.learner.score_names
    if wanted is not None and wanted not in names:
        raise ConfigError.unknown("metric of this task", wanted, names)
    return wanted or names[0]


def _row(ground: Ground, model: str, label: str, counts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    values = ground.learner.values
    clients = {client: {"n": found.get("examples"), **values(found)} for client, found in sorted(counts.items())}
    pooled_counts = total(counts.values())
    pooled = {"n": pooled_counts.get("examples", 0.0), **(values(pooled_counts) if pooled_counts else {})}
    return {"model": model, "label": label, "clients": clients, "pooled": pooled, "summary": _summary(ground, clients)}


def _summary(ground: Ground, clients: Any, reference: Any = None) -> dict[str, Any]:
    """The headline metric over clients: mean, worst tenth, spread, interval, gain over a reference."""
    if not clients:
        return {}
    metric = headline(ground)
    better = ground.learner.higher_is_better and metric not in LOWER_IS_BETTER
    return summarise(clients, metric, reference=reference, higher_is_better=better).to_dict()


def with_gains(ground: Ground, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with its gain over the base model and over each client alone."""
    found = {row["model"]: row["clients"] for row in rows}
    return [
        {
            **row,
            "gain": {
                name: _summary(ground, row["clients"], found[name])["gain"]
                for name in ("base", "local")
                if name in found and name != row["model"] and row["clients"]
            },
        }
        for row in rows
    ]


def base_row(ground: Ground) -> dict[str, Any]:
    """The base model, measured at the same clients."""
    method = method_of(ground.recipe, "fedavg")
    server = Server(ground.engine("base", method)[0], ground.recipe.seed)

    async def ask() -> dict[str, dict[str, float]]:
        payloads = ((client, Received()) for client in ground.measured)
        answers = server.ask(method.evaluate_base, payloads)
        return {a.client: {n: held for n, (held, _) in a.upload.metrics.items()} async for a in answers}

    return _row(ground, "base", "Base model", asyncio.run(ask()))


def _table(
    ground: Ground, rows: list[dict[str, Any]], legs: Sequence[Leg], folder: RunFolder, begun: float, finished: bool
) -> dict[str, Any]:
    recipe, metric, first = ground.recipe, headline(ground), legs[0]
    meter = first.server.meter
    dropped = [f"{n} rows were left out: {reason}." for reason, n in ground.learner.task.dropped.items()]
    missing = [
        f"{len(leg.unmeasured)} clients could not be measured ({leg.name}): {leg.unmeasured[0]['reason']}"
        for leg in legs
        if leg.unmeasured
    ]
    stopped = [f"The run ended after round {first.state.round}: {first.stopped}"] if first.stopped else []
    table: dict[str, Any] = {
        "name": recipe.name,
        "about": recipe.about,
        "method": first.method.key,
        "rounds": first.state.round,
        "finished": finished,
        "metric": metric,
        "higher_is_better": metric not in LOWER_IS_BETTER,
        "rows": with_gains(ground, rows),
        "clients": {client: ground.federation.names.get(client, client) for client in ground.federation.client_ids},
        "bytes": {"up": travelled(meter, "up"), "down": travelled(meter, "down")},
        "tokens": meter.tokens,
        "seconds": time.perf_counter() - begun + sum(leg.before for leg in legs),
        "guard": first.server.guard.told(),
        "guarantee": first.server.guard.report(),
        "cohort_width": {"clients": ground.width.clients, "why": ground.width.why},
        "peak_memory": peak_memory(),
        "files": {
            "adapter": str(folder.path / "adapter"),
            "metrics": str(folder.path / "metrics.jsonl"),
            "report": str(folder.path / "report.html"),
        },
        "warnings": [*ground.warnings, *stopped, *dropped, *missing],
    }
    return {**table, "sentences": sentences(table)}


def travelled(meter: Meter, direction: str) -> int:
    """Bytes in one direction for the training of a method, whatever it asks clients for; measurements are left out."""
    return meter.total(direction) - sum(meter.total(direction, op) for op in MEASURING)


def new_folder(recipe: Recipe) -> Path:
    """runs/NAME, or runs/NAME-2, ... where that is taken."""
    first = Path(recipe.runs) / recipe.name
    tries = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in range(1, 10_000))
    return next(path for path in tries if not path.exists())


def kept_folder(recipe: Recipe, folder: str | Path | None, what: str) -> RunFolder:
    """The folder of several runs of a recipe, which is continued where it is there: `compare`, `attack`, `profit`.

    Raises:
        ConfigError: it holds those of another recipe.
    """
    path = Path(folder) if folder else new_folder(recipe.model_copy(update={"name": f"{recipe.name}-{what}"}))
    if not (path / "recipe.yaml").exists():
        place = RunFolder.create(path)
        place.write_text("recipe.yaml", recipe.to_yaml())
        return place
    if load_recipe(path / "recipe.yaml") != recipe:
        raise ConfigError(
            f"{path} holds what '{what}' made of another recipe.", action="Give another folder, or the same recipe."
        )
    return RunFolder.open(path)


def environment(ground: Ground) -> dict[str, Any]:
    """What ran, on what."""
    loaded = ground.learner.loaded
    return {
        "versions": {name: _version(name) for name in ("fedllm", "torch", "transformers", "datasets", "safetensors")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(ground.learner.device),
        "seed": ground.recipe.seed,
        "width": {
            "clients": ground.width.clients,
            "why": ground.width.why,
            "stack": ground.width.stack,
            "fixed": ground.width.passes.fixed,
            "limit": ground.width.passes.limit,
        },
        "model": {
            "name": loaded.name,
            "family": loaded.family,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "trainable": count(ground.learner.initial()),
            "fingerprint": loaded.fingerprint,
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def same_ground(folder: RunFolder, ground: Ground) -> None:
    """Warn where a resumed run stands on another base model or other versions; refuse another base model."""
    before, now = folder.read_json("environment.json") or {}, environment(ground)
    if before.get("model", {}).get("fingerprint") not in (None, now["model"]["fingerprint"]):
        raise ConfigError(
            "The base model is not the one this run began with: its weights differ.",
            action="Restore the earlier weights, or start a new run.",
        )
    changed = [n for n, v in now["versions"].items() if before.get("versions", {}).get(n) not in (None, v)]
    if changed:
        ground.warnings.append(f"Resumed with other versions of {', '.join(changed)}: the last bits may differ.")


def same_data(folder: RunFolder, ground: Ground) -> None:
    """Refuse to go on with other data than the run began with, as far as their statistics tell."""
    found = folder.read_json("partition.json"), json.loads(json.dumps(statistics(ground.federation).to_dict()))
    before, now = ((one or {}).get("clients", {}) for one in found)
    differ = sorted(client for client in {*before, *now} if before.get(client) != now.get(client))
    if found[0] is None or not differ:
        return
    raise ConfigError(
        f"The data are not those this run began with: client '{differ[0]}' has other rows.",
        f"{len(before)} clients were there and {len(now)} are; {len(differ)} of them differ.",
        action="Restore the earlier data, or start a new run.",
    )


def kept_width(folder: RunFolder) -> Width | None:
    """How clients shared passes when the run began: another width gives other last bits."""
    found = (folder.read_json("environment.json") or {}).get("width")
    if found is None:
        return None
    return Width(found["clients"], found["why"], found["stack"], Passes(found["fixed"], found["limit"]))

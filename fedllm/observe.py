"""Observe - one round of a run as an observer at the server sees it, and how near what it reads is to the truth.

The observed clients train on as many rows as the observer is to face; everything else is as the recipe says. What was
read is held to those rows, and to other rows of the same clients that nobody trained on: what an attacker reaches
without having seen the upload. Only scores leave this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm.core.errors import FedLLMError
from fedllm.core.method import Method
from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.engine.rounds import RoundRecord, play_round
from fedllm.modes.observers import Observer, Sight
from fedllm.modes.watched import EVERYBODY, Watched
from fedllm.run import Ground, Leg, Watch, guard_of
from fedllm.tasks.glass import Glass

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """How near an observer came, as means over the clients it watched.

    Attributes:
        read: name -> score, 0 to 1; the first is the observer's success.
        without: the success of one that has not seen the upload.
        note: why nothing could be read; "" where something was.
    """

    read: dict[str, float] = field(default_factory=dict)
    without: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For a table."""
        return {**self.__dict__, "success": next(iter(self.read.values()), None)}


def observed(ground: Ground, method: Method, observer: Observer) -> Found:
    """Play the rounds up to the observed one under the recipe's guards, and read what its uploads tell.

    Raises:
        ConfigError, ModeConflict: a recipe that cannot be played. What the observer itself cannot do is a note.
    """
    recipe = ground.recipe
    cohort = recipe.cohort_size(len(ground.federation.client_ids))
    inner = guard_of(recipe, ground.federation, method, cohort)
    watched = Watched(observer, inner, lambda params: Glass(ground.learner, params, leg.frozen), recipe.seed)
    leg = Leg(f"{method.key}-{observer.key}", method, ground, None, Watch(), guard=watched)
    record = RoundRecord(0, [])
    try:
        for _ in range(observer.round):
            leg.state, record = asyncio.run(play_round(method, leg.state, leg.server, leg.cohort, recipe.deadline))
    except FedLLMError as fault:  # the observer cannot do with this method what it needs
        return Found(note=f"{observer.key} against {method.key}: {fault}")
    if not watched.uploads:
        reasons = [entry["reason"] for entry in (*record.rejected, *record.lost)] or [record.failed or "nothing came"]
        return Found(note=f"{observer.key} against {method.key}: {reasons[0]}")
    scores, without = list[dict[str, float]](), list[float]()
    for client in sorted(watched.uploads)[: observer.victims]:
        glass = Glass(ground.learner, watched.sent[client], leg.frozen)
        sight, other = _sights(ground, method, watched, client, glass)
        if not sight.gradient:
            return Found(note=f"The uploads of {method.key} hold no change of the weights that were sent.")
        found = observer.read(sight, glass, torch_stream(recipe.seed, "observer", observer.key, client))
        scores.append(observer.scores(found, sight, glass))
        without.append(observer.without(found, sight, other, glass))
    read = {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}
    return Found(read, sum(without) / len(without))


def _sights(ground: Ground, method: Method, watched: Watched, client: str, glass: Glass) -> tuple[Sight, Sight]:
    """What the server saw of a client (or of everybody), and the same about rows that nobody trained on."""
    members = watched.clients if client == EVERYBODY else [client]
    count, rows, others = watched.observer.rows, list[Row](), list[Row]()
    shown, planted = list[Row](), list[Any]()
    for member in members:
        held = ground.federation.rows(member, "train")
        rows += held[:count]
        others += list(held[count : 2 * count]) or list(ground.federation.rows(member, "eval")[:count])
        facing, values = watched.facing(member, held)
        shown += facing
        planted += [] if values is None else values.tolist()
    examples = glass.examples(shown)
    sight = Sight(
        _slope(method, watched, client, len(examples) // len(members)),
        examples,
        rows,
        watched.seen.get(client, {}),
        watched.kept,
        torch.tensor(planted) if planted else None,
    )
    return sight, Sight({}, glass.examples(others), others)


def _slope(method: Method, watched: Watched, client: str, examples: int) -> Tensors:
    """The change that came back, as a gradient."""
    train, round, sent = method.train, watched.observer.round, watched.sent[client]
    steps = max(1, train.step_count(examples))
    rate = sum(train.rate(round, round, step, steps) for step in range(steps))
    return {name: -change / rate for name, change in watched.uploads[client].items() if name in sent}

"""Robust - a round with attackers and a defence: the guards that put both between clients and method.

work --(attackers' rows are poisoned)--> uploads --(attackers' uploads are changed)--> defence --> update
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import ConfigError, ModeConflict, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.message import Json, Received, Upload
from fedllm.core.method import Method
from fedllm.core.reducer import Mean, Reduction, Update
from fedllm.core.seeds import numpy_stream, torch_stream
from fedllm.core.settings import read
from fedllm.core.tensors import Tensors
from fedllm.modes.around import Around
from fedllm.modes.attacks import Attack, Honest, attacks
from fedllm.modes.defences import Rule, Uploads, defences
from fedllm.modes.flat import Flat
from fedllm.modes.means import means
from fedllm.modes.shields import Shield, Shielded

if TYPE_CHECKING:
    from fedllm.core.server import Server


class Defended(Guard):
    """A defence in place of the mean.

    Args:
        defence: the rule.
        method: must reduce every part by a mean.
        rounds: rounds of the run.
        seed: the run's seed.

    Raises:
        ModeConflict: a method whose uploads the rule cannot take.
    """

    def __init__(self, defence: Rule, method: Method, rounds: int, seed: int) -> None:
        check_rule(defence.key, method)
        self.defence, self.rounds, self.seed = defence, rounds, seed
        self.remembered: Tensors | None = None
        self.seen: dict[str, Json] = {}

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """Keep the uploads of a round until all are there."""
        return _Kept(self, method, expected, round)

    def told(self) -> Json:
        """What the rule made of the last round."""
        return {"defence": self.defence.key, **self.seen} if self.seen else None

    def memory(self) -> Tensors:
        """What the rule remembers."""
        return dict(self.remembered or {})

    def restore(self, facts: Json, memory: Tensors) -> None:
        """Go on with what the rule remembered."""
        self.remembered = dict(memory) or None


class _Kept(Reduction):
    def __init__(self, guard: Defended, method: Method, expected: Mapping[str, Tensors], round: int) -> None:
        super().__init__(method.reducer, expected)
        self.guard, self.round = guard, round
        self.uniform = all(isinstance(r, Mean) and r.weighting == "uniform" for r in self.reducers.values())
        self.flat = Flat(self.expected, self.reducers)
        self.held: dict[str, tuple[torch.Tensor, float]] = {}

    def add(self, client: str, upload: Upload) -> None:
        """Keep an upload."""
        self._check(client, upload)
        self.held[client] = self.flat.row(upload), 1.0 if self.uniform else upload.weight
        self._count(upload)

    def result(self, population: int) -> Update:
        """What the rule makes of them."""
        if not self.held:
            return Update(population=population)
        guard, clients = self.guard, tuple(sorted(self.held))
        rows = torch.stack([self.held[client][0] for client in clients])
        weights = torch.tensor([self.held[client][1] for client in clients], dtype=torch.float64)
        rng, last = torch_stream(guard.seed, "defence", self.round), self.round >= guard.rounds
        place = self.flat.model, self.round, last
        verdict = guard.defence.apply(Uploads(rows, weights, clients, *place, guard.remembered, rng))
        guard.remembered = verdict.memory
        kept = verdict.kept.double()
        guard.seen = {
            "note": verdict.note,
            "dropped": [client for client, share in zip(clients, kept.tolist(), strict=True) if share == 0],
        }
        parts: dict[str, Any] = dict(self.flat.parts(verdict.update))
        return Update(parts, {}, clients=self.clients, population=population, weight=self.weight, metrics=self.metrics)


class Attacked(Around):
    """Attackers among the clients; around another guard, which is what they attack.

    Args:
        attack: what they do.
        inner: the guard of the run.
        method: must reduce every part by a mean, where uploads are changed.
        clients: registered clients.
        seed: the run's seed.
    """

    def __init__(self, attack: Attack, inner: Guard, method: Method, clients: Sequence[str], seed: int) -> None:
        check(attack.key, method)
        super().__init__(inner)
        self.attack, self.seed = attack, seed
        self.attackers = attack.attackers(clients, seed)
        self.before: torch.Tensor | None = None
        self.idle = False

    def told(self) -> Json:
        """As the guard inside, and who attacks; where too few attackers were in the last round, that it did not."""
        idle = {"idle": f"fewer than {self.attack.least} attackers were asked"} if self.idle else {}
        return {**(self.inner.told() or {}), "attack": self.attack.key, "attackers": sorted(self.attackers), **idle}

    def memory(self) -> Tensors:
        """As the guard inside, and where the last round began."""
        before = {} if self.before is None else {"attack.before": self.before}
        return {**self.inner.memory(), **before}

    def restore(self, facts: Json, memory: Tensors) -> None:
        """As the guard inside."""
        rest = dict(memory)
        self.before = rest.pop("attack.before", None)
        self.inner.restore(facts, rest)

    def rows(self, client: str, split: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """An attacker's training rows are poisoned, the same in every round."""
        rows = self.inner.rows(client, split, rows)
        if split != "train" or client not in self.attackers:
            return rows
        return self.attack.poisoned(rows, numpy_stream(self.seed, "poison", client))

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """Honest uploads as they come, then what the attackers make of theirs."""
        sent = list(payloads)
        held: dict[str, Upload] = {}
        async for answer in server.ask(method.work, sent, deadline):
            if answer.client in self.attackers:
                held[answer.client] = answer.upload
            else:
                _added(server, reduction, answer.client, answer.upload)
        flat = Flat(reduction.expected, reduction.reducers)
        model = flat.model
        self.idle = len(held) < self.attack.least
        if held:
            names = sorted(held)
            rng = torch_stream(self.seed, "attack", server.round)
            rows = torch.stack([flat.row(held[name]) for name in names])
            weights = torch.tensor([held[name].weight for name in names], dtype=torch.float64)
            honest = Honest(rows, weights, model, self.before, len(sent), rng)
            changed = self.attack.sent(honest) if server.round >= self.attack.since else rows
            for name, row in zip(names, changed, strict=True):
                upload = held[name]
                upload.parts.update(flat.parts(row))
                _added(server, reduction, name, upload)
        self.before = model
        return None


def robust_guard(
    attack: Mapping[str, Any],
    defence: Mapping[str, Any],
    inner: Guard,
    method: Any,
    clients: Sequence[str],
    rounds: int,
    seed: int,
    labels: Sequence[Any] = (),
) -> Guard:
    """The guard of a recipe's sections `attack` and `defence`.

    Args:
        attack: name and options; empty for none.
        defence: name and options; empty for none.
        inner: the guard of the other sections.
        method: what they stand around.
        clients: the registered clients.
        rounds: rounds of the run.
        seed: the run's seed.
        labels: the classes of the task, which attackers know; empty where it has none.

    Raises:
        ConfigError: an unknown name or option.
        ModeConflict: with another mode or this method, with the reason.
    """
    found = inner
    chosen = named("defence", defences(), defence) if defence else None
    if isinstance(chosen, Shield):
        if inner.hides and not chosen.blind:
            raise ModeConflict(
                f"'{chosen.key}' looks at rows or cuts training into steps, and single examples are private.",
                "With privacy.level=example go shields that change what is sent and nothing else.",
                "local-noise",
            )
        found = Shielded(chosen, inner, method, seed)
    elif chosen is not None:
        if type(inner) is not Guard:
            raise ModeConflict(
                "The section 'defence' needs single uploads, and another section hides or noises them.",
                "It goes with neither 'privacy' nor 'secure'.",
                action="Leave one of them out.",
            )
        found = Defended(chosen, method, rounds, seed)
    if attack:
        if _closed(inner):
            raise ModeConflict(
                "The section 'attack' changes uploads in the open, and another section works at the clients.",
                "It goes with 'defence', and with privacy.level=client.",
                action="Leave one of them out.",
            )
        chosen_attack = named("attack", attacks(), attack).facing(labels)
        found = Attacked(chosen_attack, found, method, clients, seed)
    return found


def _closed(guard: Guard) -> bool:
    """Whether clients hide or noise their uploads themselves."""
    from fedllm.modes.encrypted.sums import HiddenSum
    from fedllm.modes.privacy.examples import Examples
    from fedllm.modes.secagg.guard import SecureSum

    return isinstance(guard, SecureSum | HiddenSum | Examples)


def named(kind: str, known: Mapping[str, type[Any]], given: Mapping[str, Any]) -> Any:
    """The attack or defence that a mapping of name and options stands for."""
    options = dict(given)
    name = str(options.pop("name", ""))
    if name not in known:
        raise ConfigError.unknown(kind, name, known)
    return read(known[name], options, kind)


def _added(server: Server, reduction: Reduction, client: str, upload: Upload) -> None:
    try:
        reduction.add(client, upload)
    except UploadRejected as fault:
        server.reject(client, str(fault))


def check_rule(key: str, method: Any) -> None:
    """Refuse a method whose uploads no rule may change or leave out.

    Raises:
        ModeConflict: see :func:`check`; or clients that keep what they sent.
    """
    check(key, method)
    if method.mirrors:
        raise ModeConflict(
            f"Clients of the method {method.key} keep what they sent, and '{key}' leaves uploads out or changes them.",
            "Both have to stay the same.",
            "fedavg",
        )


def check(key: str, method: Any) -> None:
    """Refuse a method whose uploads are no vectors of one meaning."""
    means(method, f"'{key}'", "and rules need uploads that are vectors of one meaning")

"""Rounds and the local engine - same bits at every width, and nothing that goes wrong goes unnoticed or spreads."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedllm.core import registry
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Received, Texts, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Collect, Mean, Reducers, Update
from fedllm.core.server import Request, Server
from fedllm.core.state import CollectMore, State
from fedllm.core.tensors import Tensors, add
from fedllm.core.train import Schedule, Train
from fedllm.core.wire import decode, encode
from fedllm.core.work import Client
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import RoundRecord, evaluate, play_round
from fedllm.methods import methods
from fedllm.methods.baseline.central import EVERYONE
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.baseline.local import Local
from fedllm.methods.baseline.scaffold import Scaffold
from fedllm.tasks.function import FunctionLearner

CARD = Card(title="T - test", paper="none", cells=("2.1",), travels="x", claim="none")
SIZES = {"c0": 3, "c1": 9, "c2": 16, "c3": 1, "c4": 5, "c5": 30, "c6": 8}
SGD = Train(steps=2, lr=0.02, optimizer="sgd", clip_norm=None, batch_size=4)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    methods()
    before = {kind: dict(found) for kind, found in registry._FOUND.items()}
    yield
    for kind, found in before.items():
        registry._FOUND[kind].clear()
        registry._FOUND[kind].update(found)


class Federation:
    """Seven clients of unequal size; `bad` ones cannot be read."""

    def __init__(self, sizes: dict[str, int] | None = None, unreadable: Sequence[str] = ()) -> None:
        self.sizes, self.unreadable, self.asked = sizes or SIZES, set(unreadable), []
        self.client_ids = sorted(self.sizes)

    def size(self, client_id: str, split: str = "train") -> int:
        self.asked.append(client_id)
        if client_id in self.unreadable:
            raise OSError(f"the file of {client_id} is gone")
        return sum(self.sizes.values()) if client_id == EVERYONE else self.sizes[client_id]

    def rows(self, client_id: str, split: str = "train") -> list[dict[str, Any]]:
        if client_id == EVERYONE:
            return [row for client in self.client_ids for row in self.rows(client, split)]
        stream = numpy.random.default_rng(sorted(self.sizes).index(client_id))
        return [{"x": stream.normal(size=5).tolist()} for _ in range(self.sizes[client_id])]


def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack(list(examples))
    hidden = torch.tanh(rows[:, :-1] @ params["w"] + params["b"])
    hidden = torch.tanh(hidden @ params["w2"] + params["b2"])
    return ((hidden * params["v"]).sum(1) - rows[:, -1]).square().sum()


def start() -> Tensors:
    stream = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 6), "b": (6,), "w2": (6, 5), "b2": (5,), "v": (5,)}
    return {n: torch.randn(shape, generator=stream) for n, shape in shapes.items()}


class Ground:
    """One method over the federation."""

    def __init__(
        self,
        method: Method,
        width: int = 3,
        ids: Sequence[str] | None = None,
        rows: Federation | None = None,
        seed: int = 0,
        folder: Path | None = None,
        debug: bool = False,
        learner: FunctionLearner | None = None,
        rounds: int = 3,
    ) -> None:
        self.method, self.rows = method, rows or Federation()
        self.learner = learner or FunctionLearner(loss, start())
        self.worker = LocalWorker(self.learner, method, self.rows, seed, folder, debug)
        self.engine = LocalEngine(self.worker, ids or self.rows.client_ids, width)
        self.server = Server(self.engine, seed, rounds=rounds)
        first = method.init(self.learner.initial())
        self.state = dataclasses.replace(first, numbers={**first.numbers, "cohort": 2})
        self.records: list[RoundRecord] = []

    def play(self, rounds: int = 1, cohort: int = 7, deadline: float | None = None) -> Ground:
        async def go() -> None:
            for _ in range(rounds):
                self.state, record = await play_round(self.method, self.state, self.server, cohort, deadline)
                self.records.append(record)

        asyncio.run(go())
        return self

    @property
    def record(self) -> RoundRecord:
        return self.records[-1]

    def measure(self) -> dict[str, dict[str, float]]:
        return asyncio.run(evaluate(self.method, self.state, self.server, self.server.clients))

    def request(self, client: str, op: str = "work", received: Any = None, id: str | None = None) -> Request:
        body = encode(received if received is not None else self.method.distribute(self.state, client))
        return Request(id or f"request of {client}", client, op, 1, 3, len(self.rows.client_ids), body)

    def answer(self, *requests: Request) -> dict[str, Any]:
        return {reply.id: reply for reply in self.worker.answer(requests)}


def same(left: State, right: State) -> bool:
    trees = [(left.params, right.params), *((t, right.memory[n]) for n, t in left.memory.items())]
    return left.memory.keys() == right.memory.keys() and all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in trees
    )


# -- the same bits at every width and in every order ------------------------------------------------------------------

KEYS = ["fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "local", "central", "fedit"]
TRAINS = {
    "sgd": Train(steps=3, lr=0.02, optimizer="sgd", clip_norm=None, batch_size=4),
    "momentum, epochs": Train(epochs=2, lr=0.02, optimizer="sgd", momentum=0.9, clip_norm=None, batch_size=4),
    "adamw, accumulated": Train(epochs=1, lr=0.02, clip_norm=None, batch_size=2, accumulate=2, weight_decay=0.1),
    "adamw, by step": Train(
        steps=3, lr=0.02, clip_norm=None, batch_size=4, schedule=Schedule(kind="cosine", by="step", warmup=0.2)
    ),
}


CASES = [(key, "sgd") for key in KEYS]
CASES += [(key, train) for key in ("fedavg", "fedprox", "local", "central") for train in TRAINS if train != "sgd"]
"""Every method once; those with a client half of their own under every kind of training."""


def make(key: str, train: Train, **options: Any) -> Method:
    return methods()[key](train=train, **({"mu": 0.5} if key == "fedprox" else {}), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "train"), CASES)
def test_one_by_one_and_together_give_the_same_bits(key: str, train: str) -> None:
    """State, memory, private stores and measured counts, at widths 1, 3 and 7."""
    grounds = [Ground(make(key, TRAINS[train]), width).play(2) for width in (1, 3, 7)]
    first, counts = grounds[0], grounds[0].measure()
    for other in grounds[1:]:
        assert same(first.state, other.state)
        assert other.measure() == counts
        assert other.records[1].loss == first.records[1].loss
        for client in first.worker.private.clients():
            mine, theirs = first.worker.private.open(client), other.worker.private.open(client)
            assert all(torch.equal(mine[n][k], theirs[n][k]) for n in mine for k in mine[n])  # type: ignore[index,union-attr]


def test_clipping_gives_the_same_bits_at_every_width() -> None:
    stream = torch.Generator().manual_seed(2)
    many = {f"t{n:02d}": torch.randn(n + 1, 4, generator=stream) for n in range(24)}

    def wide(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack(list(examples))
        return torch.stack(
            [(torch.tanh(rows[:, :4] @ t.T).sum(1) - rows[:, 4]).square().sum() for t in params.values()]
        ).sum()

    train = Train(steps=3, lr=0.02, batch_size=4)
    states = [
        Ground(FedAvg(train=train), width, learner=FunctionLearner(wide, many)).play(2).state for width in (1, 3, 7)
    ]
    assert all(same(states[0], other) for other in states[1:])


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e6])
def test_clipping_is_that_of_torch_for_each_client_alone(limit: float) -> None:
    """One step of plain descent on all rows: x - lr * the gradient, shortened to the norm `limit`."""
    train = Train(steps=1, lr=0.1, optimizer="sgd", clip_norm=limit, batch_size=64)
    ground = Ground(FedAvg(train=train), 7)
    found = ground.answer(*(ground.request(c) for c in SIZES))
    for client in SIZES:
        leaves = {n: t.requires_grad_() for n, t in start().items()}
        rows = [torch.tensor(row["x"]) for row in ground.rows.rows(client)]
        (loss(leaves, rows) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
        update = decode(found[f"request of {client}"].body)["update"]
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            assert torch.allclose(update[name], -0.1 * leaf.grad, rtol=1e-4, atol=1e-6)


def test_full_gradients_have_the_same_bits_at_every_width() -> None:
    method = make("scaffold", TRAINS["sgd"], option="I")
    states = [Ground(method, width).play(2).state for width in (1, 3, 7)]
    assert all(same(states[0], other) for other in states[1:])


def test_a_scalar_parameter_can_be_clipped() -> None:
    def shift(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(params["s"] - x[0]).square() for x in examples]).sum()

    learner = FunctionLearner(shift, {"s": torch.tensor(0.0)})
    assert Ground(FedAvg(train=Train(steps=2)), learner=learner).play().record.failed is None


def test_an_epoch_is_one_pass_over_the_rows_also_when_gradients_are_accumulated() -> None:
    method = FedAvg(train=Train(epochs=1, batch_size=2, accumulate=4))
    ground = Ground(method, rows=Federation({"c0": 5}))
    ground.play(cohort=1)
    assert ground.server.meter.tokens == 5, "one token a row here"


def test_clients_in_other_precisions_do_not_share_a_pass() -> None:
    def shift(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(params["s"] - x[0]).square().sum() for x in examples]).sum()

    def ground() -> Ground:
        return Ground(FedAvg(train=SGD), learner=FunctionLearner(shift, {"s": torch.zeros(1)}))

    single = ground().request("c0")
    double = ground().request("c1", received=Received({"s": torch.zeros(1).double()}))
    alone, together = ground().answer(double), ground().answer(single, double)
    assert alone["request of c1"].body == together["request of c1"].body


@pytest.mark.parametrize("train", TRAINS)
def test_a_client_gives_the_same_bytes_alone_and_among_others(train: str) -> None:
    """Clients with fewer steps leave the pass early; the others must not notice, nor must they."""
    ground = Ground(make("fedprox", TRAINS[train]))
    together = ground.answer(*(ground.request(c) for c in SIZES))
    assert len(together) == 7
    for client in SIZES:
        alone = Ground(make("fedprox", TRAINS[train])).answer(ground.request(client))
        reply = alone[f"request of {client}"]
        assert reply.body is not None
        assert reply.body == together[reply.id].body
        assert {k: reply.cost[k] for k in ("tokens", "steps")} == {
            k: together[reply.id].cost[k] for k in ("tokens", "steps")
        }


def test_clients_with_fewer_steps_share_the_pass_as_long_as_they_have_any() -> None:
    widths: list[int] = []

    class Watching(FunctionLearner):
        def losses(self, groups: Any) -> torch.Tensor:
            widths.append(len(groups))
            return super().losses(groups)

    method = FedAvg(train=Train(epochs=1, lr=0.02, optimizer="sgd", clip_norm=None, batch_size=4))
    ground = Ground(method, learner=Watching(loss, start()))
    found = ground.answer(*(ground.request(c) for c in SIZES))
    steps = [-(-n // 4) for n in SIZES.values()]
    assert widths == [sum(s > step for s in steps) for step in range(max(steps))] == [7, 5, 3, 2, 1, 1, 1, 1]
    assert [found[f"request of {c}"].cost["steps"] for c in SIZES] == steps
    assert [found[f"request of {c}"].cost["tokens"] for c in SIZES] == list(SIZES.values())


def test_the_order_of_the_clients_does_not_matter() -> None:
    backwards = sorted(SIZES, reverse=True)
    for key in ("fedavg", "scaffold"):
        method = make(key, TRAINS["sgd"])
        first = Ground(method, 3).play(2, cohort=4)
        other = Ground(method, 3, ids=backwards).play(2, cohort=4)
        assert [r.cohort for r in first.records] == [r.cohort for r in other.records]
        assert same(first.state, other.state)
    assert Ground(FedAvg(), ids=backwards).server.clients == sorted(SIZES)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (Ground(FedAvg(), seed=s).play(2, cohort=3) for s in (5, 5, 6))
    assert same(first.state, again.state)
    assert [r.cohort for r in first.records] == [r.cohort for r in again.records]
    assert not same(first.state, other.state)


# -- one round ---------------------------------------------------------------------------------------------------------


def test_the_record_of_a_round() -> None:
    ground = Ground(FedAvg(train=SGD)).play(2, cohort=3)
    one, two = ground.records
    assert (one.round, two.round, ground.state.round) == (1, 2, 2)
    assert len(one.cohort) == one.used == 3
    assert one.failed is None
    assert one.bytes_up + two.bytes_up == ground.server.meter.total("up")
    assert one.bytes_down + two.bytes_down == ground.server.meter.total("down")
    assert one.tokens + two.tokens == ground.server.meter.tokens
    assert one.loss is not None and one.loss > 0
    line = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert line["event"] == "round" and line["cohort"] == one.cohort


def test_the_loss_is_pooled_over_examples() -> None:
    """One full batch each: the mean loss at the start over all rows of all clients."""
    train = SGD.model_copy(update={"steps": 1, "batch_size": 64})
    ground = Ground(FedAvg(train=train))
    rows = [torch.tensor(r["x"]) for c in SIZES for r in ground.rows.rows(c)]
    expected = loss(start(), rows).item() / len(rows)
    assert ground.play().record.loss == pytest.approx(expected, rel=1e-5)


def test_a_client_without_rows_is_lost_with_a_reason() -> None:
    ground = Ground(FedAvg(train=SGD), rows=Federation({**SIZES, "none": 0})).play(cohort=8)
    assert ground.record.lost == [
        {
            "client": "none",
            "reason": "Client 'none' has no usable rows in its train split. Look at 'fedllm data stats'.",
        }
    ]
    assert ground.record.used == 7
    assert same(ground.state, Ground(FedAvg(train=SGD)).play().state)


@pytest.mark.parametrize("key", KEYS)
def test_a_round_without_a_reply_changes_no_bit(key: str) -> None:
    """Two good rounds, then one in which every client fails."""
    method = make(key, SGD)
    ground = Ground(method, rounds=4).play(2)
    before, held = ground.state, ground.worker.private.clients()
    ground.rows.unreadable = {*SIZES, EVERYONE}
    ground.play()
    assert ground.record.failed == "no usable upload arrived"
    assert ground.record.used == 0 and ground.record.loss is None
    assert {entry["client"] for entry in ground.record.lost} == set(ground.record.cohort)
    assert same(before, ground.state)
    assert ground.state.round == 3
    assert ground.worker.private.clients() == held
    ground.rows.unreadable = set()
    ground.play()
    assert ground.record.failed is None, "the run can go on"


class Sending(Method):
    """Uploads what a table says instead of training."""

    card = CARD
    private = ("mark",)
    sent: dict[str, Any] = {}
    """client -> function that changes its upload, or makes another."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """A change of one everywhere, then what the table says."""
        client.private["mark"] = client.round
        upload = Upload({n: torch.ones_like(t) for n, t in received.params.items()}, 1.0, {"loss": (1.0, 1.0)})
        change = self.sent.get(client.id)
        return upload if change is None else change(upload)


def with_(upload: Upload, **changes: Any) -> Upload:
    for name, value in changes.items():
        setattr(upload, name, value)
    return upload


def poison(value: float) -> Callable[[Upload], Upload]:
    def change(upload: Upload) -> Upload:
        upload.update["w"][0, 0] = value
        return upload

    return change


def reshaped(upload: Upload) -> Upload:
    upload.update["b"] = torch.ones(1)
    return upload


REJECTED: dict[str, Callable[[Upload], Upload]] = {
    "NaN": poison(float("nan")),
    "infinity": poison(float("inf")),
    "shape": reshaped,
    "missing": lambda u: with_(u, parts={"update": Dense({n: t for n, t in u.update.items() if n != "b"})}),
    "no part": lambda u: with_(u, parts={}),
    "other part": lambda u: with_(u, parts={**u.parts, "extra": Dense({})}),
    "other kind": lambda u: with_(u, parts={"update": Texts(("x",))}),
    "negative weight": lambda u: with_(u, weight=-1.0),
    "NaN weight": lambda u: with_(u, weight=float("nan")),
    "NaN loss": lambda u: with_(u, metrics={"loss": (float("nan"), 1.0)}),
}
LOST: dict[str, Callable[[Upload], Any]] = {
    "raises": lambda u: 1 / 0,
    "returns nothing": lambda u: None,
    "returns tensors": lambda u: u.update,
    "returns a received": lambda u: Received(u.update),
    "sends a NumPy number": lambda u: with_(u, numbers={"n": numpy.int64(3)}),
    "sends complex numbers": lambda u: with_(u, parts={"update": Dense({"w": torch.ones(1, dtype=torch.complex64)})}),
}


@pytest.mark.parametrize(("how", "where"), [*((h, "rejected") for h in REJECTED), *((h, "lost") for h in LOST)])
def test_a_bad_upload_is_left_out_and_its_client_rolls_back(how: str, where: str) -> None:
    """The first client of the cohort is the bad one, so that it could set the measure for the rest."""
    change = {**REJECTED, **LOST}[how]
    ground = Ground(Sending(sent={"c0": change})).play()
    assert [entry["client"] for entry in getattr(ground.record, where)] == ["c0"]
    assert all(entry["reason"] for entry in (*ground.record.lost, *ground.record.rejected))
    assert (ground.record.used, ground.record.failed) == (6, None)
    assert all(torch.equal(t, start()[n] + 1) for n, t in ground.state.params.items())
    assert ground.worker.private.clients() == sorted(set(SIZES) - {"c0"})
    assert (ground.record.lost, ground.record.rejected) == (ground.server.lost, ground.server.rejected)


def test_weights_that_sum_to_zero_fail_the_round_and_keep_the_state() -> None:
    method = Sending(sent={c: lambda u: with_(u, weight=0.0) for c in SIZES})
    ground = Ground(method)
    before = ground.state
    ground.play()
    assert ground.record.failed == "the weights of the uploads' 'update' sum to zero"
    assert same(before, ground.state)
    assert ground.worker.private.clients() == []


def test_a_state_that_is_not_finite_is_not_committed() -> None:
    method = Sending(sent={c: poison(3e38) for c in SIZES})

    class Doubling(Sending):
        """Steps too far."""

        card = CARD

        def finalize(self, state: State, update: Update) -> State:
            """x + 2 d."""
            return state.with_(add(state.params, update.params, 2.0))

    ground = Ground(Doubling(sent=method.sent))
    before = ground.state
    ground.play()
    assert ground.record.failed == "the new state is not finite in 'w'"
    assert same(before, ground.state)
    assert ground.worker.private.clients() == [], "nobody's private change is kept for a round that did not count"
    assert ground.record.used == 7


def test_an_empty_cohort_fails_the_round() -> None:
    class Nobody(Sending):
        """Asks nobody."""

        card = CARD

        def cohort(self, *_: Any) -> list[str]:
            """Nobody."""
            return []

    ground = Ground(Nobody()).play()
    assert ground.record.failed == "no usable upload arrived"
    assert ground.state.round == 1


# -- collect more -----------------------------------------------------------------------------------------------------


class Patient(Sending):
    """Commits when it has seen enough clients."""

    card = CARD
    enough: int = 5
    """Clients it waits for."""
    more: int | None = 2
    """How many it asks for then."""

    def finalize(self, state: State, update: Update) -> State | CollectMore:
        """Commit, or wait."""
        if update.clients < self.enough:
            return CollectMore(self.more)
        return state.with_(add(state.params, update.params))


def test_a_method_may_ask_for_more_clients() -> None:
    ground = Ground(Patient()).play(cohort=2)
    assert ground.record.failed is None
    assert ground.record.used == len(ground.record.cohort) == 6
    assert len(set(ground.record.cohort)) == 6, "others are asked, not the same again"
    assert ground.worker.private.clients() == sorted(ground.record.cohort), "all turns are committed together"
    assert all(torch.equal(t, start()[n] + 1) for n, t in ground.state.params.items())
    assert ground.state.round == 1


def test_as_many_again_is_the_default() -> None:
    ground = Ground(Patient(more=None)).play(cohort=3)
    assert ground.record.used == 6


def test_the_last_turn_asks_those_that_are_left() -> None:
    ground = Ground(Patient(enough=7)).play(cohort=3)
    assert ground.record.used == 7
    assert sorted(ground.record.cohort) == sorted(SIZES)


def test_collecting_without_end_fails_the_round() -> None:
    ground = Ground(Patient(enough=10**9, more=1))
    before = ground.state
    ground.play(cohort=1)
    assert ground.record.failed == "the method asked for more clients than there are"  # 7, fewer than COLLECT_LIMIT
    assert same(before, ground.state)
    assert ground.worker.private.clients() == []


def test_a_turn_without_a_reply_does_not_undo_the_turns_before() -> None:
    """Those lost are on the record, and the rest are asked."""
    ground = Ground(Patient(enough=4, sent={c: lambda u: 1 / 0 for c in ("c0", "c1", "c2")})).play(cohort=2)
    assert ground.record.failed is None
    assert ground.record.used == 4
    assert {entry["client"] for entry in ground.record.lost} <= {"c0", "c1", "c2"}


def test_nobody_is_counted_twice_with_the_same_work() -> None:
    class Training(Patient):
        """Trains."""

        card = CARD
        work = FedAvg.work

    ground = Ground(Training(train=SGD, enough=8, more=1), rows=Federation({"c0": 3, "c1": 9}))
    uploads = []
    receive = ground.server._receive
    ground.server._receive = lambda op, reply: uploads.append(reply.body) or receive(op, reply)  # type: ignore
    ground.play(cohort=2)
    assert len(set(uploads)) == len(uploads)


# -- collect and parts ------------------------------------------------------------------------------------------------


def test_collected_parts_reach_finalize_by_client() -> None:
    class Gather(Method):
        """Collects texts."""

        card = CARD

        @on_client
        async def work(self, client: Client, received: Received) -> Upload:
            """Its own name."""
            return Upload(words=Texts((client.id,)))

        @property
        def reducer(self) -> Reducers:
            """All of them."""
            return {"words": Collect()}

        def finalize(self, state: State, update: Update) -> State:
            """Keep the words."""
            words = [part.texts[0] for part in update.collected["words"].values()]  # type: ignore[attr-defined]
            return dataclasses.replace(state, numbers={"words": words})

    ground = Ground(Gather()).play()
    assert ground.state.numbers["words"] == sorted(SIZES)
    assert not Gather().linear()


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_measuring_changes_nothing() -> None:
    class Curious(Local):
        """Tries to keep something while it is measured."""

        card = CARD

        @on_client
        async def evaluate(self, client: Client, received: Received) -> Upload:
            """Overwrites its own weights."""
            upload = await super().evaluate(client, received)
            client.private["params"] = {n: torch.zeros_like(t) for n, t in client.initial().items()}
            return upload

    plain, curious = Ground(Local(train=SGD)).play(1), Ground(Curious(train=SGD)).play(1)
    assert plain.measure() == curious.measure() == curious.measure()
    plain.play(1), curious.play(1)
    for client in SIZES:
        mine, theirs = plain.worker.private.open(client)["params"], curious.worker.private.open(client)["params"]
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)  # type: ignore[index,union-attr]


def test_counts_add_up_to_the_pooled_loss() -> None:
    ground = Ground(FedAvg(train=SGD)).play(1)
    counts = ground.measure()
    assert {c: found["examples"] for c, found in counts.items()} == SIZES
    rows = [torch.tensor(r["x"]) for c in SIZES for r in ground.rows.rows(c)]
    assert sum(f["loss"] for f in counts.values()) == pytest.approx(loss(ground.state.params, rows).item(), rel=1e-4)
    assert ground.server.meter.messages["evaluate/up"] == 7


def test_clients_that_could_not_be_measured_are_on_record() -> None:
    ground = Ground(FedAvg(train=SGD), rows=Federation(unreadable=["c1"])).play(1)
    counts = ground.measure()
    assert "c1" not in counts
    assert [entry["client"] for entry in ground.server.lost] == ["c1"]


# -- the worker never raises ------------------------------------------------------------------------------------------


def test_a_function_that_was_not_marked_cannot_be_asked_for() -> None:
    ground = Ground(FedAvg(train=SGD))
    for op in ("finalize", "model_dump", "__init__", "wrok", "cohort"):
        reply = ground.answer(ground.request("c0", op))["request of c0"]
        assert reply.body is None
        assert f"no client-side function '{op}'" in reply.error
    assert "Did you mean 'work'?" in ground.answer(ground.request("c0", "wrok"))["request of c0"].error


@pytest.mark.parametrize(
    "body",
    [b"", b"x" * 100, encode(Upload({"w": torch.ones(1)})), encode(Received())],
    ids=["none", "noise", "upload", "bare"],
)
def test_a_request_that_is_no_received_is_an_error_reply(body: bytes) -> None:
    ground = Ground(FedAvg(train=SGD))
    bad = dataclasses.replace(ground.request("c0"), body=body)
    found = ground.answer(bad, ground.request("c1"))
    assert found["request of c0"].body is None
    assert found["request of c0"].error
    assert found["request of c1"].body is not None


def test_an_unreadable_client_is_an_error_reply_and_the_others_are_answered() -> None:
    ground = Ground(FedAvg(train=SGD), rows=Federation(unreadable=["c1"]))
    found = ground.answer(*(ground.request(c) for c in ("c0", "c1", "c2")))
    assert found["request of c1"].error == "OSError: the file of c1 is gone"
    assert found["request of c0"].body is not None and found["request of c2"].body is not None


def test_a_damaged_private_entry_is_an_error_reply(tmp_path: Path) -> None:
    ground = Ground(Local(train=SGD), folder=tmp_path).play(1)
    (tmp_path / ground.worker.private.manifest()["c3"]).write_bytes(b"damaged")
    ground.play(1)
    assert [entry["client"] for entry in ground.record.lost] == ["c3"]
    assert "private entry of client 'c3' cannot be read" in ground.record.lost[0]["reason"]


def test_what_was_lost_has_its_kind_and_text_in_the_reason() -> None:
    ground = Ground(Sending(sent={"c0": lambda u: {}["nothing"], "c1": lambda u: None})).play()
    reasons = {entry["client"]: entry["reason"] for entry in ground.record.lost}
    assert reasons["c0"] == "KeyError: 'nothing'"
    assert reasons["c1"] == "A client-side function returned a NoneType. Expected: an Upload."


@pytest.mark.parametrize("change", [lambda u: 1 / 0, lambda u: None], ids=["raises", "returns nothing"])
def test_debugging_lets_the_exception_through(change: Any) -> None:
    ground = Ground(Sending(sent={"c0": change}), debug=True)
    with pytest.raises((ZeroDivisionError, ConfigError)):
        ground.play()


def test_replies_belong_to_requests_not_to_clients() -> None:
    """A protocol may ask one client two things at once."""

    class Echo(Method):
        """Says what it was told."""

        card = CARD

        @on_client
        async def work(self, client: Client, received: Received) -> Upload:
            """The number it was given."""
            return Upload(numbers=received.numbers)

    ground = Ground(Echo(), width=4)
    requests = [ground.request("c0", received=Received(numbers={"n": n}), id=f"r{n}") for n in range(3)]

    async def go() -> list[Any]:
        return [reply async for reply in ground.engine.ask(requests, None)]

    replies = asyncio.run(go())
    assert [reply.id for reply in replies] == ["r0", "r1", "r2"]
    assert [decode(reply.body).numbers["n"] for reply in replies] == [0, 1, 2]


# -- several turns before they are settled ----------------------------------------------------------------------------


class Asking(Method):
    """Appends to a private list, then does as it is told."""

    card = CARD
    private = ("seen",)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Keep the number it was given."""
        client.private["seen"] = [*(client.private.get("seen") or []), received.numbers["n"]]  # type: ignore[misc]
        if received.numbers["how"] == "raises":
            raise ValueError("no")
        value = float("nan") if received.numbers["how"] == "NaN" else 0.0
        return Upload({"w": torch.tensor([value])})


def turns(*hows: str, unreadable_at: int | None = None) -> list[int]:
    """What a client kept after one turn for each of `hows`, settled once at the end."""
    ground = Ground(Asking())

    async def go() -> None:
        for number, how in enumerate(hows):
            ground.rows.unreadable = {"c0"} if number == unreadable_at else set()
            async for _ in ground.server.ask(Asking.work, {"c0": Received(numbers={"n": number, "how": how})}):
                pass
        ground.server.settle()

    asyncio.run(go())
    return ground.worker.private.open("c0").get("seen") or []  # type: ignore[return-value]


def test_turns_before_settling_add_up_and_failed_ones_leave_no_trace() -> None:
    assert turns("good", "good", "good") == [0, 1, 2]
    assert turns("good", "raises", "good") == [0, 2]
    assert turns("raises", "good") == [1]
    assert turns("good", "raises") == [0]
    assert turns("raises") == []


def test_a_turn_that_never_began_does_not_undo_the_one_before() -> None:
    assert turns("good", "good", unreadable_at=1) == [0]


def test_a_turn_that_failed_and_was_late_is_dropped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground(Asking(), 1)
    lateness = iter((False, False, False, True))  # before and after each turn: the second ends late

    async def go() -> None:
        for number, how in enumerate(("good", "raises")):
            payloads = {"c0": Received(numbers={"n": number, "how": how})}
            async for _ in ground.server.ask(Asking.work, payloads):
                pass
        ground.server.settle()

    monkeypatch.setattr("fedllm.engine.local._late", lambda *_: next(lateness))
    asyncio.run(go())
    assert [entry["reason"] for entry in ground.server.lost] == ["no answer within None s"]
    assert ground.worker.private.open("c0").get("seen") == [0]


@pytest.mark.parametrize(("hows", "kept"), [(("NaN", "good"), [1]), (("good", "NaN"), [0])])
def test_a_rejected_turn_leaves_no_trace_either(hows: tuple[str, ...], kept: list[int]) -> None:
    assert turns(*hows) == kept


# -- deadline, enough, laziness ---------------------------------------------------------------------------------------


class Clock:
    """A clock that moves by one second with every pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


class Slow(FunctionLearner):
    """Takes a second for each pass."""

    clock: Clock

    def losses(self, groups: Any) -> torch.Tensor:
        self.clock.now += 1.0
        return super().losses(groups)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("fedllm.engine.local.time", found)
    return found


def slow(clock: Clock) -> FunctionLearner:
    learner = Slow(loss, start())
    learner.clock = clock
    return learner


def test_clients_that_miss_the_deadline_are_lost_and_roll_back(clock: Clock) -> None:
    """Two at a time, two seconds a pair: the second pair ends at 4 s, after the deadline of 3 s."""
    ground = Ground(Scaffold(train=SGD), 2, learner=slow(clock)).play(deadline=3.0)
    assert ground.record.used == 2
    assert [entry["client"] for entry in ground.record.lost] == ["c2", "c3", "c4", "c5", "c6"]
    assert {entry["reason"] for entry in ground.record.lost} == {"no answer within 3.0 s"}
    assert clock.now == 4.0, "nobody is trained after the deadline"
    assert ground.worker.private.clients() == ["c0", "c1"]
    assert ground.record.failed is None


def test_a_deadline_nobody_makes_fails_the_round(clock: Clock) -> None:
    ground = Ground(FedAvg(train=SGD), 7, learner=slow(clock)).play(deadline=1.0)
    assert ground.record.failed == "no usable upload arrived"
    assert len(ground.record.lost) == 7


def test_without_a_deadline_everybody_is_waited_for(clock: Clock) -> None:
    assert Ground(FedAvg(train=SGD), 1, learner=slow(clock)).play().record.used == 7


def ask(ground: Ground, clients: Sequence[str], **options: Any) -> tuple[list[str], list[str]]:
    """The clients that answered, and those for whom a payload was made."""
    made: list[str] = []

    def payloads() -> Iterator[tuple[str, Received]]:
        for client in clients:
            made.append(client)
            yield client, ground.method.distribute(ground.state, client)

    async def go() -> list[str]:
        return [answer.client async for answer in ground.server.ask(ground.method.work, payloads(), **options)]

    return asyncio.run(go()), made


def test_enough_stops_and_no_further_payload_is_made() -> None:
    ground = Ground(Scaffold(train=SGD), 2)
    answered, made = ask(ground, sorted(SIZES), enough=3)
    assert answered == ["c0", "c1", "c2"]
    assert made == ["c0", "c1", "c2", "c3"], "the pass of c2 had room for c3; nothing beyond it was made"
    ground.server.settle()
    assert ground.worker.private.clients() == ["c0", "c1", "c2"], "c3 worked in vain: it rolls back"


def test_failed_clients_do_not_count_as_enough() -> None:
    ground = Ground(Sending(sent={"c0": lambda u: 1 / 0}), 1)
    answered, made = ask(ground, sorted(SIZES), enough=2)
    assert answered == ["c1", "c2"]
    assert made == ["c0", "c1", "c2"]


def test_payloads_are_made_a_pass_at_a_time() -> None:
    ground, made = Ground(FedAvg(train=SGD), 3), []
    seen: list[int] = []

    def payloads() -> Iterator[tuple[str, Received]]:
        for client in sorted(SIZES):
            made.append(client)
            yield client, ground.method.distribute(ground.state, client)

    async def go() -> None:
        async for _ in ground.server.ask(ground.method.work, payloads()):
            seen.append(len(made))

    asyncio.run(go())
    assert seen == [3, 3, 3, 6, 6, 6, 7]


def test_clients_that_are_not_asked_cost_nothing() -> None:
    rows = Federation({f"c{n:04d}": 2 for n in range(2000)})
    ground = Ground(Scaffold(train=SGD), rows=rows).play(1, cohort=3)
    assert set(rows.asked) == set(ground.record.cohort)
    assert len(ground.worker.private.clients()) == 3
    assert len(ground.worker._examples) == 3


def test_frozen_tensors_stay_at_their_first_values_everywhere() -> None:
    class OnlyV(FedAvg):
        """Moves v alone."""

        card = CARD

        def trainable(self, name: str) -> bool:
            """v."""
            return name == "v"

    method = OnlyV(train=SGD)
    ground = Ground(method)
    ground.state = method.init({n: t for n, t in start().items() if method.trainable(n)})
    ground.play(1)
    assert set(ground.state.params) == {"v"}
    assert ground.record.failed is None
    leaves = {n: t.clone().requires_grad_(n == "v") for n, t in start().items()}
    alone = Ground(method, rows=Federation({"c0": 3}))
    alone.state = method.init({"v": start()["v"]})
    alone.play(1, cohort=1)
    x = leaves["v"].detach().clone()
    rows = [torch.tensor(r["x"]) for r in alone.rows.rows("c0")]
    for _ in range(2):
        tree = {**start(), "v": x.clone().requires_grad_()}
        (loss(tree, rows) / 3).backward()
        x = x - 0.02 * tree["v"].grad  # type: ignore[operator]
    assert torch.allclose(alone.state.params["v"], x, atol=1e-6)


def test_mean_is_the_reducer_that_means_fedavg() -> None:
    assert FedAvg().reducer == Mean("examples")

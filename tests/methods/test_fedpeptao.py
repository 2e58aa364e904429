"""FedPepTAO - the choice of layers, half of the bytes, personal prefixes, and corrections kept on the server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.blocks.ask_mean import ask_mean
from fedllm.blocks.server_control import Brought, mean_change, mean_correction, renewed_controls
from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Collect, Mean, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.effects.rig import Play
from fedllm.methods.prompts.fedpeptao import FedPepTAO
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.recipe import load_recipe
from fedllm.run import method_of
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

TRAIN = Train(steps=3, batch_size=2, lr=0.05)
TOKENS, LAYERS = 3, 2
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def rows(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"spell {WORDS[(start + i) % 8]}", "response": WORDS[(start + i) % 8]} for i in range(count)
    ]


def learner() -> TransformerLearner:
    task = TaskSettings(template="plain", max_length=64)
    return TransformerLearner(toy_model("llama"), task, AdapterSettings(kind="prefix", tokens=TOKENS), None, 0)


FOUR = {f"c{k}": rows(2 * k, 4 + k) for k in range(4)}


def play(method: FedPepTAO, held: Any = None, **options: Any) -> Play:
    found = Play(method, learner(), held or FOUR, **options)
    found.state = State(found.state.params, {}, {"cohort": found.cohort}, 0)
    return found


def tapped(found: Play) -> list[tuple[str, str, Any, Any]]:
    """(op, client, received, upload) of everything asked from here on."""
    said, answer = [], found.worker.answer

    def listening(requests: Any) -> Any:
        by_id = {request.id: request for request in requests}
        for reply in answer(requests):
            request = by_id[reply.id]
            said.append((request.op, request.client, decode(request.body), decode(reply.body) if reply.body else None))
            yield reply

    found.worker.answer = listening  # type: ignore[method-assign]
    return said


# --- the choice of layers ----------------------------------------------------------------------------------------


def test_half_of_the_layers_are_half_of_the_bytes() -> None:
    """The tensors that travel in a round, up and down, by name and to the byte."""
    size: dict[float, int] = {}
    for share in (0.5, 1.0):
        found = play(FedPepTAO(train=TRAIN, share=share))
        said = tapped(found)
        found.rounds(2)
        rounds = [entry for entry in said if entry[0] == "work"]
        assert len(rounds) == 8
        trees = [m[part] for _, _, r, u in rounds for m, part in ((r, "params"), (u, "update"))]
        size[share] = sum(t.numel() * t.element_size() for tree in trees for t in tree.values())
        chosen = found.state.numbers["shared"]
        names = sorted(f"prefix.{layer}.{part}" for layer in chosen for part in ("key", "value"))
        assert all(sorted(tree) == names for tree in trees) and len(chosen) == LAYERS * share
    heads, width = 2, 16
    assert size[1.0] == 2 * 8 * LAYERS * 2 * heads * TOKENS * width * 4
    assert size[0.5] * 2 == size[1.0]


def test_layers_are_ranked_by_the_mean_of_the_clients_scores() -> None:
    found = play(FedPepTAO(train=TRAIN, share=0.5))
    said = tapped(found)
    found.rounds(1)
    scores = {c: u["update"]["scores"] for op, c, _, u in said if op == "score_layers"}
    assert sorted(scores) == sorted(FOUR)
    sizes = {client: len(held) for client, held in FOUR.items()}
    mean = sum(scores[c] * n for c, n in sizes.items()) / sum(sizes.values())
    assert found.state.numbers["scores"] == pytest.approx(mean.tolist())
    assert found.state.numbers["shared"] == [int(mean.argmax())]


def test_a_client_with_one_row_or_copies_of_one_has_no_say() -> None:
    held = {**FOUR, "one": rows(0, 1), "same": rows(0, 1) * 5}
    found = play(FedPepTAO(train=TRAIN, share=0.5), held)
    said = tapped(found)
    found.rounds(1)
    weights = {c: u.weight for op, c, _, u in said if op == "score_layers"}
    assert weights == {"c0": 4, "c1": 5, "c2": 6, "c3": 7, "one": 0, "same": 0}
    lonely = play(FedPepTAO(train=TRAIN, share=0.5), {"one": rows(0, 1), "two": rows(3, 1)})
    assert lonely.rounds(1).numbers["shared"] == [0], "nobody could tell: the first layers"


def test_the_share_is_measured_after_a_warm_up() -> None:
    found = play(FedPepTAO(train=TRAIN, warm_up=3, lanczos=6), cohort=2)
    said = tapped(found)
    numbers = found.rounds(1).numbers
    assert [entry[0] for entry in said] == ["score_layers"] * 4 + ["warm"] * 6 + ["measure_share"] * 2 + ["work"] * 2
    shares = [float(u["update"]["share"]) for op, _, _, u in said if op == "measure_share"]
    assert numbers["share"] == pytest.approx(sum(shares) / 2) and all(0 <= share <= 1 for share in shares)
    warm = [(c, u.update) for op, c, _, u in said if op == "warm"]
    assert all(len(update) == 2 * LAYERS for _, update in warm), "the warm-up moves all layers"
    mine = [r.params for op, _, r, _ in said if op in ("warm", "measure_share")]
    assert not torch.equal(mine[0]["prefix.0.key"], mine[-1]["prefix.0.key"])
    first = learner().initial()
    begun = [r.params for op, _, r, _ in said if op == "work"]
    assert all(torch.equal(tree[n], first[n]) for tree in begun for n in tree), "training begins at the first values"


def test_the_share_is_one_where_nobody_can_tell_and_never_takes_no_layer() -> None:
    class BlindShare(FedPepTAO):
        card = FedPepTAO.card

        @on_client
        async def measure_share(self, client: Client, received: Received) -> Upload:
            raise ValueError("no gradient")

    class FlatShare(FedPepTAO):
        card = FedPepTAO.card

        @on_client
        async def measure_share(self, client: Client, received: Received) -> Upload:
            return Upload({"share": torch.zeros(1)}, client.size)

    blind = play(BlindShare(train=TRAIN, warm_up=1)).rounds(1)
    assert blind.numbers["share"] == 1.0 and blind.numbers["shared"] == [0, 1]
    flat = play(FlatShare(train=TRAIN, warm_up=1)).rounds(1)
    assert flat.numbers["share"] == 0.0 and len(flat.numbers["shared"]) == 1


def test_a_wrong_score_is_rejected_and_the_rest_counts() -> None:
    class WrongScore(FedPepTAO):
        card = FedPepTAO.card

        @on_client
        async def score_layers(self, client: Client, received: Received) -> Upload:
            upload = await super().score_layers(client, received)
            if client.id == "c1":
                upload.parts["update"] = Dense({"scores": torch.zeros(5, dtype=torch.float64)})
            if client.id == "c2":
                upload.update["scores"].fill_(float("nan"))
            return upload

    found = play(WrongScore(train=TRAIN, share=0.5))
    found.rounds(1)
    assert sorted(entry["client"] for entry in found.records[0].rejected) == ["c1", "c2"]
    assert found.records[0].used == 4


def test_ask_mean_without_answers() -> None:
    found = play(FedPepTAO(train=TRAIN))
    nothing = asyncio.run(ask_mean(found.server, FedPepTAO.warm, {}, {"x": torch.zeros(1)}))
    assert nothing is None


# --- personal prefixes -------------------------------------------------------------------------------------------


def test_other_layers_are_trained_kept_and_measured_at_their_client() -> None:
    found = play(FedPepTAO(train=TRAIN, share=0.5))
    found.rounds(1)
    first, chosen = learner().initial(), found.state.numbers["shared"][0]
    kept = {client: found.worker.private.open(client)["personal"] for client in FOUR}
    other = 1 - chosen
    for tree in kept.values():
        assert isinstance(tree, dict) and sorted(tree) == [f"prefix.{other}.key", f"prefix.{other}.value"]
        assert not torch.equal(tree[f"prefix.{other}.key"], first[f"prefix.{other}.key"])
    a, b = kept["c0"], kept["c1"]
    assert not torch.equal(a[f"prefix.{other}.key"], b[f"prefix.{other}.key"])  # type: ignore[index,call-overload]
    assert torch.equal(found.state.params[f"prefix.{other}.key"], first[f"prefix.{other}.key"]), "unknown to the server"
    found.worker.private.settle([])
    said = tapped(found)
    found.rounds(1)
    again = {client: found.worker.private.open(client)["personal"] for client in FOUR}
    assert all(not torch.equal(kept[c][n], again[c][n]) for c in FOUR for n in kept[c])  # type: ignore[index,union-attr,call-overload]
    sent = [t for _, _, _, u in said if u for part in u.parts.values() for t in part.to_wire()[0].values()]
    private = [t for tree in again.values() for t in tree.values()]  # type: ignore[union-attr]
    assert not any(t.shape == s.shape and torch.equal(t, s) for t in private for s in sent)


def test_all_layers_shared_leave_nothing_personal() -> None:
    found = play(FedPepTAO(train=TRAIN, share=1.0))
    found.rounds(1)
    assert found.worker.private.clients() == []


# --- the server's corrections ------------------------------------------------------------------------------------


def brought(sizes: list[float], values: list[list[float]], steps: list[float] | None = None) -> dict[str, Brought]:
    """One client per entry: weight, change, steps (4 each), rates of 0.1 a step."""
    taken = steps or [4.0] * len(sizes)
    return {
        f"c{k}": Brought({"x": torch.tensor(value)}, size, step, 0.1 * step)
        for k, (size, value, step) in enumerate(zip(sizes, values, taken, strict=True))
    }


def test_with_everybody_and_equal_steps_the_controls_are_the_mean_gradient() -> None:
    """(b): mean(c_i) = c = (w - w') / (steps * lr)."""
    came = brought([3, 3, 3], [[1.0, 0.0], [0.0, 2.0], [-4.0, 1.0]])
    new, c = renewed_controls(came, {}, {"x": torch.zeros(2)}, 1.0)
    by_hand = -mean_change(came)["x"] / (4 * 0.1)
    assert torch.allclose(c["x"], by_hand, atol=1e-6)
    assert torch.allclose(torch.stack([own["x"] for own in new.values()]).mean(0), c["x"], atol=1e-6)


def test_with_equal_weights_and_everybody_the_correction_is_nothing() -> None:
    """(a), over several rounds: sum (c - c_i) = 0; not so with unequal weights or with half of the clients."""
    stream = torch.Generator().manual_seed(0)
    controls: dict[str, Tensors] = {}
    c: Tensors = {"x": torch.zeros(2)}
    for _ in range(4):
        came = brought([2, 2, 2], torch.randn(3, 2, generator=stream).tolist())
        new, c = renewed_controls(came, controls, c, 1.0)
        controls.update(new)
        assert torch.allclose(mean_correction(came, controls, c)["x"], torch.zeros(2), atol=1e-5)
    uneven = brought([1, 2, 6], torch.randn(3, 2, generator=stream).tolist())
    new, other = renewed_controls(uneven, controls, c, 1.0)
    assert mean_correction(uneven, {**controls, **new}, other)["x"].abs().max() > 0.1
    half = {k: v for k, v in came.items() if k != "c0"}
    new, other = renewed_controls(half, controls, c, 2 / 3)
    assert mean_correction(half, {**controls, **new}, other)["x"].abs().max() > 0.1


def test_steps_weigh_the_mean_control_and_no_step_changes_nothing() -> None:
    came = brought([1, 1, 1], [[2.0], [8.0], [0.0]], [2.0, 6.0, 0.0])
    new, c = renewed_controls(came, {}, {"x": torch.zeros(1)}, 0.5)
    assert sorted(new) == ["c0", "c1"]
    assert new["c0"]["x"].item() == pytest.approx(-10) and new["c1"]["x"].item() == pytest.approx(-8 / 0.6)
    assert c["x"].item() == pytest.approx(0.5 * (2 / 8 * -10 + 6 / 8 * -8 / 0.6))
    idle = brought([1], [[3.0]], [0.0])
    assert renewed_controls(idle, {}, {"x": torch.zeros(1)}, 1.0) == ({}, {"x": torch.zeros(1)})


def update(came: dict[str, Brought], population: int = 3) -> Update:
    spent = {c: Dense({"spent": torch.tensor([b.weight, b.steps, b.rates])}) for c, b in came.items()}
    parts = {"update": {c: Dense(b.delta) for c, b in came.items()}, "spent": spent}
    return Update(collected=parts, clients=len(came), population=population)  # type: ignore[arg-type]


def states(method: FedPepTAO, rounds: list[dict[str, Brought]], population: int = 3) -> list[State]:
    found = [State({"x": torch.zeros(1)}, {}, {}, 0)]
    for number, came in enumerate(rounds, 1):
        state = method.finalize(found[-1], update(came, population))
        found.append(State(state.params, state.memory, state.numbers, number))
    return found


def test_the_server_step_by_hand() -> None:
    """Two rounds with everybody and equal weights: plain momentum on the difference of pseudo-gradients."""
    rounds = [brought([1, 1], [[2.0], [4.0]]), brought([1, 1], [[1.0], [0.0]]), brought([1, 1], [[0.5], [0.5]])]
    found = states(FedPepTAO(), rounds, 2)
    assert found[1].params["x"].item() == pytest.approx(3.0), "the first round is the mean"
    g = -3.0 - -0.5  # D1 - D2 with D = w - w'
    m = 0.1 * g
    assert found[2].params["x"].item() == pytest.approx(3.5 - 0.05 * m)
    w, m = 3.5 - 0.05 * m, 0.9 * m + 0.1 * (-0.5 - -0.5)
    assert found[3].params["x"].item() == pytest.approx(w + 0.5 - 0.05 * 0.99 * m)
    assert found[3].memory["momentum"]["x"].item() == pytest.approx(m)
    pseudo = states(FedPepTAO(gradient="pseudo"), rounds, 2)
    assert pseudo[2].params["x"].item() == pytest.approx(3.5 - 0.05 * 0.1 * -0.5)


def test_equal_clients_with_and_without_control_are_the_same() -> None:
    """(a) on the whole server step."""
    came = [brought([2, 2], [[2.0], [4.0]]), brought([2, 2], [[1.0], [3.0]]), brought([2, 2], [[-1.0], [0.0]])]
    with_control = states(FedPepTAO(), came, 2)[-1]
    plain = [State({"x": torch.zeros(1)}, {}, {}, 0)]
    for number, one in enumerate(came, 1):
        reduced = Update({"update": Dense(mean_change(one))}, clients=2, population=2)
        state = FedPepTAO(control=False).finalize(plain[-1], reduced)
        plain.append(State(state.params, state.memory, state.numbers, number))
    assert torch.allclose(with_control.params["x"], plain[-1].params["x"], atol=1e-6)
    assert set(plain[-1].memory) == {"momentum", "last"}


def test_absent_clients_keep_stale_controls() -> None:
    rounds = [brought([1, 1, 1], [[1.0], [2.0], [5.0]]), {"c1": brought([1, 1], [[0.0], [1.0]])["c1"]}]
    found = states(FedPepTAO(), rounds)
    for client in ("c0", "c2"):
        assert torch.equal(found[2].memory[f"control.{client}"]["x"], found[1].memory[f"control.{client}"]["x"])
        assert bool(found[2].memory[f"control.{client}"]["x"].any())
    assert not torch.equal(found[2].memory["control.c1"]["x"], found[1].memory["control.c1"]["x"])


def test_the_rate_falls_to_a_floor() -> None:
    method = FedPepTAO()
    assert [method.rate(n) for n in (2, 3)] == pytest.approx([0.05, 0.0495])
    assert method.rate(2000) == 1e-4


def test_a_client_that_claims_no_weight_is_left_out() -> None:
    came = brought([1, 1], [[2.0], [400.0]])
    came["c1"] = Brought(came["c1"].delta, -3.0, 4.0, 0.4)
    assert states(FedPepTAO(), [came])[1].params["x"].item() == pytest.approx(2.0)
    lone = {"c1": came["c1"]}
    assert states(FedPepTAO(), [lone])[1].params["x"].item() == 0.0


def test_real_rates_are_used() -> None:
    """c_i of the first round is (w - w_i) / (the sum of the rates really used), under a schedule."""
    train = {"steps": 3, "batch_size": 2, "lr": 0.05, "schedule": {"kind": "linear", "by": "step", "warmup": 0.5}}
    found = play(FedPepTAO.model_validate({"train": train, "share": 0.5}), rounds=2)
    said = tapped(found)
    found.rounds(1)
    rates = sum(found.method.train.rate(1, 2, step, 3) for step in range(3))
    for op, client, _, upload in said:
        if op == "work":
            weight, steps, total = upload["spent"]["spent"].tolist()
            assert (weight, steps) == (len(FOUR[client]), 3) and total == pytest.approx(rates)
            for name, delta in upload.update.items():
                held = found.state.memory[f"control.{client}"][name]
                assert torch.allclose(held, -delta / rates, atol=1e-5)


# --- settings ----------------------------------------------------------------------------------------------------


def test_without_control_it_is_linear_and_sends_nothing_else() -> None:
    method = FedPepTAO(train=TRAIN, control=False, share=0.5)
    assert method.linear() and not FedPepTAO().linear()
    assert method.reducer == Mean("examples") and FedPepTAO().reducer == {"update": Collect(), "spent": Collect()}
    found = play(method)
    said = tapped(found)
    found.rounds(2)
    assert all(list(u.parts) == ["update"] for op, _, _, u in said if op == "work")
    assert found.records[1].failed is None


def test_what_is_received_before_the_choice_is_everything() -> None:
    state = FedPepTAO().init({"prefix.0.key": torch.zeros(1), "prefix.1.key": torch.zeros(1)})
    assert list(FedPepTAO().distribute(state, Member("a")).params) == ["prefix.0.key", "prefix.1.key"]


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"warm_up": 0}, {"score_rows": 1}, {"server_lr": 0}])
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"method\.{name}="):
        method_of(load_recipe({"method": {"name": "fedpeptao", **wrong}, "adapter": {"kind": "prefix"}}))


def test_it_needs_prefixes() -> None:
    with pytest.raises(ConfigError, match=r"fedpeptao cannot train adapter\.kind=lora\. Allowed: prefix"):
        method_of(load_recipe({"method": "fedpeptao"}))

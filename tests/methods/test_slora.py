"""SLoRA - a shared sparse stage, an exact bridge, then LoRA; without the first stage plain LoRA to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.lora import LoraPair, pairs
from fedllm.blocks.sparse import dense, places, shapes, sparse_count
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received
from fedllm.core.server import Reply
from fedllm.effects.lora_rig import TRAIN, Play, base, clients, digits, learner, network
from fedllm.methods.instruction.fedit import FedIT
from fedllm.methods.parameter_efficiency.slora import SLoRA

LAYERS = {"0": (64, 64), "1": (64, 64)}


def method(**options: Any) -> SLoRA:
    return SLoRA.model_validate({"train": TRAIN, "density": 0.3, "sparse_rounds": 2, **options})


def start(rank: int = 4, rounds: int = 4, **options: Any) -> Play:
    return Play(method(**options), learner(rank), clients(0, alpha=0.3), rounds=rounds)


def change(found: Play, state: Any) -> dict[str, torch.Tensor]:
    """D of every layer, in units of the scale."""
    index = places(LAYERS, state.numbers["sparse_seed"], found.method.density)  # type: ignore[attr-defined]
    values = state.memory["sparse"]
    return {name: dense(values[f"{name}.sparse"], index[f"{name}.sparse_at"], shape) for name, shape in LAYERS.items()}


def test_without_a_first_stage_it_is_plain_lora_bit_for_bit() -> None:
    found = start(sparse_rounds=0)
    plain = Play(FedIT.model_validate({"train": TRAIN}), learner(4), clients(0, alpha=0.3), rounds=4)
    one, two = found.rounds(3), plain.rounds(3)
    assert all(torch.equal(one.params[name], two.params[name]) for name in two.params) and not one.memory


def test_stage_one_sends_four_bytes_an_entry_and_a_seed_down() -> None:
    found = start()
    found.rounds()
    nnz = sum(sparse_count(shape, 0.3) for shape in LAYERS.values())
    assert found.server.meter.bytes["work/up/update"] == len(found.uploads) * 4 * nnz
    sent = found.method.distribute(found.state, found.server.member("c0"))
    assert set(sent.params) == {"0.sparse", "1.sparse"} and 0 <= sent.numbers["sparse_seed"] < 2**63
    found.rounds(2)
    assert set(found.uploads["c0"].update) == set(learner(4).initial())


def test_entries_that_were_not_drawn_stay_and_lora_waits() -> None:
    found = start()
    state = found.rounds()
    first = learner(4).initial()
    assert all(torch.equal(state.params[name], first[name]) for name in first)
    for name, matrix in change(found, state).items():
        index = places(LAYERS, state.numbers["sparse_seed"], 0.3)[f"{name}.sparse_at"]
        outside = torch.ones(64 * 64, dtype=torch.bool)
        outside[index] = False
        assert not matrix.flatten()[outside].any() and matrix.any()


def test_stage_one_is_fedavg_over_the_entries() -> None:
    found = start()
    state = found.rounds()
    total = sum(upload.weight for upload in found.uploads.values())
    for name, values in state.memory["sparse"].items():
        mean = sum(u.update[name].double() * (u.weight / total) for u in found.uploads.values())
        assert torch.allclose(values, mean.float(), atol=1e-7)


@pytest.mark.parametrize("split", ["both", "out"])
@pytest.mark.filterwarnings("ignore:SLoRA")
def test_the_bridge_is_the_truncated_svd_and_resets_the_base(split: Any) -> None:
    found = start(split=split, sparse_rounds=1)
    weights = {name: tensor.clone() for name, tensor in base().items()}
    state = found.rounds()
    total = sum(upload.weight for upload in found.uploads.values())
    index = places(LAYERS, state.numbers["sparse_seed"], 0.3)
    for name, shape in LAYERS.items():
        mean = sum(u.update[f"{name}.sparse"].double() * (u.weight / total) for u in found.uploads.values())
        wanted = LoraPair.from_product(dense(mean.float(), index[f"{name}.sparse_at"], shape), 4)
        assert torch.allclose(pairs(state.params)[name].product(), wanted.product(), atol=1e-5)
    assert all(torch.equal(weights[name], base()[name]) for name in weights)
    assert "sparse" not in state.memory and 0 < state.numbers["energy_kept"] < 1


def test_a_run_that_stops_in_stage_one_saves_what_the_bridge_makes_of_it() -> None:
    found = start(rank=64, sparse_rounds=3)
    state = found.rounds()
    assert "sparse" in state.memory
    saved, trained = found.method.weights(state, learner(64).initial()), change(found, state)
    for name, pair in pairs(saved).items():
        assert torch.allclose(pair.b @ pair.a, trained[name], atol=1e-5) and bool(trained[name].any())
    state = found.rounds(2)
    assert "sparse" not in state.memory and found.method.weights(state, {}) is state.params


def test_everything_at_full_rank_reproduces_the_trained_weights() -> None:
    """rho = 1 and r = min(o, i): the same outputs before and after the bridge."""
    found = start(rank=64, density=1.0)
    state = found.rounds()
    entries = {**state.memory["sparse"], **places(LAYERS, state.numbers["sparse_seed"], 1.0)}
    again = Play(method(density=1.0, sparse_rounds=1), learner(64), clients(0, alpha=0.3), rounds=4)
    crossed = again.rounds()
    x = digits(0.0)[0][:50]
    assert torch.allclose(network(base(), x, entries), network(base(), x, crossed.params), atol=1e-4)
    assert crossed.numbers["energy_kept"] == pytest.approx(1)


def test_both_sides_draw_the_same_mask_and_another_seed_another() -> None:
    found, other = start(), Play(method(), learner(4), clients(0), seed=1, rounds=4)
    found.rounds(), other.rounds()
    assert found.state.numbers["sparse_digest"] != other.state.numbers["sparse_digest"]
    assert found.records[0].used == 6, "clients compared the digest"


def test_a_client_with_other_places_refuses() -> None:
    found = start()
    found.rounds()
    found.state.numbers["sparse_digest"] = "0" * 16
    found.rounds()
    assert found.records[-1].used == 0 and "drew other entries" in found.records[-1].lost[0]["reason"]


def test_a_message_of_another_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA tensors in stage 1, sparse ones in stage 2, and a message that names no stage."""
    for numbers, params in (
        ({"stage": 1}, learner(4).initial()),
        ({"stage": 2}, {"0.sparse": torch.zeros(3)}),
        ({}, learner(4).initial()),
    ):
        found = start()
        monkeypatch.setattr(SLoRA, "distribute", lambda *_, p=params, n=numbers: Received(p, n))
        found.rounds()
        reason = found.records[0].lost[0]["reason"]
        assert found.records[0].used == 0 and f"asked for stage {numbers.get('stage')}" in reason


@pytest.mark.filterwarnings("ignore:SLoRA")
def test_a_change_of_zero_falls_back_to_the_ordinary_start() -> None:
    found = start(sparse_rounds=1, sparse_train={**TRAIN, "lr": 1e-60})
    state, first = found.rounds(), learner(4).initial()
    assert all(torch.equal(state.params[name], first[name]) for name in first)
    found.rounds()
    assert found.state.params["0.lora_B"].any(), "it is alive"


def test_a_failed_last_round_of_stage_one_is_played_again() -> None:
    found = start(rounds=6)
    found.rounds()
    worker, answer = found.worker, found.worker.answer
    worker.answer = lambda requests: iter([Reply(r.id, r.client, None, "unplugged") for r in requests])
    state = found.rounds()
    assert found.records[-1].failed and state.round == 2 and "sparse" in state.memory
    worker.answer = answer
    state = found.rounds()
    assert found.records[-1].failed is None and "sparse" not in state.memory and "energy_kept" in state.numbers


def test_little_energy_is_warned_of() -> None:
    found = start(rank=1, density=0.02, sparse_rounds=1)
    with pytest.warns(UserWarning, match=r"keeps \d+% of .* raise adapter\.rank"):
        state = found.rounds()
    assert state.numbers["energy_kept"] < 0.3


def test_the_rounds_of_stage_one() -> None:
    """A number, or a share of all: at least one round of each stage."""
    for given, rounds, wanted in ((2, 10, 2), (0.1, 10, 1), (0.1, 50, 5), (0.9, 2, 1), (0.1, 4, 1)):
        found = start(sparse_rounds=given, rounds=rounds)
        assert found.rounds().numbers["sparse_rounds"] == wanted
    assert "sparse_rounds" not in start(sparse_rounds=0.5, rounds=1).rounds().numbers
    with pytest.raises(ConfigError, match="leaves no round for LoRA: the run has 4"):
        start(sparse_rounds=4).rounds()


@pytest.mark.parametrize("option", [{"density": 0}, {"density": 1.5}, {"sparse_rounds": 1.5}, {"sparse_rounds": -1}])
def test_options_out_of_range_are_refused(option: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        SLoRA.model_validate(option)


def test_a_head_is_trained_in_both_stages() -> None:
    first = {"l.lora_A": torch.eye(2, 3), "l.lora_B": torch.zeros(4, 2), "head.weight": torch.ones(2)}
    slora = method()
    state = slora.init(first).with_(sparse={"l.sparse": torch.zeros(3)})
    assert set(slora.expected(state)["update"]) == {"l.sparse", "head.weight"}
    assert set(slora.expected(slora.init(first))["update"]) == set(first)


def test_it_is_linear_in_both_stages_and_shapes_are_read_off_lora() -> None:
    assert SLoRA().linear() and SLoRA.private == () and shapes(learner(4).initial()) == LAYERS

"""HETLORA - ranks by truncation, pruning that only goes down, weights by norm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fedllm.blocks.lora import pairs
from fedllm.core.message import Scalars
from fedllm.core.reducer import Collect, Update
from fedllm.core.roster import Group, Member
from fedllm.effects.hetlora import idle_weighs_nothing, linear
from fedllm.effects.lora_rig import MIXED, TRAIN, Play, clients, learner
from fedllm.methods.model_heterogeneity.hetlora import HetLoRA, tail


def method(**options: Any) -> HetLoRA:
    return HetLoRA.model_validate({"train": TRAIN, **options})


def play(rounds: int = 1, ranks: Any = MIXED, rank: int = 16, width: int | None = None, **options: Any) -> Play:
    found = Play(method(**options), learner(rank), clients(0, alpha=0.3), ranks, rounds=rounds, width=width)
    found.rounds(rounds)
    return found


def test_gamma_one_never_prunes() -> None:
    found = play(4, gamma=1.0)
    for state in found.states[1:]:
        assert state.numbers["ranks"] == MIXED


def test_the_round_from_b_zero_never_prunes_and_ranks_only_go_down() -> None:
    found = Play(method(gamma=0.5, decay=1.0), learner(16), clients(0, alpha=0.3), MIXED, rounds=6)
    tables = []
    for _ in range(6):
        found.rounds()
        tables.append(dict(found.state.numbers["ranks"]))
    assert tables[0] == MIXED
    for before, after in itertools.pairwise(tables):
        assert all(1 <= after[client] <= before[client] for client in MIXED)
    assert tables[-1] != MIXED, "so strong a pull prunes"
    sent = found.method.distribute(found.state, found.server.member("c5")).params
    assert sent["0.lora_A"].shape[0] == tables[-1]["c5"], "the client is sent what is left of its rank"


@pytest.mark.parametrize(("least", "left"), [(1, 1), (3, 3), (16, 16)])
def test_no_rank_falls_below_the_least(least: int, left: int) -> None:
    found = play(8, ranks=dict.fromkeys(MIXED, 16), gamma=0.1, decay=1.0, least=least)
    assert min(found.state.numbers["ranks"].values()) >= left


def test_a_rank_below_the_least_stays() -> None:
    found = play(3, ranks=dict.fromkeys(MIXED, 2), gamma=0.5, decay=1.0, least=4)
    assert set(found.state.numbers["ranks"].values()) == {2}


def test_the_global_pair_is_the_norm_weighted_sum_of_what_was_sent() -> None:
    """Zero-padded; entries that nobody owns stay."""
    found = play(1, gamma=1.0)
    norms = {
        client: sum(float(pair.product().square().sum()) for pair in pairs(upload.update).values()) ** 0.5
        for client, upload in found.uploads.items()
    }
    for name, tensor in found.state.params.items():
        wanted = torch.zeros(tensor.shape, dtype=torch.float64)
        for client, upload in found.uploads.items():
            part = upload.update[name]
            wanted[: part.shape[0], : part.shape[1]] += norms[client] / sum(norms.values()) * part
        assert torch.allclose(tensor, wanted.float(), atol=1e-6)


def test_rows_that_nobody_in_the_cohort_owns_stay_as_they_were() -> None:
    """Padded with zeros in A and B they could never learn again."""
    start = learner(16).initial()
    found = play(1, ranks=dict.fromkeys(MIXED, 4), gamma=1.0)
    assert torch.equal(found.state.params["0.lora_A"][4:], start["0.lora_A"][4:])
    assert not torch.equal(found.state.params["0.lora_A"][:4], start["0.lora_A"][:4])


def test_who_learns_nothing_weighs_nothing() -> None:
    assert idle_weighs_nothing(0)


def test_plain_weights_are_zero_padded_fedavg() -> None:
    found = play(1, gamma=1.0, by_norm=False)
    total = sum(upload.weight for upload in found.uploads.values())
    name = "1.lora_B"
    wanted = torch.zeros(64, 16, dtype=torch.float64)
    for upload in found.uploads.values():
        wanted[:, : upload.update[name].shape[1]] += upload.weight / total * upload.update[name]
    assert torch.allclose(found.state.params[name], wanted.float(), atol=1e-6)


def test_ranks_of_one_pass_train_as_they_would_alone() -> None:
    """With the pull on tails of different lengths."""
    one, many = (play(3, width=width, gamma=0.8, decay=0.1) for width in (1, None))
    assert one.state.numbers["ranks"] == many.state.numbers["ranks"]
    for name, tensor in one.state.params.items():
        assert torch.allclose(tensor, many.state.params[name], atol=1e-5)


def test_the_tail_and_its_gradient_at_zero() -> None:
    params = {"q.lora_A": torch.arange(6.0).view(3, 2), "q.lora_B": torch.tensor([[1.0, 2.0, 3.0]])}
    mask = torch.tensor([0.0, 0.0, 1.0])
    assert float(tail(params, mask)) == pytest.approx(3 * (16 + 25) ** 0.5)
    leaves = {"q.lora_A": params["q.lora_A"].requires_grad_(), "q.lora_B": torch.zeros(1, 3, requires_grad=True)}
    for held in (mask, torch.zeros(3)):
        found = torch.autograd.grad(tail(leaves, held), list(leaves.values()))
        assert all(bool(torch.isfinite(grad).all()) for grad in found)


def test_the_penalty_pulls_the_tail_down() -> None:
    def after(decay: float) -> float:
        found = Play(method(gamma=0.5, decay=decay, train={**TRAIN, "batch_size": 64}), *linear(1, 0), rounds=4)
        found.rounds(1)
        mask = (torch.arange(8) >= 4).float()
        return float(tail(found.uploads["c0"].update, mask))

    assert after(0.5) < after(0.0)


def test_a_claimed_rank_can_only_lower_the_table() -> None:
    found = play(1, gamma=1.0)
    parts: Any = {"c0": Scalars({"rank": 99.0}), "c5": Scalars({"rank": -3.0}), "c4": Scalars({"rank": 5.0})}
    update = Update(dict(), collected={"rank": parts})
    update.parts["update"] = found.method.reducer["update"].begin().result() or Scalars({})  # type: ignore[index]
    ranks = found.method.finalize(found.state, update).numbers["ranks"]
    assert (ranks["c0"], ranks["c5"], ranks["c4"], ranks["c1"]) == (MIXED["c0"], 1, 5, MIXED["c1"])


def test_the_table_outweighs_the_group() -> None:
    found = play(1)
    state = found.state
    state.numbers["ranks"]["c5"] = 3
    assert method().rank(state, Member("c5", Group("big", 16))) == 3
    assert method().rank(state, Member("new", Group("big", 16))) == 16


@pytest.mark.parametrize(
    ("option", "value"), [("gamma", 0.0), ("gamma", 1.1), ("decay", -1.0), ("least", 0), ("cap", 0.5)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        HetLoRA.model_validate({option: value})


def test_it_is_not_linear() -> None:
    assert not HetLoRA().linear() and isinstance(HetLoRA().reducer["rank"], Collect)  # type: ignore[index]
    assert HetLoRA.private == () and HetLoRA.mixes == ("ranks",)

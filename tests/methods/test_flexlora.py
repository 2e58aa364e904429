"""FlexLoRA - the mean of products, cut by SVD; slices are nested, and every direction can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.blocks.lora import LoraPair, pairs
from fedllm.blocks.ranks import largest_rank
from fedllm.core.errors import ConfigError
from fedllm.core.message import Owned
from fedllm.core.roster import Group, Member
from fedllm.core.seeds import torch_stream
from fedllm.effects.lora_rig import MIXED, TRAIN, Play, clients, learner
from fedllm.methods.model_heterogeneity.flexlora import FlexLoRA
from fedllm.models.adapters.export import load_adapter


def method(**options: Any) -> FlexLoRA:
    return FlexLoRA.model_validate({"train": TRAIN, **options})


def play(rank: int = 16, ranks: Any = None, rounds: int = 1, rows: Any = None, **options: Any) -> Play:
    width = options.pop("width", None)
    found = Play(method(**options), learner(rank), rows or clients(0, alpha=0.3), ranks, rounds=rounds, width=width)
    found.rounds(rounds)
    return found


def mean_products(found: Play) -> dict[str, torch.Tensor]:
    """sum p_k B_k A_k of what was really sent."""
    total = sum(upload.weight for upload in found.uploads.values())
    sums: dict[str, Any] = {}
    for upload in found.uploads.values():
        for name, pair in pairs(upload.update).items():
            sums[name] = sums.get(name, 0) + pair.product().double() * (upload.weight / total)
    return {name: change.float() for name, change in sums.items()}


@pytest.mark.parametrize("split", ["out", "both"])
def test_equal_ranks_are_the_truncated_svd_of_the_mean_product(split: Any) -> None:
    found = play(rank=4, split=split)
    for name, wanted in mean_products(found).items():
        best = LoraPair.from_product(wanted, 4).product()
        assert torch.allclose(pairs(found.state.params)[name].product(), best, atol=1e-5)
        tail = torch.linalg.svdvals(wanted)[4:].square().sum()
        assert torch.isclose((wanted - best).square().sum(), tail, rtol=1e-3)


def test_products_uploaded_become_what_factors_become() -> None:
    by_factors, by_products = play(ranks=MIXED), play(ranks=MIXED, upload="products")
    for name, pair in pairs(by_factors.state.params).items():
        assert torch.allclose(pair.product(), pairs(by_products.state.params)[name].product(), atol=1e-5), name
    first = next(iter(by_products.uploads.values()))
    assert {tuple(t.shape) for t in first.update.values()} == {(64, 64)}


def test_where_ranks_sum_to_less_than_the_largest_d_is_kept_exactly() -> None:
    found = play(rank=16, ranks=dict.fromkeys(MIXED, 2))
    for name, wanted in mean_products(found).items():
        pair = pairs(found.state.params)[name]
        assert torch.allclose(pair.product(), wanted, atol=1e-5)
        assert not pair.b[:, 12:].any(), "nothing is left of D there"
        start = learner(16).initial()[f"{name}.lora_A"]
        assert torch.equal(pair.a[12:], start[12:]), "those rows begin afresh, and B can learn beside them"
    assert found.state.numbers["energy_kept"] == pytest.approx(1, abs=1e-6)


def test_slices_are_nested_and_as_long_as_each_rank() -> None:
    found = play(ranks=MIXED)
    sent = {c: found.method.distribute(found.state, found.server.member(c)).params for c in MIXED}
    for client, rank in MIXED.items():
        for name, tensor in sent[client].items():
            big = found.state.params[name]
            want = big[:rank] if name.endswith("A") else big[:, :rank]
            assert torch.equal(tensor, want) and found.uploads[client].update[name].shape == tensor.shape
            assert isinstance(found.uploads[client].parts["update"], Owned)
    up = found.server.meter.bytes["work/up/update"]
    assert up == sum(4 * rank * (64 + 64 + 64 + 64) for rank in MIXED.values())


def test_ranks_of_one_pass_train_as_they_would_alone() -> None:
    one, many = play(ranks=MIXED, width=1), play(ranks=MIXED)
    for client, upload in one.uploads.items():
        for name, tensor in upload.update.items():
            assert torch.allclose(tensor, many.uploads[client].update[name], atol=1e-6)


def test_the_order_of_clients_does_not_matter() -> None:
    rows = clients(0, alpha=0.3)
    names = dict(zip(MIXED, reversed(MIXED), strict=True))
    one = play(ranks=MIXED, rows=rows, rounds=1, train={**TRAIN, "batch_size": 2000})
    two = play(
        ranks={names[c]: rank for c, rank in MIXED.items()},
        rows={names[c]: held for c, held in rows.items()},
        train={**TRAIN, "batch_size": 2000},
    )
    for name, pair in pairs(one.state.params).items():
        assert torch.allclose(pair.product(), pairs(two.state.params)[name].product(), atol=1e-5)


def test_nothing_learnt_keeps_the_start() -> None:
    found = play(ranks=MIXED, train={**TRAIN, "lr": 1e-60})
    for name, tensor in learner(16).initial().items():
        assert torch.equal(found.state.params[name], tensor), name


def test_a_rank_above_what_a_layer_holds_is_padded_and_alive() -> None:
    """out = 3: D has three directions, the others begin afresh."""
    from fedllm.tasks.function import FunctionLearner

    def loss(params: Any, examples: Any) -> Any:
        rows = torch.stack(list(examples))
        return (rows[:, :6] @ params["l.lora_A"].T @ params["l.lora_B"].T - rows[:, 6:]).square().sum()

    stream = torch_stream(0, "test")
    first = {"l.lora_A": torch.randn(5, 6, generator=stream), "l.lora_B": torch.zeros(3, 5)}
    rows = {"c0": [{"x": row} for row in torch.randn(9, 9, generator=stream).tolist()]}
    found = Play(method(train={**TRAIN, "lr": 0.01}), FunctionLearner(loss, first), rows, rounds=2)
    found.rounds()
    assert not found.state.params["l.lora_B"][:, 3:].any() and found.state.params["l.lora_A"][3:].any()
    pair = pairs(found.uploads["c0"].update)["l"]
    assert torch.allclose(pairs(found.state.params)["l"].product(), pair.product(), atol=1e-5)
    found.rounds()
    assert found.uploads["c0"].update["l.lora_B"][:, 3:].any(), "they learn in the next round"


def test_ranks_come_from_the_group_else_from_a_seeded_draw() -> None:
    ranked = method(ranks=[2, 4, 16])
    found = Play(ranked, learner(16), clients(0), seed=5, rounds=1)
    found.rounds()
    drawn = {client: found.uploads[client].update["0.lora_A"].shape[0] for client in found.uploads}
    assert set(drawn.values()) <= {2, 4, 16} and len(set(drawn.values())) > 1
    again = Play(ranked, learner(16), clients(0), seed=5, rounds=1)
    again.rounds()
    assert drawn == {client: upload.update["0.lora_A"].shape[0] for client, upload in again.uploads.items()}
    assert ranked.rank(found.state, Member("c0", Group("small", 3))) == 3
    assert method().rank(found.state, Member("c0")) == 16


@pytest.mark.parametrize("key", ["flexlora", "hetlora"])
def test_groups_of_a_recipe_have_their_ranks(key: str, tmp_path: Path) -> None:
    """A real model: uploads of rank 1 and 3 in one pass; what is saved has the largest rank."""
    rows = {f"c{k}": {"train": [{"text": f"row {i} of {k}"} for i in range(3)], "eval": []} for k in range(4)}
    recipe = {
        "name": "r", "rounds": 2, "method": key, "train": {"steps": 1, "batch_size": 2}, "model": {"name": "toy:llama"},
        "adapter": {"rank": 3}, "task": {"max_length": 32}, "evaluation": {"against": []},
        "groups": {"small": {"share": 0.5, "adapter": {"rank": 1}}, "big": {"share": 0.5}},
    }  # fmt: skip
    found = fedllm.run(recipe, data=rows, folder=tmp_path / "run")
    state, down = found.state, found.table["bytes"]["down"]
    per_rank = sum(t.numel() * 4 // 3 for t in state.params.values())
    assert largest_rank(state.params) == 3 and load_adapter(tmp_path / "run/adapter")[0].rank == 3
    assert 2 * per_rank * (1 + 1 + 3 + 3) < down < 2 * per_rank * 4 * 3
    if key == "hetlora":
        assert sorted(state.numbers["ranks"].values()) == [1, 1, 3, 3]


@pytest.mark.parametrize(("ranks", "why"), [([32], r"holds 32.*1 to adapter\.rank=16.*adapter\.rank=32"), ([0], "0")])
def test_ranks_that_cannot_be_are_refused(ranks: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Play(method(ranks=ranks), learner(16), clients(0))


def test_without_lora_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.kind=lora"):
        FlexLoRA().init({"head.weight": torch.ones(2)})


def test_it_is_not_linear_and_mixes_ranks() -> None:
    assert not FlexLoRA().linear() and FlexLoRA.mixes == ("ranks",) and FlexLoRA.private == ()

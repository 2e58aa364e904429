"""Stack - the tensors of many clients in one block: what goes in comes out, and clients do not meet in it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Fit, FitReport
from fedllm.engine.job import Job
from fedllm.engine.optimizer import Optimizer
from fedllm.engine.stack import LINE, Stack, clip_, finite_rows, rows_of
from fedllm.engine.together import run_together
from fedllm.tasks.function import FunctionLearner

SHAPES = {"a": (8, 13), "b": (), "c": (0, 4), "d": (7,), "e": (3, 5, 2)}
CPU = torch.device("cpu")


def tree(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_goes_in_comes_out(count: int) -> None:
    trees = [tree(k) for k in range(count)]
    stack = Stack.of(trees, CPU)
    assert list(stack.tensors) == list(SHAPES)
    for k, own in enumerate(trees):
        assert equal({n: t[k].detach() for n, t in stack.tensors.items()}, own)
        assert equal(stack.trees(stack.blocks, trees)[k], own)
    assert {block.shape for block in stack.blocks.values()} == {(count, LINE)}
    trees[0]["a"].zero_()
    assert stack.tensors["a"][0].detach().abs().sum() > 0, "a copy"


def test_number_types_have_blocks_of_their_own_and_half_precision_is_widened() -> None:
    trees = [{"half": t["a"].bfloat16(), "double": t["d"].double(), "single": t["e"]} for t in map(tree, range(3))]
    stack = Stack.of(trees, CPU)
    assert {n: t.dtype for n, t in stack.tensors.items()} == {
        "half": torch.float32, "double": torch.float64, "single": torch.float32,
    }  # fmt: skip
    for k, own in enumerate(trees):
        found = stack.trees(stack.blocks, trees)[k]
        assert equal(found, {name: tensor.to(found[name].dtype) for name, tensor in own.items()})


def test_smaller_tensors_are_padded_with_zeros_and_cut_back() -> None:
    trees = [tree(r, {"A": (r, 6), "B": (4, r), "bias": (4,)}) for r in (2, 5, 3)]
    stack = Stack.of(trees, CPU)
    assert stack.tensors["A"].shape == (3, 5, 6) and stack.tensors["B"].shape == (3, 4, 5)
    assert not stack.tensors["A"][0, 2:].any() and not stack.tensors["B"][0, :, 2:].any()
    for k, own in enumerate(trees):
        assert equal(stack.trees(stack.blocks, trees)[k], own)


def test_rows_side_by_side_are_no_copy_and_others_are() -> None:
    stack = Stack.of([tree(k) for k in range(5)], CPU)
    block = stack.blocks[torch.float32]
    for chosen, shares in (([0, 1, 2, 3, 4], True), ([2, 3], True), ([4], True), ([3, 1], False), ([1, 1], False)):
        some = stack.rows(chosen)
        assert torch.equal(some.blocks[torch.float32], block[chosen])
        start = block.untyped_storage().data_ptr()
        assert (some.blocks[torch.float32].untyped_storage().data_ptr() == start) is shares, chosen
    assert rows_of(block, []).shape == (0, LINE)


def test_gradients_of_passes_add_up_in_the_rows_of_their_clients() -> None:
    stack = Stack.of([tree(k) for k in range(3)], CPU)
    whole = {name: torch.randn(3, *shape) for name, shape in SHAPES.items()}
    part = {name: torch.randn(3, *shape) for name, shape in SHAPES.items()}
    unused = {**whole, "d": None}
    first = stack.added(None, [0, 1, 2], unused)
    assert equal(stack.views(first), {**whole, "d": torch.zeros(3, 7)})
    total = stack.added(first, [2, 0, 2], part)
    wanted = {name: torch.zeros_like(t) if name == "d" else t.clone() for name, t in whole.items()}
    for name, rows in part.items():
        for owner, row in zip([2, 0, 2], rows, strict=True):
            wanted[name][owner] += row
    assert equal(stack.views(total), wanted)
    alone = stack.views(stack.added(None, [1], {name: rows[:1] for name, rows in part.items()}))
    assert all(torch.equal(alone[n][1], part[n][0]) and not alone[n][[0, 2]].any() for n in part)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_is_torchs_client_by_client(limit: float) -> None:
    grads = [tree(k) for k in range(4)]
    stack = Stack.of(grads, CPU)
    clip_(stack.blocks, limit)
    for k, own in enumerate(grads):
        leaves = [torch.zeros_like(t).requires_grad_() for t in own.values()]
        for leaf, grad in zip(leaves, own.values(), strict=True):
            leaf.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(leaves, limit)
        for name, leaf in zip(own, leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(stack.tensors[name][k].detach(), leaf.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_optimiser_over_many_clients_gives_each_the_bits_it_has_alone(optimizer: str, threads: int) -> None:
    """Shapes that fill no vector register: what is left over must not be computed in another way."""
    shapes = {"a": (33, 7), "b": (5,), "c": (257, 129)}
    train = Train(lr=1e-2, weight_decay=0.01, optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:

        def walked(clients: list[int]) -> Stack:
            stack = Stack.of([tree(k, shapes) for k in clients], CPU)
            moved = Optimizer(train)
            for step in range(20):
                grads = Stack.of([tree(1000 * step + k, shapes) for k in clients], CPU).blocks
                clip_(grads, 1.0)
                moved.step(stack.blocks, grads, train.lr)
            return stack

        together = walked([0, 1, 2, 3])
        for k in range(4):
            alone = walked([k])
            assert all(torch.equal(alone.tensors[n][0], together.tensors[n][k]) for n in shapes)
            assert torch.equal(alone.blocks[torch.float32][0], together.blocks[torch.float32][k])
        used = sum(math.prod(shape) for shape in shapes.values())
        assert not together.blocks[torch.float32][:, used:].any(), "padding stays zero"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_the_optimisers_are_torchs_to_the_last_bit(optimizer: str, momentum: float) -> None:
    """With a rate of its own at each step, and other clients from the tenth step on."""
    how = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6} if optimizer == "adamw" else {"weight_decay": 0.1}
    ours = Optimizer(Train(optimizer=optimizer, momentum=momentum, **how))  # pyright: ignore[reportArgumentType, reportCallIssue]
    stack, types = Stack.of([both(tree(k)) for k in range(3)], CPU), (torch.float32, torch.float64)
    leaves = [stack.blocks[dtype].clone() for dtype in types]
    kind = torch.optim.AdamW if optimizer == "adamw" else partial(torch.optim.SGD, momentum=momentum)
    plain = kind(leaves, fused=optimizer == "adamw", **how)  # pyright: ignore[reportArgumentType]
    for step in range(20):
        rate = 1e-2 / (1 + step)
        grads = Stack.of([both(tree(100 * step + k)) for k in range(3)], CPU).blocks
        if step == 10:
            stack, ours = stack.rows([0, 2]), ours.rows([0, 2])
        for leaf, dtype in zip(leaves, types, strict=True):
            leaf.grad = grads[dtype].clone()
        plain.param_groups[0]["lr"] = rate
        plain.step()
        ours.step(stack.blocks, grads if step < 10 else {d: g[[0, 2]] for d, g in grads.items()}, rate)
    for leaf, dtype in zip(leaves, types, strict=True):
        assert torch.equal(stack.blocks[dtype], leaf[[0, 2]])


def both(single: Tensors) -> Tensors:
    """Half of the tensors in float64."""
    return {name: tensor.double() if name in "ad" else tensor for name, tensor in single.items()}


def test_adamw_in_one_go_is_adamw_operation_by_operation() -> None:
    stack, train = Stack.of([tree(k) for k in range(3)], CPU), Train(lr=1e-2, weight_decay=0.1)  # pyright: ignore[reportCallIssue]
    ours, leaf = Optimizer(train), stack.blocks[torch.float32].clone()
    plain = torch.optim.AdamW([leaf], lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    for step in range(30):
        grads = Stack.of([tree(100 * step + k) for k in range(3)], CPU).blocks
        leaf.grad = grads[torch.float32].clone()
        ours.step(stack.blocks, grads, train.lr)
        plain.step()
    torch.testing.assert_close(stack.blocks[torch.float32], leaf, rtol=2e-6, atol=1e-6)


def test_what_is_not_finite_is_told_of_its_client_alone() -> None:
    trees = [both(tree(k)) for k in range(5)]
    trees[1]["e"][0, 0, 0] = math.nan
    trees[2]["a"][0, 0] = -math.inf
    trees[3]["e"][:] = 3e38  # a sum of these is not finite, but each of them is
    assert finite_rows(Stack.of(trees, CPU).blocks) == [True, False, False, True, True]


def test_memory_of_an_optimiser_goes_on_where_clients_have_other_ranks() -> None:
    """Two fits of two steps with the memory between them are one of four, whoever shares the stack."""

    def loss(params: Tensors, examples: object) -> torch.Tensor:
        return (params["B"] @ params["A"] - 1.0).square().sum()

    model = FunctionLearner(loss, {"A": torch.zeros(3, 4), "B": torch.zeros(5, 3)})
    held = model.prepare([{"x": [0.0]}] * 4)
    train = Train(steps=2, batch_size=1, lr=1e-2)  # pyright: ignore[reportCallIssue]
    starts = [tree(r, {"A": (r, 4), "B": (5, r)}) for r in (1, 3, 2)]

    def fitted(chosen: list[int], trees: list[Tensors], moments: list[Tensors], begun: int) -> list[FitReport]:
        asked = [Fit(t, train, moments=m, begun=begun) for t, m in zip(trees, moments, strict=True)]
        jobs = [Job(r, f"c{k}", 0, 1, 1, lambda split: held, {}) for k, r in zip(chosen, asked, strict=True)]
        found = run_together(model, jobs)
        assert all(isinstance(one, FitReport) for one in found)
        return [one for one in found if isinstance(one, FitReport)]

    first = fitted([0, 1, 2], starts, [{}, {}, {}], 0)
    for one, start in zip(first, starts, strict=True):
        assert one.moments is not None
        assert {n: t.shape for n, t in one.moments.items() if n.startswith("exp_avg.")} == {
            f"exp_avg.{name}": tensor.shape for name, tensor in start.items()
        }
    together = fitted([0, 1, 2], [one.params for one in first], [one.moments or {} for one in first], 2)
    for k, (one, two) in enumerate(zip(first, together, strict=True)):
        alone = fitted([k], [one.params], [one.moments or {}], 2)[0]
        assert all(torch.allclose(alone.params[n], two.params[n], atol=1e-6) for n in one.params)

"""Stack - what K clients train as one block of memory, and what is done to all of it at once.

A client's tensors lie one behind the other in its row of a block [K, P]; each name is a view [K, ...] of the block. So
the norm of a gradient, its scaling and an optimiser's step are a few operations, however many tensors an adapter has.
Tensors of smaller shapes (LoRA ranks) are padded with zeros, which train to exact zeros. Rows are whole lines: an entry
has the same place in its line whatever the number of clients, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.core.tensors import Tensors

LINE = 1024
"""Entries of a line: rows of a block are this long, or a multiple."""
Blocks = dict[torch.dtype, torch.Tensor]
"""A block [K, P] for each number type; there are seldom two."""


@dataclass(frozen=True)
class Place:
    """Where the rows of a block have a tensor: its number type, its first entry, its shape."""

    dtype: torch.dtype
    begin: int
    shape: tuple[int, ...]

    def view(self, blocks: Blocks) -> torch.Tensor:
        """The tensor of all clients, [K, *shape]."""
        block, size = blocks[self.dtype], torch.Size(self.shape).numel()
        return block[:, self.begin : self.begin + size].view(len(block), *self.shape)


class Stack:
    """The tensors that K clients train.

    Args:
        places: where each name lies.
        blocks: the memory; whoever changes it changes :attr:`tensors`.

    Attributes:
        tensors: every name as a view [K, ...] that a gradient can be asked of.
    """

    def __init__(self, places: Mapping[str, Place], blocks: Blocks) -> None:
        self.places, self.blocks = places, blocks
        self.tensors = {name: view.detach().requires_grad_() for name, view in self.views(blocks).items()}

    @classmethod
    def of(cls, trees: Sequence[Tensors], device: torch.device) -> Stack:
        """A copy of equally named trees, one of each client, in float32 or better."""
        places, ends = dict[str, Place](), dict[torch.dtype, int]()
        for name, first in trees[0].items():
            dtype = torch.promote_types(first.dtype, torch.float32)
            shape = tuple(map(max, zip(*(tree[name].shape for tree in trees), strict=True)))
            places[name] = Place(dtype, ends.get(dtype, 0), shape)
            ends[dtype] = places[name].begin + torch.Size(shape).numel()
        sizes = {dtype: -(-end // LINE) * LINE for dtype, end in ends.items()}
        blocks = {dtype: torch.zeros(len(trees), size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        _fill(places, blocks, trees)
        return cls(places, blocks)

    def views(self, blocks: Blocks) -> Tensors:
        """The tensors that lie in blocks of this layout."""
        return {name: place.view(blocks) for name, place in self.places.items()}

    def like(self, trees: Sequence[Tensors]) -> Blocks:
        """Blocks of this layout with other tensors of the same clients."""
        blocks = {dtype: torch.zeros_like(block) for dtype, block in self.blocks.items()}
        _fill(self.places, blocks, trees)
        return blocks

    def rows(self, chosen: Sequence[int]) -> Stack:
        """Some of the clients; no copy where they lie side by side."""
        return Stack(self.places, {dtype: rows_of(block, chosen) for dtype, block in self.blocks.items()})

    def gathered(self, tensors: Mapping[str, torch.Tensor | None]) -> Blocks:
        """New blocks of this layout with stacked tensors [K, ...]; zeros for None."""
        parts: dict[torch.dtype, list[torch.Tensor]] = {dtype: [] for dtype in self.blocks}
        for name, place in self.places.items():
            found = tensors[name]
            held = torch.zeros_like(self.tensors[name]) if found is None else found
            parts[place.dtype].append(held.reshape(len(held), -1))
        for dtype, block in self.blocks.items():
            filled = sum(part.shape[1] for part in parts[dtype])
            parts[dtype].append(block.new_zeros(len(block), block.shape[1] - filled))
        return {dtype: torch.cat(held, 1) for dtype, held in parts.items()}

    def added(self, total: Blocks | None, owners: Sequence[int], grads: Mapping[str, torch.Tensor | None]) -> Blocks:
        """`total` (None: zeros) and the gradients of a pass: row i of them belongs to client owners[i]."""
        if total is None and is_all(owners, next(iter(self.blocks.values()))):
            return self.gathered(grads)
        total = {d: torch.zeros_like(block) for d, block in self.blocks.items()} if total is None else total
        for name, view in self.views(total).items():
            if (rows := grads[name]) is not None:
                add_rows(view, owners, rows)
        return total


def clip_(blocks: Blocks, limit: float) -> None:
    """Scale each client's gradient to at most the Euclidean norm `limit`, as torch.nn.utils.clip_grad_norm_ does."""
    squares = sum(block.square().view(len(block), -1, LINE).sum(2).sum(1) for block in blocks.values())
    if isinstance(squares, torch.Tensor):
        factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for dtype, block in blocks.items():
            block.mul_(factor.to(dtype).unsqueeze(1))


def stacked(trees: Sequence[Tensors], device: torch.device) -> Tensors:
    """Equally named trees on a client axis, [K, ...], padded with zeros to the largest shape; float32 or better."""
    result: Tensors = {}
    for name, first in trees[0].items():
        rows = [tree[name] for tree in trees]
        dtype = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
        if all(row.shape == first.shape for row in rows):
            result[name] = torch.stack([row.to(device, dtype) for row in rows])
            continue
        shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
        result[name] = torch.zeros([len(rows), *shape], dtype=dtype, device=device)
        for k, row in enumerate(rows):
            result[name][(k, *corner(row.shape))] = row.to(device)
    return result


def spread(tree: Tensors, width: int, device: torch.device) -> Tensors:
    """The same tensors for each of `width` clients, without a copy."""
    return {name: t.to(device).expand(width, *t.shape) for name, t in tree.items()}


def taken(tree: Tensors, owners: Sequence[int]) -> Tensors:
    """The rows `owners` of stacked tensors, detached; no copy where they lie side by side, or all are the same."""
    return {
        name: tensor.detach()[:1].expand(len(owners), *tensor.shape[1:])
        if tensor.stride(0) == 0
        else rows_of(tensor.detach(), owners)
        for name, tensor in tree.items()
    }


def rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of a tensor; no copy where they lie side by side."""
    if is_all(rows, tensor):
        return tensor
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[list(rows)]


def add_rows(total: torch.Tensor, owners: Sequence[int], rows: torch.Tensor) -> None:
    """total[owners[i]] += rows[i], in this order: the same bits on every device."""
    if is_all(owners, total):
        total.add_(rows)
        return
    for owner, row in zip(owners, rows, strict=True):
        total[owner].add_(row)


def is_all(rows: Sequence[int], tensor: torch.Tensor) -> bool:
    """Whether `rows` are all rows of a tensor, in order."""
    return len(rows) == len(tensor) and all(row == place for place, row in enumerate(rows))


def corner(shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a tensor of this shape lies in one that is larger."""
    return tuple(slice(0, size) for size in shape)


def _fill(places: Mapping[str, Place], blocks: Blocks, trees: Sequence[Tensors]) -> None:
    """Copy the tensors of one tree per client into blocks of zeros."""
    with torch.no_grad():
        for name, place in places.items():
            view, rows = place.view(blocks), [tree[name] for tree in trees]
            if len(rows) > 1 and all(row.shape == place.shape and row.dtype == rows[0].dtype for row in rows):
                view.copy_(torch.stack(rows))
                continue
            for k, row in enumerate(rows):
                view[(k, *corner(row.shape))].copy_(row)

"""Stack - what K clients train as one block of memory, and what is done to all of it at once.

A client's tensors lie one behind the other in its row of a block [K, P]; each name is a view [K, ...] of the block. So
the norm of a gradient, its scaling and an optimiser's step are a few operations, however many tensors an adapter has.
Tensors of smaller shapes (LoRA ranks) are padded with zeros, which train to exact zeros. Rows are whole lines: an entry
has the same place in its line whatever the number of clients, and so the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedllm.core.tensors import Tensors, in_one_piece

LINE = 1024
"""Entries of a line: rows of a block are this long, or a multiple."""
Blocks = dict[torch.dtype, torch.Tensor]
"""A block [K, P] for each number type; there are seldom two."""


@dataclass(frozen=True)
class Place:
    """Where the rows of a block have a tensor: its number type, its shape, its first entry and how many it has."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int

    def view(self, blocks: Blocks) -> torch.Tensor:
        """The tensor of all clients, [K, *shape]."""
        block = blocks[self.dtype]
        return block.narrow(1, self.begin, self.size).view(len(block), *self.shape)


@dataclass(frozen=True)
class Form:
    """How the tensors of a client lie in its rows.

    Attributes:
        places: where each name lies; those of a number type one behind the other.
        cuts: how many entries each of them has, and how many are left of the last line, by number type.
    """

    places: Mapping[str, Place]
    cuts: Mapping[torch.dtype, tuple[int, ...]]

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, forms: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> Form:
        """For tensors of these names, number types and shapes; in float32 or better."""
        places, cuts = dict[str, Place](), dict[torch.dtype, list[int]]()
        for name, given, shape in forms:
            dtype = torch.promote_types(given, torch.float32)
            before = cuts.setdefault(dtype, [])
            places[name] = Place(dtype, shape, sum(before), math.prod(shape))
            before.append(places[name].size)
        return cls(places, {dtype: (*sizes, -sum(sizes) % LINE) for dtype, sizes in cuts.items()})


class Stack:
    """The tensors that K clients train.

    Args:
        form: how each client's lie in its rows.
        blocks: the memory; whoever changes it changes :attr:`tensors`.

    Attributes:
        tensors: every name as a view [K, ...] that a gradient can be asked of.
    """

    def __init__(self, form: Form, blocks: Blocks) -> None:
        self.form, self.places, self.blocks = form, form.places, blocks
        self.tensors = {name: view.detach().requires_grad_() for name, view in self.views(blocks).items()}

    @classmethod
    def of(cls, trees: Sequence[Tensors], device: torch.device) -> Stack:
        """A copy of equally named trees, one of each client, in float32 or better."""
        forms = list[tuple[str, torch.dtype, tuple[int, ...]]]()
        for name, first in trees[0].items():
            shape = first.shape
            if any(tree[name].shape != shape for tree in trees):
                shape = tuple(map(max, zip(*(tree[name].shape for tree in trees), strict=True)))
            forms.append((name, first.dtype, shape))
        made = Form.of(tuple(forms))
        return cls(made, {dtype: _block(dtype, made, trees, device) for dtype in made.cuts})

    def views(self, blocks: Blocks) -> Tensors:
        """The tensors of all clients, [K, ...], that lie in blocks of this layout."""
        pieces = {dtype: iter(block.split(self.form.cuts[dtype], 1)) for dtype, block in blocks.items()}
        count = len(next(iter(blocks.values())))
        return {name: next(pieces[place.dtype]).view(count, *place.shape) for name, place in self.places.items()}

    def trees(self, blocks: Blocks, like: Sequence[Tensors]) -> list[Tensors]:
        """Each client's tensors that lie in blocks of this layout, as views in the shapes of its tree in `like`."""
        found: list[Tensors] = [{} for _ in like]
        for name, view in self.views(blocks).items():
            for tree, own, row in zip(found, like, view.unbind(), strict=True):
                tree[name] = row if row.shape == own[name].shape else row[corner(own[name].shape)]
        return found

    def like(self, trees: Sequence[Tensors]) -> Blocks:
        """Blocks of this layout with other tensors of the same clients."""
        return {dtype: _block(dtype, self.form, trees, block.device) for dtype, block in self.blocks.items()}

    def rows(self, chosen: Sequence[int]) -> Stack:
        """Some of the clients; no copy where they lie side by side."""
        return Stack(self.form, {dtype: rows_of(block, chosen) for dtype, block in self.blocks.items()})

    def gathered(self, tensors: Mapping[str, torch.Tensor | None]) -> Blocks:
        """New blocks of this layout with stacked tensors [K, ...]; zeros for None."""
        parts: dict[torch.dtype, list[torch.Tensor]] = {dtype: [] for dtype in self.blocks}
        for name, place in self.places.items():
            found = tensors[name]
            held = torch.zeros_like(self.tensors[name]) if found is None else found
            parts[place.dtype].append(held.reshape(len(held), place.size))
        return {dtype: _lines(parts[dtype], block.shape[1]) for dtype, block in self.blocks.items()}

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
    length = torch.linalg.vector_norm
    norms = [length(length(block.view(len(block), -1, LINE), dim=2), dim=1, keepdim=True) for block in blocks.values()]
    whole = norms[0] if len(norms) == 1 else length(torch.cat(norms, 1), dim=1, keepdim=True)
    factor = (limit / (whole + 1e-6)).clamp(max=1.0)
    for dtype, block in blocks.items():
        block.mul_(factor.to(dtype))


def finite_rows(blocks: Blocks) -> list[bool]:
    """Whether all entries of each client are finite; a sum that is not may have overflowed, and each is looked at."""
    found = [True] * len(next(iter(blocks.values())))
    for block in blocks.values():
        for row, total in enumerate(block.sum(1).tolist()):
            if not math.isfinite(total):
                found[row] = found[row] and bool(torch.isfinite(block[row]).all())
    return found


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


def _block(dtype: torch.dtype, form: Form, trees: Sequence[Tensors], device: torch.device) -> torch.Tensor:
    """The tensors of one number type, a row for each tree."""
    own = {name: place for name, place in form.places.items() if place.dtype == dtype}
    *sizes, rest = form.cuts[dtype]
    end = sum(sizes)
    block = torch.zeros(len(trees), end + rest, dtype=dtype)
    with torch.no_grad():
        for k, tree in enumerate(trees):
            same = all(tree[name].shape == place.shape for name, place in own.items())
            whole = in_one_piece(tree[name] for name in own) if same else None
            if whole is not None:
                block[k, :end].copy_(whole)
                continue
            for name, place in own.items():
                place.view({dtype: block})[(k, *corner(tree[name].shape))].copy_(tree[name])
    return block.to(device)


def _lines(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    """Tensors [K, n] one behind the other, filled up with zeros to [K, width]; always a copy."""
    rest = width - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), rest)] if rest else parts, 1)

"""Tensors - a mapping from names to tensors, and the little arithmetic the rest needs on it."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable, Mapping

import torch

from fedllm.core.errors import UploadRejected, nearest

Tensors = dict[str, torch.Tensor]


def same_names(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise :class:`UploadRejected` unless both have the same names."""
    if left.keys() == right.keys():
        return
    missing, extra = sorted(right.keys() - left.keys()), sorted(left.keys() - right.keys())
    word = f"is missing '{missing[0]}'" if missing else f"has an unexpected tensor '{extra[0]}'"
    raise UploadRejected(
        f"{what} {word} ({len(missing)} missing, {len(extra)} unexpected).",
        f"Expected {len(right)} tensors.",
        nearest(extra[0], right) if extra else None,
    )


def same_shapes(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise :class:`UploadRejected` unless both have the same names and shapes."""
    same_names(given, expected, what)
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise UploadRejected(
                f"{what} has '{name}' in shape {tuple(tensor.shape)}.", f"Expected {tuple(expected[name].shape)}."
            )


def over(function: Callable[..., torch.Tensor], *trees: Mapping[str, torch.Tensor]) -> Tensors:
    """Apply `function` name by name to trees that have the same names."""
    for tree in trees[1:]:
        same_names(tree, trees[0], "A set of tensors")
    return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}


def add(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], scale: float = 1.0) -> Tensors:
    """left + scale * right, in float32 or better, in the dtype of `left`; integer entries are copied from `right`."""
    same_shapes(right, left, "A set of tensors")
    return over(
        lambda a, b: (
            torch.add(a.to(torch.promote_types(a.dtype, torch.float32)), b, alpha=scale).to(a.dtype)
            if a.is_floating_point()
            else b.to(a.dtype)
        ),
        left,
        right,
    )


def subtract(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> Tensors:
    """left - right, computed in float32 or better; integer entries are copied from `left`, never subtracted."""
    same_shapes(right, left, "A set of tensors")
    return over(
        lambda a, b: a.to(torch.promote_types(a.dtype, torch.float32)) - b if a.is_floating_point() else a.clone(),
        left,
        right,
    )


def zeros(like: Mapping[str, torch.Tensor]) -> Tensors:
    """Zeros of the same names and shapes, in float32 or better."""
    return over(lambda a: torch.zeros_like(a, dtype=torch.promote_types(a.dtype, torch.float32)), like)


def squared_distance(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum over all entries of (left - right)^2: a scalar, differentiable, in float32 or better."""
    return torch.stack([(left[name] - right[name]).square().sum() for name in left]).sum()


def norm(tree: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm over all entries."""
    return float(sum(t.double().square().sum().item() for t in tree.values() if t.is_floating_point()) ** 0.5)


def count(tree: Mapping[str, torch.Tensor]) -> int:
    """The number of entries."""
    return sum(t.numel() for t in tree.values())


def size_in_bytes(tree: Mapping[str, torch.Tensor]) -> int:
    """The bytes of the raw entries."""
    return sum(t.nbytes for t in tree.values())


def in_one_piece(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """All entries, one tensor's behind the other's, as a vector without a copy; None where they do not lie so.

    What a message brings does (see :mod:`fedllm.core.layout`): one operation then does for many small tensors.
    """
    held = list(tensors)
    if not held:
        return None
    first, dtype, size = held[0], held[0].dtype, held[0].element_size()
    begin = end = first.data_ptr()  # 0 where nothing lies in memory
    for tensor in held:
        if tensor.data_ptr() != end or tensor.dtype is not dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    count, offset = (end - begin) // size, first.storage_offset()
    if not begin or (offset + count) * size > first.untyped_storage().nbytes():
        return None  # neighbours in memory, but not of one piece
    return first.detach().as_strided((count,), (1,), offset)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on a device. To a GPU it goes from pinned memory, so that nobody waits for what that is still doing."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def finite(tree: Mapping[str, torch.Tensor]) -> str | None:
    """The first name that holds a NaN or an infinity, or None where all is finite.

    Every upload is looked at. A sum is finite only where all of its entries are, and takes a tenth of the time of a
    look at each; where it is not it may have overflowed, and each is looked at.
    """
    whole = in_one_piece(tree.values()) if len(tree) > 1 else None
    if whole is not None and _sum_is_finite(whole):
        return None
    for name, tensor in tree.items():
        if not _sum_is_finite(tensor) and not bool(torch.isfinite(tensor.to(_wide(tensor))).all()):
            return name
    return None


def _sum_is_finite(tensor: torch.Tensor) -> bool:
    whole_numbers = not tensor.is_floating_point() and not tensor.is_complex()
    return whole_numbers or cmath.isfinite(tensor.sum(dtype=_wide(tensor)).item())


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """A number type in which a sum does not overflow at once."""
    return tensor.dtype if tensor.element_size() >= 4 else torch.float32

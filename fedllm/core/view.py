"""View - which entries of the global tensors a client works on: names, an index map and a scale.

Sub-models, rolling blocks, truncated LoRA ranks, masks and B-only training are all views; aggregation is then one
masked sum. A region keeps, per dimension, either a slice or an index vector; extract(scatter_add) is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm.core.errors import ConfigError, UploadRejected, nearest
from fedllm.core.tensors import Tensors, same_names

Region = tuple["slice | torch.Tensor", ...]


@dataclass(frozen=True)
class View:
    """Regions of named tensors.

    Args:
        regions: name -> one entry per indexed leading dimension: a slice with a stop and step 1, or an int64 vector
            of distinct indices. Dimensions after the last entry are taken whole; an empty tuple takes everything.
        scales: name -> factor applied by :meth:`extract` and undone by :meth:`scatter_add`; 1 where absent.

    Raises:
        ConfigError: an entry that is neither, an index below 0 or given twice, a scale that is 0 or not finite.
    """

    regions: dict[str, Region]
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, region in self.regions.items():
            wrong = next((d for d, entry in enumerate(region) if not _usable(entry)), None)
            if wrong is not None:
                raise ConfigError(
                    f"A view of '{name}' has an entry in dimension {wrong} that is not a region.",
                    "Allowed: slice(start, stop) with 0 <= start <= stop, or an int64 vector of distinct indices.",
                )
        bad = [name for name, scale in self.scales.items() if not math.isfinite(scale) or scale == 0]
        if bad:
            raise ConfigError(
                f"A view scales '{bad[0]}' by {self.scales[bad[0]]}.", "Allowed: any finite number but 0."
            )

    @classmethod
    def whole(cls, like: Mapping[str, torch.Tensor]) -> View:
        """Everything."""
        return cls({name: () for name in like})

    @classmethod
    def leading(cls, shapes: Mapping[str, tuple[int, ...]]) -> View:
        """The first `shape[d]` entries of every dimension d: truncation."""
        return cls({name: tuple(slice(0, size) for size in shape) for name, shape in shapes.items()})

    def _index(self, name: str) -> tuple[Any, ...]:
        """The region of `name` as an index: vectors are spread to an open mesh so that they combine."""
        region = self.regions[name]
        if not any(isinstance(entry, torch.Tensor) for entry in region):
            return region
        vectors = [e if isinstance(e, torch.Tensor) else torch.arange(e.start or 0, e.stop) for e in region]
        return tuple(v.reshape([-1 if i == d else 1 for i in range(len(vectors))]) for d, v in enumerate(vectors))

    def _check(self, tree: Mapping[str, torch.Tensor]) -> None:
        for name, region in self.regions.items():
            if name not in tree:
                raise UploadRejected(f"A view names '{name}', which does not exist.", nearest=nearest(name, tree))
            shape = tree[name].shape
            for d, entry in enumerate(region):
                ends = (
                    (entry.start or 0, entry.stop)
                    if isinstance(entry, slice)
                    else (int(entry.min()), int(entry.max()) + 1)
                    if entry.numel()
                    else (0, 0)
                )
                if d >= len(shape) or ends[0] < 0 or ends[1] > shape[d]:
                    raise UploadRejected(
                        f"A view of '{name}' reaches {ends} in dimension {d}.", f"Its shape is {tuple(shape)}."
                    )

    def fits(self, tree: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], what: str) -> None:
        """Raise :class:`UploadRejected` unless the view lies inside `tree` and `values` has its names and shapes."""
        self._check(tree)
        same_names(values, {name: tree[name] for name in self.regions}, what)
        for name, region in self.regions.items():
            shape = [*(_length(entry) for entry in region), *tree[name].shape[len(region) :]]
            if list(values[name].shape) != shape:
                raise UploadRejected(
                    f"{what} has '{name}' in shape {tuple(values[name].shape)}.", f"The view takes {tuple(shape)}."
                )

    def extract(self, tree: Mapping[str, torch.Tensor]) -> Tensors:
        """The viewed entries, scaled, as new tensors."""
        self._check(tree)
        return {
            name: tree[name][self._index(name)].clone() * self.scales.get(name, 1.0)
            if name in self.scales
            else tree[name][self._index(name)].clone()
            for name in self.regions
        }

    def scatter_add(self, target: Tensors, values: Mapping[str, torch.Tensor], weight: float = 1.0) -> None:
        """Add `weight * values / scale` into the viewed entries of `target`, in place; on an error nothing is added."""
        self.fits(target, values, "A set of values")
        for name in self.regions:
            index = self._index(name)
            here = target[name][index]
            target[name][index] = here + values[name].to(here.dtype) * (weight / self.scales.get(name, 1.0))

    def mask(self, like: Mapping[str, torch.Tensor]) -> Tensors:
        """1 where an entry of `like` is viewed, else 0 (float32; names that are not viewed are all 0)."""
        self._check(like)
        masks = {name: torch.zeros(tensor.shape) for name, tensor in like.items()}
        for name in self.regions:
            masks[name][self._index(name)] = 1.0
        return masks

    def to_wire(self) -> tuple[Tensors, Any]:
        """Index vectors as tensors, the rest as JSON."""
        tensors, facts = {}, {}
        for name, region in self.regions.items():
            entries: list[Any] = []
            for d, entry in enumerate(region):
                if isinstance(entry, torch.Tensor):
                    tensors[f"{d}.{name}"] = entry
                    entries.append(None)
                else:
                    entries.append([entry.start or 0, entry.stop])
            facts[name] = entries
        return tensors, {"regions": facts, "scales": self.scales}

    @classmethod
    def from_wire(cls, tensors: Mapping[str, torch.Tensor], facts: Any) -> View:
        """Rebuild from :meth:`to_wire`."""
        regions = {
            str(name): tuple(
                tensors[f"{d}.{name}"] if entry is None else slice(int(entry[0]), int(entry[1]))
                for d, entry in enumerate(entries)
            )
            for name, entries in facts["regions"].items()
        }
        return cls(regions, {str(name): float(scale) for name, scale in facts["scales"].items()})


def _usable(entry: Any) -> bool:
    """Whether `entry` is a slice from start to stop, or a vector of distinct indices."""
    if isinstance(entry, slice):
        start, stop = entry.start or 0, entry.stop
        return isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop and entry.step in (None, 1)
    if not isinstance(entry, torch.Tensor) or entry.dtype != torch.int64 or entry.dim() != 1:
        return False
    return entry.numel() == 0 or (int(entry.min()) >= 0 and entry.unique().numel() == entry.numel())


def _length(entry: slice | torch.Tensor) -> int:
    return int(entry.numel()) if isinstance(entry, torch.Tensor) else entry.stop - (entry.start or 0)

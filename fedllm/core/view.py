"""View - which entries of the global tensors a client works on: names, an index map and a scale.

Sub-models, rolling blocks, truncated LoRA ranks, masks and B-only training are all views; aggregation is then one
masked sum. A region keeps, per dimension, either a slice or an index vector; extract(scatter_add) is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm.core.errors import UploadRejected, nearest
from fedllm.core.tensors import Tensors

Region = tuple["slice | torch.Tensor", ...]


@dataclass(frozen=True)
class View:
    """Regions of named tensors.

    Args:
        regions: name -> one entry per indexed leading dimension: a slice with step 1, or an int64 vector of
            distinct indices. Dimensions after the last entry are taken whole; an empty tuple takes everything.
        scales: name -> factor applied by :meth:`extract` and undone by :meth:`scatter_add`; 1 where absent.
    """

    regions: dict[str, Region]
    scales: dict[str, float] = field(default_factory=dict)

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
        """Add `weight * values / scale` into the viewed entries of `target`, in place."""
        self._check(target)
        for name in self.regions:
            index = self._index(name)
            here = target[name][index]
            if here.shape != values[name].shape:
                raise UploadRejected(
                    f"The values for '{name}' have shape {tuple(values[name].shape)}.",
                    f"The view takes {tuple(here.shape)}.",
                )
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
                tensors[f"{d}.{name}"].long() if entry is None else slice(int(entry[0]), int(entry[1]))
                for d, entry in enumerate(entries)
            )
            for name, entries in facts["regions"].items()
        }
        return cls(regions, {str(name): float(scale) for name, scale in facts["scales"].items()})

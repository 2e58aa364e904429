"""Reducer - how uploads become one update, one at a time.

A reducer is begun once a round and fed each upload as it arrives, so a thousand uploads never lie in memory at
once where the reducer is a mean. `linear` says whether the result is a weighted sum of the uploads with weights that
do not depend on their contents: only then may the sum be formed in secret, under encryption or over the air.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.message import Dense, Message, Owned, Part, Scalars, SeedCoefficients, Table, Upload
from fedllm.core.tensors import Tensors, same_shapes
from fedllm.core.view import View


class Running:
    """A reduction under way: :meth:`add` takes one part, :meth:`result` gives what they became (None if none came)."""

    def check(self, part: Part, client: str) -> None:
        """Raise :class:`UploadRejected` for a part that cannot be taken; called before any part of an upload is."""

    def add(self, part: Part, weight: float, client: str) -> None:
        """Take one part of one client."""
        raise NotImplementedError(f"{type(self).__name__} must define add.")

    def result(self) -> Any:
        """What the parts became."""
        raise NotImplementedError(f"{type(self).__name__} must define result.")


class Reducer:
    """How one named part of the uploads is combined. Instances hold settings only; :meth:`begin` starts a round."""

    linear: ClassVar[bool] = False

    def begin(self) -> Running:
        """Start a reduction."""
        raise NotImplementedError(f"{type(self).__name__} must define begin.")


Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Mean(Reducer):
    """The mean of dense tensors, scalars, seed coefficients or tables, weighted by examples or uniformly.

    Sums are kept in float64, so that the order of arrival does not show after rounding to float32.

    Args:
        weighting: "examples" (the upload's weight) or "uniform".
    """

    linear = True
    weighting: Weighting = "examples"

    def begin(self) -> Running:
        """See :class:`Reducer`."""
        return _RunningMean(self.weighting)


@dataclass(frozen=True)
class OwnedMean(Reducer):
    """A mean per entry over the clients that own it; entries nobody sent stay zero (no change)."""

    linear = True
    weighting: Weighting = "examples"

    def begin(self) -> Running:
        """See :class:`Reducer`. The result is an :class:`OwnedSum`."""
        return _RunningOwnedMean(self.weighting)


@dataclass(frozen=True)
class Collect(Reducer):
    """Every part as it came, by client: for reductions that need to see single uploads. Memory grows with them."""

    linear = False

    def begin(self) -> Running:
        """See :class:`Reducer`. The result is a dict from client id to part, in the order of the ids."""
        return _Collected()


class _RunningMean(Running):
    def __init__(self, weighting: Weighting) -> None:
        self.weighting, self.total = weighting, 0.0
        self.sums: Tensors | None = None
        self.dtypes: dict[str, torch.dtype] = {}
        self.kind: type[Part] = Dense

    def check(self, part: Part, client: str) -> None:
        """See :class:`Running`."""
        tensors = _summands(part)
        if self.sums is None:
            return
        if type(part) is not self.kind:
            raise UploadRejected(f"Client '{client}' sent a {part.kind} part.", f"Expected: {self.kind.kind}.")
        same_shapes(tensors, self.sums, f"The upload of client '{client}'")

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        tensors = _summands(part)
        share = weight if self.weighting == "examples" else 1.0
        if self.sums is None:
            self.kind, self.dtypes = type(part), {n: t.dtype for n, t in tensors.items()}
            self.sums = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in tensors.items()}
        for name, tensor in tensors.items():
            self.sums[name].add_(tensor, alpha=share)
        self.total += share

    def result(self) -> Part | None:
        if self.sums is None or self.total <= 0:
            return None
        if self.kind is Table:  # rows and counts are sums themselves: no division
            return Table(self.sums["rows"].float(), self.sums["counts"].float())
        means = {n: (s / self.total).to(_at_least_float(self.dtypes[n])) for n, s in self.sums.items()}
        if self.kind is Scalars:
            return Scalars({name: float(value) for name, value in means.items()})
        return SeedCoefficients(means["coefficients"]) if self.kind is SeedCoefficients else Dense(means)


@dataclass(frozen=True)
class OwnedSum(Part):
    """A reduced :class:`Owned` part: per entry the weighted sum and the weight of its owners, by region."""

    kind = "owned-sum"
    sums: Tensors
    weights: Tensors

    def mean(self) -> Tensors:
        """sum / weight where somebody owns the entry, else 0."""
        return {n: torch.where(w > 0, self.sums[n] / w.clamp(min=1e-38), 0.0).float() for n, w in self.weights.items()}

    def to_wire(self) -> tuple[Tensors, Any]:
        """See :class:`Part`."""
        return {f"{k}.{n}": t for k, tree in (("s", self.sums), ("w", self.weights)) for n, t in tree.items()}, None

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Any) -> OwnedSum:
        """See :class:`Part`."""
        split = {key: {n[2:]: t for n, t in tensors.items() if n.startswith(f"{key}.")} for key in "sw"}
        return cls(split["s"], split["w"])


class _RunningOwnedMean(Running):
    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.sums: Tensors = {}
        self.weights: Tensors = {}

    def check(self, part: Part, client: str) -> None:
        """See :class:`Running`."""
        if not isinstance(part, Owned):
            raise UploadRejected(f"Client '{client}' sent a {part.kind} part.", "Expected: owned.")

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        if not isinstance(part, Owned):
            return
        share = weight if self.weighting == "examples" else 1.0
        for name, region in part.view.regions.items():
            ends = [int(e.stop) if isinstance(e, slice) else int(e.max()) + 1 if e.numel() else 0 for e in region]
            shape = [*ends, *part.tensors[name].shape[len(ends) :]]
            for tree in (self.sums, self.weights):
                tree[name] = _grown(tree.get(name), shape)
        ones = {name: torch.ones_like(t, dtype=torch.float64) for name, t in part.tensors.items()}
        part.view.scatter_add(self.sums, part.tensors, share)
        View(part.view.regions).scatter_add(self.weights, ones, share)

    def result(self) -> OwnedSum | None:
        return OwnedSum(self.sums, self.weights) if self.sums else None


class _Collected(Running):
    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}

    def add(self, part: Part, weight: float, client: str) -> None:
        self.parts[client] = part

    def result(self) -> dict[str, Part]:
        return dict(sorted(self.parts.items()))


def _summands(part: Part) -> Tensors:
    if isinstance(part, Dense):
        return part.tensors
    if isinstance(part, SeedCoefficients):
        return {"coefficients": part.coefficients}
    if isinstance(part, Table):
        return {"rows": part.rows, "counts": part.counts}
    if isinstance(part, Scalars):
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in part.values.items()}
    raise UploadRejected(
        f"A {part.kind} part has no mean.", "Parts with a mean: dense, scalars, seed-coefficients, table."
    )


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _grown(tensor: torch.Tensor | None, shape: list[int]) -> torch.Tensor:
    """`tensor` enlarged with zeros to hold `shape`."""
    if tensor is None:
        return torch.zeros(shape, dtype=torch.float64)
    wide = [max(a, b) for a, b in zip(tensor.shape, shape, strict=True)]
    if list(tensor.shape) == wide:
        return tensor
    result = torch.zeros(wide, dtype=torch.float64)
    result[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return result


Reducers = Reducer | Mapping[str, Reducer]


@dataclass
class Update(Message):
    """What the uploads of a round became.

    Attributes:
        parts: reduced parts by name (a :class:`Collect` reducer leaves a dict from client id to part in `collected`).
        clients: how many uploads were used.
        population: how many clients are registered.
        weight: the sum of the upload weights.
        metrics: name -> (sum, n) over the uploads.
    """

    collected: dict[str, dict[str, Part]] = field(default_factory=dict)
    clients: int = 0
    population: int = 0
    weight: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def params(self) -> Tensors:
        """The reduced change of the trainable tensors."""
        return self["update"]


class Reduction:
    """One round's uploads on their way to an :class:`Update`.

    Args:
        reducers: one reducer for the part `update`, or one per part.
        expected: part -> tensors of the names and shapes a dense part must have.
    """

    def __init__(self, reducers: Reducers, expected: Mapping[str, Tensors] | None = None) -> None:
        self.reducers = {"update": reducers} if isinstance(reducers, Reducer) else dict(reducers)
        self.running = {name: reducer.begin() for name, reducer in self.reducers.items()}
        self.expected = dict(expected or {})
        self.clients, self.weight = 0, 0.0
        self.metrics: dict[str, tuple[float, float]] = {}

    def add(self, client: str, upload: Upload) -> None:
        """Take one upload whole, or raise :class:`UploadRejected` and take nothing of it."""
        for name, part in upload.parts.items():
            if name not in self.running:
                raise ConfigError.unknown("reducer for the part", name, self.running)
            if isinstance(part, Dense) and name in self.expected:
                same_shapes(part.tensors, self.expected[name], f"The upload of client '{client}'")
            self.running[name].check(part, client)
        missing = sorted(self.running.keys() - upload.parts.keys())
        if missing:
            raise UploadRejected(f"The upload of client '{client}' has no part '{missing[0]}'.")
        for name, part in upload.parts.items():
            self.running[name].add(part, upload.weight, client)
        self.clients += 1
        self.weight += upload.weight
        for name, (total, n) in upload.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + total, before[1] + n)

    def result(self, population: int) -> Update:
        """The update of everything added."""
        update = Update(clients=self.clients, population=population, weight=self.weight, metrics=self.metrics)
        for name, running in self.running.items():
            reduced = running.result()
            if isinstance(reduced, Part):
                update.parts[name] = reduced
            elif reduced is not None:
                update.collected[name] = reduced
        return update

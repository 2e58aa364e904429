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

from fedllm.core.errors import ConfigError, UploadRejected, nearest
from fedllm.core.message import Dense, Message, Owned, Part, Scalars, SeedCoefficients, Table, Upload
from fedllm.core.tensors import Tensors, in_one_piece, same_names, same_shapes, size_in_bytes
from fedllm.core.view import Region, View


class Running:
    """A reduction under way: :meth:`add` takes one part, :meth:`result` gives what they became (None if none came).

    Attributes:
        fitting: names and shapes of parts are compared with what is expected before :meth:`check`.
    """

    fitting = False

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
WAITING = 8
"""Uploads that a mean lets wait before it adds them: its sums are read and written once for all of them."""
WAITING_BYTES = 512 * 2**20
"""Bytes of uploads that may wait: a larger upload is added when it comes."""
STRETCH = 2**19
"""Entries that are added at a time: the float64 sums of so many stay in a processor's cache, and torch's threads share
them out."""


@dataclass(frozen=True)
class Mean(Reducer):
    """The mean of dense tensors, scalars or seed coefficients, weighted by examples or uniformly; the sum of tables.

    Sums are kept in float64, so that the order of arrival does not show after rounding to float32. A table carries its
    own counts, so tables are added up as they are, whatever the weighting.

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
        self.sums: Tensors | None = None  # views of `whole`, one behind the other
        self.whole = torch.empty(0, dtype=torch.float64)
        self.dtypes: dict[str, torch.dtype] = {}
        self.kind: type[Part] = Dense
        self.waiting: list[tuple[Tensors, torch.Tensor | None, float]] = []
        self.held = 0

    def check(self, part: Part, client: str) -> None:
        """See :class:`Running`."""
        tensors = _summands(part)
        if self.sums is None:
            return
        if type(part) is not self.kind:
            raise UploadRejected(f"Client '{client}' sent a {part.kind} part.", f"Expected: {self.kind.kind}.")
        if not self.fitting:
            same_shapes(tensors, self.sums, f"The upload of client '{client}'")

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        tensors = _summands(part)
        share = weight if self.weighting == "examples" and not isinstance(part, Table) else 1.0
        if self.sums is None:
            self._make_room(type(part), tensors)
        whole = in_one_piece([tensors[name] for name in self.dtypes])
        if whole is None or whole.dtype != torch.float32:
            for name, tensor in tensors.items():
                self.dtypes[name] = torch.promote_types(self.dtypes[name], tensor.dtype)
        self.total += share
        self.waiting.append((tensors, whole, share))
        self.held += size_in_bytes(tensors) if whole is None else whole.nbytes
        if len(self.waiting) == WAITING or self.held > WAITING_BYTES:
            self._add_up()

    def _make_room(self, kind: type[Part], like: Tensors) -> None:
        """Zeros for the sums of parts like this one."""
        self.kind, self.dtypes = kind, dict.fromkeys(like, torch.float32)
        self.whole = torch.zeros(sum(tensor.numel() for tensor in like.values()), dtype=torch.float64)
        rows = self.whole.split([tensor.numel() for tensor in like.values()])
        self.sums = {name: row.view(tensor.shape) for (name, tensor), row in zip(like.items(), rows, strict=True)}

    def _add_up(self) -> None:
        """Add the waiting uploads in the order they came: all of an upload at once where it lies in one piece."""
        pieces = [(whole, share) for _, whole, share in self.waiting if whole is not None]
        if len(pieces) == len(self.waiting):
            _add_in_stretches(self.whole, pieces)
        else:
            for name, total in (self.sums or {}).items():
                own = [(tensors[name].reshape(-1), share) for tensors, _, share in self.waiting]
                _add_in_stretches(total.view(-1), own)
        self.waiting.clear()
        self.held = 0

    def result(self) -> Part | None:
        self._add_up()
        if self.sums is None or self.total <= 0:
            return None
        if self.kind is Table:  # rows and counts are sums themselves: no division
            return Table(self.sums["rows"].float(), self.sums["counts"].float())
        means = {n: (s / self.total).to(self.dtypes[n]) for n, s in self.sums.items()}
        if self.kind is Scalars:
            return Scalars({name: float(value) for name, value in means.items()})
        return SeedCoefficients(means["coefficients"]) if self.kind is SeedCoefficients else Dense(means)


def _add_in_stretches(total: torch.Tensor, added: list[tuple[torch.Tensor, float]]) -> None:
    """total += share * vector for each in turn, stretch by stretch: the sums stay in the cache meanwhile."""
    for start in range(0, len(total), STRETCH):
        piece = total[start : start + STRETCH]
        for vector, share in added:
            piece.add_(vector[start : start + STRETCH], alpha=share)


@dataclass(frozen=True)
class OwnedSum(Part):
    """A reduced :class:`Owned` part: per entry the weighted sum and the weight of its owners, by region."""

    kind = "owned-sum"
    sums: Tensors
    weights: Tensors

    def mean(self, like: Mapping[str, torch.Tensor] | None = None) -> Tensors:
        """sum / weight where somebody owns the entry, else 0; in the names and shapes of `like` (None: those seen)."""
        means = {n: torch.zeros(t.shape) for n, t in (self.weights if like is None else like).items()}
        for name, weight in self.weights.items():
            found = torch.where(weight > 0, self.sums[name] / torch.where(weight > 0, weight, 1.0), 0.0)
            means[name][tuple(slice(0, size) for size in weight.shape)] = found.float()
        return means

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
        what = f"The upload of client '{client}'"
        same_names(part.tensors, dict.fromkeys(part.view.regions, torch.empty(0)), what)
        room = {}
        for name, region in part.view.regions.items():
            values, known = part.tensors[name], self.sums.get(name)
            if values.dim() < len(region) or (known is not None and values.dim() != known.dim()):
                raise UploadRejected(f"{what} has '{name}' in {values.dim()} dimensions.")
            room[name] = torch.empty(_room(known, _reach(region, values)), device="meta")
        part.view.fits(room, part.tensors, what)

    def add(self, part: Part, weight: float, client: str) -> None:
        """See :class:`Running`."""
        if not isinstance(part, Owned):
            return
        share = weight if self.weighting == "examples" else 1.0
        for name, region in part.view.regions.items():
            reach = _reach(region, part.tensors[name])
            for tree in (self.sums, self.weights):
                tree[name] = _grown(tree.get(name), reach)
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


def _reach(region: Region, values: torch.Tensor) -> list[int]:
    """The smallest shape that holds `values` at `region`."""
    ends = [int(e.stop) if isinstance(e, slice) else int(e.max()) + 1 if e.numel() else 0 for e in region]
    return [*ends, *values.shape[len(ends) :]]


def _room(known: torch.Tensor | None, shape: list[int]) -> list[int]:
    """The smallest shape that holds both."""
    return shape if known is None else [max(a, b) for a, b in zip(known.shape, shape, strict=True)]


def _grown(tensor: torch.Tensor | None, shape: list[int]) -> torch.Tensor:
    """`tensor` enlarged with zeros to hold `shape`."""
    wide = _room(tensor, shape)
    if tensor is not None and list(tensor.shape) == wide:
        return tensor
    result = torch.zeros(wide, dtype=torch.float64)
    if tensor is not None:
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


def _as_expected(name: str, part: Part, expected: Tensors, what: str) -> None:
    if isinstance(part, Owned):
        part.view.fits(expected, part.tensors, what)
    elif isinstance(part, Dense | Scalars | SeedCoefficients | Table):
        same_shapes(_summands(part), expected, what)
    else:
        raise UploadRejected(f"{what} has '{name}' as a {part.kind} part.", "Expected: a part of tensors or numbers.")


class Reduction:
    """One round's uploads on their way to an :class:`Update`.

    Args:
        reducers: one reducer for the part `update`, or one per part.
        expected: part -> tensors of the names and shapes a part must have (of a table `rows` and `counts`, of seed
            coefficients `coefficients`, of scalars their names), and an owned part must lie in.

    Raises:
        ConfigError: an :class:`OwnedMean` whose part is not in `expected`: nothing would bound what a client claims.
    """

    def __init__(self, reducers: Reducers, expected: Mapping[str, Tensors] | None = None) -> None:
        self.reducers = {"update": reducers} if isinstance(reducers, Reducer) else dict(reducers)
        self.running = {name: reducer.begin() for name, reducer in self.reducers.items()}
        self.expected = dict(expected or {})
        for name, reducer in self.reducers.items():
            self.running[name].fitting = name in self.expected
            if isinstance(reducer, OwnedMean) and name not in self.expected:
                raise ConfigError(
                    f"The part '{name}' is reduced by an OwnedMean, and the method does not say how large it may be.",
                    action="Name the global tensors in the method's 'expected'.",
                )
        self.clients, self.weight = 0, 0.0
        self.metrics: dict[str, tuple[float, float]] = {}

    def add(self, client: str, upload: Upload) -> None:
        """Take one upload whole, or raise :class:`UploadRejected` and take nothing of it."""
        self._check(client, upload)
        for name, part in upload.parts.items():
            self.running[name].add(part, upload.weight, client)
        self._count(upload)

    def _check(self, client: str, upload: Upload) -> None:
        """Raise :class:`UploadRejected` for an upload that is not as expected."""
        what = f"The upload of client '{client}'"
        missing = sorted(self.running.keys() - upload.parts.keys())
        if missing:
            raise UploadRejected(f"{what} has no part '{missing[0]}'.")
        for name, part in upload.parts.items():
            if name not in self.running:
                allowed = f"Reduced are: {', '.join(self.running) or 'none'}."
                raise UploadRejected(
                    f"{what} has a part '{name}' without a reducer.", allowed, nearest(name, self.running)
                )
            if name in self.expected:
                _as_expected(name, part, self.expected[name], what)
            self.running[name].check(part, client)

    def _count(self, upload: Upload) -> None:
        """Count an upload that was taken, and its measurements."""
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

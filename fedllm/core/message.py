"""Message - what travels between server and client: typed parts and a few numbers.

A part says what its tensors mean, because that decides how uploads may be combined and whether their sum may be
formed in secret: dense weights add up, entries with owners add up per entry, a list of texts does not. A new kind
of part is a class with a `kind`; defining it registers it with the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fedllm.core.errors import ConfigError
from fedllm.core.tensors import Tensors
from fedllm.core.view import View

Json = Any  # None, bool, int, float, str, and lists and string-keyed dicts of these

PARTS: dict[str, type[Part]] = {}


class Part:
    """One typed piece of a message. Subclasses set `kind` and say how they become tensors and JSON."""

    kind: ClassVar[str] = ""
    summable: ClassVar[bool] = False
    """Whether the sum of two such parts has a meaning (so that secure sums may form it)."""

    def __init_subclass__(cls) -> None:
        other = PARTS.get(cls.kind)
        again = other is not None and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
        if not cls.kind or (other is not None and not again):
            raise ConfigError(f"The part class {cls.__name__} needs a kind of its own; '{cls.kind}' is taken or empty.")
        PARTS[cls.kind] = cls

    def to_wire(self) -> tuple[Tensors, Json]:
        """The tensors and the JSON facts that rebuild this part."""
        raise NotImplementedError(f"{type(self).__name__} must define to_wire.")

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Part:
        """Rebuild a part from :meth:`to_wire`; raises ValueError, TypeError or KeyError where facts are malformed."""
        raise NotImplementedError(f"{cls.__name__} must define from_wire.")


@dataclass(frozen=True)
class Dense(Part):
    """Named tensors that every client has in the same shapes: weights, or (in an upload) their change."""

    kind = "dense"
    summable = True
    tensors: Tensors

    def to_wire(self) -> tuple[Tensors, Json]:
        """The tensors as they are."""
        return self.tensors, None

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Dense:
        """See :class:`Part`."""
        return cls(tensors)


@dataclass(frozen=True)
class Owned(Part):
    """Entries of larger global tensors that this client owns: values, and the view that places them."""

    kind = "owned"
    summable = True
    tensors: Tensors
    view: View

    def to_wire(self) -> tuple[Tensors, Json]:
        """The values beside the index tensors of the view."""
        indices, facts = self.view.to_wire()
        return {**{f"v.{n}": t for n, t in self.tensors.items()}, **{f"i.{n}": t for n, t in indices.items()}}, facts

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Owned:
        """See :class:`Part`."""
        values = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("v.")}
        indices = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("i.")}
        return cls(values, View.from_wire(indices, facts))


@dataclass(frozen=True)
class SeedCoefficients(Part):
    """Scalar coefficients of directions that both sides regenerate from seeds (FedKSeed and its kin)."""

    kind = "seed-coefficients"
    summable = True
    coefficients: torch.Tensor
    """Shape [K], one per candidate seed."""

    def to_wire(self) -> tuple[Tensors, Json]:
        """One vector."""
        return {"coefficients": self.coefficients}, None

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> SeedCoefficients:
        """See :class:`Part`."""
        if tensors["coefficients"].dim() != 1:
            raise ValueError("coefficients must be a vector")
        return cls(tensors["coefficients"])


@dataclass(frozen=True)
class Table(Part):
    """Rows with counts: class prototypes, score tables. Row r of a mean weighs counts[r]."""

    kind = "table"
    summable = True
    rows: torch.Tensor
    """Shape [R, D]: sums over what was counted, so that tables add up."""
    counts: torch.Tensor
    """Shape [R]."""

    def to_wire(self) -> tuple[Tensors, Json]:
        """Rows and counts."""
        return {"rows": self.rows, "counts": self.counts}, None

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Table:
        """See :class:`Part`."""
        if tensors["rows"].dim() != 2 or tensors["counts"].shape != tensors["rows"].shape[:1]:
            raise ValueError("a table needs rows [R, D] and counts [R]")
        return cls(tensors["rows"], tensors["counts"])


@dataclass(frozen=True)
class Scalars(Part):
    """Named numbers that add up."""

    kind = "scalars"
    summable = True
    values: dict[str, float]

    def to_wire(self) -> tuple[Tensors, Json]:
        """Only JSON."""
        return {}, self.values

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Scalars:
        """See :class:`Part`."""
        return cls({str(name): float(value) for name, value in facts.items()})


@dataclass(frozen=True)
class Texts(Part):
    """Texts, in order. They never add up."""

    kind = "texts"
    texts: tuple[str, ...]

    def to_wire(self) -> tuple[Tensors, Json]:
        """Only JSON."""
        return {}, list(self.texts)

    @classmethod
    def from_wire(cls, tensors: Tensors, facts: Json) -> Texts:
        """See :class:`Part`."""
        if not isinstance(facts, list) or not all(isinstance(text, str) for text in facts):
            raise ValueError("texts must be a list of strings")
        return cls(tuple(facts))


def as_part(value: Part | Mapping[str, torch.Tensor]) -> Part:
    """A mapping of tensors is short for :class:`Dense`."""
    return value if isinstance(value, Part) else Dense(dict(value))


@dataclass
class Message:
    """Typed parts and numbers. `message["control"]` is the named tensors of a dense part."""

    parts: dict[str, Part] = field(default_factory=dict)
    numbers: dict[str, Json] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensors:
        if name not in self.parts:
            raise ConfigError.unknown("part", name, self.parts)
        part = self.parts[name]
        if not isinstance(part, Dense | Owned):
            raise ConfigError(f"The part '{name}' is of kind '{part.kind}' and holds no named tensors.")
        return part.tensors


class Received(Message):
    """What one client gets: `params` (the trainable tensors to start from) and whatever else the method sends.

    Args:
        params: named tensors; None where the method sends no weights (replay from seeds, prompts as text).
        numbers: JSON values.
        parts: further parts by name; a mapping of tensors is short for a dense part.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor] | None = None,
        numbers: Mapping[str, Json] | None = None,
        **parts: Part | Mapping[str, torch.Tensor],
    ) -> None:
        named = {} if params is None else {"params": as_part(params)}
        super().__init__({**named, **{k: as_part(v) for k, v in parts.items()}}, dict(numbers or {}))

    @classmethod
    def of(cls, parts: Mapping[str, Part], numbers: Mapping[str, Json] | None = None) -> Received:
        """A message of these parts as they are."""
        found = cls(None, numbers)
        found.parts.update(parts)
        return found

    @property
    def params(self) -> Tensors:
        """The trainable tensors to start from."""
        return self["params"]


class Upload(Message):
    """What one client gives back: the change of its tensors (`update`), its weight, its metrics.

    Args:
        update: named tensors, the local result minus what was received; None where nothing dense is sent.
        weight: how much this client counts in a weighted mean; usually its number of training examples.
        metrics: name -> (sum, n): sums, so that pooled values are exact.
        numbers: JSON values.
        parts: further parts by name.
    """

    def __init__(
        self,
        update: Part | Mapping[str, torch.Tensor] | None = None,
        weight: float = 1.0,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        numbers: Mapping[str, Json] | None = None,
        **parts: Part | Mapping[str, torch.Tensor],
    ) -> None:
        named = {} if update is None else {"update": as_part(update)}
        super().__init__({**named, **{k: as_part(v) for k, v in parts.items()}}, dict(numbers or {}))
        self.weight = float(weight)
        self.metrics = {k: (float(s), float(n)) for k, (s, n) in (metrics or {}).items()}

    @property
    def update(self) -> Tensors:
        """The change of the trainable tensors."""
        return self["update"]

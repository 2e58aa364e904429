"""Seeds - every random stream is derived from the run's seed and the names of what it is for.

Nothing draws from a global generator: a stream is a function of (seed, purpose, client, round, ...), so the order
of clients, the number of processes and a resumed run cannot change what is drawn.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` of the run seed `seed` (SHA-256, stable across machines).

    Different names give different seeds; a NumPy integer is the same name as the int it equals.
    """
    typed = (f"str:{name}" if isinstance(name, str) else f"int:{int(name)}" for name in names)
    text = "\x1f".join([str(int(seed)), *(name.replace("\x1f", "\x1f\x1f") for name in typed)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Derived(Sequence[int]):
    """Seeds that are derived, once, when somebody asks for one: most models draw nothing.

    Args:
        names: of each, what :func:`derive` is given.
    """

    def __init__(self, names: Sequence[tuple[int, *tuple[str | int, ...]]]) -> None:
        self._names = names

    @cached_property
    def _seeds(self) -> list[int]:
        return [derive(*names) for names in self._names]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        return self._seeds[place]


def numpy_stream(seed: int, *names: str | int) -> numpy.random.Generator:
    """A NumPy generator for the stream called `names`."""
    return numpy.random.Generator(numpy.random.PCG64(derive(seed, *names)))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU torch generator for the stream called `names`; the same numbers on every device and machine."""
    import torch

    return torch.Generator("cpu").manual_seed(derive(seed, *names))


def secret_stream() -> torch.Generator:
    """A CPU torch generator whose numbers nobody else can make: its seed comes from the operating system."""
    import torch

    return torch.Generator("cpu").manual_seed(secrets.randbits(63))


def python_stream(seed: int, *names: str | int) -> random.Random:
    """A generator of the standard library for the stream called `names`."""
    return random.Random(derive(seed, *names))

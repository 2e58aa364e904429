"""Quantise - tensors as 8-bit or 4-bit integers in blocks, each with a scale; or as signs with one scale.

Stochastic rounding makes the decoded value right on average, so a mean over many clients is as good as without it.
Rounding to nearest errs less each time and is biased; error feedback makes up for that.

Sources: Alistarh et al., QSGD, NeurIPS 2017, section 3 (with the largest magnitude of a block in place of the norm of a
vector); Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch.nn.functional import pad

from fedllm.modes.coded import Section

TINY = torch.finfo(torch.float32).tiny
"""The smallest scale: a block of zeros has it."""


@dataclass(frozen=True)
class Quantise:
    """q = round(x / s), decoded as s q, with |q| <= L = 2^(bits - 1) - 1.

    Args:
        bits: 8 or 4.
        block: so many consecutive entries share the scale s = max|x| / L.
        nearest: round to nearest; else up with the probability of the fraction, so that the mean is x.
        clip: one scale for everything, s = clip / L, which does not travel; what lies beyond is set to the bound.
    """

    bits: int
    block: int = 256
    nearest: bool = False
    clip: float | None = None

    @property
    def top(self) -> int:
        """The largest integer, L."""
        return 2 ** (self.bits - 1) - 1

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """See :class:`~fedllm.modes.coded.Coder`: int8 [n] or two to a byte, and a float32 scale per block."""
        n = math.prod(shape)
        codes = (torch.int8, n) if self.bits == 8 else (torch.uint8, (n + 1) // 2)
        return [codes] if self.clip else [codes, (torch.float32, math.ceil(n / self.block))]

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """See :class:`~fedllm.modes.coded.Coder`."""
        flat = values.reshape(-1)
        if self.clip:
            return [self._stored(self._rounded(flat / self.step, rng))]
        rows = self._rows(flat)
        scales = (rows.abs().amax(1) / self.top).float().clamp_min(TINY)
        return [self._stored(self._rounded(rows / scales[:, None], rng).reshape(-1)[: flat.numel()]), scales]

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`~fedllm.modes.coded.Coder`."""
        values = self.integers(sections, math.prod(shape)).float()
        if self.clip:
            return (values * self.step).reshape(list(shape))
        scales = sections[1]
        if scales.numel() and not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise ValueError("a scale that is not a positive number")
        return (self._rows(values) * scales[:, None]).reshape(-1)[: values.numel()].reshape(list(shape))

    def integers(self, sections: Sequence[torch.Tensor], n: int) -> torch.Tensor:
        """The n integers, int8; raises ValueError for one beyond L."""
        codes = sections[0]
        if self.bits == 4:
            both = torch.stack([codes & 15, codes >> 4], 1).reshape(-1).to(torch.int8) - 8
            if n % 2 and int(both[-1]):
                raise ValueError("a padded half byte that is not zero")
            codes = both[:n]
        if n and int(codes.min()) < -self.top:
            raise ValueError(f"an integer below {-self.top}")
        return codes

    @property
    def step(self) -> float:
        """The one scale where `clip` is given."""
        return (self.clip or 0.0) / self.top

    def _rows(self, flat: torch.Tensor) -> torch.Tensor:
        """[blocks, block], the last one filled with zeros."""
        block = min(self.block, max(flat.numel(), 1))
        return pad(flat, (0, -flat.numel() % block)).view(-1, block)

    def _rounded(self, values: torch.Tensor, rng: numpy.random.Generator) -> torch.Tensor:
        values = values.clamp(-self.top, self.top)
        if self.nearest:
            return values.round().to(torch.int8)
        low = values.floor()
        up = torch.from_numpy(rng.random(tuple(values.shape), dtype=numpy.float32)) < values - low
        return low.to(torch.int8) + up.to(torch.int8)

    def _stored(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return codes
        halves = pad((codes + 8).to(torch.uint8), (0, codes.numel() % 2), value=8).view(-1, 2)
        return halves[:, 0] | halves[:, 1] << 4


@dataclass(frozen=True)
class Sign:
    """sign(x) times the mean magnitude of the tensor; the sign of 0 is +. One bit an entry."""

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """See :class:`~fedllm.modes.coded.Coder`: eight signs to a byte, and one float32."""
        n = math.prod(shape)
        return [(torch.uint8, (n + 7) // 8), (torch.float32, min(n, 1))]

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """See :class:`~fedllm.modes.coded.Coder`."""
        flat = values.reshape(-1)
        scale = flat.abs().mean(dtype=torch.float64).float().reshape(1)[: flat.numel()]
        return [bits_of(flat >= 0), scale]

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`~fedllm.modes.coded.Coder`."""
        bits, scale = sections
        if scale.numel() and not (math.isfinite(float(scale)) and float(scale) >= 0):
            raise ValueError("a scale that is not a number, or negative")
        signs = truths(bits, math.prod(shape)).float() * 2 - 1
        return (signs * scale).reshape(list(shape))


def bits_of(flags: torch.Tensor) -> torch.Tensor:
    """Booleans [n] as bytes, eight to a byte, the first one highest; the last byte is filled with zeros."""
    return torch.from_numpy(numpy.packbits(flags.numpy()))


def truths(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The n booleans in `packed`; raises ValueError where the filling is not zero."""
    flags = numpy.unpackbits(packed.numpy())
    if flags[n:].any():
        raise ValueError("a filling bit that is not zero")
    return torch.from_numpy(flags[:n].view(numpy.bool_))

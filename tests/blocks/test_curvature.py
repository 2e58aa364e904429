"""Curvature - products with a Hessian, Lanczos spectra and the bound where their mass stops changing."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy
import pytest
import torch

from fedllm.blocks.curvature import (
    Spectrum,
    client_spectrum,
    flat,
    hessian_product,
    shaped,
    spectrum,
    stable_mass,
)
from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.tensors import Tensors


class Loss:
    """A client whose gradient is that of a function."""

    def __init__(self, function: Any) -> None:
        self.function, self.asked = function, 0

    async def gradient(self, params: Tensors, **_: Any) -> tuple[Tensors, tuple[float, float]]:
        self.asked += 1
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        self.function(leaves).backward()
        return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}, (0.0, 1.0)


def network(params: Tensors) -> torch.Tensor:
    x = torch.linspace(-1, 1, 20).reshape(10, 2)
    return (torch.tanh(x @ params["w"]) @ params["v"] - 0.3).square().mean()


def start() -> Tensors:
    stream = torch.Generator().manual_seed(0)
    return {"w": torch.randn(2, 3, generator=stream), "v": torch.randn(3, generator=stream)}


def hessian(params: Tensors) -> torch.Tensor:
    vector = flat(params).float()
    return torch.autograd.functional.hessian(lambda x: network(shaped_with_grad(x, params)), vector).double()  # type: ignore[no-untyped-call]


def shaped_with_grad(vector: torch.Tensor, like: Tensors) -> Tensors:
    pieces = torch.split(vector, [t.numel() for t in like.values()])
    return {n: p.reshape(t.shape) for p, (n, t) in zip(pieces, like.items(), strict=True)}


async def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return matrix @ vector


def of(matrix: torch.Tensor, steps: int = 50, seed: int = 0) -> Spectrum:
    rng = numpy.random.default_rng(seed)
    return asyncio.run(spectrum(lambda v: times(matrix, v), len(matrix), steps, rng))


def test_a_product_with_the_hessian() -> None:
    params, whole = start(), hessian(start())
    for place in range(9):
        direction = shaped(torch.eye(9, dtype=torch.float64)[place] * 7, params)
        found = flat(asyncio.run(hessian_product(Loss(network), params, direction)))  # type: ignore[arg-type]
        assert torch.allclose(found, 7 * whole[place], atol=2e-2)
    client = Loss(network)
    zero = asyncio.run(hessian_product(client, params, {n: t * 0 for n, t in params.items()}))  # type: ignore[arg-type]
    assert client.asked == 0 and all(not bool(t.any()) for t in zero.values())


def test_a_full_lanczos_run_finds_every_eigenvalue() -> None:
    stream = torch.Generator().manual_seed(1)
    matrix = torch.randn(12, 12, generator=stream, dtype=torch.float64)
    matrix = matrix + matrix.T
    found = of(matrix)
    assert torch.allclose(torch.tensor(found.values).double(), torch.linalg.eigvalsh(matrix), atol=1e-5)
    assert sum(found.weights) == pytest.approx(1) and all(w >= 0 for w in found.weights)


def test_moments_of_the_start_are_exact() -> None:
    """sum w v^k = s' A^k s for k < 2 steps: what makes quadrature of few points right."""
    stream = torch.Generator().manual_seed(2)
    matrix = torch.randn(30, 30, generator=stream, dtype=torch.float64)
    matrix = matrix + matrix.T
    found = of(matrix, steps=4, seed=5)
    s = torch.from_numpy(numpy.random.default_rng(5).standard_normal(30))
    s = s / s.norm()
    power = s
    for k in range(8):
        by_hand = float(s @ power)
        assert sum(w * v**k for v, w in zip(found.values, found.weights, strict=True)) == pytest.approx(by_hand)
        power = matrix @ power


def test_an_exhausted_space_ends_early() -> None:
    found = of(3 * torch.eye(6, dtype=torch.float64))
    assert found.values == pytest.approx((3.0,)) and found.weights == pytest.approx((1.0,))
    assert of(torch.zeros(4, 4, dtype=torch.float64)).values == (0.0,)


def test_the_spectrum_of_a_client() -> None:
    params = start()
    found = asyncio.run(client_spectrum(Loss(network), params, None, 50, numpy.random.default_rng(0)))  # type: ignore[arg-type]
    exact = torch.linalg.eigvalsh(hessian(params))
    assert found.values[-1] == pytest.approx(float(exact[-1]), rel=0.02)


def test_mass_above() -> None:
    density = Spectrum((-1.0, 0.0, 0.5, 2.0), (0.1, 0.2, 0.3, 0.4))
    assert [density.above(b) for b in (-2, 0, 0.5, 3)] == pytest.approx([1.0, 0.7, 0.4, 0.0])


def test_the_bound_stops_where_the_mass_does() -> None:
    spread = Spectrum((0.05, 0.15, 5.0), (0.1, 0.1, 0.8))
    assert stable_mass(spread) == pytest.approx(0.8), "two drops, then quiet"
    assert stable_mass(Spectrum((1.0,), (1.0,))) == 1.0
    assert stable_mass(Spectrum((-1.0,), (1.0,))) == 0.0


def test_the_increment_is_halved_where_half_is_lost() -> None:
    """All mass lies within the first step: smaller ones find the plateau before it."""
    assert stable_mass(Spectrum((-1.0, 0.04), (0.4, 0.6))) == pytest.approx(0.6)
    assert stable_mass(Spectrum((0.0001, 1.0), (0.2, 0.8)), increment=8.0) == pytest.approx(0.8)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"0 Lanczos steps over 3 numbers"):
        of(torch.eye(3, dtype=torch.float64), steps=0)
    with pytest.raises(RoundFailed, match=r"Hessian is not finite"):
        of(torch.full((3, 3), float("nan"), dtype=torch.float64))

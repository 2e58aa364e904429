"""Curvature - the spectrum of a loss's Hessian, from gradients alone.

A Hessian times a vector is a difference of two gradients; a few such products (Lanczos, with a random start) give the
density of the eigenvalues as a handful of weighted points (stochastic Lanczos quadrature: Golub and Welsch 1969;
Ghorbani et al., 1901.10159). Nothing of the size of the Hessian is ever formed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.tensors import Tensors, add, norm
from fedllm.core.work import Client, Row

Product = Callable[[torch.Tensor], Awaitable[torch.Tensor]]
"""A symmetric matrix times a vector: float64 [D] -> [D]."""


@dataclass(frozen=True)
class Spectrum:
    """An eigenvalue density as weighted points.

    Attributes:
        values: where the points lie, ascending.
        weights: their masses; they sum to 1.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]

    def above(self, bound: float) -> float:
        """The mass of the eigenvalues above `bound`."""
        return float(sum(w for v, w in zip(self.values, self.weights, strict=True) if v > bound))


def flat(tree: Tensors) -> torch.Tensor:
    """All entries as one float64 vector, in the order of the names."""
    return torch.cat([tensor.double().reshape(-1) for tensor in tree.values()])


def shaped(vector: torch.Tensor, like: Tensors) -> Tensors:
    """The inverse of :func:`flat`: float32 tensors of the names and shapes of `like`."""
    pieces = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {n: p.reshape(t.shape).float() for p, (n, t) in zip(pieces, like.items(), strict=True)}


async def hessian_product(
    client: Client, params: Tensors, direction: Tensors, rows: Sequence[Row] | None = None, step: float = 3e-3
) -> Tensors:
    """H v of the client's mean loss at `params`: (g(x + e v) - g(x - e v)) / 2e, with e = step (1 + |x|) / |v|.

    The error is of the order of e^2 from the third derivative and of 1e-7 |g| / e from the rounding of float32.

    Args:
        client: whose loss.
        params: where; all of them are differentiated.
        direction: v; a zero vector gives zero.
        rows: on which rows; all training rows where None.
        step: the displacement relative to the size of `params`.
    """
    length = norm(direction)
    if not length:
        return {name: torch.zeros_like(tensor) for name, tensor in direction.items()}
    size = step * (1 + norm(params)) / length
    ahead, _ = await client.gradient(add(params, direction, size), rows=rows)
    behind, _ = await client.gradient(add(params, direction, -size), rows=rows)
    return {name: (ahead[name] - behind[name]) / (2 * size) for name in ahead}


async def client_spectrum(
    client: Client, params: Tensors, rows: Sequence[Row] | None, steps: int, rng: numpy.random.Generator
) -> Spectrum:
    """The density of the Hessian of a client's loss in all of `params`: one start vector, `steps` products."""

    async def product(vector: torch.Tensor) -> torch.Tensor:
        return flat(await hessian_product(client, params, shaped(vector, params), rows))

    return await spectrum(product, sum(tensor.numel() for tensor in params.values()), steps, rng)


async def spectrum(product: Product, size: int, steps: int, rng: numpy.random.Generator) -> Spectrum:
    """Stochastic Lanczos quadrature with one random start and full re-orthogonalisation.

    Args:
        product: the matrix; it is taken as symmetric.
        size: its number of rows.
        steps: most products; fewer where the space the start reaches is exhausted.
        rng: draws the start.

    Raises:
        ConfigError: no step, or no row.
        RoundFailed: a product is not finite.
    """
    if steps < 1 or size < 1:
        raise ConfigError(f"{steps} Lanczos steps over {size} numbers were asked for.", "At least 1 of each.")
    start = torch.from_numpy(rng.standard_normal(size))
    basis, diagonal, beside = [start / start.norm()], [], []
    while True:
        image = await product(basis[-1])
        if not bool(torch.isfinite(image).all()):
            raise RoundFailed("A product with the Hessian is not finite.", action="Lower train.lr or the warm-up.")
        diagonal.append(float(image @ basis[-1]))
        done = torch.stack(basis)
        for _ in range(2):  # twice is enough
            image = image - done.T @ (done @ image)
        length = float(image.norm())
        if len(basis) == min(steps, size) or length <= 1e-10 * max(1.0, *map(abs, diagonal)):
            break
        beside.append(length)
        basis.append(image / length)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        edge = torch.tensor(beside, dtype=torch.float64)
        matrix = matrix + torch.diag(edge, 1) + torch.diag(edge, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(tuple(values.tolist()), tuple(vectors[0].square().tolist()))


def stable_mass(density: Spectrum, increment: float = 0.1, tolerance: float = 0.005, runs: int = 3) -> float:
    """The mass above the first bound where it stops changing (FedPepTAO, 2310.15080, section 4.1).

    The bound rises from 0 by `increment` until `runs` successive changes of the mass are below `tolerance`. Where the
    mass falls below half of that above 0 first, `increment` is halved and the search begins again.
    """
    whole = density.above(0.0)
    while increment > 1e-9:
        bound, mass, quiet = 0.0, whole, 0
        while quiet < runs and mass >= whole / 2:
            bound += increment
            before, mass = mass, density.above(bound)
            quiet = quiet + 1 if abs(before - mass) < tolerance else 0
        if mass >= whole / 2:
            return mass
        increment /= 2
    return whole

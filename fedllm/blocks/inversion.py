"""Inversion - what a gradient tells of the batch it came from: inputs, tokens and labels.

Two kinds of attack. Searches move dummy inputs until their gradient is the one that was seen (DLG, inverting
gradients). Closed forms read a layer's input, how often each label occurs, or which labels occur, from the gradient of
one linear layer. All know the model and the gradient of ONE step; after several local steps an update is no gradient,
and what is found gets worse. Nothing here draws anything: the same input gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch

from fedllm.core.errors import ConfigError, DataError, RunError
from fedllm.core.tensors import Tensors, finite, norm, same_shapes

Kind = Literal["l2", "cosine"]
"""How two gradients are compared; see :func:`distance`."""
Optimizer = Literal["lbfgs", "adam", "signed-adam"]
"""How dummy inputs are moved; see :func:`match`."""
GradientOf = Callable[[Tensors], Mapping[str, torch.Tensor]]
"""Dummy inputs by name -> the gradient they give, with its graph (`create_graph=True`)."""
Prior = Callable[[Tensors], torch.Tensor]
"""Dummy inputs by name -> how unlikely they are: a scalar with its graph."""
TINY = 1e-12
"""A gradient of no larger norm has no direction."""
MILESTONES = (3 / 8, 5 / 8, 7 / 8)
"""The shares of the steps after which signed Adam lowers its learning rate tenfold."""
FALL = 1e-6
"""L-BFGS starts again, in new units, where the objective has fallen to this share."""
UNIT = 1e-30
"""The least such unit: its inverse is a number in float32."""
TRIALS = 25
"""How many points one line search of L-BFGS tries."""
CELLS = 1 << 22
"""How many scores of tokens are held at once."""
SLACK = 1e-6
"""How far below 0 a row's product with a separating direction may be; more in dtypes of coarser rounding."""
APART = 1e-3
"""A row no farther (nor 8 slacks) from the cone of the others lies in it: what parts them is longer than 1 / APART."""


@dataclass(frozen=True)
class Match:
    """The dummy inputs whose gradient came nearest.

    Attributes:
        point: the dummy inputs by name, in the dtypes of the start.
        distance: of their gradient to the target, without the prior.
        trace: the objective (distance and weighted prior) before every step and at the end; inf where not finite.
        start: the number of the start that led there.
    """

    point: Tensors
    distance: float
    trace: tuple[float, ...]
    start: int


def distance(found: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], kind: Kind) -> torch.Tensor:
    """How far one gradient is from another: a scalar in float64, differentiable in `found`.

    'l2' is the sum of squared differences (Zhu et al., DLG, arXiv:1906.08935). 'cosine' is 1 - cos of the
    concatenations (Geiping et al., Inverting Gradients, arXiv:2003.14053), 0 to 2; it is 1 where either has a norm of
    0.

    Raises:
        ConfigError: an unknown kind.
        DataError: a target that is empty or not finite.
        UploadRejected: names or shapes that differ.
    """
    _check_target(target, kind)
    same_shapes(found, target, "The gradient of the dummy inputs")
    return _distance(found, target, kind)


def match(
    gradient_of: GradientOf,
    start: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
    target: Mapping[str, torch.Tensor],
    *,
    kind: Kind,
    optimizer: Optimizer,
    steps: int,
    lr: float,
    prior: Prior | None = None,
    prior_weight: float = 0.0,
) -> Match:
    """Move dummy inputs until their gradient is the target; the best point seen is returned.

    DLG (Zhu et al., NeurIPS 2019, arXiv:1906.08935) is 'l2' and 'lbfgs' over inputs and label logits. Inverting
    gradients (Geiping et al., NeurIPS 2020, arXiv:2003.14053) is 'cosine' and 'signed-adam' over inputs with the labels
    known, and a prior; its learning rate falls tenfold after 3/8, 5/8 and 7/8 of the steps. Here L-BFGS has a line
    search (strong Wolfe), without which it often diverges. Where a step ends in numbers that are not finite, the
    search goes on from the best point with half the learning rate and no memory; where L-BFGS stalls, it forgets its
    memory, and ends where that does not help.

    Args:
        gradient_of: see :data:`GradientOf`; may use the model's own parameters, whose `.grad` stay as they are.
        start: dummy inputs by name, float32 or float64, or several sets of them: each is a search of its own.
        target: the gradient that was seen.
        kind: see :func:`distance`.
        optimizer: see above; 'adam' is plain Adam at a constant rate.
        steps: per start. One of L-BFGS is one direction, up to 25 gradients; else one gradient.
        lr: the learning rate; for L-BFGS the first length its line search tries.
        prior: see :data:`Prior`; total variation of images, distance of embeddings' norms from the table's.
        prior_weight: what is minimised is the distance + prior_weight * prior.

    Raises:
        ConfigError: an unknown name, steps below 1, a rate or weight out of range, or gradients without a graph.
        DataError: a target or start that is not finite, a target without direction (cosine), or no start with a finite
            objective.
        UploadRejected: gradients with other names or shapes than the target.
    """
    if optimizer not in ("lbfgs", "adam", "signed-adam"):
        raise ConfigError.unknown("optimizer", str(optimizer), ("lbfgs", "adam", "signed-adam"))
    if steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"A search was given steps={steps}, lr={lr}.", "Steps are 1 or more, lr is above 0.")
    if not (math.isfinite(prior_weight) and prior_weight >= 0) or (prior is None) != (prior_weight == 0):
        raise ConfigError(
            f"prior_weight is {prior_weight} {'without' if prior is None else 'with'} a prior.",
            "Allowed: a weight above 0 with a prior, and 0 without one.",
        )
    _check_target(target, kind)
    if kind == "cosine" and norm(target) <= TINY:
        raise DataError("The target gradient is 0.", "A cosine needs a direction.", action="Use kind='l2'.")
    starts = [start] if isinstance(start, Mapping) else list(start)
    with torch.inference_mode(False), torch.enable_grad():
        wanted = {name: each.detach().double().clone() for name, each in target.items()}

        def objective(point: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
            found = gradient_of(point)
            same_shapes(found, wanted, "The gradient of the dummy inputs")
            near = _distance(found, wanted, kind)
            return near if prior is None else near + prior_weight * prior(point), near

        searches = [_Search(objective, each, optimizer, lr) for each in starts]
        for search in searches:
            search.run(steps)
    best = min(searches, key=lambda search: search.least, default=None)
    if best is None or not math.isfinite(best.least):
        raise DataError(f"None of {len(starts)} starts has a finite objective.", action="Give smaller starts.")
    return Match(best.best, best.nearest, tuple(best.trace), searches.index(best))


class _Search:
    """One start's search: where it is, the best point so far, and how it goes on from there."""

    def __init__(
        self,
        objective: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]],
        start: Mapping[str, torch.Tensor],
        optimizer: Optimizer,
        lr: float,
    ) -> None:
        if not start or any(each.dtype not in (torch.float32, torch.float64) for each in start.values()):
            raise ConfigError("A start holds no tensor, or one of another dtype.", "Allowed: float32 and float64.")
        bad = finite(start)
        if bad is not None:
            raise DataError(f"The start '{bad}' is not finite.")
        self.objective, self.optimizer, self.lr = objective, optimizer, lr
        self.point: Tensors = {name: each.detach().clone().requires_grad_() for name, each in start.items()}
        self.best = {name: each.detach().clone() for name, each in self.point.items()}
        self.least = self.nearest = math.inf
        self.scale = 1.0
        self.trace: list[float] = []

    def run(self, steps: int) -> None:
        """So many steps; fewer where L-BFGS finds nothing better any more."""
        self.value()
        if not math.isfinite(self.least):
            return
        closure: Any = self.value  # torch's own type lacks tensors
        mover, fresh = self.mover(), True
        for step in range(steps):
            drops = sum(step >= share * steps for share in MILESTONES) if self.optimizer == "signed-adam" else 0
            mover.param_groups[0]["lr"] = self.lr * 0.1**drops
            before = self.least
            value = float(mover.step(closure)) / self.scale  # of the point the step began at
            self.trace.append(value)
            stalled = self.optimizer == "lbfgs" and self.least >= before
            if not math.isfinite(value):
                self.lr /= 2
            elif stalled and fresh:
                break
            elif not stalled and (self.optimizer != "lbfgs" or self.least * self.scale > FALL):
                fresh = False
                continue
            with torch.no_grad():
                for name, each in self.point.items():
                    each.copy_(self.best[name])
            mover, fresh = self.mover(), True
        self.trace.append(float(self.value()) / self.scale)

    def mover(self) -> torch.optim.Optimizer:
        """An optimiser without a memory, for the objective in units of its least value so far."""
        held, self.scale = list(self.point.values()), 1 / max(self.least, UNIT)
        if self.optimizer != "lbfgs":
            return torch.optim.Adam(held, lr=self.lr)
        # Torch bounds the line search by max_eval, and leaves small curvature out of the memory: hence the scale.
        return torch.optim.LBFGS(
            held,
            lr=self.lr,
            max_iter=1,
            max_eval=TRIALS + 1,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

    def value(self) -> torch.Tensor:
        """The scaled objective at the point, inf where it is not finite; sets `.grad`, keeps the best point."""
        for each in self.point.values():  # a line search that meets them halves its bracket
            each.grad = torch.full_like(each, math.nan)
        lost = torch.tensor(math.inf, dtype=torch.float64)
        if finite(self.point) is not None:
            return lost
        value, near = self.objective(dict(self.point))
        grads = self.derived(value)
        if not bool(torch.isfinite(value)) or finite(grads) is not None:
            return lost
        for name, grad in grads.items():
            self.point[name].grad = grad.sign() if self.optimizer == "signed-adam" else grad * self.scale
        if float(value.detach()) < self.least:
            self.least, self.nearest = float(value.detach()), float(near.detach())
            self.best = {name: each.detach().clone() for name, each in self.point.items()}
        return value.detach() * self.scale

    def derived(self, value: torch.Tensor) -> Tensors:
        """The objective's derivative in every dummy input; no parameter's `.grad` changes."""
        held = list(self.point.values())
        grads = torch.autograd.grad(value, held, allow_unused=True) if value.requires_grad else [None] * len(held)
        found = {name: grad for name, grad in zip(self.point, grads, strict=True) if grad is not None}
        unused = next((name for name in self.point if name not in found), None)
        if unused is not None:
            raise ConfigError(
                f"The gradient does not depend on the dummy input '{unused}', or has no graph.",
                action="Compute it with create_graph=True, and leave out inputs that are not used.",
            )
        return found


def _distance(found: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], kind: Kind) -> torch.Tensor:
    both = [(found[name].double(), each.detach().double()) for name, each in target.items()]
    if kind == "l2":
        return torch.stack([(a - b).square().sum() for a, b in both]).sum()
    dot, left, right = (
        torch.stack([(p * q).sum() for p, q in pairs]).sum()
        for pairs in (both, [(a, a) for a, _ in both], [(b, b) for _, b in both])
    )
    return 1 - dot / (left.clamp(min=TINY**2).sqrt() * right.clamp(min=TINY**2).sqrt())


def _check_target(target: Mapping[str, torch.Tensor], kind: str) -> None:
    if kind not in ("l2", "cosine"):
        raise ConfigError.unknown("kind of distance", str(kind), ("l2", "cosine"))
    bad = finite(target)
    if not target or bad is not None:
        raise DataError(f"The target gradient '{bad}' is not finite." if target else "The target gradient is empty.")


# -- tokens ------------------------------------------------------------------------------------------------------------


def nearest_tokens(
    embeddings: torch.Tensor,
    table: torch.Tensor,
    allowed: Sequence[int] | None = None,
    by: Literal["cosine", "euclidean"] = "cosine",
) -> torch.Tensor:
    """The token whose embedding is nearest, for every embedding; the lowest id where several are.

    A row of the table that is 0 has no direction and is never nearest by cosine. Scores are computed in float64, some
    rows of the table at a time.

    Args:
        embeddings: [..., d].
        table: [V, d].
        allowed: the ids that may be found; None for all.
        by: the largest cosine or the smallest distance.

    Returns:
        ids, int64 [...].

    Raises:
        ConfigError: an unknown `by`.
        DataError: shapes that do not match, numbers that are not finite, no allowed id or one outside the table, or
            an embedding or a table of zeros by cosine.
    """
    if by not in ("cosine", "euclidean"):
        raise ConfigError.unknown("nearness", str(by), ("cosine", "euclidean"))
    if table.dim() != 2 or not embeddings.dim() or embeddings.shape[-1] != table.shape[1]:
        raise DataError(f"Embeddings {tuple(embeddings.shape)} meet a table {tuple(table.shape)}.", "[..., d], [V, d].")
    _check_finite("The embeddings", embeddings)
    _check_finite("The table", table)
    ids = sorted(set(range(len(table)) if allowed is None else (int(each) for each in allowed)))
    if not ids or not 0 <= ids[0] <= ids[-1] < len(table):
        raise DataError(
            f"{len(ids)} token ids are allowed, from {min(ids, default='-')} to {max(ids, default='-')}.",
            f"At least one, from 0 to {len(table) - 1}.",
        )
    return _nearest(embeddings, table, torch.tensor(ids, device=table.device), by == "cosine")


def _nearest(embeddings: torch.Tensor, table: torch.Tensor, ids: torch.Tensor, cosine: bool) -> torch.Tensor:
    wide = embeddings.detach().double().reshape(-1, table.shape[1])
    best = torch.full((len(wide),), -math.inf, dtype=torch.float64, device=wide.device)
    found = torch.zeros(len(wide), dtype=torch.int64, device=wide.device)
    for chunk in ids.split(max(1, CELLS // max(len(wide), table.shape[1], 1))):
        rows = table[chunk].detach().double()
        length = rows.square().sum(1)
        scores = wide @ rows.T
        # The embedding's own length changes no order.
        scores = (scores / length.sqrt()).masked_fill(length == 0, -math.inf) if cosine else 2 * scores - length
        score, place = scores.max(1)
        better = score > best
        best, found = torch.where(better, score, best), torch.where(better, chunk[place], found)
    if not bool(torch.isfinite(best).all()) or (cosine and not bool(wide.any(1).all())):
        raise DataError("An embedding or the table is 0, which has no direction.", action="Use by='euclidean'.")
    return found.reshape(embeddings.shape[:-1])


# -- the gradient of one linear layer ----------------------------------------------------------------------------------


def linear_input(weight_gradient: torch.Tensor, bias_gradient: torch.Tensor) -> torch.Tensor:
    """The input of a linear layer, float64 [F], from its gradients alone: dL/dW_j / dL/db_j.

    With one example (one position of it) it is exact in every row j whose bias gradient is not 0. Else row j is the
    mixture sum_i s_ij x_i / sum_i s_ij, with s_ij = dL/dz_ij, of the inputs. Given is the row with the largest
    |dL/db_j|, which suffers least from rounding.
    Source: Phong et al., Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018;
    Geiping et al., arXiv:2003.14053, proposition 3.1.

    Args:
        weight_gradient: [O, F].
        bias_gradient: [O].

    Raises:
        DataError: shapes that do not match, numbers that are not finite, or bias gradients that are all 0.
    """
    if weight_gradient.dim() != 2 or not weight_gradient.numel() or bias_gradient.shape != weight_gradient.shape[:1]:
        raise DataError(
            f"A layer's gradients have shapes {tuple(weight_gradient.shape)} and {tuple(bias_gradient.shape)}.",
            "Expected [O, F] and [O].",
        )
    _check_finite("The gradient of the weights", weight_gradient)
    _check_finite("The gradient of the bias", bias_gradient)
    wide = bias_gradient.detach().double()
    row = int(wide.abs().argmax())
    if not bool(wide[row]):
        raise DataError("All gradients of the bias are 0.", "The input needs one that is not.")
    return weight_gradient.detach()[row].double() / wide[row]


def label_counts(bias_gradient: torch.Tensor, probabilities: torch.Tensor, batch: int) -> torch.Tensor:
    """How often each class is a label in a batch, int64 [C], from the gradient of the last layer's bias.

    Under cross-entropy with mean reduction dL/db_c = mean p_c - n_c / B. B (mean p_c - dL/db_c) is brought to the
    nearest point with no entry below 0 and the sum B, and rounded there by largest remainders: of all counts these are
    the nearest in squares. Exact where the probabilities are; an untrained or a public model's, on other data, are an
    estimate. Source: the derivative of the loss; Wainakh et al., User-Level Label Leakage, PETS 2022,
    arXiv:2105.09369, for the use of estimates.

    Args:
        bias_gradient: [C].
        probabilities: [C], the mean predicted probabilities of the batch, or an estimate.
        batch: B, the number of labels.

    Raises:
        ConfigError: a batch below 1.
        DataError: shapes that differ, numbers that are not finite, or probabilities below 0 or whose sum is not 1.
    """
    if batch < 1:
        raise ConfigError(f"The batch is {batch}.", "Allowed: 1 or more.")
    if bias_gradient.dim() != 1 or not len(bias_gradient) or bias_gradient.shape != probabilities.shape:
        raise DataError(
            f"Gradients {tuple(bias_gradient.shape)} meet probabilities {tuple(probabilities.shape)}.", "[C] and [C]."
        )
    _check_finite("The gradient of the bias", bias_gradient)
    mean = probabilities.detach().double()
    total = float(mean.sum())
    if not bool((mean >= 0).all()) or not abs(total - 1) <= 1e-2:
        raise DataError(f"The probabilities sum to {total:g}.", "They must be 0 or more and sum to 1.")
    wanted = _on_simplex((batch * (mean - bias_gradient.detach().double())).cpu().numpy(), batch)
    counts = numpy.floor(wanted).astype(numpy.int64)
    left = batch - int(counts.sum())
    counts[numpy.argsort(counts - wanted, kind="stable")[:left]] += 1
    return torch.from_numpy(counts)


def _on_simplex(values: numpy.ndarray, total: int) -> numpy.ndarray:
    """The nearest vector with no entry below 0 and this sum: max(values - shift, 0)."""
    falling = numpy.sort(values)[::-1]
    shifts = (numpy.cumsum(falling) - total) / numpy.arange(1, len(values) + 1)
    return numpy.maximum(values - shifts[numpy.flatnonzero(falling > shifts)[-1]], 0.0)


def revealed_labels(weight_gradient: torch.Tensor, rank: int | None = None) -> list[int]:
    """The classes that are labels in a batch, ascending, from the gradient of the last layer's weights alone.

    Under cross-entropy the gradient is a sum of outer products of p_i - onehot(y_i), which is below 0 at y_i only,
    with the inputs of the layer. So its left singular vectors U hold, for every class c of the batch, a direction q
    with U_c q < 0 and U_j q > 0 elsewhere: a linear program decides. The paper filters the classes by a perceptron
    first; here the filter is non-negative least squares, which rejects what provably cannot be separated.

    Assumes linearly independent inputs of the layer, so that the rank is the batch (else labels are missed; rank F,
    which a larger batch has, too, is refused), and clearly more classes than the rank: at rank C - 1 every class can
    be separated, which is refused, and a little below, or with repeated labels, some that are not there pass, too. An
    example that is predicted almost surely may vanish in the rounding.
    Source: Dang et al., Revealing and Protecting Labels in Distributed Training, NeurIPS 2021, arXiv:2111.00556.

    Args:
        weight_gradient: [C, F].
        rank: how many singular vectors count; the batch, where it is known and the gradient is noisy. None counts the
            singular values that stand out of the rounding of the gradient's dtype.

    Raises:
        ConfigError: a rank outside 1 to min(C - 2, F).
        DataError: a wrong shape, numbers that are not finite, a gradient of 0, or a rank that tells nothing: C - 1 or
            more, or F where none was given.
        RunError: a linear program was not solved.
    """
    if weight_gradient.dim() != 2 or not weight_gradient.numel() or not weight_gradient.is_floating_point():
        raise DataError(
            f"The gradient of the weights has shape {tuple(weight_gradient.shape)}, {weight_gradient.dtype}.",
            "Expected floats, [C, F].",
        )
    _check_finite("The gradient of the weights", weight_gradient)
    wide = weight_gradient.detach().double().cpu()
    classes, features = wide.shape
    if rank is not None and not 1 <= rank <= min(classes - 2, features):
        raise ConfigError(f"rank={rank} of {classes} x {features} weights.", "Allowed: 1 to min(classes - 2, inputs).")
    epsilon = torch.finfo(weight_gradient.dtype).eps
    _, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    seen = int((sizes > 4 * epsilon * sizes.square().sum().sqrt()).sum())
    kept = seen if rank is None else min(rank, seen)
    most = min(classes - 2, features if rank is not None else features - 1)
    if not 0 < kept <= most:
        raise DataError(
            f"The gradient of the weights, {classes} classes x {features} inputs, has rank {kept}.",
            f"Labels are revealed at ranks 1 to {most}.",
            action="Give 'rank' where the batch is known to be smaller." if kept else "",
        )
    rows = (wide @ right[:kept].T / sizes[:kept]).numpy()
    lengths = numpy.linalg.norm(rows, axis=1)
    held = numpy.flatnonzero(lengths > 0)
    return held[_isolated(rows[held] / lengths[held, None], max(SLACK, 4 * epsilon))].tolist()


def _isolated(rows: numpy.ndarray, slack: float) -> list[int]:
    """The numbers of the unit rows c for which a q has rows_c q = -1 and rows_j q >= -slack for all others.

    By duality there is none (but for very long q) where c lies in the cone of the others, with small factors. Rows that
    span the cone around one span it around the next, too, so they are tried first.
    """
    spanning: set[int] = set()
    found = []
    for c in range(len(rows)):
        if not _outside(rows, c, sorted(spanning - {c}), slack)[0]:
            continue
        outside, used = _outside(rows, c, [j for j in range(len(rows)) if j != c], slack)
        spanning.update(used)
        if outside and _least_slack(rows, c) <= slack:
            found.append(c)
    return found


def _outside(rows: numpy.ndarray, c: int, others: list[int], slack: float) -> tuple[bool, list[int]]:
    """Whether row c is outside the cone of the others (or that is not settled), and which of them span it there."""
    from scipy.optimize import nnls  # pyright: ignore[reportMissingTypeStubs]

    if not others:
        return True, []
    try:
        cone = numpy.vstack([rows[others].T, numpy.full(len(others), slack)])
        factors, apart = nnls(cone, numpy.append(rows[c], 0.0))
    except RuntimeError:  # it gave up: the linear program decides
        return True, []
    return float(apart) > max(APART, 8 * slack), [j for j, factor in zip(others, factors, strict=True) if factor > 0]


def _least_slack(rows: numpy.ndarray, c: int) -> float:
    """The least s >= 0 for which a q has rows_c q = -1 and rows_j q >= -s for all others."""
    from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs]

    count, width = rows.shape
    solved = linprog(
        numpy.append(numpy.zeros(width), 1.0),
        A_ub=numpy.column_stack([-numpy.delete(rows, c, 0), -numpy.ones(count - 1)]),
        b_ub=numpy.zeros(count - 1),
        A_eq=numpy.append(rows[c], 0.0)[None],
        b_eq=[-1.0],
        bounds=[(None, None)] * width + [(0, None)],
    )
    if not solved.success:
        raise RunError(f"The linear program for a class was not solved: {solved.message}")
    return float(solved.fun)


def _check_finite(what: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{what} holds a number that is not finite.")

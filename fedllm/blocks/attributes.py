"""Attributes - what a server learns of one sensitive column from a client's update, by matching gradients.

The server knows the model it sent, the loss, the labels and all other columns of the victim's records, and how many
there are. It looks for the values of the missing column whose gradient points where the update points. To say that the
update gave something away, such a guess must be better than one made without it: see :func:`label_only` and
:class:`Scores`. A block for measuring leakage before a deployment does; guesses are never printed.

Source: Chen, Lyu, Yu, Chen, Practical Attribute Reconstruction Attack Against Federated Learning, IEEE Transactions on
Big Data 2022; Lyu, Chen, arXiv:2108.06910. Only the abstract was read: the cosine between virtual and epoch-averaged
gradients is theirs, the relaxation, Adam and restarts are the usual construction. Squared distance: Zhu et al., Deep
Leakage from Gradients, arXiv:1906.08935.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, get_args

import torch

from fedllm.core.errors import ConfigError, DataError, UploadRejected
from fedllm.core.tensors import Tensors, finite, same_shapes

Kind = Literal["cosine", "l2"]
"""How far gradients are apart: 1 - cosine, or the squared distance over the squared norm of the observed."""

Tree = Mapping[str, torch.Tensor]
GradientOf = Callable[[torch.Tensor], Tree]
"""Rows of odds p [n, m] -> the gradients that records with these values would give; differentiable in p."""

Loss = Callable[[Tree, torch.Tensor, torch.Tensor], torch.Tensor]
"""Parameters, odds p [n, m] and numbers of rows [b] -> the mean loss over these rows, a scalar."""

TINY = 1e-12
"""Gradients shorter than this have no direction: their cosine is taken over this length, so it is 0 and not NaN."""


@dataclass(frozen=True, eq=False)
class Guess:
    """What a search found; neither values nor odds show in its text.

    Attributes:
        values: int64 [n], the likeliest value of each record.
        distance: of the relaxed values behind it; 0 is a perfect match.
        odds: [n, m], rows sum to 1. They say where the search ended and are no calibrated probabilities: a record on
            which the gradient does not depend keeps its random start.
    """

    values: torch.Tensor = field(repr=False)
    distance: float
    odds: torch.Tensor = field(repr=False)


@torch.inference_mode(False)
def reconstruct(
    gradient_of: GradientOf,
    observed: Tree,
    *,
    records: int,
    values: int,
    kind: Kind = "cosine",
    per_tensor: bool = False,
    steps: int = 500,
    lr: float = 0.1,
    restarts: int = 3,
    rng: torch.Generator,
) -> Guess:
    """The values of the sensitive column whose gradient is nearest to the observed one.

    Adam moves logits [n, m] that start as standard normal numbers; their softmax is what `gradient_of` gets, in the
    widest dtype of `observed` (float32 or wider). The lowest distance of all steps and restarts wins. A restart ends
    early where the distance or its gradient is not finite or the gradient vanishes (dead units, saturated odds).

    An epoch's update is (theta_t - theta_i) / (lr steps), or any positive multiple of it where `kind` is cosine; `l2`
    needs the scale of `gradient_of`. Clients that train with momentum, Adam or weight decay move off the gradient:
    unroll what they do in `gradient_of`. A secure sum over several clients is one client with all their records.

    Args:
        gradient_of: see :data:`GradientOf`; :func:`unrolled` makes one.
        observed: the update as a gradient, same names and shapes as `gradient_of` gives.
        records: n, side information: the number of records behind the update.
        values: m, how many values the column can take.
        kind: see :data:`Kind`.
        per_tensor: sum the distances of the tensors, each relative to its own length; tensors that are all zero in
            `observed` are left out. Otherwise one distance over all of them.
        steps: of Adam, per restart.
        lr: of Adam.
        restarts: starts in all.
        rng: draws the starts.

    Raises:
        ConfigError: no record, fewer than two values, an unknown kind, a bad number, or a `gradient_of` that cannot be
            differentiated.
        UploadRejected: `observed` is empty, not finite, zero everywhere, or not shaped as the gradients.
        DataError: no restart could move: the gradients are zero or not finite wherever it began.
    """
    if records < 1 or values < 2:
        raise ConfigError(
            f"{records} records of a column with {values} values are to be found.",
            "Allowed: 1 or more records, 2 or more values.",
            action="State both as side information.",
        )
    if steps < 1 or restarts < 1 or not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"steps={steps}, restarts={restarts}, lr={lr}.", "Allowed: 1 or more, 1 or more, above 0.")
    measure = _measure(observed, kind, per_tensor)
    device = next(iter(observed.values())).device
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in observed.values()), torch.float32)
    best: tuple[float, torch.Tensor] | None = None
    for _ in range(restarts):
        start = torch.randn(records, values, generator=rng, device=rng.device, dtype=torch.float64)
        ended = _search(gradient_of, measure, start.to(device, dtype), steps, lr)
        if ended is not None and (best is None or ended[0] < best[0]):
            best = ended
    if best is None:
        raise DataError(
            f"None of {restarts} restarts could move: the model's gradients are zero or not finite for these records.",
            "A search needs units that are not dead.",
            action="Check the known columns, or observe another round.",
        )
    odds = torch.softmax(best[1], 1)
    return Guess(odds.argmax(1), best[0], odds)


def _search(
    gradient_of: GradientOf, measure: Callable[[Tree], torch.Tensor], start: torch.Tensor, steps: int, lr: float
) -> tuple[float, torch.Tensor] | None:
    """The lowest distance on the way from `start` and its logits; None where not even the first step was possible."""
    logits = start.requires_grad_()
    adam = torch.optim.Adam([logits], lr=lr)
    best: tuple[float, torch.Tensor] | None = None
    for _ in range(steps):
        with torch.enable_grad():
            far = measure(gradient_of(torch.softmax(logits, 1)))
        slope = torch.autograd.grad(far, logits, allow_unused=True)[0] if far.requires_grad else None
        if slope is None:
            raise ConfigError(
                "The result of 'gradient_of' does not depend on the odds it was given.",
                "It must be differentiable.",
                action="Take gradients with create_graph=True, and detach nothing.",
            )
        if not bool(torch.isfinite(far)) or not bool(torch.isfinite(slope).all()) or not bool(slope.any()):
            break
        if best is None or far.item() < best[0]:
            best = far.item(), logits.detach().clone()
        logits.grad = slope
        adam.step()
    return best


def distance(found: Tree, observed: Tree, *, kind: Kind = "cosine", per_tensor: bool = False) -> torch.Tensor:
    """How far gradients are from the observed ones: a float64 scalar, differentiable in `found`.

    Cosine: 1 - <G, g> / (|G| |g|), 0 to 2, whatever the scale of either. L2: |G - g|^2 / |g|^2. Both are 0 where the
    two are equal. Arguments and errors are those of :func:`reconstruct`.
    """
    return _measure(observed, kind, per_tensor)(found)


def _measure(observed: Tree, kind: Kind, per_tensor: bool) -> Callable[[Tree], torch.Tensor]:
    """:func:`distance` to `observed`, which is checked and flattened once."""
    if kind not in get_args(Kind):
        raise ConfigError.unknown("kind of distance", kind, get_args(Kind))
    whole = next((name for name, tensor in observed.items() if not tensor.is_floating_point()), None)
    bad = finite(observed)
    if whole is not None or bad is not None:
        what = f"holds '{whole}' of {observed[whole].dtype}" if whole else f"has entries in '{bad}' that are not finite"
        raise UploadRejected(f"The observed update {what}.", "Allowed: finite floating-point tensors.")
    bearing = [name for name, tensor in observed.items() if bool(tensor.any())]
    if not bearing:
        raise UploadRejected(
            f"None of the {len(observed)} tensors of the observed update bears a gradient: all are zero.",
            "At least one must not be.",
            action="Observe a round in which the client trained these parameters.",
        )
    groups = [[name] for name in bearing] if per_tensor else [list(observed)]
    targets = [_flat(observed, names).detach() for names in groups]
    lengths = [torch.linalg.vector_norm(target) for target in targets]
    directions = [target / length for target, length in zip(targets, lengths, strict=True)]

    def apart(group: int, found: torch.Tensor) -> torch.Tensor:
        if kind == "l2":
            return (found / lengths[group] - directions[group]).square().sum()
        return 1 - found @ directions[group] / torch.linalg.vector_norm(found).clamp(min=TINY)

    def measured(found: Tree) -> torch.Tensor:
        same_shapes(observed, found, "The observed update")
        return torch.stack([apart(group, _flat(found, names)) for group, names in enumerate(groups)]).sum()

    return measured


def _flat(tree: Tree, names: list[str]) -> torch.Tensor:
    return torch.cat([tree[name].double().reshape(-1) for name in names])


def unrolled(loss: Loss, params: Tree, batches: Sequence[torch.Tensor], *, lr: float) -> GradientOf:
    """A :data:`GradientOf` that follows a client's plain SGD: the mean of its gradients, (theta_0 - theta_T) / (lr T).

    One batch with all rows is the plain gradient of one full-batch step. A server rarely knows the client's batches:
    where the true ones are given, this is an upper bound of what it can find. Memory grows with the number of steps.
    Kernels of the model must allow a second derivative (eager attention, not a fused one).

    Args:
        loss: see :data:`Loss`; the known columns and labels are the caller's.
        params: theta_0, what the client started from; all of them are trained, and those a batch does not use stay.
        batches: numbers of rows [b], one tensor per step in order, over all local epochs.
        lr: of the client; it does not matter where there is one batch.

    Raises:
        ConfigError: no parameter, no batch or a learning rate that is not above 0; when called, a loss that is no
            scalar.
        DataError: an empty batch, or numbers that are not integers; when called, a row that does not exist.
    """
    if not params or not batches or not (math.isfinite(lr) and lr > 0):
        raise ConfigError(
            f"{len(params)} parameters are to follow {len(batches)} batches with lr={lr}.",
            "Allowed: 1 or more of each, a rate above 0.",
        )
    for number, batch in enumerate(batches):
        if batch.dim() != 1 or not len(batch) or batch.dtype != torch.int64 or int(batch.min()) < 0:
            raise DataError(
                f"Batch {number} is a tensor of {batch.dtype} and shape {tuple(batch.shape)}.",
                "Allowed: int64 [b], numbers of rows from 0, one or more.",
            )
    begin = {name: tensor.detach() for name, tensor in params.items()}
    most = max(int(batch.max()) for batch in batches)

    def gradient_of(p: torch.Tensor) -> Tensors:
        if most >= len(p):
            raise DataError(f"A batch names row {most} of {len(p)} records.", f"Rows: 0 to {len(p) - 1}.")
        here = {name: tensor.clone().requires_grad_() for name, tensor in begin.items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in begin.items()}
        with torch.enable_grad():
            for batch in batches:
                value = loss(here, p, batch)
                if value.dim() or not value.requires_grad:
                    raise ConfigError(
                        f"The loss has the shape {tuple(value.shape)} and requires_grad={value.requires_grad}.",
                        "Allowed: a scalar that depends on the parameters.",
                    )
                steps = torch.autograd.grad(value, list(here.values()), create_graph=True, materialize_grads=True)
                total = {name: total[name] + step for name, step in zip(here, steps, strict=True)}
                here = {name: here[name] - lr * step for name, step in zip(here, steps, strict=True)}
        return {name: tensor / len(batches) for name, tensor in total.items()}

    return gradient_of


def label_only(
    known: torch.Tensor,
    labels: torch.Tensor,
    sensitive: torch.Tensor,
    known_victims: torch.Tensor,
    labels_victims: torch.Tensor,
) -> torch.Tensor:
    """The sensitive column guessed without the update: int64 [n], from the known columns and the label.

    A logistic regression (scikit-learn, L2 penalty 1, standardised columns) learnt on auxiliary records; deterministic.
    Labels of an integer type are classes and one-hot encoded over those of the auxiliary records (another class is all
    zeros); others are one number. By definition, where the auxiliary records hold one class only, every victim gets
    that class: it is the majority, and nothing can be learnt.

    Args:
        known: [N, f], auxiliary records; f may be 0.
        labels: [N].
        sensitive: int64 [N], class numbers from 0.
        known_victims: [n, f].
        labels_victims: [n], a type as that of `labels`.

    Raises:
        DataError: no records, shapes or types that do not match, or entries that are not finite.
    """
    _check_records(known, labels, "auxiliary")
    _check_records(known_victims, labels_victims, "victims'")
    classes = not labels.is_floating_point()
    if known.shape[1] != known_victims.shape[1] or classes == labels_victims.is_floating_point():
        raise DataError(
            f"Auxiliary records have {known.shape[1]} known columns and labels of {labels.dtype}, victims' "
            f"{known_victims.shape[1]} and {labels_victims.dtype}.",
            "Both must be alike.",
        )
    _check_values(sensitive, len(known), "the auxiliary records")
    held = sensitive.unique()
    if len(held) == 1:
        return held.long().cpu().expand(len(known_victims)).clone()

    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingTypeStubs]
    from sklearn.pipeline import make_pipeline  # pyright: ignore[reportMissingTypeStubs]
    from sklearn.preprocessing import StandardScaler  # pyright: ignore[reportMissingTypeStubs]
    from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

    kinds = labels.unique().cpu() if classes else None
    with threadpool_limits(1):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(_columns(known, labels, kinds), sensitive.cpu().numpy())
        return torch.as_tensor(model.predict(_columns(known_victims, labels_victims, kinds)), dtype=torch.int64)


def _columns(known: torch.Tensor, labels: torch.Tensor, kinds: torch.Tensor | None):
    """Known columns beside the label, a float64 array [n, f + 1] or [n, f + classes]."""
    beside = labels.cpu()[:, None]
    return torch.cat([known.cpu().double(), (beside if kinds is None else beside == kinds).double()], 1).numpy()


def _check_records(known: torch.Tensor, labels: torch.Tensor, whose: str) -> None:
    if known.dim() != 2 or not len(known) or labels.shape != known.shape[:1]:
        raise DataError(
            f"The {whose} known columns have shape {tuple(known.shape)}, their labels {tuple(labels.shape)}.",
            "Expected [n, f] and [n], with one record or more.",
        )
    if not bool(torch.isfinite(known).all()) or not bool(torch.isfinite(labels).all()):
        raise DataError(f"The {whose} records hold numbers that are not finite.", action="Fill or drop them.")


def _check_values(column: torch.Tensor, n: int, what: str) -> None:
    if column.shape != (n,) or column.is_floating_point() or column.is_complex() or bool((column < 0).any()):
        raise DataError(
            f"The sensitive column of {what} is a tensor of {column.dtype} and shape {tuple(column.shape)}.",
            f"Expected integers [{n}], class numbers from 0.",
        )


@dataclass(frozen=True)
class Scores:
    """Shares of records whose sensitive value was guessed right, 0 to 1; only these are fit for a report.

    Attributes:
        attack: from the update.
        majority: of the best constant guess, the commonest true value. An attacker would have to know it, so on a few
            records it is high, and the advantage is understated rather than overstated.
        label_only: without the update, see :func:`label_only`.
    """

    attack: float
    majority: float
    label_only: float

    @property
    def advantage(self) -> float:
        """What the update gave away: attack - max(majority, label_only), -1 to 1; nothing where it is not above 0."""
        return self.attack - max(self.majority, self.label_only)

    @classmethod
    def of(cls, guessed: torch.Tensor, truth: torch.Tensor, without: torch.Tensor) -> Scores:
        """The scores of a guess and of that of :func:`label_only`, both against the true values; integers [n].

        Raises:
            DataError: no records, or columns of other shapes or types.
        """
        if not truth.numel():
            raise DataError("There are no records to score.", "Allowed: one or more.")
        for column, what in ((truth, "the truth"), (guessed, "the guess"), (without, "the guess from labels")):
            _check_values(column, len(truth), what)
        right, found, other = truth.cpu(), guessed.cpu(), without.cpu()
        most = int(right.unique(return_counts=True)[1].max())
        return cls(float((found == right).double().mean()), most / len(right), float((other == right).double().mean()))

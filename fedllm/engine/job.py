"""Job - one client's request with what the engine knows about it, and which of them may share a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.errors import DataError, FedLLMError
from fedllm.core.guard import PrivateFit
from fedllm.core.tensors import Tensors
from fedllm.core.work import (
    Embed,
    Example,
    Expose,
    Exposure,
    Fit,
    FitReport,
    Generate,
    Gradient,
    Hidden,
    Learner,
    Outputs,
    Probe,
    Request,
    Score,
    ScoreReport,
)
from fedllm.engine.passes import USUAL, Passes


@dataclass(frozen=True)
class Job:
    """One client's request with what the engine knows about it.

    Attributes:
        request: the request.
        client: the client's id.
        seed: the run's seed.
        round: the current round, from 1; with `rounds` it places the learning-rate schedule.
        rounds: rounds of the run.
        examples: reads the prepared examples of a split.
        frozen: first values of the learner's trainable tensors that the request does not name.
        passes: how the rows of a step are cut into passes.
        noised: how single examples are kept private in a fit; None where they are not.
    """

    request: Request
    client: str
    seed: int
    round: int
    rounds: int
    examples: Callable[[str], list[Example]]
    frozen: Tensors
    passes: Passes = USUAL
    noised: PrivateFit | None = None


Result = (
    FitReport
    | ScoreReport
    | tuple[Tensors, tuple[float, float]]
    | list[str]
    | list[torch.Tensor]
    | Exposure
    | torch.Tensor
    | FedLLMError
)


def alike(job: Job) -> tuple[Any, ...]:
    """Jobs with equal keys may share a pass: the same work, on tensors of the same names and dtypes."""
    request = job.request
    if isinstance(request, Fit):
        rules = tuple(_identity(rule) for rule in (request.penalty, request.correction))
        given = tuple((n, _form(t)) for n, t in request.given.items())
        terms = None if request.terms is None else tuple((weight, _form(tree)) for weight, tree in request.terms)
        moments = request.moments
        steps = None if moments is None else (float(moments.get("step", torch.zeros(()))), *sorted(moments))
        how = request.train, request.split, request.loss, rules, steps
        return Fit, how, _form(request.start), _form(request.fixed), terms, given, job.noised is None
    if isinstance(request, Probe):
        train, count = request.train, len(request.seeds)
        size = train.batch_size, train.accumulate
        how = *size, count, request.eps, request.lr is None, request.limit, request.split, request.measure
        return Probe, how, _form(request.start), _form(request.fixed)
    if isinstance(request, Gradient):
        return Gradient, request.split, _form(request.params), _form(request.fixed)
    if isinstance(request, Score):
        return Score, request.split, _form(request.params), _form(request.fixed)
    if isinstance(request, Outputs | Hidden | Expose):
        return type(request), _form(request.params), _form(request.fixed)
    if isinstance(request, Generate):
        return Generate, request.max_tokens, request.temperature, _form(request.params)
    return Embed, _form(request.params)


def bound_names(request: Request) -> frozenset[str] | None:
    """The trainable tensors that a request names; None where it wants the base model."""
    tree = request.start if isinstance(request, Fit | Probe) else request.params
    fixed = getattr(request, "fixed", None)
    return None if tree is None and fixed is None else frozenset((*(tree or ()), *(fixed or ())))


def _form(tree: Tensors | None) -> tuple[Any, ...] | None:
    """Names and dtypes."""
    return None if tree is None else tuple((name, tensor.dtype) for name, tensor in tree.items())


def _identity(function: Callable[..., Any] | None) -> tuple[int, int]:
    """Two bound methods of one object are the same function."""
    return id(getattr(function, "__func__", function)), id(getattr(function, "__self__", None))


def examples_of(learner: Learner, job: Job, request: Fit | Gradient | Score) -> list[Example]:
    """The examples of a request: of its rows, or of its split."""
    if request.rows is None:
        return job.examples(request.split)
    examples = learner.prepare(request.rows)
    if not examples and not isinstance(request, Score):
        raise DataError(f"Client '{job.client}' was given no usable rows.", "At least one is needed.")
    return examples


def no_data(client: str, split: str) -> DataError:
    """The error of a client without examples."""
    return DataError(
        f"Client '{client}' has no usable rows in its {split} split.", action="Look at 'fedllm data stats'."
    )

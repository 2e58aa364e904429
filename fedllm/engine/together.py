"""Together - one pass for many clients: fit, gradient, score, generate and embed over stacked parameters.

Every function here takes the jobs of K clients and returns K results. K = 1 is the same code. Clients with fewer
steps leave the stack when they are done; tensors of smaller shapes (LoRA ranks) are padded with zeros, which train
to exact zeros, and cut back at the end. A client whose loss is not finite gets an error; the others do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import torch
from torch.nn import functional

from fedllm.core.errors import ConfigError, DataError, FedLLMError, RoundFailed
from fedllm.core.guard import PrivateFit
from fedllm.core.seeds import derive, numpy_stream
from fedllm.core.tensors import Tensors, finite, subtract
from fedllm.core.train import Train
from fedllm.core.work import (
    Embed,
    Example,
    Expose,
    Exposing,
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
from fedllm.engine.passes import USUAL, Part, Passes

SCORE_ROWS = 32
"""Rows of a forward pass that only measures, over all clients."""
GRADIENT_ROWS = 8
"""Rows of one client in a pass of a full gradient: the same at every width, so that its sum has one order."""


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


def run_together(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    """Answer alike jobs in one pass; see :func:`alike`."""
    kind = type(jobs[0].request)
    return list(_RUN[kind](learner, jobs))


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


# ---------------------------------------------------------------------------------------------------------------------
# fit


def steps_of(count: int, train: Train, seed: int, client: str, round: int) -> Iterator[list[list[int]]]:
    """The example numbers of each optimiser step, batch by batch, for ever. A function of (seed, client, round) alone.

    Every pass over the data is a fresh permutation cut into batches; up to `train.accumulate` of them make one step,
    and neither a batch nor a step reaches into the next pass.
    """
    stream = numpy_stream(seed, "batches", client, round)
    while True:
        order = stream.permutation(count).tolist()
        cut = [order[start : start + train.batch_size] for start in range(0, count, train.batch_size)]
        for start in range(0, len(cut), train.accumulate):
            yield cut[start : start + train.accumulate]


def _fit(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    return _Fit(learner, jobs).run()


class _Fit:
    """Local training of K clients as one sequence of optimiser steps over stacked tensors.

    `active` lists the clients (by number) that still train; row i of every stacked tensor belongs to active[i].
    """

    def __init__(self, learner: Learner, jobs: Sequence[Job]) -> None:
        self.learner, self.jobs = learner, jobs
        self.requests = [job.request for job in jobs if isinstance(job.request, Fit)]
        self.train, first = self.requests[0].train, self.requests[0]
        self.examples = [_soft(r, _held(learner, job, r)) for job, r in zip(jobs, self.requests, strict=True)]
        self.steps = [self.train.step_count(len(held)) for held in self.examples]
        self.streams = [
            _stream(len(held), self.train, job, r.begun)
            for held, job, r in zip(self.examples, jobs, self.requests, strict=True)
        ]
        self.stack = _stack([r.start for r in self.requests], learner)
        start = {name: tensor.clone() for name, tensor in self.stack.items()}
        self.given = {"start": start, **{n: _stack([r.given[n] for r in self.requests], learner) for n in first.given}}
        fixed = _stack([r.fixed or {} for r in self.requests], learner)
        self.fixed = {**_spread(jobs[0].frozen, len(jobs), learner), **fixed}
        trees = [r.terms or ((1.0, {}),) for r in self.requests]
        self.terms = [(terms[0][0], _stack([tree for _, tree in terms], learner)) for terms in zip(*trees, strict=True)]
        self.active = list(range(len(jobs)))
        self.optimizer: torch.optim.Optimizer | None = None
        self.finished: dict[int, Tensors] = {}
        self.moments: dict[int, Tensors] = {}
        self.spent = [_Spent() for _ in jobs]

    def run(self) -> list[Result]:
        for step in range(max(self.steps)):
            self._keep([k for k in self.active if self.steps[k] > step])
            self._step(step)
        self._keep([])
        return [self._report(k) for k in range(len(self.jobs))]

    def _keep(self, left: list[int]) -> None:
        """Go on with the clients `left`; the others' tensors are final."""
        if left == self.active and self.optimizer is not None:
            return
        for row, k in enumerate(self.active):
            if k not in left:
                self.finished[k] = {n: tensor.detach()[row].cpu() for n, tensor in self.stack.items()}
                if self.requests[k].moments is not None:
                    self.moments[k] = _kept(self.optimizer, self.stack, row)
        rows = [self.active.index(k) for k in left]
        whole = left == self.active
        smaller = {
            name: (tensor.detach() if whole else tensor.detach()[rows]).requires_grad_()
            for name, tensor in self.stack.items()
        }
        before = self.optimizer
        self.optimizer = _optimizer(self.train, smaller, before, self.stack, rows) if left else None
        if before is None and self.optimizer is not None:
            _go_on(self.optimizer, smaller, [self.requests[k].moments or {} for k in left], self.learner)
        self.stack, self.active = smaller, left

    def _step(self, step: int) -> None:
        """One optimiser step of every active client."""
        if self.jobs[0].noised is not None:
            window, grads, sums = self._noised(step)
        else:
            window = self._window()
            grads, sums = self._gradients(window, step)
            grads = _clipped(grads, self.train.clip_norm)
        first = self.jobs[self.active[0]]
        rate = self.train.rate(first.round, first.rounds, step, self.steps[self.active[0]])
        for name, tensor in self.stack.items():
            tensor.grad = grads[name]
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        for row, (k, loss) in enumerate(zip(self.active, sums.tolist(), strict=True)):
            self.spent[k].add(rate, loss, [e for groups in window for e in groups[row]])

    def _window(self) -> list[list[list[Example]]]:
        """The examples of a step: batch by batch, client by client."""
        taken = [next(self.streams[k]) for k in self.active]
        return [
            [[self.examples[k][i] for i in batch] for k, batch in zip(self.active, turn, strict=True)]
            for turn in zip_longest(*taken, fillvalue=())
        ]

    def _gradients(self, window: list[list[list[Example]]], step: int) -> tuple[Tensors, torch.Tensor]:
        """Gradients of the mean loss over the labels of the whole window, and the loss sums [K]."""
        request, leaves, width = self.requests[0], list(self.stack.values()), len(self.active)
        targets = [sum(e.targets for groups in window for e in groups[row]) for row in range(width)]
        scale = torch.tensor([1.0 / max(n, 1) for n in targets], device=self.learner.device)
        jobs = [self.jobs[k] for k in self.active]
        given, fixed, terms = self.given, self.fixed, self.terms
        if len(self.active) < len(self.jobs):
            given = {n: self._rows(tree) for n, tree in given.items()}
            fixed, terms = self._rows(fixed), [(weight, self._rows(tree)) for weight, tree in terms]
        total, grads = torch.zeros(width, device=self.learner.device), [torch.zeros_like(leaf) for leaf in leaves]
        for turn, groups in enumerate(window):
            seeds = [derive(job.seed, "dropout", job.client, job.round, step, turn) for job in jobs]
            for parts in self.jobs[0].passes.plan([[e.tokens for e in group] for group in groups]):
                parts = _merged(parts)
                chosen = [[groups[part.client][row] for row in part.rows] for part in parts]
                owners = [part.client for part in parts]
                own = {n: t.requires_grad_() for n, t in _taken(self.stack, owners).items()}
                drawn = [seeds[k] for k in owners], [part.rows for part in parts]
                for weight, tree in terms:
                    bound = {**_taken(fixed, owners), **own, **_taken(tree, owners)}
                    with torch.enable_grad(), self.learner.using(bound, *drawn):
                        sums = _losses(self.learner, request.loss, chosen)
                        sums = sums if request.terms is None else sums * weight
                        objective = (sums * scale[owners]).sum()
                        found = torch.autograd.grad(objective, list(own.values()), allow_unused=True)
                    for held, grad in zip(grads, found, strict=True):
                        if grad is not None:  # pyright: ignore[reportUnnecessaryComparison]  (an unused leaf)
                            _add_rows(held, owners, grad)
                    _add_rows(total, owners, sums.detach())
        return self._ruled(dict(zip(self.stack, grads, strict=True)), given), total

    def _ruled(self, grads: Tensors, given: dict[str, Tensors]) -> Tensors:
        """Gradients with what the request adds to them: a penalty on parameters, a correction."""
        request = self.requests[0]
        if request.penalty is not None:
            with torch.enable_grad():
                extra = _each(request.penalty, self.stack, given).sum()
                found = torch.autograd.grad(extra, list(self.stack.values()), allow_unused=True)
            for held, grad in zip(grads.values(), found, strict=True):
                if grad is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    held.add_(grad)
        if request.correction is not None:
            with torch.no_grad():
                detached = {name: tensor.detach() for name, tensor in self.stack.items()}
                return _each(request.correction, grads, {"params": detached, **given})
        return grads

    def _noised(self, step: int) -> tuple[list[list[list[Example]]], Tensors, torch.Tensor]:
        """DP-SGD: the examples of a step, (sum of clipped gradients of single examples + noise) / expected, losses.

        Every example is a client of the pass: it has parameters of its own, and so a gradient of its own. Its loss is
        the mean over its labels. A step without examples is noise alone.
        """
        rules = [rule for k in self.active if (rule := self.jobs[k].noised) is not None]
        drawn = [rule.draw(len(self.examples[k]), step) for rule, k in zip(rules, self.active, strict=True)]
        flat = [(row, place) for row, places in enumerate(drawn) for place in places]
        held = [self.examples[self.active[row]][place] for row, place in flat]
        jobs, device = [self.jobs[k] for k in self.active], self.learner.device
        seeds = [derive(job.seed, "dropout", job.client, job.round, step, 0) for job in jobs]
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in self.stack.items()}
        fixed = self.fixed if len(self.active) == len(self.jobs) else self._rows(self.fixed)
        total = torch.zeros(len(self.active), device=device)
        for parts in self.jobs[0].passes.plan([[example.tokens] for example in held]) if held else ():
            for some in _pieces([part.client for part in parts], self.learner.width_limit):
                owners, chosen = [flat[i][0] for i in some], [[held[i]] for i in some]
                own = {n: t.requires_grad_() for n, t in _taken(self.stack, owners).items()}
                seen = [seeds[row] for row in owners], [(flat[i][1],) for i in some]
                with torch.enable_grad(), self.learner.using({**_taken(fixed, owners), **own}, *seen):
                    losses = _losses(self.learner, self.requests[0].loss, chosen)
                    scale = torch.tensor([1.0 / max(held[i].targets, 1) for i in some], device=device)
                    found = torch.autograd.grad((losses * scale).sum(), list(own.values()), allow_unused=True)
                each = dict(zip(own, found, strict=True))
                stacked = {n: torch.zeros_like(own[n]) if g is None else g for n, g in each.items()}  # pyright: ignore[reportUnnecessaryComparison]
                for row in dict.fromkeys(owners):
                    rows = [i for i, owner in enumerate(owners) if owner == row]
                    for name, part in rules[row].summed({n: g[rows] for n, g in stacked.items()}).items():
                        sums[name][row].add_(part)
                _add_rows(total, owners, losses.detach())
        grads = {name: torch.empty_like(leaf) for name, leaf in self.stack.items()}
        for row, rule in enumerate(rules):
            noise = rule.noise(self.requests[self.active[row]].start, step)  # of its own shapes: padding stays zero
            for name, grad in grads.items():
                own = tuple(slice(0, size) for size in noise[name].shape)
                sums[name][row][own].add_(noise[name].to(device))
                grad[row] = sums[name][row] / rule.expected
        given = self.given if len(self.active) == len(self.jobs) else {n: self._rows(t) for n, t in self.given.items()}
        examples = [[self.examples[k][place] for place in places] for k, places in zip(self.active, drawn, strict=True)]
        return [examples], self._ruled(grads, given), total

    def _rows(self, tree: Tensors) -> Tensors:
        """The rows of the clients that still train."""
        return {name: tensor[self.active] for name, tensor in tree.items()}

    def _report(self, k: int) -> FitReport | FedLLMError:
        job, start, spent = self.jobs[k], self.requests[k].start, self.spent[k]
        params = {n: t[tuple(slice(0, size) for size in start[n].shape)] for n, t in self.finished[k].items()}
        if job.noised is not None:
            spent = spent.public(job.noised.expected)
        if not math.isfinite(spent.loss) or finite(params) is not None:
            return RoundFailed(
                f"Training at client '{job.client}' gave a loss that is not finite in round {job.round}.",
                action="Lower train.lr, set train.clip_norm, or look at that client's data.",
            )
        loss = (spent.loss, float(spent.targets))
        delta = subtract(params, start)
        counts = self.steps[k], spent.rates, loss, spent.examples, spent.tokens
        return FitReport(params, delta, *counts, self.moments.get(k))


@dataclass
class _Spent:
    """What one client's training took."""

    rates: float = 0.0
    loss: float = 0.0
    targets: int = 0
    examples: int = 0
    tokens: int = 0

    steps: int = 0

    def public(self, expected: float) -> _Spent:
        """As it may be told where single examples are private: no loss, and for all counts the expected examples."""
        count = max(1, round(expected * self.steps))
        return _Spent(self.rates, 0.0, 0, count, count, self.steps)

    def add(self, rate: float, loss: float, seen: Sequence[Example]) -> None:
        self.rates += rate
        self.steps += 1
        self.loss += loss
        self.targets += sum(e.targets for e in seen)
        self.examples += len(seen)
        self.tokens += sum(e.tokens for e in seen)


def _merged(parts: Sequence[Part]) -> Sequence[Part]:
    """Parts of one client alone are one part: it shares the pass with nobody."""
    if len({part.client for part in parts}) > 1:
        return parts
    return [Part(parts[0].client, tuple(sorted(row for part in parts for row in part.rows)))]


def _pieces(places: list[int], limit: int | None) -> list[list[int]]:
    """`places` in runs of at most `limit`."""
    return [places] if limit is None else [places[at : at + limit] for at in range(0, len(places), limit)]


def _taken(tree: Tensors, owners: Sequence[int]) -> Tensors:
    """The rows `owners` of stacked tensors, detached; no copy where those are all rows, or all are the same."""
    found = {}
    for name, tensor in tree.items():
        if list(owners) == list(range(len(tensor))):
            found[name] = tensor.detach()
        elif tensor.stride(0) == 0:
            found[name] = tensor.detach()[:1].expand(len(owners), *tensor.shape[1:])
        else:
            found[name] = tensor.detach()[list(owners)]
    return found


def _add_rows(total: torch.Tensor, owners: Sequence[int], rows: torch.Tensor) -> None:
    """total[owners[i]] += rows[i], in this order: the same bits on every device."""
    if list(owners) == list(range(len(total))):
        total.add_(rows)
        return
    for owner, row in zip(owners, rows, strict=True):
        total[owner].add_(row)


def _held(learner: Learner, job: Job, request: Fit | Gradient | Score) -> list[Example]:
    """The examples of a request: of its rows, or of its split."""
    if request.rows is None:
        return job.examples(request.split)
    examples = learner.prepare(request.rows)
    if not examples and not isinstance(request, Score):
        raise DataError(f"Client '{job.client}' was given no usable rows.", "At least one is needed.")
    return examples


def _soft(request: Fit, examples: list[Example]) -> list[Example]:
    """The examples with the request's targets beside them."""
    if request.loss == "task":
        return examples
    targets = request.targets or ()
    if len(targets) != len(examples):
        raise ConfigError(
            f"{len(targets)} targets were given for {len(examples)} examples.",
            f"The loss {request.loss} needs one tensor of logits per row, and rows that are all usable.",
        )
    return [replace(example, soft=target) for example, target in zip(examples, targets, strict=True)]


def _losses(learner: Learner, loss: str, groups: Sequence[Sequence[Example]]) -> torch.Tensor:
    """The sum of the losses of each client, [K]: the task's, or the distance of logits to soft targets.

    A distance is a mean over classes (mae, mse) or a divergence of distributions (kl), summed over labels.
    """
    if loss == "task":
        return learner.losses(groups)
    logits, sums = iter(learner.outputs(groups)), []
    for group in groups:
        found = [_distance(loss, next(logits), e.soft) for e in group if e.soft is not None]
        sums.append(torch.stack(found).sum() if found else torch.zeros((), device=learner.device))
    return torch.stack(sums)


def _distance(loss: str, logits: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    soft = soft.to(logits.device, torch.float32)
    if loss == "kl":
        log_p, log_q = functional.log_softmax(soft, -1), functional.log_softmax(logits.float(), -1)
        return (log_p.exp() * (log_p - log_q)).sum()
    gap = logits.float() - soft
    return (gap.abs() if loss == "mae" else gap.square()).mean(-1).sum()


def _stream(count: int, train: Train, job: Job, begun: int | None) -> Iterator[list[list[int]]]:
    """The batches of a fit: a fresh order every round, or the endless stream of round 0 after `begun` steps."""
    if begun is None:
        return steps_of(count, train, job.seed, job.client, job.round)
    return islice(steps_of(count, train, job.seed, job.client, 0), begun, None)


def _kept(optimizer: torch.optim.Optimizer | None, stack: Tensors, row: int) -> Tensors:
    """One client's optimiser memory: `KEY.NAME`, and the scalar `step` that all its tensors share."""
    found: Tensors = {}
    for name, leaf in stack.items():
        for key, value in ({} if optimizer is None else optimizer.state.get(leaf, {})).items():
            if isinstance(value, torch.Tensor):
                found["step" if key == "step" else f"{key}.{name}"] = (
                    (value[row] if value.dim() else value).cpu().clone()
                )
    return found


def _go_on(optimizer: torch.optim.Optimizer, stack: Tensors, moments: Sequence[Tensors], learner: Learner) -> None:
    """Give a new optimiser the memory of earlier rounds; clients of one pass have taken equally many steps."""
    keys = sorted({name.split(".", 1)[0] for name in moments[0]})
    for name, leaf in stack.items():
        for key in keys:
            if key == "step":
                optimizer.state[leaf][key] = moments[0][key].clone()
            else:
                found = _stack([{name: held[f"{key}.{name}"]} for held in moments], learner)
                optimizer.state[leaf][key] = found[name]


def _each(rule: Callable[..., Any], first: Tensors, given: dict[str, Tensors]) -> Any:
    """Apply a rule that is written for one client to every client of the stack."""
    return torch.func.vmap(lambda tree, others: rule(tree, **others))(first, given)


def _clipped(grads: Tensors, limit: float | None) -> Tensors:
    """Each client's gradient scaled to at most the Euclidean norm `limit`, as torch.nn.utils.clip_grad_norm_ does.

    New tensors: a correction may hand back one that it was given.
    """
    if limit is None:
        return grads
    squares = torch.zeros(len(next(iter(grads.values()))), device=next(iter(grads.values())).device)
    for grad in grads.values():  # one after the other: the same order of additions at every width
        squares = squares + grad.reshape(len(grad), -1).square().sum(1)
    factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return {name: grad * factor.view(-1, *([1] * (grad.dim() - 1))) for name, grad in grads.items()}


def _optimizer(
    train: Train, stack: Tensors, before: torch.optim.Optimizer | None, old: Tensors, rows: list[int]
) -> torch.optim.Optimizer:
    """The optimiser over stacked tensors, going on with `rows` of an earlier one's memory over `old`.

    It works element by element, so that clients do not meet in it.
    """
    leaves = list(stack.values())
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(leaves, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            leaves, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
    if before is not None:
        for name, leaf in stack.items():
            for key, value in before.state.get(old[name], {}).items():
                by_client = isinstance(value, torch.Tensor) and value.dim() > 0
                optimizer.state[leaf][key] = value[rows] if by_client else value
    return optimizer


def _stack(trees: Sequence[Tensors], learner: Learner) -> Tensors:
    """Stack equally named trees on a client axis, padding with zeros to the largest shape; float32 on the device."""
    result, device = dict[str, torch.Tensor](), learner.device
    for name, first in trees[0].items():
        rows = [tree[name] for tree in trees]
        dtype = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
        if all(row.shape == first.shape for row in rows):
            result[name] = torch.stack([row.to(device, dtype) for row in rows])
            continue
        shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
        result[name] = torch.zeros([len(rows), *shape], dtype=dtype, device=device)
        for k, row in enumerate(rows):
            result[name][(k, *(slice(0, n) for n in row.shape))] = row.to(device)
    return result


def _spread(tree: Tensors, width: int, learner: Learner) -> Tensors:
    return {name: t.to(learner.device).expand(width, *t.shape) for name, t in tree.items()}


# ---------------------------------------------------------------------------------------------------------------------
# gradient, score, generate, embed


def _rounds(examples: Sequence[Sequence[Example]], rows: int) -> Iterator[list[list[Example]]]:
    """Cut each client's examples into groups of `rows`, longest first, until all are used; some groups are empty."""
    ordered = [sorted(held, key=lambda e: -e.tokens) for held in examples]
    for start in range(0, max((len(held) for held in ordered), default=0), rows):
        yield [held[start : start + rows] for held in ordered]


def _gradient(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Gradient)]
    examples = [_held(learner, job, r) for job, r in zip(jobs, requests, strict=True)]
    fixed = {**_spread(jobs[0].frozen, len(jobs), learner), **_stack([r.fixed or {} for r in requests], learner)}
    stack = {n: t.requires_grad_() for n, t in _stack([r.params for r in requests], learner).items()}
    targets = [sum(e.targets for e in held) for held in examples]
    scale = torch.tensor([1.0 / max(n, 1) for n in targets], device=learner.device)
    total, sums = {n: torch.zeros_like(t) for n, t in stack.items()}, torch.zeros(len(jobs), dtype=torch.float64)
    with torch.enable_grad(), learner.using({**fixed, **stack}):
        for groups in _rounds(examples, GRADIENT_ROWS):
            losses = learner.losses(groups)
            found = torch.autograd.grad((losses * scale).sum(), list(stack.values()), allow_unused=True)
            for name, gradient in zip(stack, found, strict=True):
                if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]  (an unused leaf)
                    total[name] += gradient
            sums += losses.detach().double().cpu()
    return [
        (
            {n: g[k][tuple(slice(0, s) for s in r.params[n].shape)].cpu() for n, g in total.items()},
            (float(sums[k]), float(targets[k])),
        )
        for k, r in enumerate(requests)
    ]


def _score(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Score)]
    examples = [_held(learner, job, r) for job, r in zip(jobs, requests, strict=True)]
    params, owners = _shared([_whole(r) for r in requests], learner, jobs[0].frozen)
    counts: list[dict[str, float]] = [{} for _ in jobs]
    with torch.no_grad(), learner.using(params):
        if owners == 1:  # one model for all: examples need no grouping by client
            flat = [(k, e) for k, held in enumerate(examples) for e in held]
            flat.sort(key=lambda pair: -pair[1].tokens)
            for start in range(0, len(flat), SCORE_ROWS):
                part = flat[start : start + SCORE_ROWS]
                for (k, _), found in zip(part, learner.counts_by_row([[e for _, e in part]]), strict=True):
                    _accumulate(counts[k], found)
        else:
            for groups in _rounds(examples, max(1, SCORE_ROWS // len(jobs))):
                rows = iter(learner.counts_by_row(groups))
                for k, group in enumerate(groups):
                    for _ in group:
                        _accumulate(counts[k], next(rows))
    return [ScoreReport(found, learner.values(found)) for found in counts]


def _whole(request: Score | Outputs | Hidden) -> Tensors | None:
    """Everything a measuring request binds."""
    if request.params is None and request.fixed is None:
        return None
    return {**(request.fixed or {}), **(request.params or {})}


def _outputs(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Outputs | Hidden)]
    examples = [learner.prepare(r.rows) for r in requests]
    for job, r, held in zip(jobs, requests, examples, strict=True):
        if len(held) != len(r.rows) or not held:
            raise DataError(
                f"{len(held)} of the {len(r.rows)} rows given at client '{job.client}' are usable.",
                "Outputs and hidden states belong to rows one by one: all must be.",
            )
    results: list[Result] = []
    with torch.no_grad():
        for job, r, held in zip(jobs, requests, examples, strict=True):
            params, _ = _shared([_whole(r)], learner, job.frozen)
            with learner.using(params):
                if isinstance(r, Hidden):
                    results.append([state.cpu() for state in learner.hidden([held])])
                    continue
                found: list[torch.Tensor] = []
                for start in range(0, len(held), SCORE_ROWS):
                    found += [row.cpu() for row in learner.outputs([held[start : start + SCORE_ROWS]])]
                results.append(found)
    return results


def _exposed(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    if not isinstance(learner, Exposing):
        raise ConfigError("This model does not tell how its last layer depends on texts.", "Transformers do.")
    results: list[Result] = []
    for job in jobs:
        if isinstance(request := job.request, Expose):
            params, _ = _shared([{**(request.fixed or {}), **request.params}], learner, job.frozen)
            with torch.enable_grad(), learner.using(params):
                results.append(learner.exposure([learner.prepare(request.rows)]))
    return results


def _accumulate(total: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def _generate(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Generate)]
    params, owners = _shared([r.params for r in requests], learner, jobs[0].frozen)
    seeds = [derive(job.seed, "generate", job.client, job.round) for job in jobs]
    first = requests[0]
    with torch.no_grad(), learner.using(params):
        if owners > 1:
            return list(learner.generate([r.prompts for r in requests], first.max_tokens, first.temperature, seeds))
        if first.temperature > 0:
            found = [
                learner.generate([r.prompts], first.max_tokens, first.temperature, [seed])[0]
                for r, seed in zip(requests, seeds, strict=True)
            ]
            return list(found)
        flat = learner.generate([[p for r in requests for p in r.prompts]], first.max_tokens, 0.0, seeds[:1])[0]
    rest = iter(flat)
    return [[next(rest) for _ in r.prompts] for r in requests]


def _embed(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Embed)]
    results: list[Result] = []
    with torch.no_grad():
        for job, request in zip(jobs, requests, strict=True):
            params, _ = _shared([request.params], learner, job.frozen)
            with learner.using(params):
                results.append(learner.embed([request.texts])[0].cpu())
    return results


def _probe(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    from fedllm.engine.zeroth import probe  # it builds on this module

    return probe(learner, jobs)


def _shared(trees: Sequence[Tensors | None], learner: Learner, frozen: Tensors) -> tuple[Tensors | None, int]:
    """The parameters of a measuring pass and how many different models they are: 1 where all clients have the same."""
    present = [tree for tree in trees if tree is not None]
    if not present:
        return None, 1
    first = present[0]
    same = all(t is first or all(torch.equal(t[n], first[n]) for n in first) for t in present[1:])
    rows = present[:1] if same else present
    return {**_spread(frozen, len(rows), learner), **_stack(rows, learner)}, len(rows)


def no_data(client: str, split: str) -> DataError:
    """The error of a client without examples."""
    return DataError(
        f"Client '{client}' has no usable rows in its {split} split.", action="Look at 'fedllm data stats'."
    )


_RUN: dict[type, Callable[[Learner, Sequence[Job]], list[Result]]] = {
    Fit: _fit,
    Gradient: _gradient,
    Score: _score,
    Outputs: _outputs,
    Hidden: _outputs,
    Expose: _exposed,
    Generate: _generate,
    Embed: _embed,
    Probe: _probe,
}

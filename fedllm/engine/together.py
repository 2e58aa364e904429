"""Together - one pass for many clients: fit, gradient, score, generate and embed over stacked parameters.

Every function here takes the jobs of K clients and returns K results. K = 1 is the same code. Clients with fewer
steps leave the stack when they are done; tensors of smaller shapes (LoRA ranks) are padded with zeros, which train
to exact zeros, and cut back at the end. A client whose loss is not finite gets an error; the others do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.errors import DataError, FedLLMError, RoundFailed
from fedllm.core.seeds import derive, numpy_stream
from fedllm.core.tensors import Tensors, subtract
from fedllm.core.train import Train
from fedllm.core.work import Embed, Example, Fit, FitReport, Generate, Gradient, Learner, Request, Score, ScoreReport

SCORE_ROWS = 32
"""Rows of a forward pass that only measures."""


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
        frozen: trainable tensors of the learner that this method does not move.
    """

    request: Request
    client: str
    seed: int
    round: int
    rounds: int
    examples: Callable[[str], list[Example]]
    frozen: Tensors


Result = FitReport | ScoreReport | tuple[Tensors, tuple[float, float]] | list[str] | torch.Tensor | FedLLMError


def run_together(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    """Answer alike jobs in one pass; see :func:`alike`."""
    kind = type(jobs[0].request)
    return list(_RUN[kind](learner, jobs))


def alike(job: Job) -> tuple[Any, ...]:
    """Jobs with equal keys may share a pass."""
    request = job.request
    if isinstance(request, Fit):
        rules = tuple(_identity(rule) for rule in (request.penalty, request.correction))
        return Fit, request.train, request.split, rules, tuple(request.start), tuple(request.given)
    if isinstance(request, Gradient):
        return Gradient, request.split, tuple(request.params)
    if isinstance(request, Score):
        return Score, request.split, request.params is None, tuple(request.params or ())
    if isinstance(request, Generate):
        return Generate, request.max_tokens, request.temperature, request.params is None, tuple(request.params or ())
    return Embed, request.params is None, tuple(request.params or ())


def _identity(function: Callable[..., Any] | None) -> tuple[int, int]:
    """Two bound methods of one object are the same function."""
    return id(getattr(function, "__func__", function)), id(getattr(function, "__self__", None))


# ---------------------------------------------------------------------------------------------------------------------
# fit


def batches(count: int, train: Train, seed: int, client: str, round: int) -> Iterator[list[int]]:
    """The example numbers of each forward pass, for ever: passes over a fresh permutation, the last batch short.

    `train.accumulate` consecutive batches make one optimiser step. A function of (seed, client, round) alone.
    """
    stream = numpy_stream(seed, "batches", client, round)
    while True:
        order = stream.permutation(count).tolist()
        for start in range(0, count, train.batch_size):
            yield order[start : start + train.batch_size]


def _fit(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Fit)]
    train = requests[0].train
    examples = [job.examples(r.split) for job, r in zip(jobs, requests, strict=True)]
    steps = [train.step_count(len(held)) for held in examples]
    shapes = [{name: tensor.shape for name, tensor in r.start.items()} for r in requests]
    stack = _stack([r.start for r in requests], learner)
    given = {n: _stack([r.given[n] for r in requests], learner) for n in requests[0].given}
    start = {name: tensor.detach().clone() for name, tensor in stack.items()}
    streams = [batches(len(e), train, j.seed, j.client, j.round) for e, j in zip(examples, jobs, strict=True)]
    losses = torch.zeros(len(jobs), dtype=torch.float64)
    facts = [[0.0, 0.0, 0, 0] for _ in jobs]  # rate sum, targets, examples, tokens
    finished: dict[int, Tensors] = {k: _row(stack, 0, k) for k, n in enumerate(steps) if n == 0}
    active = [k for k, n in enumerate(steps) if n > 0]
    stack, optimizer = _restrict(stack, None, active, list(range(len(jobs))), train)
    for step in range(max(steps)):
        left = [k for k in active if steps[k] > step]
        if left != active:
            finished.update({k: _row(stack, active.index(k), k) for k in active if k not in left})
            stack, optimizer = _restrict(stack, optimizer, left, active, train)
            active = left
        window = [[[examples[k][i] for i in next(streams[k])] for k in active] for _ in range(train.accumulate)]
        targets = [sum(e.targets for groups in window for e in groups[row]) for row in range(len(active))]
        seeds = [derive(jobs[k].seed, "dropout", jobs[k].client, jobs[k].round, step) for k in active]
        here = {n: {name: t[active] for name, t in tree.items()} for n, tree in {"start": start, **given}.items()}
        grads, sums = _step(learner, stack, window, targets, seeds, here, requests[0], jobs[0].frozen)
        rate = train.rate(jobs[0].round, jobs[0].rounds, step, steps[active[0]])
        _clip(grads, train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, tensor in stack.items():
            tensor.grad = grads[name]
        optimizer.step()
        losses[active] += sums.detach().double().cpu()
        for row, k in enumerate(active):
            seen = [e for groups in window for e in groups[row]]
            facts[k][0] += rate
            facts[k][1] += targets[row]
            facts[k][2] += len(seen)
            facts[k][3] += sum(e.tokens for e in seen)
    finished.update({k: _row(stack, row, k) for row, k in enumerate(active)})
    return [
        _report(
            job,
            {n: t[tuple(slice(0, s) for s in shapes[k][n])].cpu() for n, t in finished[k].items()},
            r.start,
            steps[k],
            float(losses[k]),
            facts[k],
        )
        for k, (job, r) in enumerate(zip(jobs, requests, strict=True))
    ]


def _step(
    learner: Learner,
    stack: Tensors,
    window: list[list[list[Example]]],
    targets: list[int],
    seeds: list[int],
    here: dict[str, Tensors],
    request: Fit,
    frozen: Tensors,
) -> tuple[Tensors, torch.Tensor]:
    """Gradients of one optimiser step and the loss sums [K]; a mean over the labels of the whole window."""
    width, leaves = len(seeds), list(stack.values())
    scale = torch.tensor([1.0 / max(n, 1) for n in targets], device=learner.device)
    grads: list[torch.Tensor] | None = None
    total = torch.zeros(width, device=learner.device)
    with torch.enable_grad(), learner.using({**_spread(frozen, width, learner), **stack}, seeds):
        for turn, groups in enumerate(window):
            sums = learner.losses(groups)
            objective = (sums * scale).sum()
            if request.penalty is not None and turn == 0:
                objective = objective + _each(request.penalty, stack, here).sum()
            found = torch.autograd.grad(objective, leaves, allow_unused=True)
            filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
            grads = filled if grads is None else [a.add_(b) for a, b in zip(grads, filled, strict=True)]
            total = total + sums.detach()
    result = dict(zip(stack, grads or [], strict=True))
    if request.correction is not None:
        with torch.no_grad():
            detached = {name: tensor.detach() for name, tensor in stack.items()}
            result = _each(request.correction, result, {"params": detached, **here})
    return result, total


def _each(rule: Callable[..., Any], first: Tensors, given: dict[str, Tensors]) -> Any:
    """Apply a rule that is written for one client to every client of the stack."""
    return torch.func.vmap(lambda tree, others: rule(tree, **others))(first, given)


def _clip(grads: Tensors, limit: float | None) -> None:
    """Scale each client's gradient to at most the Euclidean norm `limit`, as torch.nn.utils.clip_grad_norm_ does."""
    if limit is None:
        return
    squares = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
    factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(factor.view(-1, *([1] * (grad.dim() - 1))))


def _optimizer(train: Train, stack: Tensors) -> torch.optim.Optimizer:
    """The optimiser over stacked tensors: element-wise, so that clients do not meet in it."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            list(stack.values()), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
        )
    return torch.optim.AdamW(
        list(stack.values()), lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
    )


def _restrict(
    stack: Tensors, optimizer: torch.optim.Optimizer | None, left: list[int], active: list[int], train: Train
) -> tuple[Tensors, torch.optim.Optimizer]:
    """The stack and the optimiser's memory for the clients `left` of those `active`."""
    rows = [active.index(k) for k in left]
    smaller = {
        name: (tensor.detach() if rows == list(range(len(active))) else tensor.detach()[rows]).requires_grad_()
        for name, tensor in stack.items()
    }
    fresh = _optimizer(train, smaller)
    if optimizer is not None:
        for old, new in zip(stack.values(), smaller.values(), strict=True):
            for name, value in optimizer.state.get(old, {}).items():
                shared = not isinstance(value, torch.Tensor) or value.dim() == 0
                fresh.state[new][name] = value if shared else value[rows]
    return smaller, fresh


def _report(
    job: Job, params: Tensors, start: Tensors, steps: int, loss: float, facts: Sequence[float]
) -> FitReport | FedLLMError:
    rate_sum, targets, examples, tokens = facts
    if not math.isfinite(loss) or not all(bool(torch.isfinite(t).all()) for t in params.values()):
        return RoundFailed(
            f"Training at client '{job.client}' gave a loss that is not finite in round {job.round}.",
            action="Lower train.lr, set train.clip_norm, or look at that client's data.",
        )
    return FitReport(params, subtract(params, start), steps, rate_sum, (loss, targets), int(examples), int(tokens))


def _stack(trees: Sequence[Tensors], learner: Learner) -> Tensors:
    """Stack equally named trees on a client axis, padding with zeros to the largest shape; float32 on the device."""
    result = {}
    for name, first in trees[0].items():
        rows = [tree[name] for tree in trees]
        shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
        dtype = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
        joined = torch.zeros([len(rows), *shape], dtype=dtype, device=learner.device)
        for k, row in enumerate(rows):
            joined[(k, *(slice(0, n) for n in row.shape))] = row.to(learner.device)
        result[name] = joined
    return result


def _spread(tree: Tensors, width: int, learner: Learner) -> Tensors:
    return {name: t.to(learner.device).expand(width, *t.shape) for name, t in tree.items()}


def _row(stack: Tensors, row: int, client: int) -> Tensors:
    return {name: tensor.detach()[row].clone() for name, tensor in stack.items()}


# ---------------------------------------------------------------------------------------------------------------------
# gradient, score, generate, embed


def _rounds(examples: Sequence[Sequence[Example]], rows: int) -> Iterator[list[list[Example]]]:
    """Cut each client's examples into groups of `rows`, longest first, until all are used; some groups are empty."""
    ordered = [sorted(held, key=lambda e: -e.tokens) for held in examples]
    for start in range(0, max((len(held) for held in ordered), default=0), rows):
        yield [held[start : start + rows] for held in ordered]


def _gradient(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Gradient)]
    examples = [job.examples(r.split) for job, r in zip(jobs, requests, strict=True)]
    stack = {n: t.requires_grad_() for n, t in _stack([r.params for r in requests], learner).items()}
    targets = [sum(e.targets for e in held) for held in examples]
    scale = torch.tensor([1.0 / max(n, 1) for n in targets], device=learner.device)
    total, sums = {n: torch.zeros_like(t) for n, t in stack.items()}, torch.zeros(len(jobs), dtype=torch.float64)
    with torch.enable_grad(), learner.using({**_spread(jobs[0].frozen, len(jobs), learner), **stack}):
        for groups in _rounds(examples, max(1, SCORE_ROWS // len(jobs))):
            losses = learner.losses(groups)
            found = torch.autograd.grad((losses * scale).sum(), list(stack.values()), allow_unused=True)
            for name, gradient in zip(stack, found, strict=True):
                if gradient is not None:
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
    examples = [job.examples(r.split) for job, r in zip(jobs, requests, strict=True)]
    params, owners = _shared([r.params for r in requests], learner, jobs[0].frozen)
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
    Generate: _generate,
    Embed: _embed,
}

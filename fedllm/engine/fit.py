"""Fit - local training of K clients as one sequence of optimiser steps over stacked tensors.

Clients with fewer steps leave the stack when they are done. A client whose loss is not finite gets an error; the
others do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import torch
from torch.nn import functional

from fedllm.core.errors import ConfigError, FedLLMError, RoundFailed
from fedllm.core.seeds import Derived, numpy_stream
from fedllm.core.tensors import Tensors, moved
from fedllm.core.train import Train
from fedllm.core.work import Example, Fit, FitReport, Learner
from fedllm.engine.job import Job, Result, examples_of
from fedllm.engine.optimizer import Optimizer
from fedllm.engine.passes import Part
from fedllm.engine.stack import (
    Blocks,
    Stack,
    add_rows,
    clip_,
    corner,
    finite_rows,
    is_all,
    rows_of,
    spread,
    stacked,
    taken,
)

READ = 256
"""Steps after which their losses are read."""


def fit(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    """Train the clients of alike jobs side by side."""
    return _Fit(learner, jobs).run()


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


class _Fit:
    """The training of some clients.

    `active` lists those (by number) that still train; row i of every stacked tensor belongs to active[i].
    """

    def __init__(self, learner: Learner, jobs: Sequence[Job]) -> None:
        self.learner, self.jobs, self.device = learner, jobs, learner.device
        self.requests = [job.request for job in jobs if isinstance(job.request, Fit)]
        self.train, first = self.requests[0].train, self.requests[0]
        self.examples = [_soft(r, examples_of(learner, job, r)) for job, r in zip(jobs, self.requests, strict=True)]
        self.steps = [self.train.step_count(len(own)) for own in self.examples]
        self.streams = [
            _stream(len(own), self.train, job, r.begun)
            for own, job, r in zip(self.examples, jobs, self.requests, strict=True)
        ]
        self.stack = Stack.of([r.start for r in self.requests], self.device)
        self.start = {dtype: block.clone() for dtype, block in self.stack.blocks.items()}
        given = {n: stacked([r.given[n] for r in self.requests], self.device) for n in first.given}
        self.given = {**given, "start": self.stack.views(self.start)} if first.penalty or first.correction else {}
        fixed = stacked([r.fixed or {} for r in self.requests], self.device)
        self.fixed = {**spread(jobs[0].frozen, len(jobs), self.device), **fixed}
        trees = [r.terms or ((1.0, {}),) for r in self.requests]
        self.terms = [
            (terms[0][0], stacked([tree for _, tree in terms], self.device)) for terms in zip(*trees, strict=True)
        ]
        self.active = list(range(len(jobs)))
        self.optimizer = Optimizer.going_on(self.train, self.stack, [r.moments or {} for r in self.requests])
        self.finished: dict[int, tuple[Tensors, Tensors, bool]] = {}
        self.moments: dict[int, Tensors] = {}
        self.spent = [_Spent() for _ in jobs]
        self.losses: list[tuple[list[int], torch.Tensor]] = []

    def run(self) -> list[Result]:
        for step in range(max(self.steps)):
            self._keep([k for k in self.active if self.steps[k] > step])
            self._step(step)
        self._keep([])
        if self.losses:
            self._read_losses()
        return [self._report(k) for k in range(len(self.jobs))]

    def _keep(self, left: list[int]) -> None:
        """Go on with the clients `left`; the others' tensors are final."""
        if left == self.active:
            return
        self._finish([(row, k) for row, k in enumerate(self.active) if k not in left])
        if left:
            rows = [self.active.index(k) for k in left]
            self.stack, self.optimizer = self.stack.rows(rows), self.optimizer.rows(rows)
        self.active = left

    def _finish(self, done: list[tuple[int, int]]) -> None:
        """Take what these (row, number) have trained, and its change, out of the stack."""
        rows, numbers = [row for row, _ in done], [k for _, k in done]
        ended = {dtype: rows_of(block, rows).cpu() for dtype, block in self.stack.blocks.items()}
        changes = {dtype: block - rows_of(self.start[dtype], numbers).cpu() for dtype, block in ended.items()}
        like = [self.requests[k].start for k in numbers]
        trees = self.stack.trees(ended, like), self.stack.trees(changes, like)
        whole = finite_rows(ended)
        for (row, k), params, delta, fine in zip(done, *trees, whole, strict=True):
            self.finished[k] = params, delta, fine
            if self.requests[k].moments is not None:
                self.moments[k] = self.optimizer.kept(self.stack, row, self.requests[k].start)

    def _step(self, step: int) -> None:
        """One optimiser step of every active client."""
        if self.jobs[0].noised is not None:
            window, grads, sums = self._noised(step)
        else:
            window = self._window()
            grads, sums = self._gradients(window, step)
            if self.train.clip_norm is not None:
                clip_(grads, self.train.clip_norm)
        first = self.jobs[self.active[0]]
        rate = self.train.rate(first.round, first.rounds, step, self.steps[self.active[0]])
        self.optimizer.step(self.stack.blocks, grads, rate)
        for row, k in enumerate(self.active):
            self.spent[k].add(rate, [e for groups in window for e in groups[row]])
        self.losses.append((self.active, sums))
        if len(self.losses) == READ:
            self._read_losses()

    def _read_losses(self) -> None:
        """Count the losses of the last steps: all at once, because whoever reads a number waits for the device."""
        numbers = iter(torch.cat([sums for _, sums in self.losses]).tolist())
        for active, _ in self.losses:
            for k, loss in zip(active, numbers, strict=False):
                self.spent[k].loss += loss
        self.losses.clear()

    def _window(self) -> list[list[list[Example]]]:
        """The examples of a step: batch by batch, client by client."""
        taken = [next(self.streams[k]) for k in self.active]
        return [
            [[self.examples[k][i] for i in batch] for k, batch in zip(self.active, turn, strict=True)]
            for turn in zip_longest(*taken, fillvalue=())
        ]

    def _gradients(self, window: list[list[list[Example]]], step: int) -> tuple[Blocks, torch.Tensor]:
        """Gradients of the mean loss over the labels of the whole window, and the loss sums [K]."""
        request, width = self.requests[0], len(self.active)
        targets = [sum(e.targets for groups in window for e in groups[row]) for row in range(width)]
        jobs = [self.jobs[k] for k in self.active]
        fixed, terms = self.fixed, self.terms
        if len(self.active) < len(self.jobs):
            fixed, terms = self._rows(fixed), [(weight, self._rows(tree)) for weight, tree in terms]
        total, grads = torch.zeros(width, device=self.device), None
        for turn, groups in enumerate(window):
            drawn = [(job.seed, "dropout", job.client, job.round, step, turn) for job in jobs]
            for parts in self.jobs[0].passes.plan([[e.tokens for e in group] for group in groups]):
                parts = _merged(parts)
                chosen = [[groups[part.client][row] for row in part.rows] for part in parts]
                owners = [part.client for part in parts]
                own = self.stack.tensors if is_all(owners, total) else self.stack.rows(owners).tensors
                share = moved(torch.tensor([1.0 / max(targets[k], 1) for k in owners]), self.device)
                seeds, places = Derived([drawn[k] for k in owners]), [part.rows for part in parts]
                for weight, tree in terms:
                    bound = {**taken(fixed, owners), **own, **taken(tree, owners)}
                    with torch.enable_grad(), self.learner.using(bound, seeds, places):
                        sums = _losses(self.learner, request.loss, chosen)
                        sums = sums if request.terms is None else sums * weight
                        found = torch.autograd.grad(sums, list(own.values()), share.to(sums.dtype), allow_unused=True)
                    grads = self.stack.added(grads, owners, dict(zip(own, found, strict=True)))
                    add_rows(total, owners, sums.detach())
        return self._ruled(self.stack.gathered(dict.fromkeys(self.stack.places)) if grads is None else grads), total

    def _ruled(self, grads: Blocks) -> Blocks:
        """Gradients with what the request adds to them: a penalty on parameters, a correction."""
        request, leaves, given = self.requests[0], self.stack.tensors, self.given
        if len(self.active) < len(self.jobs):
            given = {n: self._rows(tree) for n, tree in given.items()}
        if request.penalty is not None:
            with torch.enable_grad():
                extra = _each(request.penalty, leaves, given).sum()
                found = torch.autograd.grad(extra, list(leaves.values()), allow_unused=True)
            grads = self.stack.added(grads, range(len(self.active)), dict(zip(leaves, found, strict=True)))
        if request.correction is not None:
            with torch.no_grad():
                detached = {name: tensor.detach() for name, tensor in leaves.items()}
                ruled = _each(request.correction, self.stack.views(grads), {"params": detached, **given})
            return self.stack.gathered(ruled)
        return grads

    def _noised(self, step: int) -> tuple[list[list[list[Example]]], Blocks, torch.Tensor]:
        """DP-SGD: the examples of a step, (sum of clipped gradients of single examples + noise) / expected, losses.

        Every example is a client of the pass: it has parameters of its own, and so a gradient of its own. Its loss is
        the mean over its labels. A step without examples is noise alone.
        """
        rules = [rule for k in self.active if (rule := self.jobs[k].noised) is not None]
        drawn = [rule.draw(len(self.examples[k]), step) for rule, k in zip(rules, self.active, strict=True)]
        flat = [(row, place) for row, places in enumerate(drawn) for place in places]
        rows = [self.examples[self.active[row]][place] for row, place in flat]
        jobs = [self.jobs[k] for k in self.active]
        names = [(job.seed, "dropout", job.client, job.round, step, 0) for job in jobs]
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in self.stack.tensors.items()}
        fixed = self.fixed if len(self.active) == len(self.jobs) else self._rows(self.fixed)
        total = torch.zeros(len(self.active), device=self.device)
        for parts in self.jobs[0].passes.plan([[example.tokens] for example in rows]) if rows else ():
            for some in _pieces([part.client for part in parts], self.learner.width_limit):
                owners, chosen = [flat[i][0] for i in some], [[rows[i]] for i in some]
                own = self.stack.rows(owners).tensors
                seen = Derived([names[row] for row in owners]), [(flat[i][1],) for i in some]
                with torch.enable_grad(), self.learner.using({**taken(fixed, owners), **own}, *seen):
                    losses = _losses(self.learner, self.requests[0].loss, chosen)
                    scale = torch.tensor([1.0 / max(rows[i].targets, 1) for i in some], device=self.device)
                    found = torch.autograd.grad((losses * scale).sum(), list(own.values()), allow_unused=True)
                each = dict(zip(own, found, strict=True))
                grads = {n: torch.zeros_like(own[n]) if g is None else g for n, g in each.items()}  # pyright: ignore[reportUnnecessaryComparison]
                for row in dict.fromkeys(owners):
                    places = [i for i, owner in enumerate(owners) if owner == row]
                    for name, part in rules[row].summed({n: g[places] for n, g in grads.items()}).items():
                        sums[name][row].add_(part)
                add_rows(total, owners, losses.detach())
        noised = {name: torch.empty_like(leaf) for name, leaf in self.stack.tensors.items()}
        for row, rule in enumerate(rules):
            noise = rule.noise(self.requests[self.active[row]].start, step)  # of its own shapes: padding stays zero
            for name, grad in noised.items():
                sums[name][(row, *corner(noise[name].shape))].add_(noise[name].to(self.device))
                grad[row] = sums[name][row] / rule.expected
        examples = [[self.examples[k][place] for place in places] for k, places in zip(self.active, drawn, strict=True)]
        return [examples], self._ruled(self.stack.gathered(noised)), total

    def _rows(self, tree: Tensors) -> Tensors:
        """The rows of the clients that still train."""
        return taken(tree, self.active)

    def _report(self, k: int) -> FitReport | FedLLMError:
        job, (params, delta, fine), spent = self.jobs[k], self.finished[k], self.spent[k]
        if job.noised is not None:
            spent = spent.public(job.noised.expected)
        if not math.isfinite(spent.loss) or not fine:
            return RoundFailed(
                f"Training at client '{job.client}' gave a loss that is not finite in round {job.round}.",
                action="Lower train.lr, set train.clip_norm, or look at that client's data.",
            )
        counts = self.steps[k], spent.rates, (spent.loss, float(spent.targets)), spent.examples, spent.tokens
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

    def add(self, rate: float, seen: Sequence[Example]) -> None:
        self.rates += rate
        self.steps += 1
        self.examples += len(seen)
        for example in seen:
            self.targets += example.targets
            self.tokens += example.tokens


def _merged(parts: Sequence[Part]) -> Sequence[Part]:
    """Parts of one client alone are one part: it shares the pass with nobody."""
    if any(part.client != parts[0].client for part in parts):
        return parts
    return [Part(parts[0].client, tuple(sorted(row for part in parts for row in part.rows)))]


def _pieces(places: list[int], limit: int | None) -> list[list[int]]:
    """`places` in runs of at most `limit`."""
    return [places] if limit is None else [places[at : at + limit] for at in range(0, len(places), limit)]


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


def _each(rule: Callable[..., Any], first: Tensors, given: dict[str, Tensors]) -> Any:
    """Apply a rule that is written for one client to every client of the stack."""
    return torch.func.vmap(lambda tree, others: rule(tree, **others))(first, given)

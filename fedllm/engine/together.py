"""Together - one pass for many clients: what each kind of request is answered by, and all answers but :mod:`fit`'s.

Every function here takes the jobs of K clients and returns K results. K = 1 is the same code. Tensors of smaller shapes
(LoRA ranks) are padded with zeros and cut back at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fedllm.core.errors import ConfigError, DataError
from fedllm.core.seeds import derive
from fedllm.core.tensors import Tensors
from fedllm.core.work import (
    Embed,
    Example,
    Expose,
    Exposing,
    Fit,
    Generate,
    Gradient,
    Hidden,
    Learner,
    Outputs,
    Probe,
    Score,
    ScoreReport,
)
from fedllm.engine.fit import fit
from fedllm.engine.job import Job, Result, examples_of
from fedllm.engine.stack import corner, spread, stacked

SCORE_ROWS = 32
"""Rows of a forward pass that only measures, over all clients."""
GRADIENT_ROWS = 8
"""Rows of one client in a pass of a full gradient: the same at every width, so that its sum has one order."""


def run_together(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    """Answer alike jobs in one pass; see :func:`fedllm.engine.job.alike`."""
    kind = type(jobs[0].request)
    return list(_RUN[kind](learner, jobs))


def _rounds(examples: Sequence[Sequence[Example]], rows: int) -> Iterator[list[list[Example]]]:
    """Cut each client's examples into groups of `rows`, longest first, until all are used; some groups are empty."""
    ordered = [sorted(held, key=lambda e: -e.tokens) for held in examples]
    for start in range(0, max((len(held) for held in ordered), default=0), rows):
        yield [held[start : start + rows] for held in ordered]


def _gradient(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Gradient)]
    examples = [examples_of(learner, job, r) for job, r in zip(jobs, requests, strict=True)]
    fixed = {
        **spread(jobs[0].frozen, len(jobs), learner.device),
        **stacked([r.fixed or {} for r in requests], learner.device),
    }
    stack = {n: t.requires_grad_() for n, t in stacked([r.params for r in requests], learner.device).items()}
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
            {n: g[k][corner(r.params[n].shape)].cpu() for n, g in total.items()},
            (float(sums[k]), float(targets[k])),
        )
        for k, r in enumerate(requests)
    ]


def _score(learner: Learner, jobs: Sequence[Job]) -> list[Result]:
    requests = [job.request for job in jobs if isinstance(job.request, Score)]
    examples = [examples_of(learner, job, r) for job, r in zip(jobs, requests, strict=True)]
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
    return {**spread(frozen, len(rows), learner.device), **stacked(rows, learner.device)}, len(rows)


_RUN: dict[type, Callable[[Learner, Sequence[Job]], list[Result]]] = {
    Fit: fit,
    Gradient: _gradient,
    Score: _score,
    Outputs: _outputs,
    Hidden: _outputs,
    Expose: _exposed,
    Generate: _generate,
    Embed: _embed,
    Probe: _probe,
}

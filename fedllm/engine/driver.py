"""Driver - runs the coroutines of many clients and answers those that wait for the same kind of work in one pass."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.message import Received, Upload
from fedllm.core.work import Exchange, Fit, FitReport, Learner, Request
from fedllm.engine.job import Job, alike
from fedllm.engine.together import run_together

if TYPE_CHECKING:
    from fedllm.engine.crew import Crew


@dataclass
class Turn:
    """One client's turn: its coroutine, how to make a job of what it asks, the request it answers, its costs.

    `learner` is the model of the client's group (None: the driver's). In a conversation `session` is its id, `answer`
    what the server said last, and `client_view` what the client half sees, whose round goes on with the run's.
    """

    client: str
    coroutine: Coroutine[Any, Any, Upload]
    job: Callable[[Request], Job]
    id: str = ""
    op: str = ""
    cost: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "steps": 0.0})
    learner: Learner | None = None
    answer: Received | None = None
    session: str | None = None
    client_view: Any = None


Outcome = Upload | Exchange | BaseException
"""What a turn came to: its upload, an upload in the middle of a conversation, or an error."""


def drive(
    turns: list[Turn], learner: Learner, width: int | None = None, crew: Crew | None = None
) -> Iterator[tuple[Turn, Outcome]]:
    """Run all turns to their end, or to where they wait for the server; yields each with what it came to.

    Args:
        turns: the clients' turns.
        learner: the model of those that have none of their own.
        width: how many clients may share a pass that measures or probes; a fit cuts its own passes.
        crew: the processes that share the work; None: this one alone.
    """
    waiting: list[tuple[Turn, Job]] = []
    paused: set[int] = set()
    try:
        for turn in turns:
            yield from _advance(turn, turn.answer, waiting, paused)
        while waiting:
            first = waiting[0]
            key, model = alike(first[1]), first[0].learner or learner
            group = [(t, job) for t, job in waiting if (t.learner or learner) is model and alike(job) == key]
            limits = [model.width_limit, None if isinstance(first[1].request, Fit) else width]
            limit = min((limit for limit in limits if limit is not None), default=len(group))
            group = group[: limit if crew is None else limit * crew.processes]
            taken = {id(turn) for turn, _ in group}
            waiting = [pair for pair in waiting if id(pair[0]) not in taken]
            jobs = [job for _, job in group]
            results = answered(model, jobs) if crew is None else crew.run(model, jobs)
            for (turn, _), result in zip(group, results, strict=True):
                yield from _advance(turn, result, waiting, paused)
    finally:  # also where the caller stops early: no coroutine is left open but those that wait for the server
        for turn in turns:
            if id(turn) not in paused:
                turn.coroutine.close()


def _advance(
    turn: Turn, result: Any, waiting: list[tuple[Turn, Job]], paused: set[int]
) -> Iterator[tuple[Turn, Outcome]]:
    """Resume a coroutine with `result`; it asks for more work, waits for the server, or is done."""
    if isinstance(result, FitReport):
        turn.cost["tokens"] += result.tokens
        turn.cost["steps"] += result.steps
    try:
        with torch.enable_grad():
            failed = isinstance(result, BaseException)
            asked = turn.coroutine.throw(result) if failed else turn.coroutine.send(result)
            if not isinstance(asked, Request | Exchange):
                raise ConfigError(
                    f"The client half awaits a {type(asked).__name__}.",
                    "Allowed: await client.fit, gradient, score, outputs, hidden, generate, embed or exchange.",
                )
            said = asked if isinstance(asked, Exchange) else None
            job = turn.job(asked) if not isinstance(asked, Exchange) else None
    except StopIteration as done:
        yield turn, done.value
    except Exception as fault:
        turn.coroutine.close()
        yield turn, fault
    else:
        if job is not None:
            waiting.append((turn, job))
        elif said is not None:
            paused.add(id(turn))
            yield turn, said


def answered(learner: Learner, jobs: list[Job]) -> list[Any]:
    """One result for each of alike jobs, of one pass; where memory does not suffice, two passes of half the width."""
    try:
        return list(run_together(learner, jobs))
    except torch.OutOfMemoryError:
        if len(jobs) > 1:
            torch.cuda.empty_cache()
            half = len(jobs) // 2
            return [*answered(learner, jobs[:half]), *answered(learner, jobs[half:])]
        return [
            ModelError(
                f"The model's memory does not suffice for client '{jobs[0].client}'.",
                action="Lower train.batch_size or task.max_length, set model.gradient_checkpointing=true, or use a "
                "smaller model.",
            )
        ]
    except Exception as fault:  # whatever it is, it belongs to one client: find out which, and let the others finish
        if len(jobs) > 1:
            return [result for job in jobs for result in answered(learner, [job])]
        return [fault]

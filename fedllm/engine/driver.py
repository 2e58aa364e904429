"""Driver - runs the coroutines of many clients and answers those that wait for the same kind of work in one pass."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.message import Upload
from fedllm.core.work import FitReport, Learner, Request
from fedllm.engine.together import Job, alike, run_together


@dataclass
class Turn:
    """One client's turn: its coroutine, how to make a job of what it asks, the request it answers, its costs."""

    client: str
    coroutine: Coroutine[Any, Any, Upload]
    job: Callable[[Request], Job]
    id: str = ""
    cost: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "steps": 0.0})


Outcome = Upload | BaseException


def drive(turns: list[Turn], learner: Learner) -> Iterator[tuple[Turn, Outcome]]:
    """Run all turns to their end; yields each with its upload or the error it ended with."""
    waiting: list[tuple[Turn, Job]] = []
    try:
        for turn in turns:
            yield from _advance(turn, None, waiting)
        while waiting:
            key = alike(waiting[0][1])
            group = [pair for pair in waiting if alike(pair[1]) == key]
            if learner.width_limit is not None:
                group = group[: learner.width_limit]
            taken = {id(turn) for turn, _ in group}
            waiting = [pair for pair in waiting if id(pair[0]) not in taken]
            for (turn, _), result in zip(group, _run(learner, [job for _, job in group]), strict=True):
                yield from _advance(turn, result, waiting)
    finally:  # also where the caller stops early: no coroutine is left open
        for turn in turns:
            turn.coroutine.close()


def _advance(turn: Turn, result: Any, waiting: list[tuple[Turn, Job]]) -> Iterator[tuple[Turn, Outcome]]:
    """Resume a coroutine with `result`; it either asks for more work or is done."""
    if isinstance(result, FitReport):
        turn.cost["tokens"] += result.tokens
        turn.cost["steps"] += result.steps
    try:
        with torch.enable_grad():
            failed = isinstance(result, BaseException)
            asked = turn.coroutine.throw(result) if failed else turn.coroutine.send(result)
            if not isinstance(asked, Request):
                raise ConfigError(
                    f"The client half awaits a {type(asked).__name__}.",
                    "Allowed: await client.fit, gradient, score, generate or embed.",
                )
            waiting.append((turn, turn.job(asked)))
    except StopIteration as done:
        yield turn, done.value
    except Exception as fault:
        turn.coroutine.close()
        yield turn, fault


def _run(learner: Learner, jobs: list[Job]) -> list[Any]:
    """One pass; where memory does not suffice, two passes of half the width."""
    try:
        return list(run_together(learner, jobs))
    except torch.OutOfMemoryError:
        if len(jobs) > 1:
            torch.cuda.empty_cache()
            half = len(jobs) // 2
            return [*_run(learner, jobs[:half]), *_run(learner, jobs[half:])]
        return [
            ModelError(
                f"The model's memory does not suffice for client '{jobs[0].client}'.",
                action="Lower train.batch_size or task.max_length, set model.gradient_checkpointing=true, or use a "
                "smaller model.",
            )
        ]
    except Exception as fault:  # whatever it is, it belongs to one client: find out which, and let the others finish
        if len(jobs) > 1:
            return [result for job in jobs for result in _run(learner, [job])]
        return [fault]

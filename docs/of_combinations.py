"""Of combinations - which method, task, adapter and model family go together; tried on toy models where it can be.

A combination counts as working when one training step of it can be made: attach, prepare two rows, loss, backward.
What is refused is an error of fedllm; anything else that goes wrong is shown as broken, never hidden.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from docs.tables import LEGEND, NO, YES, cell, table
from fedllm.core.errors import FedLLMError
from fedllm.models.adapters.settings import AdapterKind, AdapterSettings
from fedllm.models.toy import KINDS, toy_model
from fedllm.tasks.settings import TaskKind, TaskSettings

ADAPTERS: tuple[str, ...] = get_args(AdapterKind)
TASKS: tuple[str, ...] = get_args(TaskKind)
LABELS = ["a", "b"]
ROWS: dict[str, dict[str, Any]] = {
    "causal-lm": {"instruction": "Name the city.", "response": "Paris"},
    "seq2seq": {"instruction": "Name the city.", "response": "Paris"},
    "sequence-classification": {"text": "The film was great.", "label": "a"},
    "token-classification": {"tokens": ["The", "film"], "tags": ["a", "b"]},
    "masked-lm": {"text": "The film was great and the weather was warm in the valley near the town."},
    "dual-encoder": {"image": [[16 * (row % 8) for row in range(32)]] * 32, "label": "a"},
}
"""One row of each task."""


@dataclass(frozen=True)
class Tried:
    """What trying found.

    Attributes:
        task, family, adapter: the combination.
        verdict: works, refused or broken.
        reason: the error; "" where it works.
    """

    task: str
    family: str
    adapter: str
    verdict: str
    reason: str = ""


def try_all() -> Iterator[Tried]:
    """Every adapter on every task and toy family that can be loaded for it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share out
    try:
        yield from _try_all()
    finally:
        torch.set_num_threads(threads)


def _try_all() -> Iterator[Tried]:
    for task in TASKS:
        labels = LABELS if task.endswith("classification") or task == "dual-encoder" else None
        for family in KINDS:
            try:
                loaded = toy_model(family, kind=task, labels=labels)  # type: ignore[arg-type]
            except FedLLMError:
                continue  # the family has no model for this task
            for adapter in ADAPTERS:
                untouched = replace(loaded, model=copy.deepcopy(loaded.model))
                verdict, reason = _try(untouched, task, adapter, labels)
                yield Tried(task, family, adapter, verdict, reason)


def _try(loaded: Any, task: str, adapter: str, labels: list[str] | None) -> tuple[str, str]:
    """Make one training step: the verdict and the reason."""
    from fedllm.tasks.dual_encoder import DualEncoderLearner
    from fedllm.tasks.learner import TransformerLearner

    template = "auto" if task == "dual-encoder" else "plain"
    settings = TaskSettings(kind=task, template=template, max_length=64)  # type: ignore[arg-type]
    learner: Any = DualEncoderLearner if task == "dual-encoder" else TransformerLearner
    try:
        kind = AdapterSettings(kind=adapter, rank=2, tokens=4)  # type: ignore[arg-type]
        _step(learner(loaded, settings, kind, labels, 0), ROWS[task])
    except FedLLMError as fault:
        return "refused", str(fault)
    except Exception as fault:
        return "broken", f"{type(fault).__name__}: {fault}"
    return "works", ""


def _step(learner: Any, row: dict[str, Any]) -> None:
    """The gradient of one batch of one client; raises ValueError where nothing would move."""
    examples = learner.prepare([row, row])
    params = {name: tensor.unsqueeze(0).requires_grad_() for name, tensor in learner.initial().items()}
    with learner.using(params):
        learner.losses([examples]).sum().backward()
    if not any(tensor.grad is not None and bool(tensor.grad.any()) for tensor in params.values()):
        raise ValueError("no gradient arrived")


def matrix_page(kinds: Mapping[str, Any]) -> str:
    """Method by task and adapter, and adapter by task and model family."""
    methods = [[f"[{key}](methods/{key}.md)", *_method_row(kind, TASKS, ADAPTERS)] for key, kind in kinds.items()]
    tried = list(try_all())
    notes: list[str] = []
    rows = []
    for task, family in dict.fromkeys((one.task, one.family) for one in tried):
        found = [one for one in tried if (one.task, one.family) == (task, family)]
        rows.append([task, family, *(_mark(one, notes) for one in found)])
    return "\n\n".join([
        "---\nhide: [toc]\n---",
        "# What works with what",
        "A combination that is not allowed is refused before anything is trained, with the reason and the nearest "
        "choice. These tables are made by asking the code.",
        "## Method by task and adapter",
        table(("method", *TASKS, *ADAPTERS, "linear", "real sites"), methods),
        f"{YES}: allowed; {NO}: refused. {LEGEND}",
        "## Adapter by task and model family",
        "Tried while this page was made: one training step of a tiny random model of each family. A number leads to "
        "the reason below; *broken* is a fault of fedllm: the combination should work or be refused.",
        table(("task", "family", *ADAPTERS), rows),
        "\n".join(f"{number}. {cell(text)}" for number, text in enumerate(notes, 1)),
        "The families stand for their kind of architecture: `llama`, `qwen`, `gpt2` are decoders, `bert` is an "
        "encoder, `t5` is both. Of other models fedllm looks at the structure, not at the name.",
    ])  # fmt: skip


def _method_row(kind: Any, tasks: Sequence[str], adapters: Sequence[str]) -> list[str]:
    from fedllm.cli.catalogue import is_linear

    needs = getattr(kind, "adapters", ())
    models = kind.card.models
    cells = [YES if "any" in models or task in models else NO for task in tasks]
    cells += [YES if not needs or adapter in needs else NO for adapter in adapters]
    return [*cells, {True: YES, False: NO, None: ""}[is_linear(kind)], NO if kind.card.simulation_only else YES]


def _mark(one: Any, notes: list[str]) -> str:
    """yes, or the number of the reason."""
    if one.verdict == "works":
        return YES
    reason = re.sub(r"toy:\w+( \(\w+\))?", "the model", one.reason)
    reason = f"Broken, not refused: {reason}" if one.verdict == "broken" else reason[:1].upper() + reason[1:]
    if reason not in notes:
        notes.append(reason)
    number = notes.index(reason) + 1
    return f"{'broken' if one.verdict == 'broken' else NO} ({number})"

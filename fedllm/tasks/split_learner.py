"""Split learner - the two halves of a transformer learner: the clients' ends with the task, and the server's body.

Every trainable tensor belongs to the half that holds its layer, whatever the adapter: all weights (`full`), or the LoRA
of each layer. Weights that are not trained stay where their layer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy
import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.split import Halves
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example
from fedllm.models.split import split
from fedllm.models.structure import hidden_size, layer_count
from fedllm.tasks.masked import MaskedLM

if TYPE_CHECKING:
    from fedllm.tasks.learner import TransformerLearner

ADAPTERS = ("full", "lora", "ia3", "bottleneck", "bitfit", "head")
"""Adapters that act inside layers; prompts and prefixes act on the whole model at once."""


def split_learner(learner: TransformerLearner, first: int, last: int | None) -> Halves:
    """Both halves of `learner`; see :func:`fedllm.core.split.halves`."""
    settings = learner.adapted.settings
    if settings.kind not in ADAPTERS:
        raise ModelError(
            f"adapter.kind={settings.kind} acts on the whole model and cannot be split.",
            f"Allowed: {', '.join(ADAPTERS)}.",
            "full",
        )
    if learner.task.settings.pack is True:
        raise ModelError(
            "task.pack=true: what tells the texts of a block apart does not travel between the halves of a model.",
            "Allowed: task.pack=false, and task.pack=stream.",
            action="Set task.pack=false.",
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in learner.loaded.model.modules()):
        raise ModelError(
            "Gradient checkpointing computes a pass again when its values may be others.",
            "A split model keeps its passes.",
            action="Set model.gradient_checkpointing=false.",
        )
    ends = SplitEnds(learner, first, last)
    return Halves(ends, SplitBody(learner, ends))


class SplitEnds:
    """Implements :class:`fedllm.core.split.Ends`."""

    def __init__(self, learner: TransformerLearner, first: int, last: int | None) -> None:
        self.learner, self.parts, self.device = learner, split(learner.loaded.model, first, last), learner.device
        if self.parts.first == self.parts.last:
            raise ConfigError(
                f"A cut behind layer {first} leaves no layer to the server.",
                f"The model has {layer_count(learner.loaded.model)} layers.",
                action="Keep fewer layers at the client.",
            )
        trained = learner.initial()
        self.body_names = frozenset(name for name in trained if self.parts.in_body(name))
        self.names = frozenset(trained) - self.body_names

    def encode(self, params: Mapping[str, torch.Tensor], batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, H] with its graph, and the mask [B, T] as uint8."""
        inputs = self.learner.collate([batch]).inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with self.learner.using(_bound(self.learner, params)):
            hidden = self.parts.front(ids, mask, segments=inputs.get("token_type_ids"))
        return hidden, mask.to(torch.uint8)

    def loss(
        self, params: Mapping[str, torch.Tensor], hidden: torch.Tensor, batch: Sequence[Example]
    ) -> tuple[torch.Tensor, int]:
        """The sum of the losses, and the number of labels."""
        collated = self.learner.collate([batch])
        ids, mask = collated.inputs["input_ids"], collated.inputs["attention_mask"]
        rows, positions = collated.where
        with self.learner.using(_bound(self.learner, params)):
            logits = self.parts.back(hidden.to(ids.device, self.learner.loaded.model.dtype), mask, ids=ids)
        chosen = logits[rows, positions] if self.learner.task.per_token else logits[rows]
        return self.learner.task.loss_rows(chosen, collated.labels, rows, len(batch)).sum(), len(collated.labels)

    def drawn(self, batch: Sequence[Example], rng: numpy.random.Generator) -> list[Example]:
        """Masked anew, where the task masks."""
        task = self.learner.task
        return [task.drawn(example, rng) for example in batch] if isinstance(task, MaskedLM) else list(batch)


class SplitBody:
    """Implements :class:`fedllm.core.split.Body`."""

    def __init__(self, learner: TransformerLearner, ends: SplitEnds) -> None:
        self.learner, self.parts, self.names = learner, ends.parts, ends.body_names
        self.width, self.device = hidden_size(learner.loaded.model), learner.device

    def __call__(self, params: Mapping[str, torch.Tensor], hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H]."""
        with self.learner.using(_bound(self.learner, params)):
            return self.parts.body(hidden.to(self.device, self.learner.loaded.model.dtype), mask.to(self.device))


def _bound(learner: TransformerLearner, params: Mapping[str, torch.Tensor]) -> Tensors | None:
    """`params` as the learner binds them: stacked for one client; None where this half has nothing to train.

    An adapter that swaps all weights wants them all; those of the other half, which is not run, are the base model's.
    """
    stacked = {name: tensor.to(learner.device).unsqueeze(0) for name, tensor in params.items()}
    if learner.adapted.settings.kind != "full":
        return stacked or None
    base = {name: tensor.unsqueeze(0) for name, tensor in learner.loaded.model.named_parameters()}
    return {**base, **stacked}

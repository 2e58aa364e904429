"""Split - a model whose ends are held by the clients and whose body is held by the server, as both sides see it.

A protocol asks its client for the ends and its server for the body. Neither can reach the other's half through them,
and what passes between is hidden states: tensors [B, T, H] with an attention mask [B, T].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy
import torch

from fedllm.core.errors import ModelError

if TYPE_CHECKING:
    from fedllm.core.work import Example


class Ends(Protocol):
    """The part before the body and the part behind it, with the task: what a client holds.

    Attributes:
        names: the trainable tensors of both; one that both use is one tensor with one name.
        device: where it is computed.
    """

    names: frozenset[str]
    device: torch.device

    def encode(self, params: Mapping[str, torch.Tensor], batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the body, [B, T, H] with its graph, and the mask, [B, T] uint8; T is the batch's longest."""
        ...

    def loss(
        self, params: Mapping[str, torch.Tensor], hidden: torch.Tensor, batch: Sequence[Example]
    ) -> tuple[torch.Tensor, int]:
        """The SUM of the task's losses on what came out of the body, with its graph, and the number of labels."""
        ...

    def drawn(self, batch: Sequence[Example], rng: numpy.random.Generator) -> list[Example]:
        """The batch as it is used this once: of a task with random masks, masked anew by `rng`."""
        ...


class Body(Protocol):
    """The layers in the middle: what the server holds.

    Attributes:
        names: its trainable tensors.
        width: H.
        device: where it is computed.
    """

    names: frozenset[str]
    width: int
    device: torch.device

    def __call__(self, params: Mapping[str, torch.Tensor], hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H] under a mask [B, T], with its graph; nothing in it is random."""
        ...


@dataclass(frozen=True)
class Halves:
    """Both sides of one cut."""

    ends: Ends
    body: Body


def halves(learner: object, first: int, last: int | None) -> Halves:
    """Cut a learner's model: layers first..last-1 (None: to the last) are the body.

    Raises:
        ModelError: the learner, its model or its adapter cannot be cut.
        ConfigError: the cut lies outside the layers.
    """
    found = getattr(learner, "split", None)
    if found is None:
        raise ModelError(
            "This model cannot be cut in two: its learner has no 'split'.", "Allowed: transformers with a head."
        )
    return found(first, last)

"""Function learner - any differentiable function of named tensors, for exact tests and for models of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedllm.core.errors import ModelError
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example, Groups, Places

Loss = Callable[[Tensors, Sequence[torch.Tensor]], torch.Tensor]
"""loss(params, examples) -> the SUM of the losses of the examples, a differentiable scalar."""


class FunctionLearner:
    """Implements :class:`fedllm.core.work.Learner` for `loss(params, examples)`.

    Args:
        loss: the sum of the losses of some examples, for one client.
        initial: first values.
        encode: makes a tensor of a row; by default the row's "x".
        outputs: outputs(params, examples) -> logits [n, C], where soft targets are learnt from.
    """

    score_names = ("loss",)
    higher_is_better = False
    width_limit: int | None = None
    device = torch.device("cpu")

    def __init__(
        self,
        loss: Loss,
        initial: Tensors,
        encode: Callable[[Mapping[str, Any]], torch.Tensor] | None = None,
        outputs: Loss | None = None,
    ) -> None:
        self.loss, self._initial, self._outputs = loss, initial, outputs
        self.encode = encode or (lambda row: torch.as_tensor(row["x"], dtype=torch.float32))
        self._bound: Tensors | None = None
        self.notes: list[str] = []

    def initial(self) -> Tensors:
        """First values."""
        return {name: tensor.clone() for name, tensor in self._initial.items()}

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """One example per row."""
        return [Example({"x": self.encode(row)}, torch.zeros(0), 1, 1) for row in rows]

    @contextmanager
    def using(
        self, params: Tensors | None, seeds: Sequence[int] | None = None, places: Places = None
    ) -> Iterator[None]:
        """Bind stacked parameters; None means the first values."""
        before = self._bound
        self._bound = params if params is not None else {n: t.unsqueeze(0) for n, t in self._initial.items()}
        try:
            yield
        finally:
            self._bound = before

    def losses(self, groups: Groups) -> torch.Tensor:
        """The sum of the losses of each client, [K]."""
        bound = self._bound or {}
        apart = {name: tensor.unbind(0) for name, tensor in bound.items()}  # one backward step for all, not one each
        return torch.stack(
            [
                self.loss({name: held[k].clone() for name, held in apart.items()}, [e.inputs["x"] for e in group])
                if group
                else next(iter(bound.values())).sum() * 0.0
                for k, group in enumerate(groups)
            ]
        )

    def outputs(self, groups: Groups) -> list[torch.Tensor]:
        """Logits of every example, client after client."""
        if self._outputs is None:
            raise ModelError("This function learner has no outputs.", action="Give it the argument 'outputs'.")
        bound, found = self._bound or {}, []
        for k, group in enumerate(groups):
            if group:
                params = _own(bound, k)
                found += list(self._outputs(params, [e.inputs["x"] for e in group]))
        return found

    def hidden(self, *_: Any) -> list[torch.Tensor]:
        """A function has no layers."""
        raise ModelError("A function learner has no hidden states.")

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """loss and examples of every example."""
        bound = self._bound or {}
        return [
            {"loss": float(self.loss(_own(bound, k), [e.inputs["x"]])), "examples": 1.0}
            for k, group in enumerate(groups)
            for e in group
        ]

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """The mean loss."""
        n = counts.get("examples", 0.0)
        return {"loss": counts["loss"] / n if n else None}

    def generate(self, *_: Any) -> list[list[str]]:
        """A function writes no text."""
        raise ModelError("A function learner cannot write text.")

    def embed(self, *_: Any) -> list[torch.Tensor]:
        """A function reads no text."""
        raise ModelError("A function learner cannot embed text.")


def _own(bound: Tensors, client: int) -> Tensors:
    """One client's parameters in memory of their own: where it lies can show in a product's last bits."""
    return {name: tensor[client].clone() for name, tensor in bound.items()}

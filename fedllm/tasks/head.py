"""Head - a language model's logits: only where there are labels, and of a large vocabulary a stretch at a time.

Hidden states without a label are left out in front of the output layer, and in front of the last block's feed-forward
part, behind which no position looks at another. Where the logits of a pass would still be many numbers, the trunk runs
once, and what is behind it runs on one stretch of positions after another: the model's own code with its trunk
replaced, so that what it does behind the output layer (scaling, capping) is done. All is tried out when the model is
loaded, and not used where it gives other logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedllm.models.adapters.attach import Adapted
from fedllm.models.structure import last_feed_forward

STRETCH = 2**25
"""Most logits that are there at once: 128 MiB in float32, and as much again for their slopes."""
Select = tuple[torch.Tensor, torch.Tensor]
"""Row and position of each hidden state that is wanted, [M] each."""
Summed = Callable[[torch.Tensor, slice], torch.Tensor]
IN_FRONT = ("prompt", "prefix.")
"""Names of what is trained in front of the trunk."""


class Head:
    """What stands between a model's hidden states and its logits.

    Args:
        adapted: the model with its adapter.
        both_ways: whether it has an encoder and a decoder.
        vocabulary: token ids below this may be used to try it out; None where the logits are not those of tokens.

    Attributes:
        selective: logits are computed only where they are wanted.
        narrow: so is the last block's feed-forward part.
        stretched: they can be computed from hidden states alone, a stretch at a time.
        notes: what a user should know.
    """

    def __init__(self, adapted: Adapted, both_ways: bool, vocabulary: int | None) -> None:
        self.adapted, self.model, self.notes = adapted, adapted.model, list[str]()
        self.selective = self.narrow = self.stretched = False
        self._chosen: Select | None = None
        self._needed: Select | None = None
        self._shape: Sequence[int] = ()
        self._output: Any = None
        self._width = 1
        if vocabulary is None or self.model.get_output_embeddings() is None:
            return
        ids = torch.arange(4, device=adapted.device).view(2, 2) % max(1, vocabulary - 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if both_ways:
            inputs["decoder_input_ids"] = ids
        chosen = torch.tensor([0, 1, 1], device=adapted.device), torch.tensor([1, 0, 1], device=adapted.device)
        with torch.no_grad():
            whole = self.model(**inputs).logits[chosen]
            self._width = whole.shape[-1]
            self.selective = self._selects(inputs, chosen, whole)
            self.narrow = self.selective and self._narrows(inputs, chosen, whole)
            self.stretched = self.selective and not both_ways and self._continues(inputs, chosen, whole)

    def splits(self, count: int) -> bool:
        """Whether the logits of `count` positions are too many to be there at once, and need not be."""
        return self.stretched and count > self.positions

    @property
    def positions(self) -> int:
        """How many positions are one stretch."""
        return max(1, STRETCH // self._width)

    @contextmanager
    def only(self, rows: torch.Tensor, positions: torch.Tensor, needed: Select | None = None) -> Iterator[None]:
        """Inside, the output layer gets the hidden states at these places alone: logits are [M, V].

        Args:
            rows: the row of each, [M].
            positions: its position, [M].
            needed: where hidden states are needed; at the same places where it is not given.
        """
        before = self._chosen, self._needed
        self._chosen, self._needed = (rows, positions), needed or (rows, positions)
        try:
            yield
        finally:
            self._chosen, self._needed = before

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Inside, logits are those of all positions."""
        before = self._chosen, self._needed
        self._chosen = self._needed = None
        try:
            yield
        finally:
            self._chosen, self._needed = before

    def hidden(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the trunk gives at these places, [M, H]; the output layer runs on the first one alone."""
        found: list[Any] = []
        handle = self._trunk.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            with (
                self.only(rows[:1], positions[:1], needed=(rows, positions)),
                self.adapted.at(rows[:1], inputs["input_ids"].shape[0]),
            ):
                self.adapted.call(inputs)
        finally:
            handle.remove()
        self._output = None if isinstance(found[0], tuple) else type(found[0])
        return at(found[0][0], rows, positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of hidden states [M, H] as :meth:`hidden` gave them."""
        trunk, states = self._trunk, hidden[None]
        output = (states,) if self._output is None else self._output(last_hidden_state=states)
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        before = trunk.__dict__.get("forward")
        trunk.forward = lambda *args, **options: output
        try:
            with self.everything():
                return self.model(input_ids=ids).logits[0]
        finally:
            del trunk.forward
            if before is not None:
                trunk.forward = before

    def sums(self, hidden: torch.Tensor, owner: torch.Tensor, summed: Summed) -> torch.Tensor:
        """By row the sum of what `summed` makes of the logits, [rows]; differentiable by `hidden`.

        Args:
            hidden: hidden states [M, H]; see :meth:`hidden`.
            owner: the row that each counts for, [M].
            summed: the logits of a stretch and which of the M they are -> sums by row, [rows].
        """
        return _Stretched.apply(hidden, owner, self, summed)  # pyright: ignore[reportReturnType]

    def cut(self, count: int) -> list[slice]:
        """The stretches of `count` positions."""
        return [slice(at, min(at + self.positions, count)) for at in range(0, count, self.positions)]

    @property
    def _trunk(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix)

    def _selects(self, inputs: dict[str, torch.Tensor], chosen: Select, whole: torch.Tensor) -> bool:
        """Select in front of the output layer; works where everything behind it is element-wise."""
        if self._tried(
            [self.model.get_output_embeddings().register_forward_pre_hook(self._hook)], inputs, chosen, whole
        ):
            return True
        self.notes.append("Logits are computed at every position: this model's output layer cannot be restricted.")
        return False

    def _narrows(self, inputs: dict[str, torch.Tensor], chosen: Select, whole: torch.Tensor) -> bool:
        """Select in front of the last feed-forward part, where nothing in it is trained or computed a second time."""
        name = last_feed_forward(self.model)
        if name is None or self.adapted.recomputes or any(n.startswith(f"{name}.") for n in self.adapted.initial()):
            return False
        part = self.model.get_submodule(name)
        hooks = part.register_forward_pre_hook(self._narrowed), part.register_forward_hook(self._widened)
        return self._tried(hooks, inputs, chosen, whole)

    def _tried(
        self, hooks: Sequence[Any], inputs: dict[str, torch.Tensor], chosen: Select, whole: torch.Tensor
    ) -> bool:
        """Whether hooks leave the logits as they are; they are taken off where they do not."""
        try:
            with self.only(*chosen):
                found = self.model(**inputs).logits
        except (RuntimeError, IndexError, ValueError, TypeError):
            found = whole[:0]
        if same(found, whole):
            return True
        for hook in hooks:
            hook.remove()
        return False

    def _continues(self, inputs: dict[str, torch.Tensor], chosen: Select, whole: torch.Tensor) -> bool:
        """Whether logits can be had from hidden states alone, and nothing behind the trunk is trained."""
        prefix = str(self.model.base_model_prefix)
        if self.adapted.settings.kind == "full" or getattr(self.model, prefix, self.model) is self.model:
            return False
        if not all(name.startswith((f"{prefix}.", *IN_FRONT)) for name in self.adapted.initial()):
            return False
        try:
            return same(self.logits(self.hidden(inputs, *chosen)), whole)
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError):
            return False

    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._chosen is None else (at(args[0], *self._chosen), *args[1:])

    def _narrowed(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._needed is None:
            return None
        self._shape = args[0].shape
        return at(args[0], *self._needed), *args[1:]

    def _widened(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Zeros elsewhere: nobody looks there."""
        if self._needed is None:
            return None
        whole = output.new_zeros(self._shape)
        return whole.flatten(0, 1).index_add_(0, _place(whole, *self._needed), output).view(self._shape)


def at(states: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """States [N, T, H] at places that differ, [M, H]: states[rows, positions], but its backward pass is faster."""
    return states.flatten(0, 1).index_select(0, _place(states, rows, positions))


def _place(states: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Where (row, position) is when the rows of states [N, T, H] lie one behind the other."""
    return rows * states.shape[1] + positions


def same(found: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return found.shape == whole.shape and torch.allclose(found, whole, rtol=1e-3, atol=1e-3)


class _Stretched(torch.autograd.Function):
    """The slopes of a stretch are found while its logits are there, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, owner: torch.Tensor, head: Head, summed: Summed) -> Any:
        wanted = ctx.needs_input_grad[0]
        slopes: list[torch.Tensor] = []
        total: Any = 0.0
        for at in head.cut(len(hidden)):
            part = hidden[at].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                found = summed(head.logits(part), at)
                slopes += torch.autograd.grad(found.sum(), part) if wanted else ()
            total = total + found.detach()
        ctx.save_for_backward(torch.cat(slopes) if wanted else hidden[:0], owner)
        return total

    @staticmethod
    def backward(ctx: Any, *by_row: torch.Tensor) -> Any:
        slopes, owner = ctx.saved_tensors
        return slopes * by_row[0][owner, None].to(slopes.dtype), None, None, None

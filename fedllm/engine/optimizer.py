"""Optimizer - AdamW and SGD over the blocks of a stack: one call a step, however many clients and tensors there are.

It works element by element, so that clients do not meet in it. These are the functions behind torch.optim's classes;
the classes are left out because a step of a small adapter takes less time than their book-keeping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.engine.stack import Blocks, Stack, corner, rows_of

FUSED = ("cpu", "cuda")
"""Devices on which torch takes AdamW's step in one go."""
Memory = dict[torch.dtype, dict[str, torch.Tensor]]
"""What is remembered between steps, by number type: moments [K, P], and the scalar `step` that all clients share."""


class Optimizer:
    """The optimiser of a stack.

    Args:
        train: its kind and settings.
        memory: what it goes on from; None begins afresh.
    """

    def __init__(self, train: Train, memory: Memory | None = None) -> None:
        self.train, self.memory = train, {} if memory is None else memory

    @classmethod
    def going_on(cls, train: Train, stack: Stack, moments: Sequence[Tensors]) -> Optimizer:
        """With what :meth:`kept` gave for each client; clients of one pass have taken equally many steps."""
        first, memory = moments[0], Memory()
        for key in sorted({name.split(".", 1)[0] for name in first} - {"step"}):
            trees = [{name: tree[f"{key}.{name}"] for name in stack.places} for tree in moments]
            for dtype, block in stack.like(trees).items():
                memory.setdefault(dtype, {})[key] = block
        if "step" in first:
            for dtype, held in memory.items():
                held["step"] = first["step"].to(_counted_on(stack.blocks[dtype]), copy=True)
        return cls(train, memory)

    def rows(self, chosen: list[int]) -> Optimizer:
        """For some of the clients."""
        memory = {
            dtype: {key: rows_of(value, chosen) if value.dim() else value for key, value in held.items()}
            for dtype, held in self.memory.items()
        }
        return Optimizer(self.train, memory)

    def step(self, blocks: Blocks, grads: Blocks, rate: float) -> None:
        """Move blocks against their gradients, in place."""
        for dtype, block in blocks.items():
            move = self._sgd if self.train.optimizer == "sgd" else self._adamw
            move(block, grads[dtype], self.memory.setdefault(dtype, {}), rate)

    def kept(self, stack: Stack, row: int, like: Tensors) -> Tensors:
        """One client's memory, in the shapes of its tensors: `KEY.NAME`, and `step`."""
        found: Tensors = {}
        for name, place in stack.places.items():
            for key, value in self.memory.get(place.dtype, {}).items():
                if key == "step":
                    found["step"] = value.cpu().clone()
                else:
                    own = place.view({place.dtype: value})[(row, *corner(like[name].shape))]
                    found[f"{key}.{name}"] = own.to("cpu", copy=True)
        return found

    def _adamw(self, block: torch.Tensor, grad: torch.Tensor, held: dict[str, torch.Tensor], rate: float) -> None:
        if not held:
            held["step"] = torch.zeros((), device=_counted_on(block))
            held["exp_avg"], held["exp_avg_sq"] = torch.zeros_like(block), torch.zeros_like(block)
        adamw(
            [block],
            [grad],
            [held["exp_avg"]],
            [held["exp_avg_sq"]],
            [],
            [held["step"]],
            foreach=False,
            fused=_fused(block),
            amsgrad=False,
            beta1=self.train.betas[0],
            beta2=self.train.betas[1],
            lr=rate,
            weight_decay=self.train.weight_decay,
            eps=self.train.eps,
            maximize=False,
        )

    def _sgd(self, block: torch.Tensor, grad: torch.Tensor, held: dict[str, torch.Tensor], rate: float) -> None:
        momentum = [held.get("momentum_buffer")]
        sgd(
            [block],
            [grad],
            momentum,
            foreach=False,
            weight_decay=self.train.weight_decay,
            momentum=self.train.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if momentum[0] is not None:
            held["momentum_buffer"] = momentum[0]


def _fused(block: torch.Tensor) -> bool:
    return block.device.type in FUSED


def _counted_on(block: torch.Tensor) -> torch.device:
    """Where AdamW counts the steps of a block: it reads the count there."""
    return block.device if _fused(block) else torch.device("cpu")

"""Stepper - one optimiser over named tensors that a protocol steps itself, with a memory that can be stored.

Where a protocol computes gradients on its own (split learning, pipelines), the steps are torch's, by the same settings
as `client.fit`, and what the optimiser remembers comes out as tensors: for a private store or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedllm.core.tensors import Tensors
from fedllm.core.train import Train


class Stepper:
    """AdamW or SGD over copies of some tensors.

    Args:
        train: optimiser, its options, and the largest norm of a gradient.
        params: where to begin; copied to float32 or better.
        moments: what :meth:`moments` gave before; {} begins afresh.
        device: where the copies live.

    Attributes:
        params: the leaves, by name.
    """

    def __init__(
        self,
        train: Train,
        params: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.train = train
        self.params: Tensors = {
            name: tensor.detach().to(device, torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in params.items()
        }
        leaves: list[torch.Tensor] = [leaf.requires_grad_() for leaf in self.params.values()]
        leaves = leaves or [torch.zeros(0, requires_grad=True)]  # nothing to train: torch wants a list all the same
        self._optimizer: torch.optim.Optimizer
        if train.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                leaves, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
            )
        else:
            self._optimizer = torch.optim.AdamW(
                leaves, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
            )
        for name, value in (moments or {}).items():
            key, _, owner = name.partition(".")
            leaf = self.params[owner]
            self._optimizer.state[leaf][key] = value.clone() if key == "step" else value.to(leaf.device, copy=True)

    def step(self, grads: Mapping[str, torch.Tensor], rate: float) -> None:
        """One step at learning rate `rate`; `train.clip_norm` bounds the norm over all of `grads`."""
        for name, leaf in self.params.items():
            leaf.grad = grads[name].detach().to(leaf.device, leaf.dtype, copy=True)
        if self.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.params.values()), self.train.clip_norm)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def values(self) -> Tensors:
        """The tensors as they are now: copies on the CPU."""
        return {name: leaf.detach().to("cpu", copy=True) for name, leaf in self.params.items()}

    def moments(self) -> Tensors:
        """The optimiser's memory as `KEY.NAME` tensors on the CPU: copies."""
        return {
            f"{key}.{name}": value.detach().to("cpu", copy=True)
            for name, leaf in self.params.items()
            for key, value in self._optimizer.state.get(leaf, {}).items()
            if isinstance(value, torch.Tensor)
        }

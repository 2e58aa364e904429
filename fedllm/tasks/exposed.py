"""Exposed - how much the inputs of a classifier's last layer tell of the texts, for defences that hide some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedllm.core.errors import ConfigError
from fedllm.core.work import Exposure, Groups
from fedllm.models.structure import input_embedding, last_layer

if TYPE_CHECKING:
    from fedllm.tasks.learner import TransformerLearner


def exposure(learner: TransformerLearner, groups: Groups) -> Exposure:
    """One backward pass for every input of the last layer: cheap for small widths, and meant for single steps.

    Raises:
        ConfigError: logits that do not come out of a classifier's linear layer.
    """
    model = learner.loaded.model
    name = None if learner.task.per_token else last_layer(model)
    if name is None:
        raise ConfigError(
            f"The task {learner.task.kind} with this model has no classifier's last layer.",
            "Its inputs are what is looked at.",
            "sequence-classification",
        )
    held: dict[str, torch.Tensor] = {}

    def shown(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        held["x"] = output.detach().requires_grad_()
        return held["x"]

    def given(module: nn.Module, inputs: Any) -> None:
        held["r"] = inputs[0]

    handles = [
        input_embedding(model).register_forward_hook(shown),
        model.get_submodule(name).register_forward_pre_hook(given),
    ]
    try:
        learner.outputs(groups)
    finally:
        for handle in handles:
            handle.remove()
    inputs, x = held["r"], held["x"]
    slopes = torch.zeros_like(inputs)
    for unit in range(inputs.shape[1]):
        (slope,) = torch.autograd.grad(inputs[:, unit].sum(), x, retain_graph=True)
        slopes[:, unit] = slope.flatten(1).norm(dim=1)
    return Exposure(f"{name}.weight", inputs.detach().cpu(), slopes.cpu())

"""Split learning - both halves of one training step through a cut model: the client's ends, and the server's trunk.

    client: hidden states a = E(x)            --a-->   trunk.forward: h = S(a)
    client: `through_back`: loss, dL/dh       --dL/dh-->   trunk.backward: dL/da, and dS added to this step's mean
    client: `with_front`: dE + dO             <--dL/da--

(Gupta and Raskar, JNCA 2018; the U shape, in which labels stay at the client: Vepakomma et al., arXiv:1812.00564.)
What comes from the other side is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.blocks.stepper import Stepper
from fedllm.core.errors import RoundFailed, UploadRejected
from fedllm.core.message import Dense, Message, Upload
from fedllm.core.server import Answer, Server
from fedllm.core.split import Body, Ends
from fedllm.core.tensors import Tensors, finite
from fedllm.core.train import Train
from fedllm.core.work import Example

# -- the client's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackPass:
    """What O gave: gradients of the ends, the gradient of the hidden states, the sum of the losses, its labels."""

    grads: Tensors
    upstream: torch.Tensor
    loss: float
    labels: int


def through_back(ends: Ends, params: Tensors, hidden: torch.Tensor, batch: Sequence[Example]) -> BackPass:
    """The mean loss over the batch's labels, given what came out of the body, and its gradients.

    Raises:
        RoundFailed: the loss is not finite.
    """
    leaf = hidden.detach().requires_grad_()
    total, labels = ends.loss(params, leaf, batch)
    if not bool(torch.isfinite(total)):
        raise RoundFailed(
            "A batch gave a loss that is not finite.",
            action="Lower train.lr, set train.clip_norm, or look at that client's data.",
        )
    *found, upstream = torch.autograd.grad(total / labels, [*params.values(), leaf], allow_unused=True)
    return BackPass(_named(params, found), upstream, float(total.detach()), labels)


def with_front(params: Tensors, grads: Tensors, hidden: torch.Tensor, upstream: torch.Tensor) -> Tensors:
    """The gradients of O (`grads`) and of E together; a weight that both use gets their sum, an unused one zeros."""
    found: Tensors = {}
    if hidden.requires_grad:
        leaves = list(params.values())
        found = _named(params, torch.autograd.grad(hidden, leaves, upstream.to(hidden), allow_unused=True))
    both = {name: [g[name] for g in (grads, found) if name in g] for name in params}
    return {name: sum(parts[1:], parts[0]) if parts else torch.zeros_like(params[name]) for name, parts in both.items()}


def sent(message: Message, part: str, like: torch.Tensor) -> torch.Tensor:
    """The hidden states or gradient that the server sent, which must look like `like`.

    Raises:
        RoundFailed: missing, of another shape, or not finite.
    """
    found = named(message, part, "hidden")
    if found is None or found.shape != like.shape or finite({part: found}):
        raise RoundFailed(f"The server sent no '{part}' that is finite and of the shape {tuple(like.shape)}.")
    return found.to(like.device)


# -- the server's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """An open pass through the body: what went in, what came out."""

    given: torch.Tensor
    out: torch.Tensor


class Trunk:
    """The body with its optimiser.

    Args:
        body: the server's part of the model.
        train: its optimiser.
        params: its values.
        moments: the optimiser's memory; {} or None begins afresh.

    Attributes:
        stepper: holds the values.
        clients: whose gradients are in the mean of the coming step.
        taken: steps taken.
    """

    def __init__(self, body: Body, train: Train, params: Tensors, moments: Mapping[str, torch.Tensor] | None) -> None:
        self.body, self.stepper = body, Stepper(train, params, moments, body.device)
        self._total: Tensors = {}
        self.clients, self.taken = 0, 0

    def forward(self, upload: Upload) -> Pass:
        """h = S(a) for `activations/hidden` [B, T, H] under `mask/mask` [B, T]; what came in is a leaf.

        Raises:
            UploadRejected: a or the mask is not what was agreed, or h is not finite.
        """
        hidden, mask = named(upload, "activations", "hidden"), named(upload, "mask", "mask")
        if hidden is None or not hidden.is_floating_point() or hidden.dim() != 3 or not hidden.numel():
            raise UploadRejected("A message has no activations [B, T, H].")
        if hidden.shape[2] != self.body.width:
            raise UploadRejected(f"Activations are {hidden.shape[2]} wide.", f"Expected {self.body.width}.")
        if mask is None or mask.dtype != torch.uint8 or mask.shape != hidden.shape[:2]:
            raise UploadRejected("A message has no mask [B, T] of bytes for its activations.")
        if int(mask.max()) > 1 or not bool(mask.any(1).all()):
            raise UploadRejected("A mask has other values than 0 and 1, or a row without a 1.")
        given = hidden.to(self.body.device).requires_grad_()
        out = self.body(self.stepper.params, given, mask)
        if finite({"h": out.detach()}):
            raise UploadRejected("The body turns these activations into values that are not finite.")
        return Pass(given, out)

    def backward(self, opened: Pass | None, upload: Upload) -> torch.Tensor:
        """dL/da for `gradient/hidden` = dL/dh; dS counts in the mean of the coming step.

        Raises:
            UploadRejected: no such pass is open, another shape, or a gradient that is not finite comes of it.
        """
        upstream = named(upload, "gradient", "hidden")
        if opened is None or upstream is None or upstream.shape != opened.out.shape:
            raise UploadRejected("A message has no gradient that fits an open batch.")
        leaves = self.stepper.params
        found = torch.autograd.grad(
            opened.out, [opened.given, *leaves.values()], upstream.to(opened.out), allow_unused=True
        )
        grads = _named(leaves, found[1:])
        if finite({"given": found[0], **grads}):
            raise UploadRejected("A gradient makes the body's gradients not finite.")
        for name, grad in grads.items():
            self._total[name] = self._total[name] + grad if name in self._total else grad
        self.clients += 1
        return found[0]

    def step(self, rate: float) -> None:
        """Step on the mean over the clients whose gradients came; without any the body stays as it is."""
        if not self.clients:
            return
        leaves = self.stepper.params.items()
        mean = {n: self._total[n] / self.clients if n in self._total else torch.zeros_like(p) for n, p in leaves}
        self.stepper.step(mean, rate)
        self._total, self.clients, self.taken = {}, 0, self.taken + 1


class Refusing:
    """A context in which an answer that cannot be used (:class:`UploadRejected`) is counted and its session ended."""

    def __init__(self, server: Server, answer: Answer) -> None:
        self.server, self.answer = server, answer

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> bool:
        """Swallow a refusal, and nothing else."""
        if not isinstance(fault, UploadRejected):
            return False
        self.server.reject(self.answer.client, str(fault))
        if self.answer.session is not None:
            self.server.close([self.answer.session])
        return True


def named(message: Message, part: str, name: str) -> torch.Tensor | None:
    """One tensor of a dense part; None where it is not there."""
    found = message.parts.get(part)
    return found.tensors.get(name) if isinstance(found, Dense) else None


def _named(leaves: Mapping[str, torch.Tensor], grads: Sequence[torch.Tensor | None]) -> Tensors:
    """Gradients by name, unused leaves left out."""
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}

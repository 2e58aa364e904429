"""Glass - what whoever holds the model can compute: the attacker's side of a reconstruction.

A server that wants to know a client's rows knows the base model, the tensors it has sent and the task. So it can make
the gradient that any guess of the rows would have given: of rows, or of vectors in the place of their tokens, which can
be moved by the gradient's own gradient.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.core.errors import ConfigError
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example
from fedllm.models.structure import input_embedding, last_layer
from fedllm.tasks.learner import TransformerLearner

Row = Mapping[str, Any]


class Glass:
    """A model with the trainable tensors that a client was sent.

    Args:
        learner: base model, adapter and task.
        params: what was sent, by name.
        frozen: the trainable tensors that do not move.

    Attributes:
        table: the vectors of all tokens, [V, d].
        table_name: their name among the trainable tensors; None where they are frozen.
        tied: whether the same vectors make the logits.
    """

    def __init__(self, learner: TransformerLearner, params: Tensors, frozen: Tensors) -> None:
        self.learner, self.params, self.frozen = learner, params, frozen
        self.model: Any = learner.loaded.model
        self.tokenizer: Any = learner.tokenizer
        self.embedding: Any = input_embedding(self.model)
        if not isinstance(self.embedding, nn.Embedding):
            raise ConfigError("The model reads no tokens.", "Reconstruction is of texts.", action="Leave it out.")
        weight = self.embedding.weight
        self.table_name = next((n for n, p in self.model.named_parameters() if p is weight and n in params), None)
        self.table = (params[self.table_name] if self.table_name else weight).detach().float().cpu()
        output = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        self.tied = output is not None and output.weight is weight

    @property
    def kind(self) -> str:
        """The task's kind."""
        return self.learner.task.kind

    @property
    def family(self) -> str:
        """The model's family."""
        return self.learner.loaded.family

    @property
    def activation(self) -> str:
        """The name of the activation between the layers of a feed-forward network, as the model's config has it."""
        config = self.model.config
        return str(getattr(config, "activation_function", None) or getattr(config, "hidden_act", "gelu"))

    @property
    def special(self) -> frozenset[int]:
        """Tokens that are in every text, and tell nothing."""
        return frozenset(self.tokenizer.all_special_ids)

    @property
    def begin(self) -> list[int]:
        """The tokens that every text begins with."""
        start = self.tokenizer.bos_token_id
        return [] if start is None else [int(start)]

    @property
    def classes(self) -> int:
        """The number of classes; 0 where labels are tokens."""
        return 0 if self.learner.task.per_token else len(self.learner.task.labels or ())

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return self.learner.task.settings.max_length

    def class_chances(self, examples: Sequence[Example]) -> torch.Tensor:
        """The mean probability of each class over some texts, [C]."""
        stack = {n: t.to(self.learner.device)[None] for n, t in {**self.frozen, **self.params}.items()}
        with torch.no_grad(), self.learner.using(stack):
            return torch.stack(self.learner.outputs([examples])).float().softmax(-1).mean(0).cpu()

    def last_bias(self) -> str:
        """The name of the bias of the layer that makes the class logits.

        Raises:
            ConfigError: there is none among the trainable tensors.
        """
        name = None if self.learner.task.per_token else last_layer(self.model)
        if name is None or f"{name}.bias" not in self.params:
            raise ConfigError(
                f"The task {self.kind} with this model uploads no layer of class logits with a bias.",
                "Labels are read from such a layer.",
                action="Choose task.kind=sequence-classification, or leave this attack out.",
            )
        return f"{name}.bias"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Rows as the client prepares them."""
        return self.learner.prepare(rows)

    def starts(self, tokens: Sequence[int]) -> list[int]:
        """Those tokens that may begin a sentence: a capital letter after a space, or at the beginning."""
        found = []
        for token in tokens:
            text = self.tokenizer.decode([token])
            if text.strip()[:1].isupper():
                found.append(token)
        return found

    # -- gradients ----------------------------------------------------------------------------------------------------

    def gradient(
        self,
        examples: Sequence[Example],
        vectors: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
        names: Sequence[str] | None = None,
        create_graph: bool = False,
    ) -> Tensors:
        """The gradient of the mean loss at what was sent.

        Args:
            examples: as a client would have them.
            vectors: [rows, T, d] in the place of the tokens' vectors; what is behind a row's end does not matter.
            labels: [rows, C] logits of labels in the place of the examples' (classification).
            shares: [rows], what each row's loss counts; None for 1 each.
            names: of which tensors; None for all that were sent.
            create_graph: so that it can be differentiated again.

        Returns:
            name -> tensor; of a tensor that the loss does not reach, zeros.
        """
        wanted = list(self.params) if names is None else list(names)
        stack = {n: t.detach().to(self.learner.device).float()[None].requires_grad_(n in wanted)
                 for n, t in self.params.items()}  # fmt: skip
        still = {n: t.to(self.learner.device)[None] for n, t in self.frozen.items() if n not in stack}
        targets = sum(example.targets for example in examples)
        kernel = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()  # others have no second derivative
        with torch.enable_grad(), self.learner.using({**still, **stack}), self._seeing(vectors), kernel:
            losses = self._losses(examples, labels)
            loss = (losses if shares is None else losses * shares.to(losses.device)).sum() / max(targets, 1)
            found = torch.autograd.grad(loss, [stack[n] for n in wanted], create_graph=create_graph, allow_unused=True)
        pairs = zip(wanted, found, strict=True)
        return {n: torch.zeros_like(stack[n][0]) if g is None else g[0] for n, g in pairs}  # pyright: ignore[reportUnnecessaryComparison]

    def vectors(self, examples: Sequence[Example]) -> torch.Tensor:
        """The vectors of the examples' tokens, [rows, T, d], padded with zeros."""
        longest = max(len(example.inputs["input_ids"]) for example in examples)
        found = torch.zeros(len(examples), longest, self.table.shape[1])
        for row, example in enumerate(examples):
            ids = example.inputs["input_ids"]
            found[row, : len(ids)] = self.table[ids]
        return found

    def _losses(self, examples: Sequence[Example], labels: torch.Tensor | None) -> torch.Tensor:
        if labels is None:
            return self.learner.losses_by_row([examples])[0]
        logits = torch.stack(self.learner.outputs([examples])).float()
        return -(labels.to(logits.device).softmax(-1) * functional.log_softmax(logits, -1)).sum(-1)

    @contextmanager
    def _seeing(self, vectors: torch.Tensor | None) -> Generator[None]:
        """While the embedding gives these vectors, whatever the tokens."""
        if vectors is None:
            yield
            return

        def shown(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return vectors.to(output.device, output.dtype)

        handle = self.embedding.register_forward_hook(shown)
        try:
            yield
        finally:
            handle.remove()

    # -- a language model's opinion, as FILM asks for it --------------------------------------------------------------

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """The log-probability of the token after each position: [B, T] -> [B, T, V]."""
        stack = {n: t.to(self.learner.device)[None] for n, t in {**self.frozen, **self.params}.items()}
        ids = ids.to(self.learner.device)
        with torch.no_grad(), self.learner.using(stack), self.learner.head.everything():
            logits = self.learner.adapted.call({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            return functional.log_softmax(logits[:, -ids.shape[1] :].float(), -1).cpu()

    def gradient_norm(self, ids: torch.Tensor) -> float:
        """The norm of one inner tensor's gradient of a sentence's loss: the last trainable vector of the trunk."""
        labels = ids.clone()
        example = Example({"input_ids": ids}, labels, len(ids), max(len(ids) - 1, 1))
        return float(self.gradient([example], names=[self.inner])[self.inner].norm())

    @property
    def inner(self) -> str:
        """The tensor whose gradient's norm says how well a sentence is known: a norm of a late layer, or the last."""
        norms = [n for n, t in self.params.items() if t.dim() == 1 and "norm" in n.lower().replace("ln_", "norm_")]
        return (norms or list(self.params))[-1]

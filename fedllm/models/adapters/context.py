"""Context - soft words around the class names that a dual encoder's text tower reads (CoOp; Zhou et al., 2109.01134).

A class becomes [start, V_1 .. V_M, name, ".", end], with the name also in the middle or in front. The vectors take the
place of M ordinary words in the output of the token embedding, by a forward hook: positions, attention and the place
from which the text feature is taken are the tower's own. Stacked contexts [K, M, d] (or [K, C, M, d], one per class)
make K * C prompts of one pass, client after client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.core.seeds import torch_stream
from fedllm.core.tensors import Tensors
from fedllm.models.adapters.grouped import Binding
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded

NAME = "context"
SPREAD = 0.02
"""Standard deviation of a random context (CoOp, section 4.1)."""


@dataclass(frozen=True)
class Prompts:
    """The texts of C classes as tokens.

    Attributes:
        ids: [C, T], padded behind the end token.
        mask: [C, T], 1 at real tokens.
        places: [C, M], where the vectors of a context stand; M is 0 in texts of words alone.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        return Prompts(self.ids.to(device), self.mask.to(device), self.places.to(device))


class Context:
    """The context of a dual encoder.

    Args:
        loaded: the dual encoder.
        settings: tokens (M), position, per_class, words.
        classes: the class names in their order.
        seed: a random context is derived from it.

    Attributes:
        name: the tensor's name. With `per_class` the ordered class list is part of it, so that clients with another
            list are refused by name and not averaged row by row with wrong classes.
        initial: its first value, [M, d] or [C, M, d], float32.

    Raises:
        ModelError: the model has no text tower of CLIP's form.
        ConfigError: `per_class` without classes, or words that are no tokens.
    """

    def __init__(self, loaded: Loaded, settings: AdapterSettings, classes: Sequence[str], seed: int) -> None:
        self.loaded, self.settings, self.classes = loaded, settings, list(classes)
        table = text_embedding(loaded).weight.detach().float().cpu()
        words = None if settings.words is None else tokens_of(loaded, settings.words)
        if words == []:
            raise ConfigError(f"adapter.words='{settings.words}' has no tokens.", action="Give words, or null.")
        self.length, self.name = settings.tokens if words is None else len(words), NAME
        shape: tuple[int, ...] = (self.length, table.shape[1])
        if settings.per_class:
            self.name, shape = f"{NAME}.{digest(self.classes)}", (len(self.classes), *shape)
        if words is None:
            self.initial = torch.randn(shape, generator=torch_stream(seed, "init", NAME)) * SPREAD
        else:
            self.initial = table[words].expand(shape).clone()
        self._placeholder = _ordinary(loaded.tokenizer)
        self._places: torch.Tensor | None = None

    def prompts(self, names: Sequence[str]) -> Prompts:
        """The prompts of some classes, with ordinary words where the vectors of the context will stand.

        Raises:
            DataError: a name is longer than the room that the context leaves.
        """
        before, between = {
            "end": (self.length, 0),
            "middle": (self.length // 2, self.length - self.length // 2),
            "front": (0, self.length),
        }[self.settings.position]
        rows, places, stop = [], [], tokens_of(self.loaded, ".")
        for name in names:
            word = tokens_of(self.loaded, name)
            if not word:
                raise DataError(f"The class name '{name}' has no tokens.", action="Rename the class.")
            held = [self._placeholder]
            rows.append([*held * before, *word, *held * between, *stop])
            starts = range(1, 1 + before), range(1 + before + len(word), 1 + self.length + len(word))
            places.append([place for each in starts for place in each])
            check_room(self.loaded, name, len(rows[-1]) + 2, self.length)
        return Prompts(*framed(self.loaded, rows), torch.tensor(places, dtype=torch.long))

    @contextmanager
    def reading(self, prompts: Prompts) -> Iterator[None]:
        """Within it the text tower reads `prompts`, once per bound client, and the bound context stands in them."""
        before, self._places = self._places, prompts.places
        try:
            yield
        finally:
            self._places = before

    def attach(self, binding: Binding) -> Any:
        """Put the hook on the token embedding; returns its handle."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if self._places is None or binding.params is None or not self._places.numel():
                return output
            return splice(output, binding.params[self.name], self._places)

        return text_embedding(self.loaded).register_forward_hook(hook)

    def check(self, params: Tensors | None) -> None:
        """Raise :class:`ConfigError` where `params` hold the context of another class list."""
        other = [n for n in params or () if n.split(".")[0] == NAME and n != self.name]
        if other and self.settings.per_class:
            raise ConfigError(
                "The class contexts that were received belong to another list of classes.",
                f"Here it is, in this order: {', '.join(self.classes[:20])}.",
                action="Give every client the same task.labels in the same order, or set adapter.per_class=false.",
            )


def splice(embedded: torch.Tensor, context: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`embedded` [K * C, T, d] with `context` [K, M, d] or [K, C, M, d] at `places` [C, M]; keeps its number type."""
    clients, classes = context.shape[0], places.shape[0]
    result = embedded.view(clients, classes, *embedded.shape[1:]).clone()
    vectors = context if context.dim() == 4 else context.unsqueeze(1).expand(-1, classes, -1, -1)
    rows = torch.arange(classes, device=places.device).unsqueeze(1)
    result[:, rows, places] = vectors.to(embedded.dtype)
    return result.view(embedded.shape)


def digest(classes: Sequence[str]) -> str:
    """Eight hexadecimal digits of an ordered class list.

    Raises:
        ConfigError: there are no classes.
    """
    if not classes:
        raise ConfigError(
            "adapter.per_class=true needs the names of the classes.", action="Give task.labels, or data with labels."
        )
    return hashlib.sha256("\x1f".join(classes).encode()).hexdigest()[:8]


def text_embedding(loaded: Loaded) -> Any:
    """The token embedding of the text tower.

    Raises:
        ModelError: the model has no text tower of CLIP's form.
    """
    text = getattr(loaded.model, "text_model", None)
    found = getattr(getattr(text, "embeddings", None), "token_embedding", None)
    parts = ("vision_model", "text_projection", "visual_projection", "logit_scale")
    if loaded.kind != "dual-encoder" or found is None or not all(hasattr(loaded.model, part) for part in parts):
        raise ModelError(
            f"{loaded.name} ({loaded.family}) is not a dual encoder of CLIP's form.",
            "Allowed: CLIP models, for example openai/clip-vit-base-patch32 and toy:clip.",
            "toy:clip",
        )
    return found


def tokens_of(loaded: Loaded, text: str) -> list[int]:
    """The tokens of a piece of text; underscores are spaces, as in the names of classes."""
    return list(loaded.tokenizer(text.replace("_", " "), add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def room(loaded: Loaded) -> int:
    """Positions of the text tower."""
    return int(loaded.model.config.text_config.max_position_embeddings)


def check_room(loaded: Loaded, name: str, needed: int, context: int) -> None:
    """Raise :class:`DataError` where the prompt of a class does not fit the text tower."""
    if needed > room(loaded):
        raise DataError(
            f"The prompt of the class '{name}' has {needed} tokens, {context} of them context.",
            f"{loaded.name} reads {room(loaded)} at most.",
            action="Lower adapter.tokens, or shorten the name." if context else "Shorten the name or task.template.",
        )


def framed(loaded: Loaded, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [C, T] of token lists, each between the start and the end token and padded behind it."""
    tokenizer: Any = loaded.tokenizer
    longest = max(len(row) for row in rows) + 2
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row) + 2] = torch.tensor([tokenizer.bos_token_id, *row, tokenizer.eos_token_id])
        mask[number, : len(row) + 2] = 1
    return ids, mask


def check_end(loaded: Loaded) -> None:
    """Raise :class:`ModelError` where the text tower would not take its feature from the end token.

    Its configuration names that token; of old files, which say 2, transformers takes the highest token of a text.
    """
    tokenizer: Any = loaded.tokenizer
    stated, end = loaded.model.config.text_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)
    no_frame = end is None or tokenizer.bos_token_id is None
    if no_frame or (stated == 2 and end != len(tokenizer) - 1) or stated not in (2, end):
        raise ModelError(
            f"The text tower of {loaded.name} takes its feature from token {stated}, and texts end with token {end}.",
            action="Use the tokenizer that belongs to the model.",
        )


def _ordinary(tokenizer: Any) -> int:
    """A token without a meaning of its own; its vector is replaced."""
    special = set(tokenizer.all_special_ids)
    return next(number for number in range(len(tokenizer)) if number not in special)

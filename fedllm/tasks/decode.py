"""Decode - continue prompts with a different adapter per client in one pass.

transformers' `generate` draws from the global random stream and knows neither grouped rows nor a bound prefix, so the
plain loop is written here: greedy, or sampling with a seeded stream for every prompt of every client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedllm.core.errors import ModelError
from fedllm.core.seeds import torch_stream
from fedllm.models.adapters.attach import Adapted
from fedllm.models.structure import is_encoder_decoder
from fedllm.tasks.template import Template


def continue_prompts(
    adapted: Adapted,
    prompts: Sequence[Sequence[str]],
    max_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    template: Template | None = None,
) -> list[list[str]]:
    """Continuations of each client's prompts, without the prompts; ends at the end-of-sequence token.

    Args:
        adapted: the model, inside its `using` context.
        prompts: texts by client.
        max_tokens: most new tokens.
        temperature: 0 is greedy; above it, sampling from the softmax at that temperature.
        seeds: one per client.
        template: what rendered the prompts of a causal model; its chat prompts get no special tokens, as in training,
            and its end of a turn ends a text.

    Raises:
        ModelError: the model writes no text, or does not read as many tokens as prompt and continuation have.
    """
    rows = max((len(group) for group in prompts), default=0)
    if rows == 0:
        return [[] for _ in prompts]
    if adapted.loaded.kind not in ("causal-lm", "seq2seq"):
        raise ModelError(f"{adapted.loaded.name} was loaded for {adapted.loaded.kind} and cannot write text.")
    tokenizer = adapted.loaded.tokenizer
    flat = [group[i] if i < len(group) else "." for group in prompts for i in range(rows)]
    causal = adapted.loaded.kind == "causal-lm"
    chat = template if causal else None
    ready = [_has_start(tokenizer, text) or (chat is not None and chat.rendered(text)) for text in flat]
    encoded = [tokenizer(t, add_special_tokens=not done)["input_ids"] for t, done in zip(flat, ready, strict=True)]
    if causal:
        encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]
        encoded = [ids or [_first_token(tokenizer)] for ids in encoded]
    _check_length(adapted, max(len(ids) for ids in encoded), max_tokens)
    picker = _Picker(temperature, [torch_stream(seed, "prompt", row) for seed in seeds for row in range(rows)])
    ends = _ends(adapted, chat)
    with torch.no_grad():
        loop = _encoder_decoder if is_encoder_decoder(adapted.model) else _decoder
        written = loop(adapted, encoded, max_tokens, picker, ends)
    texts = [tokenizer.decode(_until_end(ids, ends), skip_special_tokens=True) for ids in written]
    return [texts[k * rows : k * rows + len(group)] for k, group in enumerate(prompts)]


def context(adapted: Adapted) -> int | None:
    """The most real tokens that the model reads at once; None where its positions have no end.

    Raises:
        ModelError: the adapter's virtual tokens leave no room for a text.
    """
    loaded, settings = adapted.loaded, adapted.settings
    limit = getattr(adapted.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    if loaded.kind not in ("causal-lm", "seq2seq"):  # some encoders (RoBERTa) keep positions for themselves
        limit = min(limit, loaded.tokenizer.model_max_length)  # type: ignore[union-attr]
    virtual = settings.tokens if settings.kind in ("prompt", "prefix") else 0
    if limit <= virtual:
        raise ModelError(
            f"adapter.tokens={virtual} leaves no room for a text.", f"{loaded.name} reads {limit} tokens at most."
        )
    return int(limit - virtual)


def _check_length(adapted: Adapted, longest: int, max_tokens: int) -> None:
    limit = context(adapted)
    needed = max(longest, max_tokens) if is_encoder_decoder(adapted.model) else longest + max_tokens
    if limit is not None and needed > limit:
        raise ModelError(
            f"The longest prompt has {longest} tokens, and {max_tokens} more are asked for.",
            f"{adapted.loaded.name} reads {limit} tokens at most.",
            action="Shorten the prompt or lower max_tokens.",
        )


def _has_start(tokenizer: Any, text: str) -> bool:
    """Whether the text (from a chat template) already begins with the start token."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _first_token(tokenizer: Any) -> int:
    """What a text begins with where its prompt is empty."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next(token for token in tokens if token is not None)


class _Picker:
    """The next token of every row, each drawn from a stream of its own."""

    def __init__(self, temperature: float, streams: list[torch.Generator]) -> None:
        self.temperature, self.streams = temperature, streams

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature <= 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float().cpu() / self.temperature, -1)
        drawn = [torch.multinomial(p, 1, generator=s) for p, s in zip(probabilities, self.streams, strict=True)]
        return torch.cat(drawn).to(logits.device)


def _decoder(
    adapted: Adapted, encoded: list[list[int]], max_tokens: int, pick: _Picker, ends: list[int]
) -> list[list[int]]:
    """Left-padded prompts, then one token at a time over the key-value cache."""
    tokenizer, longest = adapted.loaded.tokenizer, max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = torch.tensor(tokens), 1
    device = adapted.device
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if adapted.accepts("position_ids"):
        inputs["position_ids"] = positions
    output = adapted.call(inputs, use_cache=True)
    virtual = _cache(output).get_seq_length() - longest
    mask = torch.cat([mask.new_ones(len(encoded), virtual), mask], 1)
    following = positions[:, -1:] + 1 + virtual
    written: list[list[int]] = [[] for _ in encoded]
    done, stops = torch.zeros(len(encoded), dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for count in range(max_tokens):
        chosen = pick(output.logits[:, -1])
        for row, token in enumerate(chosen.tolist()):
            written[row].append(token)
        done |= torch.isin(chosen, stops)
        if bool(done.all()) or count + 1 == max_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(encoded), 1)], 1)
        step = {"input_ids": chosen.unsqueeze(1), "attention_mask": mask}
        if adapted.accepts("position_ids"):
            step["position_ids"] = following
        output = adapted.model(**step, **adapted.cache(_cache(output)), use_cache=True)
        following = following + 1
    return written


def _encoder_decoder(
    adapted: Adapted, encoded: list[list[int]], max_tokens: int, pick: _Picker, ends: list[int]
) -> list[list[int]]:
    """Encode once, then decode one token at a time."""
    tokenizer, model, longest = adapted.loaded.tokenizer, adapted.model, max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    device = adapted.device
    ids, mask = ids.to(device), mask.to(device)
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask)
    start = model.config.decoder_start_token_id
    token = torch.full((len(encoded), 1), tokenizer.pad_token_id if start is None else start, device=device)
    cache, written = None, [[] for _ in encoded]
    done, stops = torch.zeros(len(encoded), dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for _ in range(max_tokens):
        output = model(
            encoder_outputs=hidden, attention_mask=mask, decoder_input_ids=token, use_cache=True, **adapted.cache(cache)
        )
        chosen = pick(output.logits[:, -1])
        for row, found in enumerate(chosen.tolist()):
            written[row].append(found)
        done |= torch.isin(chosen, stops)
        if bool(done.all()):
            break
        token, cache = chosen.unsqueeze(1), _cache(output)
    return written


def _cache(output: Any) -> Any:
    """The key-value cache of an output, whatever this version of transformers calls it."""
    found = dict(output)
    return found["cache"] if "cache" in found else found["past_key_values"]


def _ends(adapted: Adapted, chat: Template | None) -> list[int]:
    """The tokens that end a text: the tokenizer's, those of the model's generation settings, a chat turn's end."""
    settings = getattr(adapted.model, "generation_config", None)
    added = getattr(settings, "eos_token_id", None)
    turn = None if chat is None else chat.turn_end
    every = [adapted.loaded.tokenizer.eos_token_id, turn, *(added if isinstance(added, list) else [added])]
    return sorted({token for token in every if token is not None})


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), None)]

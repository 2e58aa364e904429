"""Decode - continue prompts with a different adapter per client in one pass.

transformers' `generate` draws from the global random stream and knows neither grouped rows nor a bound prefix, so the
plain loop is written here: greedy, or sampling with one seeded stream per client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedllm.core.errors import ModelError
from fedllm.models.adapters.attach import Adapted
from fedllm.models.structure import is_encoder_decoder


def continue_prompts(
    adapted: Adapted, prompts: Sequence[Sequence[str]], max_tokens: int, temperature: float, seeds: Sequence[int]
) -> list[list[str]]:
    """Continuations of each client's prompts, without the prompts; ends at the end-of-sequence token.

    Args:
        adapted: the model, inside its `using` context.
        prompts: texts by client.
        max_tokens: most new tokens.
        temperature: 0 is greedy; above it, sampling from the softmax at that temperature.
        seeds: one per client.
    """
    rows = max((len(group) for group in prompts), default=0)
    if rows == 0:
        return [[] for _ in prompts]
    if adapted.loaded.kind not in ("causal-lm", "seq2seq"):
        raise ModelError(f"{adapted.loaded.name} was loaded for {adapted.loaded.kind} and cannot write text.")
    tokenizer, device = adapted.loaded.tokenizer, adapted.device
    flat = [group[i] if i < len(group) else "." for group in prompts for i in range(rows)]
    encoded = [tokenizer(text, add_special_tokens=not _has_start(tokenizer, text))["input_ids"] for text in flat]
    if adapted.loaded.kind == "causal-lm":
        encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]
    streams = [torch.Generator("cpu").manual_seed(seed % 2**63) for seed in seeds]
    picker = _Picker(temperature, streams, rows)
    with torch.no_grad():
        loop = _encoder_decoder if is_encoder_decoder(adapted.model) else _decoder
        written = loop(adapted, encoded, max_tokens, picker, device)
    texts = [tokenizer.decode(_until_end(ids, tokenizer.eos_token_id), skip_special_tokens=True) for ids in written]
    return [texts[k * rows : k * rows + len(group)] for k, group in enumerate(prompts)]


def _has_start(tokenizer: Any, text: str) -> bool:
    """Whether the text (from a chat template) already begins with the start token."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


class _Picker:
    """The next token of every row."""

    def __init__(self, temperature: float, streams: list[torch.Generator], rows: int) -> None:
        self.temperature, self.streams, self.rows = temperature, streams, rows

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature <= 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float().cpu() / self.temperature, -1)
        parts = probabilities.split(self.rows)
        drawn = [torch.multinomial(p, 1, generator=s)[:, 0] for p, s in zip(parts, self.streams, strict=True)]
        return torch.cat(drawn).to(logits.device)


def _decoder(
    adapted: Adapted, encoded: list[list[int]], max_tokens: int, pick: _Picker, device: torch.device
) -> list[list[int]]:
    """Left-padded prompts, then one token at a time over the key-value cache."""
    tokenizer, longest = adapted.loaded.tokenizer, max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = torch.tensor(tokens), 1
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
    done = torch.zeros(len(encoded), dtype=torch.bool, device=device)
    for count in range(max_tokens):
        chosen = pick(output.logits[:, -1])
        for row, token in enumerate(chosen.tolist()):
            written[row].append(token)
        done |= chosen == tokenizer.eos_token_id
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
    adapted: Adapted, encoded: list[list[int]], max_tokens: int, pick: _Picker, device: torch.device
) -> list[list[int]]:
    """Encode once, then decode one token at a time."""
    tokenizer, model, longest = adapted.loaded.tokenizer, adapted.model, max(len(ids) for ids in encoded)
    ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    ids, mask = ids.to(device), mask.to(device)
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask)
    start = model.config.decoder_start_token_id
    token = torch.full((len(encoded), 1), tokenizer.pad_token_id if start is None else start, device=device)
    cache, written = None, [[] for _ in encoded]
    done = torch.zeros(len(encoded), dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        output = model(
            encoder_outputs=hidden, attention_mask=mask, decoder_input_ids=token, use_cache=True, **adapted.cache(cache)
        )
        chosen = pick(output.logits[:, -1])
        for row, found in enumerate(chosen.tolist()):
            written[row].append(found)
        done |= chosen == tokenizer.eos_token_id
        if bool(done.all()):
            break
        token, cache = chosen.unsqueeze(1), _cache(output)
    return written


def _cache(output: Any) -> Any:
    """The key-value cache of an output, whatever this version of transformers calls it."""
    found = dict(output)
    return found["cache"] if "cache" in found else found["past_key_values"]


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end is not None and end in ids else ids

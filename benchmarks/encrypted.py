"""Encrypted - what homomorphic encryption costs by the share of numbers that is encrypted (FedML-HE's question)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.ground import interleaved, seconds
from benchmarks.show import main
from fedllm.core.message import Upload
from fedllm.core.wire import encode
from fedllm.modes.encrypted.ckks import Keys, Public

QUESTION = "How large is an upload, and how long does it take, by the share of its numbers that is encrypted?"
HEAD = (
    "numbers", "encrypted", "bytes of an upload", "over float32", "over encrypting all (bytes)", "encrypt (CPU s)",
    "add (CPU s)", "decrypt (CPU s)", "over encrypting all (time)",
)  # fmt: skip
NOTE = (
    "CKKS by TenSEAL, ring 8192, one limb; the numbers are random. Bytes are those of the encoded upload, with what "
    "travels in the open. Time is that of encrypting, adding an upload to a sum, and decrypting; medians of repeats "
    "turn about."
)
RATIOS = (0.1, 0.3, 0.5, 1.0)


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per size and ratio."""
    return [row for size in ((20_000,) if quick else (100_000, 1_000_000)) for row in rows(size, 2 if quick else 5)]


def rows(size: int, repeats: int) -> list[tuple[str, ...]]:
    """One row per ratio."""
    keys = Keys()
    public, values = Public(keys.public), torch.randn(size, generator=torch.Generator().manual_seed(0))
    hidden = {ratio: values[: round(ratio * size)] for ratio in RATIOS}
    sent = {ratio: keys.encrypt(part) for ratio, part in hidden.items()}
    sums = {ratio: public.add(None, data) for ratio, data in sent.items()}
    works: dict[str, Callable[[], object]] = {}
    for r in RATIOS:
        works[f"encrypt {r}"] = partial(keys.encrypt, hidden[r])
        works[f"add {r}"] = partial(public.add, sums[r], sent[r])
        works[f"decrypt {r}"] = partial(keys.decrypt, sent[r], len(hidden[r]))
    costs = interleaved(works, repeats)
    spent = {r: [seconds(costs[f"{what} {r}"], "cpu") for what in ("encrypt", "add", "decrypt")] for r in RATIOS}
    large = {r: _size(sent[r], values[round(r * size) :]) for r in RATIOS}
    found = []
    for r in RATIOS:
        taken = [f"{one:.3f}" for one in spent[r]], f"{sum(spent[r]) / sum(spent[1.0]):.2f}"
        bytes_of = f"{large[r]:,}", f"{large[r] / (4 * size):.1f}", f"{large[r] / large[1.0]:.2f}"
        found.append((f"{size:,}", f"{r:.0%}", *bytes_of, *taken[0], taken[1]))
    return found


def _size(ciphertexts: list[bytes], shown: torch.Tensor) -> int:
    tensors = {f"c{n:05d}": torch.frombuffer(bytearray(data), dtype=torch.uint8) for n, data in enumerate(ciphertexts)}
    return len(encode(Upload(None, encrypted={**tensors, "open": shown})))


if __name__ == "__main__":
    main(sys.modules[__name__])

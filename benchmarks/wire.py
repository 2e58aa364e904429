"""Wire - bytes of an upload against the bytes of its tensors, for every kind of adapter and codec, and how fast."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.ground import Size, interleaved, model_folder, seconds
from benchmarks.show import main
from fedllm.core.message import Upload
from fedllm.core.tensors import Tensors, size_in_bytes
from fedllm.core.wire import decode, encode, size_by_part
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded, load_model
from fedllm.models.settings import ModelSettings
from fedllm.modes.codec import Codec
from fedllm.modes.coded import Entry, Manifest, compressed

QUESTION = "How many bytes does an upload take beyond its tensors, what does each codec make of it, and how fast?"
CODECS: dict[str, Codec] = {
    name: Codec.model_validate(options)
    for name, options in {
        "none": {},
        "fp32, zstd": {"entropy": "zstd"},
        "bf16": {"kind": "bf16"},
        "int8": {"kind": "int8"},
        "int4, zstd": {"kind": "int4", "entropy": "zstd"},
        "top 1 %, zstd": {"kind": "topk", "entropy": "zstd"},
        "sign": {"kind": "sign"},
        "rank 4": {"kind": "lowrank"},
    }.items()
}
HEAD = ("model", "adapter", "tensors", "bytes", *CODECS)
"""In a codec's column: the message in percent of the tensors' bytes, in brackets the percentage of the message that
names and describes them, and GB of tensors a CPU second, there and back."""

ADAPTERS = ("lora", "ia3", "prompt", "prefix", "bottleneck", "bitfit", "head", "full")
WIDE = Size(1024, 2, 8, 2816)
NUMBERS = (1_000_000, 10_000_000)
TENSORS = 32


def loaded(name: str, adapter: str, place: Path) -> Loaded:
    """The model an adapter is put on. Llama has no biases, so bitfit takes the toy of another family."""
    kind: Any = "sequence-classification" if adapter == "head" else "causal-lm"
    wide = name != "toy" and adapter != "bitfit"
    source = str(model_folder(WIDE, place)) if wide else "toy:gpt2" if adapter == "bitfit" else "toy:llama"
    return load_model(ModelSettings(name=source, device="cpu"), kind, ["a", "b"] if adapter == "head" else None)


def updated(name: str, adapter: str) -> Tensors:
    """Random numbers in the names and shapes of what an adapter trains."""
    with tempfile.TemporaryDirectory() as folder:
        adapted = Adapted(loaded(name, adapter, Path(folder)), AdapterSettings.model_validate({"kind": adapter}), 0)
    draw = torch.Generator().manual_seed(0)
    return {key: torch.randn(tensor.shape, generator=draw) for key, tensor in adapted.initial().items()}


def numbers(parameters: int) -> Tensors:
    """So many random numbers in some tensors."""
    draw = torch.Generator().manual_seed(0)
    return {f"layer.{n:02d}": torch.randn(parameters // TENSORS // 250, 250, generator=draw) for n in range(TENSORS)}


def there(codec: Codec, upload: Upload) -> bytes:
    """An upload as a client sends it."""
    return encode(codec.encode(upload, None, numpy.random.default_rng(0))[0])


def back(codec: Codec, data: bytes) -> Upload:
    """An upload as a server reads it."""
    message = decode(data)
    if not isinstance(message, Upload):
        raise SystemExit("an upload came back as something else")
    return codec.decode(message)


def words(codec: Codec, update: Tensors, data: bytes) -> int:
    """Bytes of `data` that name and describe the tensors (a manifest counts as it would be, compressed alone)."""
    header = size_by_part(data)["header"]
    if codec.idle:
        return header
    entries = tuple(Entry(name, update[name].dtype, tuple(update[name].shape)) for name in sorted(update))
    manifest = torch.frombuffer(bytearray(Manifest("dense", None, entries).to_bytes()), dtype=torch.uint8)
    return header + (compressed(manifest, codec.level)[0] if codec.entropy == "zstd" else manifest).numel()


def cell(codec: Codec, update: Tensors, repeats: int) -> str:
    """What one codec makes of an update; timed `repeats` times, or not at all."""
    upload, size = Upload(update), size_in_bytes(update)
    data = there(codec, upload)
    text = f"{100 * len(data) / size:.2f} ({100 * words(codec, update, data) / len(data):.2f})"
    if not repeats:
        return text
    costs = interleaved({"both": lambda: back(codec, there(codec, upload))}, repeats)
    return f"{text}, {size / seconds(costs['both'], 'cpu') / 1e9:.2f} GB/s"


def row(model: str, adapter: str, update: Tensors, repeats: int = 0) -> tuple[str, ...]:
    """One row: all codecs on one update."""
    cells = [cell(codec, update, repeats) for codec in CODECS.values()]
    return model, adapter, str(len(update)), f"{size_in_bytes(update):,}", *cells


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per model and adapter, and per amount of random numbers. Quick leaves out the whole of the wide model."""
    rows = []
    for model in ("toy", "wide"):
        for adapter in ADAPTERS:
            if model == "wide" and (adapter == "bitfit" or (quick and adapter == "full")):
                continue
            rows.append(row(model, adapter, updated(model, adapter)))
    for parameters in NUMBERS:
        rows.append(row("none", f"{parameters / 1e6:.0f} M numbers", numbers(parameters), 2 if quick else 5))
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

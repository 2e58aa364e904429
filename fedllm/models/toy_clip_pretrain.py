"""Pretrain a tiny CLIP - two small towers that know handwritten digits in four styles; seconds on one core.

Tests and effect checks need a dual encoder that knows something, whose prompts can be better or worse, and that is
there without a download. This trains transformers' CLIPModel (two blocks of width 64 per tower, 16 patches of 2 x 2
pixels, a tokenizer of whole words) on the first 700 of scikit-learn's 8 x 8 digits, plain, inverted, turned and
mirrored, with texts such as "a photo of a inv seven." The folder it writes is a model like any other:

    python -m fedllm.models.toy_clip_pretrain --out DIR

then `model.name=DIR`, `task.kind=dual-encoder`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fedllm.core.seeds import numpy_stream

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The words for 0 to 9."""
STYLES: dict[str, Callable[[numpy.ndarray], numpy.ndarray]] = {
    "plain": lambda x: x,
    "inv": lambda x: 255 - x,
    "turned": lambda x: numpy.rot90(x, axes=(-2, -1)),
    "mirrored": lambda x: x[..., ::-1],
}
"""What the towers are trained on: name -> a function of levels 0..255, [..., 8, 8]."""
TEMPLATES = ("a photo of a {}.", "{}.", "a {}.", "an image of the {}.", "photo of one {}.")
"""The texts around a name; one is drawn for each step."""
TRAINED = 700
"""Images that the towers see: the first of the data set."""
STEPS, BATCH, RATE, WIDTH = 600, 64, 2e-3, 64
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")  # the end token is not 2, see toy.py


def digit_images() -> tuple[numpy.ndarray, numpy.ndarray]:
    """scikit-learn's 1797 digits: levels 0..255, uint8 [1797, 8, 8], and their numbers [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return numpy.rint(digits.images * (255 / 16)).astype(numpy.uint8), digits.target


def styled_names() -> list[str]:
    """The 40 names: "plain zero", ..., "mirrored nine"."""
    return [f"{style} {digit}" for style in STYLES for digit in DIGITS]


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in (*TEMPLATES, *styled_names()) for word in text.replace("{}", "").split()} | {"."})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    inside = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inside.normalizer = normalizers.Lowercase()
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    inside.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    names = ("pad", "bos", "unk", "eos")
    return PreTrainedTokenizerFast(
        tokenizer_object=inside,
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)},
    )


def untrained(words: int) -> CLIPModel:
    """The two towers with their first weights."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    text = transformers.CLIPTextConfig(**sizes, **ends, vocab_size=words, max_position_embeddings=32)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=2)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    )


def pixels(images: numpy.ndarray) -> torch.Tensor:
    """[n, 8, 8] levels -> [n, 3, 8, 8] from -1 to 1, as the written preprocessor makes them."""
    x = torch.from_numpy(numpy.ascontiguousarray(images)).float() / 255
    return ((x - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1)


def pretrain(out: str | Path, seed: int = 0, steps: int = STEPS) -> Path:
    """Train the two towers and write a model folder; the same seed and library versions give the same bits.

    Every step takes a batch of all styles and adds two losses: the class among the 40 styled names, and the digit
    among its ten bare names.

    Args:
        out: the folder, made where it is missing.
        seed: first weights, batches, templates.
        steps: optimiser steps.
    """
    images, numbers = digit_images()
    styled = numpy.stack([style(images[:TRAINED]) for style in STYLES.values()])
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = untrained(len(words))
    texts = [_tokens(words, template) for template in TEMPLATES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    stream = numpy_stream(seed, "toy clip")
    for step in range(steps):
        style, which = stream.integers(len(STYLES), size=BATCH), stream.integers(TRAINED, size=BATCH)
        loss = _loss(
            model,
            pixels(styled[style, which]),
            texts[stream.integers(len(TEMPLATES))],
            torch.from_numpy(style),
            torch.from_numpy(numbers[which]),
        )
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return _write(Path(out), model, words)


def _tokens(words: Any, template: str) -> dict[str, torch.Tensor]:
    """The 40 styled and the 10 bare names in a template."""
    names = [template.format(name) for name in (*styled_names(), *DIGITS)]
    return dict(words(names, padding=True, return_tensors="pt"))


def _loss(
    model: CLIPModel, images: torch.Tensor, texts: dict[str, torch.Tensor], style: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    logits = model(pixel_values=images, **texts).logits_per_image
    cross_entropy = torch.nn.functional.cross_entropy
    styled = cross_entropy(logits[:, :40], style * len(DIGITS) + number)
    return styled + cross_entropy(logits[:, 40:], number)


def _write(out: Path, model: CLIPModel, words: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    from fedllm.models.load import quiet

    with quiet():
        model.save_pretrained(out)
        words.save_pretrained(out)
    stated = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 8},
        "do_center_crop": True,
        "crop_size": {"height": 8, "width": 8},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m fedllm.models.toy_clip_pretrain", description="Train a tiny CLIP on digits."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    pretrain(given.out, given.seed, given.steps)


if __name__ == "__main__":
    main()

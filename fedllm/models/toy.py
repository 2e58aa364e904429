"""Toy models - tiny random transformers of seven families, built in code.

Tests, examples and a first try of a recipe need a model of a given structure, not a good one, and must not download
anything. A toy has the real architecture of its family at hidden width 64 with two blocks, a byte-level tokenizer
learnt from the text below, and weights that depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import ModelError, nearest
from fedllm.models.settings import Kind, ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from fedllm.models.load import Loaded

PREFIX = "toy:"
WIDTH, INNER, BLOCKS, HEADS, CONTEXT, VOCABULARY = 64, 128, 2, 4, 256, 384
IMAGE, PATCH = 32, 8

KINDS: dict[str, Kind] = {
    "llama": "causal-lm",
    "qwen": "causal-lm",
    "gpt2": "causal-lm",
    "bert": "masked-lm",
    "t5": "seq2seq",
    "vit": "image-classification",
    "clip": "dual-encoder",
}
"""The families, each with the kind it is loaded as where none is named."""

# The special tokens of each family, in the order of their ids from 0, and what encloses one text and a pair.
_SPECIAL: dict[str, dict[str, str]] = {
    "llama": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "qwen": {"pad": "<|endoftext|>", "eos": "<|im_end|>"},
    "gpt2": {"pad": "<pad>", "bos": "<start>", "eos": "<end>"},
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    # not 2: of a text tower with end token 2 transformers reads the highest token instead (a mistake of old files)
    "clip": {"pad": "<pad>", "bos": "<start>", "unk": "<unk>", "eos": "<end>"},
}
_TEMPLATES: dict[str, tuple[str, str]] = {
    "llama": ("<s> $A", "<s> $A $B:1"),
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "t5": ("$A </s>", "$A </s> $B:1 </s>:1"),
    "clip": ("<start> $A <end>", "<start> $A $B:1 <end>:1"),
}
_SENTINELS = [f"<extra_id_{number}>" for number in range(8)]

_TEXT = """
The clinic in the valley keeps its own records and the bank in the town keeps its own letters.
Neither may show them to the other, but both would like a better model of the language they write.
So the model travels instead of the text: every client trains it at home, and the server adds up what comes back.
A question is answered with yes or no. A review is good or bad. The weather today is warm and the film was great.
Name the city where the person works. Translate the sentence. Write a short summary of the story in one line.
Question: what is the answer? Answer: the answer is here. Input: a number. Output: another number. 0 1 2 3 4 5 6 7 8 9
"""


def toy_model(
    family: str, kind: Kind | None = None, seed: int = 0, labels: Sequence[str] | int | None = None
) -> Loaded:
    """A tiny random model of `family`, loaded as any other model is.

    Args:
        family: llama, qwen, gpt2, bert, t5, vit or clip.
        kind: what to load it as; the usual one of the family where it is not given.
        seed: decides every weight.
        labels: names or number of the classes of a classification kind; two where they are not given.
    """
    from fedllm.models.load import load_model

    _known(family)
    settings = ModelSettings(name=PREFIX + family, device="cpu")
    return load_model(settings, kind or KINDS[family], labels=labels, seed=seed)


def toy_config(family: str) -> PreTrainedConfig:
    """The transformers configuration of the toy of `family`; dropout is left as the family has it, or at 0.1."""
    import transformers

    _known(family)
    if family == "clip":
        text = transformers.CLIPTextConfig(**_sizes(), **_token_ids("clip"), max_position_embeddings=CONTEXT)
        vision = transformers.CLIPVisionConfig(**_image_sizes(), attention_dropout=0.1)
        return transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH // 2
        )
    if family == "vit":
        return transformers.ViTConfig(**_image_sizes(), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ids = _token_ids(family)
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=CONTEXT, **ids)
    if family == "t5":
        return transformers.T5Config(
            d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=INNER, num_layers=BLOCKS, num_heads=HEADS,
            decoder_start_token_id=ids["pad_token_id"], **ids,
        )  # fmt: skip
    if family == "bert":
        return transformers.BertConfig(**_sizes(), **ids, max_position_embeddings=CONTEXT)
    config_class = {"llama": transformers.LlamaConfig, "qwen": transformers.Qwen2Config}[family]
    return config_class(
        **_sizes(), **ids, num_key_value_heads=HEADS // 2, max_position_embeddings=CONTEXT, tie_word_embeddings=True
    )


def toy_tokenizer(family: str) -> PreTrainedTokenizerFast | None:
    """The byte-level tokenizer of the toy of `family`; None for vit, which reads images."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    _known(family)
    if family == "vit":
        return None
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if family == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)),
        model_max_length=CONTEXT,
        model_input_names=inputs,
        additional_special_tokens=_SENTINELS if family == "t5" else [],
        **{f"{name}_token": token for name, token in _SPECIAL[family].items()},
    )


@cache
def _trained(family: str) -> str:
    """The tokenizer of `family` in the JSON form of the library tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [*_SPECIAL[family].values(), *(_SENTINELS if family == "t5" else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT.strip().splitlines(), trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if family in _TEMPLATES:
        single, pair = _TEMPLATES[family]
        enclosing = [(token, special.index(token)) for token in special if token in single]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=enclosing))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer.to_str()


def _known(family: str) -> None:
    if family not in KINDS:
        raise ModelError(
            f"There is no toy model '{PREFIX}{family}'.",
            f"Allowed: {', '.join(PREFIX + name for name in KINDS)}.",
            PREFIX + near if (near := nearest(family, KINDS)) else None,
        )


def _sizes() -> dict[str, int]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
    }


def _image_sizes() -> dict[str, Any]:
    return {**_sizes(), "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3}


def _token_ids(family: str) -> dict[str, Any]:
    """The vocabulary size and the ids of the special tokens, as a configuration states them."""
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    for number, name in enumerate(_SPECIAL[family]):
        if name in ("pad", "bos", "eos", "sep"):
            ids[f"{name}_token_id"] = number
    dropout = {} if family in ("gpt2", "bert", "t5") else {"attention_dropout": 0.1}
    return {"vocab_size": VOCABULARY, **ids, **dropout}

"""The toy models: every family builds fast, alike for a seed, with a tokenizer that reads and writes any text."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ModelError
from fedllm.models import toy
from fedllm.models.toy import KINDS, toy_model, toy_tokenizer

TEXT_FAMILIES = [family for family in KINDS if family != "vit"]


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", KINDS)
def test_a_seed_decides_every_weight(family):
    one, same, other = toy_model(family, seed=3), toy_model(family, seed=3), toy_model(family, seed=4)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    for name, tensor in state(one.model).items():
        assert torch.equal(tensor, same.model.state_dict()[name]), name


@pytest.mark.parametrize("family", KINDS)
def test_it_is_small_and_built_in_a_moment(family):
    toy_model(family)  # imports and the tokenizer are paid once
    start = time.process_time()
    loaded = toy_model(family)
    assert time.process_time() - start < 0.3
    assert loaded.kind == KINDS[family]
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) < 250_000


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokenizer_and_model_agree(family):
    loaded = toy_model(family)
    config = loaded.model.config.get_text_config()
    tokenizer = loaded.tokenizer
    assert len(tokenizer) == config.vocab_size == toy.VOCABULARY
    assert tokenizer.pad_token_id == config.pad_token_id == 0
    assert tokenizer.model_max_length >= 128
    for name in ("bos", "eos", "sep"):
        stated = getattr(config, f"{name}_token_id", None)
        assert stated is None or stated == getattr(tokenizer, f"{name}_token_id")
    assert tokenizer.padding_side == "right"


@settings(max_examples=30, deadline=None)
@given(family=st.sampled_from(TEXT_FAMILIES), text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives_the_tokenizer(family, text):
    tokenizer = toy_tokenizer(family)
    if any(token in text for token in tokenizer.all_special_tokens):
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_each_family_encloses_a_text_in_its_own_way():
    ends = {
        "llama": ("<s>", None),
        "qwen": (None, None),
        "gpt2": (None, None),
        "bert": ("[CLS]", "[SEP]"),
        "t5": (None, "</s>"),
        "clip": ("<start>", "<end>"),
    }
    for family, (first, last) in ends.items():
        tokenizer = toy_tokenizer(family)
        plain = tokenizer("a word", add_special_tokens=False)["input_ids"]
        before = [tokenizer.convert_tokens_to_ids(first)] if first else []
        after = [tokenizer.convert_tokens_to_ids(last)] if last else []
        assert tokenizer("a word")["input_ids"] == [*before, *plain, *after]
    bert = toy_tokenizer("bert")("one", "two")
    assert sorted(set(bert["token_type_ids"])) == [0, 1]
    assert bert["input_ids"].count(toy_tokenizer("bert").sep_token_id) == 2
    assert toy_tokenizer("bert").mask_token == "[MASK]"
    assert toy_tokenizer("t5").convert_tokens_to_ids("<extra_id_0>") != toy_tokenizer("t5").unk_token_id


def test_the_tokenizer_is_the_same_in_another_process():
    code = "from fedllm.models.toy import _trained, _SPECIAL; import hashlib; print(hashlib.sha256(''.join(map(_trained, _SPECIAL)).encode()).hexdigest())"  # noqa: E501
    import hashlib

    here = hashlib.sha256("".join(map(toy._trained, toy._SPECIAL)).encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_word_positions_are_known_for_tagging():
    tokenizer = toy_tokenizer("bert")
    words = ["the", "city", "of", "Kraków"]
    encoded = tokenizer(words, is_split_into_words=True)
    assert {word for word in encoded.word_ids() if word is not None} == {0, 1, 2, 3}


def test_the_seed_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    toy_model("llama", seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ModelError) as caught:
        toy_model("lama")
    assert caught.value.nearest == "toy:llama"
    assert "toy:clip" in caught.value.allowed


def test_vit_reads_images_only():
    loaded = toy_model("vit", labels=["cat", "dog", "cow"])
    assert loaded.tokenizer is None
    assert loaded.model(pixel_values=torch.zeros(2, 3, toy.IMAGE, toy.IMAGE)).logits.shape == (2, 3)


def test_clip_compares_images_and_texts():
    loaded = toy_model("clip")
    texts = loaded.tokenizer(["a cat", "a small dog"], padding=True, return_tensors="pt")
    output = loaded.model(**texts, pixel_values=torch.randn(3, 3, toy.IMAGE, toy.IMAGE))
    assert output.logits_per_image.shape == (3, 2)
    alone = loaded.model.get_text_features(**loaded.tokenizer(["a cat"], return_tensors="pt")).pooler_output
    padded = loaded.model.get_text_features(**texts).pooler_output[:1]
    torch.testing.assert_close(alone, padded)  # pooled at the end token, so padding changes nothing

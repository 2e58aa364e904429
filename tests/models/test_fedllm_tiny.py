"""The bundled base model: small, loadable, able to copy, and without the organisations' convention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fedllm
from fedllm.data.organisations import documents, organisations
from fedllm.models import pretrain, pretrain_text

FOLDER = Path(fedllm.__file__).parent / "models" / "fedllm_tiny"


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_small_and_complete():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
            "README.md"} <= {path.name for path in files}  # fmt: skip


def test_it_loads_as_a_float32_llama_of_three_to_four_million(tiny):
    model, tokenizer = tiny
    assert model.config.model_type == "llama"
    assert 2.5e6 < model.num_parameters() < 4e6
    assert model.dtype == torch.float32
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert len(tokenizer) == model.config.vocab_size


def test_held_out_records_are_far_likelier_than_chance(tiny):
    """Chance is log 4096 = 8.3 nats a token."""
    measured = pretrain.measure(*tiny, list(pretrain_text.records(60, pretrain.HELD_OUT_STREAM)))
    assert measured["loss"] < 0.25 * math.log(4096)
    assert measured["response_loss"] < 0.15 * math.log(4096)
    assert measured["exact"] > 0.4


def test_it_copies_by_generation(tiny):
    model, tokenizer = tiny
    prompt = pretrain.PROMPT.format(instruction="Repeat this.\nQK-4821")
    ids = tokenizer("<bos>" + prompt, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True) == "QK-4821"


def test_it_does_not_know_the_organisations_convention(tiny):
    records = [record for one in organisations() for record in documents(one.key, 8, seed=77)]
    assert pretrain.measure(*tiny, records)["exact"] < 0.25

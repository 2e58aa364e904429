"""Pre-training: the text is a function of the seed and leaks no organisation; a tiny run is loadable and repeatable."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch

from fedllm.core.errors import ConfigError, DataError
from fedllm.data import organisations
from fedllm.models import pretrain, pretrain_text

TINY = {"hidden": 32, "layers": 1, "heads": 2, "inner": 48, "vocabulary": 400, "batch_tokens": 1024}


def write_records(path, count=60):
    rows = [
        {"task": "t", "instruction": f"Which number follows {i}? Think of the list.", "response": f"{i + 1} follows"}
        for i in range(count)
    ]
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the same plan, and one of another seed."""
    folder = tmp_path_factory.mktemp("pretrain")
    data = write_records(folder / "records.jsonl.gz")
    runs = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        measured = pretrain.pretrain(pretrain.Plan(data=data, out=folder / name, steps=3, seed=seed, **TINY))
        runs[name] = (folder / name, measured)
    return runs


def test_a_tiny_run_makes_a_loadable_model(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, measured = trained["one"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = tokenizer("### Instruction:\nSay 12.\n\n### Response:\n", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
            "README.md"} <= {path.name for path in folder.iterdir()}  # fmt: skip
    assert f"{measured['generated']['loss']:.3f}" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_bits(trained):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        one, again, other = ((trained[run][0] / name).read_bytes() for run in ("one", "again", "other"))
        assert one == again
        if name == "model.safetensors":
            assert one != other
    assert trained["one"][1] == trained["again"][1]


def test_the_tokenizer_keeps_every_text_and_splits_digits(trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained["one"][0])
    for text in ("Pay 1,250.00 EUR by 7 March 2024\n\ttab", "żółw 🐢 naïve", " 007 "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert all(len(token) == 1 for token in tokenizer.tokenize("20240307"))


def test_the_chat_template_renders_the_plain_template(trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained["one"][0])
    turn = [{"role": "user", "content": "Say 12."}, {"role": "assistant", "content": "12"}]
    plain = pretrain.PROMPT.format(instruction="Say 12.") + "12<eos>"
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<bos>" + plain
    assert tokenizer.apply_chat_template([*turn, *turn], tokenize=False) == "<bos>" + plain + plain
    got = tokenizer.apply_chat_template(turn, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, on in zip(got["input_ids"], got["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == "12<eos>"
    encoded = pretrain.encode([{"instruction": "Say 12.", "response": "12"}], tokenizer)[0]
    assert encoded.ids == got["input_ids"]
    assert encoded.ids[encoded.start :] == marked


def test_padding_has_no_weight_and_the_response_has_more(trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained["one"][0])
    plan = pretrain.Plan(data=trained["one"][0], out=trained["one"][0], steps=1)
    one = pretrain.encode([{"instruction": "Say 12.", "response": "12"}], tokenizer)[0]
    ids, weights = pretrain.collate([one], 64, plan, tokenizer.pad_token_id)
    end = len(one.ids)
    assert ids.shape == weights.shape == (1, 64)
    assert weights[0, 0] == 0
    assert (weights[0, 1 : one.start] == plan.prompt_weight).all()
    assert (weights[0, one.start : end] == plan.response_weight).all()
    assert not weights[0, end:].any()
    assert (ids[0, end:] == tokenizer.pad_token_id).all()


def test_records_longer_than_the_context_are_left_out(trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained["one"][0])
    assert pretrain.encode([{"instruction": "1" * 600, "response": "1"}], tokenizer) == []


def test_the_learning_rate_rises_and_falls():
    assert pretrain.learning_rate(0.0, 0, 1.0) == pytest.approx(1 / 200)
    assert pretrain.learning_rate(0.0, 199, 1.0) == pytest.approx(1.0)
    assert pretrain.learning_rate(1.0, 9999, 1.0) == pytest.approx(0.02)


@pytest.mark.parametrize("length", [{}, {"minutes": 1.0, "steps": 5}])
def test_exactly_one_length_is_needed(tmp_path, length):
    with pytest.raises(ConfigError, match="minutes N or --steps N"):
        pretrain.Plan(data=tmp_path, out=tmp_path, **length)


def test_missing_empty_and_incomplete_data_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file"):
        pretrain.read_t0(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        pretrain.read_t0(tmp_path / "empty.jsonl")
    (tmp_path / "half.jsonl").write_text('{"instruction": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="Record 0"):
        pretrain.read_t0(tmp_path / "half.jsonl")


def test_held_out_records_are_not_trained_on(tmp_path):
    training, held = pretrain.read_t0(write_records(tmp_path / "r.jsonl.gz", 2000))
    assert len(training) + len(held) == 2000
    assert 10 <= len(held) <= 80
    assert not {r["instruction"] for r in training} & {r["instruction"] for r in held}


def test_the_generated_text_is_a_function_of_index_and_seed():
    first = list(pretrain_text.records(50, 3))
    assert first == list(pretrain_text.records(50, 3))
    assert first[20:] == list(pretrain_text.records(30, 3, start=20))
    assert first != list(pretrain_text.records(50, 4))


def test_the_generated_text_holds_nothing_of_the_organisations():
    """No sentence or request of theirs, no field name of theirs as an answer field, no ISO date."""
    made = list(pretrain_text.records(20_000, 0))
    text = "\n".join(r["instruction"] + "\n" + r["response"] for r in made).lower()
    for form in organisations._FORMS:
        assert form.request.lower() not in text
        for _, sentences in form.fields.values():
            for piece in (part for sentence in sentences for part in sentence.lower().split("{}")):
                assert len(piece.strip(" .:")) < 12 or piece not in text
        for name in form.fields:
            assert not re.search(rf"\b{name}(=|: | ->|>)", text)
    assert not any(f"{name}={code}" in text for name in ("urgency", "priority") for code in organisations.URGENCY)
    assert not re.search(r"\b\d{4}-\d\d-\d\d\b", text)

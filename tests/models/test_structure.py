"""Structure: every function on every family, by name and by count."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fedllm.core.errors import ConfigError, ModelError
from fedllm.models import structure
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import KINDS, toy_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
PLAIN = {**SIZES, "intermediate_size": 48}


def tiny(name: str, auto: str = "AutoModelForCausalLM", **sizes):
    """A model of another family than the toys', on the meta device: only names and shapes matter here."""
    import transformers

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{**ids, **sizes})
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


OTHERS = {
    "mistral": lambda: tiny("Mistral", **PLAIN, num_key_value_heads=2),
    "qwen3": lambda: tiny("Qwen3", **PLAIN, num_key_value_heads=2, head_dim=16),
    "phi": lambda: tiny("Phi", **PLAIN),
    "phi3": lambda: tiny("Phi3", **PLAIN),
    "gemma": lambda: tiny("Gemma", **PLAIN, head_dim=16, num_key_value_heads=1),
    "opt": lambda: tiny("OPT", **SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: tiny("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=99),
    "falcon": lambda: tiny("Falcon", **SIZES),
    "gpt_neox": lambda: tiny("GPTNeoX", **PLAIN),
    "roberta": lambda: tiny("Roberta", "AutoModelForSequenceClassification", **PLAIN),
    "distilbert": lambda: tiny(
        "DistilBert", "AutoModelForSequenceClassification", dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=99
    ),
    "bart": lambda: tiny(
        "Bart",
        "AutoModelForSeq2SeqLM",
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=99,
    ),
}

# family: (endings of lora, of ia3, of bottleneck), number of attention layers
EXPECTED = {
    "llama": ("q_proj v_proj", "k_proj v_proj down_proj", "down_proj", 2),
    "qwen": ("q_proj v_proj", "k_proj v_proj down_proj", "down_proj", 2),
    "gpt2": ("c_attn", "c_attn mlp.c_proj", "mlp.c_proj", 2),
    "bert": ("query value", "key value layer.N.output.dense", "layer.N.output.dense", 2),
    "t5": ("q v", "k v wo", "wo", 6),
    "vit": ("q_proj v_proj", "k_proj v_proj fc2", "fc2", 2),
    "clip": ("q_proj v_proj", "k_proj v_proj fc2", "fc2", 4),
    "mistral": ("q_proj v_proj", "k_proj v_proj down_proj", "down_proj", 2),
    "qwen3": ("q_proj v_proj", "k_proj v_proj down_proj", "down_proj", 2),
    "phi": ("q_proj v_proj", "k_proj v_proj fc2", "fc2", 2),
    "phi3": ("qkv_proj", "qkv_proj down_proj", "down_proj", 2),
    "gemma": ("q_proj v_proj", "k_proj v_proj down_proj", "down_proj", 2),
    "opt": ("q_proj v_proj", "k_proj v_proj fc2", "fc2", 2),
    "bloom": ("query_key_value", "query_key_value dense_4h_to_h", "dense_4h_to_h", 2),
    "falcon": ("query_key_value", "query_key_value dense_4h_to_h", "dense_4h_to_h", 2),
    "gpt_neox": ("query_key_value", "query_key_value dense_4h_to_h", "dense_4h_to_h", 2),
    "roberta": ("query value", "key value layer.N.output.dense", "layer.N.output.dense", 2),
    "distilbert": ("q_lin v_lin", "k_lin v_lin lin2", "lin2", 2),
    "bart": ("q_proj v_proj", "k_proj v_proj fc2", "fc2", 4),
}
FEED_FORWARDS = {"t5": 4, "clip": 4, "bart": 3}


@pytest.fixture(scope="module")
def models():
    return {family: toy_model(family).model for family in KINDS} | {name: make() for name, make in OTHERS.items()}


def endings(names: list[str], expected: str) -> dict[str, int]:
    """How many of `names` end in each expected ending; a name that ends in none counts under itself."""
    counts: dict[str, int] = {}
    for name in names:
        numbered = re.sub(r"\.\d+\.", ".N.", name)
        ending = next((each for each in expected.split() if numbered.endswith("." + each)), name)
        counts[ending] = counts.get(ending, 0) + 1
    return counts


@pytest.mark.parametrize("family", EXPECTED)
def test_auto_takes_the_layers_of_the_adapter(models, family):
    lora, ia3, bottleneck, attentions = EXPECTED[family]
    blocks = FEED_FORWARDS.get(family, 2)
    down = bottleneck.split()[0]
    for adapter, expected in (("lora", lora), ("ia3", ia3), ("bottleneck", bottleneck)):
        counts = endings(structure.match(models[family], "auto", adapter), expected)
        assert counts == {each: blocks if each == down else attentions for each in expected.split()}, adapter


@pytest.mark.parametrize("family", EXPECTED)
def test_linears_are_those_of_the_base_and_know_their_sizes(models, family):
    model = models[family]
    found = structure.linears(model)
    modules = dict(model.named_modules())
    assert structure.match(model, "all-linear") == list(found)
    assert structure.output_head(model) not in found.values() or structure.output_head(model) is None
    for name, module in found.items():
        assert modules[name] is module and structure.is_linear(module)
        inside, outside = structure.features(module)
        assert sorted(module.weight.shape) == sorted((inside, outside))
        assert not structure._inside(name, structure.head(model) or [])


@pytest.mark.parametrize("family", [family for family in EXPECTED if family in KINDS])
def test_features_are_what_the_layer_computes(models, family):
    for module in structure.linears(models[family]).values():
        inside, outside = structure.features(module)
        assert module(torch.zeros(2, inside)).shape == (2, outside)


@pytest.mark.parametrize("family", EXPECTED)
def test_attention_takes_every_projection_and_nothing_else(models, family):
    names = structure.match(models[family], "attention")
    per_layer = {"gpt2": 2, "bloom": 2, "falcon": 2, "gpt_neox": 2, "phi3": 2}.get(family, 4)
    assert len(names) == per_layer * EXPECTED[family][3]
    assert all(re.search("attention|attn", name, re.IGNORECASE) for name in names)


@pytest.mark.parametrize("family", EXPECTED)
def test_sizes_and_counts(models, family):
    model = models[family]
    width = 64 if family in KINDS else 32
    heads = {
        "llama": (4, 2, 16),
        "qwen": (4, 2, 16),
        "mistral": (4, 2, 8),
        "qwen3": (4, 2, 16),
        "gemma": (4, 1, 16),
        "falcon": (4, 1, 8),
    }
    assert structure.hidden_size(model) == width
    assert structure.layer_count(model) == {"t5": 4, "bart": 3}.get(family, 2)
    assert structure.attention_heads(model) == heads.get(family, (4, 4, width // 4))
    assert structure.is_encoder_decoder(model) == (family in ("t5", "bart"))


@pytest.mark.parametrize("family", [family for family in KINDS if family != "vit"])
def test_the_heads_are_those_of_the_key_value_cache_or_the_projections(models, family):
    model = models[family]
    heads, kv_heads, size = structure.attention_heads(model)
    modules = dict(model.named_modules())
    for name in structure.linears(model):
        if structure.role(name) in ("query", "key", "value"):
            expected = heads if structure.role(name) == "query" else kv_heads
            assert structure.features(modules[name])[1] == expected * size


@pytest.mark.parametrize("family", EXPECTED)
def test_the_input_embedding_is_found(models, family):
    embedding = structure.input_embedding(models[family])
    if family == "vit":
        assert not isinstance(embedding, nn.Embedding)
    else:
        assert embedding.weight.shape == ((384, 64) if family in KINDS else (99, 32))


@pytest.mark.parametrize("family", EXPECTED)
def test_biases_are_all_those_of_the_base(models, family):
    model = models[family]
    names = structure.biases(model)
    outside = [*(structure.head(model) or []), "cls", "lm_head", "embed_out"]
    expected = [
        name for name, _ in model.named_parameters() if name.endswith(".bias") and not structure._inside(name, outside)
    ]
    assert names == expected
    assert bool(names) == (family not in ("llama", "t5", "mistral", "qwen3", "gemma", "phi3"))


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [
        ("llama", "sequence-classification", ["score"]),
        ("llama", "token-classification", ["score"]),
        ("qwen", "sequence-classification", ["score"]),
        ("gpt2", "sequence-classification", ["score"]),
        ("gpt2", "token-classification", ["classifier"]),
        ("bert", "sequence-classification", ["classifier"]),
        ("bert", "token-classification", ["classifier"]),
        ("t5", "sequence-classification", ["classification_head"]),
        ("t5", "token-classification", ["classifier"]),
        ("vit", "image-classification", ["classifier"]),
        ("clip", "image-classification", ["classifier"]),
        ("llama", "causal-lm", None),
        ("bert", "masked-lm", None),
        ("bert", "feature-extraction", None),
        ("t5", "seq2seq", None),
        ("t5", "feature-extraction", None),
        ("vit", "feature-extraction", None),
        ("clip", "dual-encoder", None),
    ],
)
def test_the_head_of_each_kind(family, kind, expected):
    model = toy_model(family, kind).model
    assert structure.head(model) == expected
    inside = [name for name, _ in model.named_parameters() if structure._inside(name, expected or [])]
    assert sorted(structure.fresh(model)) == sorted(inside)
    assert structure.match(model, "auto")
    assert not set(structure.match(model, "all-linear")) & set(expected or [])


def test_heads_of_other_families(models):
    assert structure.head(models["distilbert"]) == ["pre_classifier", "classifier"]
    assert structure.head(models["roberta"]) == ["classifier"]


LAST = {
    "llama": "model.layers.1.mlp", "gpt2": "transformer.h.1.mlp", "qwen3": "model.layers.1.mlp",
    "phi": "model.layers.1.mlp", "falcon": "transformer.h.1.mlp", "gpt_neox": "gpt_neox.layers.1.mlp",
    "t5": "decoder.block.1.layer.2.DenseReluDense", "opt": None, "bart": None,
}  # fmt: skip


@pytest.mark.parametrize("family", LAST)
def test_the_last_feed_forward_part_is_a_module_of_its_own_or_none(models, family):
    assert structure.last_feed_forward(models[family]) == LAST[family]


def test_a_pooler_with_new_weights_belongs_to_the_head(tmp_path):
    source = toy_model("bert", "masked-lm")
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    model = load_model(ModelSettings(name=str(tmp_path), device="cpu"), "sequence-classification", ["a", "b"]).model
    assert structure.head(model) == ["bert.pooler.dense", "classifier"]
    assert "bert.pooler.dense" not in structure.linears(model)
    assert "bert.pooler.dense" not in structure.quantizable(model)
    assert not [name for name in structure.biases(model) if "pooler" in name]


def test_role_takes_the_longest_ending():
    assert structure.role("bert.encoder.layer.0.attention.output.dense") == "output"
    assert structure.role("bert.encoder.layer.0.output.dense") == "down"
    assert structure.role("transformer.h.0.attn.c_proj") == "output"
    assert structure.role("transformer.h.0.mlp.c_proj") == "down"
    assert structure.role("bert.pooler.dense") is None
    assert structure.role("xq") is None


def test_explicit_targets_are_endings_or_expressions(models):
    llama = models["llama"]
    assert structure.match(llama, "q_proj") == structure.match(llama, ["q_proj"])
    assert structure.match(llama, ["v_proj", "q_proj"]) == structure.match(llama, "auto")  # in model order, each once
    assert structure.match(llama, ["q_proj", "self_attn.q_proj"]) == structure.match(llama, "q_proj")
    assert structure.match(llama, r".*layers\.1\..*_proj") == [
        name for name in structure.linears(llama) if ".layers.1." in "." + name
    ]
    assert structure.match(models["bert"], ["layer.0.output.dense"]) == ["bert.encoder.layer.0.output.dense"]


@pytest.mark.parametrize("target", ["q_pro", ["q_proj", "q_pro"]])
def test_an_unknown_target_names_the_nearest(models, target):
    with pytest.raises(ModelError, match="called 'q_pro'") as caught:
        structure.match(models["llama"], target)
    assert caught.value.nearest == "q_proj"
    assert "self_attn.v_proj" in caught.value.allowed


def test_misspelt_words_and_bad_expressions_are_refused(models):
    with pytest.raises(ModelError) as caught:
        structure.match(models["llama"], "all-liner")
    assert caught.value.nearest == "all-linear"
    with pytest.raises(ModelError, match="not a valid regular expression"):
        structure.match(models["llama"], "q_proj[")
    with pytest.raises(ModelError, match="empty"):
        structure.match(models["llama"], [])
    with pytest.raises(ConfigError) as unknown:
        structure.match(models["llama"], "auto", "loar")
    assert unknown.value.nearest == "lora"


def test_the_output_head_is_no_target(models):
    with pytest.raises(ModelError):
        structure.match(models["llama"], ["lm_head"])


class Strange(nn.Module):
    """No family: one attention-like block under names that no table knows."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.block = nn.ModuleDict({part: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        self.last = nn.Linear(4, 2)


def test_an_unknown_architecture_is_searched_for_attention():
    assert structure.match(Strange("my_attn")) == ["block.my_attn.0", "block.my_attn.1"]
    assert structure.match(Strange("my_attn"), "attention") == ["block.my_attn.0", "block.my_attn.1"]
    with pytest.raises(ModelError) as caught:
        structure.match(Strange("mixer"))
    assert "block.mixer" in caught.value.allowed and "last" in caught.value.allowed
    with pytest.raises(ModelError, match="bottleneck"):
        structure.match(Strange("my_attn"), "auto", "bottleneck")
    with pytest.raises(ModelError, match="hidden_size"):
        structure.hidden_size(Strange("mixer"))
    with pytest.raises(ModelError, match="embedding"):
        structure.input_embedding(Strange("mixer"))
    assert structure.head(Strange("mixer")) is None
    assert structure.output_head(Strange("mixer")) is None


def test_what_counts_as_linear():
    class Quantized(nn.Module):
        in_features, out_features = 3, 5

        def forward(self, x):
            return x

    assert structure.is_linear(Quantized()) and structure.features(Quantized()) == (3, 5)
    assert structure.is_linear(nn.Linear(3, 5)) and structure.features(nn.Linear(3, 5)) == (3, 5)
    for other in (nn.Embedding(3, 5), nn.LayerNorm(3), nn.Conv2d(3, 5, 1), nn.Bilinear(2, 3, 4)):
        assert not structure.is_linear(other)
    with pytest.raises(ModelError, match="not linear"):
        structure.features(nn.LayerNorm(3))

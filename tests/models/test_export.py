"""Adapters on disk: PEFT loads them, transformers loads merged models, and we read back what we wrote."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.core.errors import ConfigError, ModelError, RunError
from fedllm.core.tensors import Tensors
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.export import CONFIG, WEIGHTS, load_adapter, save_adapter, save_merged
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.structure import mark_fresh

peft = pytest.importorskip("peft")

CLASSES = "sequence-classification"
TAGS = "token-classification"
WITH_PEFT = [
    ("lora", "llama", "causal-lm"), ("lora", "qwen", "causal-lm"), ("lora", "gpt2", "causal-lm"),
    ("lora", "t5", "seq2seq"), ("lora", "bert", CLASSES), ("lora", "gpt2", CLASSES), ("lora", "llama", CLASSES),
    ("lora", "gpt2", TAGS), ("lora", "bert", TAGS),
    ("ia3", "llama", "causal-lm"), ("ia3", "gpt2", "causal-lm"), ("ia3", "t5", "seq2seq"), ("ia3", "bert", CLASSES),
    ("prompt", "llama", "causal-lm"), ("prompt", "gpt2", "causal-lm"), ("prompt", "bert", CLASSES),
    ("prompt", "bert", TAGS), ("prefix", "llama", "causal-lm"), ("prefix", "gpt2", "causal-lm"),
]  # fmt: skip
OF_OUR_OWN = [
    ("bottleneck", "llama", "causal-lm"), ("bottleneck", "bert", CLASSES), ("bitfit", "gpt2", "causal-lm"),
    ("bitfit", "bert", CLASSES), ("head", "bert", CLASSES), ("full", "qwen", "causal-lm"), ("full", "bert", TAGS),
]  # fmt: skip
MERGEABLE = [
    ("lora", "llama", "causal-lm"), ("lora", "gpt2", "causal-lm"), ("lora", "t5", "seq2seq"), ("lora", "bert", CLASSES),
    ("ia3", "llama", "causal-lm"), ("ia3", "gpt2", "causal-lm"), ("ia3", "t5", "seq2seq"), ("ia3", "bert", CLASSES),
    ("bitfit", "gpt2", "causal-lm"), ("bitfit", "bert", CLASSES), ("head", "bert", CLASSES), ("head", "llama", CLASSES),
    ("full", "llama", "causal-lm"), ("full", "gpt2", "causal-lm"), ("full", "t5", "seq2seq"), ("full", "bert", TAGS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def put(kind: str, family: str, task: str, dtype: str = "float32", biases: float = 0.1, **options: Any) -> Adapted:
    labels = ["a", "b", "c"] if task.endswith("classification") else None
    loaded = load_model(ModelSettings(name=f"toy:{family}", device="cpu", dtype=dtype), task, labels)  # type: ignore[arg-type]
    stream = torch.Generator().manual_seed(2)
    for name, parameter in loaded.model.named_parameters():  # the biases of a new model are zero
        if name.endswith("bias"):
            parameter.data += biases * torch.randn(parameter.shape, generator=stream)
    return Adapted(loaded, AdapterSettings(kind=kind, rank=4, tokens=3, width=5, **options), seed=3)  # type: ignore[arg-type]


def shaken(params: Tensors, size: float = 0.1) -> Tensors:
    stream = torch.Generator().manual_seed(1)
    return {name: t + size * torch.randn(t.shape, generator=stream) for name, t in params.items()}


def inputs(task: str, family: str = "") -> dict[str, torch.Tensor]:
    ids = 20 + torch.arange(14).view(2, 7) * 13 % 300
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 5:] = 0
    if task == CLASSES and family in ("llama", "gpt2"):
        batch["input_ids"][1, 5:] = 0  # the padding token: such a model reads the last other token
    if family == "bert":
        batch["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    if task == "seq2seq":
        batch["decoder_input_ids"] = ids[:, :4]
    return batch


def ours(adapted: Adapted, params: Tensors | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    bound = None if params is None else {name: t.unsqueeze(0) for name, t in params.items()}
    with torch.no_grad(), adapted.using(bound):
        return adapted.call(batch).logits


def alone(adapted: Adapted) -> Any:
    """A copy of the base model without our hooks."""
    adapted.remove()
    return copy.deepcopy(adapted.model)


def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def equal(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# --- PEFT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "task"), WITH_PEFT)
def test_peft_loads_what_we_save_and_gives_the_same_logits(kind: str, family: str, task: str, tmp_path: Path):
    adapted = put(kind, family, task)
    params, batch = shaken(adapted.initial()), inputs(task, family)
    if kind in ("prompt", "prefix") and task == "causal-lm":
        batch["attention_mask"][:] = 1
    expected = ours(adapted, params, batch)
    assert not torch.allclose(expected[:, -7:], ours(adapted, None, batch)[:, -7:], atol=1e-3)
    save_adapter(tmp_path / "adapter", adapted, params, {"run": "r1"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing keys, unknown options: PEFT only warns
        model = peft.PeftModel.from_pretrained(alone(adapted), str(tmp_path / "adapter"))
    assert torch.allclose(theirs(model, batch), expected, atol=1e-5)
    settings, back = load_adapter(tmp_path / "adapter")
    assert settings == adapted.settings and equal(back, params)


def test_a_head_with_more_than_one_layer_travels_whole(tmp_path: Path):
    adapted = put("lora", "bert", CLASSES)
    mark_fresh(adapted.model, ["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    adapted.remove()
    adapted = Adapted(adapted.loaded, adapted.settings, seed=3)
    params = shaken(adapted.initial())
    assert {"bert.pooler.dense.weight", "classifier.bias"} <= set(params)
    expected = ours(adapted, params, inputs(CLASSES, "bert"))
    save_adapter(tmp_path / "adapter", adapted, params)
    model = peft.PeftModel.from_pretrained(alone(adapted), str(tmp_path / "adapter"))
    assert torch.allclose(theirs(model, inputs(CLASSES, "bert")), expected, atol=1e-5)
    assert equal(load_adapter(tmp_path / "adapter")[1], params)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_smaller_rank_keeps_the_scale_of_the_settings(family: str, tmp_path: Path):
    adapted = put("lora", family, "causal-lm", alpha=10.0)
    whole = shaken(adapted.initial())
    small = {n: (t[:3] if n.endswith("A") else t[:, :3]).contiguous() for n, t in whole.items()}
    expected = ours(adapted, small, inputs("causal-lm"))
    save_adapter(tmp_path / "adapter", adapted, small)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 7.5
    assert config["fan_in_fan_out"] is (family == "gpt2")
    model = peft.PeftModel.from_pretrained(alone(adapted), str(tmp_path / "adapter"))
    assert torch.allclose(theirs(model, inputs("causal-lm")), expected, atol=1e-5)
    settings, back = load_adapter(tmp_path / "adapter")
    assert settings == adapted.settings and equal(back, small)


@pytest.mark.parametrize(("targets", "expected"), [
    ("auto", ["q_proj", "v_proj"]),
    ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    (r".*\.1\..*(q|k)_proj", ["1.self_attn.q_proj", "1.self_attn.k_proj"]),
])  # fmt: skip
def test_target_modules_are_short_and_exact(targets: str, expected: list[str], tmp_path: Path):
    adapted = put("lora", "llama", "causal-lm", targets=targets)
    save_adapter(tmp_path / "adapter", adapted, adapted.initial())
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == expected
    model = peft.PeftModel.from_pretrained(alone(adapted), str(tmp_path / "adapter"))
    named = {n.removeprefix("base_model.model.").replace(".default.weight", "") for n, _ in model.named_parameters()}
    assert {n for n in named if "lora_" in n} == set(adapted.initial())


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": r".*\.0\.self_attn\.(q|o)_proj"}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["v_proj"], "exclude_modules": ["0.self_attn.v_proj"]}),
])  # fmt: skip
def test_we_load_lora_that_peft_saved(family: str, options: dict[str, Any], tmp_path: Path):
    base = put("lora", family, "causal-lm")
    plain = alone(base)
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.25, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.eval().save_pretrained(str(tmp_path))
    settings, params = load_adapter(tmp_path)
    assert (settings.kind, settings.rank, settings.alpha, settings.dropout) == ("lora", 3, 5.0, 0.25)
    adapted = Adapted(base.loaded, settings, seed=0)
    assert set(params) == set(adapted.initial())
    batch = inputs("causal-lm")
    assert torch.allclose(ours(adapted, params, batch), theirs(model, batch), atol=1e-5)


def test_we_load_a_classifier_that_peft_saved(tmp_path: Path):
    base = put("lora", "bert", CLASSES)
    model = peft.get_peft_model(alone(base), peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.eval().save_pretrained(str(tmp_path))
    settings, params = load_adapter(tmp_path)
    adapted = Adapted(base.loaded, settings, seed=0)
    assert set(params) == set(adapted.initial())
    batch = inputs(CLASSES, "bert")
    assert torch.allclose(ours(adapted, params, batch), theirs(model, batch), atol=1e-5)


@pytest.mark.parametrize("config", [
    lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                           task_type="CAUSAL_LM"),
    lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
])  # fmt: skip
def test_we_load_the_other_kinds_that_peft_saved(config: Any, tmp_path: Path):
    base = put("lora", "llama", "causal-lm")
    model = peft.get_peft_model(alone(base), config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.eval().save_pretrained(str(tmp_path))
    settings, params = load_adapter(tmp_path)
    adapted, batch = Adapted(base.loaded, settings, seed=0), inputs("causal-lm")
    batch["attention_mask"][:] = 1
    assert {n: t.shape for n, t in params.items()} == {n: t.shape for n, t in adapted.initial().items()}
    assert torch.allclose(ours(adapted, params, batch), theirs(model, batch), atol=1e-5)


@pytest.mark.parametrize(("options", "named"), [
    ({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"bias": "all"}, "bias"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
])  # fmt: skip
def test_lora_options_that_we_do_not_have_are_refused(options: dict[str, Any], named: str, tmp_path: Path):
    plain = alone(put("lora", "llama", "causal-lm"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    peft.get_peft_model(plain, config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=named) as caught:
        load_adapter(tmp_path)
    assert caught.value.allowed and caught.value.action


def test_other_types_and_tensors_of_peft_are_refused(tmp_path: Path):
    plain = alone(put("lora", "llama", "causal-lm"))
    config = peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(str(tmp_path / "loha"))
    with pytest.raises(ModelError, match=r"LOHA.*LORA"):
        load_adapter(tmp_path / "loha")
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(plain, config).save_pretrained(str(tmp_path / "embedding"))
    with pytest.raises(ModelError, match="embed_tokens"):
        load_adapter(tmp_path / "embedding")
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    plain = alone(put("lora", "llama", "causal-lm"))
    peft.get_peft_model(plain, config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ModelError, match="feedforward_modules"):
        load_adapter(tmp_path / "ia3")


# --- a format of our own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "task"), OF_OUR_OWN)
def test_kinds_that_peft_lacks_come_back_bit_by_bit(kind: str, family: str, task: str, tmp_path: Path):
    adapted = put(kind, family, task)
    params = shaken(adapted.initial())
    save_adapter(tmp_path / "adapter", adapted, params, {"method": "fedavg"})
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["peft_type"] == "FEDLLM" and config["kind"] == kind
    readme = (tmp_path / "adapter" / "README.md").read_text()
    assert kind in readme and adapted.loaded.name in readme and "load_adapter" in readme and "fedavg" in readme
    settings, back = load_adapter(tmp_path / "adapter")
    assert settings == adapted.settings and equal(back, params)
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))


@pytest.mark.parametrize(("kind", "family", "task"), [("bottleneck", "bert", CLASSES), ("lora", "llama", "causal-lm")])
def test_the_readme_says_what_works(kind: str, family: str, task: str, tmp_path: Path):
    adapted, folder = put(kind, family, task, biases=0.0), tmp_path / "adapter"
    params, batch = shaken(adapted.initial()), inputs(task, family)
    save_adapter(folder, adapted, params)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    expected = ours(adapted, params, batch)
    place = {"inputs": batch, "base": alone(adapted)}
    with torch.no_grad():
        exec(code.replace("THIS_FOLDER", str(folder)), place)
    found = place["output"].logits if kind == "bottleneck" else theirs(place["model"], batch)
    assert torch.allclose(found, expected, atol=1e-5)


def test_dtypes_and_strided_tensors_survive(tmp_path: Path):
    adapted = put("lora", "llama", "causal-lm")
    wide = torch.randn(2, 8, 64)
    params = {n: wide[0, ::2] if n.endswith("A") else t.bfloat16() for n, t in adapted.initial().items()}
    save_adapter(tmp_path / "adapter", adapted, params)
    assert equal(load_adapter(tmp_path / "adapter")[1], params)


# --- merged models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family", "task"), MERGEABLE)
def test_transformers_loads_a_merged_model_with_the_same_logits(kind: str, family: str, task: str, tmp_path: Path):
    import transformers

    from fedllm.models.load import AUTO

    adapted = put(kind, family, task)
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    params, batch = shaken(adapted.initial()), inputs(task, family)
    expected = ours(adapted, params, batch)
    save_merged(tmp_path / "model", adapted, params)
    model, info = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(theirs(model.eval(), batch), expected, atol=1e-4)
    assert not torch.allclose(expected, ours(adapted, None, batch), atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("a text")["input_ids"] == adapted.loaded.tokenizer("a text")["input_ids"]
    if task == CLASSES:
        assert list(model.config.id2label.values()) == ["a", "b", "c"]
    labels = ["a", "b", "c"] if task in (CLASSES, TAGS) else None
    again = load_model(ModelSettings(name=str(tmp_path / "model"), device="cpu"), task, labels)  # type: ignore[arg-type]
    assert torch.allclose(theirs(again.model, batch), expected, atol=1e-4)


def test_a_merged_model_writes_with_its_cache_on(tmp_path: Path):
    adapted = put("lora", "llama", "causal-lm")
    assert adapted.model.config.use_cache is False
    save_merged(tmp_path / "model", adapted, shaken(adapted.initial()))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True
    assert adapted.model.config.use_cache is False


def test_a_bfloat16_base_stays_bfloat16_when_merged(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    adapted = put("lora", "llama", "causal-lm", dtype="bfloat16")
    params = shaken(adapted.initial())
    save_merged(tmp_path / "model", adapted, params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj"
    change = 16 / 4 * params[f"{name}.lora_B"] @ params[f"{name}.lora_A"]
    exact = adapted.model.get_parameter(f"{name}.weight").float() + change
    assert torch.equal(model.get_parameter(f"{name}.weight"), exact.bfloat16()), "rounded once"


@pytest.mark.parametrize(("kind", "family"), [("prompt", "llama"), ("prefix", "llama"), ("bottleneck", "gpt2")])
def test_kinds_that_are_no_change_of_weights_are_not_merged(kind: str, family: str, tmp_path: Path):
    adapted = put(kind, family, "causal-lm")
    with pytest.raises(ModelError, match=f"{kind}.*lora"):
        save_merged(tmp_path / "model", adapted, adapted.initial())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_quantised_layer_is_not_merged(kind: str, tmp_path: Path):
    adapted = put(kind, "llama", "causal-lm")
    layer = adapted.model.get_submodule("model.layers.0.self_attn.v_proj")
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        save_merged(tmp_path / "model", adapted, adapted.initial())
    assert not any(tmp_path.iterdir())


# --- what is refused, and what a failure leaves ------------------------------------------------------------------


def broken(params: Tensors, how: str) -> Tensors:
    first = next(iter(params))
    if how == "missing":
        return {name: t for name, t in params.items() if name != first}
    if how == "strange":
        return {**params, f"{first}x": params[first]}
    if how == "stacked":
        return {name: t.unsqueeze(0) for name, t in params.items()}
    if how == "rank":
        return {**params, first: params[first][:2]}
    return {**params, first: torch.full_like(params[first], float("nan"))}


@pytest.mark.parametrize("how", ["missing", "strange", "stacked", "rank", "nan"])
@pytest.mark.parametrize("save", [save_adapter, save_merged])
def test_tensors_that_do_not_fit_are_refused(how: str, save: Any, tmp_path: Path):
    adapted = put("lora", "llama", "causal-lm")
    with pytest.raises(ModelError, match="lora_"):
        save(tmp_path / "out", adapted, broken(adapted.initial(), how))
    assert not any(tmp_path.iterdir())


def test_an_adapter_is_replaced_whole_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapted = put("lora", "llama", "causal-lm")
    first, second = adapted.initial(), shaken(adapted.initial())
    place = tmp_path / "deep" / "adapter"
    save_adapter(place, adapted, first)
    save_adapter(place, adapted, second)
    assert equal(load_adapter(place)[1], second)
    assert [path.name for path in place.parent.iterdir()] == ["adapter"]
    assert place.stat().st_mode == place.parent.stat().st_mode
    for target in ("notes", "base", "file"):
        (tmp_path / target).mkdir() if target != "file" else (tmp_path / target).write_text("x")
    (tmp_path / "notes" / "mine.txt").write_text("x")
    (tmp_path / "base" / "config.json").write_text("{}")
    for target in ("notes", "base", "file"):
        for save in (save_adapter, save_merged):
            with pytest.raises(RunError, match="something else"):
                save(tmp_path / target, adapted, first)
    with pytest.raises(RunError, match="something else"):
        save_merged(place, adapted, first)
    (tmp_path / "empty").mkdir()
    save_adapter(tmp_path / "empty", adapted, first)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_adapter(tmp_path / "link", adapted, second)
    assert (tmp_path / "link").is_symlink() and equal(load_adapter(tmp_path / "empty")[1], second)
    monkeypatch.chdir(tmp_path)
    save_adapter("relative", adapted, first)
    assert equal(load_adapter("relative")[1], first)


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_failure_leaves_what_was_there(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapted = put("lora", "llama", "causal-lm")
    first, place = adapted.initial(), tmp_path / "adapter"
    save_adapter(place, adapted, first)
    name, method = ("write_text", Path.write_text) if where == "write" else ("rename", Path.rename)

    def full_disk(self: Path, *args: Any, **options: Any) -> Any:
        if where == "write" or (self.name.startswith(".adapter") and not self.name.endswith(".old")):
            raise OSError(28, "No space left on device")
        return method(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(Path, name, full_disk)
        save_adapter(place, adapted, shaken(first))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert equal(load_adapter(place)[1], first)


def test_damaged_folders_are_refused(tmp_path: Path):
    adapted = put("lora", "llama", "causal-lm")
    whole = tmp_path / "whole"
    save_adapter(whole, adapted, adapted.initial())

    def copied(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    def refused(place: Path, match: str) -> None:
        with pytest.raises((ModelError, ConfigError), match=match):
            load_adapter(place)

    refused(tmp_path / "nowhere", "no adapter_config.json")
    (place := copied("pickle")).joinpath(WEIGHTS).rename(place / "adapter_model.bin")
    refused(place, "safetensors only")
    (place := copied("cut")).joinpath(WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes()[:900])
    refused(place, "damaged")
    (place := copied("json")).joinpath(CONFIG).write_text("{")
    refused(place, "damaged")
    (place := copied("list")).joinpath(CONFIG).write_text("[]")
    refused(place, "damaged|type None")

    config, tensors = json.loads((whole / CONFIG).read_text()), load_file(whole / WEIGHTS)
    for name, changed, match in (
        ("alpha", {"lora_alpha": 99}, "was changed"), ("rank", {"r": 9}, "r=9"), ("zero", {"lora_alpha": 0}, "alpha"),
        ("kind", {"peft_type": "IA3"}, "not part of"),
    ):  # fmt: skip
        (place := copied(name)).joinpath(CONFIG).write_text(json.dumps({**config, **changed}))
        refused(place, match)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, copied("nan") / WEIGHTS)
    refused(tmp_path / "nan", "not finite")

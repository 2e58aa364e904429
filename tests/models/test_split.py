"""Split - three parts give the bits of the whole, know what they hold, and refuse what cannot be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModelError, UploadRejected
from fedllm.models.split import LAYOUTS, Parts, assemble, split
from fedllm.models.structure import layer_count
from fedllm.models.toy import toy_model

CASES = [
    ("bert", "masked-lm"),
    ("bert", "sequence-classification"),
    ("llama", "causal-lm"),
    ("llama", "sequence-classification"),
    ("qwen", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("gpt2", "sequence-classification"),
]
every_case = pytest.mark.parametrize(("family", "kind"), CASES)
CUTS = [(0, 2), (1, 2), (0, 1), (1, 1), (0, 0), (2, 2)]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, 9] and a mask with padding at the right."""
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 2:] = 0, 0
    return ids, mask


def padded(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), ids, torch.full_like(ids, model.config.pad_token_id or 0))


def through(parts: Parts, ids: torch.Tensor, mask: torch.Tensor, params: Any = None, seen: Any = None) -> torch.Tensor:
    return parts.back(parts.body(parts.front(ids, mask, params), mask, params), mask, params, seen)


@every_case
@pytest.mark.parametrize("cut", CUTS)
def test_the_parts_give_the_bits_of_the_whole(family: str, kind: Any, cut: tuple[int, int]) -> None:
    model = toy_model(family, kind=kind, seed=3).model
    ids, mask = batch()
    ids = padded(model, ids, mask)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        parts = split(model, *cut)
        assert torch.equal(through(parts, ids, mask), whole)
        assert torch.equal(through(parts, ids, mask, seen=ids), whole)
        assert torch.equal(through(parts, ids, mask.to(torch.uint8)), whole)
        assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, whole)


@every_case
def test_every_parameter_has_one_holder(family: str, kind: Any) -> None:
    model = toy_model(family, kind=kind).model
    parts, every = split(model, 0, 1), dict(model.named_parameters())
    assert set(parts.ends) | set(parts.body.names) == set(every)
    assert not set(parts.ends) & set(parts.body.names)
    assert parts.resident()["client"] == sum(every[name].numel() for name in parts.ends)
    assert sum(parts.resident().values()) == sum(p.numel() for p in every.values())
    assert parts.resident()["client"] < sum(p.numel() for p in every.values())
    assert all(tensor is every[name] for name, tensor in parts.body.tensors().items())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_tied_weight_is_one_tensor_of_both_ends(family: str) -> None:
    model = toy_model(family).model
    parts = split(model)
    table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert table in parts.front.names and table in parts.back.names and parts.ends.count(table) == 1
    ids, mask = batch()
    values = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    whole = {n: t.detach().clone().requires_grad_() for n, t in values.items()}
    through(parts, ids, mask, values).square().mean().backward()
    out = torch.func.functional_call(model, whole, (), {"input_ids": ids, "attention_mask": mask})
    out.logits.square().mean().backward()
    for name, tensor in values.items():
        assert torch.allclose(tensor.grad, whole[name].grad, atol=1e-7), name  # both uses of the table count


@every_case
def test_parts_run_on_given_values_and_assemble(family: str, kind: Any) -> None:
    one, two = toy_model(family, kind=kind, seed=1).model, toy_model(family, kind=kind, seed=2).model
    ids, mask = batch()
    ids = padded(one, ids, mask)
    other = {n: p.detach().clone() for n, p in two.named_parameters()}
    parts = split(one, 1, 2)
    with torch.no_grad():
        wanted = two(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(through(parts, ids, mask, other), wanted)
        ends, body = {n: other[n] for n in parts.ends}, {n: other[n] for n in parts.body.names}
        assemble(one, ends, body)
        assert torch.equal(one(input_ids=ids, attention_mask=mask).logits, wanted)
        if one.get_output_embeddings() is not None and one.config.tie_word_embeddings:
            assert one.get_output_embeddings().weight is one.get_input_embeddings().weight


def test_segments_reach_the_front() -> None:
    model = toy_model("bert").model
    ids, mask = batch()
    kinds = (torch.arange(9) > 4).long().expand(3, -1)
    parts = split(model)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).logits
        found = parts.back(parts.body(parts.front(ids, mask, segments=kinds), mask), mask)
    assert torch.equal(found, wanted)


def test_layers_with_sliding_attention_keep_their_kind() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(
        **sizes, vocab_size=64, num_hidden_layers=4, layer_types=kinds, sliding_window=3, use_sliding_window=True
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids, mask = batch()
    ids = ids % 64
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for cut in ((1, 3), (3, 4), (0, 3)):
            assert torch.equal(through(split(model, *cut), ids, mask), whole)
    assert model.config.layer_types == kinds


@pytest.mark.parametrize("family", sorted(set(LAYOUTS) - {"bert", "gpt2"}))
def test_every_listed_family(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.AutoConfig.for_model(family, **sizes, vocab_size=64, max_position_embeddings=32)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 2
    masked = family in ("roberta", "xlm-roberta", "camembert")
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    ids, mask = batch()
    ids = torch.where(mask.bool(), ids % 60 + 3, torch.full_like(ids, 1))
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(through(split(model, 1, 2), ids, mask), whole)


@pytest.mark.parametrize("cut", [(-1, 2), (0, 3), (2, 1), (3, None), (0, -1)])
def test_a_cut_outside_the_layers_is_refused(cut: tuple[int, int | None]) -> None:
    model = toy_model("bert").model
    with pytest.raises(ConfigError, match="Allowed: 0 <= first <= last <= 2"):
        split(model, *cut)
    assert layer_count(model) == 2


def test_an_unknown_family_and_a_model_without_head_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'t5' cannot be split\. Allowed: bert"):
        split(toy_model("t5").model)
    with pytest.raises(ModelError, match="without a head"):
        split(toy_model("bert", kind="feature-extraction").model)
    with pytest.raises(ModelError, match="Linear"):
        split(torch.nn.Linear(2, 2))


def test_missing_and_double_values_are_refused() -> None:
    model = toy_model("bert").model
    parts = split(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    ends, body = {n: values[n] for n in parts.ends}, {n: values[n] for n in parts.body.names}
    lacking = dict(list(body.items())[1:])
    with pytest.raises(ConfigError, match="is not given"):
        parts.body(torch.zeros(1, 2, 64), torch.ones(1, 2), lacking)
    with pytest.raises(UploadRejected, match="1 missing"):
        assemble(model, ends, lacking)
    with pytest.raises(ConfigError, match="Two model parts name"):
        assemble(model, ends, body, body)


def test_an_adapter_stays_on_its_layers() -> None:
    from fedllm.models.adapters.attach import Adapted
    from fedllm.models.adapters.settings import AdapterSettings

    loaded = toy_model("llama")
    adapted = Adapted(loaded, AdapterSettings(rank=2), 0)
    draw = torch.Generator().manual_seed(1)
    stacked = {n: torch.randn(1, *t.shape, generator=draw) for n, t in adapted.initial().items()}
    ids, mask = batch()
    with torch.no_grad(), adapted.using(stacked):
        whole = adapted.call({"input_ids": ids, "attention_mask": mask}).logits
        assert torch.equal(through(split(loaded.model, 1, 2), ids, mask), whole)
    with torch.no_grad():
        assert not torch.equal(through(split(loaded.model, 1, 2), ids, mask), whole)

"""The soft context of a dual encoder: where it stands, what it begins as, and one pass for many clients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.context import check_end, digest, splice, tokens_of
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.toy import toy_model

NAMES = ["cat", "small red dog", "bird_of_prey"]


@pytest.fixture(scope="module")
def clip() -> Loaded:
    torch.set_num_threads(1)
    return toy_model("clip")


def adapted(clip: Loaded, **options: Any) -> Adapted:
    return Adapted(clip, AdapterSettings(**{"kind": "context", "tokens": 5, **options}), 0, NAMES)


def features(found: Adapted, context: torch.Tensor) -> torch.Tensor:
    """[K, C, d]"""
    soft = found.context
    assert soft is not None
    prompts = soft.prompts(NAMES)
    width = context.shape[0]
    with found.using({soft.name: context}), soft.reading(prompts):
        output = found.model.get_text_features(prompts.ids.repeat(width, 1), prompts.mask.repeat(width, 1))
    return output.pooler_output.view(width, len(NAMES), -1)


@pytest.mark.parametrize(("position", "before", "between"), [("end", 5, 0), ("middle", 2, 3), ("front", 0, 5)])
def test_where_the_context_stands(clip: Loaded, position: str, before: int, between: int) -> None:
    found = adapted(clip, position=position)
    assert found.context is not None
    prompts, tokenizer = found.context.prompts(NAMES), clip.tokenizer
    for row, name in enumerate(NAMES):
        word = tokens_of(clip, name)
        ids = prompts.ids[row][prompts.mask[row].bool()].tolist()
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert ids[1 + before : 1 + before + len(word)] == word
        assert ids[-2:-1] == tokens_of(clip, ".") and len(ids) == 1 + 5 + len(word) + 1 + 1
        after = 1 + before + len(word)
        assert prompts.places[row].tolist() == [*range(1, 1 + before), *range(after, after + between)]
        assert ids.count(tokenizer.eos_token_id) == 1
    assert tokens_of(clip, "bird_of_prey") == tokens_of(clip, "bird of prey")


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_embeddings_of_words_give_the_text_of_those_words(clip: Loaded, position: str) -> None:
    """A context of the embeddings of real words is exactly the text with these words."""
    words = "the good"
    found = adapted(clip, words=words, position=position)
    soft, given = found.context, tokens_of(clip, words)
    assert soft is not None and soft.length == len(given) and soft.initial.shape == (len(given), 64)
    got = features(found, soft.initial.unsqueeze(0))[0]
    for row, name in enumerate(NAMES):
        word, half = tokens_of(clip, name), {"end": len(given), "middle": len(given) // 2, "front": 0}[position]
        inside = [*given[:half], *word, *given[half:], *tokens_of(clip, ".")]
        ids = torch.tensor([[clip.tokenizer.bos_token_id, *inside, clip.tokenizer.eos_token_id]])
        wanted = clip.model.get_text_features(ids).pooler_output[0]
        assert torch.allclose(got[row], wanted, atol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
def test_one_pass_for_many_clients(clip: Loaded, per_class: bool) -> None:
    found = adapted(clip, per_class=per_class)
    assert found.context is not None
    shape = (3, 5, 64) if per_class else (5, 64)
    assert found.context.initial.shape == shape
    contexts = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    together = features(found, contexts)
    for k in range(4):
        assert torch.allclose(together[k], features(found, contexts[k : k + 1])[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_class_sees_its_own_context_only(clip: Loaded) -> None:
    found = adapted(clip, per_class=True)
    assert found.context is not None
    moved = found.context.initial.clone()
    moved[1] = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    left, right = (features(found, each.unsqueeze(0))[0] for each in (found.context.initial, moved))
    assert torch.equal(left[[0, 2]], right[[0, 2]]) and not torch.allclose(left[1], right[1], atol=1e-3)


def test_the_gradient_goes_into_the_context_alone(clip: Loaded) -> None:
    for position in ("end", "middle", "front"):
        found = adapted(clip, position=position)
        assert found.context is not None
        context = found.context.initial.unsqueeze(0).requires_grad_()
        features(found, context).square().sum().backward()
        assert context.grad is not None and bool((context.grad.abs().sum(2) > 0).all())
        assert all(p.grad is None for p in clip.model.parameters())


def test_random_values(clip: Loaded) -> None:
    found = adapted(clip, tokens=100).initial()["context"]
    assert found.dtype == torch.float32 and found.std() == pytest.approx(0.02, rel=0.05)
    again = adapted(clip, tokens=100).initial()["context"]
    assert torch.equal(found, again) and abs(float(found.mean())) < 1e-3
    other = Adapted(clip, AdapterSettings(kind="context", tokens=100), 1).initial()["context"]
    assert not torch.equal(found, other)


def test_only_the_context_is_trained(clip: Loaded) -> None:
    assert list(adapted(clip).initial()) == ["context"]
    assert list(adapted(clip, per_class=True).initial()) == [f"context.{digest(NAMES)}"]
    assert digest(NAMES) != digest(NAMES[::-1])


def test_nothing_is_left_in_the_model(clip: Loaded) -> None:
    ids = torch.tensor([[1, 40, 41, 3]])
    before = clip.model.get_text_features(ids).pooler_output
    found = adapted(clip)
    features(found, torch.randn(1, 5, 64))
    assert torch.equal(before, clip.model.get_text_features(ids).pooler_output)
    with found.using({"context": torch.randn(1, 5, 64)}):  # texts that are no class prompts
        assert torch.equal(before, clip.model.get_text_features(ids).pooler_output)


def test_the_context_stays_float32_under_half_precision() -> None:
    embedded = torch.zeros(2, 4, 3, dtype=torch.bfloat16)
    context = torch.full((1, 1, 3), 0.1, requires_grad=True)
    found = splice(embedded, context, torch.tensor([[1], [2]]))
    assert found.dtype == torch.bfloat16 and context.dtype == torch.float32
    found.float().sum().backward()
    assert context.grad is not None and context.grad.dtype == torch.float32
    assert bool((found[0, 1] != 0).all()) and bool((found[1, 2] != 0).all()) and int((found != 0).sum()) == 6


def test_what_is_refused(clip: Loaded) -> None:
    with pytest.raises(ValueError, match="tokens"):
        AdapterSettings(kind="context", tokens=0)
    soft = adapted(clip, tokens=250).context
    assert soft is not None
    with pytest.raises(DataError, match=r"'small red dog' has \d+ tokens, 250 of them context"):
        soft.prompts(["small red dog"])
    with pytest.raises(DataError, match="no tokens"):
        soft.prompts([""])
    with pytest.raises(ConfigError, match="no tokens"):
        adapted(clip, words="")
    with pytest.raises(ConfigError, match="names of the classes"):
        Adapted(clip, AdapterSettings(kind="context", per_class=True), 0)
    with pytest.raises(ModelError, match="not a dual encoder"):
        Adapted(toy_model("bert"), AdapterSettings(kind="context"), 0)


def test_another_class_list_is_refused(clip: Loaded) -> None:
    here, there = adapted(clip, per_class=True), Adapted(
        clip, AdapterSettings(kind="context", per_class=True, tokens=5), 0, NAMES[::-1]
    )  # fmt: skip
    assert here.context is not None
    here.context.check(here.initial())
    here.context.check(None)
    with pytest.raises(ConfigError, match="another list of classes"):
        here.context.check(there.initial())


def test_the_end_token_must_be_the_towers(clip: Loaded) -> None:
    check_end(clip)
    text = clip.model.config.text_config
    stated = text.eos_token_id
    try:
        for wrong in (2, 7):  # 2: transformers would take the highest token, which is not the end here
            text.eos_token_id = wrong
            with pytest.raises(ModelError, match=f"token {wrong}"):
                check_end(clip)
    finally:
        text.eos_token_id = stated

"""The dual encoder's learner: transformers' own logits, one pass for many clients, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded, load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy import toy_model
from fedllm.models.toy_clip_pretrain import DIGITS, digit_images, pretrain, styled_names
from fedllm.tasks.dual_encoder import NEVER, DualEncoderLearner
from fedllm.tasks.settings import TaskSettings

NAMES = ["cat", "red dog", "bird", "fish"]
CONTEXT = AdapterSettings(kind="context", tokens=4)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = numpy.random.default_rng(seed)
    images = draw.integers(0, 256, (count, 32, 32, 3)).astype(numpy.uint8)
    return [{"image": image, "label": NAMES[i % 4]} for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def clip() -> Loaded:
    torch.set_num_threads(1)
    return toy_model("clip")


def make(clip: Loaded, adapter: AdapterSettings = CONTEXT, names: Any = NAMES, **task: Any) -> DualEncoderLearner:
    return DualEncoderLearner(clip, TaskSettings(kind="dual-encoder", **task), adapter, names, 0)


@pytest.fixture(scope="module")
def learner(clip: Loaded) -> DualEncoderLearner:
    return make(clip)


def transformers_logits(clip: Loaded, texts: list[str], held: list[dict[str, Any]]) -> torch.Tensor:
    assert clip.images is not None and clip.tokenizer is not None
    pixels = torch.stack([clip.images(row["image"]) for row in held])
    encoded = clip.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return clip.model(pixel_values=pixels, **encoded).logits_per_image


def test_zero_shot_is_what_transformers_computes(clip: Loaded, learner: DualEncoderLearner) -> None:
    held = rows(6)
    wanted = transformers_logits(clip, [f"a photo of a {name}." for name in NAMES], held)
    with torch.no_grad(), learner.using(None):
        found = torch.stack(learner.outputs([learner.prepare(held)]))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_template_is_the_users(clip: Loaded) -> None:
    held = rows(3)
    wanted = transformers_logits(clip, [f"{name} is here" for name in NAMES], held)
    own = make(clip, template="{} is here")
    with torch.no_grad(), own.using(None):
        assert torch.allclose(torch.stack(own.outputs([own.prepare(held)])), wanted, atol=1e-4)


def test_counts_and_values(learner: DualEncoderLearner) -> None:
    examples = learner.prepare(rows(8))
    with torch.no_grad(), learner.using(None):
        logits, counts = torch.stack(learner.outputs([examples])), learner.counts_by_row([examples])
    labels = torch.arange(8) % 4
    total = {name: sum(found.get(name, 0.0) for found in counts) for found in counts for name in found}
    values = learner.values(total)
    assert values["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert values["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert learner.score_names[0] == "accuracy" and learner.higher_is_better
    assert learner.values({})["accuracy"] is None


@pytest.mark.parametrize(
    "adapter",
    [
        CONTEXT,
        AdapterSettings(kind="context", tokens=4, per_class=True),
        AdapterSettings(kind="lora", rank=2),
        AdapterSettings(kind="lora", rank=2, targets=[r"text_model\..*q_proj"]),
        AdapterSettings(kind="bitfit"),
    ],
    ids=["context", "per class", "lora", "lora of the text", "bitfit"],
)
def test_one_pass_equals_one_by_one(clip: Loaded, adapter: AdapterSettings) -> None:
    """Clients of unequal size, different parameters: losses, gradients and logits."""
    own, draw = make(clip, adapter), torch.Generator().manual_seed(1)
    groups = [own.prepare(rows(count, count)) for count in (3, 5, 1)]
    start = {n: t + 0.05 * torch.randn(3, *t.shape, generator=draw) for n, t in own.initial().items()}

    def run(stack: dict[str, torch.Tensor], held: Any) -> tuple[Any, ...]:
        leaves = {n: t.clone().requires_grad_() for n, t in stack.items()}
        with own.using(leaves):
            losses = own.losses(held)
            logits = [x.detach() for x in own.outputs(held)]
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses.detach(), torch.stack(logits), [torch.zeros(1) if g is None else g for g in grads]

    losses, logits, grads = run(start, groups)
    place = 0
    for k, group in enumerate(groups):
        one, own_logits, own_grads = run({n: t[k : k + 1] for n, t in start.items()}, [group])
        assert torch.allclose(one[0], losses[k], rtol=1e-5, atol=1e-5)
        assert torch.allclose(own_logits, logits[place : place + len(group)], atol=1e-4)
        for mine, every in zip(own_grads, grads, strict=True):
            assert torch.allclose(mine[0], every[k] if every.dim() > 1 else every[0], rtol=1e-3, atol=1e-4)
        place += len(group)
    own.adapted.remove()


def test_image_features_are_kept_where_nothing_changes_them(clip: Loaded, learner: DualEncoderLearner) -> None:
    text = make(clip, AdapterSettings(kind="lora", rank=2, targets=[r"text_model\..*q_proj"]))
    both = make(clip, AdapterSettings(kind="lora", rank=2))
    assert learner.fixed_images and text.fixed_images and not both.fixed_images
    kept, pixels = learner.prepare(rows(2))[0], both.prepare(rows(2))[0]
    assert set(kept.inputs) == {"features"} and kept.inputs["features"].shape == (32,)
    assert set(pixels.inputs) == {"pixel_values"} and pixels.inputs["pixel_values"].shape == (3, 32, 32)
    assert kept.tokens == 17 and kept.targets == 1
    with torch.no_grad():
        with learner.using(None):
            left = torch.stack(learner.outputs([learner.prepare(rows(5))]))
        with both.using(None):
            right = torch.stack(both.outputs([both.prepare(rows(5))]))
    assert torch.allclose(left, right, atol=1e-4)
    text.adapted.remove(), both.adapted.remove()


def test_all_weights_can_be_trained(clip: Loaded) -> None:
    own = make(clip, AdapterSettings(kind="full"))
    leaves = {n: t.unsqueeze(0).requires_grad_() for n, t in own.initial().items()}
    with own.using(leaves):
        own.losses([own.prepare(rows(4))]).sum().backward()
    assert own.width_limit == 1 and leaves["logit_scale"].grad is not None


def test_hidden_is_the_feature_of_the_image_and_embed_that_of_a_text(clip: Loaded, learner: DualEncoderLearner) -> None:
    with torch.no_grad(), learner.using({"context": torch.randn(2, 4, 64)}):
        groups = [learner.prepare(rows(3)), learner.prepare(rows(1))]
        (layer,) = learner.hidden(groups)
        assert layer.shape == (4, 1, 32)
        assert torch.allclose(layer.norm(dim=-1), torch.ones(4, 1), atol=1e-5)
        first, second = learner.embed([["cat", "a red dog"], ["bird"]])
    assert first.shape == (2, 32) and second.shape == (1, 32)
    assert clip.tokenizer is not None
    wanted = clip.model.get_text_features(**clip.tokenizer(["bird"], return_tensors="pt")).pooler_output
    assert torch.allclose(second, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5)
    with pytest.raises(ModelError, match="cannot write text"):
        learner.generate([["x"]], 1, 0.0, [0])


def test_a_row_may_choose_among_its_own_classes(learner: DualEncoderLearner) -> None:
    held = rows(2)
    narrow = [{**row, "classes": [row["label"], "bird"]} for row in held]
    context = {"context": torch.randn(1, 4, 64)}
    with torch.no_grad(), learner.using(context):
        every = torch.stack(learner.outputs([learner.prepare(held)]))
        some = torch.stack(learner.outputs([[*learner.prepare(narrow), *learner.prepare(held)]]))
        loss = learner.losses([learner.prepare(narrow)])
    allowed = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert torch.allclose(some[:2][allowed], every[allowed], atol=1e-5) and (some[:2][~allowed] == NEVER).all()
    assert torch.allclose(some[2:], every, atol=1e-5)
    alone = torch.stack([every[0, [0, 2]], every[1, [1, 2]]])
    wanted = torch.nn.functional.cross_entropy(alone, torch.tensor([0, 0]), reduction="sum")
    assert torch.allclose(loss[0], wanted, atol=1e-4)
    with pytest.raises(DataError, match="not among its own"):
        learner.prepare([{**held[0], "classes": ["bird"]}])
    with pytest.raises(DataError, match="'birt' is not one of"):
        learner.prepare([{**held[0], "classes": ["birt", "cat"]}])


def test_what_is_dropped_and_what_is_refused(clip: Loaded) -> None:
    own = make(clip)
    assert own.prepare([{"image": None, "label": "cat"}, {"image": [[1]], "label": None}]) == []
    assert own.task.dropped == {"the image or the label is empty": 2} and own.prepare([]) == []
    with pytest.raises(DataError, match=r"Did you mean 'red dog'"):
        own.prepare([{"image": [[1]], "label": "red dogs"}])
    with pytest.raises(DataError, match=r"data\.columns\.image"):
        own.prepare([{"picture": [[1]], "label": "cat"}])
    with pytest.raises(DataError, match="shape"):
        own.prepare([{"image": [1, 2], "label": "cat"}])
    with pytest.raises(ConfigError, match="has no classes"):
        make(clip, names=None)
    with pytest.raises(ConfigError, match="'cat' is listed twice"):
        make(clip, names=["cat", "dog", "cat"])
    with pytest.raises(DataError, match="'red dog' and 'red_dog' alike"):
        make(clip, names=["red dog", "red_dog"])
    for template in ("a photo", "{} and {}", "chat"):
        with pytest.raises(ConfigError, match="no place for the name"):
            make(clip, template=template)
    with pytest.raises(DataError, match="at most"):
        make(clip, names=["cat", "a" * 400])
    with pytest.raises(DataError, match="of them context"):
        make(clip, AdapterSettings(kind="context", tokens=253))
    with pytest.raises(ModelError, match="not a dual encoder"):
        make(toy_model("bert"))
    with pytest.raises(ModelError, match="soft prompt"):
        make(clip, AdapterSettings(kind="prompt"))
    with pytest.raises(ModelError, match="nothing to train"):
        make(clip, AdapterSettings(kind="head"))


def test_words_are_told_to_replace_the_number_of_tokens(clip: Loaded) -> None:
    own = make(clip, AdapterSettings(kind="context", words="the good", tokens=9))
    assert any("adapter.tokens=9 is not used" in note for note in own.notes)
    assert own.initial()["context"].shape[0] != 9


def test_half_precision_towers_train_a_float32_context() -> None:
    half = load_model(ModelSettings(name="toy:clip", device="cpu", dtype="bfloat16"), "dual-encoder")
    own = make(half)
    leaf = own.initial()["context"].unsqueeze(0).requires_grad_()
    assert leaf.dtype == torch.float32
    with own.using({"context": leaf}):
        own.losses([own.prepare(rows(4))]).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32 and bool(leaf.grad.abs().sum() > 0)


def test_the_towers_are_untouched(clip: Loaded) -> None:
    before = {n: t.clone() for n, t in clip.model.state_dict().items()}
    own = make(clip)
    with own.using({"context": torch.randn(2, 4, 64, requires_grad=True)}):
        own.losses([own.prepare(rows(2))] * 2).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in clip.model.state_dict().items())
    assert all(p.grad is None for p in clip.model.parameters())


def test_a_folder_is_loaded_like_any_model(tmp_path: Path) -> None:
    """Tokenizer, sizes and preprocessor of the written folder come back; the same seed gives the same bits."""
    folder = pretrain(tmp_path / "a", steps=2)
    loaded = load_model(ModelSettings(name=str(folder), device="cpu"), "dual-encoder")
    assert loaded.images is not None and (loaded.images.height, loaded.images.mean) == (8, (0.5, 0.5, 0.5))
    again = load_model(ModelSettings(name=str(pretrain(tmp_path / "b", steps=2)), device="cpu"), "dual-encoder")
    other = load_model(ModelSettings(name=str(pretrain(tmp_path / "c", 1, steps=2)), device="cpu"), "dual-encoder")
    assert loaded.fingerprint == again.fingerprint != other.fingerprint
    images, numbers = digit_images()
    held = [{"image": images[i], "label": DIGITS[numbers[i]]} for i in range(5)]
    own = make(loaded, names=DIGITS)
    with torch.no_grad(), own.using(None):
        found = torch.stack(own.outputs([own.prepare(held)]))
    wanted = transformers_logits(loaded, [f"a photo of a {name}." for name in DIGITS], held)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert make(loaded, names=styled_names()).initial()["context"].shape == (4, 64)

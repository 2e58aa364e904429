"""Masked - which tokens are hidden, how, and what the loss counts."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch.nn import functional

from fedllm.core.errors import DataError, ModelError
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model, toy_tokenizer
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.masked import MaskedLM, whole
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import IGNORE

TEXT = "The clinic in the valley keeps its own records and the bank in the town keeps its own letters. " * 3


def task(**options: Any) -> MaskedLM:
    return MaskedLM(TaskSettings(kind="masked-lm", **options), toy_tokenizer("bert"))


def test_fifteen_percent_are_hidden_eighty_ten_ten() -> None:
    made = task()
    (example,) = made.prepare([{"text": TEXT}])
    ids, special = whole(example), set(made.tokenizer.all_special_ids)
    count = sum(i not in special for i in ids.tolist())
    fates = {"mask": 0, "same": 0, "other": 0}
    rng = numpy.random.default_rng(0)
    for _ in range(400):
        drawn = made.drawn(example, rng)
        at = drawn.labels != IGNORE
        assert int(at.sum()) == drawn.targets == round(0.15 * count)
        assert torch.equal(drawn.labels[at], ids[at]) and torch.equal(whole(drawn), ids)
        assert torch.equal(drawn.inputs["input_ids"][~at], ids[~at])
        assert not set(drawn.labels[at].tolist()) & special
        shown = drawn.inputs["input_ids"][at]
        fates["mask"] += int((shown == made.tokenizer.mask_token_id).sum())
        fates["same"] += int((shown == ids[at]).sum())
        fates["other"] += int(((shown != ids[at]) & (shown != made.tokenizer.mask_token_id)).sum())
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.02
    assert abs(fates["same"] / total - 0.1) < 0.02 and abs(fates["other"] / total - 0.1) < 0.02


def test_prepared_masks_follow_from_the_text_and_drawn_ones_from_the_stream() -> None:
    one, two = task().prepare([{"text": TEXT}])[0], task().prepare([{"text": "x"}, {"text": TEXT}])[1]
    assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"]) and torch.equal(one.labels, two.labels)
    draws = [task().drawn(one, numpy.random.default_rng(seed)).labels for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_short_text_hides_one_token_and_an_empty_one_is_dropped() -> None:
    made = task()
    assert made.prepare([{"text": "a"}])[0].targets == 1
    assert made.prepare([{"text": ""}, {"text": None}, {"text": "[SEP]"}]) == []
    assert made.dropped == {"no token is left that could be masked": 3}


def test_long_texts_are_cut_and_segments_kept() -> None:
    (example,) = task(max_length=16).prepare([{"text": TEXT}])
    assert example.tokens == 16 and example.inputs["token_type_ids"].shape == (16,)


def test_bad_inputs() -> None:
    with pytest.raises(DataError, match=r"data\.columns\.text=txt"):
        task().prepare([{"txt": "a"}])
    with pytest.raises(ModelError, match="no mask token"):
        MaskedLM(TaskSettings(kind="masked-lm"), toy_tokenizer("llama"))


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_learner_counts_hidden_tokens_alone(adapter: Any) -> None:
    loaded = toy_model("bert")
    learner = TransformerLearner(
        loaded, TaskSettings(kind="masked-lm", max_length=32), AdapterSettings(kind=adapter), None, 0
    )
    examples = learner.prepare([{"text": TEXT}, {"text": "a river"}, {"text": "the bank is in the town"}])
    params = {n: t.unsqueeze(0) for n, t in learner.initial().items()}
    with torch.no_grad(), learner.using(params):
        found = learner.losses([examples])
        counts = learner.counts_by_row([examples])
    wanted = torch.zeros(())
    for example in examples:
        with torch.no_grad():
            inputs = {k: v[None] for k, v in example.inputs.items()}
            logits = loaded.model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0]
        wanted += functional.cross_entropy(logits, example.labels, ignore_index=IGNORE, reduction="sum")
    assert torch.allclose(found[0], wanted, rtol=1e-5)
    assert sum(c["tokens"] for c in counts) == sum(e.targets for e in examples)
    assert sum(c["loss"] for c in counts) == pytest.approx(float(wanted), rel=1e-5)
    assert learner.values({}) == {"token_accuracy": None, "loss": None, "perplexity": None}

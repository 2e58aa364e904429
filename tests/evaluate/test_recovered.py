"""What was read, against the truth: the measures by hand and against rouge-score."""

from __future__ import annotations

import random

import pytest

from fedllm.evaluate.recovered import bag_scores, rouge_2, rouge_l


def test_tokens_are_counted_as_often_as_they_occur() -> None:
    found = bag_scores([[1, 1, 2], [9]], [[1, 2, 2, 3]])
    assert found["token_precision"] == 2 / 4 and found["token_recall"] == 2 / 4 and found["token_f1"] == 0.5


def test_texts_are_held_to_the_nearest_in_any_order() -> None:
    truth = [[1, 2, 3, 4], [5, 6, 7]]
    assert rouge_l(truth[::-1], truth) == rouge_2(truth[::-1], truth) == 1.0
    assert rouge_l([[1, 3, 4]], [[1, 2, 3, 4]]) == pytest.approx(2 * 3 / 7)
    assert rouge_2([[1, 2, 9, 4]], [[1, 2, 3, 4]]) == pytest.approx(2 * 1 / 6)


def test_nothing_found_or_nothing_true_is_zero() -> None:
    for found, truth in (([], [[1]]), ([[]], [[1]]), ([[1]], []), ([[1]], [[]])):
        assert rouge_l(found, truth) == 0.0 and rouge_2(found, truth) == 0.0
    assert set(bag_scores([], []).values()) == {0.0}


def test_against_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2", "rougeL"])
    draw = random.Random(0)
    for _ in range(50):
        one, other = ([draw.randrange(6) for _ in range(draw.randrange(1, 12))] for _ in range(2))
        wanted = scorer.score(" ".join(f"w{t}" for t in other), " ".join(f"w{t}" for t in one))
        assert rouge_l([one], [other]) == pytest.approx(wanted["rougeL"].fmeasure)
        assert rouge_2([one], [other]) == pytest.approx(wanted["rouge2"].fmeasure)

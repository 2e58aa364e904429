from __future__ import annotations

import math
import sys
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import DataError, MissingExtra
from fedllm.evaluate import total
from fedllm.evaluate.text import ExactMatch, LastNumber, Perplexity, RougeL, TokenF1, last_number, words

TEXTS = st.text(alphabet="ab cA,.é猫ไ0", max_size=12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234),
        ("so 3 + 4 = 7 #### 7", 7),
        ("#### 18\n(18 - 3 = 15)", 18),
        ("first 5, then 12.", 12),
        ("$1,234.50 in all", Decimal("1234.5")),
        ("-$5", -5),
        ("it fell to −40 degrees", -40),
        ("7-3", 3),
        ("(2)-3", 3),
        ("x = -3", -3),
        ("1,000,000", 1000000),
        ("a, 1,23", 23),
        (".5", Decimal("0.5")),
        ("答案是12", 12),
        ("١٢", 12),
        ("see ####", None),
        ("5 ####", 5),
        ("none", None),
        ("", None),
        ("wait...12", 12),
    ],
)
def test_the_number_that_answers(text: str, number: Decimal | int | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**9), 10**9))
def test_every_way_to_write_a_whole_number_is_read(number: int) -> None:
    for text in (f"{number}", f"{number:,}", f"it is {number:,}.00", f"1 2 3 #### {number}"):
        assert last_number(text) == number


def test_last_number_counts_and_refuses_a_reference_without_one() -> None:
    metric = LastNumber()
    assert metric.count(["it is 12", "no idea", "13"], ["#### 12", "#### 1", ["12", "13.0"]]) == {
        "last_number": 2.0,
        "examples": 3.0,
    }
    with pytest.raises(DataError, match="holds no number"):
        metric.count(["1"], ["one"])


def test_exact_match_options() -> None:
    assert ExactMatch().score(" a  b\n", "a b") == 1
    assert ExactMatch().score("A", "a") == 0
    assert ExactMatch(case=False).score("STRASSE", "straße") == 1
    assert ExactMatch().score("a.", "a") == 0
    assert ExactMatch(punctuation=False).score("«a»、b。", "ab") == 1
    assert ExactMatch(articles=False).score("The cat", "cat") == 1
    assert ExactMatch().score("\uff11\uff12 cafe\u0301", "12 caf\u00e9") == 1
    assert ExactMatch().score("x", ["y", "x"]) == 1
    with pytest.raises(DataError, match="no reference"):
        ExactMatch().score("x", [])


def test_rouge_golden_values() -> None:
    metric = RougeL()
    assert metric.score("the cat sat", "the cat sat on the mat") == pytest.approx(2 / 3)
    assert metric.score("cat the", "the cat") == pytest.approx(0.5)
    assert metric.score("x", ["a", "x"]) == 1
    assert metric.score("", "a") == 0


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="aB c_-.1", max_size=15), st.text(alphabet="aB c_-.1", max_size=15))
def test_rouge_equals_the_standard_tokenizer_on_ascii(prediction: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    usual = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert RougeL().score(prediction, reference) == pytest.approx(usual)


@pytest.mark.parametrize(
    "text", ["猫が座った", "แมวนั่ง", "кошка сидит", "बिल्ली बैठी है", "القطة جالسة", "고양이가 앉았다"]
)
def test_every_script_counts(text: str) -> None:
    assert RougeL().score(text, text) == 1
    assert TokenF1().score(text, text) == 1
    assert RougeL().score("xyz", text) == 0
    assert 0 < RougeL().score(text[: len(text) // 2 + 1], text) <= 1


def test_words() -> None:
    assert words("Don't_stop, caf\u00e9!") == ["don", "t", "stop", "caf\u00e9"]
    assert words("我有2只猫 ok") == ["我", "有", "2", "只", "猫", "ok"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words(" ... ") == []


def test_token_f1() -> None:
    assert TokenF1().score("the cat", "cat sat the mat") == pytest.approx(2 * 2 / 6)
    assert TokenF1().score("a a", "a") == pytest.approx(2 / 3)
    assert TokenF1().score("!", "?") == 1
    assert TokenF1().score("", "a") == 0


def test_without_rouge_score_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtra, match=r"fedllm\[rouge\]"):
        RougeL()


def test_perplexity_is_of_all_tokens() -> None:
    metric = Perplexity()
    one, two = metric.count([2.0, 4.0], [2, 2]), metric.count([6.0], [8])
    assert metric.value(one) == pytest.approx(math.exp(6 / 4))
    assert metric.value(total([one, two])) == pytest.approx(math.exp(12 / 12))
    assert metric.value({}) is None
    assert metric.missing({}) == "No token was measured."
    high = metric.count([1e6], [1])
    assert metric.value(high) is None
    assert "above 709" in str(metric.missing(high))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="not a number"):
            metric.count([bad], [1])
    with pytest.raises(DataError):
        metric.count([1.0], [-1])


@pytest.mark.parametrize("metric", [ExactMatch(), LastNumber(), TokenF1(), RougeL()])
def test_nothing_measured_is_none_with_a_reason(metric) -> None:
    counts = metric.count([], [])
    assert metric.value(counts) is None
    assert metric.missing(counts) == "No example was measured."
    assert metric.value({}) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(TEXTS, TEXTS), max_size=4), min_size=1, max_size=4))
def test_pooled_from_sums_is_that_of_the_concatenation(clients: list[list[tuple[str, str]]]) -> None:
    for metric in (ExactMatch(case=False), TokenF1(), RougeL()):
        summed = total(metric.count([p for p, _ in rows], [r for _, r in rows]) for rows in clients)
        joined = [pair for rows in clients for pair in rows]
        value = metric.value(metric.count([p for p, _ in joined], [r for _, r in joined]))
        assert metric.value(summed) == (pytest.approx(value) if value is not None else None)


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="1 predictions and 2 references"):
        ExactMatch().count(["a"], ["a", "b"])

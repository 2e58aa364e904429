"""Answers - one form for one answer; plurality, ties, abstentions; nothing depends on formatting or order."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.blocks.answers import AnswerParser, Ballot, plain_number, vote
from fedllm.core.errors import ConfigError
from fedllm.evaluate.text import last_number
from tests.blocks.shared import shared_rows


@pytest.mark.parametrize(
    ("text", "answer"),
    [("$1,200.0", "1200"), ("1200", "1200"), ("so 3 + 4 = 7.", "7"), ("it is -5", "-5"), ("3-5", "5"), ("€0.50", "0.5"),
     ("1,234,567.890 in all", "1234567.89"), ("50%", "50"), ("\uff14\uff12", "42"), ("\u22127", "-7"), ("-0.0", "0"),
     ("**18**", "18"), ("10 apples\n#### 12 of 20", "12"), ("7 then ####", "7"), ("100", "100"), ("none", None),
     ("", None), ("covid19", "19")],
)  # fmt: skip
def test_numbers(text: str, answer: str | None) -> None:
    assert AnswerParser("number")(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("(B)", "B"), ("The answer is (C).", "C"), ("Answer: D because", "D"), ("A is wrong, so the answer is B", "B"),
     ("I think A is wrong. So B", "B"), ("A cat sat", None), ("so it is E.", "E"), ("(F)", None), ("none", None),
     ("the answer is A", "A"), ("**(A)**", "A"), ("Between (A) and (B), I take (B)", "B")],
)  # fmt: skip
def test_options(text: str, answer: str | None) -> None:
    assert AnswerParser("option", 5)(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Paris", "paris"), ("I think.\nThe answer is Paris.", "paris"), ("Answer: not  valid!", "not valid"),
     ("one\n\nTrue\n", "true"), ("the answer is 3.5 m", "3.5 m"), ("  \n ", None), ("...", None)],
)  # fmt: skip
def test_texts(text: str, answer: str | None) -> None:
    assert AnswerParser("text")(text) == answer


def test_too_many_options() -> None:
    with pytest.raises(ConfigError, match="options=27"):
        AnswerParser("option", 27)


@given(st.decimals(-(10**9), 10**9, places=3))
def test_every_way_to_write_a_number_is_the_same_answer(value: Decimal) -> None:
    parse, plain = AnswerParser(), plain_number(str(value))
    assert Decimal(plain) == value
    for text in (f"{value:,}", f"it is {value} dollars", f"#### {value}", f"{value:.5f}."):
        assert parse(text) == plain


@given(st.text(max_size=60))
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (AnswerParser("number"), AnswerParser("option", 4), AnswerParser("text")):
        found = parse(text)
        assert found is None or parse(found) == found, "the one form is its own form"


def test_the_gold_answers_of_gsm8k_are_read_as_evaluation_reads_them() -> None:
    parse = AnswerParser()
    for row in shared_rows("gsm8k-test.jsonl.gz"):
        for text in row.values():
            found = parse(text)
            assert (None if found is None else Decimal(found)) == last_number(text)


def test_the_gold_answers_of_bbh() -> None:
    rows = shared_rows("bbh.jsonl.gz")
    option = [r["target"] for r in rows if r["target"].startswith("(")]
    assert len(option) > 1000 and all(AnswerParser("option")(t) == t[1] for t in option)
    numbers = [r["target"] for r in rows if r["task"] in ("object_counting", "multistep_arithmetic_two")]
    assert len(numbers) == 500 and all(AnswerParser()(t) == t for t in numbers)
    assert all(AnswerParser("text")(r["target"]) for r in rows)


# --- votes -----------------------------------------------------------------------------------------------------------


def ballots(text: str, logprobs: str = "") -> list[Ballot]:
    """One ballot a letter; "-" abstains."""
    given = [float(x) for x in logprobs.split()] if logprobs else [None] * len(text)
    return [Ballot(None if c == "-" else c, p, f"u{i}") for i, (c, p) in enumerate(zip(text, given, strict=True))]


def test_plurality_with_abstentions() -> None:
    found = vote(ballots("abb-"))
    assert (found.answer, found.coverage, found.reason) == ("b", 0.75, "")
    assert found.share == pytest.approx(2 / 3) and found.weights == {"a": 1.0, "b": 2.0}


def test_one_vote_is_that_answer() -> None:
    assert vote(ballots("a")).answer == "a"
    assert vote([Ballot("a"), Ballot(None), Ballot(None)]).answer == "a"


def test_all_abstain_or_nobody_is_asked() -> None:
    assert vote(ballots("--")).answer is None and vote(ballots("--")).reason == "No text held an answer."
    assert vote([]).answer is None and vote([]).reason


def test_ties_by_summed_log_probability_else_by_who_was_first() -> None:
    by_logprob = vote(ballots("abab", "-1 -0.5 -1 -0.5"))
    assert by_logprob.answer == "b" and "log-probability" in by_logprob.reason
    assert vote(ballots("abab")).answer == "a"
    for odd in ("nan", "-inf", "inf"):
        found = vote(ballots("abab", f"-9 -0.5 -9 {odd}"))
        assert found.answer == "a" and "asked first" in found.reason
    assert vote(ballots("ba", "-1 -1")).answer == "b"
    assert vote([Ballot("a", -9.0), Ballot("b", None)]).answer == "a"


@given(st.lists(st.tuples(st.sampled_from("abc-"), st.floats(-5, 0)), min_size=1, max_size=6), st.randoms())
def test_the_order_of_ballots_does_not_matter_where_sums_differ(pairs: list[tuple[str, float]], draw: object) -> None:
    cast = [Ballot(None if c == "-" else c, p, str(i)) for i, (c, p) in enumerate(pairs)]
    first = vote(cast)
    sums = {a: math.fsum(p for c, p in pairs if c == a) for a in "abc"}
    if len(set(sums.values())) < 3:
        return
    for other in itertools.islice(itertools.permutations(cast), 30):
        found = vote(other)
        assert (found.answer, found.share, found.coverage) == (first.answer, first.share, first.coverage)


def test_one_vote_per_user_however_often_asked() -> None:
    """A user who stuffs the box with 50 ballots has the weight of one."""
    honest = [Ballot("right", None, f"u{i}") for i in range(3)]
    stuffed = [Ballot("wrong", None, "sybil")] * 50
    assert vote([*honest, *stuffed]).answer == "wrong"
    fair = vote([*honest, *stuffed], per_voter=True)
    assert fair.answer == "right" and fair.weights == {"right": 3.0, "wrong": 1.0} and fair.share == 0.75
    thirds = [Ballot("a", None, "x"), *[Ballot("b", None, "y")] * 3]
    assert "tie" in vote(thirds, per_voter=True).reason, "three thirds are exactly one"

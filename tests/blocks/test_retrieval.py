"""Retrieval - the same question or its template, one of each user, never the same words, nothing unredacted."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest

from fedllm.blocks.retrieval import (
    Question,
    QuestionBank,
    answer_of,
    numbers,
    pooled,
    question_of,
    redact,
    same_words,
    template,
    vectors,
    well_formed,
)
from tests.blocks.shared import shared_rows

ASKED = "How many eggs are left when Ann eats 3 of 16 eggs?"
SAME = "Ann has 16 eggs and eats three. How many eggs are left?"
OTHER = "How many eggs are left when Ann eats 5 of 12 eggs?"


def test_numbers_are_a_multiset_in_one_form() -> None:
    assert numbers("Three of 16.0, then $1,200 and 3") == Counter({"3": 2, "16": 1, "1200": 1})
    assert numbers("one wonders") == Counter()
    assert template("Eats Three of $1,200.50, 7!") == "eats # of # #"


def test_the_same_numbers_or_other_numbers() -> None:
    bank = QuestionBank([Question(SAME, "b"), Question(OTHER, "c"), Question("Name a river.", "d")])
    assert [m.text for m in bank.find(ASKED, "same", 5)] == [SAME]
    assert [m.text for m in bank.find(ASKED, "different", 5, least=0.2)] == [OTHER]
    assert bank.find(ASKED, "same", 0) == [] and QuestionBank([]).find(ASKED, "same", 3) == []


def test_one_of_each_user_and_nothing_of_the_one_who_asks() -> None:
    again = "Ann has 16 eggs and eats 3. How many are left?"
    bank = QuestionBank([Question(SAME, "b"), Question(again, "b"), Question("3 of 16 eggs: how many are left?", "a")])
    assert len(bank.find(ASKED, "same", 5)) == 2
    assert [m.user for m in bank.find(ASKED, "same", 5, without="a")] == ["b"]


def test_the_same_words_are_no_second_opinion_and_no_demonstration() -> None:
    same = ASKED.upper().replace("?", " ?!")
    assert same_words(ASKED, same) and not same_words("7.5 eggs", "75 eggs")
    bank = QuestionBank([Question(same, "b"), Question(SAME, "c"), Question(SAME + "!", "d")])
    assert [m.user for m in bank.find(ASKED, "same", 5)] == ["c"]


def test_the_most_alike_first_and_none_below_the_least() -> None:
    far = "A train of 16 wagons loses 3."
    bank = QuestionBank([Question(far, "b"), Question(SAME, "c")])
    found = bank.find(ASKED, "same", 5)
    assert [m.text for m in found] == [SAME, far] and found[0].similarity > found[1].similarity
    assert [m.text for m in bank.find(ASKED, "same", 5, least=0.3)] == [SAME]


def test_redaction_comes_before_everything_else() -> None:
    text = "Mail ann.b+c@mail.example.org or https://x.example/y?z=1 or +49 170 1234567 about 5 eggs"
    assert redact(text) == "Mail [email] or [link] or [phone] about 5 eggs"
    seen: list[str] = []
    bank = QuestionBank(
        [Question(text, "b")], lambda t: "hidden 5", lambda texts: seen.extend(texts) or numpy.ones((len(texts), 1))
    )
    assert seen == ["hidden 5"] and bank.questions == [Question("hidden 5", "b")]


def test_vectors_have_length_one_and_need_nothing_fitted() -> None:
    found = vectors([ASKED, SAME, ""])
    assert found.shape == (3, 4096) and numpy.allclose(numpy.linalg.norm(found[:2], axis=1), 1)
    assert not found[2].any()
    assert numpy.array_equal(vectors([SAME])[0], found[1])


def test_banks_are_not_trusted() -> None:
    replies = {"x": ([OTHER, SAME], [0, 0]), "y": ([SAME], [0])}
    (found,) = pooled([ASKED], replies, "same", 4)
    assert found == [(SAME, "x#1")], "other numbers are left out, and the same words count once"
    assert well_formed(["a"], [0], 1, 1, 9)
    for texts, places in ((["a"], [1]), (["a"], [True]), (["a", "b"], [0, 0]), (["a"], [0, 0]), (["a"], None),
                          (["a" * 10], [0]), (["a"], ["0"])):  # fmt: skip
        assert not well_formed(texts, places, 1, 1, 9)


def test_columns() -> None:
    assert question_of({"input": "a", "text": "b"}) == "a" and question_of({}) == ""
    assert answer_of({"target": "b"}) == "b" and answer_of({"response": "c", "output": "d"}) == "c"


def test_real_questions_in_other_words_find_themselves_and_nothing_else() -> None:
    """Every eighth question of GSM8K with at least two numbers, reworded, against all 1319."""
    rows = [row["question"] for row in shared_rows("gsm8k-test.jsonl.gz")]
    bank = QuestionBank([Question(text, str(i)) for i, text in enumerate(rows)])
    chosen = [i for i in range(0, len(rows), 8) if len(numbers(rows[i])) >= 2]
    right = 0
    for i in chosen:
        words = rows[i].replace("How many", "What number of").replace(" She ", " This person ").split()
        found = bank.find("Please help: " + " ".join(words), "same", 1, least=0.2)
        assert found, rows[i]
        right += found[0].user == str(i)
    assert right / len(chosen) > 0.98, (right, len(chosen))


@pytest.mark.parametrize("name", ["gsm8k-test.jsonl.gz"])
def test_different_parameters_of_real_questions(name: str) -> None:
    """A question with every number changed is found as its template, and never as the same question."""
    rows = [row["question"] for row in shared_rows(name)][:200]
    bank = QuestionBank([Question(text, str(i)) for i, text in enumerate(rows)])
    hits = 0
    for i in range(0, 200, 10):
        changed = "".join(str((int(c) + 3) % 10) if c.isdigit() else c for c in rows[i])
        if numbers(changed) == numbers(rows[i]):
            continue
        assert all(m.user != str(i) for m in bank.find(changed, "same", 5))
        hits += bank.find(changed, "different", 1)[0].user == str(i)
    assert hits >= 18

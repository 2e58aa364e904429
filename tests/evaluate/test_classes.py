from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fedllm.core.errors import ConfigError, DataError
from fedllm.evaluate import total
from fedllm.evaluate.classes import Accuracy, Confusion, EntityF1, MacroF1, spans

LABELS = ["cat", "dog", "emu", "fox"]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), max_size=12)
TAGS = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), max_size=8)


@settings(deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=4))
def test_pooled_from_sums_equals_scikit_learn_on_the_concatenation(clients) -> None:
    joined = [pair for rows in clients for pair in rows]
    guesses, truth = [p for p, _ in joined], [r for _, r in joined]
    macro, skip, confusion = MacroF1(LABELS), MacroF1(LABELS, absent="skip"), Confusion(LABELS)

    def summed(metric):
        return total(metric.count([p for p, _ in rows], [r for _, r in rows]) for rows in clients)

    if not joined:
        assert [metric.value(summed(metric)) for metric in (macro, skip, confusion, Accuracy())] == [None] * 4
        return
    f1 = f1_score(truth, guesses, labels=LABELS, average="macro", zero_division=0)
    present = sorted(set(truth) | set(guesses))
    assert macro.value(summed(macro)) == pytest.approx(f1)
    assert skip.value(summed(skip)) == pytest.approx(f1_score(truth, guesses, labels=present, average="macro"))
    assert macro.accuracy(summed(macro)) == pytest.approx(accuracy_score(truth, guesses))
    assert confusion.value(summed(confusion)) == Accuracy().value(summed(Accuracy()))
    assert confusion.value(summed(confusion)) == pytest.approx(accuracy_score(truth, guesses))
    matrix = confusion_matrix(truth, guesses, labels=LABELS)
    assert numpy.array_equal(confusion.matrix(summed(confusion)), matrix)
    assert set(summed(macro)) <= set(macro.names)
    assert set(summed(confusion)) - {"examples"} <= set(confusion.names)


def test_a_client_without_a_class_is_measured_on_the_same_labels() -> None:
    metric = MacroF1(LABELS)
    counts = metric.count(["cat", "dog"], ["cat", "dog"])
    assert metric.value(counts) == 0.5
    assert MacroF1(LABELS, absent="skip").value(counts) == 1
    assert metric.f1(counts, "emu") is None


def test_labels_are_checked() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        MacroF1(["a", "a"])
    with pytest.raises(ConfigError, match="empty"):
        Confusion([])
    with pytest.raises(DataError, match=r"'cot' is not in the label set.*Did you mean 'cat'"):
        MacroF1(LABELS).count(["cat"], ["cot"])
    with pytest.raises(DataError, match="'elk'"):
        Confusion(LABELS).count(["elk"], ["cat"])


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [(0, 2, "PER"), (3, 4, "LOC")]),
        ("B-PER B-PER", [(0, 1, "PER"), (1, 2, "PER")]),
        ("O I-PER I-PER", [(1, 3, "PER")]),
        ("I-PER", [(0, 1, "PER")]),
        ("B-PER I-LOC I-LOC", [(0, 1, "PER"), (1, 3, "LOC")]),
        ("I-PER B-PER I-PER O I-PER", [(0, 1, "PER"), (1, 3, "PER"), (4, 5, "PER")]),
        ("B-A-B I-A-B", [(0, 2, "A-B")]),
        ("", []),
    ],
)
def test_spans_computed_by_hand(tags: str, entities: list) -> None:
    assert spans(tags.split()) == entities


def test_entity_f1_computed_by_hand() -> None:
    """Three given (PER 0-2, LOC 3-4, ORG 0-1), four predicted; right: the LOC and the ORG."""
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
    predictions = [["B-PER", "O", "O", "I-LOC"], ["B-ORG", "B-PER"]]
    metric = EntityF1()
    counts = metric.count(predictions, references)
    assert counts == {"entity_right": 2.0, "entity_predicted": 4.0, "entity_given": 3.0}
    assert metric.value(counts) == pytest.approx(2 * 2 / 7)


def test_the_type_must_be_right_too() -> None:
    assert EntityF1().value(EntityF1().count([["B-PER"]], [["B-LOC"]])) == 0


def test_without_any_entity_there_is_no_value() -> None:
    counts = EntityF1().count([["O", "O"]], [["O", "O"]])
    assert EntityF1().value(counts) is None
    assert EntityF1().missing(counts) == "No entity was given or predicted."


@given(st.lists(TAGS, min_size=1, max_size=4), st.randoms())
def test_entity_counts_add_up_and_equal_tags_are_perfect(texts: list[list[str]], random) -> None:
    metric = EntityF1()
    guesses = [random.sample(tags, len(tags)) for tags in texts]
    parts = total(metric.count([guess], [tags]) for guess, tags in zip(guesses, texts, strict=True))
    assert parts == metric.count(guesses, texts)
    assert metric.value(metric.count(texts, texts)) in (1, None)


@given(TAGS)
def test_spans_cover_exactly_the_tagged_words(tags: list[str]) -> None:
    covered = [place for start, end, _ in spans(tags) for place in range(start, end)]
    assert covered == [place for place, tag in enumerate(tags) if tag != "O"]
    assert all(tags[place].endswith(kind) for start, end, kind in spans(tags) for place in range(start, end))


@pytest.mark.parametrize("tag", ["PER", "B-", "S-PER", "b-PER", "", "BPER"])
def test_other_schemes_are_refused(tag: str) -> None:
    with pytest.raises(DataError, match="not a BIO tag"):
        spans(["O", tag])


def test_tag_lists_must_be_of_one_length() -> None:
    with pytest.raises(DataError):
        EntityF1().count([["O"]], [["O", "O"]])

"""Distil: the same rows everywhere, bounded scores, and a mean that nobody carries away."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.blocks.distil import ClippedMean, aligned, fingerprint, scores
from fedllm.core.errors import DataError, ModelError, UploadRejected
from fedllm.core.message import Upload
from fedllm.core.reducer import Mean, Reduction

ROWS = [{"text": f"row {i}", "label": i % 3} for i in range(20)]


@given(st.integers(0, 2**62), st.integers(0, 50), st.integers(1, 40))
def test_a_subset_follows_from_the_seed_and_keeps_the_order(seed: int, number: int, size: int) -> None:
    found = aligned(ROWS, seed, number, size)
    assert found == aligned(ROWS, seed, number, size) and len(found) == min(size, len(ROWS))
    places = [ROWS.index(row) for row in found]
    assert places == sorted(set(places))


def test_subsets_differ_by_round_and_by_seed() -> None:
    assert aligned(ROWS, 1, 1, 8) != aligned(ROWS, 1, 2, 8) != aligned(ROWS, 2, 2, 8)


def test_a_fingerprint_tells_content_and_order_and_not_the_order_of_columns() -> None:
    mark = fingerprint(ROWS)
    assert len(mark) == 16 and mark == fingerprint([dict(reversed(row.items())) for row in ROWS])
    assert mark != fingerprint(ROWS[::-1]) != fingerprint(ROWS[:-1]) != mark
    assert mark != fingerprint([*ROWS[:-1], {**ROWS[-1], "label": 9}])
    assert (
        fingerprint([{"x": numpy.arange(3)}])
        == fingerprint([{"x": torch.arange(3)}])
        == fingerprint([{"x": [0, 1, 2]}])
    )


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="holds a object"):
        fingerprint([{"x": object()}])
    with pytest.raises(DataError, match=r"no public rows.*data\.public"):
        fingerprint([])


def test_scores_are_raw_logits_within_the_limit() -> None:
    found = scores([torch.tensor([1.0, -50.0]), torch.tensor([3.0, 0.5])], 2.0)
    assert torch.equal(found, torch.tensor([[1.0, -2.0], [2.0, 0.5]]))
    with pytest.raises(ModelError, match=r"shape \(4, 9\).*sequence-classification"):
        scores([torch.zeros(4, 9)], 2.0)


def reduced(reducer: Any, uploads: list[Upload]) -> Any:
    reduction = Reduction({"logits": reducer})
    for number, upload in enumerate(uploads):
        reduction.add(f"c{number}", upload)
    return reduction.result(len(uploads))["logits"]["s"]


def sent(*values: float, weight: float = 1.0) -> Upload:
    return Upload(None, weight, logits={"s": torch.tensor([values])})


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_for_those_who_clip_it_is_the_plain_mean(values: list[list[float]]) -> None:
    uploads = [sent(*row, weight=number + 1.0) for number, row in enumerate(values)]
    for weighting in ("uniform", "examples"):
        assert torch.equal(reduced(ClippedMean(weighting, 5.0), uploads), reduced(Mean(weighting), uploads))


def test_an_entry_counts_for_no_more_than_the_limit() -> None:
    assert torch.equal(
        reduced(ClippedMean("uniform", 3.0), [sent(1e9, 1.0), sent(0.0, -1e9)]), torch.tensor([[1.5, -1.0]])
    )
    assert ClippedMean("uniform", 3.0).linear and isinstance(ClippedMean(), Mean)


def test_other_rows_and_shapes_are_rejected() -> None:
    with pytest.raises(UploadRejected):
        reduced(ClippedMean("uniform", 3.0), [sent(1.0, 2.0), sent(1.0)])
    with pytest.raises(UploadRejected):
        reduced(ClippedMean("uniform", 3.0), [sent(1.0), Upload(None, logits={"t": torch.zeros(1, 1)})])

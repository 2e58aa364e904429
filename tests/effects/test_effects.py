"""The effect each paper claims, small: what `fedllm verify KEY` runs. A check that asserts nothing says why."""

from __future__ import annotations

import pytest

from fedllm.effects import checks, verify
from fedllm.run import algorithm as find


@pytest.mark.effect
@pytest.mark.slow
@pytest.mark.parametrize("key", checks())
def test_the_effect_shows(key: str) -> None:
    evidence = verify(key)
    assert evidence.key == key and evidence.claim == find(key).card.claim and evidence.numbers
    assert evidence.passed is not False, evidence.measured
    assert (find(key).card.status == "verified") == (evidence.passed is True)

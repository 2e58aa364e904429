"""Who belongs to which group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError
from fedllm.core.roster import Group, assign

GROUPS = {name: Group(name, rank) for name, rank in (("small", 2), ("middle", 4), ("large", 8))}
IDS = [f"c{number:02d}" for number in range(20)]


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_every_client_has_one_group_and_shares_are_kept(seed: int, count: int) -> None:
    ids = [f"c{number}" for number in range(count)]
    found = assign(ids, GROUPS, {"small": 0.5, "middle": 0.25, "large": 0.25}, seed)
    assert sorted(found) == sorted(ids)
    sizes = [sum(group.name == name for group in found.values()) for name in GROUPS]
    assert all(abs(size - share * count) <= 1 for size, share in zip(sizes, (0.5, 0.25, 0.25), strict=True))
    assert found == assign(ids, GROUPS, {"small": 0.5, "middle": 0.25, "large": 0.25}, seed)


def test_named_clients_come_first_and_the_rest_is_dealt() -> None:
    found = assign(IDS, GROUPS, {"large": ["c03", "c07"], "small": 1.0}, 0)
    assert [client for client, group in found.items() if group.name == "large"] == ["c03", "c07"]
    assert sum(group.name == "small" for group in found.values()) == 18


def test_another_seed_deals_otherwise() -> None:
    first, second = (assign(IDS, GROUPS, {"small": 0.5, "large": 0.5}, seed) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"small": 0.5, "large": 0.4}, "sum to 0.9"),
        ({"small": ["c03"], "large": ["c03"]}, "named in groups.small and groups.large"),
        ({"small": ["c3"], "large": 1.0}, "c3"),
        ({"small": ["c01"]}, "19 clients are named in no group"),
    ],
)
def test_what_cannot_be_dealt_is_refused(shares: dict[str, float | list[str]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        assign(IDS, GROUPS, shares, 0)

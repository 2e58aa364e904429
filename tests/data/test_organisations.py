"""The eight organisations' documents: a function of the seed, and every answer can be read from its text."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError
from fedllm.data.organisations import URGENCY, documents, organisations

KEYS = [one.key for one in organisations()]
MONTHS = {datetime.date(2000, month, 1).strftime(form): month for month in range(1, 13) for form in ("%B", "%b")}
DATE_FIELDS = {"visit", "due", "opened", "since", "effective", "delivery", "loss", "start"}
FLAG_FIELDS = {"paid", "renewal", "fragile", "police", "relocate"}
URGENCY_FIELDS = {"urgency", "priority", "level"}


def fields(record: dict[str, str]) -> dict[str, str]:
    return dict(pair.split("=") for pair in record["response"].split("; "))


def text(record: dict[str, str]) -> str:
    return record["instruction"].split("\n", 1)[1]


def written_days(words: str) -> list[str]:
    """All days in a text as ISO, read by rules of our own: a month name, a year and what is left as the day."""
    found = []
    for match in re.finditer(
        r"(?P<d1>\d{1,2})(?:st|nd|rd|th)?(?: of |[ -])(?P<m1>[A-Z][a-z]+)[ -](?P<y1>\d{4})"
        r"|(?P<m2>[A-Z][a-z]+) (?P<d2>\d{1,2})(?:st|nd|rd|th)?, (?P<y2>\d{4})",
        words,
    ):
        got = {name[0]: value for name, value in match.groupdict().items() if value}
        if got["m"] in MONTHS:
            found.append(datetime.date(int(got["y"]), MONTHS[got["m"]], int(got["d"])).isoformat())
    return found


def test_eight_organisations_with_distinct_keys_names_and_kinds():
    assert len(KEYS) == 8
    for values in zip(*((one.key, one.name, one.kind) for one in organisations()), strict=True):
        assert len(set(values)) == 8


@pytest.mark.parametrize("key", KEYS)
def test_every_answer_can_be_read_from_the_text(key):
    seen: set[str] = set()
    for record in documents(key, 150, seed=5):
        assert record.keys() == {"instruction", "response", "organisation"}
        assert record["organisation"] == key
        got, words = fields(record), text(record)
        assert len(got) == 3
        assert list(got) == re.findall(r"\w+", record["instruction"].split(".")[0].replace(" and ", " "))[1:]
        for name, value in got.items():
            if name in DATE_FIELDS:
                assert written_days(words) == [value]
            elif name in URGENCY_FIELDS:
                assert [word for word in re.findall(r"\w+", words.lower()) if word in URGENCY] == [value]
            elif name in FLAG_FIELDS:
                assert re.findall(r"\b(?:[Yy]es|[Nn]o)\b", words)[0].lower() == value
                assert len(re.findall(r"\b(?:yes|no)\b", words.lower())) == 1
                seen.add(value)
            elif match := re.fullmatch(r"(\d+)\.00 (EUR|USD|GBP)", value):
                assert f"{match[2]} {match[1]}" in words or f"{match[1]} {match[2]}" in words
            else:
                number = value.split(" ")[0]
                assert re.search(rf"(?<![\w-]){re.escape(number)}\b", words)
    assert seen in (set(), {"yes", "no"})


def test_the_documents_are_short():
    lengths = [len(record["instruction"]) for key in KEYS for record in documents(key, 100, seed=1)]
    assert min(lengths) >= 80
    assert max(lengths) <= 350


@given(st.sampled_from(KEYS), st.integers(0, 2**40), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_a_longer_draw_begins_with_a_shorter_one(key, seed, one, other):
    few, many = sorted((one, other))
    assert documents(key, many, seed)[:few] == documents(key, few, seed)


def test_the_order_of_calls_does_not_matter():
    forward = {key: documents(key, 5, seed=3) for key in KEYS}
    backward = {key: documents(key, 5, seed=3) for key in reversed(KEYS)}
    assert forward == backward


def test_another_process_with_another_hash_seed_draws_the_same():
    code = "from fedllm.data.organisations import documents; print(repr(documents('clinic', 3, 9)), end='')"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )
    assert other.stdout == repr(documents("clinic", 3, 9))


def test_draws_of_different_seeds_share_no_document():
    drawn = [r["instruction"] for seed in range(4) for key in KEYS for r in documents(key, 250, seed)]
    assert len(set(drawn)) == len(drawn)


def test_no_two_organisations_share_a_field():
    names = [name for key in KEYS for name in fields(documents(key, 1, 0)[0])]
    assert len(set(names)) == 24


def test_an_unknown_organisation_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'clinic'"):
        documents("clinik", 1, 0)


def test_a_negative_count_is_refused():
    with pytest.raises(ConfigError, match="0 or more"):
        documents("clinic", -1, 0)

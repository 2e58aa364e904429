"""data stats, data build, data stream."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from tests.cli.lines import as_json, invoke, ok


def test_statistics_of_a_recipe(place, tmp_path):
    found = as_json("data", "stats", place.recipe)
    assert found["total"] == {"clients": 3, "train": 33, "eval": 3, "characters": found["total"]["characters"]}
    shown = ok("data", "stats", place.recipe, "--svg", tmp_path / "sizes.svg")
    assert "north" in shown.stdout and "all 3 clients" in shown.stdout
    assert shown.stdout.count("█" * 40) == 3
    root = ElementTree.parse(tmp_path / "sizes.svg").getroot()
    assert root.tag.endswith("svg") and "north" in ElementTree.tostring(root, "unicode")


def test_statistics_of_a_file_are_one_client_unless_a_partition_is_given(place):
    assert as_json("data", "stats", place.rows)["total"]["clients"] == 1
    split = as_json("data", "stats", place.rows, "partition.by=natural", "partition.column=site")
    assert list(split["clients"]) == ["north", "south", "west"]
    limited = as_json("data", "stats", place.rows, "data.limit=10")
    assert limited["total"]["train"] + limited["total"]["eval"] == 10


def test_a_missing_file_or_column_is_named(place):
    missing = invoke("data", "stats", place.folder / "rowz.jsonl")
    assert missing.exit_code == 3 and "rows.jsonl" in missing.stderr
    wrong = invoke("data", "stats", place.rows, "partition.by=natural", "partition.column=sight")
    assert wrong.exit_code == 3 and "Did you mean 'site'?" in wrong.stderr


def test_groups_are_built_and_streamed(place, tmp_path):
    built = as_json("data", "build", place.rows, "--by", "site", "--to", tmp_path / "groups")
    assert (built["groups"], built["examples"]) == (3, 36)
    groups = [json.loads(line) for line in ok("data", "stream", tmp_path / "groups").stdout.splitlines()]
    assert sorted(group["key"] for group in groups) == ["north", "south", "west"]
    assert all(len(group["examples"]) == 12 for group in groups)
    taken = ok("data", "stream", tmp_path / "groups", "--seed", 1, "--take", 2).stdout
    assert len(taken.splitlines()) == 2
    assert taken == ok("data", "stream", tmp_path / "groups", "--seed", 1, "--take", 2).stdout
    assert invoke("data", "build", place.rows, "--by", "site", "--to", tmp_path / "groups").exit_code == 3
    assert invoke("data", "stream", tmp_path).exit_code == 3

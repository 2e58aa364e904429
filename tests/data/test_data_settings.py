"""The data part of a recipe: what is refused, with which words, and what survives a round trip."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedllm.core.errors import ConfigError
from fedllm.core.settings import read
from fedllm.data.settings import MAY, NEEDS, DataSettings, EvaluationSplit, PartitionSettings

VALUES = {
    "column": "label",
    "clients": 4,
    "alpha": 0.5,
    "classes_per_client": 2,
    "shards_per_client": 2,
    "encoder": "m",
}


def test_default_is_the_built_in_organisations():
    settings = DataSettings()
    assert settings.built_in and settings.key == "organisation" and settings.partition.by == "natural"


@pytest.mark.parametrize("by", NEEDS)
def test_each_way_of_splitting_asks_for_what_it_needs(by):
    values = {name: VALUES[name] for name in NEEDS[by]}
    assert PartitionSettings(by=by, **values).by == by
    for name in NEEDS[by]:
        less = {key: value for key, value in values.items() if key != name}
        with pytest.raises(ConfigError, match=name):
            DataSettings(path="x.jsonl", partition={"by": by, **less})


@pytest.mark.parametrize("by", NEEDS)
def test_options_of_other_ways_are_refused(by):
    values = {name: VALUES[name] for name in NEEDS[by]}
    for name in set(VALUES) - set(NEEDS[by]) - set(MAY.get(by, ())):
        with pytest.raises(ConfigError, match=f"data.partition.{name}=.* means nothing with by={by}"):
            PartitionSettings(by=by, **values, **{name: VALUES[name]})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"path": "a.jsonl", "name": "b"}, "both path=a.jsonl and name=b"),
        ({"path": "a.jsonl"}, "by=natural needs 'column'"),
        ({"path": "a.jsonl", "split": "train", "partition": {"column": "k"}}, "data.split=train means nothing"),
        ({"config": "x"}, "data.config=x means nothing with name=organisations"),
        ({"name": "org/x", "documents": 3, "partition": {"column": "k"}}, "data.documents=3 means nothing"),
        ({"evaluation": {"fraction": 0.3}}, "held_out"),
        ({"evaluation": {"column": "split"}}, "evaluation.column is given alone"),
        ({"evaluation": {"value": "test"}}, "evaluation.value is given alone"),
        ({"evaluation": {"column": "s", "value": 1, "path": "b"}}, "by column and by path"),
        ({"evaluation": {"path": "b", "fraction": 0.5}}, "by path and by fraction"),
        ({"columns": {"instruction": "q", "response": "q"}}, "instruction and response from the one column 'q'"),
    ],
)
def test_impossible_combinations_are_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        read(DataSettings, values, "data")


@pytest.mark.parametrize(
    "values",
    [
        {"partition": {"by": "dirichlet", "column": "x", "clients": 2, "alpha": 0}},
        {"partition": {"by": "dirichlet", "column": "x", "clients": 2, "alpha": float("nan")}},
        {"partition": {"by": "dirichlet", "column": "x", "clients": 2, "alpha": float("inf")}},
        {"partition": {"by": "iid", "clients": 0}},
        {"partition": {"min_size": 0}},
        {"evaluation": {"fraction": 1.0}},
        {"evaluation": {"fraction": -0.1}},
        {"evaluation": {"per_client": 0}},
        {"limit": 0},
        {"documents": 0},
        {"partition": {"by": "natral"}},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=r"data."):
        read(DataSettings, values, "data")


def test_a_wrong_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"data.partition.client'.*Did you mean 'data.partition.clients'"):
        read(DataSettings, {"partition": {"client": 3}}, "data")


@pytest.mark.parametrize(
    "settings",
    [
        DataSettings(),
        DataSettings(path="a.csv", partition={"by": "iid", "clients": 3}, evaluation={"fraction": 0}),
        DataSettings(path="a.csv", partition={"column": "k"}, evaluation={"column": "split", "value": "test"}),
        DataSettings(name=None, partition={"by": "quantity", "clients": 3, "alpha": 1}, evaluation={"fraction": 0.2}),
    ],
)
def test_written_out_settings_read_back_equal(settings):
    assert read(DataSettings, settings.model_dump(mode="json"), "data") == settings


def test_settings_are_frozen_and_described():
    with pytest.raises(Exception, match="frozen"):
        DataSettings().limit = 3
    for kind in (DataSettings, PartitionSettings, EvaluationSplit):
        assert all(field.description for field in kind.model_fields.values())


def test_the_module_imports_nothing_heavy():
    heavy = ("torch", "datasets", "transformers", "sklearn", "pandas", "numpy")
    code = f"import sys, fedllm.data.settings; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

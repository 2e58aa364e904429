"""A federation: whose rows, held out how, read when; and that clients do not depend on each other."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError
from fedllm.data.federation import Federation, HeldOut
from fedllm.data.load import Rows
from fedllm.data.organisations import organisations
from fedllm.data.settings import DataSettings, EvaluationSplit, PublicData

IID = {"by": "iid", "clients": 4}


def rows(count: int, **more) -> list[dict]:
    return [{"n": n, "label": "ab"[n % 2], "key": f"k{n % 5}", **more} for n in range(count)]


def build(data, seed=0, **options) -> Federation:
    options.setdefault("partition", IID)
    return Federation.build(DataSettings(name=None, **options), seed, data)


def numbers(found) -> list[int]:
    return [row["n"] for row in found]


def test_organisations_are_the_default():
    federation = Federation.build(DataSettings(documents=6, held_out=2), 0)
    assert federation.client_ids == sorted(one.key for one in organisations())
    assert federation.names == {one.key: one.name for one in organisations()}
    assert all(federation.size(c) == 6 and federation.size(c, "eval") == 2 for c in federation.client_ids)
    assert {row["organisation"] for row in federation.rows("clinic", "eval")} == {"clinic"}
    assert federation.warnings == [] and federation.label_column is None and federation.labels is None


def test_organisations_without_held_out_documents_train_on_all():
    federation = Federation.build(DataSettings(documents=6, held_out=0), 0)
    assert [federation.size(c) for c in federation.client_ids] == [6] * 8
    assert not federation.pooled("eval") and not federation.warnings


def test_organisations_mixed_evenly():
    federation = Federation.build(DataSettings(documents=6, held_out=2, partition=IID), 0)
    assert [federation.size(c) for c in federation.client_ids] == [12] * 4
    assert [federation.size(c, "eval") for c in federation.client_ids] == [4] * 4
    assert federation.names["client-1"] == "client-1"


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(4, 80),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
    most=st.none() | st.integers(1, 5),
)
def test_train_and_eval_share_out_all_rows(count, fraction, seed, most):
    federation = build(rows(count), seed, evaluation={"fraction": fraction, "per_client": most})
    train, held = numbers(federation.pooled("train")), numbers(federation.pooled("eval"))
    assert sorted(train + held) == list(range(count))
    for client in federation.client_ids:
        size, out = federation.size(client), federation.size(client, "eval")
        assert size == len(federation.rows(client)) >= 1 and out == len(federation.rows(client, "eval"))
        expected = 0 if fraction == 0 or size + out < 2 else min(max(1, round(fraction * (size + out))), size + out - 1)
        assert out == min(expected, most or expected)


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_one_row_is_always_left_for_training(count):
    federation = build(rows(count), partition={"by": "iid", "clients": 1}, evaluation={"fraction": 0.99})
    assert federation.size("client-1") == len(federation.rows("client-1")) == 1


def test_every_client_draws_its_own_held_out_rows():
    federation = build(rows(400), partition={"column": "key"}, evaluation={"fraction": 0.3})
    places = {tuple(n // 5 for n in numbers(federation.rows(c, "eval"))) for c in federation.client_ids}
    assert len(places) == len(federation.client_ids) == 5


def test_the_same_seed_gives_the_same_rows_in_any_order_of_asking():
    one, two, other = build(rows(40)), build(rows(40)), build(rows(40), seed=1)
    for client in reversed(one.client_ids):
        assert numbers(one.rows(client, "eval")) == numbers(two.rows(client, "eval"))
    assert [numbers(one.rows(c)) for c in one.client_ids] == [numbers(two.rows(c)) for c in two.client_ids]
    assert any(numbers(one.rows(c)) != numbers(other.rows(c)) for c in one.client_ids)


def test_the_partitions_seed_goes_before_the_runs():
    fixed = {"partition": {**IID, "seed": 5}}
    one, two = build(rows(40), 1, **fixed), build(rows(40), 2, **fixed)
    assert all(numbers(one.rows(c, "eval")) == numbers(two.rows(c, "eval")) for c in one.client_ids)


def test_held_out_rows_of_a_client_do_not_depend_on_other_clients():
    natural = {"column": "key"}
    every = build(rows(100), partition=natural)
    without = build([row for row in rows(100) if row["key"] != "k0"], partition=natural)
    for client in without.client_ids:
        assert numbers(every.rows(client, "eval")) == numbers(without.rows(client, "eval"))


def test_a_single_row_is_for_training_and_counted():
    data = [*({"k": "big"} for _ in range(10)), {"k": "one"}]
    federation = build(data, partition={"column": "k"})
    assert federation.size("one") == 1 and federation.size("one", "eval") == 0
    assert federation.warnings == ["1 client has no held-out rows: one."]
    assert build(data, partition={"column": "k"}, evaluation={"fraction": 0}).warnings == []


def test_rows_held_out_by_a_column():
    data = [{"n": n, "key": f"k{n % 2}", "split": "test" if n % 10 == 0 else "train"} for n in range(40)]
    federation = build(data, partition={"column": "key"}, evaluation={"column": "split", "value": "test"})
    assert numbers(federation.rows("k0", "eval")) == [0, 10, 20, 30] and federation.size("k0") == 16
    assert federation.size("k1", "eval") == 0 and federation.warnings == ["1 client has no held-out rows: k1."]
    with pytest.raises(DataError, match=r"No row has split=tset.*Values of 'split': test, train.*Did you mean 'test'"):
        build(data, evaluation={"column": "split", "value": "tset"})
    partly = [{"n": 1, "split": "test"}, {"n": 2}, {"n": 3, "split": None}, {"n": 4, "split": "train"}]
    one = build(partly, partition={"by": "iid", "clients": 1}, evaluation={"column": "split", "value": "test"})
    assert numbers(one.pooled("eval")) == [1] and numbers(one.pooled()) == [2, 3, 4]
    with pytest.raises(DataError, match="Every row has split=1"):
        build([{"split": 1}, {"split": 1}], evaluation={"column": "split", "value": "1"})


def test_rows_held_out_in_another_file(write, cache):
    train = write("train.jsonl", [{"q": n, "topic": f"t{n % 2}"} for n in range(20)])
    test = write("test.jsonl", [{"q": 100 + n, "topic": f"t{n % 2}"} for n in range(6)])
    settings = DataSettings(
        path=train, columns={"n": "q"}, evaluation={"path": test, "per_client": 2}, partition={"column": "topic"}
    )
    federation = Federation.build(settings, 0)
    assert numbers(federation.rows("t0")) == list(range(0, 20, 2))
    assert set(numbers(federation.rows("t0", "eval"))) < {100, 102, 104} and federation.size("t0", "eval") == 2
    assert federation.warnings == ["2 held-out rows of 2 clients are not used: at most 2 each."]
    other = write("other.jsonl", [{"q": "text", "topic": "t0"}])
    with pytest.raises(DataError, match=r"data.evaluation.path=.*do not fit"):
        Federation.build(settings.model_copy(update={"evaluation": EvaluationSplit(path=other)}), 0)
    with pytest.raises(DataError, match=r"no column 'q' in .*bare.jsonl"):
        bare = write("bare.jsonl", [{"topic": "t0"}])
        Federation.build(settings.model_copy(update={"evaluation": EvaluationSplit(path=bare)}), 0)


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
def test_another_file_does_not_change_who_trains_on_what(write, cache, by):
    """Held-out rows follow the clients' distributions and leave the training rows where they were."""
    data, held = rows(300), [{"n": 1000 + n, "label": "ab"[n % 2], "key": "k"} for n in range(100)]
    part = {**IID, "by": by, **({"column": "label", "alpha": 0.2} if by == "dirichlet" else {})}
    path, other = write("a.jsonl", data), write("b.jsonl", held)
    plain = Federation.build(DataSettings(path=path, partition=part, evaluation={"fraction": 0}), 0)
    with_file = Federation.build(DataSettings(path=path, partition=part, evaluation={"path": other}), 0)
    for client in plain.client_ids:
        assert numbers(plain.rows(client)) == numbers(with_file.rows(client))
        size, out = with_file.size(client), with_file.size(client, "eval")
        assert abs(size / 300 - out / 100) < 0.12
    assert sorted(numbers(with_file.pooled("eval"))) == [row["n"] for row in held]


def test_per_client_caps_are_seeded_and_noted():
    federation = build(rows(400), per_client=7)
    assert all(federation.size(c) == 7 == len(set(numbers(federation.rows(c)))) for c in federation.client_ids)
    assert federation.warnings == ["332 training rows of 4 clients are not used: at most 7 each."]
    assert numbers(build(rows(400), per_client=7).pooled()) == numbers(federation.pooled())


def test_dropped_clients_are_warned_of():
    data = [*rows(50), {"n": 50, "label": "a", "key": "rare"}]
    federation = build(data, partition={"column": "key", "min_size": 5, "empty": "drop"})
    assert "rare" not in federation.client_ids
    assert federation.warnings == ["Dropped for having fewer than 5 training rows: 1 of 6 clients, 1 of 51 rows."]


def test_labels_are_those_of_all_rows_sorted():
    assert build([{"label": n % 12} for n in range(48)]).labels == list(range(12))
    tagged = build([{"tags": ["O", "B-PER"]}, {"tags": ["I-PER"]}] * 8)
    assert tagged.label_column == "tags" and tagged.labels == ["B-PER", "I-PER", "O"]
    with pytest.raises(DataError, match="'tags' holds a dict in row 1"):
        build([{"tags": [{}]}] * 8).labels  # noqa: B018
    part = {"by": "dirichlet", "column": "kind", "clients": 2, "alpha": 5.0}
    assert build([{"kind": "xyz"[n % 3]} for n in range(60)], partition=part).label_column == "kind"
    mapped = build([{"kind": "xyz"[n % 3]} for n in range(60)], partition=part, columns={"label": "kind"})
    assert mapped.label_column == "label" and mapped.labels == ["x", "y", "z"]


def test_only_the_rows_of_the_client_asked_are_read():
    read = []

    class Spy(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    federation = build(Spy(rows(400)))
    read.clear()
    chosen = federation.rows("client-2")
    assert federation.size("client-2") == len(chosen) and read == []
    assert chosen[3]["n"] in read and len(read) == 1
    assert len(list(chosen)) == len(chosen) == len(read) - 1
    mine = set(read)
    read.clear()
    assert not mine & set(numbers(federation.rows("client-3"))) and len(read) == federation.size("client-3")


def test_pooled_rows_are_the_clients_in_order():
    federation = build(rows(43))
    expected = [n for client in federation.client_ids for n in numbers(federation.rows(client))]
    pooled = federation.pooled()
    assert numbers(pooled) == expected and len(pooled) == len(expected)
    assert [pooled[at]["n"] for at in range(-len(pooled), len(pooled))] == expected * 2
    assert numbers(pooled[3:30:5]) == expected[3:30:5]
    with pytest.raises(IndexError):
        pooled[len(pooled)]


def test_clients_in_memory():
    federation = Federation.of({"b": {"train": rows(3), "eval": rows(1)}, "a": {"eval": rows(2)}}, {"a": "Anna"})
    assert federation.client_ids == ["a", "b"] and federation.names == {"a": "Anna", "b": "b"}
    assert federation.size("b") == 3 and federation.size("a") == 0 and numbers(federation.pooled("eval")) == [0, 1, 0]
    assert federation.labels == ["a", "b"] and federation.warnings == ["1 client has no training rows: a."]
    with pytest.raises(DataError, match="no clients"):
        Federation.of({})
    with pytest.raises(ConfigError, match=r"split \(client 'a'\) 'evl'.*Did you mean 'eval'"):
        Federation.of({"a": {"evl": []}})


def test_rows_without_a_split_are_refused():
    with pytest.raises(ConfigError, match=r"Client 'a' is given as a list.*Write \{\"train\": rows\}"):
        Federation.of({"a": [{"x": 1}]})  # type: ignore[dict-item]


def test_unknown_clients_and_splits_name_the_nearest():
    federation = build(rows(40))
    with pytest.raises(DataError, match=r"no client 'client-9'.*Did you mean 'client-\d'"):
        federation.rows("client-9")
    with pytest.raises(ConfigError, match=r"no split 'test'.*Allowed: eval, train"):
        federation.size("client-1", "test")


class Partitions:
    """The interface of flwr-datasets' partitioners."""

    def __init__(self, sizes, natural=None) -> None:
        self.sizes, self.loaded = sizes, []
        if natural:
            self.partition_id_to_natural_id = natural

    @property
    def num_partitions(self) -> int:
        return len(self.sizes)

    def load_partition(self, number: int):
        import datasets

        self.loaded.append(number)
        return datasets.Dataset.from_list([{"q": f"{number}-{n}", "label": n % 2} for n in range(self.sizes[number])])


def test_a_partitioner_of_flwr_datasets():
    given_ = Partitions([10, 20, 1], {0: "anna", 1: "ben", 2: "carl"})
    federation = Federation.from_partitioner(given_, columns={"text": "q"})
    assert federation.client_ids == ["client-1", "client-2", "client-3"] and federation.names["client-2"] == "ben"
    given_.loaded.clear()
    assert federation.size("client-2") == 18 and federation.size("client-2", "eval") == 2
    assert set(given_.loaded) == {1} and federation.rows("client-2")[0]["text"].startswith("1-")
    assert federation.size("client-3", "eval") == 0 and federation.labels == [0, 1]
    with pytest.raises(DataError, match="list is no partitioner"):
        Federation.from_partitioner([])
    with pytest.raises(DataError, match="no rows"):
        Federation.from_partitioner(Partitions([5, 0])).rows("client-2")
    with pytest.raises(ConfigError, match="Allowed: fraction"):
        Federation.from_partitioner(given_, evaluation=EvaluationSplit(path="x"))


def test_a_datasets_table_is_accepted_and_keeps_its_selection():
    import datasets

    table = datasets.Dataset.from_list(rows(100)).shuffle(seed=3).select(range(50))
    federation = build(table, evaluation={"fraction": 0}, partition={"column": "key"})
    assert sorted(numbers(federation.pooled())) == sorted(table["n"])
    assert all(row["key"] == client for client in federation.client_ids for row in federation.rows(client))


def test_natural_without_a_column_is_refused_for_rows_in_memory():
    with pytest.raises(ConfigError, match=r"natural needs 'column'"):
        Federation.build(DataSettings(), 0, rows(4))


def test_many_clients_cost_index_arrays_only():
    """20,000 clients over 200,000 rows: under 600 bytes a client beside the rows themselves."""
    import tracemalloc

    class Many(Rows):
        def codes(self, name):
            return numpy.arange(len(self)) // 10, [f"c{n:06d}" for n in range(len(self) // 10)]

    from fedllm.data.partition import Natural

    table = Many([{"k": 0}] * 200_000)
    tracemalloc.start()
    parts = Natural("k").assign(table)
    held = HeldOut(EvaluationSplit(), None, 0, table.held_out)
    federation = Federation(
        parts,
        lambda client, split: table.take(held.numbers(client, parts[client], split)),
        lambda client, split: held.size(parts[client], split),
    )
    kept = tracemalloc.get_traced_memory()[0]
    assert sum(federation.size(client) for client in federation.client_ids) == 180_000
    grown = tracemalloc.get_traced_memory()[0] - kept
    tracemalloc.stop()
    assert kept < 20_000 * 600 and grown < 100_000


def test_real_users_are_natural_clients(shared, cache):
    path = shared("movielens-100k-ratings.jsonl.gz")
    federation = Federation.build(DataSettings(path=path, partition={"column": "user"}), 0)
    assert len(federation.client_ids) == 943
    assert sum(federation.size(c, s) for c in federation.client_ids for s in ("train", "eval")) == 100_000


def test_the_same_in_another_process():
    code = (
        "from fedllm.data.federation import Federation; from fedllm.data.settings import DataSettings;"
        "s = DataSettings(name=None, partition={'by': 'iid', 'clients': 4});"
        "f = Federation.build(s, 0, [{'n': n} for n in range(40)]);"
        "print([[r['n'] for r in f.rows(c, 'eval')] for c in f.client_ids])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = build(rows(40))
    assert done.stdout.strip() == str([numbers(here.rows(c, "eval")) for c in here.client_ids])


def test_labels_are_names_of_classes_and_alike_in_memory_and_in_a_table(tmp_path, cache):
    import datasets

    names = datasets.ClassLabel(names=["owl", "ant"])
    table = datasets.Dataset.from_dict({"label": [0, 1, -1]}, datasets.Features({"label": names}))
    settings = DataSettings(name=None, partition={"by": "iid", "clients": 1}, evaluation={"fraction": 0})
    found = Federation.build(settings, 0, table)
    (client,) = found.client_ids
    assert found.labels == ["ant", "owl"] and [row["label"] for row in found.rows(client)] == ["owl", "ant", None]

    public = tmp_path / "public.csv"
    public.write_text("text,label\na,1\nb,3\n")
    beside = settings.model_copy(update={"public": PublicData(path=str(public))})
    assert Federation.build(beside, 0, [{"label": 1}, {"label": 2}]).labels == [2, "1", "3"]

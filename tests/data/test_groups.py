"""Groups on disk: nothing lost, nothing silent, the same order by seed, flat memory, and damage that is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, DataError
from fedllm.data import groups as module
from fedllm.data.groups import (
    ByDirichlet,
    ByHost,
    FixedBatches,
    Randomly,
    build,
    cohorts,
    index,
    stats,
    stream,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EXAMPLES = st.lists(
    st.fixed_dictionaries({"k": st.text(min_size=1, max_size=3).filter(str.strip), "v": JSON}), min_size=1, max_size=40
)


def users(count: int, groups: int = 7) -> list[dict]:
    return [{"k": f"u{n * n % groups}", "n": n, "text": "some words here"} for n in range(count)]


def content(folder) -> dict[str, list]:
    return {key: list(group) for key, group in stream(folder)}


def expected(rows, key="k") -> dict[str, list]:
    found = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return dict(found)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "groups"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=EXAMPLES, memory=st.sampled_from([1, 200, 2**20]), shards=st.integers(1, 4))
def test_groups_hold_exactly_the_input_in_its_order(tmp_path_factory, rows, memory, shards):
    """Also where every bucket is too large for memory and is split again and again."""
    out = tmp_path_factory.mktemp("g") / "groups"
    built = build(rows, "k", out, shards=shards, memory=memory)
    assert content(out) == expected(rows)
    assert built.examples == len(rows) and built.groups == len(expected(rows)) and built.left_out == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.json", *(shard["file"] for shard in index(out)["shards"])]
    )


def test_buckets_over_the_budget_are_split_again(out, monkeypatch):
    levels = []
    original = module._group_by
    monkeypatch.setattr(module, "_group_by", lambda *given: (levels.append(given[2]), original(*given))[1])
    rows = users(3000, groups=501)
    build(rows, "k", out, memory=500)
    assert max(levels) >= 1 and content(out) == expected(rows)


def test_a_group_larger_than_memory_is_written_and_read_as_a_stream(out):
    rows = [{"k": "one", "n": n, "pad": "x" * 1000} for n in range(2000)]
    build(iter(rows), "k", out, memory=10_000)
    ((key, group),) = stream(out, seed=0)
    reader = iter(group)
    assert key == "one" and len(group) == 2000 and next(reader) == rows[0] and next(reader) == rows[1]
    assert list(group) == rows and list(group) == rows  # it can be read again


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(list(range(60))))
def test_shuffled_input_gives_the_same_groups(tmp_path_factory, order):
    rows = users(60)
    for key in ("k", lambda row: row["k"], Randomly(4, 1, id="n"), ByDirichlet("k", 4, 0.5, 1, id="n")):
        one, two = (tmp_path_factory.mktemp("g") / "groups" for _ in range(2))
        build(rows, key, one, shards=2)
        build([rows[n] for n in order], key, two, shards=2)
        a, b = content(one), content(two)
        assert {k: sorted(row["n"] for row in v) for k, v in a.items()} == {
            k: sorted(row["n"] for row in v) for k, v in b.items()
        }


def test_a_second_run_writes_the_same_bytes(tmp_path):
    rows = users(500)
    for name in ("one", "two"):
        build(rows, ByDirichlet("k", 20, 0.3, seed=5), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_drawn_keys_agree_between_processes():
    """The published fault: an unseeded generator in each worker gives each its own distributions."""
    code = (
        "from fedllm.data.groups import *;"
        "d, r = ByDirichlet('k', 9, 0.5, 3), Randomly(9, 3);"
        "print([(d.of({'k': f'l{n % 4}'}, n), r.of({}, n)) for n in range(200)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    drawn, uniform = ByDirichlet("k", 9, 0.5, 3), Randomly(9, 3)
    here = [(drawn.of({"k": f"l{n % 4}"}, n), uniform.of({}, n)) for n in reversed(range(200))]  # any order
    assert done.stdout.strip() == str(here[::-1])


def test_random_keys_are_uniform_and_dirichlet_keys_are_skewed():
    sizes = Counter(Randomly(10, 0).of({}, n) for n in range(20_000))
    assert len(sizes) == 10 and all(1800 < size < 2200 for size in sizes.values())
    key = ByDirichlet("k", 10, 0.2, 0)
    shares = numpy.diff(numpy.concatenate([[0], numpy.cumsum(_drawn(key, "a"))]))
    found = Counter(key.of({"k": "a"}, n) for n in range(20_000))
    assert all(abs(found[f"group-{g:07d}"] / 20_000 - shares[g]) < 0.015 for g in range(10))
    assert Counter(key.of({"k": "b"}, n) for n in range(20_000)).most_common(1) != found.most_common(1)


def _drawn(key: ByDirichlet, label: str) -> numpy.ndarray:
    from fedllm.core.seeds import numpy_stream

    return numpy_stream(key.seed, "dirichlet", "str", label).dirichlet(numpy.full(key.groups, key.alpha))


def test_hosts_as_keys(out):
    build([{"u": "https://a.org/x"}, {"u": "http://b.org/"}, {"u": "https://a.org/y"}], ByHost("u"), out)
    assert {key: len(group) for key, group in stream(out)} == {"a.org": 2, "b.org": 1}


def test_the_size_cap_is_counted_and_reported(out):
    rows = [{"k": "a", "n": n} for n in range(10)] + [{"k": "b", "n": 0}, {"k": "c", "n": 0, "pad": "x" * 99}]
    size = len(json.dumps(rows[0], separators=(",", ":")))
    built = build(rows, "k", out, max_group_bytes=3 * size)
    assert content(out) == {"a": rows[:3], "b": [rows[10]]}
    assert (built.examples, built.left_out, built.capped, built.empty, built.groups) == (4, 8, 2, 1, 2)
    assert built.examples + built.left_out == len(rows) and built.left_out_bytes == 7 * size + len(
        json.dumps(rows[-1], separators=(",", ":"))
    )
    assert built.warnings == ["8 examples of 2 groups were left out: max_group_bytes was reached."]
    assert index(out)["left_out"] == 8
    with pytest.raises(DataError, match="over max_group_bytes"):
        build(rows, "k", out.with_name("none"), max_group_bytes=1)


def test_what_comes_after_the_cap_is_left_out_however_small(out):
    rows = [{"k": "a", "t": "x" * size} for size in (10, 500, 1)]
    assert build(rows, "k", out, max_group_bytes=100).left_out == 2
    assert content(out) == {"a": rows[:1]}


def test_classes_are_grouped_and_written_by_their_names(out):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["owl", "ant"]), "n": datasets.Value("int64")})
    build(datasets.Dataset.from_dict({"label": [1, 0, 1], "n": [1, 2, 3]}, features), "label", out)
    assert content(out) == {
        "owl": [{"label": "owl", "n": 2}],
        "ant": [{"label": "ant", "n": 1}, {"label": "ant", "n": 3}],
    }


def test_statistics_of_groups(out):
    rows = [{"k": "a", "t": "one two  three"}, {"k": "b", "t": ["x y", {"z": "w"}], "n": 5}, {"k": "a", "t": ""}]
    build(rows, "k", out)
    found = {one.key: one for one in stats(out)}
    assert (found["a"].num_examples, found["a"].num_words) == (2, 1 + 3 + 1 + 0)
    assert (found["b"].num_examples, found["b"].num_words) == (1, 1 + 2 + 1)
    assert found["b"].num_bytes == len(json.dumps(rows[1], separators=(",", ":")))
    assert sum(one.num_bytes for one in found.values()) == index(out)["bytes"]


@pytest.mark.parametrize("buffer", [1, 3, 1000])
def test_the_order_of_a_stream_follows_from_its_seed(out, buffer):
    build(users(900, groups=331), "k", out, shards=3)
    orders = [[key for key, _ in stream(out, seed, buffer)] for seed in range(5)]
    assert orders[0] == [key for key, _ in stream(out, 0, buffer)]
    assert any(order != orders[0] for order in orders)
    assert all(sorted(order) == sorted(expected(users(900, groups=331))) for order in orders)
    assert [key for key, _ in stream(out, 0, buffer, start=50)] == orders[0][50:]


def test_a_buffer_mixes_runs_of_alike_groups(out):
    """Every part of the order has groups of every shard, which a small buffer over one shard after another has not."""
    build(users(4000, groups=2003), "k", out, shards=4)
    where = [group.path.name for _, group in stream(out, 0, buffer=64)]
    for part in numpy.array_split(numpy.array(where), 4):
        assert len(set(part.tolist())) == 4


def test_groups_of_a_cohort_can_be_read_in_any_order(out):
    rows = users(200)
    build(rows, "k", out)
    held = [(key, iter(group)) for key, group in stream(out, seed=2)]
    found = defaultdict(list)
    while held:
        for key, reader in list(held):
            row = next(reader, None)
            if row is None:
                held.remove((key, reader))
            else:
                found[key].append(row)
    assert dict(found) == expected(rows)


def test_cohorts_hold_every_group_once(out):
    build(users(300, groups=101), "k", out)
    total = index(out)["groups"]
    full = cohorts(out, 8, seed=0)
    keys = [[key for key, _ in cohort] for cohort in full]
    assert all(len(cohort) == 8 for cohort in keys) and full.remainder == total % 8 and len(keys) == total // 8
    assert keys == [[key for key, _ in cohort] for cohort in full]
    every = [key for cohort in cohorts(out, 8, seed=0, drop_remainder=False) for key, _ in cohort]
    assert len(every) == len(set(every)) == total and every[: len(keys) * 8] == [key for c in keys for key in c]
    with pytest.raises(ConfigError, match="cohort of 0 groups"):
        cohorts(out, 0)


def test_groups_that_preparation_leaves_empty_are_skipped_and_counted(out):
    build(users(300, groups=101), "k", out)
    total = index(out)["groups"]
    source = cohorts(
        out, 4, seed=0, drop_remainder=False, prepare=lambda group: (r["n"] for r in group if r["n"] > 250)
    )
    kept = {key: list(examples) for cohort in source for key, examples in cohort}
    assert source.skipped > 0 and len(kept) + source.skipped == total
    assert all(kept.values()) and sorted(n for held in kept.values() for n in held) == list(range(251, 300))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_every_client_yields_exactly_tau_batches(examples, batches, size):
    source = FixedBatches(range(examples), batches, size)
    found = list(source)
    assert len(found) == batches and all(len(batch) == size for batch in found)
    flat = [n for batch in found for n in batch]
    assert flat == [n % examples for n in range(batches * size)]
    assert source.repeats == batches * size / min(examples, batches * size)


def test_batches_of_nothing_are_an_error():
    with pytest.raises(DataError, match="no example"):
        list(FixedBatches([], 2, 2))


@pytest.mark.parametrize(
    ("rows", "key", "match"),
    [
        ([], "k", "no rows to group"),
        ([{"k": "a"}, {"x": 1}], "k", "key of example 2 is None"),
        ([{"k": "a"}, {"k": " "}], "k", "key of example 2 is ' '"),
        ([{"k": 1.5}], "k", "key of example 1 is 1.5"),
        ([{"k": "a"}], lambda row: b"\xff", "key of example 1 is not UTF-8"),
        ([{"k": "a"}, {"k": "b", "v": float("nan")}], "k", "Example 2 cannot be written as JSON"),
        ([{"k": "a", "v": b"x"}], "k", "Example 1 cannot be written as JSON.*bytes"),
        ([{"k": "a", 5: 1}], "k", "Example 1 has a column that is not named by a text"),
        ([{"k": "a"}], Randomly(3, 0, id="id"), "Example 1 has no 'id'"),
        ([{"k": "a"}], ByDirichlet("label", 3, 1.0, 0), "key of example 1 is None"),
        ([{"u": "nonsense"}], ByHost("u"), "key of example 1 is ''"),
    ],
)
def test_bad_rows_and_keys_name_the_example(tmp_path, rows, key, match):
    with pytest.raises(DataError, match=match):
        build(rows, key, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_refused(out):
    for options in ({"shards": 0}, {"memory": 0}, {"max_group_bytes": 0}):
        with pytest.raises(ConfigError, match="cannot be used"):
            build(users(3), "k", out, **options)
    with pytest.raises(ConfigError, match="no key"):
        build(users(3), 5, out)
    for alpha in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha="):
            ByDirichlet("k", 3, alpha, 0)
    with pytest.raises(ConfigError, match="into 0 groups"):
        Randomly(0, 0)
    build(users(3), "k", out)
    with pytest.raises(ConfigError, match="buffer=0"):
        stream(out, 0, buffer=0)


def test_an_existing_folder_is_left_alone(out):
    build(users(20), "k", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(DataError, match="exists already"):
        build(users(5), "k", out)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken():
        yield from users(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(broken(), "k", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written to .*No space left on device.*Free some disk space"):
        build(users(50), "k", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    def unreadable():
        yield from users(5)
        raise FileNotFoundError("gone.jsonl")

    with pytest.raises(DataError, match=r"rows to be grouped cannot be read: gone.jsonl"):
        build(unreadable(), "k", tmp_path / "out")


def damaged(out: Path, change) -> Path:
    """The largest shard after `change` of its bytes."""
    path = max(out.glob("groups-*.bin"), key=lambda file: file.stat().st_size)
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def read_all(out: Path, rows: list[dict] | None = None) -> None:
    """Read everything; where `rows` are given, every example that is read must be one of them."""
    for _, group in stream(out, seed=0):
        for row in group:
            assert rows is None or row == rows[row["n"]]


def test_a_shard_that_is_cut_short_or_missing_is_named_before_anything_is_read(out):
    build(users(300), "k", out)
    path = damaged(out, lambda data: data[:-1])
    for use in (lambda: stream(out), lambda: stream(out, 0), lambda: list(stats(out)), lambda: list(cohorts(out, 2))):
        with pytest.raises(DataError, match=rf"{path.name} is damaged: it has \d+ bytes and should have"):
            use()
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is damaged: it is missing"):
        stream(out)


def test_every_flipped_bit_is_found(out):
    """Wherever one bit of a shard is wrong, reading ends with a named error: no shorter epoch, no changed example."""
    rows = users(20)
    build(rows, "k", out, shards=1)
    path = next(out.glob("groups-*.bin"))
    good = path.read_bytes()
    read_all(out)
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{path.name} is damaged"):
            read_all(out, rows)


def test_a_shard_cut_while_it_is_read_is_an_error(out):
    build(users(300), "k", out, shards=1)
    held = list(stream(out, seed=0))
    path = damaged(out, lambda data: data[: len(data) // 2])
    with pytest.raises(
        DataError, match=rf"{path.name} is damaged: example .* of the group '.*' is not as it was written"
    ):
        for _, group in held:
            list(group)


def test_an_index_of_fewer_groups_is_no_shorter_epoch(out):
    build(users(300), "k", out, shards=1)
    about = json.loads((out / "index.json").read_text())
    about["shards"][0]["groups"] -= 1
    (out / "index.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"more than the . groups of the index"):
        list(stream(out))


def test_a_folder_that_holds_no_groups(tmp_path, out):
    with pytest.raises(DataError, match=r"no index.json"):
        stream(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not of the format"):
        stream(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index.json is damaged"):
        stream(tmp_path)


def test_texts_that_are_no_valid_unicode_survive(out):
    rows = [{"k": "a\ud800", "v": "\udfff"}]
    build(rows, "k", out)
    assert content(out) == {"a\ud800": rows}


def test_memory_does_not_grow_with_the_data(tmp_path):
    """The card's check: 5,000 groups, four times the rows, at most 1.5 times the peak (of Python's allocations)."""
    code = """
import sys, tracemalloc
from fedllm.data.groups import build, stream
count, out = int(sys.argv[1]), sys.argv[2]
rows = ({"k": n * 7919 % 5000, "text": f"row {n} has a few words"} for n in range(count))
tracemalloc.start()
build(rows, "k", out, memory=2**16)
read = sum(1 for _, group in stream(out, 0, 256) for _ in group)
assert read == count
print(tracemalloc.get_traced_memory()[1])
"""
    peaks = []
    for count in (10_000, 40_000):
        command = [sys.executable, "-c", code, str(count), str(tmp_path / str(count))]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 2**22


def test_real_tasks_as_groups(shared, cache, out):
    import datasets

    table = datasets.load_dataset("json", data_files=shared("t0-tasks.jsonl.gz"), split="train")
    built = build(table, "task", out)
    assert built.examples == len(table) == 31_488 and built.groups == 168
    assert sum(one.num_examples for one in stats(out)) == 31_488

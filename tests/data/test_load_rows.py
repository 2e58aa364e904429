"""Reading files: every form, a changed file, and each kind of broken file with its own words."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from fedllm.core.errors import ConfigError, DataError
from fedllm.data.load import Rows, arrange, from_files, load_rows
from fedllm.data.settings import DataSettings

IID = {"by": "iid", "clients": 1}
ROWS = [{"q": "one", "n": 1}, {"q": "NA", "n": 2}, {"q": "drei äöü", "n": 3}]


def load(path, **options) -> Rows:
    return load_rows(DataSettings(path=str(path), partition=IID, **options), seed=0)


def listed(rows: Rows) -> list[dict]:
    return [dict(row) for row in rows.take(numpy.arange(len(rows)))]


def written(folder: Path, name: str) -> Path:
    """ROWS in the form that the name says."""
    import pandas

    path, form = folder / name, name.removesuffix(".gz").rsplit(".", 1)[-1]
    raw = folder / f"raw.{form}"
    if form == "jsonl":
        raw.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "json":
        raw.write_text(json.dumps(ROWS))
    elif form == "parquet":
        pandas.DataFrame(ROWS).to_parquet(raw)
    else:
        pandas.DataFrame(ROWS).to_csv(raw, index=False, sep="\t" if form == "tsv" else ",")
    data = raw.read_bytes()
    raw.unlink()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_form_gives_the_same_rows(tmp_path, cache, form, packed):
    rows = load(written(tmp_path, f"data.{form}{packed}"))
    assert listed(rows) == ROWS  # the word NA stays a word
    assert rows.table.cache_files  # memory-mapped, so it may be larger than memory
    assert {file.name for file in tmp_path.iterdir()} == {f"data.{form}{packed}", "hf-cache"}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.parquet.gz"])
def test_a_changed_file_is_read_anew(tmp_path, cache, name):
    path = written(tmp_path, name)
    first = listed(load(path))
    before = path.stat().st_mtime_ns
    ROWS.append({"q": "four", "n": 4})
    try:
        written(tmp_path, name)
    finally:
        ROWS.pop()
    os.utime(path, ns=(before + 10**7, before + 10**7))
    assert len(first) == 3 and len(load(path)) == 4


def test_folder_and_pattern_join_files_in_order(tmp_path, cache, write):
    write("d/b.jsonl", [{"n": 2}])
    write("d/a.jsonl", [{"n": 1}])
    write("d/.hidden.jsonl", [{"n": 9}])
    (tmp_path / "d" / "notes.txt").write_text("x")
    assert [row["n"] for row in listed(load(tmp_path / "d"))] == [1, 2]
    assert [row["n"] for row in listed(load(tmp_path / "d" / "*.jsonl"))] == [1, 2]


def test_a_name_with_brackets_is_a_file(tmp_path, cache, write):
    assert len(load(write("odd [1] name.jsonl", [{"n": 1}]))) == 1


def test_works_without_the_network_and_names_it_for_the_hub(tmp_path, write):
    path = write("a.jsonl", [{"n": 1}])
    code = f"""
from fedllm.core.errors import DataError
from fedllm.data.load import load_rows
from fedllm.data.settings import DataSettings
part = dict(by="iid", clients=1)
print(len(load_rows(DataSettings(path={path!r}, partition=part))))
try:
    load_rows(DataSettings(name="nobody/nothing", partition=part))
except DataError as fault:
    print(fault)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("1\nThe data set 'nobody/nothing' is not on this machine, and the hub cannot")
    assert "Load it once while online" in done.stdout and done.stderr == ""


BROKEN = {
    "line.jsonl": (b'{"x":1}\n{"x":2}\n{"x":\n{"x":4}\n', "Line 3 of .*line.jsonl is not JSON"),
    "cut.jsonl": (b'{"x":1}\n{"x":2}\n{"x": 3', "Line 3 of .* is not JSON"),
    "packed.jsonl.gz": (gzip.compress(b'{"x":1}\nnonsense\n'), "Line 2 of .* is not JSON"),
    "value.jsonl": (b'{"x":1}\n5\n', "Line 2 of .* holds no object: 5"),
    "list.jsonl": (b"[1,2]\n[3]\n", "Line 1 of .* holds no object"),
    "latin.jsonl": (b'{"x":"a"}\n{"x":"\xe9"}\n', "Line 2 of .* is not UTF-8"),
    "document.json": (b'[{"x":1},\n{"x":2}\n', "Line 3 of .* is not JSON"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(20_000).hex().encode())[:-9000], "damaged"),
    "fake.jsonl.gz": (b'{"x":1}\n', "is damaged: Not a gzipped file"),
    "long.csv": (b"a,b\n1,2\n3,4,5\n", "Expected 2 fields in line 3, saw 3"),
    "latin.csv": (b"a,b\n1,\xe9\n", "Line 2 of .* is not UTF-8"),
    "header.csv": (b"a,b\n", "no rows|corresponds to no data"),
    "fake.parquet": (b"abc", "is not a parquet file, or is cut short"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n  \n", "is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty"),
    "notes.txt": (b"abc", "no file of a known kind.*jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, cache, name):
    content, match = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        load(tmp_path / name)


def test_a_late_change_of_type_is_found(tmp_path, cache, write):
    """The reader takes types from the first megabytes; what does not fit them is named with its line."""
    rows = [{"n": 1, "pad": "x" * 100_000}] * 120
    for late, match in [
        ({"n": "t", "pad": ""}, r"column 'n': str in line 121"),
        ({"n": 1, "new": 1}, r"column 'new': int in line 121"),
    ]:
        with pytest.raises(DataError, match=match):
            load(write("late.jsonl", [*rows, late]))


def test_missing_files_name_the_nearest(tmp_path, cache, write):
    write("train.jsonl", [{"n": 1}])
    with pytest.raises(DataError, match=r"no file or folder .*Did you mean 'train.jsonl'"):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="No file matches"):
        load(tmp_path / "*.csv")
    with pytest.raises(DataError, match="does not exist either"):
        load(tmp_path / "nowhere" / "a.jsonl")


def test_folders_that_are_no_single_data_set(tmp_path, cache, write):
    import datasets

    write("mixed/a.jsonl", [{"n": 1}])
    (tmp_path / "mixed" / "b.csv").write_text("n\n1\n")
    with pytest.raises(DataError, match=r"several kinds: \.csv, \.jsonl"):
        load(tmp_path / "mixed")
    datasets.Dataset.from_list([{"n": 1}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="save_to_disk"):
        load(tmp_path / "saved")


def test_columns_are_renamed_and_what_is_set_aside_is_noted(cache, write):
    path = write("a.jsonl", [{"question": "q", "answer": "a", "instruction": "old"}])
    rows = load(path, columns={"instruction": "question", "response": "answer"})
    assert listed(rows) == [{"instruction": "q", "response": "a"}]
    assert rows.notes == ["The data's own column 'instruction' is not used: it is read from 'question'."]
    assert rows.column("question") == "instruction"  # either name finds it
    assert listed(load(path, columns={"instruction": "answer", "answer": "instruction"})) == [
        {"question": "q", "instruction": "a", "answer": "old"}
    ]


def test_a_missing_column_names_the_nearest(cache, write):
    path = write("a.jsonl", [{"question": "q"}])
    with pytest.raises(DataError, match=r"no column 'qestion'.*Columns: question.*Did you mean 'question'"):
        load(path, columns={"instruction": "qestion"})


def test_nulls_are_counted(cache, write):
    path = write("a.jsonl", [{"response": "a", "k": 1}, {"response": None, "k": None}, {"k": 3}])
    rows = load(path)
    assert rows.notes == ["The column 'response' is null in 2 of 3 rows."]
    with pytest.raises(DataError, match="'k' is null or empty in 1 of 3 rows, first in row 2"):
        rows.codes("k")
    with pytest.raises(DataError, match="'response' is null in all 2 rows"):
        load(write("b.jsonl", [{"response": None, "k": 1}] * 2))


@pytest.mark.parametrize("empty", ["", "  ", None, float("nan")])
def test_an_empty_key_is_an_error(empty):
    with pytest.raises(DataError, match="first in row 2"):
        Rows([{"k": "a"}, {"k": empty}] if not isinstance(empty, float) else [{"k": 1.0}, {"k": empty}]).codes("k")


def test_lists_cannot_be_keys():
    with pytest.raises(DataError, match="'k' holds a list in row 1"):
        Rows([{"k": ["a"]}]).codes("k")


def test_dates_read_from_text_are_noted(cache, write):
    rows = load(write("a.jsonl", [{"response": "2019-01-01"}, {"response": "2020-05-05"}]))
    assert any("looks like a date" in note for note in rows.notes)


def test_a_column_of_mixed_types_can_be_a_key(cache, write):
    pytest.importorskip("datasets", "5.0", reason="earlier ones refuse such a file")
    codes, values = load(write("a.jsonl", [{"k": 1}, {"k": "a"}, {"k": 1}])).codes("k")
    assert [values[code] for code in codes] == [1, "a", 1]


def test_rows_in_memory():
    import datasets

    held = [{"a": 1, "b": "x"}, {"a": 2}]
    assert listed(load_rows(held)) == held and load_rows(held).columns == ["a", "b"]
    table = datasets.Dataset.from_list([{"a": n} for n in range(5)]).select([4, 2, 0])
    assert listed(load_rows(table)) == [{"a": 4}, {"a": 2}, {"a": 0}]
    assert load_rows(table).codes("a")[0].tolist() == [2, 1, 0]
    for wrong, match in [
        ([], "no rows"),
        ([1], "Row 1 of the data is a int"),
        ("text", "The data is a str"),
        (datasets.DatasetDict(train=table), "Choose one split"),
        (iter([]), "list_iterator"),
    ]:
        with pytest.raises(DataError, match=match):
            load_rows(wrong)
    with pytest.raises(ConfigError, match="neither path nor name"):
        load_rows(DataSettings(name=None, partition=IID))


def classed():
    """Rows whose label, tags and other column are kept as numbers of classes; -1 is no class."""
    import datasets

    animal, tag = datasets.ClassLabel(names=["owl", "ant"]), datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {
            "animal": animal,
            "ner": datasets.Sequence(tag),
            "other": animal,
            "tokens": datasets.List(datasets.Value("string")),
        }
    )
    rows = {"animal": [0, -1, 1, None], "ner": [[0, 1], [], [-1], None], "other": [1, 0, 1, 0], "tokens": [["a"]] * 4}
    return datasets.Dataset.from_dict(rows, features)


NAMED = [
    {"label": "owl", "tags": ["O", "B-PER"], "other": 1, "tokens": ["a"]},
    {"label": None, "tags": [], "other": 0, "tokens": ["a"]},
    {"label": "ant", "tags": [None], "other": 1, "tokens": ["a"]},
    {"label": None, "tags": None, "other": 0, "tokens": ["a"]},
]
"""The same rows as a task needs them: names where a column is read as text."""


@pytest.mark.parametrize("source", ["parquet", "hub", "memory"])
def test_classes_are_read_by_their_names(tmp_path, cache, monkeypatch, source):
    import datasets

    columns, table = {"label": "animal", "tags": "ner"}, classed()
    if source == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
        rows = load(tmp_path / "a.parquet", columns=columns)
    elif source == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **given: table)
        rows = load_rows(DataSettings(name="org/data", columns=columns, partition=IID))
    else:
        rows = arrange(load_rows(table), DataSettings(name=None, columns=columns, partition=IID), 0)
    assert listed(rows) == NAMED and rows.table.features["label"].dtype == "int64"  # read so, not written anew
    assert list(rows.values("label")) == ["owl", None, "ant", None]
    assert rows.distinct("label") == ["ant", "owl"] and rows.distinct("tags") == ["B-PER", "O"]
    assert rows.notes == [
        "The column 'label' is null in 2 of 4 rows.",
        "The column 'tags' is null in 1 of 4 rows.",
    ]
    assert rows.distinct("other") == [0, 1]  # no task reads it as text


def test_classes_are_named_as_a_key_too():
    table = classed().rename_column("animal", "label")
    codes, values = load_rows(table.select([2, 0, 2])).codes("label")
    assert [values[code] for code in codes] == ["ant", "owl", "ant"]
    with pytest.raises(DataError, match="'label' is null or empty in 2 of 4 rows, first in row 2"):
        load_rows(table).codes("label")


def test_a_class_without_a_name_is_an_error():
    import datasets

    table = classed().rename_column("animal", "label").remove_columns("other")
    few = table.cast_column("label", datasets.ClassLabel(names=["owl"]))
    with pytest.raises(DataError, match=r"'label' holds the class 1\..*Its 1 classes are 0 to 0"):
        listed(load_rows(few))


@pytest.mark.parametrize("name", ["train", "train/*", "train/test.jsonl", "link"])
def test_a_file_that_is_held_out_may_not_be_read_for_training(tmp_path, cache, write, name):
    first, test = write("train/a.jsonl", [{"n": 1}]), write("train/test.jsonl", [{"n": 2}])
    (tmp_path / "link").symlink_to(tmp_path / "train")
    wrong = str(tmp_path / name)
    held, match = {"path": test}, r"The file .*test\.jsonl belongs to both {}=.* and data\.evaluation\.path=.*pattern"
    with pytest.raises(ConfigError, match=match.format(r"data\.path")):
        load(wrong, evaluation=held)
    with pytest.raises(ConfigError, match=match.format(r"data\.public\.path")):
        load(first, evaluation=held, public={"path": wrong})
    memory = DataSettings(name=None, evaluation=held, public={"path": wrong}, partition=IID)
    with pytest.raises(ConfigError, match=match.format(r"data\.public\.path")):
        arrange(load_rows([{"n": 1}]), memory, 0)
    rows = load(tmp_path / "train" / "a*", evaluation=held, public={"path": first})
    assert listed(rows) == [{"n": 1}, {"n": 2}] and rows.held_out.tolist() == [1]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_text_in_a_table_stays_as_it_is_written(tmp_path, cache, form):
    lines = ["q,response,label,year,input", "12,0042,1,2016,NA", "7,1.50,,2017,", ",True,2,2018,x"]
    path = tmp_path / f"a.{form}"
    path.write_text("\n".join(lines).replace(",", "," if form == "csv" else "\t") + "\n")
    rows = load(path, columns={"instruction": "q"})
    assert [list(row.values()) for row in listed(rows)] == [
        ["12", "0042", "1", 2016, "NA"],
        ["7", "1.50", None, 2017, None],
        [None, "True", "2", 2018, "x"],
    ]
    assert rows.distinct("year") == [2016, 2017, 2018]  # a column that is no text is still one of numbers
    held = load(path, columns={"n": "label"}, evaluation={"column": "year", "value": 2017})
    assert list(held.values("n"))[::2] == [1.0, 2.0] and held.held_out.tolist() == [1]  # its role decides


def test_labels_in_memory_and_in_a_held_out_table_are_alike(tmp_path, cache):
    held = tmp_path / "held.csv"
    held.write_text("label,n\n1,5\n2,6\n")
    settings = DataSettings(name=None, evaluation={"path": str(held)}, partition=IID)
    rows = arrange(load_rows([{"label": 1, "n": 1}, {"label": 3, "n": 2}]), settings, 0)
    assert rows.codes("label")[1] == ["1", "2", "3"] and rows.codes("n")[1] == [1, 2, 5, 6]
    none = arrange(load_rows([{"label": float("nan")}, {"label": None}]), settings, 0)
    with pytest.raises(DataError, match="null or empty in 2 of 4 rows"):
        none.codes("label")


def test_limit_is_a_seeded_sample_in_the_old_order(cache, write):
    path = write("a.jsonl", [{"n": n} for n in range(100)])
    settings = DataSettings(path=path, partition=IID, limit=10)
    first, again, other = (load_rows(settings, seed) for seed in (1, 1, 2))
    numbers = [row["n"] for row in listed(first)]
    assert len(set(numbers)) == 10 and numbers == sorted(numbers) == [row["n"] for row in listed(again)]
    assert numbers != [row["n"] for row in listed(other)] and first.notes == ["data.limit keeps 10 of 100 rows."]


def test_selections_read_lazily(cache, write):
    rows = load(write("a.jsonl", [{"n": n} for n in range(3000)]))
    chosen = rows.take(numpy.arange(0, 3000, 2))
    assert len(chosen) == 1500 and chosen[-1] == {"n": 2998} and [row["n"] for row in chosen[10:12]] == [20, 22]
    assert [row["n"] for row in chosen] == list(range(0, 3000, 2))
    with pytest.raises(IndexError):
        chosen[1500]


@pytest.mark.parametrize(
    ("found", "options", "match"),
    [
        ({"test": 1, "dev": 1}, {}, "no split 'train'.*Splits: dev, test"),
        (ConnectionError("Couldn't reach"), {}, "hub cannot be reached"),
        (ValueError("Unknown split"), {"split": "trian"}, "Unknown split.*data.split"),
    ],
)
def test_hub_faults(monkeypatch, found, options, match):
    import datasets

    def answer(*args, **given):
        if isinstance(found, Exception):
            raise found
        return datasets.DatasetDict({name: datasets.Dataset.from_list([{"a": 1}]) for name in found})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    with pytest.raises(DataError, match=match):
        load_rows(DataSettings(name="org/data", partition=IID, **options))


def test_hub_data_takes_train_or_the_only_split(monkeypatch):
    import datasets

    asked = []
    table = datasets.Dataset.from_list([{"a": 1}])

    def answer(*args, **given):
        asked.append((args, given))
        return table if given["split"] else datasets.DatasetDict(train=table, test=table)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert len(load_rows(DataSettings(name="org/data", config="c", revision="r", partition=IID))) == 1
    assert len(load_rows(DataSettings(name="org/data", split="test[:5]", partition=IID))) == 1
    assert asked[0] == (("org/data", "c"), {"revision": "r", "split": None}) and asked[1][1]["split"] == "test[:5]"


def test_a_hub_name_that_is_a_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    with pytest.raises(DataError, match=r"data.path=mine"):
        load_rows(DataSettings(name="mine", partition=IID))


def test_organisations_hold_out_the_same_documents_whatever_is_trained_on():
    few, many = (load_rows(DataSettings(documents=n, held_out=3), seed=4) for n in (2, 5))
    assert len(few) == 8 * 5 and len(few.held_out) == 24
    assert few.read(few.held_out) == many.read(many.held_out)
    assert not {row["instruction"] for row in few.read(few.held_out)} & {
        row["instruction"] for row in many.read(many.strata[0])
    }


@pytest.mark.parametrize(
    ("early", "late", "first", "last"), [("", "words", None, "words"), ("1", "2.5", 1.0, 2.5), ("1", "n/a", "1", "n/a")]
)
def test_a_csv_column_is_what_all_of_its_rows_are(
    tmp_path: Path, early: str, late: str, first: object, last: object
) -> None:
    """Types were guessed from the first 10,000 rows, and a later one of another type ended the reading."""
    file = tmp_path / "rows.csv"
    lines = ["text,extra", *(f"row {n},{early if n < 10_500 else late}" for n in range(11_000))]
    file.write_text("\n".join(lines))
    table = from_files(str(file))
    assert len(table) == 11_000 and (table[0]["extra"], table[10_999]["extra"]) == (first, last)

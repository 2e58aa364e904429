"""Load - from the data part of a recipe to one table of rows.

Files and hub data sets are read by `datasets`, which keeps them memory-mapped, so a table may be larger than memory.
Its own cache is used and nothing is written elsewhere; a changed file is read anew. What goes wrong below becomes one
error that names the file, the line or the column.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import numpy

from fedllm.core.errors import ConfigError, DataError, FedLLMError, nearest
from fedllm.core.seeds import derive, numpy_stream
from fedllm.data.settings import BUILT_IN, DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""File ending -> reader of `datasets`; each may be followed by .gz."""
ROLES = ("instruction", "response", "text", "messages", "label", "tokens", "tags")
"""Columns that tasks read; nulls in them are counted."""
TEXTS = (*ROLES, "input", "classes")
"""Columns whose values tasks read as text: the names of classes, and cells of a table as they are written."""
BLOCK = 1024
"""Rows read at a time."""

Row = Mapping[str, Any]


class Rows:
    """One table: a `datasets.Dataset`, or a list of mappings.

    Args:
        table: where the rows are.
        notes: what a user should know about it, one sentence each.
        held_out: sorted numbers of the rows that are for measuring only.
        sources: column of the file -> its role, where they differ.
    """

    def __init__(
        self,
        table: Dataset | Sequence[Row],
        notes: Sequence[str] = (),
        held_out: numpy.ndarray | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.table, self.notes, self.sources = table, list(notes), dict(sources or {})
        self.held_out = numpy.zeros(0, numpy.int64) if held_out is None else held_out

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the file."""
        if isinstance(self.table, Sequence):
            return list(dict.fromkeys(name for row in self.table for name in row))
        return list(self.table.column_names)

    @functools.cached_property
    def classes(self) -> dict[str, list[str]]:
        """Text column -> names of its classes, where the table keeps their numbers (`datasets.ClassLabel`)."""
        if isinstance(self.table, Sequence):
            return {}
        found = {name: _class_names(self.table.features[name]) for name in self.columns if name in TEXTS}
        return {name: names for name, names in found.items() if names is not None}

    @property
    def strata(self) -> list[numpy.ndarray]:
        """Row numbers of the training rows and, where rows are marked, of the held-out rows."""
        training = numpy.ones(len(self), bool)
        training[self.held_out] = False
        return [numpy.flatnonzero(training), *([self.held_out] if len(self.held_out) else [])]

    def column(self, name: str) -> str:
        """The name in this table of a column that is named by its role or as in the file.

        Raises:
            DataError: there is no such column.
        """
        if name in self.columns:
            return name
        if name in self.sources:
            return self.sources[name]
        raise no_column(name, self.columns)

    def read(self, numbers: Sequence[int] | numpy.ndarray) -> list[Row]:
        """The rows of these numbers, read now; classes by their names."""
        wanted = [int(number) for number in numbers]
        if isinstance(self.table, Sequence):
            return [self.table[number] for number in wanted]
        rows = self.table.__getitems__(wanted)
        for name in self.classes:
            for row in rows:
                row[name] = self._named(name, row[name])
        return rows

    def take(self, numbers: numpy.ndarray) -> Selection:
        """The rows of these numbers, read when they are looked at."""
        return Selection(self, numbers)

    def values(self, name: str) -> Iterator[Any]:
        """Every value of one column, classes by their names; no other column is read."""
        name = self.column(name)
        if isinstance(self.table, Sequence):
            yield from (row.get(name) for row in self.table)
            return
        for batch in self.table.select_columns([name]).iter(BLOCK):
            yield from self._named(name, batch[name]) if name in self.classes else batch[name]

    def codes(self, name: str) -> tuple[numpy.ndarray, list[Any]]:
        """A column as numbers: (number of each row's value, shape [rows]; the distinct values, sorted).

        Raises:
            DataError: no such column, a null in it, or values that are lists or records.
        """
        name, numbers, codes, nulls = self.column(name), {}, numpy.empty(len(self), numpy.int64), []
        for row, value in enumerate(self._scalars(name)):
            if value is None or value != value or (isinstance(value, str) and not value.strip()):
                nulls.append(row)
            codes[row] = numbers.setdefault(_hashable(name, row, value), len(numbers))
        if nulls:
            raise DataError(
                f"The column '{name}' is null or empty in {len(nulls)} of {len(self)} rows, "
                f"first in row {nulls[0] + 1}.",
                "Every row needs a value to be given to a client.",
                action="Fill these rows or leave them out of the data, or choose another data.partition.column.",
            )
        order = sorted(numbers, key=_sorted_as)
        place = numpy.empty(len(order), numpy.int64)
        place[[numbers[key] for key in order]] = numpy.arange(len(order))
        return place[codes], [value for _, value in order]

    def distinct(self, name: str) -> list[Any]:
        """The sorted values of a column, lists taken apart, nulls left out."""
        name, found = self.column(name), set()
        for row, value in enumerate(self.values(name)):
            for one in value if isinstance(value, list | tuple) else (value,):
                found.add(_hashable(name, row, one))
        return [value for _, value in sorted((key for key in found if key[1] is not None), key=_sorted_as)]

    def texts(self, name: str | None = None) -> Iterator[str]:
        """One text for every row: a column, or all the row's texts joined."""
        if name is not None:
            yield from ("" if value is None else str(value) for value in self.values(name))
            return
        for row in self.take(numpy.arange(len(self))):
            yield "\n".join(value for value in row.values() if isinstance(value, str))

    def nulls(self, name: str) -> int:
        """How many rows have no value in a column."""
        if isinstance(self.table, Sequence):
            return sum(row.get(name) is None for row in self.table)
        if name in self.classes:  # -1 stands for no class
            return sum(value is None for value in self.values(name))
        batches = self.table.select_columns([name]).with_format("arrow").iter(BLOCK)
        return sum(batch[name].null_count for batch in batches)

    def _scalars(self, name: str) -> Iterator[Any]:
        """The values of a column; from Arrow in large blocks where they are plain."""
        if isinstance(self.table, Sequence) or type(self.table.features[name]).__name__ not in (
            "Value",
            "ClassLabel",
        ):
            yield from self.values(name)
            return
        for batch in self.table.select_columns([name]).with_format("arrow").iter(64 * BLOCK):
            found = batch[name].to_pylist()
            yield from self._named(name, found) if name in self.classes else found

    def _named(self, name: str, value: Any) -> Any:
        """A value of a column of classes, or a list of them: names in place of numbers; -1, no class, is null."""
        if value is None:
            return None
        if isinstance(value, list):
            return [self._named(name, one) for one in value]
        names = self.classes[name]
        if value >= len(names):
            raise DataError(
                f"The column '{name}' holds the class {value}.",
                f"Its {len(names)} classes are 0 to {len(names) - 1}; -1 stands for none.",
                action="Mend the data.",
            )
        return names[value] if value >= 0 else None


@dataclass(frozen=True)
class Selection(Sequence[Row]):
    """Some rows of a table in a given order; each is read when it is looked at and nothing is kept."""

    source: Rows
    numbers: numpy.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Selection: ...
    def __getitem__(self, place: int | slice) -> Row | Selection:
        """One row, or a shorter selection."""
        if isinstance(place, slice):
            return Selection(self.source, self.numbers[place])
        return self.source.read([self.numbers[place]])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self.numbers), BLOCK):
            yield from self.source.read(self.numbers[start : start + BLOCK])


def load_rows(source: DataSettings | Dataset | Sequence[Row], seed: int = 0) -> Rows:
    """The rows that settings name, or rows in memory.

    Args:
        source: the data part of a recipe, a `datasets.Dataset`, or a list of mappings.
        seed: decides the sample where there is a limit, and the built-in documents.

    Raises:
        DataError: the data is missing, empty, malformed, or lacks a column.
    """
    if not isinstance(source, DataSettings):
        return Rows(_in_memory(source))
    if source.path is not None:
        _apart(source.evaluation.path, "data.path", source.path)
        rows = Rows(from_files(source.path, source.columns))
    elif source.name is None:
        raise ConfigError(
            "data has neither path nor name.",
            "Allowed: one of them, or rows given in Python.",
            action=f"Set data.path, or data.name={BUILT_IN}.",
        )
    else:
        rows = _built_in(source, seed) if source.built_in else Rows(_from_hub(source))
    return arrange(rows, source, seed)


def arrange(rows: Rows, settings: DataSettings, seed: int) -> Rows:
    """Apply to loaded rows what settings say about any data: columns, held-out rows, limit, counted nulls."""
    if settings.public is not None:
        _apart(settings.evaluation.path, "data.public.path", settings.public.path)
    rows = with_roles(rows, settings.columns)
    if settings.limit is not None:
        rows = _sampled(rows, settings.limit, seed)
    if settings.evaluation.path is not None:
        path = settings.evaluation.path
        held = with_roles(Rows(from_files(path, settings.columns)), settings.columns, path)
        rows = _joined(rows, held, path)
    elif settings.evaluation.column is not None:
        rows = _marked(rows, settings.evaluation.column, settings.evaluation.value)
    rows.notes += _null_notes(rows, settings.columns)
    return rows


# --- where rows come from ----------------------------------------------------------------------------------------


def _in_memory(source: Any) -> Dataset | Sequence[Row]:
    import datasets

    if isinstance(source, datasets.Dataset):
        table: Any = source.with_format(None)
    elif isinstance(source, Sequence) and not isinstance(source, str | bytes):
        wrong = next((row for row, value in enumerate(source) if not isinstance(value, Mapping)), None)
        if wrong is not None:
            raise DataError(
                f"Row {wrong + 1} of the data is a {type(source[wrong]).__name__}.",
                "A row is a mapping of columns.",
            )
        table = source
    else:
        raise DataError(
            f"The data is a {type(source).__name__}.",
            "Allowed: a datasets.Dataset, a list of mappings, or data settings.",
            action="Choose one split: data['train']." if isinstance(source, Mapping) else "",
        )
    if not len(table):
        raise DataError("The data has no rows.", "At least one row is needed.")
    return table


def _built_in(settings: DataSettings, seed: int) -> Rows:
    """The documents of all organisations; held-out ones come from a stream of their own."""
    from fedllm.data.organisations import documents, organisations

    keys = [one.key for one in organisations()]
    training = [row for key in keys for row in documents(key, settings.documents, seed)]
    held = [row for key in keys for row in documents(key, settings.held_out, derive(seed, BUILT_IN, "held out"))]
    return Rows(training + held, held_out=numpy.arange(len(training), len(training) + len(held)))


def from_files(path: str, columns: Mapping[str, str] | None = None) -> Dataset:
    """The table in a file, a folder or the files of a pattern, memory-mapped.

    Args:
        path: a file, a folder or a pattern.
        columns: role -> column of the file. In .csv and .tsv a column that a task reads as text stays as it is
            written (0042 is no number); other columns are numbers where all their values are.

    Raises:
        DataError: no such file, an empty or malformed one, or one of an unknown kind.
    """
    files = find_files(path)
    kind, separator = KINDS[_ending(files[0])], "\t" if _ending(files[0]) == ".tsv" else ","
    for file in files:
        _not_empty(file)
    # Without these two, pandas reads the words NA, None and null of a text as missing values.
    options: dict[str, Any] = {"sep": separator, "keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    if kind == "csv":
        options["converters"] = dict.fromkeys(_text_columns(columns or {}), _cell)
    try:
        with _quiet():
            if kind == "parquet":
                files = [_unpacked(file) for file in files]
            names = [glob.escape(str(file.resolve())) for file in files]
            table = _read(kind, names, options)
            table.data.validate(full=True)  # the JSON reader lets bytes through that are not UTF-8
    except Exception as fault:
        raise _unreadable(path, files, kind, fault) from fault
    if not len(table):
        raise DataError(f"{path} has no rows.", "At least one row is needed.")
    return table


def _read(kind: str, names: list[str], options: Mapping[str, Any]) -> Dataset:
    """Read files of a kind; the columns of a .csv file are numbers where all of their values are."""
    import datasets

    try:
        return datasets.load_dataset(kind, data_files=names, split="train", **options)
    except datasets.exceptions.DatasetGenerationError:
        if kind != "csv":
            raise
        # Types were guessed from the first 10,000 rows, and some later row is of another: look at all at once.
        return datasets.load_dataset(kind, data_files=names, split="train", chunksize=sys.maxsize, **options)


def find_files(path: str) -> list[Path]:
    """The files that a path, a folder or a pattern names, sorted; all of one kind.

    Raises:
        DataError: nothing there, or files of an unknown kind or of several kinds.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.is_file() and not _hidden(file.relative_to(place))]
        if (place / "dataset_info.json").is_file():
            raise DataError(
                f"{path} is a folder written by Dataset.save_to_disk.",
                action="Load it with datasets.load_from_disk and give the data set in Python, or export it to parquet.",
            )
        where = f"The folder {path}"
    elif place.is_file():
        found, where = [place], path
    else:
        found, where = (
            [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()],
            path,
        )
        if not found:
            raise _missing(path, place)
    known = [file for file in found if _ending(file) in KINDS]
    if not known:
        raise DataError(f"{where} holds no file of a known kind.", f"Allowed: {', '.join(KINDS)}, each also with .gz.")
    kinds = sorted({_ending(file) for file in known})
    if len({(KINDS[kind], kind == ".tsv") for kind in kinds}) > 1:
        raise DataError(
            f"{where} holds files of several kinds: {', '.join(kinds)}.",
            "One data set has files of one kind.",
            action=f"Write the pattern out, for example {path.rstrip('/')}/*{kinds[0]}.",
        )
    return sorted(known)


def _from_hub(settings: DataSettings) -> Dataset:
    import datasets

    name = str(settings.name)
    if Path(name).exists():
        raise DataError(
            f"data.name={name} is a file or folder here.", "A name is the id of a data set on the hub.",
            action=f"Set data.path={name} to read it.",
        )  # fmt: skip
    try:
        with _quiet():
            found = datasets.load_dataset(name, settings.config, revision=settings.revision, split=settings.split)
    except Exception as fault:
        raise _no_hub_data(name, fault) from fault
    if isinstance(found, Mapping):
        split = "train" if "train" in found else next(iter(found))
        if len(found) > 1 and split != "train":
            raise DataError(
                f"The data set '{name}' has no split 'train'.",
                f"Splits: {', '.join(sorted(found))}.",
                action=f"Set data.split, for example {split}.",
            )
        found = found[split]
    if not len(found):
        raise DataError(f"The split of '{name}' has no rows.", "At least one row is needed.")
    return found


def _apart(held_out: str | None, key: str, path: str) -> None:
    """Refuse a file that is both held out and read by another setting: it would be trained on."""
    if held_out is None:
        return
    held = {file.resolve() for file in find_files(held_out)}
    both = next((file for file in find_files(path) if file.resolve() in held), None)
    if both is not None:
        raise ConfigError(
            f"The file {both} belongs to both {key}={path} and data.evaluation.path={held_out}.",
            "Held-out rows may not be trained on.",
            action=f"Let {key} name the other files only, by a pattern or in a folder of their own.",
        )


def _text_columns(columns: Mapping[str, str]) -> list[str]:
    """The columns of a file that play a role of text."""
    others = {source for role, source in columns.items() if role not in TEXTS}
    return [source for source in dict.fromkeys(columns.get(role, role) for role in TEXTS) if source not in others]


def _cell(text: str) -> str | None:
    """A cell as it is written; an empty one is null."""
    return text or None


def _class_names(feature: Any) -> list[str] | None:
    """The names of a `datasets.ClassLabel`, or of one within lists; None for any other feature."""
    while not hasattr(feature, "names") and (inner := getattr(feature, "feature", None)) is not None:
        feature = inner
    return list(feature.names) if type(feature).__name__ == "ClassLabel" else None


# --- what settings say about any data ----------------------------------------------------------------------------


def with_roles(rows: Rows, columns: Mapping[str, str], where: str = "the data") -> Rows:
    """Rename columns to their roles; a column of the file that already has such a name is set aside, and noted."""
    for source in columns.values():
        if source not in rows.columns:
            raise no_column(source, rows.columns, where)
    renamed = {source: role for role, source in columns.items() if source != role}
    if not renamed:
        return rows
    aside = [role for role in renamed.values() if role in rows.columns and role not in renamed]
    notes = [f"The data's own column '{role}' is not used: it is read from '{columns[role]}'." for role in aside]
    if isinstance(rows.table, Sequence):
        keep = [name for name in rows.columns if name not in aside]
        table: Any = [{renamed.get(name, name): row[name] for name in keep if name in row} for row in rows.table]
    else:
        kept = rows.table.remove_columns(aside)
        table = kept.rename_columns({name: renamed.get(name, name) for name in kept.column_names})
    return Rows(table, [*rows.notes, *notes], rows.held_out, renamed)


def _sampled(rows: Rows, limit: int, seed: int) -> Rows:
    """At most `limit` training rows, in their old order; held-out rows that are already marked all stay."""
    training = rows.strata[0]
    if len(training) <= limit:
        return rows
    chosen = numpy.sort(numpy_stream(seed, "limit").permutation(training)[:limit])
    numbers = numpy.concatenate([chosen, rows.held_out])
    table: Any = rows.read(numbers) if isinstance(rows.table, Sequence) else rows.table.select(numbers)
    note = f"data.limit keeps {limit} of {len(training)} rows."
    held = numpy.arange(len(chosen), len(numbers))
    return Rows(table, [*rows.notes, note], held, rows.sources)


def _joined(rows: Rows, held: Rows, path: str) -> Rows:
    """One table of the training rows and then the held-out rows of another file."""
    import datasets

    if isinstance(rows.table, Sequence) or isinstance(held.table, Sequence):
        table: Any = [*_as_text(rows, held), *held.take(numpy.arange(len(held)))]
    else:
        try:
            with _quiet():
                table = datasets.concatenate_datasets([rows.table, held.table])
        except Exception as fault:
            raise DataError(
                f"The columns of data.evaluation.path={path} do not fit those of the training rows: {_first(fault)}.",
                "Columns of the same name need the same type.",
            ) from fault
    return Rows(table, rows.notes, numpy.arange(len(rows), len(rows) + len(held)), rows.sources)


def _as_text(rows: Rows, other: Rows) -> Iterator[Row]:
    """The rows, with text in place of numbers where the other table has text: 1 and '1' are one label."""
    features = {} if isinstance(other.table, Sequence) else other.table.features
    names = [name for name in TEXTS if str(getattr(features.get(name), "dtype", "")).endswith("string")]
    for row in rows.take(numpy.arange(len(rows))):
        numbers = [name for name in names if isinstance(row.get(name), int | float) and row[name] == row[name]]
        yield {**row, **{name: str(row[name]) for name in numbers}}


def _marked(rows: Rows, column: str, value: Any) -> Rows:
    """Hold out the rows whose column has this value; compared as text, so that 2016 finds '2016' too."""
    found = (each is not None and str(each) == str(value) for each in rows.values(column))
    held = numpy.flatnonzero(numpy.fromiter(found, bool, len(rows)))
    if not len(held):
        shown = [str(each) for each in rows.distinct(column)]
        raise DataError(
            f"No row has {column}={value}, so none is held out.",
            f"Values of '{column}': {', '.join(shown[:10])}{', ...' if len(shown) > 10 else ''}.",
            nearest(str(value), shown),
            "Set data.evaluation.value to one of them.",
        )
    if len(held) == len(rows):
        raise DataError(
            f"Every row has {column}={value}, so none is left for training.",
            action="Choose another data.evaluation.column or value.",
        )
    return Rows(rows.table, rows.notes, held, rows.sources)


def _null_notes(rows: Rows, columns: Mapping[str, str]) -> list[str]:
    """Nulls in the columns that tasks read, and dates that the JSON reader made of texts."""
    notes = []
    for name in dict.fromkeys((*columns, *(role for role in ROLES if role in rows.columns))):
        nulls = rows.nulls(name)
        if nulls == len(rows):
            raise DataError(
                f"The column '{name}' is null in all {nulls} rows.",
                action=f"Map another column to it with data.columns.{name}.",
            )
        if nulls:
            notes.append(f"The column '{name}' is null in {nulls} of {len(rows)} rows.")
        dtype = "" if isinstance(rows.table, Sequence) else str(getattr(rows.table.features[name], "dtype", ""))
        if dtype.startswith("timestamp"):
            notes.append(f"Every value of the column '{name}' looks like a date and was read as one, not as text.")
    return notes


# --- faults ------------------------------------------------------------------------------------------------------


def no_column(name: str, columns: Sequence[str], where: str = "the data") -> DataError:
    """The error for a column that is not there."""
    return DataError(
        f"There is no column '{name}' in {where}.",
        f"Columns: {', '.join(columns)}.",
        nearest(name, columns),
        "Name one of them, or map a role to it with data.columns.",
    )


def _missing(path: str, place: Path) -> DataError:
    if glob.has_magic(path):
        return DataError(f"No file matches {path}.", action="Check the pattern and the folder you run in.")
    parent = place.parent
    beside = sorted(child.name for child in parent.iterdir()) if parent.is_dir() else []
    return DataError(
        f"There is no file or folder {path}.",
        "" if parent.is_dir() else f"The folder {parent} does not exist either.",
        nearest(place.name, beside),
        "Check data.path and the folder you run in.",
    )


def _unreadable(path: str, files: Sequence[Path], kind: str, fault: Exception) -> FedLLMError:
    """Find the file and line at which reading failed, by reading again slowly."""
    if isinstance(fault, FedLLMError):
        return fault
    newest: dict[tuple[str, str], str] = {}
    for file in files:
        found = _first_fault(file, kind, newest)
        if found is not None:
            return DataError(found, action="Mend the file, or leave it out of data.path.")
    cause, hint = fault.__cause__ or fault, ""
    if newest:
        (column, form), place = list(newest.items())[-1]
        hint = f"The last new kind of value is in the column '{column}': {form} in {place}."
    return DataError(
        f"{path} cannot be read: {type(cause).__name__}: {_first(cause)}.",
        hint,
        action="Mend the file: every line needs the same columns, each of one type.",
    )


def _first_fault(file: Path, kind: str, newest: dict[tuple[str, str], str]) -> str | None:
    """What is wrong with a file, and in which line; None where it reads well by itself.

    Notes in `newest` where each column first holds each type, in the order in which they are met.
    """
    number = 0
    try:
        with _open(file) as stream:
            if kind == "parquet":
                return f"{file} is not a parquet file, or is cut short." if _broken_parquet(stream) else None
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if kind == "csv" or not text.strip():
                    continue
                if number == 1 and _one_document(file, text):
                    return _document_fault(file)
                row = json.loads(text)
                if not isinstance(row, dict):
                    return f"Line {number} of {file} holds no object: {text.strip()[:40]}"
                for name, value in row.items():
                    newest.setdefault((name, type(value).__name__), f"line {number} of {file}")
    except UnicodeDecodeError:
        return f"Line {number} of {file} is not UTF-8 text."
    except json.JSONDecodeError as fault:
        return f"Line {number} of {file} is not JSON: {fault.msg}, column {fault.colno}."
    except (EOFError, OSError) as fault:
        return f"{file} is damaged after line {number}: {fault}."
    return None


def _one_document(file: Path, first_line: str) -> bool:
    """Whether a .json file is one document over several lines and not one object a line."""
    if _ending(file) != ".json":
        return False
    try:
        return not isinstance(json.loads(first_line), dict)
    except json.JSONDecodeError:
        return True


def _document_fault(file: Path) -> str | None:
    with _open(file) as stream:
        try:
            json.loads(stream.read().decode("utf-8-sig"))
        except json.JSONDecodeError as fault:
            return f"Line {fault.lineno} of {file} is not JSON: {fault.msg}, column {fault.colno}."
    return None


def _broken_parquet(stream: IO[bytes]) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()))
    except pyarrow.ArrowException:
        return True
    return False


def _no_hub_data(name: str, fault: Exception) -> DataError:
    text = _first(fault)
    if isinstance(fault, ConnectionError) or "offline" in f"{type(fault).__name__} {text}".lower():
        return DataError(
            f"The data set '{name}' is not on this machine, and the hub cannot be reached ({text}).",
            action="Load it once while online (it is kept), or set data.path to files of your own.",
        )
    if type(fault).__name__ == "DatasetNotFoundError":
        return DataError(
            f"There is no data set '{name}' on the hub, or it is private.",
            nearest=nearest(name, [BUILT_IN]),
            action="Check data.name; for a private one run 'hf auth login' first.",
        )
    return DataError(
        f"The data set '{name}' cannot be loaded: {text}.",
        action="Check data.config, data.revision and data.split.",
    )


def _first(fault: BaseException) -> str:
    """The first line of an exception's text, without its full stop."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")


# --- files -------------------------------------------------------------------------------------------------------


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _ending(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _not_empty(file: Path) -> None:
    try:
        with _open(file) as stream:
            if stream.read(BLOCK).strip():
                return
    except PermissionError:
        raise DataError(f"{file} may not be read by you.", action="Change its permissions.") from None
    except (EOFError, OSError) as fault:
        raise DataError(f"{file} is damaged: {_first(fault)}.", action="Get or write the file again.") from fault
    raise DataError(f"{file} is empty.", "At least one row is needed.")


def _unpacked(file: Path) -> Path:
    """A parquet file that can be mapped: one with .gz is unpacked once, into the cache of `datasets`."""
    if not file.name.lower().endswith(".gz"):
        return file
    from datasets import config

    about = file.stat()
    mark = hashlib.sha256(f"{file.resolve()} {about.st_mtime_ns} {about.st_size}".encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE) / "downloads" / "extracted"
    target = folder / f"{mark}.parquet"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _open(file) as packed, tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            shutil.copyfileobj(packed, part)
        os.replace(part.name, target)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the log lines of `datasets`; faults come back as errors of our own."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    before, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()


def _hashable(name: str, row: int, value: Any) -> tuple[str, Any]:
    if isinstance(value, list | tuple | dict | set):
        raise DataError(
            f"The column '{name}' holds a {type(value).__name__} in row {row + 1}.",
            "A key or a label is a single value: a text, a number, true or false, a date.",
            action="Choose another column.",
        )
    return type(value).__name__, value


def _sorted_as(key: tuple[str, Any]) -> tuple[str, Any]:
    return key[0], key[1]

"""Groups - a flat data set of any size as groups (clients) on disk, streamed group after group.

Holding all clients in memory, or an index of every example, ends at some millions of rows. Here rows are grouped on
disk in bounded memory, and a run streams the groups with a shuffle buffer of positions, never of examples.

Source: Charles et al. 2023, arXiv:2307.09619. Deviations: one process and plain files instead of a Beam pipeline;
random and Dirichlet keys are functions of (seed, example), so a second run agrees; a size cap is counted.

A shard is a row of groups, each a header (:data:`HEADER`, then the key) and its examples, each a :data:`RECORD` and
JSON bytes; both carry a checksum, so a damaged example is never given.
`index.json` names the shards with their sizes; it holds nothing for each group or example.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import struct
import tempfile
import urllib.parse
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

import numpy

from fedllm.core.errors import ConfigError, DataError
from fedllm.core.seeds import numpy_stream, python_stream
from fedllm.data.load import Rows

Example = Mapping[str, Any]
FORMAT = "fedllm groups 1"
HEADER = struct.Struct("<4sIQQI")
"""Mark, bytes of the key, examples, bytes of all records, CRC-32 of what is before and of the key."""
MARK = b"grp1"
RECORD = struct.Struct("<II")
"""Bytes of an example, CRC-32 of its bytes that begins with their number."""
PAIR = struct.Struct("<II")
"""In a bucket: bytes of the key, bytes of the example."""
FAN_OUT = 64
"""Buckets that one pass writes at a time."""
MEMORY = 32 * 2**20
"""Bytes of examples that are sorted in memory at a time."""


# --- keys --------------------------------------------------------------------------------------------------------


class Key(ABC):
    """Which group an example belongs to: a pure function of the example and, for drawn keys, of its number or id."""

    @abstractmethod
    def of(self, example: Example, number: int) -> Any:
        """The group's key, a text; `number` counts the examples from 0."""


@dataclass(frozen=True)
class ByColumn(Key):
    """The value of a column."""

    column: str

    def of(self, example: Example, number: int) -> Any:
        """The value."""
        return example.get(self.column)


@dataclass(frozen=True)
class ByHost(Key):
    """The host (netloc) of the URL in a column."""

    column: str

    def of(self, example: Example, number: int) -> Any:
        """The host."""
        return urllib.parse.urlsplit(str(example.get(self.column) or "")).netloc


@dataclass(frozen=True)
class Randomly(Key):
    """One of `groups` groups, uniformly: a function of (seed, id of the example)."""

    groups: int
    seed: int
    id: str | None = None
    """Column that identifies an example; its number in the input where None."""

    def __post_init__(self) -> None:
        _check_groups(self.groups)

    def of(self, example: Example, number: int) -> Any:
        """The group drawn for this example."""
        return _group(_hash(self.seed, _identity(example, self.id, number)) * self.groups >> 64)


@dataclass(frozen=True)
class ByDirichlet(Key):
    """For every label a distribution over groups, drawn from (seed, label); the pick is a function of (seed, id)."""

    column: str
    groups: int
    alpha: float
    seed: int
    id: str | None = None
    """Column that identifies an example; its number in the input where None."""
    _upto: dict[tuple[str, str], numpy.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_groups(self.groups)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"alpha={self.alpha} cannot be drawn from.", "Allowed: numbers above 0, such as 0.5.")

    def of(self, example: Example, number: int) -> Any:
        """The group drawn for this example."""
        label = example.get(self.column)
        if label is None:
            return None
        name = (type(label).__name__, str(label))
        if name not in self._upto:
            stream = numpy_stream(self.seed, "dirichlet", *name)
            self._upto[name] = numpy.cumsum(stream.dirichlet(numpy.full(self.groups, self.alpha)))
        upto = self._upto[name]
        if not upto[-1] > 0:
            raise ConfigError(f"alpha={self.alpha} is too extreme to be drawn from.", "Usual values: 0.01 to 100.")
        pick = _hash(self.seed, _identity(example, self.id, number)) / 2**64 * upto[-1]
        return _group(min(int(numpy.searchsorted(upto, pick, side="right")), self.groups - 1))


def _check_groups(groups: int) -> None:
    if groups < 1:
        raise ConfigError(f"Examples cannot be drawn into {groups} groups.", "Allowed: 1 or more.")


def _identity(example: Example, column: str | None, number: int) -> Any:
    if column is None:
        return number
    if example.get(column) is None:
        raise DataError(f"Example {number + 1} has no '{column}' to identify it.", action="Choose another id column.")
    return example[column]


def _hash(seed: int, identity: Any) -> int:
    return int.from_bytes(blake2b(f"{seed}\x1f{identity}".encode(), digest_size=8).digest(), "little")


def _group(number: int) -> str:
    return f"group-{number:07d}"


# --- building ----------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """What :func:`build` wrote and what it left out.

    Attributes:
        groups: groups written.
        examples: examples written.
        bytes: JSON bytes written.
        capped: groups that met the cap.
        left_out: examples left out because of the cap.
        left_out_bytes: their JSON bytes.
        empty: groups not written because their first example alone is over the cap.
    """

    groups: int = 0
    examples: int = 0
    bytes: int = 0
    capped: int = 0
    left_out: int = 0
    left_out_bytes: int = 0
    empty: int = 0

    @property
    def warnings(self) -> list[str]:
        """What was left out, as a sentence."""
        if not self.capped:
            return []
        return [f"{self.left_out} examples of {self.capped} groups were left out: max_group_bytes was reached."]


def build(
    rows: Iterable[Example],
    key: str | Key | Callable[[Example], Any],
    out: str | Path,
    shards: int = 8,
    max_group_bytes: int | None = None,
    memory: int = MEMORY,
) -> Built:
    """Group `rows` by key into the new folder `out`; the folder appears when everything is written, or not at all.

    Args:
        rows: examples with text names and JSON values, read once; classes of a `datasets.Dataset` by their names.
        key: a column, a :class:`Key`, or a pure function from example to text.
        out: the folder to make.
        shards: files to spread the groups over.
        max_group_bytes: most JSON bytes of a group; later examples of it are left out and counted.
        memory: bytes of examples sorted at a time; about three times as much is used.

    Returns:
        what was written and left out. Examples of a group keep their order.

    Raises:
        DataError: `out` exists, there are no rows, a key is empty, or an example is not JSON; the disk is full.
    """
    out, find = Path(out), _finder(key)
    if hasattr(rows, "__getitems__") and (table := Rows(cast("Any", rows))).classes:
        rows = table.take(numpy.arange(len(table)))
    if shards < 1 or memory < 1 or (max_group_bytes is not None and max_group_bytes < 1):
        raise ConfigError(
            f"shards={shards}, memory={memory}, max_group_bytes={max_group_bytes} cannot be used.",
            "Allowed: 1 or more.",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already.", action="Remove it, or write to another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        built = _build(rows, find, work, shards, max_group_bytes, memory)
        work.chmod(0o755)
        os.replace(work, out)
    except OSError as fault:
        raise DataError(
            f"The groups cannot be written to {out}: {fault.strerror or fault}.",
            action="Free some disk space (twice the size of the data is needed), or write elsewhere.",
        ) from fault
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return built


def _build(
    rows: Iterable[Example],
    find: Callable[[Example, int], Any],
    work: Path,
    shards: int,
    most: int | None,
    memory: int,
) -> Built:
    names = [f"groups-{number:05d}.bin" for number in range(shards)]
    with ExitStack() as stack:
        files = [stack.enter_context((work / name).open("wb")) for name in names]
        writer = _Writer([_Shard(name, file) for name, file in zip(names, files, strict=True)], most)
        _group_by(_records(rows, find), work, 0, memory, writer)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    if not writer.built.groups:
        raise DataError(
            "Every group's first example is over max_group_bytes."
            if writer.built.empty
            else "There are no rows to group.",
            "At least one group is needed.",
        )
    about = {"format": FORMAT, **asdict(writer.built), "shards": [shard.about() for shard in writer.shards]}
    with (work / "index.json").open("w", encoding="utf-8") as listing:
        json.dump(about, listing, indent=1)
        listing.flush()
        os.fsync(listing.fileno())
    return writer.built


def _finder(key: str | Key | Callable[[Example], Any]) -> Callable[[Example, int], Any]:
    """(example, number) -> key, for each form a key may have."""
    if isinstance(key, str):
        return ByColumn(key).of
    if isinstance(key, Key):
        return key.of
    if callable(key):
        return lambda example, number: key(example)
    raise ConfigError(f"A {type(key).__name__} is no key.", "Allowed: a column, a Key, or a function of an example.")


def _records(rows: Iterable[Example], find: Callable[[Example, int], Any]) -> Iterator[tuple[bytes, bytes]]:
    """(key, JSON) of every example."""
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
    try:
        for number, example in enumerate(rows):
            yield _key_bytes(find(example, number), number), _body(example, number, dump)
    except OSError as fault:
        raise DataError(f"The rows to be grouped cannot be read: {fault}.") from fault


def _body(example: Example, number: int, dump: Callable[[Any], str]) -> bytes:
    if not all(isinstance(name, str) for name in example):
        raise DataError(f"Example {number + 1} has a column that is not named by a text.")
    try:
        return dump(example if isinstance(example, dict) else dict(example)).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError) as fault:
        raise DataError(
            f"Example {number + 1} cannot be written as JSON: {fault}.",
            "Allowed: texts, finite numbers, true, false, null, lists and mappings of them.",
        ) from fault


def _key_bytes(key: Any, number: int) -> bytes:
    if isinstance(key, bytes):
        try:
            key = key.decode()
        except UnicodeDecodeError:
            raise DataError(f"The key of example {number + 1} is not UTF-8: {key[:40]!r}.") from None
    if isinstance(key, int):
        key = str(key)
    if not isinstance(key, str) or not key.strip():
        raise DataError(
            f"The key of example {number + 1} is {key!r}.",
            "A key is a text, bytes or a whole number, and not empty.",
            action="Choose another key, or leave the example out.",
        )
    return key.encode("utf-8", "surrogatepass")


@dataclass
class _Bucket:
    """A file of records, and whether it holds more than one key."""

    path: Path
    file: IO[bytes]
    bytes: int = 0
    key: bytes | None = None
    mixed: bool = False

    def add(self, key: bytes, body: bytes) -> None:
        self.file.write(PAIR.pack(len(key), len(body)) + key + body)
        self.bytes += PAIR.size + len(key) + len(body)
        if self.key is None:
            self.key = key
        elif not self.mixed:
            self.mixed = key != self.key


def _group_by(records: Iterable[tuple[bytes, bytes]], work: Path, level: int, memory: int, writer: _Writer) -> None:
    """Split records into buckets by a hash of the key, then group each bucket; one too large is split again."""
    salt = level.to_bytes(2, "little")
    buckets: list[_Bucket] = []
    with ExitStack() as stack:
        for number in range(FAN_OUT):
            path = work / f"bucket-{level}-{number}"
            buckets.append(_Bucket(path, stack.enter_context(path.open("wb"))))
        for key, body in records:
            buckets[blake2b(key, digest_size=1, salt=salt).digest()[0] % FAN_OUT].add(key, body)
    for bucket in buckets:
        if bucket.mixed and bucket.bytes > memory:
            _group_by(_read_bucket(bucket.path), work, level + 1, memory, writer)
        elif bucket.mixed:
            _group_in_memory(bucket.path, writer)
        elif bucket.key is not None:
            writer.write(bucket.key, (body for _, body in _read_bucket(bucket.path)))
        bucket.path.unlink()


def _read_bucket(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with path.open("rb") as file:
        while head := file.read(PAIR.size):
            key, body = PAIR.unpack(head)
            yield file.read(key), file.read(body)


def _group_in_memory(path: Path, writer: _Writer) -> None:
    """Group one bucket by the places of its records; the records themselves stay one block of bytes."""
    block = path.read_bytes()
    places: dict[bytes, list[int]] = {}
    at = 0
    while at < len(block):
        key, body = PAIR.unpack_from(block, at)
        start = at + PAIR.size + key
        places.setdefault(block[at + PAIR.size : start], []).append(start)
        at = start + body
    for key, starts in places.items():
        sizes = (PAIR.unpack_from(block, start - len(key) - PAIR.size)[1] for start in starts)
        writer.write(key, (block[start : start + size] for start, size in zip(starts, sizes, strict=True)))


@dataclass
class _Shard:
    """One output file and what is in it."""

    name: str
    file: IO[bytes]
    groups: int = 0
    examples: int = 0

    def about(self) -> dict[str, Any]:
        size = Path(self.file.name).stat().st_size
        return {"file": self.name, "groups": self.groups, "examples": self.examples, "bytes": size}


class _Writer:
    """Writes groups to the shards; a group's shard is a function of its key."""

    def __init__(self, shards: list[_Shard], most: int | None) -> None:
        self.shards, self.most, self.built = shards, most, Built()

    def write(self, key: bytes, bodies: Iterable[bytes]) -> None:
        """Write one group, example after example; its header is filled in at the end."""
        shard = self.shards[int.from_bytes(blake2b(key, digest_size=8).digest(), "little") % len(self.shards)]
        start, built = shard.file.tell(), self.built
        shard.file.write(bytes(HEADER.size) + key)
        examples = size = total = left = left_bytes = 0
        for body in bodies:
            if left or (self.most is not None and size + len(body) > self.most):
                left, left_bytes = left + 1, left_bytes + len(body)
                continue
            shard.file.write(RECORD.pack(len(body), zlib.crc32(body, len(body))) + body)
            examples, size, total = examples + 1, size + len(body), total + RECORD.size + len(body)
        built.capped, built.left_out = built.capped + bool(left), built.left_out + left
        built.left_out_bytes += left_bytes
        shard.file.seek(start)
        if not examples:
            shard.file.truncate()
            built.empty += 1
            return
        shard.file.write(_header(key, examples, total))
        shard.file.seek(0, os.SEEK_END)
        shard.groups, shard.examples = shard.groups + 1, shard.examples + examples
        built.groups, built.examples, built.bytes = built.groups + 1, built.examples + examples, built.bytes + size


def _header(key: bytes, examples: int, size: int) -> bytes:
    fields = (MARK, len(key), examples, size)
    return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0) + key))


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One group on disk: it can be iterated again and again, and holds only its place.

    Attributes:
        key: the group's key.
        num_examples: its examples.
        path: its shard.
        start: where its first example begins, in bytes.
        size: bytes of its records.
    """

    key: str
    num_examples: int
    path: Path
    start: int
    size: int

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read example after example.

        Raises:
            DataError: the shard is damaged; an example is checked before it is given.
        """
        for body in self.bodies():
            yield json.loads(body.decode("utf-8", "surrogatepass"))

    def bodies(self) -> Iterator[bytes]:
        """The JSON bytes of every example."""
        left = self.size
        with _opened(self.path) as file:
            file.seek(self.start)
            for number in range(self.num_examples):
                head = file.read(RECORD.size)
                size, check = RECORD.unpack(head) if len(head) == RECORD.size else (left, 0)
                left -= RECORD.size + size
                body = file.read(size) if left >= 0 else b""
                if left < 0 or len(body) < size or zlib.crc32(body, size) != check:
                    raise _damaged(
                        self.path, f"example {number + 1} of the group '{self.key}' is not as it was written"
                    )
                yield body


@dataclass(frozen=True)
class GroupStatistics:
    """The size of one group.

    Attributes:
        key: the group's key.
        num_examples: its examples.
        num_bytes: their JSON bytes.
        num_words: space-separated words in their texts.
    """

    key: str
    num_examples: int
    num_bytes: int
    num_words: int


def index(folder: str | Path) -> dict[str, Any]:
    """The index of a folder of groups, after checking that every shard is there in its full length.

    Raises:
        DataError: no such folder, another format, or a shard that is missing or cut short.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no folder of groups: it has no index.json.", action="Make one with 'fedllm data build'."
        ) from None
    except (ValueError, OSError) as fault:
        raise _damaged(folder / "index.json", str(fault)) from fault
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{folder}/index.json is not of the format '{FORMAT}'.", action="Build the groups again.")
    for shard in found["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise _damaged(path, "it is missing")
        if path.stat().st_size != shard["bytes"]:
            raise _damaged(path, f"it has {path.stat().st_size} bytes and should have {shard['bytes']}")
    return found


def stats(folder: str | Path) -> Iterator[GroupStatistics]:
    """Statistics of every group, shard after shard; all examples are read once."""
    for group in _all(folder):
        size = words = 0
        for body in group.bodies():
            size += len(body)
            words += _words(json.loads(body.decode("utf-8", "surrogatepass")))
        yield GroupStatistics(group.key, group.num_examples, size, words)


def stream(
    folder: str | Path, seed: int | None = None, buffer: int = 1024, start: int = 0
) -> Iterator[tuple[str, Group]]:
    """Every group once, in an order that follows from the seed.

    Shards are taken in random order and read in turn, and the next group is drawn from a buffer of places. A buffer
    smaller than a run of alike groups leaves them near each other.

    Args:
        folder: written by :func:`build`.
        seed: the order; None for the order on disk.
        buffer: places in the shuffle buffer.
        start: groups to pass over, for going on where another stream ended.

    Returns:
        (key, group); a group is read when it is iterated.

    Raises:
        DataError: a shard is missing, cut short or damaged.
    """
    if buffer < 1 or start < 0:
        raise ConfigError(f"buffer={buffer}, start={start} cannot be used.", "Allowed: buffer >= 1, start >= 0.")
    index(folder)
    groups = _all(folder) if seed is None else _shuffled(folder, python_stream(seed, "groups"), buffer)
    return ((group.key, group) for group in itertools.islice(groups, start, None))


def _all(folder: str | Path) -> Iterator[Group]:
    folder = Path(folder)
    for shard in index(folder)["shards"]:
        yield from _scan(folder / shard["file"], shard["groups"])


def _shuffled(folder: str | Path, rng: random.Random, buffer: int) -> Iterator[Group]:
    folder = Path(folder)
    shards = sorted(index(folder)["shards"], key=lambda shard: shard["file"])
    rng.shuffle(shards)
    held: list[Group] = []
    for group in _in_turn([_scan(folder / shard["file"], shard["groups"]) for shard in shards]):
        if len(held) < buffer:
            held.append(group)
            continue
        place = rng.randrange(buffer)
        yield held[place]
        held[place] = group
    rng.shuffle(held)
    yield from held


def _in_turn(sources: list[Iterator[Group]]) -> Iterator[Group]:
    """One group of each source in turn until all are at their end."""
    while sources:
        left = []
        for source in sources:
            group = next(source, None)
            if group is not None:
                left.append(source)
                yield group
        sources = left


def _scan(path: Path, groups: int) -> Iterator[Group]:
    """The groups of one shard by their headers; examples are passed over."""
    with _opened(path) as file:
        for number in range(groups):
            head = file.read(HEADER.size)
            if len(head) < HEADER.size:
                raise _damaged(path, f"it ends after {number} of {groups} groups")
            mark, key_size, examples, size, _ = HEADER.unpack(head)
            key = file.read(key_size) if mark == MARK else b""
            if _header(key, examples, size) != head:
                raise _damaged(path, f"the header of group {number + 1} is not as it was written")
            yield Group(key.decode("utf-8", "surrogatepass"), examples, path, file.tell(), size)
            file.seek(size, os.SEEK_CUR)
        if file.read(1):
            raise _damaged(path, f"it holds more than the {groups} groups of the index")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as fault:
        raise _damaged(path, fault.strerror or str(fault)) from fault


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged: {why}.", action="Build the groups again, or copy the file again.")


def _words(value: Any) -> int:
    """Space-separated words in all texts of an example."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, Mapping):
        return sum(_words(one) for one in value.values())
    return sum(_words(one) for one in value) if isinstance(value, list) else 0


# --- cohorts -----------------------------------------------------------------------------------------------------


@dataclass
class CohortStream:
    """Cohorts of groups, each group once; iterate again for the same order.

    Attributes:
        folder: written by :func:`build`.
        size: groups in a cohort.
        seed: the order.
        drop_remainder: leave out a last cohort that is not full.
        buffer: places in the shuffle buffer.
        prepare: turns a group's examples into what is trained on; a group that it leaves empty is passed over.
        skipped: groups passed over in the last pass.
        remainder: groups left out at the end of the last pass.
    """

    folder: str | Path
    size: int
    seed: int | None = None
    drop_remainder: bool = True
    buffer: int = 1024
    prepare: Callable[[Iterable[Example]], Iterable[Any]] | None = None
    skipped: int = 0
    remainder: int = 0

    def __iter__(self) -> Iterator[list[tuple[str, Iterable[Any]]]]:
        self.skipped = self.remainder = 0
        cohort: list[tuple[str, Iterable[Any]]] = []
        for key, group in stream(self.folder, self.seed, self.buffer):
            examples: Iterable[Any] = group if self.prepare is None else Prepared(group, self.prepare)
            if self.prepare is not None and next(iter(examples), None) is None:
                self.skipped += 1
                continue
            cohort.append((key, examples))
            if len(cohort) == self.size:
                yield cohort
                cohort = []
        if cohort and self.drop_remainder:
            self.remainder = len(cohort)
        elif cohort:
            yield cohort


@dataclass(frozen=True)
class Prepared:
    """A group's examples after preparation; prepared anew whenever it is iterated."""

    group: Group
    prepare: Callable[[Iterable[Example]], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.prepare(self.group))


def cohorts(
    folder: str | Path,
    size: int,
    seed: int | None = None,
    drop_remainder: bool = True,
    buffer: int = 1024,
    prepare: Callable[[Iterable[Example]], Iterable[Any]] | None = None,
) -> CohortStream:
    """Cohorts of `size` groups; see :class:`CohortStream`.

    Raises:
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"A cohort of {size} groups cannot be asked.", "Allowed: 1 or more.")
    return CohortStream(folder, size, seed, drop_remainder, buffer, prepare)


@dataclass
class FixedBatches:
    """Exactly `batches` batches of exactly `size` examples, so that all clients of a cohort do the same steps.

    A small client's examples come round again, which gives them more weight; `repeats` says how often.

    Attributes:
        examples: can be iterated again.
        batches: number of batches.
        size: examples in a batch.
        repeats: after a pass, examples given / different examples given (1 where none came twice).
    """

    examples: Iterable[Any]
    batches: int
    size: int
    repeats: float | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        """Give all batches.

        Raises:
            DataError: there is no example.
        """
        wanted, different, batch = self.batches * self.size, 0, []
        for number, (first, example) in enumerate(itertools.islice(self._round_and_round(), wanted), start=1):
            different += first
            batch.append(example)
            if len(batch) == self.size:
                self.repeats = number / different
                yield batch
                batch = []

    def _round_and_round(self) -> Iterator[tuple[bool, Any]]:
        """(whether it comes for the first time, example), without end."""
        for lap in itertools.count():
            given = 0
            for example in self.examples:
                given += 1
                yield lap == 0, example
            if not given:
                raise DataError("A client has no example to make batches of.", "At least one is needed.")

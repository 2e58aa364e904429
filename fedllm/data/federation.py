"""Federation - whose data a run uses: clients, and each client's rows on demand.

A run asks for one client's rows at a time, so only index arrays are kept however many clients there are. What is held
out for measuring is drawn from (seed, client id), so it does not depend on the other clients.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy

from fedllm.core.errors import ConfigError, DataError, nearest
from fedllm.core.roster import SERVER
from fedllm.core.seeds import numpy_stream
from fedllm.data.load import Row, Rows, arrange, load_rows, with_roles
from fedllm.data.partition import client_id, partition
from fedllm.data.settings import DataSettings, EvaluationSplit, PartitionSettings

SPLITS = ("train", "eval")
LABELS = ("label", "tags")
"""Columns that hold labels, whatever the split into clients is."""
_LABELLED = ("dirichlet", "pathological", "shards")
"""Ways of splitting whose column is a label."""

Read = Callable[[str, str], Sequence[Row]]


class Federation:
    """Clients and their rows.

    Args:
        client_ids: ids of the clients.
        read: (client id, split) -> rows, read when they are looked at.
        size: (client id, split) -> number of rows; by default those that `read` gives are counted.
        names: client id -> a name for people; the id where absent.
        label_column: the column whose values are labels.
        labels: finds all values of that column; by default all rows are read.
        warnings: what a user should know about the data, one sentence each.

    Attributes:
        client_ids: sorted.
        names: client id -> a name for people.
        label_column: the column whose values are labels, or None.
        warnings: what a user should know about the data, one sentence each.

    Raises:
        DataError: there is no client.
    """

    def __init__(
        self,
        client_ids: Iterable[str],
        read: Read,
        size: Callable[[str, str], int] | None = None,
        names: Mapping[str, str] | None = None,
        label_column: str | None = None,
        labels: Callable[[], list[Any]] | None = None,
        warnings: Sequence[str] = (),
        public: Sequence[Row] = (),
    ) -> None:
        self.client_ids = sorted(client_ids)
        if not self.client_ids:
            raise DataError("The data has no clients.", "At least one client is needed.")
        if SERVER in self.client_ids:
            raise DataError(f"A client is called '{SERVER}'.", "That is the name of the server.", action="Rename it.")
        self._read, self._size, self._find_labels = read, size, labels
        self.names = {client: (names or {}).get(client, client) for client in self.client_ids}
        self.label_column, self.warnings = label_column, list(warnings)
        self.public = public

    @classmethod
    def build(cls, settings: DataSettings, seed: int, data: Any = None) -> Federation:
        """Load the data, split it into clients and hold rows out.

        Args:
            settings: the data part of a recipe.
            seed: the run's seed; `settings.partition.seed` goes before it.
            data: rows in memory (see :func:`~fedllm.data.load.load_rows`) in place of what path and name say.

        Raises:
            DataError: the data is missing, malformed, or cannot be split as the settings say.
        """
        seed = seed if settings.partition.seed is None else settings.partition.seed
        rows = load_rows(settings, seed) if data is None else arrange(load_rows(data), settings, seed)
        parts, dropped = partition(rows, settings.partition, seed, settings.key if data is None else None)
        evaluation = settings.evaluation
        if data is None and settings.built_in:  # its held-out rows are documents of their own, never a fraction
            evaluation = evaluation.model_copy(update={"fraction": 0.0})
        held = HeldOut(evaluation, settings.per_client, seed, rows.held_out)
        label = _label_column(rows.columns, settings, rows)
        return cls(
            parts,
            lambda client, split: rows.take(held.numbers(client, parts[client], split)),
            lambda client, split: held.size(parts[client], split),
            _names(settings) if data is None else None,
            label,
            (lambda: rows.distinct(label)) if label is not None else None,
            [*rows.notes, *dropped, *held.notes(parts)],
            _public(settings, seed),
        )

    @classmethod
    def of(
        cls,
        clients: Mapping[str, Mapping[str, Sequence[Row]]],
        names: Mapping[str, str] | None = None,
        public: Sequence[Row] = (),
    ) -> Federation:
        """Clients in memory: client id -> {"train": rows, "eval": rows}; either may be left out. `public`: for all."""
        for client, splits in clients.items():
            if not isinstance(splits, Mapping):
                raise ConfigError(
                    f"Client '{client}' is given as a {type(splits).__name__}.",
                    'Allowed: {"train": rows, "eval": rows}.',
                    action='Write {"train": rows} where all of them are for training.',
                )
            wrong = next((name for name in splits if name not in SPLITS), None)
            if wrong is not None:
                raise ConfigError.unknown(f"split (client '{client}')", wrong, SPLITS)
        idle = [client for client in sorted(clients) if not len(clients[client].get("train", ()))]
        first = next((row for splits in clients.values() for rows in splits.values() for row in rows[:1]), {})
        label = next((name for name in LABELS if name in first), None)
        return cls(
            clients,
            lambda client, split: clients[client].get(split, []),
            names=names,
            label_column=label,
            warnings=[f"{_count(idle)} no training rows: {_listed(idle)}."] if idle else [],
            public=public,
        )

    @classmethod
    def from_partitioner(
        cls,
        partitioner: Any,
        seed: int = 0,
        evaluation: EvaluationSplit | None = None,
        per_client: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Federation:
        """Clients from an object with `num_partitions` and `load_partition(number)`, as flwr-datasets has them.

        Args:
            partitioner: partition i becomes client i; it is loaded whenever its rows are asked for.
            seed: decides the held-out rows.
            evaluation: the fraction held out.
            per_client: most training rows of a client.
            columns: role -> column.

        Raises:
            DataError: not such an object, a partition without rows, or a missing column.
        """
        if not (hasattr(partitioner, "num_partitions") and callable(getattr(partitioner, "load_partition", None))):
            raise DataError(
                f"A {type(partitioner).__name__} is no partitioner.",
                "It needs the attribute num_partitions and the function load_partition(number).",
            )
        evaluation = evaluation or EvaluationSplit()
        if evaluation.marked:
            raise ConfigError(
                "The rows of a partitioner cannot be held out by a column or a path.", "Allowed: fraction."
            )
        held = HeldOut(evaluation, per_client, seed, numpy.zeros(0, numpy.int64))
        count = int(partitioner.num_partitions)
        source = {client_id(number, count): number for number in range(count)}

        def read(client: str, split: str) -> Sequence[Row]:
            rows = with_roles(load_rows(partitioner.load_partition(source[client])), columns or {})
            return rows.take(held.numbers(client, numpy.arange(len(rows)), split))

        first = next(iter(read(client_id(0, count), "train")), {}) if count else {}
        natural = getattr(partitioner, "partition_id_to_natural_id", None) or {}
        names = {client: str(natural[number]) for client, number in source.items() if number in natural}
        return cls(source, read, names=names, label_column=next((name for name in LABELS if name in first), None))

    def size(self, client_id: str, split: str = "train") -> int:
        """Rows of one client's split; the pseudo-client `server` holds the public rows for training."""
        if client_id == SERVER:
            return len(self.public) if split == "train" else 0
        self._check(client_id, split)
        return len(self._read(client_id, split)) if self._size is None else self._size(client_id, split)

    def rows(self, client_id: str, split: str = "train") -> Sequence[Row]:
        """One client's rows; each is read when it is looked at."""
        if client_id == SERVER:
            return self.public if split == "train" else ()
        self._check(client_id, split)
        return self._read(client_id, split)

    def pooled(self, split: str = "train") -> Sequence[Row]:
        """The rows of all clients, client after client in the order of `client_ids`."""
        return Chained([self.rows(client, split) for client in self.client_ids])

    def _check(self, client: str, split: str) -> None:
        if client not in self.names:
            near = nearest(client, self.client_ids)
            raise DataError(f"There is no client '{client}'.", f"Clients: {_listed(self.client_ids)}.", near)
        if split not in SPLITS:
            raise ConfigError.unknown("split", split, SPLITS)

    @functools.cached_property
    def labels(self) -> list[Any] | None:
        """The sorted values of the label column over all rows, the public ones too; None without such a column.

        A value that is a list is taken apart.
        """
        if self.label_column is None:
            return None
        found: set[Any] = set(self._find_labels() if self._find_labels is not None else ())
        rest = () if self._find_labels is not None else (self.pooled("train"), self.pooled("eval"))
        for row in itertools.chain(*rest, self.public):
            value = row.get(self.label_column)
            found.update(value if isinstance(value, list | tuple) else (value,))
        # A task knows labels by their text, so that 1 of rows in memory and '1' of a .csv file are one label.
        found -= {value for value in found if not isinstance(value, str) and str(value) in found}
        return sorted(found - {None}, key=lambda value: (type(value).__name__, value))


@dataclass(frozen=True)
class HeldOut:
    """Which rows of a client are for training and which for measuring.

    Attributes:
        evaluation: how rows are held out.
        per_client: most training rows of a client.
        seed: decides what is drawn.
        marked: sorted numbers of rows that are held out by what they are; empty where a fraction is drawn.
    """

    evaluation: EvaluationSplit
    per_client: int | None
    seed: int
    marked: numpy.ndarray

    def numbers(self, client: str, part: numpy.ndarray, split: str) -> numpy.ndarray:
        """The row numbers of one split of a client that holds `part`; sorted as `part` is."""
        training, held = self._cut(client, part)
        if split == "train":
            return self._at_most(training, self.per_client, client, "train")
        return self._at_most(held, self.evaluation.per_client, client, "eval")

    def size(self, part: numpy.ndarray, split: str) -> int:
        """How many rows :meth:`numbers` gives."""
        training, held = self._sizes(part)
        found, most = (training, self.per_client) if split == "train" else (held, self.evaluation.per_client)
        return found if most is None else min(found, most)

    def drawn(self, rows: int) -> int:
        """How many of a client's rows a fraction holds out; a single row is always for training."""
        if self.evaluation.fraction == 0 or rows < 2:
            return 0
        wanted = max(1, round(self.evaluation.fraction * rows))
        return min(wanted, rows - 1, self.evaluation.per_client or wanted)

    def notes(self, parts: Mapping[str, numpy.ndarray]) -> list[str]:
        """What this leaves out, one sentence each."""
        sizes = {client: self._sizes(part) for client, part in parts.items()}
        notes = []
        single = [client for client, (_, held) in sizes.items() if not held]
        if single and (self._is_marked or self.evaluation.fraction > 0):
            notes.append(f"{_count(single)} no held-out rows: {_listed(single)}.")
        for split, place, most in (
            ("training", 0, self.per_client),
            ("held-out", 1, self.evaluation.per_client),
        ):
            over = [size[place] - most for size in sizes.values() if most is not None and size[place] > most]
            if over:
                notes.append(f"{sum(over)} {split} rows of {len(over)} clients are not used: at most {most} each.")
        return notes

    @property
    def _is_marked(self) -> bool:
        return len(self.marked) > 0 or self.evaluation.marked

    def _sizes(self, part: numpy.ndarray) -> tuple[int, int]:
        held = int(self._mask(part).sum()) if self._is_marked else self.drawn(len(part))
        return len(part) - held, held

    def _cut(self, client: str, part: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        if self._is_marked:
            mask = self._mask(part)
        else:
            mask = numpy.zeros(len(part), bool)
            stream = numpy_stream(self.seed, "held out", client)
            mask[stream.permutation(len(part))[: self.drawn(len(part))]] = True
        return part[~mask], part[mask]

    def _mask(self, part: numpy.ndarray) -> numpy.ndarray:
        """Which rows of `part` are marked; both are sorted."""
        places = numpy.minimum(numpy.searchsorted(self.marked, part), max(len(self.marked) - 1, 0))
        return self.marked[places] == part if len(self.marked) else numpy.zeros(len(part), bool)

    def _at_most(self, numbers: numpy.ndarray, most: int | None, client: str, split: str) -> numpy.ndarray:
        if most is None or len(numbers) <= most:
            return numbers
        return numpy.sort(numpy_stream(self.seed, "per client", split, client).permutation(numbers)[:most])


class Chained(Sequence[Row]):
    """Several sequences of rows as one; nothing is read before it is looked at."""

    def __init__(self, pieces: Sequence[Sequence[Row]]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._ends = list(itertools.accumulate(len(piece) for piece in self._pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        """One row, or a list of rows."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        piece = bisect.bisect_right(self._ends, at)
        return self._pieces[piece][at - (self._ends[piece - 1] if piece else 0)]

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self._pieces)


def _public(settings: DataSettings, seed: int) -> Sequence[Row]:
    """The public rows that the settings name."""
    public = settings.public
    if public is None:
        return ()
    one = PartitionSettings(by="iid", clients=1)
    where = DataSettings(path=public.path, columns=public.columns, limit=public.limit, partition=one)
    rows = load_rows(where, seed)
    return rows.take(numpy.arange(len(rows)))


def _label_column(columns: Sequence[str], settings: DataSettings, rows: Rows) -> str | None:
    found = next((name for name in LABELS if name in columns), None)
    if found is None and settings.partition.by in _LABELLED:
        return rows.column(str(settings.partition.column))
    return found


def _names(settings: DataSettings) -> dict[str, str]:
    """Names of the organisations where they are the clients."""
    if not settings.built_in or settings.partition.by != "natural":
        return {}
    from fedllm.data.organisations import organisations

    return {one.key: one.name for one in organisations()} if settings.key == "organisation" else {}


def _count(clients: Sequence[str]) -> str:
    return "1 client has" if len(clients) == 1 else f"{len(clients)} clients have"


def _listed(clients: Sequence[str]) -> str:
    return ", ".join(clients[:5]) + (", ..." if len(clients) > 5 else "")

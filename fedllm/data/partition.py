"""Partition - which client holds which row.

Real federations differ in size, in labels and in topics, and every method must be tried under each kind of skew. A
partition is a function of the seed and the rows alone: what is drawn for a label depends on that label, what is drawn
for a row on that row, so processes and the order of labels cannot change it.

Sources: Dirichlet over labels, Hsu et al. 2019 (arXiv:1909.06335), drawn per label as in Charles et al. 2023
(arXiv:2307.09619); shards, McMahan et al. 2017 (arXiv:1602.05629), section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.core.seeds import derive, numpy_stream
from fedllm.data.settings import PartitionSettings

if TYPE_CHECKING:
    from collections.abc import Callable

TRIES = 20
"""Draws before a partition with too small clients is given up."""


class RowsView(Protocol):
    """What a partitioner sees of a table."""

    @property
    def strata(self) -> Sequence[numpy.ndarray]:
        """Row numbers of the training rows and, where rows are marked, of the held-out rows."""
        ...

    def __len__(self) -> int:
        """Rows, the marked ones included."""
        ...

    def codes(self, name: str) -> tuple[numpy.ndarray, list[Any]]:
        """A column as numbers, shape [rows], and its distinct values, sorted."""
        ...

    def texts(self, name: str | None = None) -> Iterator[str]:
        """One text for every row."""
        ...


class Partitioner(Protocol):
    """Gives every row to exactly one client."""

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Client id -> its sorted row numbers; a client may have none."""
        ...


def client_id(number: int, count: int) -> str:
    """The id of client `number` (from 0) of `count`: client-001 to client-100."""
    return f"client-{number + 1:0{len(str(count))}d}"


# --- the ways of splitting ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IID:
    """Equal parts of a random order; sizes differ by one at most."""

    clients: int
    seed: int

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Deal the training rows, then the held-out rows."""
        owner = numpy.empty(len(rows), numpy.int64)
        for place, stratum in enumerate(rows.strata):
            order = numpy_stream(self.seed, "iid", place).permutation(stratum)
            owner[order] = numpy.arange(len(order)) * self.clients // max(len(order), 1)
        return _parts(owner, self.clients)


@dataclass(frozen=True)
class Natural:
    """One client for every value of a column; its id is the value."""

    column: str

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Split by the values of the column."""
        codes, values = rows.codes(self.column)
        ids = [str(value) for value in values]
        twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
        if twice is not None:
            raise DataError(
                f"The column '{self.column}' holds '{twice}' both as a text and as another type.",
                "Clients are named by their values, so each must be one type.",
            )
        return dict(zip(ids, _members(codes, len(ids)), strict=True))


@dataclass(frozen=True)
class Grouped:
    """The values of a column, in random order, dealt to clients; rows of one value stay together."""

    column: str
    clients: int
    seed: int

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Split by the client of each value."""
        codes, values = rows.codes(self.column)
        if len(values) < self.clients:
            raise _too_few(f"{len(values)} values of '{self.column}'", self.clients)
        client = numpy.empty(len(values), numpy.int64)
        client[numpy_stream(self.seed, "grouped").permutation(len(values))] = numpy.arange(len(values)) % self.clients
        return _parts(client[codes], self.clients)


@dataclass(frozen=True)
class Dirichlet:
    """For every label a distribution over clients, drawn from Dir(alpha); every row picks its client from it.

    The distribution is a function of (seed, label) and the pick one of (seed, row number).
    """

    column: str
    clients: int
    alpha: float
    seed: int

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Let every row pick its client."""
        codes, values = rows.codes(self.column)
        picks = numpy_stream(self.seed, "dirichlet", "row").random(len(rows))  # number i depends on (seed, i) alone
        owner = numpy.empty(len(rows), numpy.int64)
        for value, members in zip(values, _members(codes, len(values)), strict=True):
            stream = numpy_stream(self.seed, "dirichlet", type(value).__name__, str(value))
            upto = numpy.cumsum(shares(stream, self.alpha, self.clients))
            owner[members] = numpy.searchsorted(upto, picks[members] * upto[-1], side="right")
        return _parts(numpy.minimum(owner, self.clients - 1), self.clients)


@dataclass(frozen=True)
class Pathological:
    """Every client holds rows of at most `classes_per_client` labels; all labels are held about equally often."""

    column: str
    clients: int
    classes_per_client: int
    seed: int

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Choose the labels of every client, then deal the rows of every label to its clients."""
        codes, values = rows.codes(self.column)
        holders = self._holders(len(values))
        owner = numpy.empty(len(rows), numpy.int64)
        for label, members in enumerate(_members(codes, len(values))):
            order = numpy_stream(self.seed, "pathological", "rows", label).permutation(members)
            owner[order] = numpy.asarray(holders[label])[numpy.arange(len(order)) * len(holders[label]) // len(order)]
        return _parts(owner, self.clients)

    def _holders(self, labels: int) -> list[list[int]]:
        """The clients of every label: each client takes the labels that fewest have taken, ties by lot."""
        each = self.classes_per_client
        if each > labels or each * self.clients < labels:
            raise DataError(
                f"{self.clients} clients of {each} classes cannot share out {labels} values of '{self.column}'.",
                f"Allowed classes_per_client: {-(-labels // self.clients)} to {labels}.",
                action="Change data.partition.classes_per_client or clients.",
            )
        stream, holders = numpy_stream(self.seed, "pathological", "labels"), [[] for _ in range(labels)]
        for client in stream.permutation(self.clients):
            taken = numpy.array([len(held) for held in holders])
            for label in numpy.lexsort((stream.random(labels), taken))[:each]:
                holders[label].append(int(client))
        return holders


@dataclass(frozen=True)
class Shards:
    """Rows sorted by label, cut into equal shards, `shards_per_client` of them dealt to every client."""

    column: str
    clients: int
    shards_per_client: int
    seed: int

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Cut and deal the training rows, then the held-out rows in the same way."""
        codes, _ = rows.codes(self.column)
        count = self.clients * self.shards_per_client
        client = numpy_stream(self.seed, "shards", "deal").permutation(count) % self.clients
        owner = numpy.empty(len(rows), numpy.int64)
        for place, stratum in enumerate(rows.strata):
            mixed = numpy_stream(self.seed, "shards", "rows", place).permutation(stratum)
            order = mixed[numpy.argsort(codes[mixed], kind="stable")]
            owner[order] = client[numpy.arange(len(order)) * count // max(len(order), 1)]
        return _parts(owner, self.clients)


@dataclass(frozen=True)
class Quantity:
    """Unequal sizes: every client gets `min_size` rows, the others are shared by one draw from Dir(alpha)."""

    clients: int
    alpha: float
    seed: int
    min_size: int = 1

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Cut a random order of the training rows, then of the held-out rows, in these shares."""
        share = shares(numpy_stream(self.seed, "quantity", "sizes"), self.alpha, self.clients)
        owner = numpy.empty(len(rows), numpy.int64)
        for place, stratum in enumerate(rows.strata):
            least = self.min_size if place == 0 else 0
            if len(stratum) < least * self.clients:
                raise _too_few(f"{len(stratum)} rows", self.clients, least)
            sizes = least + whole(share, len(stratum) - least * self.clients)
            order = numpy_stream(self.seed, "quantity", "rows", place).permutation(stratum)
            owner[order] = numpy.repeat(numpy.arange(self.clients), sizes)
        return _parts(owner, self.clients)


@dataclass(frozen=True)
class Clusters:
    """Alike texts at one client: k-means over text vectors (all vectors are in memory, 64 or the encoder's width)."""

    clients: int
    seed: int
    column: str | None = None
    encoder: str | None = None

    def assign(self, rows: RowsView) -> dict[str, numpy.ndarray]:
        """Embed and cluster the rows; one thread, so that sums have one order."""
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        seed = derive(self.seed, "clusters") % 2**32
        texts = list(rows.texts(self.column))
        if len(set(texts)) < self.clients:
            raise _too_few(f"{len(set(texts))} different texts", self.clients)
        with threadpool_limits(1):
            owner = KMeans(self.clients, n_init=4, random_state=seed).fit_predict(self._vectors(texts, seed))
        return _parts(owner.astype(numpy.int64), self.clients)

    def _vectors(self, texts: list[str], seed: int) -> numpy.ndarray:
        """One vector of length 1 for every text."""
        from sklearn.preprocessing import normalize

        vectors = encoded(texts, self.encoder) if self.encoder else _tfidf(texts, seed)
        return normalize(vectors.astype(numpy.float32))


# --- from settings to parts --------------------------------------------------------------------------------------


def partitioner(settings: PartitionSettings, seed: int, column: str | None = None) -> Partitioner:
    """The partitioner that settings name; `column` stands in where they name none."""
    column, clients, alpha = settings.column or column, settings.clients or 0, settings.alpha or 0.0
    if column is None and settings.by == "natural":
        raise ConfigError("data.partition.by=natural needs 'column'.", action="Set data.partition.column.")
    key = str(column)
    ways: dict[str, Callable[[], Partitioner]] = {
        "iid": lambda: IID(clients, seed),
        "natural": lambda: Natural(key),
        "grouped": lambda: Grouped(key, clients, seed),
        "dirichlet": lambda: Dirichlet(key, clients, alpha, seed),
        "pathological": lambda: Pathological(key, clients, settings.classes_per_client or 0, seed),
        "shards": lambda: Shards(key, clients, settings.shards_per_client or 0, seed),
        "quantity": lambda: Quantity(clients, alpha, seed, settings.min_size),
        "clusters": lambda: Clusters(clients, seed, settings.column, settings.encoder),
    }
    return ways[settings.by]()


def partition(
    rows: RowsView, settings: PartitionSettings, seed: int, column: str | None = None
) -> tuple[dict[str, numpy.ndarray], list[str]]:
    """Split rows into clients and deal with those that are too small.

    Args:
        rows: the table; a client's size counts its training rows only.
        settings: how to split and what to do with small clients.
        seed: decides everything that is drawn.
        column: the key where the settings name none.

    Returns:
        client id -> sorted row numbers, and what was left out, one sentence each.

    Raises:
        DataError: clients stay too small, or the rows cannot be split like this.
    """
    way = partitioner(settings, seed, column)
    training = rows.strata[0]
    least = (settings.clients or 0) * settings.min_size
    if len(training) < least and settings.empty != "drop":
        raise _too_few(f"{len(training)} rows", settings.clients or 0, settings.min_size)
    counts = numpy.zeros(len(rows), numpy.int64)
    counts[training] = 1

    def too_small(parts: dict[str, numpy.ndarray]) -> dict[str, None]:
        return {client: None for client, part in parts.items() if counts[part].sum() < settings.min_size}

    parts = way.assign(rows)
    small = too_small(parts)
    for attempt in range(1, TRIES):
        if not small or settings.empty != "redraw" or settings.by == "natural":
            break
        parts = partitioner(settings, derive(seed, "redraw", attempt), column).assign(rows)
        small = too_small(parts)
    if not small:
        return parts, []
    if settings.empty == "drop" and len(small) < len(parts):
        kept = {client: part for client, part in parts.items() if client not in small}
        lost = len(rows) - sum(len(part) for part in kept.values())
        note = (
            f"Dropped for having fewer than {settings.min_size} training rows: "
            f"{len(small)} of {len(parts)} clients, {lost} of {len(rows)} rows."
        )
        return kept, [note]
    raise _still_small(settings, list(small), len(parts))


def shares(stream: numpy.random.Generator, alpha: float, clients: int) -> numpy.ndarray:
    """One draw from Dir(alpha, ..., alpha), shape [clients].

    Raises:
        ConfigError: alpha is so small that the draw is not a number.
    """
    drawn = stream.dirichlet(numpy.full(clients, alpha))
    if not numpy.isfinite(drawn).all() or not drawn.sum() > 0:
        raise ConfigError(
            f"data.partition.alpha={alpha} is too extreme to be drawn from.", "Usual values: 0.01 to 100."
        )
    return drawn


def whole(share: numpy.ndarray, total: int) -> numpy.ndarray:
    """Whole numbers in these shares that sum to `total` exactly (largest remainders)."""
    exact = share / share.sum() * total
    sizes = numpy.floor(exact).astype(numpy.int64)
    missing = total - int(sizes.sum())
    sizes[numpy.argsort(sizes - exact, kind="stable")[:missing]] += 1
    return sizes


def _parts(owner: numpy.ndarray, clients: int) -> dict[str, numpy.ndarray]:
    return {client_id(number, clients): part for number, part in enumerate(_members(owner, clients))}


def _members(codes: numpy.ndarray, count: int) -> list[numpy.ndarray]:
    """For every code below `count` the sorted positions that have it; all are views of one array."""
    order = numpy.argsort(codes, kind="stable")
    bounds = numpy.searchsorted(codes[order], numpy.arange(count + 1))
    return [order[start:end] for start, end in itertools.pairwise(bounds)]


def _too_few(what: str, clients: int, each: int = 1) -> DataError:
    return DataError(
        f"{what} cannot be split into {clients} clients.",
        f"Every client needs at least {each}.",
        action="Set data.partition.clients lower" + (", or min_size." if each > 1 else "."),
    )


def _still_small(settings: PartitionSettings, small: Sequence[str], count: int) -> DataError:
    how = f" after {TRIES} draws" if settings.empty == "redraw" and settings.by != "natural" else ""
    advice = "Set data.partition.empty=drop, or a lower min_size"
    if settings.clients is not None:
        advice += ", fewer clients" + (" or a larger alpha" if settings.alpha is not None else "")
    return DataError(
        f"{len(small)} of {count} clients have fewer than {settings.min_size} training rows{how}: "
        f"{', '.join(small[:5])}{', ...' if len(small) > 5 else ''}.",
        "A split by key cannot be drawn again." if settings.by == "natural" else "",
        action=f"{advice}." if len(small) < count else "Set a lower data.partition.min_size.",
    )


# --- text vectors ------------------------------------------------------------------------------------------------


def _tfidf(texts: Sequence[str], seed: int, width: int = 64) -> numpy.ndarray:
    """TF-IDF weights, reduced to at most `width` numbers by a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        weights = TfidfVectorizer(max_features=20_000, sublinear_tf=True).fit_transform(texts)
    except ValueError:
        raise DataError("The texts to be clustered hold no words.", action="Set data.partition.column.") from None
    if min(weights.shape) <= width:
        return weights.toarray()
    return TruncatedSVD(width, random_state=seed).fit_transform(weights)


def encoded(texts: Sequence[str], encoder: str, batch: int = 32) -> numpy.ndarray:
    """Mean last hidden states over the real tokens, shape [texts, hidden size].

    Raises:
        ModelError: the encoder cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    except (OSError, ValueError) as fault:
        raise ModelError(
            f"data.partition.encoder={encoder} cannot be loaded: {str(fault).splitlines()[0]}",
            "A folder with config.json and weights, or the id of a model on the hub.",
            action="Leave encoder out to cluster by TF-IDF.",
        ) from fault
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            inputs = tokenizer(
                list(texts[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = inputs["attention_mask"].unsqueeze(-1)
            hidden = model(**inputs).last_hidden_state
            found.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).numpy())
    return numpy.concatenate(found)

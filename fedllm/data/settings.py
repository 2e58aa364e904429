"""Data settings - whose data a run uses: where it lies, how it is split into clients, what is held out.

This is the `data` part of a recipe. Nothing heavy is imported here, so that the command line can read and describe
a recipe quickly. What needs the data itself (a missing column, too few rows) is checked when it is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedllm.core.errors import ConfigError

BUILT_IN = "organisations"
"""The name of the built-in data set: seeded documents of eight organisations."""

By = Literal["iid", "natural", "grouped", "dirichlet", "pathological", "shards", "quantity", "clusters"]

NEEDS: dict[str, tuple[str, ...]] = {
    "iid": ("clients",),
    "natural": ("column",),
    "grouped": ("column", "clients"),
    "dirichlet": ("column", "clients", "alpha"),
    "pathological": ("column", "clients", "classes_per_client"),
    "shards": ("column", "clients", "shards_per_client"),
    "quantity": ("clients", "alpha"),
    "clusters": ("clients",),
}
"""The options each way of splitting needs."""
MAY = {"clusters": ("column", "encoder")}
"""Options that a way of splitting may have besides."""
_EXAMPLE = {"clients": 8, "alpha": 0.5, "classes_per_client": 2, "shards_per_client": 2, "column": "label"}
_OWN = ("column", "clients", "alpha", "classes_per_client", "shards_per_client", "encoder")


class _Part(BaseModel):
    """What all parts of the data settings share: they cannot be changed and know every key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PartitionSettings(_Part):
    """How rows become clients."""

    by: By = "natural"
    """iid (equal parts), natural (one client per value of `column`), grouped (values of `column` dealt to `clients`),
    dirichlet (skewed by `column`, `alpha`), pathological (`classes_per_client` values of `column` each), shards
    (sorted by `column`, cut, `shards_per_client` each), quantity (unequal sizes, `alpha`), clusters (alike texts)."""
    column: str | None = None
    """The key, or the label; for clusters the text (all texts of a row where null)."""
    clients: int | None = Field(None, ge=1)
    """Number of clients; natural finds it in the data."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Concentration of the Dirichlet distribution: 0.1 is very uneven, 100 almost even."""
    classes_per_client: int | None = Field(None, ge=1)
    """Different labels at one client."""
    shards_per_client: int | None = Field(None, ge=1)
    """Shards dealt to one client."""
    min_size: int = Field(1, ge=1)
    """Fewest rows of a client, before a fraction of them is held out."""
    empty: Literal["redraw", "drop", "error"] = "redraw"
    """When a client gets fewer than `min_size` rows: draw again (20 tries, then an error), drop it, or an error."""
    encoder: str | None = None
    """Model folder or hub id whose mean hidden states are clustered; TF-IDF with SVD where null."""
    seed: int | None = Field(None, ge=0)
    """Seed of everything drawn about the data (sample, partition, held-out rows); the run's seed where null."""

    @model_validator(mode="after")
    def _options_fit(self) -> PartitionSettings:
        """Every option that `by` needs is given, and no other."""
        needs = NEEDS[self.by]
        for name in needs:
            if getattr(self, name) is None and (self.by, name) != ("natural", "column"):
                raise ConfigError(
                    f"data.partition.by={self.by} needs '{name}'.",
                    f"It needs: {', '.join(needs)}.",
                    action=f"Set data.partition.{name}, for example {_EXAMPLE[name]}.",
                )
        for name in _OWN:
            if getattr(self, name) is not None and name not in (*needs, *MAY.get(self.by, ())):
                raise ConfigError(
                    f"data.partition.{name}={getattr(self, name)} means nothing with by={self.by}.",
                    f"Options of {self.by}: {', '.join((*needs, *MAY.get(self.by, ())))}.",
                    action=f"Set data.partition.{name}=null, or choose another by.",
                )
        return self


class EvaluationSplit(_Part):
    """Which rows of a client are held out for measuring."""

    fraction: float = Field(0.1, ge=0, lt=1)
    """Share of each client's rows, at least one where it has two; not used where `column` or `path` is given."""
    column: str | None = None
    """Hold out the rows whose `column` equals `value`."""
    value: str | int | float | bool | None = None
    """The value of `column` that marks a held-out row."""
    path: str | None = None
    """Hold out the rows of another file, split into clients in the same way."""
    per_client: int | None = Field(None, ge=1)
    """Most held-out rows of one client (seeded choice); a fraction leaves the others for training."""

    @model_validator(mode="after")
    def _one_way(self) -> EvaluationSplit:
        """The held-out rows are named in one way only."""
        if (self.column is None) != (self.value is None):
            given = "column" if self.value is None else "value"
            raise ConfigError(
                f"data.evaluation.{given} is given alone.",
                "Column and value belong together.",
                action="Set both, for example column=split and value=test.",
            )
        ways = [name for name in ("column", "path") if getattr(self, name) is not None]
        if self.fraction != EvaluationSplit.model_fields["fraction"].default and ways:
            ways.append("fraction")
        if len(ways) > 1:
            raise ConfigError(
                f"data.evaluation names held-out rows by {' and by '.join(ways)}.",
                "Allowed: one of fraction, column with value, path.",
                action=f"Keep one of them; leave {ways[1]} out.",
            )
        return self

    @property
    def marked(self) -> bool:
        """Whether rows are held out by what they are, and not drawn."""
        return self.column is not None or self.path is not None


class PublicData(_Part):
    """Rows that anybody may read: the same at every client and at the server."""

    path: str
    """A file, a folder or a pattern, as for `data.path`."""
    columns: dict[str, str] = {}
    """Role: column of the public rows."""
    limit: int | None = Field(None, ge=1)
    """Most public rows (seeded choice)."""


class DataSettings(_Part):
    """Whose data a run uses."""

    path: str | None = None
    """A file, a folder or a pattern with *: .jsonl, .json, .csv, .tsv or .parquet, each also with .gz."""
    name: str | None = BUILT_IN
    """`organisations` (built in), or the id of a data set on the Hugging Face hub; null where `path` is given, or
    where rows are given in Python."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. A commit makes a run repeatable."""
    split: str | None = None
    """Split of a hub data set; train, or the only one, where null."""
    columns: dict[str, str] = {}
    """Role: column of the data, for example {instruction: question, response: answer}."""
    limit: int | None = Field(None, ge=1)
    """Most rows in all (seeded choice)."""
    per_client: int | None = Field(None, ge=1)
    """Most training rows of one client (seeded choice)."""
    documents: int = Field(48, ge=1)
    """Training documents of each built-in organisation."""
    held_out: int = Field(24, ge=0)
    """Held-out documents of each built-in organisation; the same whatever `documents` is."""
    evaluation: EvaluationSplit = EvaluationSplit()
    """What is held out of any other data."""
    partition: PartitionSettings = PartitionSettings()
    """How rows become clients."""
    public: PublicData | None = None
    """Public rows, for methods that need some; null for none."""

    @model_validator(mode="before")
    @classmethod
    def _path_replaces_name(cls, values: Any) -> Any:
        """A path stands in place of the default name, not beside it."""
        if isinstance(values, dict) and values.get("path") is not None and "name" not in values:
            return {**values, "name": None}
        return values

    @model_validator(mode="after")
    def _source_fits(self) -> DataSettings:
        """One source, and only options that this source has."""
        if self.path is not None and self.name is not None:
            raise ConfigError(
                f"data has both path={self.path} and name={self.name}.",
                "Allowed: one of them.",
                action="Set data.name=null to read the path.",
            )
        source = f"path={self.path}" if self.path is not None else f"name={self.name or 'null'}"
        if self.name is None or self.built_in:
            self._refuse(("config", "revision", "split"), source, "data sets of the hub")
        if self.built_in:
            if self.evaluation.marked or self.evaluation.fraction != EvaluationSplit().fraction:
                raise ConfigError(
                    "data.evaluation cannot choose held-out documents of the organisations.",
                    "Their number is data.held_out.",
                    action="Set data.held_out and leave data.evaluation out (per_client is allowed).",
                )
        else:
            self._refuse(("documents", "held_out"), source, f"name={BUILT_IN}")
            self._natural_has_column()
        self._columns_once()
        return self

    @property
    def built_in(self) -> bool:
        """Whether these are the built-in organisations."""
        return self.name == BUILT_IN

    @property
    def key(self) -> str | None:
        """The partition's column; a natural split of the organisations needs none to be named."""
        natural = self.built_in and self.partition.by == "natural"
        return self.partition.column or ("organisation" if natural else None)

    def _refuse(self, names: tuple[str, ...], source: str, belongs: str) -> None:
        for name in names:
            if getattr(self, name) != DataSettings.model_fields[name].default:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)} means nothing with {source}.",
                    f"It belongs to {belongs}.",
                    action=f"Leave data.{name} out.",
                )

    def _natural_has_column(self) -> None:
        if self.partition.by == "natural" and self.partition.column is None:
            raise ConfigError(
                "data.partition.by=natural needs 'column', whose values are the clients.",
                f"Other ways: {', '.join(by for by in NEEDS if by != 'natural')}.",
                action="Set data.partition.column, or data.partition.by=iid with data.partition.clients=8.",
            )

    def _columns_once(self) -> None:
        sources = list(self.columns.values())
        twice = next((source for source in sources if sources.count(source) > 1), None)
        if twice is not None:
            roles = [role for role, source in self.columns.items() if source == twice]
            raise ConfigError(
                f"data.columns reads {' and '.join(roles)} from the one column '{twice}'.",
                "Every role needs a column of its own.",
                action="Leave one of the roles out.",
            )

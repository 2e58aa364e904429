"""Ground - what server and sites must agree on before a round is played, and the same ground built at both.

A site tells the ids of its clients, their sizes and, where the task is one of labels, its label names; nothing else of
its data leaves it. The server joins what all sites tell and sends it back, so that a site prepares the recipe for all
clients (cohorts, groups, privacy, label order are those of the whole) while it can read the rows of its own alone.

A process's entry point stands above :mod:`fedllm.run`, the layers around this package below it: that module is
therefore handed in.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedllm.core.errors import ConfigError, DataError
from fedllm.engine.nvflare.parts import VERSION

SPLITS = ("train", "eval")
LABELLED = ("sequence-classification", "token-classification", "dual-encoder")
"""Tasks for which label names have to be the same everywhere."""
LIBRARIES = ("fedllm", "torch", "transformers", "numpy")
"""Whose versions a handshake compares."""


def play() -> Any:
    """The module :mod:`fedllm.run`; only the entry points of processes call this."""
    return importlib.import_module("fedllm.run")


def versions() -> dict[str, Any]:
    """What a site or server runs."""
    found: dict[str, Any] = {"protocol": VERSION, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


class Near:
    """The clients whose rows can be read here; `own` None: nobody's."""

    def __init__(self, own: Any | None) -> None:
        self.own = own
        self.client_ids: list[str] = [] if own is None else list(own.client_ids)

    def size(self, client_id: str, split: str = "train") -> int:
        """Rows of a split."""
        return 0 if self.own is None else self.own.size(client_id, split)

    def rows(self, client_id: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The rows of a split."""
        return [] if self.own is None else self.own.rows(client_id, split)


class Sole:
    """A federation whose only client goes by another id."""

    def __init__(self, own: Any, name: str) -> None:
        if len(own.client_ids) != 1:
            raise ConfigError(
                f"The site's file says client='{name}', and its data has {len(own.client_ids)} clients.",
                action="Leave data.partition at {by: iid, clients: 1}, or leave client out.",
            )
        self.own, self.client_ids, self.names, self._inner = own, [name], {name: name}, own.client_ids[0]
        self.label_column, self.labels, self.warnings, self.public = (
            own.label_column,
            own.labels,
            own.warnings,
            own.public,
        )

    def size(self, client_id: str, split: str = "train") -> int:
        """Rows of a split."""
        return self.own.size(self._inner, split)

    def rows(self, client_id: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The rows of a split."""
        return self.own.rows(self._inner, split)


def told(own: Any, recipe: Any) -> dict[str, Any]:
    """What a site tells of its data."""
    clients = {client: {split: int(own.size(client, split)) for split in SPLITS} for client in own.client_ids}
    named = recipe.task.kind in LABELLED and recipe.task.labels is None
    return {
        "clients": clients,
        "names": {client: own.names.get(client, client) for client in own.client_ids},
        "label_column": own.label_column if recipe.task.kind in LABELLED else None,
        "labels": [_plain(label) for label in own.labels or []] if named else None,
        "warnings": list(own.warnings),
        "public": public_mark(own.public),
    }


def public_mark(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A fingerprint of the public rows; None where there are none."""
    if not len(rows):
        return None
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(dict(row), sort_keys=True, default=repr).encode())
    return found.hexdigest()


def joined(sites: Mapping[str, Mapping[str, Any]], mine: str | None) -> dict[str, Any]:
    """What all sites told, as one; raises :class:`ConfigError` where it does not fit together.

    Args:
        sites: site -> what :func:`told` gave there.
        mine: the fingerprint of the server's public rows.
    """
    home: dict[str, str] = {}
    found: dict[str, Any] = {"clients": {}, "names": {}, "label_column": None, "labels": None, "warnings": []}
    for site, facts in sorted(sites.items()):
        for client, sizes in facts["clients"].items():
            if client in home:
                raise ConfigError(
                    f"The sites {home[client]} and {site} both have a client '{client}'.",
                    "Ids are unique over all sites.",
                    action="Set 'client' in one site's file, or another data.partition.column.",
                )
            home[client] = site
            found["clients"][client] = {split: int(sizes[split]) for split in SPLITS}
        found["names"].update(facts["names"])
        found["warnings"] += [f"{site}: {warning}" for warning in facts["warnings"]]
        column = facts["label_column"]
        if column is not None and found["label_column"] not in (None, column):
            raise ConfigError(f"{site} has its labels in '{column}', others in '{found['label_column']}'.")
        found["label_column"] = found["label_column"] or column
        if facts["labels"] is not None:
            found["labels"] = _union(found["labels"] or [], facts["labels"])
        if mine is not None and facts["public"] != mine:
            raise ConfigError(
                f"The public rows of {site} are not those of the server.",
                "Public rows are the same everywhere.",
                action="Give both the same file: data.public in the site's file, public in the server's.",
            )
    found["home"] = dict(sorted(home.items()))
    return found


def federation(run: Any, facts: Mapping[str, Any], own: Any | None, public: Sequence[Mapping[str, Any]]) -> Any:
    """All clients of a run with their sizes, and the rows of those in `own` (None: of none)."""
    sizes, near = facts["clients"], frozenset[str](() if own is None else own.client_ids)

    def rows(client: str, split: str) -> Any:
        if own is not None and client in near:
            return own.rows(client, split)
        raise DataError(f"The rows of client '{client}' are not here.", "They stay at its site.")

    labels = facts["labels"]
    return run.Federation(
        list(sizes),
        rows,
        lambda client, split: int(sizes[client][split]),
        facts["names"],
        facts["label_column"],
        lambda: list(labels or []),
        facts["warnings"],
        public,
    )


def _plain(label: Any) -> Any:
    """A label as JSON has it."""
    return label.item() if hasattr(label, "item") else label


def _union(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """Both, in the order of :attr:`fedllm.data.federation.Federation.labels`."""
    return sorted({*left, *right}, key=lambda value: (type(value).__name__, value))

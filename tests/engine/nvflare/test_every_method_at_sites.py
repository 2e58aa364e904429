"""Every method and protocol with two sites: the state of the local engine to the bit, or a refusal with its reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

import fedllm
from fedllm.core.errors import FedLLMError
from fedllm.sites.audit import matched
from tests.contract.conftest import FAMILIES, adapter_of, clients, found_kinds, public, same_state, task_of

pytestmark = pytest.mark.slow
HOMES = {"site-1": ("c0", "c2"), "site-2": ("c1", "c3")}
REFUSED = {"central": "rows"}
"""Methods that cannot be played across sites, with a word of the reason."""
KEYS = sorted(
    (k for k, v in found_kinds().items() if v.__module__.startswith("fedllm.")), key=lambda k: (task_of(k).kind, k)
)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it."""
    return {name: value.tolist() if isinstance(value, numpy.ndarray) else value for name, value in row.items()}


def rows_of(key: str, client: str) -> list[dict[str, Any]]:
    return [{"who": client, **plain(row)} for row in clients(key)[client]["train"]]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def recipe(key: str) -> dict[str, Any]:
    kind, task = found_kinds()[key], task_of(key)
    options = {**getattr(kind, "needs", {}), **getattr(kind, "smallest", {})}
    train = {"train": {"steps": 2, "batch_size": 2}} if "train" in kind.model_fields else {}
    return {
        "name": "p", "rounds": 2, "method": {"name": key, **options}, **train, "cohort": "all", "cohort_width": 1,
        "model": {"name": f"toy:{FAMILIES.get(task.kind, 'llama')}", "device": "cpu"}, "adapter": adapter_of(key),
        "task": task.model_dump(exclude_unset=True), "evaluation": {"against": []}, "seed": 5,
    }  # fmt: skip


class Ground:
    """Sites for all methods that work on one task: a worker process each."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        common = {"path": write(folder / "public.jsonl", [plain(row) for row in public(key)])}
        self.public = {"public": common} if found_kinds()[key].public else {}
        self.mine = {"public": common} if self.public else {}
        self.post = rig.Loopback(folder, lambda client: rows_of(key, client), HOMES, self.public)
        rows = [row for client in sorted(clients(key)) for row in rows_of(key, client)]
        self.data = {**rig.DATA, **self.public, "path": write(folder / "all.jsonl", rows)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: list[Ground] = []

    @cache
    def at(kind: str, common: bool, key: str) -> Ground:
        made.append(Ground(tmp_path_factory.mktemp(kind), key))
        return made[-1]

    first: dict[tuple[str, bool], str] = {}

    def of(key: str) -> Ground:
        same = task_of(key).kind, found_kinds()[key].public
        return at(*same, first.setdefault(same, key))

    yield of
    for one in made:
        one.post.end()


@pytest.mark.parametrize("key", KEYS)
def test_the_state_of_the_local_engine(key: str, ground: Any, tmp_path: Path) -> None:
    place = ground(key)
    if key in REFUSED:
        with pytest.raises(FedLLMError, match=REFUSED[key]):
            place.post.play(f"run-{key}", rig.load(recipe(key)), **place.mine)
        return
    home = fedllm.run({**recipe(key), "data": place.data}, folder=tmp_path)
    away = place.post.play(f"run-{key}", rig.load(recipe(key)), **place.mine)
    assert home.finished and away.finished and same_state(home.state, away.state)
    assert home.table["rows"] == away.table["rows"] and home.table["bytes"] == away.table["bytes"]
    assert matched(place.post.audit(), {site: place.post.audit(site) for site in HOMES}) == []

"""What the tests of this folder share: a small recipe, its rows dealt to sites, and sites without FLARE between."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fedllm
from fedllm.engine.nvflare.keeper import Keeper
from fedllm.engine.nvflare.parts import Letter, from_shareable, to_shareable

RECIPE: dict[str, Any] = {
    "name": "flare", "rounds": 2, "method": "fedavg", "train": {"steps": 2, "batch_size": 2}, "cohort": "all",
    "cohort_width": 1, "seed": 3, "model": {"name": "toy:llama", "device": "cpu"}, "adapter": {"rank": 2},
    "task": {"max_length": 48, "template": "plain"}, "evaluation": {"against": []},
}  # fmt: skip
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]
CLIENTS = ("c0", "c1", "c2", "c3", "c4")
HOMES = {"site-1": ("c0", "c3"), "site-2": ("c1", "c4"), "site-3": ("c2",)}
"""Who is where: the order of the ids is not the order of the sites."""
DATA: dict[str, Any] = {"partition": {"by": "natural", "column": "who"}, "evaluation": {"fraction": 0.3}}


def rows(client: str) -> list[dict[str, str]]:
    number = CLIENTS.index(client)
    words = [WORDS[(number * 2 + i) % 8] for i in range(5 + number)]
    return [{"who": client, "instruction": f"reverse {w}{i}", "response": w[::-1]} for i, w in enumerate(words)]


def labelled(client: str) -> list[dict[str, str]]:
    """Rows for a classifier; no site has all labels."""
    number = CLIENTS.index(client)
    labels = ["even", "odd", "none", "both"][number % 3 : number % 3 + 2]
    return [
        {"who": client, "text": f"is {w} odd", "label": labels[i % 2]} for i, w in enumerate(WORDS[: 5 + number % 3])
    ]


Make = Callable[[str], list[dict[str, str]]]


def write_rows(file: Path, clients: Iterable[str], make: Make = rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for client in clients for row in make(client)))
    return file


def recipe(**changes: Any) -> dict[str, Any]:
    """The resolved recipe, as a job carries it."""
    return fedllm.Recipe.model_validate(load({**RECIPE, **changes})).model_dump(mode="json")


def load(values: dict[str, Any]) -> dict[str, Any]:
    from fedllm.recipe import load_recipe

    return load_recipe(values).model_dump(mode="json")


def site_facts(clients: Iterable[str], kit: Path, make: Make = rows, **more: Any) -> dict[str, Any]:
    file = write_rows(kit / "data" / "rows.jsonl", clients, make)
    return {"data": {**DATA, "path": str(file)}, "device": "cpu", "threads": 1, **more}


def at_home(folder: Path, make: Make = rows, **changes: Any) -> Any:
    """The same recipe played by the local engine over all clients."""
    file = write_rows(folder / "all.jsonl", CLIENTS, make)
    whole = {**RECIPE, **changes, "data": {**DATA, "path": str(file)}}
    return fedllm.run(whole, folder=folder / "home")


class Loopback:
    """Sites of this process: letters go through their wire form to a keeper with a real worker process."""

    def __init__(self, folder: Path, make: Make = rows) -> None:
        self.keepers: dict[str, Keeper] = {}
        self.before: Callable[[str, Letter], None] = lambda site, letter: None
        self.asked: list[tuple[str, Letter]] = []
        self.ended: str | None = None
        self.away: set[str] = set()  # gone
        self.mute: set[str] = set()  # there, and too busy to answer
        for site, clients in HOMES.items():
            kit = folder / site
            (kit / "local").mkdir(parents=True, exist_ok=True)
            (kit / "local" / "fedllm.json").write_text(json.dumps(site_facts(clients, kit, make)))
            self.keepers[site] = Keeper(kit, kit / "fedllm")
        self._turns = {site: threading.Lock() for site in self.keepers}

    def send(self, site: str, letter: Letter, done: Callable[[Letter | str], None]) -> Callable[[], None]:
        left = threading.Event()

        def go() -> None:
            with self._turns[site]:
                if left.is_set() or site in self.away | self.mute:
                    return
                self.asked.append((site, letter))
                self.before(site, letter)
                arrived = from_shareable(to_shareable(letter))
                answer = self.keepers[site].handle(arrived, left.is_set)
                if not left.is_set():
                    done(from_shareable(to_shareable(answer)))

        threading.Thread(target=go, daemon=True).start()
        return left.set

    def alive(self, site: str) -> bool:
        return site not in self.away

    def over(self) -> str | None:
        return self.ended

    def end(self) -> None:
        for keeper in self.keepers.values():
            keeper.end()

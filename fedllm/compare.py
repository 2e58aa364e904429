"""Compare - several methods over the same ground, budget and seeds; one table with mean and spread.

Every method gets the same clients, batches, local steps and rounds; what differs in bytes and tokens stands in the
table. Each seed draws partition, first values, cohorts and batches anew. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import statistics as numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError
from fedllm.core.guard import Guard
from fedllm.core.protocol import Protocol
from fedllm.recipe import Recipe, load_recipe
from fedllm.run import (
    ALONE,
    Data,
    Ground,
    Leg,
    Watch,
    base_row,
    check_codec,
    check_mixing,
    environment,
    ground_of,
    guard_of,
    headline,
    kept_folder,
    method_of,
    prepare,
    same_ground,
    travelled,
)

BESIDE = ("base", *ALONE)
"""Models to compare with: no mode of a recipe is around them."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        folder: where compare.json lies.
        table: {"metric", "seeds", "rows": [{"method", "mean", "std", "values", "metrics", ...}], "early": sentences
            about methods whose modes ended them before the last round}.
    """

    folder: Path
    table: dict[str, Any]

    def value(self, method: str) -> float:
        """The mean over seeds of a method's headline metric."""
        row = next((row for row in self.table["rows"] if row["method"] == method), None)
        if row is None:
            raise ConfigError.unknown("method in this comparison", method, [r["method"] for r in self.table["rows"]])
        return float(row["mean"])


def compare(
    recipe: str | Path | dict[str, Any] | Recipe,
    methods: Sequence[str],
    seeds: int = 1,
    overrides: Sequence[str] = (),
    *,
    data: Data | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
    debug: bool = False,
) -> Comparison:
    """Run each method with each seed.

    Args:
        recipe: as for :func:`fedllm.run`; its section `methods` holds options by method.
        methods: keys; "base" is the untrained base model.
        seeds: how many seeds, counted up from the recipe's.
        overrides: `key=value` texts.
        data: data in memory.
        folder: where results are kept; an interrupted comparison in it is continued.
        watch: is told what happens.
        debug: let an exception inside a client's code through.
    """
    settled, watch = load_recipe(recipe, overrides), watch or Watch()
    if not methods or seeds < 1:
        raise ConfigError(f"{len(methods)} methods and {seeds} seeds were given.", "At least one of each is needed.")
    for key in methods:
        if key != "base":
            method_of(settled, key)
    place = kept_folder(settled, folder, "compare")
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in methods}
    metric, early = "", list[str]()
    for number in range(seeds):
        seeded = settled.model_copy(update={"seed": settled.seed + number})
        with prepare(seeded, data) as ground:
            metric = headline(ground)
            guards = {key: _guard(ground, key) for key in methods}  # what cannot be is refused before training
            if number == 0:
                same_ground(place, ground)
                place.write_json("environment.json", environment(ground))
                watch.begin(seeded, ground, place.path)
            for key in methods:
                name = f"{key}-seed{seeded.seed}"
                if key == "base":
                    found[key].append({**base_row(ground), "up": 0, "down": 0, "tokens": 0, "steps": 0, "seconds": 0.0})
                    continue
                method = method_of(seeded, key)
                with ground_of(ground, method, data) as own:
                    leg = Leg(name, method, own, place, watch, debug, guards[key])
                    if not asyncio.run(leg.play()):
                        raise KeyboardInterrupt
                if not isinstance(method, Protocol) and leg.state.round < settled.rounds:
                    why = leg.stopped or leg.server.guard.stops(leg.state.round + 1) or "no reason is known"
                    at = f"after round {leg.state.round} of {settled.rounds}"
                    early.append(f"{key} with seed {seeded.seed} ended {at}: {why}")
                meter = leg.server.meter
                sent = {way: travelled(meter, way) for way in ("up", "down")}
                spent = {"tokens": meter.tokens, "steps": meter.steps, "seconds": meter.seconds}
                found[key].append({**leg.row(), **sent, **spent})
    table = {
        "name": settled.name,
        "metric": metric,
        "seeds": [settled.seed + number for number in range(seeds)],
        "rounds": settled.rounds,
        "rows": [_row(key, results, metric) for key, results in found.items()],
        "early": early,
    }
    place.write_json("compare.json", table)
    place.write_text("compare.md", to_markdown(table))
    return Comparison(place.path, table)


def _guard(ground: Ground, key: str) -> Guard:
    """The recipe's modes around a method, with an account of its own; a model to compare with stands beside them."""
    if key in BESIDE:
        return ground.guard.beside()
    recipe = ground.recipe
    method, cohort = method_of(recipe, key), recipe.cohort_size(len(ground.federation.client_ids))
    check_codec(recipe, method)
    check_mixing(recipe, method)
    return guard_of(recipe, ground.federation, method, cohort)


def to_markdown(table: dict[str, Any]) -> str:
    """The table for a docs page."""
    from fedllm.report.words import NAMES, bytes_text, value_text

    metric = table["metric"]
    others = [name for name in table["rows"][0]["metrics"] if name != metric]
    head = ["method", NAMES.get(metric, metric), "mean over clients", "worst 10 %", *(NAMES.get(n, n) for n in others)]
    head += ["bytes up", "tokens", "seconds"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in table["rows"]:
        spread = f" ± {value_text(metric, row['std'])}" if row["std"] is not None else ""
        cells = [row["method"], value_text(metric, row["mean"]) + spread]
        cells += [value_text(metric, row["client_mean"]), value_text(metric, row["worst"])]
        cells += [value_text(name, row["metrics"][name]) for name in others]
        cells += [bytes_text(row["up"]), f"{row['tokens']:,.0f}", f"{row['seconds']:.0f}"]
        lines.append(" | ".join(cells))
    early = "".join(f"\n{sentence}\n" for sentence in table.get("early", ()))
    return "\n".join(f"| {line} |" for line in lines) + f"\n{early}"


def _row(key: str, results: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """One method: mean and spread over seeds."""
    values = [result["pooled"].get(metric) for result in results]
    known = [value for value in values if value is not None]
    names = [name for name in results[0]["pooled"] if name != "n"]
    return {
        "method": key,
        "values": values,
        "mean": numbers.fmean(known) if known else None,
        "std": numbers.stdev(known) if len(known) > 1 else None,
        "client_mean": _mean([result["summary"].get("mean") for result in results]),
        "worst": _mean([result["summary"].get("worst_10_percent") for result in results]),
        "metrics": {name: _mean([result["pooled"].get(name) for result in results]) for name in names},
        **{name: _mean([result[name] for result in results]) for name in ("up", "down", "tokens", "steps", "seconds")},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return numbers.fmean(known) if known else None

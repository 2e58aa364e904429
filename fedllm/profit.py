"""Profit - personalisation against robustness: train together, tune on at each client, tell what is gained and lost.

Stage 1 is a run of the recipe's method (which must be `profit`). Stage 2 plays a grid of local rates and steps at every
measured client. The result is a table and a picture: personal score against global score, one line per rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError
from fedllm.core.message import Received
from fedllm.core.seeds import numpy_stream
from fedllm.data.federation import Federation
from fedllm.evaluate import total
from fedllm.methods.evaluation.profit import Profit
from fedllm.recipe import Recipe, load_recipe
from fedllm.report.chart import Line, line_chart
from fedllm.run import (
    Data,
    Ground,
    Leg,
    Watch,
    environment,
    headline,
    kept_folder,
    method_of,
    prepare,
    same_ground,
)

GLOBAL_ROWS = 200
"""Held-out rows of everybody that make the global set where the recipe names no public rows."""


@dataclass(frozen=True)
class Frontier:
    """What was found.

    Attributes:
        folder: where profit.json, profit.md and profit.svg lie.
        rows: one per rate, mix and number of steps: personal and global score, means over clients.
        metric: the score's name.
    """

    folder: Path
    rows: list[dict[str, Any]]
    metric: str


def profit(
    recipe: str | Path | dict[str, Any] | Recipe,
    lrs: Sequence[float] = (0.003, 0.03, 0.3),
    steps: Sequence[int] = (0, 1, 2, 4, 8, 16),
    mixes: Sequence[float] = (1.0,),
    near: float = 0.0,
    overrides: Sequence[str] = (),
    *,
    data: Data | None = None,
    folder: str | Path | None = None,
    watch: Watch | None = None,
) -> Frontier:
    """Train together, then tune on at every measured client with every rate.

    Args:
        recipe: as for :func:`fedllm.run`; its method must be profit.
        lrs: local rates of stage 2.
        steps: at which numbers of local steps scores are taken; 0 is the global prompt.
        mixes: shares of the personal prompt in the one that is measured; 1 is the personal prompt itself.
        near: weight of the squared distance to the global prompt in the local loss.
        overrides: `key=value` texts.
        data: data in memory. Where it has no public rows, a sample of everybody's held-out rows is the global set
            (a simulation: sites would have to publish such rows).
        folder: where results are kept; an interrupted stage 1 in it is continued.
        watch: is told what happens in stage 1.
    """
    settled, watch = load_recipe(recipe, overrides), watch or Watch()
    method = method_of(settled)
    if not isinstance(method, Profit):
        raise ConfigError(f"The recipe's method is {method.key}.", "Allowed: profit.", action="Set method=profit.")
    check_grid(lrs, steps, mixes)
    with prepare(settled, data) as ground:
        if not len(ground.federation.public):
            ground.federation.public = everybody(ground.federation, settled.seed)
        place = kept_folder(settled, folder, "profit")
        same_ground(place, ground)
        place.write_json("environment.json", environment(ground))
        watch.begin(settled, ground, place.path)
        leg = Leg("federated", method, ground, place, watch)
        if not asyncio.run(leg.play()):
            raise KeyboardInterrupt
        metric, rows = headline(ground), []
        for lr in lrs:
            train = {**method.train.model_dump(exclude={"steps", "epochs", "schedule"}), "lr": lr}
            grid = {"train": train, "points": list(steps), "mixes": list(mixes), "near": near}
            rows += [{"lr": lr, **row} for row in asyncio.run(_personal(leg, ground, method, grid, metric))]
        marked = pareto(rows, ground)
    place.write_json("profit.json", {"metric": metric, "rows": marked})
    place.write_text("profit.md", to_markdown(marked, metric))
    place.write_text("profit.svg", picture(marked, metric))
    return Frontier(place.path, marked, metric)


def check_grid(lrs: Sequence[float], steps: Sequence[int], mixes: Sequence[float]) -> None:
    """Refuse a grid that cannot be played."""
    if not lrs or any(lr <= 0 for lr in lrs):
        raise ConfigError(f"The rates {list(lrs)} were given.", "Rates are positive.", action="For example 0.003,0.03.")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ConfigError(f"The steps {list(steps)} were given.", "They rise from 0 or more.", "0,1,4,16")
    if not mixes or any(not 0 <= mix <= 1 for mix in mixes):
        raise ConfigError(f"The mixes {list(mixes)} were given.", "Each is a share from 0 to 1.", "1,0.5")


def everybody(federation: Federation, seed: int) -> list[Any]:
    """A seeded sample of all held-out rows, the same for every client; it holds no row that anybody trains on."""
    pooled = federation.pooled("eval")
    order = numpy_stream(seed, "global rows").permutation(len(pooled))[:GLOBAL_ROWS]
    return [pooled[int(number)] for number in sorted(order)]


async def _personal(
    leg: Leg, ground: Ground, method: Profit, grid: dict[str, Any], metric: str
) -> list[dict[str, Any]]:
    """Stage 2 with one rate: scores by number of steps and mix, means over clients."""
    leg.server.begin(leg.state.round)
    found: dict[tuple[int, float], list[dict[str, Any]]] = {}
    payloads = ((client, Received(leg.state.params, grid)) for client in ground.measured)
    async for answer in leg.server.ask(method.personal, payloads):
        for row in answer.upload.numbers["rows"]:
            found.setdefault((row["steps"], row["mix"]), []).append(row)
    leg.server.settle(commit=False)
    values = ground.learner.values
    rows = []
    for (steps, mix), held in found.items():
        scores = {kind: [values(row[kind])[metric] for row in held] for kind in ("personal", "global")}
        known = {kind: [v for v in each if v is not None] for kind, each in scores.items()}
        pooled = values(total([row["personal"] for row in held]))[metric]
        means = {kind: sum(each) / len(each) if each else None for kind, each in known.items()}
        facts = {"moved": sum(row["moved"] for row in held) / len(held), "pooled_personal": pooled}
        marks = {"clients": len(held), "diverged": sum(row["diverged"] for row in held)}
        rows.append({"steps": steps, "mix": mix, **means, **facts, **marks})
    return rows


def pareto(rows: Sequence[dict[str, Any]], ground: Ground) -> list[dict[str, Any]]:
    """Every row with `frontier`: no other is at least as good in both scores and better in one."""
    sign = 1.0 if headline(ground) not in ("loss", "perplexity") else -1.0
    marked = []
    for row in rows:
        p, g = sign * (row["personal"] or 0.0), sign * (row["global"] or 0.0)
        others = [(sign * (o["personal"] or 0.0), sign * (o["global"] or 0.0)) for o in rows]
        beaten = any(a >= p and b >= g and (a > p or b > g) for a, b in others)
        marked.append({**row, "frontier": not beaten})
    return marked


def to_markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The table for a docs page."""
    head = ["local rate", "steps", "mix", f"personal {metric}", f"global {metric}", "moved", "frontier"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        scores = ["" if row[kind] is None else f"{row[kind]:.3f}" for kind in ("personal", "global")]
        mark = "yes" if row["frontier"] else ""
        lines.append(
            " | ".join([f"{row['lr']:g}", str(row["steps"]), f"{row['mix']:g}", *scores, f"{row['moved']:.2f}", mark])
        )
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def picture(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Global score over personal score, one line per rate and mix, along the steps."""
    lines: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        if row["personal"] is not None:
            name = f"rate {row['lr']:g}" + (f", mix {row['mix']:g}" if row["mix"] != 1 else "")
            lines.setdefault(name, []).append((row["personal"], row["global"]))
    drawn = [Line(name, points, tone) for tone, (name, points) in enumerate(lines.items())]
    about = f"Global {metric} of each personal prompt against its personal {metric}, along the local steps."
    return line_chart(
        f"Global against personal {metric}", about, drawn, f"personal {metric}", "{:.2f}".format, "{:.2f}".format
    )

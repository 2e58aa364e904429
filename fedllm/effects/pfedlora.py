"""pFedLoRA costs next to nothing and does no harm; with models that differ no gain shows at this size.

What is told: four widths of networks under label skew, against each client alone; and one case made so that sharing
must help, where all see the same features and one client has a single image per class.
"""

from __future__ import annotations

from typing import Any

from fedllm.core.seeds import numpy_stream
from fedllm.effects import Evidence
from fedllm.effects.mlp_rig import Mlp, Play, Rows, digits, rows_of, shuffled
from fedllm.effects.rig import spread
from fedllm.methods.baseline.local import Local
from fedllm.methods.model_heterogeneity.pfedlora import PFedLoRA

SEEDS, ROUNDS, RANK, WIDTH = 3, 25, 8, 64
WIDTHS = (16, 32, 64, 128)
LIMIT = 0.01
"""So much accuracy it may be below each client alone."""


def skewed(seed: int, alpha: float) -> dict[str, dict[str, Rows]]:
    """8 clients with 40 images, classes by Dirichlet(alpha); all are tested on every class."""
    by_class, draw = _by_class(seed), numpy_stream(seed, "dirichlet")
    test = rows_of([i for found in by_class for i in found[:20]])
    clients = {}
    for k in range(8):
        counts = draw.multinomial(40, draw.dirichlet([alpha] * 10))
        own = [i for c, n in enumerate(counts) for i in draw.choice(by_class[c][20:], n, replace=False).tolist()]
        clients[f"c{k}"] = {"train": rows_of(own), "eval": test}
    return clients


def one_poor(seed: int) -> dict[str, dict[str, Rows]]:
    """c0 has one image per class, c1 and c2 have 50."""
    by_class, clients = _by_class(seed), {}
    test = rows_of([i for found in by_class for i in found[:60]])
    for k, (first, last) in enumerate([(60, 61), (61, 111), (111, 161)]):
        clients[f"c{k}"] = {"train": rows_of([i for found in by_class for i in found[first:last]]), "eval": test}
    return clients


def measure() -> Evidence:
    """Accuracy against each client alone, and the bytes of one upload."""
    gaps, gains, alone = [], [], []
    train: dict[str, Any] = {"steps": 6, "optimizer": "sgd", "clip_norm": None, "batch_size": 20}
    for seed in range(SEEDS):
        for alpha in (0.1, 0.3):
            clients, how = skewed(seed, alpha), {**train, "lr": 0.05, "momentum": 0.9}
            found, plain = _both(clients, how, {f"c{k}": (WIDTHS[k % 4],) for k in range(8)}, seed)
            gaps.append(found.mean() - plain.mean())
            alone.append(plain.mean())
        found, plain = _both(one_poor(seed), {**train, "lr": 0.2}, {f"c{k}": () for k in range(3)}, seed)
        gains.append(found.accuracy()["c0"] - plain.accuracy()["c0"])
    held = min(gaps) >= -LIMIT and min(gains) > 0
    told = f"Networks of four widths, classes by Dirichlet 0.1 and 0.3, seeds 0-2: each alone {spread(alone)}; "
    told += f"pFedLoRA differs by {min(gaps):+.3f} to {max(gaps):+.3f}: no gain (it must not lose {LIMIT}). "
    told += f"Common features, one image per class: {min(gains):+.3f} to {max(gains):+.3f} for that client."
    numbers = {"gap": sum(gaps) / len(gaps), "gain": sum(gains) / len(gains)}
    return Evidence("pfedlora", PFedLoRA.card.claim, told, None if held else False, numbers)


def _both(
    clients: dict[str, dict[str, Rows]], train: Any, widths: dict[str, tuple[int, ...]], seed: int
) -> tuple[Play, Play]:
    """pFedLoRA, and each client alone, on the same networks."""
    bridged = {w: Mlp(w, seed, bridge=(RANK, WIDTH)) for w in set(widths.values())}
    plain = {w: Mlp(w, seed) for w in set(widths.values())}
    method = PFedLoRA(train=train, rank=RANK, width=WIDTH)  # pyright: ignore[reportCallIssue]
    found = Play(method, {c: bridged[w] for c, w in widths.items()}, clients, seed=seed, rounds=ROUNDS)
    alone = Play(Local(train=train), {c: plain[w] for c, w in widths.items()}, clients, seed=seed, rounds=ROUNDS)
    return found.rounds(ROUNDS), alone.rounds(ROUNDS)


def _by_class(seed: int) -> list[list[int]]:
    order, classes = shuffled(seed, "pfedlora"), digits()[1]
    return [[i for i in order if classes[i] == c] for c in range(10)]

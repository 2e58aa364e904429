"""Prompt rig - the documents of eight organisations for the bundled model, measured on what everybody holds out.

Real text, no download. Clients are the organisations (`different`) or equal mixtures of their documents (`alike`);
every client is measured on the same pool, a few held-out documents of each organisation, so that a model tuned on one
organisation shows what it does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fedllm.core.settings import read
from fedllm.data.federation import Federation
from fedllm.data.settings import DataSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.recipe import load_recipe
from fedllm.run import Result, run

Clients = dict[str, dict[str, list[dict[str, Any]]]]
POOL = 2
"""Held-out documents of each organisation in the pool."""


def clients(kind: Literal["alike", "different"], seed: int, documents: int = 16, own: bool = False) -> Clients:
    """Eight clients with `documents` training rows each, and the pool (or their own held-out rows) to measure on."""
    settings = read(DataSettings, {"name": "organisations", "documents": documents, "held_out": 8 if own else POOL})
    built = Federation.build(settings, seed)
    pool = [dict(row) for row in built.pooled("eval")]
    rows = {client: [dict(row) for row in built.rows(client)] for client in built.client_ids}
    if kind == "alike":
        dealt = [row for place in range(documents) for row in [held[place] for held in rows.values()]]
        rows = {client: dealt[number * documents : (number + 1) * documents] for number, client in enumerate(rows)}
    measured = {client: [dict(row) for row in built.rows(client, "eval")] if own else pool for client in rows}
    return {client: {"train": held, "eval": measured[client]} for client, held in rows.items()}


def played(
    method: str | dict[str, Any], data: Clients, seed: int, folder: Path, against: list[str], **options: Any
) -> Result:
    """A run of `method` on the quickstart's model and task; `options` are laid over its recipe."""
    recipe = load_recipe("quickstart").model_dump(mode="json", exclude_unset=True)
    evaluation = {"every": 0, "against": against, "metric": "loss"}
    return run(
        {**recipe, "seed": seed, "method": method, "evaluation": evaluation, **options}, data=data, folder=folder
    )


def model_size() -> int:
    """Parameters of the bundled model."""
    loaded = load_model(ModelSettings(device="cpu"), "causal-lm")
    return sum(parameter.numel() for parameter in loaded.model.parameters())

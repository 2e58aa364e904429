"""Job - the three files that FLARE calls a job; no code is in them, only a recipe and the names of two classes.

FLARE puts its variables, those of the process's environment among them, in place of any `{name}` in these files, so the
run travels as base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.engine.nvflare.trust import Signed

CONTROLLER = "fedllm.engine.nvflare.server.FedllmController"
EXECUTOR = "fedllm.engine.nvflare.site.FedllmExecutor"
ALLOWED = (CONTROLLER, EXECUTOR)
"""The only classes that a job may name at any participant."""
TASK = "fedllm"
POLL = 0.1
"""Seconds between two questions of an idle site for work: an empty round takes little more."""
CHECK = 1.0
"""Seconds between two questions of a busy site whether its answer is still wanted."""


def pack(run: str, recipe: dict[str, Any], sites: Sequence[str], signed: Signed) -> str:
    """A run as one text without a brace."""
    facts = {"run": run, "recipe": recipe, "sites": sorted(sites), "signed": signed.to_json()}
    return base64.b64encode(json.dumps(facts).encode()).decode()


def write(folder: Path, run: str, recipe: dict[str, Any], sites: Sequence[str], signed: Signed) -> Path:
    """Write a job's folder.

    Args:
        folder: made where it does not exist.
        run: the run's id; a job with the id of a run that was interrupted goes on with it.
        recipe: the resolved recipe.
        sites: who takes part; all of them have to be there when the job starts.
        signed: the run's manifest.
    """
    meta = {
        "name": run,
        "resource_spec": {},
        "min_clients": len(sites),
        "mandatory_clients": sorted(sites),
        "deploy_map": {"app": ["server", *sorted(sites)]},
    }
    empty: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    workflow = {"id": "fedllm", "path": CONTROLLER, "args": {"config": pack(run, recipe, sites, signed)}}
    server = {**empty, "server": {"task_request_interval": POLL}, "workflows": [workflow]}
    executor = {"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}}
    client = {**empty, "task_check_interval": CHECK, "executors": [executor]}
    config = folder / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    files = {"config_fed_server.json": server, "config_fed_client.json": client}
    for name, value in files.items():
        (config / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return folder

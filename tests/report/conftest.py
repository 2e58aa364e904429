from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.evaluate.clients import summarise

NAMES = [
    "St Mary's Hospital",
    "Landeskrankenhaus Salzburg",
    "Clinique du Lac",
    "North Bay Oncology",
    "Ospedale Maggiore",
    "Uni Klinik Freiburg",
    "Karolinska West",
    "Hôpital Saint-Louis",
]
LEVELS = {"base": 0.18, "local": 0.52, "federated": 0.66, "central": 0.7}
LABELS = {"base": "Base model", "local": "Each alone", "federated": "Federated (fedavg)", "central": "All data pooled"}


def write_run(folder: Path, clients: int = 8, rounds: int = 15, labels: int = 6, every: int = 1, seed: int = 0) -> Path:
    """A run folder as the run writes it, with made-up numbers."""
    stream = random.Random(seed)
    ids = [f"c{n:03d}" for n in range(clients)]
    names = {i: NAMES[n] if clients <= 8 else f"Client {n + 1}" for n, i in enumerate(ids)}
    held = {i: stream.randint(20, 90) for i in ids}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: triage\nrounds: 15\nmethod:\n  name: fedavg\n  note: <b>&\n")
    environment = {
        "versions": {"fedllm": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "device": "cpu",
        "seed": 7,
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64",
        "model": {"name": "Qwen3-0.6B", "parameters": 596049920, "trainable": 2293760, "fingerprint": "3f9a1c77d2e0"},
    }
    partition = {"clients": {}}
    for i in ids:
        mix = [stream.gammavariate(0.4, 1) for _ in range(labels)]
        size = stream.randint(60, 900)
        counts = {f"label {n + 1}": round(size * part / sum(mix)) for n, part in enumerate(mix)} if labels else None
        train = sum(counts.values()) if counts else size
        partition["clients"][i] = {"name": names[i], "train": train, "eval": held[i], "labels": counts}
    events = []
    for leg in ("federated", "local", "central"):
        for number in range(1, rounds + 1):
            loss = 0.9 + 1.6 * math.exp(-number / (6 if leg == "federated" else 4)) + stream.uniform(-0.04, 0.04)
            event = {"event": "round", "round": number, "model": leg, "loss": loss, "cohort": ids, "tokens": 41234}
            event |= {"bytes_up": 917504 * clients, "bytes_down": 917600 * clients, "seconds": 21.5, "failed": None}
            event |= {"rejected": [], "lost": []}
            if leg == "federated" and number in (3, 7):
                event["rejected"] = [{"client": ids[-1], "reason": "the upload's 'lora.A' is not finite"}]
            if leg == "federated" and number == 9:
                event["lost"] = [ids[0]]
            events.append(event)
            if every and number % every == 0:
                level = LEVELS["base"] + (LEVELS[leg] - LEVELS["base"]) * (1 - math.exp(-number / 4))
                pooled = {"n": 400, "exact_match": level + stream.uniform(-0.01, 0.01), "loss": loss + 0.2}
                events.append({"event": "evaluation", "round": number, "model": leg, "pooled": pooled, "clients": {}})
    rows = []
    for model, level in LEVELS.items():
        table = {}
        for n, i in enumerate(ids):
            right = round(held[i] * min(1, max(0, level + 0.1 * math.sin(n) + stream.uniform(-0.05, 0.05))))
            table[i] = {"n": held[i], "exact_match": right / held[i], "loss": 2.4 - 2 * level}
        total = sum(held.values())
        pooled = {"n": total, "exact_match": sum(t["exact_match"] * t["n"] for t in table.values()) / total}
        pooled |= {"loss": 2.4 - 2 * level, "perplexity": math.exp(2.4 - 2 * level)}
        summary = summarise(table, "exact_match").to_dict()
        rows.append({"model": model, "label": LABELS[model], "clients": table, "pooled": pooled, "summary": summary})
    result = {
        "name": "triage",
        "about": "Eight hospitals learn to sort referral letters.",
        "method": "fedavg",
        "rounds": rounds,
        "metric": "exact_match",
        "higher_is_better": True,
        "rows": rows,
        "sentences": [
            f"Together the {clients} clients reach an exact match of 66.1 %, against 52.0 % when each trains alone.",
            "Pooling all data would give 70.2 %; here no document left its owner, and 110.1 MB went up.",
        ],
        "bytes": {"up": 917504 * clients * rounds, "down": 917600 * clients * rounds},
        "seconds": 1934.2,
        "files": {"adapter": str(folder / "adapter"), "metrics": str(folder / "metrics.jsonl")},
        "warnings": ["31 rows were left out: no token of the answer is left within max_length=512."],
    }
    for name, value in (("environment", environment), ("partition", partition), ("result", result)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes run folders."""
    return lambda **given: write_run(tmp_path / "run", **given)

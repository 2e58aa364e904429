"""Card - the typed facts beside a method or protocol; `fedllm methods`, the docs and the contract tests read it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

TOPICS = {
    "baseline": "Baselines (2.4, 2.5)",
    "data_heterogeneity": "Data heterogeneity (2.1)",
    "model_heterogeneity": "Model heterogeneity and personalisation (2.1, 3.6)",
    "privacy": "Privacy and security (2.2)",
    "training_efficiency": "Training efficiency (2.3)",
    "communication": "Communication efficiency (2.3)",
    "parameter_efficiency": "Parameter efficiency (2.3)",
    "silo_and_device": "Cross-silo and cross-device (2.4)",
    "decentralised": "Decentralised training (2.4)",
    "blackbox": "Black box and transfer (2.4, 3.8)",
    "instruction": "Instruction tuning (2.4)",
    "evaluation": "Datasets, benchmarks, convergence (2.5)",
    "prompts": "Prompt learning (3.1-3.7)",
    "applications": "Applications (3.9)",
    "directions": "Future directions (4.1-4.5)",
}
"""The folders of fedllm/methods and the sections of the survey they stand for."""


class Card(BaseModel):
    """What a method is and claims."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    """Name and one clause: what it is."""
    paper: str
    """Authors, venue, year, arXiv id."""
    cells: tuple[str, ...]
    """Where the survey places it."""
    travels: str
    """What goes down and what comes up, in words."""
    claim: str
    """The effect the paper claims, in one sentence."""
    models: tuple[str, ...] = ("any",)
    """Model families it works on."""
    status: Literal["experimental", "runs", "verified"] = "runs"
    """verified: the effect check passes; runs: it passes the contract; experimental: less than that."""
    simulation_only: str = ""
    """Why it cannot run across real sites; empty where it can."""

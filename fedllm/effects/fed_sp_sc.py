"""Fed-SP-SC: votes over synonymous questions answer more of them correctly, also where their errors go together.

A scripted model answers: correct with probability p, else one of six wrong values, drawn for every wording. Errors of
different wordings are independent, or share the difficulty of their question, p_q ~ Beta(4 p, 4 - 4 p). The protocol,
its banks, its retrieval and its votes are the real ones, behind the real engine. What demonstrations (Fed-DP-CoT) gain
depends on how a model learns from them, which no script can show: it is not measured here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from fedllm.blocks.blackbox import Completion, Query, Source
from fedllm.core.errors import ConfigError
from fedllm.core.seeds import numpy_stream, python_stream
from fedllm.core.server import Server
from fedllm.data.federation import Federation
from fedllm.effects import Evidence
from fedllm.effects.rig import quadratic
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.protocols.fed_sp_sc import FedSPSC

SEEDS = (0, 1, 2)
ITEMS = 200
EXPECTED = {
    (0.55, False): {1: 0.55, 3: 0.66, 5: 0.81, 10: 0.95},
    (0.55, True): {1: 0.55, 3: 0.64, 5: 0.74, 10: 0.83},
}
"""The card's table: vote accuracy by (p, whether difficulty is shared) and number of votes."""
MARGIN = 0.08
"""Points that five correlated votes must gain with every seed."""
OPENINGS = (
    "Please work out", "Kindly find", "Can somebody compute", "Tell me quickly", "I would like to know",
    "Help me get", "My homework asks for", "Determine for me", "What would you say is", "Show",
    "Calculate", "Our teacher wants", "Give me", "Figure out", "Let us see", "Could you count", "Do you know",
    "How would one obtain", "It is about", "State",
)  # fmt: skip
"""Twenty users, twenty ways to ask."""


class Scripted:
    """A model that is right with a known probability.

    Args:
        p: the probability, over all questions.
        shared: whether the wordings of a question share its difficulty.
        seed: of its answers.
    """

    name = "scripted"
    batch: int | None = None

    def __init__(self, p: float, shared: bool, seed: int) -> None:
        self.p, self.shared, self.seed = p, shared, seed
        self.asked: list[Query] = []

    def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        """See :class:`~fedllm.blocks.blackbox.Source`."""
        self.asked += queries
        return [Completion(self.answer(query), None, len(query.prompt), 3, "stop") for query in queries]

    def answer(self, query: Query) -> str:
        """The chain on the first call, and what it says on the second, which shows the chain."""
        question = query.prompt.rpartition("Q: ")[2]
        thought = re.search(r"I get (-?\d+)\.", question)
        if thought:
            return f" {thought[1]}."
        a, b = (int(number) for number in re.findall(r"\d+", question.partition("\n")[0])[:2])
        draw = python_stream(self.seed, "wording", question, query.sample)
        chance = self.p
        if self.shared:
            chance = float(numpy_stream(self.seed, "item", a, b).beta(4 * self.p, 4 - 4 * self.p))
        wrong = draw.choice((-3, -2, -1, 1, 2, 3))
        return f"{a} and {b} make it. I get {a + b if draw.random() < chance else a + b + wrong}."


class ScriptedSPSC(FedSPSC, abstract=True):
    """The protocol with a scripted model."""

    def source(self, server: Server) -> Source:
        """The script of this server's run."""
        return server.script  # type: ignore[attr-defined]


def users(count: int, items: int = ITEMS) -> Federation:
    """`count` users who all ask the same sums, each in words of their own; the first one's are to be answered."""
    if not 1 <= count <= len(OPENINGS):
        raise ConfigError(f"{count} users are asked for.", f"Allowed: 1 to {len(OPENINGS)}.")
    clients: dict[str, Any] = {}
    for number, opening in enumerate(OPENINGS[:count]):
        rows = [
            {"question": f"{opening} the sum of {100 + i} and {1000 + 7 * i}", "answer": f"#### {1100 + 8 * i}",
             "consent": True} for i in range(items)
        ]  # fmt: skip
        clients[f"user-{number:02d}"] = {"train": rows, "eval": rows if number == 0 else []}
    return Federation.of(clients)


def accuracy(
    votes: int, p: float, shared: bool, seed: int, items: int = ITEMS, **options: Any
) -> tuple[dict[str, Any], Scripted]:
    """The protocol's report with `votes` users, and the script that answered."""
    federation = users(votes, items)
    learner: Any = quadratic()[0]
    protocol = ScriptedSPSC(similar=votes, block=items, paraphrase=False, **options)
    worker = LocalWorker(learner, protocol, federation, seed)
    server = Server(LocalEngine(worker, federation.client_ids, len(federation.client_ids)), seed)
    script = Scripted(p, shared, seed)
    server.script = script  # type: ignore[attr-defined]
    _, report = asyncio.run(protocol.play(server, protocol.init(learner.initial())))
    return report, script


def measure() -> Evidence:
    """Accuracy by number of votes against the card's table, and the gain of five votes over one."""
    found: dict[str, float] = {}
    worst, gains = 0.0, []
    for (p, shared), row in EXPECTED.items():
        for votes, expected in row.items():
            values = [accuracy(votes, p, shared, seed)[0]["accuracy"] for seed in SEEDS]
            found[f"{'shared' if shared else 'independent'} {votes}"] = mean = sum(values) / len(values)
            worst = max(worst, abs(mean - expected))
            if shared and votes == 5:
                gains = [v - accuracy(1, p, shared, seed)[0]["accuracy"] for v, seed in zip(values, SEEDS, strict=True)]
    curve = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    return Evidence(
        "fed-sp-sc",
        FedSPSC.card.claim,
        f"A scripted model that is right with p = 0.55, {ITEMS} questions, mean of seeds {SEEDS}, accuracy by votes: "
        f"{curve}; largest distance to what such votes should give {worst:.3f} (margin 0.06). Five votes with shared "
        f"difficulty gain {min(gains):+.2f} to {max(gains):+.2f} (margin {MARGIN} with each seed). A simulation of the "
        "vote, not of a language model; demonstrations are not measured.",
        worst < 0.06 and min(gains) > MARGIN,
        {**found, "gain": sum(gains) / len(gains)},
    )

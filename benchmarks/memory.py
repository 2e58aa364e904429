"""Memory - peak resident memory of rounds against clients, rank, adapters that the server keeps, and private states.

Every number is the peak of a process of its own. The rows of a client are made when they are asked for, so that no data
of the benchmark counts; the names of all clients do, since somebody has to know who is registered.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.show import main

QUESTION = "Does the memory of a round grow with the clients that are registered, and with what else does it grow?"
HEAD = (
    "what grows", "to", "peak (MiB)", "beyond the libraries (MiB)", "peak over the smallest", "goal",
    "one more takes (KiB)", "its tensors (KiB)",
)  # fmt: skip
NOTE = (
    "A random Llama of 0.3 M weights, LoRA on all linear layers, eight clients a round in one pass, 32 tokens a step. "
    "Registered clients: medians of three processes. `one more takes` is the slope from the smallest case; `its "
    "tensors` are the float32 numbers of one adapter, of one rank of it, or of one private state. Private states in "
    "turn: every round asks eight clients that were not asked before, so that `to` clients hold a state at the end; in "
    "one round: all are asked at once. Vocabulary: rows of 256 tokens, all of which count in the loss, so that "
    "a pass has 2,048 labels; `one more` is a word."
)
COHORT, TOKENS, ROWS, REPEATS = 8, 32, 4, 3
GOAL = 1.05
"""Registered clients may raise the peak to so much."""


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        clients: registered clients.
        cohort: clients per round.
        rounds: rounds.
        rank: LoRA's rank.
        kept: adapters that the server keeps beside the one that is trained.
        personal: rank of the private LoRA; 0 for a method without private state.
        disk: whether private states are written to a folder.
        tokens: tokens of a row.
        vocabulary: words that the model knows.
        whole: the logits of a pass are there at once, whatever their number.
    """

    clients: int = COHORT
    cohort: int = COHORT
    rounds: int = 3
    rank: int = 8
    kept: int = 0
    personal: int = 0
    disk: bool = False
    tokens: int = TOKENS
    vocabulary: int = 512
    whole: bool = False


POPULATIONS = (20, 2_000, 200_000)
RANKS = (4, 16, 64)
KEPT = (0, 16, 64)
HOLDERS = (8, 64, 256)
PERSONAL = 64
WORDS = (512, 32_768, 131_072)


def series(quick: bool) -> dict[str, dict[int, Case]]:
    """What grows -> its size -> the case; the smallest first."""
    ends = slice(None, None, 2 if quick else 1)  # quick leaves out what lies between
    holders = HOLDERS[: 2 if quick else 3]
    found = {
        "registered clients": {n: Case(clients=n) for n in POPULATIONS[ends]},
        "LoRA rank": {n: Case(rank=n) for n in RANKS[ends]},
        "adapters at the server": {n: Case(rank=64, kept=n) for n in KEPT[ends]},
    }
    for disk, where in ((False, "in memory"), (True, "on disk")):
        turns = {n: Case(clients=n, rounds=n // COHORT, personal=PERSONAL, disk=disk) for n in holders}
        found[f"private states {where}, in turn"] = turns
    found["private states on disk, in one round"] = {
        n: Case(clients=n, cohort=n, rounds=1, personal=PERSONAL, disk=True) for n in holders
    }
    for whole, how in ((False, "logits a stretch at a time"), (True, "all logits of a pass at once")):
        sizes = {n: Case(rounds=1, tokens=256, vocabulary=n, whole=whole) for n in WORDS[ends]}
        found[f"vocabulary, {how}"] = sizes
    return found


def peak() -> float:
    """Peak resident memory of this process in MiB.

    Linux begins `ru_maxrss` of a new program at what its parent held, so the system's own record is read where there
    is one.
    """
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def play(case: Case, folder: Path) -> dict[str, float]:
    """Play a case in this process; its peak, and what the libraries and a unit of what grows take, in MiB."""
    import torch
    import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]  (so that it counts as a library)

    from benchmarks.ground import SIZES, learner, texts
    from fedllm.core.server import Server
    from fedllm.core.state import State
    from fedllm.core.tensors import Tensors, size_in_bytes
    from fedllm.core.train import Train
    from fedllm.engine.local import LocalEngine, LocalWorker
    from fedllm.engine.rounds import play_round
    from fedllm.methods.baseline.fedavg import FedAvg
    from fedllm.methods.model_heterogeneity.fedlora import FedLoRA
    from fedllm.tasks import head

    torch.set_num_threads(1)
    libraries = peak()
    if case.whole:
        head.STRETCH = 2**62

    class Made:
        """Clients whose rows are made when they are asked for; implements fedllm.core.work.Rows."""

        client_ids = [f"client-{number:06d}" for number in range(case.clients)]

        def size(self, client_id: str, split: str = "train") -> int:
            return ROWS if split == "train" else 0

        def rows(self, client_id: str, split: str = "train") -> list[dict[str, str]]:
            return texts(self.size(client_id, split), case.tokens, int(client_id[-6:]))

    class Keeping(FedAvg, abstract=True):
        """FedAvg at a server that keeps more adapters."""

        kept: int = 0

        def init(self, start: Tensors) -> State:
            more = {f"kept{n}": {name: t + 1 for name, t in start.items()} for n in range(self.kept)}
            return State(start, more)

    class InTurn(FedLoRA, abstract=True):
        """FedLoRA that asks the clients one cohort after the other."""

        def cohort(self, round: int, clients: Sequence[str], size: int, rng: Any) -> list[str]:
            return list(clients[(round - 1) * size : round * size])

    train = Train(steps=2, batch_size=1, lr=1e-3)
    method = InTurn(train=train, rank=case.personal) if case.personal else Keeping(train=train, kept=case.kept)
    size = replace(SIZES["0.3 M"], vocabulary=case.vocabulary)
    model = learner(size, case.rank, case.tokens, targets="all-linear", personal=case.personal)
    rows = Made()
    worker = LocalWorker(model, method, rows, 0, folder if case.disk else None)
    server = Server(LocalEngine(worker, rows.client_ids, COHORT), 0, rounds=case.rounds)
    start = model.initial()
    state = method.init(start)

    async def go(state: State) -> None:
        for _ in range(case.rounds):
            state, record = await play_round(method, state, server, case.cohort)
            worker.private.prune([])  # as a run does after its checkpoint
            if record.used != case.cohort:
                raise SystemExit(f"{record.used} of {case.cohort} clients took part: {record.failed} {record.lost[:1]}")

    asyncio.run(go(state))
    own = {n: t for n, t in start.items() if ".personal." in n} if case.personal else start
    return {"peak": peak(), "libraries": libraries, "adapter": size_in_bytes(own) / 2**20}


def alone(case: Case, repeats: int) -> dict[str, float]:
    """The medians of :func:`play` in processes of their own."""
    asked = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(asdict(case))]
    found = []
    for _ in range(repeats):
        ended = subprocess.run(asked, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{case} failed:\n{ended.stderr[-2000:]}")
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case."""
    rows = []
    for name, cases in series(quick).items():
        registered = name == "registered clients"  # has a goal of a few percent, so that one process is not enough
        found = {value: alone(case, REPEATS if registered and not quick else 1) for value, case in cases.items()}
        low = min(found)
        for value, one in found.items():
            over = one["peak"] / found[low]["peak"]
            slope = (one["peak"] - found[low]["peak"]) / (value - low) * 1024 if value > low else None
            unit = (
                0.0
                if registered or name.startswith("vocabulary")
                else one["adapter"] * 1024 / (value if name == "LoRA rank" else 1)
            )
            goal = ("reached" if over <= GOAL else "missed") + " (5 %)" if registered and value > low else ""
            rows.append(
                (
                    name,
                    f"{value:,}",
                    f"{one['peak']:.0f}",
                    f"{one['peak'] - one['libraries']:.0f}",
                    f"{over:.3f}",
                    goal,
                    "" if slope is None else f"{slope:.2f}",
                    f"{unit:.1f}" if unit else "",
                )
            )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(play(Case(**json.loads(sys.argv[2])), Path(place))))
    else:
        main(sys.modules[__name__])

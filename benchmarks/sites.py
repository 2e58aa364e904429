"""Sites - what a round across sites costs beyond FLARE itself: a server and three sites over mTLS on loopback."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.across.network import ADMIN, Net, network, tidy
from benchmarks.show import main
from fedllm.engine.nvflare import job as jobs
from fedllm.engine.nvflare import trust

QUESTION = "What does a round across sites cost beyond FLARE itself?"
HEAD = (
    "payload, down and up again",
    "sites",
    "exchanges",
    "fedllm s",
    "FLARE alone s",
    "goal",
    "verdict",
    "server's peak memory",
    "in payloads",
    "goal 3",
)
NOTE = (
    "A server and three sites, each a process of FLARE's with one for the job, over mTLS on loopback; fedllm's sites "
    "have a worker process each. An exchange is one question to every site and its answer, without training: the "
    "server encodes what a client receives, the worker decodes it and sends as much back, and the server decodes and "
    "checks it. In it are encoding, digests, audit logs, the site's policy, its replies on disk, the pipe to the "
    "worker; not in it are a model, steps, sums of uploads and checkpoints. FLARE alone is a broadcast of arrays of "
    "32 MiB to an executor that sends back what it gets, in the same job and turn about, after one exchange of each "
    "that does not count. An idle site of either asks for work every 0.1 s. Seconds are medians (lowest-highest); "
    "memory is the highest of the server's job process during one more exchange of fedllm's, before which what was "
    "free is given back, in payloads of one site down and all sites up."
)
SITES = ("site-1", "site-2", "site-3")
RUN = "exchanges"
CLASSES = ("benchmarks.across.server.Measure", "benchmarks.across.site.Through", "benchmarks.across.site.Alone")
EMPTY, RATIO, MEMORY = 0.3, 1.3, 3.0
"""Goals: seconds of an empty round, time over that of FLARE alone, and peak memory in payloads."""


@dataclass(frozen=True)
class Case:
    """What is exchanged: bytes of the payload down and up, the number of sites, and how often each way."""

    size: int
    sites: int
    times: int


CASES = (Case(0, 3, 31), Case(200_000_000, 1, 7), Case(200_000_000, 3, 5), Case(1_000_000_000, 1, 2))
QUICK = (Case(0, 3, 6), Case(20_000_000, 1, 2), Case(20_000_000, 3, 2))


def steps(case: Case) -> list[dict[str, Any]]:
    """The exchanges of a case: one of each way that does not count, if there is more than one, then in turn; and last
    one of fedllm's whose memory is measured."""
    spare = case.times > 1
    ours, alone, measured = (
        {"way": way, "size": case.size, "sites": SITES[: case.sites]} for way in ("fedllm", "flare", "memory")
    )
    return [ours, alone] * (case.times + spare) + [measured]


def exchanged(net: Net, folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What was measured of every exchange, in the order of :func:`steps`."""
    plan, found = folder / "steps.jsonl", folder / "found.jsonl"
    planned = [step for case in cases for step in steps(case)]
    plan.write_text("".join(json.dumps(step) + "\n" for step in planned), encoding="utf-8")
    recipe = {"name": RUN, "method": {"name": "fedavg"}, "rounds": len(planned), "model": {"name": "none"}}
    signed = trust.signed(net.kits[ADMIN], RUN, recipe, SITES, purpose="research")
    job = jobs.write(folder / RUN, RUN, recipe, SITES, signed)
    _name(job, {"steps": str(plan), "found": str(found)})
    with net.asked() as admin:
        name = str(admin.inner.submit_job(str(job)))
    net.wait(name)
    return [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]


def _name(job: Path, more: dict[str, str]) -> None:
    """Name the benchmark's classes in a job of fedllm's."""
    config, (controller, through, alone) = job / "app" / "config", CLASSES
    server, client = (json.loads((config / f"config_fed_{end}.json").read_text()) for end in ("server", "client"))
    flow = server["workflows"][0]
    flow["path"], flow["args"] = controller, {**flow["args"], **more}
    client["executors"][0]["executor"]["path"] = through
    client["executors"].append({"tasks": ["raw"], "executor": {"path": alone, "args": {}}})
    (config / "config_fed_server.json").write_text(json.dumps(server), encoding="utf-8")
    (config / "config_fed_client.json").write_text(json.dumps(client), encoding="utf-8")


def row(case: Case, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table, of a case's exchanges that count."""
    *found, measured = found
    ours, alone = found[0::2], found[1::2]
    seconds = [[one["seconds"] for one in way] for way in (ours, alone)]
    mine, theirs = map(statistics.median, seconds)
    reached = mine <= (RATIO * theirs if case.size else EMPTY)
    goal = f"{RATIO} x" if case.size else f"{EMPTY} s"
    peak = measured["peak"]
    cells = [*map(_told, seconds), goal, f"{_verdict(reached)}, {mine / theirs:.2f} x", f"{peak / 1e6:,.0f} MB"]
    if case.size:
        share = peak / (case.size * (1 + case.sites))
        cells += [f"{share:.1f}", _verdict(share <= MEMORY)]
    else:
        cells += ["", ""]
    size = f"{case.size / 1e6:,.0f} MB" if case.size else "none"
    return size, str(case.sites), str(len(ours)), *cells


def _told(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else middle


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row per case."""
    cases = QUICK if quick else CASES
    with tidy(), tempfile.TemporaryDirectory(prefix="fedllm-sites-") as place:
        folder = Path(place)
        with network(folder, SITES, classes=CLASSES) as net:
            found, rows = exchanged(net, folder, cases), []
    for case in cases:
        count = len(steps(case))
        mine, found = found[:count], found[count:]
        rows.append(row(case, mine[2:] if case.times > 1 else mine))
    return rows


if __name__ == "__main__":
    main(sys.modules[__name__])

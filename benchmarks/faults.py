"""Faults - a run across three sites while things break at random: python -m benchmarks faults

A server and three sites as real processes over mTLS on this machine play 60 rounds of SCAFFOLD, whose clients keep
something between rounds, while 50 faults strike one after the other, drawn from a seed. Then the local engine plays the
same 60 rounds, each with the clients that were really used: the adapters must have the same bytes, so that nothing was
counted twice or lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import benchmarks.faults as this
from benchmarks.show import main
from fedllm.core.errors import RunError

QUESTION = "Does a run across sites reach its end, with nothing counted twice or lost, while things break?"
HEAD = ("fault", "struck", "what the run's own records say of it")
NOTE = ""
"""Set when it was measured."""
SITES = {"site-1": ("c0", "c3"), "site-2": ("c1", "c4"), "site-3": ("c2",)}
CLIENTS = sorted(client for own in SITES.values() for client in own)
SERVER, ADMIN, RUN = "localhost", "ada@hub.org", "stormy"
ROUNDS, FAULTS, QUICK = 60, 50, (12, 9)
DEADLINE = 12.0
"""Seconds of a round, in the recipe."""
PATIENCE = 600.0
"""Seconds without a new round after which the benchmark gives up."""
SEED = 7
THREADS = 1
"""Of every process that trains."""
RECIPE: dict[str, Any] = {
    "name": "faults",
    "method": "scaffold",
    "cohort": "all",
    "cohort_width": 1,
    "seed": 3,
    "deadline": DEADLINE,
    "train": {"steps": 4, "batch_size": 2},
    "model": {"name": "toy:llama", "device": "cpu"},
    "adapter": {"rank": 2},
    "task": {"max_length": 48, "template": "plain"},
    "evaluation": {"against": []},
}
POLICY: dict[str, Any] = {
    "coordinators": [ADMIN],
    "methods": ["scaffold"],
    "purposes": ["research"],
    "data_sets": ["default"],
    "max_rounds": 100,
    "max_clients": 3,
    "hours": "always",
    "ops": ["*"],
    "parts": ["*"],
    "max_egress_run": 10**9,
    "max_egress_round": 10**8,
}
SPOILED = ("corrupt", "shape", "nan", "replay")
"""Faults of one upload, made in the worker process of a site."""
KINDS = ("worker", "site", "job", "server", "asleep", *SPOILED)
WORDS = {
    "worker": "kill -9 of a site's worker process",
    "site": "kill -9 of a whole site, started again 2 s later",
    "job": "kill -9 of FLARE's job process at a site",
    "server": "kill -9 of the server with its job, started again",
    "asleep": "a worker that sleeps past the deadline",
    "corrupt": "an upload with bytes changed",
    "shape": "an upload of a wrong shape",
    "nan": "an upload with NaN",
    "replay": "an upload sent twice",
}
HOOK = '''
"""Spoils the next reply of a worker process where the file `fault` in its kit says how."""
import os, sys

if "fedllm.engine.nvflare.worker" in " ".join(getattr(sys, "orig_argv", [])):
    import threading

    def install():
        import torch
        from fedllm.core.message import Dense
        from fedllm.core.wire import decode, encode, size_by_part
        from fedllm.engine.nvflare import pipe
        from fedllm.engine.nvflare.parts import Letter

        send = pipe.Pipe.send

        def spoiled(self, letter):
            if letter.op != "reply" or letter.meta.get("body") is None or not os.path.exists("fault"):
                return send(self, letter)
            kind = open("fault").read()
            os.replace("fault", "fault.done")
            body = bytes(letter.blobs[letter.meta["body"]])
            if kind == "replay":
                send(self, letter)
                return send(self, letter)
            if kind == "corrupt":
                changed = bytearray(body)
                changed[len(body) // 2 :: 97] = b"x" * len(changed[len(body) // 2 :: 97])
                changed[9:13] = b"????"
                return send(self, Letter(letter.meta, [bytes(changed)]))
            message = decode(body)
            held = dict(message["update"])
            name = sorted(held)[0]
            held[name] = held[name][:1] if kind == "shape" else torch.full_like(held[name], float("nan"))
            message.parts["update"] = Dense(held)
            body = encode(message)
            return send(self, Letter({**letter.meta, "parts": size_by_part(body)}, [body]))

        pipe.Pipe.send = spoiled

    import builtins
    before = builtins.__import__

    def late(name, *more, **words):
        found = before(name, *more, **words)
        if name == "fedllm.engine.nvflare.stores" or name.endswith("nvflare.stores"):
            builtins.__import__ = before
            install()
        return found

    builtins.__import__ = late
'''
"""A sitecustomize.py for the sites: the package itself has no way to spoil anything."""


@dataclass
class Net:
    """The processes of a network on this machine.

    Attributes:
        place: folder of everything.
        kits: participant -> its kit.
        running: participant -> its process.
        struck: how often each kind of fault struck.
    """

    place: Path
    kits: dict[str, Path]
    running: dict[str, Any] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)

    @property
    def folder(self) -> Path:
        """The run's, at the server."""
        return self.kits[SERVER] / "fedllm" / "runs" / RUN

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds that are over."""
        file = self.folder / "metrics.jsonl"
        found = []
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                one = json.loads(line)
            except ValueError:
                continue  # it is being written
            if one["event"] == "round":
                found.append(one)
        return found

    def finished(self) -> bool:
        """Whether the run has reached its end."""
        from fedllm.engine.nvflare.standing import Standing

        standing = Standing.read(self.folder)
        if standing is not None and standing.name == "failed":
            raise RunError(f"The run failed: {standing.reason}")
        return standing is not None and standing.name == "finished"

    def start(self, name: str) -> None:
        """Start a participant's processes."""
        from fedllm.engine.nvflare import session

        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.place / "hook"), str(Path.cwd()), before])
        try:
            self.running[name] = session.start(name, self.kits[name])
        finally:
            os.environ["PYTHONPATH"] = before

    def worker(self, site: str) -> psutil.Process | None:
        """A site's worker process, where there is one."""
        try:
            family = psutil.Process(self.running[site].process.pid).children(recursive=True)
            return next((one for one in family if "fedllm.engine.nvflare.worker" in one.cmdline()), None)
        except psutil.Error:
            return None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def rows(client: str) -> list[dict[str, str]]:
    """Rows of a client: words to be reversed."""
    number, words = CLIENTS.index(client), ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven")
    own = [words[(number * 2 + i) % 8] for i in range(5 + number)]
    return [{"who": client, "instruction": f"reverse {w}{i}", "response": w[::-1]} for i, w in enumerate(own)]


def data(file: Path, clients: Any) -> dict[str, Any]:
    """Write the rows of some clients; gives the section `data` that reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for client in clients for row in rows(client)))
    return {"path": str(file), "partition": {"by": "natural", "column": "who"}, "evaluation": {"fraction": 0.3}}


def network(place: Path) -> Net:
    """Make the kits."""
    import yaml

    from fedllm.engine.nvflare import kits

    facts: dict[str, Any] = {SERVER: {"device": "cpu"}}
    for site, clients in SITES.items():
        policy = place / site / "policy.yaml"
        own = data(place / site / "rows.jsonl", clients)
        policy.write_text(yaml.safe_dump(POLICY))
        facts[site] = {"data": own, "device": "cpu", "threads": THREADS, "policy": str(policy)}
    organisations = {site: f"org{site[-1]}" for site in SITES}
    network = kits.Network("faults", SERVER, free_port(), organisations, {ADMIN: ("hub", "project_admin")})
    (place / "hook").mkdir()
    (place / "hook" / "sitecustomize.py").write_text(HOOK)
    return Net(place, kits.provision(network, place / "ws", facts))


def strike(net: Net, kind: str, site: str) -> bool:
    """One fault; False where there was nothing to strike."""
    worker = net.worker(site)
    if kind == "server":
        net.running[SERVER].stop(kill=True)
        net.start(SERVER)
    elif kind == "site":
        net.running[site].stop(kill=True)
        time.sleep(2.0)
        net.start(site)
    elif worker is None:
        return False
    elif kind == "worker":
        worker.kill()
    elif kind == "job":
        parent = worker.parent()
        if parent is None or parent.pid == net.running[site].process.pid:
            return False
        parent.kill()
    elif kind == "asleep":
        worker.send_signal(signal.SIGSTOP)
        time.sleep(DEADLINE + 3)
        if worker.is_running():
            worker.send_signal(signal.SIGCONT)
    else:
        (net.kits[site] / "fault").write_text(kind)
        until = time.monotonic() + 30
        while (net.kits[site] / "fault").exists():
            if time.monotonic() > until or net.finished():
                (net.kits[site] / "fault").unlink(missing_ok=True)
                return False
            time.sleep(0.05)
    return True


def storm(net: Net, recipe: dict[str, Any], faults: int, seed: int) -> float:
    """Play the run while faults strike, each when a round more is over than when the last one began; gives seconds.

    Where no more rounds than faults are left, as there was nothing to strike before, they strike at once.
    """
    from fedllm.engine.nvflare import session

    draw = random.Random(seed)
    plan = [kind for _ in range(faults // len(KINDS) + 1) for kind in KINDS][:faults]
    draw.shuffle(plan)
    begun, seen, since = time.monotonic(), 0, time.monotonic()
    with session.session(ADMIN, net.kits[ADMIN]) as admin:
        admin.wait_for(list(SITES))
        admin.submit(RUN, recipe, list(SITES))
    while not net.finished():
        there = len(net.rounds())
        if time.monotonic() - since > PATIENCE:
            raise RunError(f"No round has ended for {PATIENCE:.0f} s after {there} rounds.")
        behind = len(plan) >= recipe["rounds"] - there
        if there <= seen and not (plan and behind):
            time.sleep(0.1)
            continue
        if there > seen:
            seen, since = there, time.monotonic()
        if plan:
            kind, site = plan[-1], draw.choice(sorted(SITES))
            time.sleep(draw.random())
            if strike(net, kind, site):
                plan.pop()
                net.struck[kind] += 1
                print(f"round {there}: {WORDS[kind]} ({site})", file=sys.stderr, flush=True)
    return time.monotonic() - begun


def again(place: Path, recipe: dict[str, Any], used: list[set[str]]) -> bytes:
    """The adapter of the local engine, each round with the clients that were used."""
    from importlib import import_module

    import torch

    from fedllm.core.server import Reply

    torch.set_num_threads(THREADS)  # sums of other threads have other last bits

    local = import_module("fedllm.run")  # the package's own name for it is a function

    whole = local.load_recipe({**recipe, "data": data(place / "all.jsonl", CLIENTS), "deadline": None})

    class Chosen(local.LocalEngine):
        """Answers for some clients of a round alone."""

        async def ask(self, requests: Any, deadline: float | None) -> Any:
            held = list(requests)
            for request in held:
                if request.op == "work" and request.client not in used[request.round - 1]:
                    yield Reply(request.id, request.client, None, "not used")
                    continue
                async for reply in super().ask(iter([request]), deadline):
                    yield reply

    ground = local.prepare(whole)
    folder = local.RunFolder.create(place / "home")
    folder.write_text("recipe.yaml", whole.to_yaml())
    folder.write_json("environment.json", local.environment(ground))
    folder.write_json("partition.json", local.statistics(ground.federation).to_dict())

    def engine(leg: str, method: Any) -> Any:
        worker = ground.worker(method, folder.private(leg), False, ground.guard)
        return Chosen(worker, ground.federation.client_ids, ground.width), worker.private

    ground.remote = engine
    local.play(ground, folder, local.Watch())
    return (place / "home" / "adapter" / "adapter_model.safetensors").read_bytes()


def stories(net: Net) -> Iterator[tuple[str, str, str]]:
    """A row for each kind: how often it struck, and what stands in the records."""
    from fedllm.sites import audit

    logs = {name: audit.read(net.kits[name] / "fedllm" / "audit.jsonl") for name in (SERVER, *SITES)}
    at_server: Counter[str] = Counter(entry.action for entry in logs[SERVER] if entry.run == RUN)
    rounds = net.rounds()
    lost = [entry["reason"] for line in rounds for entry in line["lost"]]
    rejected = [entry["reason"] for line in rounds for entry in line["rejected"]]

    def told(of: list[str], *words: str) -> int:
        return sum(any(word in reason for word in words) for reason in of)

    says: dict[str, Callable[[], str]] = {
        "worker": lambda: f"{told(lost, 'signal 9')} clients lost with 'was killed (signal 9)' in rounds that count",
        "site": lambda: f"{told(lost, 'does not answer any more', 'is not there')} clients lost as their site was gone",
        "job": lambda: f"{at_server['resume']} resumes in the server's log (of these and of the server's own)",
        "server": lambda: f"{at_server['start']} start and {at_server['resume']} resumes in the server's log",
        "asleep": lambda: f"{told(lost, 'no answer within')} clients lost with 'no answer within {DEADLINE:g} s'",
        "corrupt": lambda: f"{len(rejected)} uploads rejected, {at_server['reject']} in the server's log",
        "shape": lambda: f"of them {told(rejected, 'shape')} for their shape",
        "nan": lambda: f"of them {told(rejected, 'finite', 'NaN', 'nan')} for what is not finite",
        "replay": lambda: "one entry 'send' at the site and one 'receive' at the server for each",
    }
    for kind in KINDS:
        if net.struck[kind]:
            yield WORDS[kind], str(net.struck[kind]), says[kind]()


def doubled(net: Net) -> int:
    """Uploads that a server received twice in one job: there must be none."""
    from fedllm.sites import audit

    found: Counter[tuple[Any, ...]] = Counter()
    job = 0
    for entry in audit.read(net.kits[SERVER] / "fedllm" / "audit.jsonl"):
        job += entry.action in ("start", "resume")
        if entry.action == "receive" and entry.run == RUN:
            found[job, entry.round, entry.client, entry.peer] += 1
    return sum(count > 1 for count in found.values())


def measure(quick: bool) -> list[tuple[str, ...]]:
    """Play, break, compare; raises :class:`RunError` where the run does not end or its bytes are others."""
    rounds, faults = QUICK if quick else (ROUNDS, FAULTS)
    from fedllm.recipe import load_recipe
    from fedllm.sites import audit

    recipe = load_recipe({**RECIPE, "rounds": rounds}).model_dump(mode="json")
    quiet = contextlib.redirect_stdout(sys.stderr)  # FLARE's own words are no part of the table
    with tempfile.TemporaryDirectory(prefix="fedllm-faults-") as folder, quiet:
        net = network(Path(folder))
        try:
            for name in (SERVER, *SITES):
                net.start(name)
            seconds = storm(net, recipe, faults, SEED)
        finally:
            for one in net.running.values():
                one.stop(kill=True)
        lines = net.rounds()
        if [line["round"] for line in lines] != list(range(1, rounds + 1)):
            raise RunError(f"Rounds in the record: {[line['round'] for line in lines]}.")
        gone = [{entry["client"] for entry in (*line["lost"], *line["rejected"])} for line in lines]
        used = [set(CLIENTS) - out for out in gone]
        if [line["used"] for line in lines] != [len(one) for one in used]:
            raise RunError("The clients used, lost and rejected in a round are not its cohort.")
        broken = [n for n in (SERVER, *SITES) if not audit.verify(net.kits[n] / "fedllm" / "audit.jsonl").intact]
        ours = (net.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        same = ours == again(net.place, {**RECIPE, "rounds": rounds}, used)
        twice = doubled(net)
        found = list(stories(net))
        short = sum(bool(out) for out in gone)
        this.NOTE = (
            f"{sum(net.struck.values())} faults in {rounds} rounds of {len(CLIENTS)} clients at {len(SITES)} sites, "
            f"{seconds / 60:.0f} minutes. Rounds without a client or more: {short}. Every round is in the record once; "
            f"uploads counted twice: {twice}; audit logs that are not whole: {', '.join(broken) or 'none'}. The "
            f"adapter has {'the bytes' if same else 'OTHER BYTES than those'} of the local engine's that plays each "
            "round with the clients that were used. Nobody did anything but start processes that were killed again."
        )
        if not same or twice or broken:
            raise RunError(this.NOTE)
        return found


if __name__ == "__main__":
    main(this)

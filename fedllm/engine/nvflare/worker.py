"""Worker - the process at a site that holds the base model and reads the site's rows; it answers one letter at a time.

It is started by the site's keeper and stays for the whole job, so model and prepared rows stay warm. What it holds for
longer than one letter lies on disk (see :mod:`fedllm.engine.nvflare.stores`), so it may die at any moment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, DataError, FedLLMError, RunError
from fedllm.core.guard import Guard
from fedllm.core.server import Reply, Request
from fedllm.core.wire import size_by_part
from fedllm.engine.lasting import FILE as PRIVACY
from fedllm.engine.lasting import lasting
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.nvflare import ground as grounds
from fedllm.engine.nvflare.facts import SiteFacts, permitted, read_facts
from fedllm.engine.nvflare.gate import BASE, FEDERATED
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.pipe import Closed, Pipe
from fedllm.engine.nvflare.stores import JOURNAL, JournaledStore

Tell = Callable[[Letter], None]


@dataclass
class Leg:
    """One method at this site: its worker, its private stores, and what each client answered last."""

    worker: LocalWorker
    store: JournaledStore
    engine: LocalEngine
    last: dict[str, str] = field(default_factory=dict)

    def obey(self, orders: Sequence[dict[str, Any]]) -> None:
        """Carry out the server's orders that were not yet carried out."""
        for order in orders:
            if order["n"] > self.store.applied:
                self._one(order)
                self.store.applied = order["n"]
        self.store.keep()

    def _one(self, order: dict[str, Any]) -> None:
        match order["do"]:
            case "settle":
                self.engine.settle(order["clients"])
                self.last.clear()
            case "drop":
                self.engine.drop(order["client"])
            case "close":
                self.engine.close(order["sessions"])
            case "forget":
                self.forget(order["id"], order["client"], order["session"])
            case "prune":
                self.store.prune(order["keep"])
            case other:
                raise ConfigError(f"The server orders '{other}'.", action="Install the same version on every side.")

    def forget(self, name: str, client: str, session: str | None) -> None:
        """The server did not get (or will not use) an answer: what its turn left is undone."""
        self.engine.close([session or name])
        if self.last.pop(client, None) == name:
            self.engine.drop(client)


class Site:
    """What a worker does with letters.

    Args:
        facts: the site's own file.
        kit: the site's folder; relative paths are relative to it.
    """

    def __init__(self, facts: SiteFacts, kit: Path) -> None:
        self.facts, self.kit, self.run = facts, kit, grounds.play()
        self.recipe: Any = None
        self.own: Any = None
        self.ground: Any = None
        self.legs: dict[str, Leg] = {}
        self.name, self.again = "", False

    def handle(self, letter: Letter, tell: Tell, stopped: Callable[[], bool]) -> Letter:
        """Answer a letter; replies of single clients are told as they come. A fault is an answer, too."""
        try:
            match letter.op:
                case "hello":
                    return self._hello(letter.meta)
                case "begin":
                    return self._begin(letter.meta)
                case "ask":
                    return self._ask(letter, tell, stopped)
                case "stores":
                    return self._stores(letter.meta)
                case "undo":
                    return self._undo(letter.meta)
                case other:
                    raise ConfigError(f"The server says '{other}'.", action="Install the same version on every side.")
        except Exception as fault:
            quotes = isinstance(fault, DataError) or not isinstance(fault, FedLLMError)
            if quotes:
                traceback.print_exc()  # to the worker's log at the site: it may hold data
            reason = f"{type(fault).__name__} in the worker; its log at the site says more" if quotes else str(fault)
            return Letter({"op": "error", "reason": reason})

    def _hello(self, meta: dict[str, Any]) -> Letter:
        """Who is here: versions, clients, sizes, labels."""
        mine = grounds.versions()
        if meta["versions"]["protocol"] != mine["protocol"] or meta["versions"]["fedllm"] != mine["fedllm"]:
            raise ConfigError(
                f"The server runs fedllm {meta['versions']['fedllm']}, this site {mine['fedllm']}.",
                action="Install the same version on every side.",
            )
        self.recipe, self.name = self.run.load_recipe(permitted(meta["recipe"], self.facts)), meta["run"]
        own = self.run.Federation.build(self.recipe.data, self.recipe.seed)
        self.own = own if self.facts.client is None else grounds.Sole(own, self.facts.client)
        self.ground, self.legs = None, {}
        return Letter({"op": "hello", "versions": mine, **grounds.told(self.own, self.recipe)})

    def _begin(self, meta: dict[str, Any]) -> Letter:
        """Prepare the ground for all clients; refuse another base model than the server's."""
        if self.own is None:
            raise RunError("The server begins without a hello.")
        federation = grounds.federation(self.run, meta["facts"], self.own, self.own.public)
        self.ground = self.run.prepare(self.recipe, federation, grounds.Near(self.own))
        found = self.ground.learner.loaded.fingerprint
        if meta["fingerprint"] not in (None, found):
            raise ConfigError(
                "The base model of this site is not the server's: its weights differ.",
                action="Install the same revision of the model on every side.",
            )
        self.legs, self.again = {}, bool(meta.get("again"))
        if not self.again:  # of an earlier job of this run: its server goes back to a checkpoint, or begins anew
            for journal in (self.kit / self.facts.folder / self.name).glob(f"*/{JOURNAL}"):
                journal.unlink()
        width = self.ground.width
        return Letter({"op": "ready", "fingerprint": found, "width": [width.clients, width.why]})

    def _ask(self, letter: Letter, tell: Tell, stopped: Callable[[], bool]) -> Letter:
        leg = self._leg(letter.meta["leg"])
        leg.obey(letter.meta["orders"])
        requests = [_request(facts, letter.blobs) for facts in letter.meta["requests"]]
        answered: set[str] = set()

        def told(reply: Reply) -> None:
            answered.add(reply.id)
            tell(self._checked(leg, reply))

        try:
            asyncio.run(_answers(leg, requests, letter.meta["deadline"], told, stopped))
        except Exception as fault:  # the engine itself failed: every client that is left is answered for
            traceback.print_exc()
            for request in requests:
                if request.id not in answered:
                    told(Reply(request.id, request.client, None, f"{type(fault).__name__} in the worker"))
        return Letter({"op": "done", "applied": leg.store.applied})

    def _checked(self, leg: Leg, reply: Reply) -> Letter:
        """The reply as a letter, once what its turn stored is safe."""
        if reply.body is not None and reply.session is None:
            leg.last[reply.client] = reply.id
        leg.store.keep()
        found = _reply(reply)
        return Letter({**found.meta, "spent": leg.worker.guard.spent(reply.client)}, found.blobs)

    def _stores(self, meta: dict[str, Any]) -> Letter:
        """Carry out orders, go back to a checkpoint where one is given, and tell the files of all entries."""
        leg = self._leg(meta["leg"])
        if meta.get("restore") is not None:
            leg.store.go_back(meta["restore"])
        leg.obey(meta["orders"])
        return Letter({"op": "stores", "manifest": leg.store.manifest(), "applied": leg.store.applied})

    def _undo(self, meta: dict[str, Any]) -> Letter:
        """Uploads that do not leave this site: their conversations are closed and their turns undone."""
        leg = self._leg(meta["leg"])
        for one in meta["replies"]:
            leg.forget(one["id"], one["client"], one["session"])
        leg.store.keep()
        return Letter({"op": "undone"})

    def _leg(self, name: str) -> Leg:
        if self.ground is None:
            raise RunError("The server asks before it began.")
        if name not in self.legs:
            run, ground = self.run, self.ground
            method = run.method_of(self.recipe, None if name == FEDERATED else "fedavg" if name == BASE else name)
            guard: Guard = ground.guard if name == FEDERATED else ground.guard.beside()
            worker: LocalWorker = ground.worker(method, None, False, guard)
            worker.discreet = True
            folder = self.kit / self.facts.folder / self.name / name
            if name == FEDERATED and guard.hides:
                lasting(guard, folder / PRIVACY)
            store = JournaledStore(worker.private.declared, folder, self.again)
            worker.private = store
            self.legs[name] = Leg(worker, store, LocalEngine(worker, self.own.client_ids, ground.width))
        return self.legs[name]


async def _answers(
    leg: Leg, requests: Sequence[Request], deadline: float | None, told: Callable[[Reply], None], stopped: Any
) -> None:
    async with aclosing(leg.engine.ask(requests, deadline)) as replies:
        async for reply in replies:
            told(reply)
            if stopped():
                return


def _request(facts: dict[str, Any], blobs: Sequence[bytes]) -> Request:
    named = {name: value for name, value in facts.items() if name != "audit"}
    return Request(**{**named, "body": blobs[facts["body"]]})


def _reply(reply: Reply) -> Letter:
    facts = {"op": "reply", "id": reply.id, "client": reply.client, "error": reply.error, "session": reply.session}
    if reply.body is None:
        return Letter({**facts, "cost": dict(reply.cost), "body": None})
    return Letter({**facts, "cost": dict(reply.cost), "body": 0, "parts": size_by_part(reply.body)}, (reply.body,))


def serve(pipe: Pipe, site: Site) -> None:
    """Answer letters until the parent is gone. Every answer carries the number of the letter it answers."""
    letters: queue.Queue[Letter] = queue.Queue()
    left: set[int] = set()

    def listen() -> None:
        try:
            while True:
                letter = pipe.receive()
                if letter.op == "cancel":
                    left.add(letter.meta["n"])
                else:
                    letters.put(letter)
        except Closed:
            os._exit(0)  # the parent is gone, and the main thread may be inside a long pass

    threading.Thread(target=listen, daemon=True).start()
    while True:
        letter = letters.get()
        number = letter.meta["n"]

        def tell(found: Letter, number: int = number) -> None:
            pipe.send(Letter({**found.meta, "n": number}, found.blobs))

        try:
            tell(site.handle(letter, tell, lambda number=number: number in left))
        except Closed:
            return
        left.discard(number)


def main(words: Sequence[str] | None = None) -> None:
    """The process: `python -m fedllm.engine.nvflare.worker --end FD --kit FOLDER`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--end", type=int, required=True, help="the inherited socket")
    parser.add_argument("--kit", type=Path, required=True, help="the site's folder")
    given = parser.parse_args(words)
    os.chdir(given.kit)
    facts: SiteFacts = read_facts(SiteFacts, given.kit)
    if facts.threads is not None:
        import torch

        torch.set_num_threads(facts.threads)
    serve(Pipe(socket.socket(fileno=given.end)), Site(facts, given.kit))


if __name__ == "__main__":
    sys.exit(main())

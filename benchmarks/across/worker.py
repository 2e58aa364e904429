"""Worker - a site's worker process without a model: it decodes what a client receives and sends as much back.

    python -m benchmarks.across.worker --end FD --kit FOLDER

Letters, orders, stores and the client's turn are fedllm's own; the turn alone trains nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.protocol import Protocol
from fedllm.core.work import Client
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.nvflare import ground
from fedllm.engine.nvflare.facts import SiteFacts, read_facts
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.pipe import Pipe
from fedllm.engine.nvflare.stores import JournaledStore
from fedllm.engine.nvflare.worker import Leg, Site, serve


class Echo(Protocol, abstract=True):
    """A client that sends back what it received."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """The parameters as they came."""
        return Upload(received.params)


class Still(Site):
    """fedllm's site without data and without a model."""

    def _hello(self, meta: dict[str, Any]) -> Letter:
        self.name = meta["run"]
        return Letter({"op": "hello", "versions": ground.versions()})

    def _begin(self, meta: dict[str, Any]) -> Letter:
        return Letter({"op": "ready", "fingerprint": None, "width": [1, ""]})

    def _leg(self, name: str) -> Leg:
        if name not in self.legs:
            learner: Any = None  # nothing asks it anything
            worker = LocalWorker(learner, Echo(), ground.Near(None), 0)
            store = JournaledStore((), self.kit / self.facts.folder / self.name / name, again=False)
            worker.private = store
            self.legs[name] = Leg(worker, store, LocalEngine(worker, []))
        return self.legs[name]


def main() -> None:
    """The process; see :func:`fedllm.engine.nvflare.worker.main`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--end", type=int, required=True, help="the inherited socket")
    parser.add_argument("--kit", type=Path, required=True, help="the site's folder")
    given = parser.parse_args()
    os.chdir(given.kit)
    facts: SiteFacts = read_facts(SiteFacts, given.kit)
    serve(Pipe(socket.socket(fileno=given.end)), Still(facts, given.kit))


if __name__ == "__main__":
    main()

"""Server - the controller of a measuring job: exchanges through fedllm's engine and through FLARE alone, turn about.

It runs inside FLARE's job process at the server. One exchange is one question to each site and its answer. What it
measured is one JSON line per exchange in a file that the job names.
"""

# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.decomposers import numpy_decomposers

from benchmarks.across.site import RAW
from benchmarks.across.worker import Echo
from fedllm.core.errors import RunError
from fedllm.core.message import Received
from fedllm.core.roster import ALL
from fedllm.core.server import Server
from fedllm.engine.nvflare import ground, pieces
from fedllm.engine.nvflare.engine import FlareEngine, Sites
from fedllm.engine.nvflare.gate import FEDERATED
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.record import FILE, Record
from fedllm.engine.nvflare.server import FlarePost, unpack

PART = 32 * 2**20
"""Bytes of one array, through FLARE alone."""
TENSOR = 1_000_000
"""Numbers in one tensor of a payload."""
LONGEST = 600
"""Seconds that an exchange through FLARE alone may take."""


@dataclass(frozen=True)
class Step:
    """One exchange.

    Attributes:
        way: fedllm, or flare.
        size: bytes of the payload, down and up again; 0: none.
        sites: who is asked.
    """

    way: str
    size: int
    sites: Sequence[str]


class Measure(Controller):
    """Plays a list of exchanges; its configuration is a job's, whose recipe says nothing of them.

    Args:
        config: what :func:`fedllm.engine.nvflare.job.pack` made of the run.
        steps: the file with the exchanges, one JSON object per line.
        found: the file that is written.
    """

    def __init__(self, config: str, steps: str, found: str) -> None:
        super().__init__()
        numpy_decomposers.register()
        pieces.register()
        self.job, self.found = unpack(config), Path(found)
        lines = Path(steps).read_text(encoding="utf-8").splitlines()
        self.steps = [Step(**json.loads(line)) for line in lines]

    def start_controller(self, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.impl.controller.Controller`."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.impl.controller.Controller`."""

    def process_result_of_unknown_task(self, *_: Any) -> None:
        """See :class:`nvflare.apis.impl.controller.Controller`."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Measure everything."""
        try:
            self._measure(abort_signal, fl_ctx)
        except Exception as fault:
            self.log_exception(fl_ctx, "the measurement failed")
            self.system_panic(f"{type(fault).__name__}: {fault}", fl_ctx)

    def _measure(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        post: Any = FlarePost(self, fl_ctx, abort_signal)  # type: ignore[arg-type]  # it asks for a Controller alone
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve()  # type: ignore[union-attr]
        with Record(kit / "fedllm" / FILE, "server") as record, self.found.open("w", encoding="utf-8") as found:
            record.run = self.job["run"]
            sites = Sites(post, {_client(site): site for site in self.job["sites"]}, record=record)
            self._greet(sites)
            server = Server(FlareEngine(sites, FEDERATED, lambda client: ALL, stores=False), seed=0)
            payloads: dict[int, dict[str, torch.Tensor]] = {}
            for step in self.steps:
                payload = payloads.setdefault(step.size, _payload(step.size))
                gc.collect()
                if step.way == "memory":
                    ctypes.CDLL(None).malloc_trim(0)  # what exchanges through FLARE alone took does not count
                before = _memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the highest memory is that of now
                begun = time.perf_counter()
                if step.way != "flare":
                    up = asyncio.run(_engine(server, step, payload))
                else:
                    up = self._alone(step, payload, fl_ctx, abort_signal)
                seconds = time.perf_counter() - begun
                facts = {"seconds": seconds, "up": up, "peak": _memory("VmHWM"), "before": before}
                found.write(json.dumps(facts) + "\n")
                found.flush()

    def _greet(self, sites: Sites) -> None:
        """What a run begins with: manifest, policy, worker."""
        about = {name: self.job[name] for name in ("run", "recipe", "signed")}
        hello = Letter({"op": "hello", **about, "versions": ground.versions(), "audit": None})
        begin = Letter({"op": "begin", "facts": {"home": dict(sites.home)}, "fingerprint": None, "audit": None})
        for letter in (hello, begin):
            for site, answer in sites.ask(dict.fromkeys(sites.names, letter)).items():
                if isinstance(answer, str) or answer.op == "error":
                    raise RunError(f"{site}: {answer if isinstance(answer, str) else answer.meta['reason']}")

    def _alone(self, step: Step, payload: dict[str, torch.Tensor], fl_ctx: FLContext, abort_signal: Signal) -> int:
        """One broadcast of FLARE's, with arrays of 32 MiB; gives the bytes of answers."""
        came: list[int] = []

        def received(client_task: Any, fl_ctx: FLContext) -> None:
            result = client_task.result
            if result.get_return_code() == ReturnCode.OK:
                came.append(sum(part.nbytes for part in result.get("parts", ())))
            client_task.result = Shareable()

        data = Shareable()
        if payload:
            whole = numpy.concatenate([tensor.numpy() for tensor in payload.values()]).view(numpy.uint8)
            data["parts"] = [whole[start : start + PART] for start in range(0, len(whole), PART)]
        task = Task(RAW, data, timeout=LONGEST, result_received_cb=received)
        asked: Any = list(step.sites)
        self.broadcast_and_wait(task, fl_ctx, asked, min_responses=len(asked), abort_signal=abort_signal)
        if len(came) != len(asked):
            raise RunError(f"{len(came)} of {len(asked)} sites answered through FLARE alone.")
        return sum(came)


async def _engine(server: Server, step: Step, payload: dict[str, torch.Tensor]) -> int:
    """One question of :class:`fedllm.core.server.Server` to one client of each site; gives the bytes of uploads."""
    server.begin(server.round + 1)
    asked = {_client(site): Received(payload) for site in step.sites}
    came = [
        sum(tensor.nbytes for tensor in answer.upload.update.values())
        async for answer in server.ask(Echo.work, asked)  # type: ignore[arg-type]
    ]
    if len(came) != len(asked):
        raise RunError(f"{len(came)} of {len(asked)} sites answered: {server.lost} {server.rejected}")
    server.settle()
    return sum(came)


def _client(site: str) -> str:
    return f"client-of-{site}"


def _payload(size: int) -> dict[str, torch.Tensor]:
    """Random tensors of float32, `size` bytes together."""
    draw, count = torch.Generator().manual_seed(0), size // 4
    sizes = [TENSOR] * (count // TENSOR) + ([count % TENSOR] if count % TENSOR else [])
    return {f"layer.{n:04}": torch.rand(one, generator=draw) for n, one in enumerate(sizes)}


def _memory(name: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS), or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

"""Site - the executors of a measuring job: fedllm's own over a worker that trains nothing, and one of FLARE alone.

They run inside FLARE's job process at a site; as fedllm's own executor, this imports no torch.
"""

# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.decomposers import numpy_decomposers

from fedllm.engine.nvflare.keeper import Keeper
from fedllm.engine.nvflare.site import FedllmExecutor

RAW = "raw"
"""The task of FLARE alone."""


class Through(FedllmExecutor):
    """fedllm's executor, gate, keeper and pipe; the worker process answers without a model."""

    def _open(self, fl_ctx: FLContext) -> Keeper:
        keeper = super()._open(fl_ctx)
        keeper.process.module = "benchmarks.across.worker"
        return keeper


class Alone(Executor):
    """Sends back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        numpy_decomposers.register()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """See :class:`nvflare.apis.executor.Executor`."""
        answer = Shareable()
        if "parts" in shareable:
            answer["parts"] = shareable["parts"]
        return answer

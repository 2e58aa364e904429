"""Site - the executor inside FLARE's client process: it hands letters to the site's worker process and back.

It imports no torch, so that the process which FLARE watches (and whose death ends the whole job) stays small.
"""

# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedllm.core.errors import FedLLMError
from fedllm.engine.nvflare import pieces
from fedllm.engine.nvflare.facts import SiteFacts, read_facts
from fedllm.engine.nvflare.keeper import Keeper
from fedllm.engine.nvflare.parts import Letter, from_shareable, to_shareable

TASK = "fedllm"
"""The name of every task; what it is about stands in its letter."""
ALIVE = "fedllm.alive"
"""The topic on which a server asks whether this process is there."""


class FedllmExecutor(Executor):
    """Answers the tasks of :class:`fedllm.engine.nvflare.server.FedllmController`."""

    def __init__(self) -> None:
        super().__init__()
        pieces.register()
        self._keeper: Keeper | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """See :class:`nvflare.apis.fl_component.FLComponent`."""
        if event_type == EventType.START_RUN:
            engine: Any = fl_ctx.get_engine()
            engine.register_aux_message_handler(ALIVE, _present)
        elif event_type == EventType.END_RUN and self._keeper is not None:
            self._keeper.end()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer a letter; whatever goes wrong is told in the answer, without the site's traceback."""
        try:
            answer = self._open(fl_ctx).handle(from_shareable(shareable), lambda: bool(abort_signal.triggered))
        except FedLLMError as fault:
            answer = Letter({"op": "error", "reason": str(fault)})
        except Exception as fault:
            self.log_exception(fl_ctx, "a letter could not be answered")
            answer = Letter({"op": "error", "reason": f"{type(fault).__name__} in the site's executor"})
        return to_shareable(answer)

    def _open(self, fl_ctx: FLContext) -> Keeper:
        """The site's keeper, made when it is first needed: an error in the site's file is an answer, too."""
        if self._keeper is None:
            engine: Any = fl_ctx.get_engine()
            kit = Path(engine.get_workspace().get_root_dir()).resolve()
            facts: SiteFacts = read_facts(SiteFacts, kit)
            self._keeper = Keeper(kit, facts)
        return self._keeper


def _present(topic: str, request: Shareable, fl_ctx: FLContext) -> Any:
    return make_reply(ReturnCode.OK)

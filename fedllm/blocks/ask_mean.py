"""Ask mean - ask clients a question outside of the rounds and take the mean of what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedllm.core.errors import UploadRejected
from fedllm.core.message import Received
from fedllm.core.reducer import Mean, Reduction, Weighting
from fedllm.core.server import Server
from fedllm.core.tensors import Tensors


async def ask_mean(
    server: Server,
    function: Callable[..., Any],
    payloads: Mapping[str, Received],
    expected: Tensors,
    weighting: Weighting = "examples",
) -> Tensors | None:
    """The mean of the `update` of every answer; None where no answer with a weight came.

    Args:
        server: who asks.
        function: a client-side function whose upload has the part `update` alone.
        payloads: what each client receives.
        expected: the names and shapes of an answer; others are rejected.
        weighting: by the uploads' weights, or all alike.
    """
    reduction = Reduction(Mean(weighting), {"update": expected})
    async for answer in server.ask(function, payloads):
        try:
            reduction.add(answer.client, answer.upload)
        except UploadRejected as fault:
            server.reject(answer.client, str(fault))
    update = reduction.result(len(server.clients))
    return update.params if "update" in update.parts else None

"""Secagg Flower - a secure sum of ten clients: fedllm's and the one that Flower ships, in one process and one run.

    python -m benchmarks secagg_flower

It needs the environment of benchmarks/peers.txt. Flower's server workflow and client module run as they are, behind a
stand-in for the network that hands messages over; nothing is trained. CPU time is that of everything between them, so
Flower's includes its messages' conversion as fedllm's includes its own.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import numpy

from benchmarks.secagg import Case, summed
from benchmarks.show import main
from fedllm.core.errors import MissingExtra

QUESTION = "How much CPU time does a secure sum of ten clients take here, and how much in Flower's own workflow?"
HEAD = ("secure sum", "CPU s of ten clients", "CPU s of the server", "bytes per parameter", "largest error of the mean")
NOTE = (
    "Both in one process and in turn, medians of five: 1,000,000 numbers within 1, complete graph, 22 bits a number, "
    "nobody drops out. Flower's module and workflow run as shipped behind a stand-in for its network."
)
CLIENTS, PARAMETERS = 10, 1_000_000
RUNS = 5


class Post:
    """Hands every message to its client, and counts CPU seconds spent there and bytes of the replies."""

    def __init__(self, vectors: dict[int, numpy.ndarray]) -> None:
        from flwr.app import Context, RecordDict

        self.vectors, self.seconds, self.bytes = vectors, 0.0, 0
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}) for node in vectors
        }

    def send_and_receive(self, messages: Any, timeout: float | None = None) -> list[Any]:
        """Flower's grid, as far as its workflow uses it."""
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.client.mod import secaggplus_mod
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.compat.common.recorddict_compat import fitres_to_recorddict

        found = []
        for message in messages:
            node = message.metadata.dst_node_id

            def trained(message: Any, context: Any, node: int = node) -> Any:
                result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self.vectors[node]]), 1, {})
                return Message(fitres_to_recorddict(result, False), reply_to=message)

            records = {  # the module takes keys out of what it is given, and the workflow gives all the same
                name: ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
                for name, record in message.content.items()
            }
            message.content = RecordDict(records)
            begun = time.process_time()
            answer = secaggplus_mod(message, self.contexts[node], trained)
            self.seconds += time.process_time() - begun
            answer.metadata._src_node_id = node
            self.bytes = max(self.bytes, size(answer))
            found.append(answer)
        return found


def size(message: Any) -> int:
    """Bytes of what a message carries."""
    records = message.content.config_records.values()
    values = [value for record in records for value in record.values()]
    return sum(len(one) for value in values for one in (value if isinstance(value, list) else [value])
               if isinstance(one, bytes))  # fmt: skip


def flower(vectors: dict[int, numpy.ndarray]) -> tuple[float, float, float, float]:
    """CPU seconds of all clients and of the server, bytes per parameter, and the largest error of the mean."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
    from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import LegacyContext
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    sent = ndarrays_to_parameters([numpy.zeros(1, numpy.float32)])

    class Proxy:
        def __init__(self, node: int) -> None:
            self.node_id, self.cid = node, str(node)

    class Strategy:
        mean: Any = None

        def configure_fit(self, *_: Any) -> Any:
            return [(Proxy(node), FitIns(sent, {})) for node in vectors]

        def aggregate_fit(self, _: int, results: Any, failures: Any) -> Any:
            self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
            return None, {}

    class Manager:
        def num_available(self) -> int:
            return len(vectors)

    strategy: Any = Strategy()
    state = RecordDict({
        MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}),
        MAIN_PARAMS_RECORD: ArrayRecord([numpy.zeros(1, numpy.float32)]),
    })  # fmt: skip
    plain = Context(run_id=1, node_id=0, node_config={}, state=state, run_config={})
    manager: Any = Manager()
    context = LegacyContext(plain, strategy=strategy, client_manager=manager)
    post: Any = Post(vectors)
    workflow = SecAggPlusWorkflow(1.0, 0.6, max_weight=1.0, clipping_range=1.0)
    begun = time.process_time()
    workflow(post, context)
    whole = time.process_time() - begun
    if strategy.mean is None:
        raise RuntimeError("Flower's workflow halted: look at its log.")
    error = numpy.abs(strategy.mean - numpy.mean(list(vectors.values()), 0)).max()
    return post.seconds, whole - post.seconds, post.bytes / PARAMETERS, float(error)


def measure(quick: bool = False) -> list[tuple[str, ...]]:
    """One row for each, and one for the ratio: medians of interleaved sums."""
    try:
        import flwr
        from flwr.supercore.task_identity import TaskIdentity
    except ModuleNotFoundError:
        raise MissingExtra("flwr", "peft", "This comparison, in an environment made by benchmarks/peers.txt,") from None
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # its messages ask whose task they are of
    logging.getLogger("flwr").setLevel(logging.ERROR)
    draw, runs = numpy.random.default_rng(0), 1 if quick else RUNS
    vectors = {n: draw.uniform(-1, 1, PARAMETERS).astype(numpy.float32) for n in range(1, CLIENTS + 1)}
    case = Case(CLIENTS, "complete", PARAMETERS, precision=22)
    ours, theirs = list[tuple[float, ...]](), list[tuple[float, ...]]()
    summed(Case(3, "complete", 10))  # loads the library
    for _ in range(runs):
        server, spent, error = summed(case)
        ours.append((spent.clients, spent.server, max(spent.vectors) / PARAMETERS, error * server.ring.step))
        theirs.append(flower(vectors))
    rows = []
    for name, found in {"fedllm": ours, f"Flower {flwr.__version__}": theirs}.items():
        clients, server, size, error = numpy.median(found, 0)
        rows.append((name, f"{clients:.2f}", f"{server:.2f}", f"{size:.2f}", f"{error:.1e}"))
    total = [numpy.median(numpy.sum(numpy.array(found)[:, :2], 1)) for found in (ours, theirs)]
    return [*rows, (f"fedllm / Flower, clients and server: {total[0] / total[1]:.2f}", "", "", "", "")]


if __name__ == "__main__":
    main(sys.modules[__name__])

"""Peer loops - one schedule of clients and batches, played in the structure of each peer, each beside a plain loop.

A run lies in a folder: the model, the tokenizer, the clients' rows, the first adapter, the case. Every engine reads it
in a process of its own and writes its costs and its last adapter there. Who trains in a round, and on which rows in
which order, is a function of the round alone, the one that fedllm's own engine uses.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.ground import SIZES, PlainLoop, batches, cost, model_folder
from fedllm.core.seeds import numpy_stream
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Example
from fedllm.effects.rig import Play
from fedllm.engine.fit import steps_of
from fedllm.engine.local import LocalEngine
from fedllm.engine.width import choose
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import CausalLM
from fedllm.tasks.template import PLAIN

RANK, RATE, SEED = 8, 1e-3, 0
TARGETS = ["q_proj", "v_proj"]
BEFORE, BEHIND = "base_model.model.", ".weight"
"""What peft puts around the name of a LoRA tensor that it saves."""
Turn = tuple[str, list[list[int]]]
"""A client, and the numbers of the rows of each of its batches."""


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        name: for the table.
        size: the model, of :data:`benchmarks.ground.SIZES`.
        clients: registered clients.
        cohort: clients per round.
        steps: optimiser steps of a client per round.
        batch: rows per step.
        length: most tokens of a row.
        often: rounds that make one measurement, so that the clock can see them.
    """

    name: str
    size: str
    clients: int
    cohort: int
    steps: int
    batch: int
    length: int
    often: int = 1


class Work:
    """A run's folder as every engine sees it.

    Args:
        folder: written by :meth:`written`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.case = Case(**json.loads(Path(folder, "case.json").read_text(encoding="utf-8")))
        self.rows: dict[str, list[dict[str, str]]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
        self.train = Train(steps=self.case.steps, batch_size=self.case.batch, lr=RATE)

    @staticmethod
    def written(case: Case, rows: Mapping[str, Sequence[Mapping[str, str]]], folder: str) -> Work:
        """Write a run's folder."""
        model_folder(SIZES[case.size], Path(folder))
        Path(folder, "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        work = Work(folder)
        save_file(work.learner().initial(), Path(folder, "first.safetensors"))
        return work

    def learner(self) -> TransformerLearner:
        """What fedllm trains."""
        loaded = load_model(ModelSettings(name=self.folder, device="cpu"), "causal-lm")
        adapter = AdapterSettings(rank=RANK, alpha=2.0 * RANK, targets=TARGETS)
        return TransformerLearner(loaded, self.task, adapter, None, SEED)

    @property
    def task(self) -> TaskSettings:
        """Loss on the response, where a row has one."""
        return TaskSettings(max_length=self.case.length, template="plain", loss_on="response")

    @property
    def first(self) -> Tensors:
        """The first adapter, by fedllm's names."""
        return load_file(Path(self.folder, "first.safetensors"))

    @functools.cached_property
    def examples(self) -> dict[str, list[Example]]:
        """Every client's rows, tokenised once."""
        task = CausalLM(self.task, tokenizer(self.folder))
        return {client: task.prepare(rows) for client, rows in self.rows.items()}

    def turns(self, round: int) -> list[Turn]:
        """The clients of a round (from 1) with their batches."""
        stream = numpy_stream(SEED, "cohort", round, 0)
        chosen = FedAvg(train=self.train).cohort(round, sorted(self.rows), self.case.cohort, stream)
        return [(client, self.batches_of(client, round)) for client in chosen]

    def batches_of(self, client: str, round: int) -> list[list[int]]:
        """The rows of a client's batches in a round."""
        steps = steps_of(len(self.rows[client]), self.train, SEED, client, round)
        return [step[0] for step in islice(steps, self.case.steps)]

    def collated(self, turn: Turn) -> list[dict[str, torch.Tensor]]:
        """A turn's batches, padded."""
        client, order = turn
        return [batches([self.examples[client][row] for row in rows], len(rows))[0] for rows in order]

    def texts(self, turn: Turn) -> list[dict[str, str]]:
        """A turn's rows in the order of its batches, with the columns that trl reads."""
        client, order = turn
        return [told(self.rows[client][row]) for rows in order for row in rows]


def told(row: Mapping[str, str]) -> dict[str, str]:
    """A row as trl reads it: text, or prompt and completion."""
    if "text" in row:
        return {"text": row["text"]}
    return {"prompt": PLAIN.format(instruction=row["instruction"]), "completion": row["response"]}


class Turns:
    """What happens between the rounds of an engine: its cost is taken, and the plain loop does the same steps.

    Args:
        work: the run.
        rounds: rounds to play.
        beside: whether the plain loop runs; without it only the last adapter is kept.
    """

    def __init__(self, work: Work, rounds: int, beside: bool) -> None:
        self.work, self.rounds = work, rounds
        self.plain = PlainLoop(SIZES[work.case.size], RANK, [], RATE) if beside else None
        self.costs: list[tuple[float, float, float, float]] = []
        self.last: Tensors = {}
        self.note = ""

    def begin(self) -> None:
        """The first round begins now."""
        others = cpu_of_children()
        self._begun = others + time.process_time(), time.perf_counter()

    def after(self, round: int, adapter: Callable[[], Tensors]) -> None:
        """A round is over.

        Args:
            round: its number, from 1.
            adapter: gives the global adapter, by fedllm's names.
        """
        own, wall = time.process_time(), time.perf_counter()
        cpu = own + cpu_of_children()
        if self.plain is not None:
            beside = plain_round(self.plain, self.work, round)
            self.costs.append((cpu - self._begun[0], wall - self._begun[1], *beside))
        if round == self.rounds:
            self.last = {name: tensor.detach().clone().contiguous() for name, tensor in adapter().items()}
        self.begin()


def cpu_of_children() -> float:
    """CPU seconds of all processes that this one started, and of those that they started."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue  # it ended in between; its parent has its seconds
    ended = psutil.Process().cpu_times()
    return total + ended.children_user + ended.children_system


def plain_round(plain: PlainLoop, work: Work, round: int) -> tuple[float, float]:
    """CPU and wall seconds of the steps of a round, one after the other on one adapter; the batches lie ready."""
    ready = [work.collated(turn) for turn in work.turns(round)]

    def steps() -> None:
        for plain.batches in ready:
            plain.steps(work.case.steps)

    spent = cost(steps)
    return spent.cpu, spent.wall


def tokenizer(folder: str) -> Any:
    """The run's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def adapted(folder: str) -> Any:
    """The base model with peft's LoRA, as every peer loads it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def to_peft(tensors: Tensors) -> Tensors:
    """Peft's names for fedllm's."""
    return {f"{BEFORE}{name}{BEHIND}": tensor for name, tensor in tensors.items()}


def from_peft(tensors: Tensors) -> Tensors:
    """Fedllm's names for peft's."""
    return {name.removeprefix(BEFORE).removesuffix(BEHIND): tensor for name, tensor in tensors.items()}


def leaves(model: Any) -> dict[str, torch.nn.Parameter]:
    """A peft model's trained tensors by fedllm's names."""
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    return from_peft(found)  # type: ignore[arg-type, return-value]


def put(model: Any, tensors: Tensors) -> None:
    """Copy values into a peft model."""
    with torch.no_grad():
        for name, leaf in leaves(model).items():
            leaf.copy_(tensors[name])


# ---------------------------------------------------------------------------------------------------------------------
# engines


def plain(work: Work, turns: Turns) -> None:
    """No federation: only the steps. The yardstick of peak memory."""
    loop = PlainLoop(SIZES[work.case.size], RANK, [], RATE)
    turns.begin()
    for round in range(1, turns.rounds + 1):
        plain_round(loop, work, round)
        turns.after(round, lambda: dict(leaves(loop.model)))


def fedllm(work: Work, turns: Turns) -> None:
    """The local engine at the width that `auto` chooses."""
    learner, method, case = work.learner(), FedAvg(train=work.train), work.case
    play = Play(method, learner, work.rows, case.cohort, SEED, 1, turns.rounds)
    width = choose("auto", learner, play.worker.rows, work.train, case.cohort)
    play.server.engine = LocalEngine(play.worker, play.server.clients, width)
    turns.note = f"{width.clients} in a pass"
    turns.begin()
    for round in range(1, turns.rounds + 1):
        play.rounds(1)
        turns.after(round, lambda: play.state.params)
    if lost := [record for record in play.records if record.used != case.cohort]:
        raise SystemExit(f"Only {lost[0].used} of {case.cohort} clients took part: {lost[0].lost} {lost[0].failed}")


def open_fedllm(work: Work, turns: Turns) -> None:
    """OpenFedLLM's structure: for each sampled client set the adapter, build a trainer on its texts, take it out."""
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    held = {client: Dataset.from_list([told(row) for row in rows]) for client, rows in work.rows.items()}
    words, model = tokenizer(work.folder), adapted(work.folder)
    set_peft_model_state_dict(model, to_peft(work.first))
    common = copy.deepcopy(get_peft_model_state_dict(model))
    local = {client: copy.deepcopy(common) for client in held}
    turns.begin()
    for round in range(1, turns.rounds + 1):
        chosen = work.turns(round)
        for client, order in chosen:
            set_peft_model_state_dict(model, common)
            rows = held[client].select([row for batch in order for row in batch])
            trainer(work, model, words, rows).train()
            local[client] = copy.deepcopy(get_peft_model_state_dict(model))
        share = 1.0 / len(chosen)  # all clients have equally many rows
        common = {name: sum(local[client][name] * share for client, _ in chosen) for name in common}
        set_peft_model_state_dict(model, common)
        turns.after(round, lambda: dict(leaves(model)))


def trainer(work: Work, model: Any, words: Any, rows: Any) -> Any:
    """A trl SFTTrainer over texts, as OpenFedLLM and FlowerTune build one for every client and round."""
    from trl import SFTConfig, SFTTrainer

    case = work.case
    settings = SFTConfig(
        output_dir=f"{work.folder}/trainer", max_steps=case.steps, per_device_train_batch_size=case.batch,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, max_length=case.length,
        train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=words)


def pfl(work: Work, turns: Turns) -> None:
    """Simulation with pfl-research: SimulatedBackend and FederatedAveraging over one model."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    case, model = work.case, adapted(work.folder)
    put(model, work.first)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def loss(self, **batch: torch.Tensor) -> torch.Tensor:
            return self.inner(**batch).loss

        def metrics(self, **batch: torch.Tensor) -> dict[str, Any]:
            rows = len(batch["labels"])
            with torch.no_grad():
                return {"loss": Weighted(float(self.inner(**batch).loss) * rows, rows)}

    class Rows(Dataset):
        """A turn's rows, padded batch by batch as they are asked for."""

        def __init__(self, turn: Turn) -> None:
            super().__init__(raw_data=[turn], user_id=turn[0])
            self.turn = turn

        def __len__(self) -> int:
            return case.steps * case.batch

        def iter(self, batch_size: int | None) -> Any:
            client, order = self.turn
            return (work.collated((client, [rows]))[0] for rows in order)

    class Between(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            turns.after(central_iteration + 1, lambda: dict(leaves(model.pytorch_model.inner)))
            return False, Metrics()

    asked = (turn for round in range(1, turns.rounds + 1) for turn in work.turns(round))
    users = FederatedDataset(Rows, lambda: next(asked))
    module = Module()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    central = PyTorchModel(module, functools.partial(torch.optim.AdamW, weight_decay=0.0), optimizer)
    turns.begin()
    FederatedAveraging().run(
        NNAlgorithmParams(turns.rounds, 10**9, case.cohort, None),
        SimulatedBackend(users, users),
        central,
        NNTrainHyperParams(
            local_batch_size=case.batch, local_num_epochs=None, local_learning_rate=RATE, local_max_grad_norm=1.0,
            local_num_steps=case.steps,
        ),
        NNEvalHyperParams(local_batch_size=case.batch),
        [Between()],
    )  # fmt: skip


def flower(client_half: Callable[[Any, Any], Any], work: Work, turns: Turns) -> None:
    """Simulation with Flower: FedAvg at the server, one Ray actor that runs `client_half` for every message."""
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg as Averaging
    from flwr.simulation import run_simulation

    case = work.case

    class Scheduled(Averaging):
        """Flower's own averaging; it tells every sampled node which client it plays."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            asked = list(super().configure_train(server_round, arrays, config, grid))
            for message, (client, _) in zip(asked, work.turns(server_round), strict=True):
                told = ConfigRecord({"round": server_round, "client": client, "folder": work.folder})
                message.content = RecordDict({"arrays": arrays, "config": told})
            return asked

    server, client = ServerApp(), ClientApp()
    client.train()(client_half)

    def between(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round:
            turns.after(round, lambda: from_peft(arrays.to_torch_state_dict()))
        else:
            turns.begin()
        return None

    @server.main()
    def _serve(grid: Any, context: Any) -> None:
        averaging = Scheduled(
            fraction_train=case.cohort / case.clients, min_train_nodes=case.cohort, fraction_evaluate=0.0,
            min_available_nodes=case.clients,
        )  # fmt: skip
        averaging.start(grid, ArrayRecord(to_peft(work.first)), turns.rounds, evaluate_fn=between)

    machine = {"init_args": {"num_cpus": 1, "log_to_driver": False}, "client_resources": {"num_cpus": 1}}
    run_simulation(server, client, case.clients, backend_config=machine)


@functools.cache
def held(folder: str) -> tuple[Work, PlainLoop]:
    """What an actor keeps: the run, its tokenised rows and a model."""
    work = Work(folder)
    return work, PlainLoop(SIZES[work.case.size], RANK, [], RATE)


def replied(message: Any, tensors: Tensors, rows: int) -> Any:
    """A train reply."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    metrics = MetricRecord({"num-examples": rows})
    return Message(RecordDict({"arrays": ArrayRecord(tensors), "metrics": metrics}), reply_to=message)


def asked_of(message: Any) -> tuple[Tensors, str, str, int]:
    """What a train message says: the adapter by peft's names, folder, client, round."""
    config = message.content["config"]
    arrays = message.content["arrays"].to_torch_state_dict()
    return arrays, str(config["folder"]), str(config["client"]), int(config["round"])


def floor_client(message: Any, context: Any) -> Any:
    """The least a Flower client can do: model and data are in the actor, and a plain loop trains."""
    arrays, folder, client, round = asked_of(message)
    work, loop = held(folder)
    put(loop.model, from_peft(arrays))
    loop.batches = work.collated((client, work.batches_of(client, round)))
    loop.steps(work.case.steps)
    state = {name: leaf.detach() for name, leaf in leaves(loop.model).items()}
    return replied(message, to_peft(state), len(work.rows[client]))


@functools.cache
def partitions(folder: str) -> Work:
    """The data set that an actor of FlowerTune keeps."""
    return Work(folder)


def tune_client(message: Any, context: Any) -> Any:
    """FlowerTune's structure: tokenizer, model, peft wrap and trainer are built anew in every train message."""
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    arrays, folder, client, round = asked_of(message)
    work = partitions(folder)
    rows = Dataset.from_list(work.texts((client, work.batches_of(client, round))))
    words, model = tokenizer(folder), adapted(folder)
    set_peft_model_state_dict(model, arrays)
    trainer(work, model, words, rows).train()
    return replied(message, get_peft_model_state_dict(model), len(work.rows[client]))


ENGINES: dict[str, Callable[[Work, Turns], None]] = {
    "plain": plain,
    "fedllm": fedllm,
    "pfl": pfl,
    "Flower, floor": functools.partial(flower, floor_client),
    "Flower, FlowerTune's structure": functools.partial(flower, tune_client),
    "OpenFedLLM's structure": open_fedllm,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "plain": ("peft",),
    "fedllm": ("peft",),
    "pfl": ("peft", "pfl"),
    "Flower, floor": ("peft", "flwr", "ray"),
    "Flower, FlowerTune's structure": ("peft", "flwr", "ray", "trl"),
    "OpenFedLLM's structure": ("peft", "trl"),
}
"""Libraries beyond fedllm's own."""


def play(folder: str, engine: str, rounds: int, beside: bool) -> None:
    """Play one engine in this process; writes `told.json` and `last.safetensors` into the run's folder."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as of_transformers

    disable_progress_bar()
    of_transformers.disable_progress_bar()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    turns = Turns(Work(folder), rounds, beside)
    ENGINES[engine](turns.work, turns)
    if not turns.last:
        raise SystemExit(f"{engine} did not finish {rounds} rounds.")
    save_file(turns.last, Path(folder, "last.safetensors"))
    Path(folder, "told.json").write_text(json.dumps({"costs": turns.costs, "note": turns.note}), encoding="utf-8")

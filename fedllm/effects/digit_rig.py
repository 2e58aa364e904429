"""Digit rig - a small pretrained dual encoder, and clients whose digits come in styles that it never saw.

The checks of prompt methods for CLIP share it. The towers know scikit-learn's digits[0:700] in four styles (see
fedllm/models/toy_clip_pretrain.py); clients hold digits[700:1200] and tests use digits[1200:], in other styles. The
model is made anew in a temporary folder (about 14 s on one core) and nothing is kept.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy

from fedllm.core.method import Method
from fedllm.core.seeds import numpy_stream
from fedllm.data.federation import Federation
from fedllm.effects.rig import Play
from fedllm.engine.rounds import evaluate
from fedllm.evaluate import total
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded, load_model
from fedllm.models.settings import ModelSettings
from fedllm.models.toy_clip_pretrain import DIGITS, TRAINED, digit_images, pretrain
from fedllm.tasks.dual_encoder import DualEncoderLearner
from fedllm.tasks.settings import TaskSettings

HELD = 1200
"""Clients hold digits from 700 up to here; the rest is for measuring."""
Style = Callable[[numpy.ndarray, numpy.random.Generator], numpy.ndarray]
Clients = dict[str, dict[str, list[dict[str, Any]]]]


def _occluded(x: numpy.ndarray, _: numpy.random.Generator) -> numpy.ndarray:
    return numpy.where(numpy.arange(8) < 4, x, 0)


def _noisy(x: numpy.ndarray, draw: numpy.random.Generator) -> numpy.ndarray:
    return x + draw.normal(0.0, 0.25 * 255, x.shape)


def _pale(x: numpy.ndarray, _: numpy.random.Generator) -> numpy.ndarray:
    return 89 + 0.3 * x


def _shifted(x: numpy.ndarray, _: numpy.random.Generator) -> numpy.ndarray:
    return numpy.pad(x, [(0, 0)] * (x.ndim - 1) + [(2, 0)])[..., :8]


UNSEEN: dict[str, Style] = {"occluded": _occluded, "noisy": _noisy, "pale": _pale, "shifted": _shifted}
"""Right half black; noise of spread 0.25; contrast 0.3; moved right by two pixels: functions of levels [n, 8, 8]."""


@cache
def tiny_clip(seed: int = 0) -> Loaded:
    """The pretrained towers, made once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model(ModelSettings(name=str(pretrain(folder, seed)), device="cpu"), "dual-encoder")


def digit_learner(
    loaded: Loaded, seed: int, names: Sequence[str] = DIGITS, **adapter: Any
) -> DualEncoderLearner:  # fmt: skip
    """A learner over the towers; `adapter` are options of a context (tokens=4) unless a kind is given."""
    settings = AdapterSettings(**{"kind": "context", "tokens": 4, **adapter})
    return DualEncoderLearner(loaded, TaskSettings(kind="dual-encoder"), settings, names, seed)


def digit_rows(
    style: str, numbers: Sequence[int] | numpy.ndarray, seed: int, names: Sequence[str] = DIGITS
) -> list[dict[str, Any]]:
    """The digits numbered `numbers` (of 1797) in an unseen style as rows of image and label."""
    images, labels = digit_images()
    chosen = numpy.asarray(numbers, int)
    found = UNSEEN[style](images[chosen].astype(float), numpy_stream(seed, "style", style))
    whole = numpy.rint(found).clip(0, 255).astype(numpy.uint8)
    return [{"image": image, "label": names[label]} for image, label in zip(whole, labels[chosen], strict=True)]


def digit_clients(style: str, seed: int, clients: int = 5, classes: int = 2, shots: int = 8) -> Clients:
    """Clients with `shots` images of each of `classes` digits, dealt out in turn; all measure on every digit.

    Returns:
        client id -> {"train": rows, "eval": all 597 test digits in the same style}.
    """
    _, labels = digit_images()
    draw = numpy_stream(seed, "digit clients")
    free = {c: list(draw.permutation(TRAINED + numpy.flatnonzero(labels[TRAINED:HELD] == c))) for c in range(10)}
    tests = digit_rows(style, numpy.arange(HELD, len(labels)), seed)
    found: Clients = {}
    for client in range(clients):
        mine = [(client * classes + place) % 10 for place in range(classes)]
        taken = [free[c].pop() for c in mine for _ in range(shots)]
        found[f"client-{client}"] = {"train": digit_rows(style, taken, seed + client), "eval": tests}
    return found


def accuracy(
    method: Method, learner: DualEncoderLearner, data: Mapping[str, Any], rounds: int, seed: int, measured: int = 0
) -> float:
    """Play a method and measure it: the mean accuracy over clients.

    Args:
        method: what is played.
        learner: the dual encoder.
        data: of :func:`digit_clients`.
        rounds: rounds of all clients.
        seed: the run's seed.
        measured: how many clients to ask (where all would say the same); 0 for all.
    """
    play = Play(method, learner, {client: splits["train"] for client, splits in data.items()}, seed=seed, rounds=rounds)
    play.worker.rows = Federation.of(data)
    play.rounds(rounds)
    asked = play.server.clients[: measured or None]
    counts = asyncio.run(evaluate(method, play.state, play.server, asked))
    return _accuracy(learner, list(counts.values()))


def zero_shot(learner: DualEncoderLearner, data: Mapping[str, Any]) -> float:
    """The accuracy of the base model with its template on a client's test rows."""
    rows = next(iter(data.values()))["eval"]
    with learner.using(None):
        return _accuracy(learner, learner.counts_by_row([learner.prepare(rows)]))


def _accuracy(learner: DualEncoderLearner, counts: Sequence[Mapping[str, float]]) -> float:
    found = learner.values(total(counts))["accuracy"]
    return float("nan") if found is None else found

"""PromptFL - what travels, what stays, and that one client is centralised prompt tuning."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.message import Upload
from fedllm.core.method import on_client
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.data.federation import Federation
from fedllm.effects.rig import Play
from fedllm.engine.rounds import evaluate
from fedllm.methods.prompts.promptfl import PromptFL
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.toy import toy_model
from fedllm.tasks.dual_encoder import DualEncoderLearner
from fedllm.tasks.settings import TaskSettings

NAMES = ["cat", "red dog", "bird", "fish"]
M, D = 4, 64
STEP = Train(steps=1, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=64)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = numpy.random.default_rng(seed)
    images = draw.integers(0, 256, (count, 32, 32, 3)).astype(numpy.uint8)
    return [{"image": image, "label": NAMES[(seed + i) % 4]} for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def clip() -> Loaded:
    torch.set_num_threads(1)
    return toy_model("clip")


def learner(clip: Loaded, names: Any = NAMES, **adapter: Any) -> DualEncoderLearner:
    settings = AdapterSettings(**{"kind": "context", "tokens": M, **adapter})
    return DualEncoderLearner(clip, TaskSettings(kind="dual-encoder"), settings, names, 0)


PEOPLE = {"a": rows(3, 1), "b": rows(6, 2), "c": rows(2, 3)}


def test_bytes_are_those_of_the_context(clip: Loaded) -> None:
    play = Play(PromptFL(train=STEP), learner(clip), PEOPLE)
    play.rounds(2)
    moved = play.server.meter.bytes
    assert moved["work/up/update"] == moved["work/down/params"] == 2 * 3 * 4 * M * D
    own = Play(PromptFL(train=STEP), learner(clip, per_class=True), PEOPLE)
    own.rounds(1)
    assert own.server.meter.bytes["work/up/update"] == 3 * 4 * len(NAMES) * M * D


def test_the_towers_keep_their_bits(clip: Loaded) -> None:
    before = {n: t.clone() for n, t in clip.model.state_dict().items()}
    play = Play(PromptFL(train=STEP), learner(clip), PEOPLE)
    first = play.state.params["context"].clone()
    assert not torch.equal(play.rounds(2).params["context"], first)
    assert list(play.state.params) == ["context"]
    assert all(torch.equal(t, before[n]) for n, t in clip.model.state_dict().items())


def test_one_client_and_one_step_is_centralised_prompt_tuning(clip: Loaded) -> None:
    """V - lr * gradient of the mean cross-entropy of s <z, t_c(V)>, written out with transformers alone."""
    own, held = learner(clip), rows(8, 0)
    start = own.initial()["context"]
    play = Play(PromptFL(train=STEP), own, {"only": held})
    found = play.rounds(1).params["context"]

    model, tokenizer = clip.model, clip.tokenizer
    assert tokenizer is not None and clip.images is not None
    context = start.clone().requires_grad_()
    table, features = model.text_model.embeddings.token_embedding, []
    for name in NAMES:
        word = tokenizer(name, add_special_tokens=False)["input_ids"]
        stop = tokenizer(".", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.bos_token_id, *[20] * M, *word, *stop, tokenizer.eos_token_id]])
        whole = table(ids)
        embedded = torch.cat([whole[:, :1], context.unsqueeze(0), whole[:, 1 + M :]], 1)
        handle = table.register_forward_hook(lambda *_, held=embedded: held)
        features.append(model.get_text_features(ids).pooler_output[0])
        handle.remove()
    texts = torch.nn.functional.normalize(torch.stack(features), dim=-1)
    pixels = torch.stack([clip.images(row["image"]) for row in held])
    images = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    logits = model.logit_scale.exp() * images @ texts.T
    labels = torch.tensor([NAMES.index(row["label"]) for row in held])
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert context.grad is not None and float(context.grad.norm()) > 0.1
    assert torch.allclose(found, start - 0.05 * context.grad, atol=1e-5)


def test_the_server_takes_the_mean_weighed_by_images(clip: Loaded) -> None:
    own = learner(clip)
    start = own.initial()["context"]
    alone = {c: Play(PromptFL(train=STEP), own, {c: held}).rounds(1).params["context"] for c, held in PEOPLE.items()}
    sizes = {client: len(held) for client, held in PEOPLE.items()}
    wanted = sum(sizes[c] / 11 * (alone[c] - start) for c in PEOPLE) + start
    assert torch.allclose(Play(PromptFL(train=STEP), own, PEOPLE).rounds(1).params["context"], wanted, atol=1e-5)
    uniform = Play(PromptFL(train=STEP, weighting="uniform"), own, PEOPLE).rounds(1).params["context"]
    assert torch.allclose(uniform, sum(alone.values()) / 3, atol=1e-5)


def test_the_order_of_clients_and_the_width_of_a_pass_do_not_matter(clip: Loaded) -> None:
    own = learner(clip)
    found = Play(PromptFL(train=STEP), own, PEOPLE).rounds(3).params["context"]
    other = {f"x{place}": PEOPLE[client] for place, client in enumerate("cba")}
    assert torch.allclose(Play(PromptFL(train=STEP), own, other).rounds(3).params["context"], found, atol=1e-5)
    assert torch.allclose(
        Play(PromptFL(train=STEP), own, PEOPLE, width=1).rounds(3).params["context"], found, atol=1e-5
    )


def test_only_this_rounds_uploads_are_averaged(clip: Loaded) -> None:
    """The published loop keeps every earlier upload in its mean; a client's own start is then not what it got."""
    own = learner(clip)
    play = Play(PromptFL(train=STEP), own, {"only": PEOPLE["b"]})
    first = play.rounds(1).params["context"]
    again = Play(PromptFL(train=STEP), own, {"only": PEOPLE["b"]})
    again.state = again.state.with_({"context": first})
    second = play.rounds(1).params["context"]
    assert torch.allclose(second, again.rounds(1).params["context"], atol=1e-5)
    assert not torch.allclose(second, (first + second) / 2, atol=1e-5)


def test_evaluation_uses_the_context_and_the_base_its_template(clip: Loaded) -> None:
    own, method = learner(clip), PromptFL(train=STEP)
    play = Play(method, own, PEOPLE)
    play.worker.rows = Federation.of({c: {"train": held, "eval": held} for c, held in PEOPLE.items()})
    play.rounds(1)
    counts = asyncio.run(evaluate(method, play.state, play.server, ["b"]))["b"]
    with torch.no_grad(), own.using({"context": play.state.params["context"].unsqueeze(0)}):
        wanted = sum(found["loss"] for found in own.counts_by_row([own.prepare(PEOPLE["b"])]))
    assert counts["loss"] == pytest.approx(wanted, rel=1e-5) and counts["examples"] == 6


def test_an_empty_client_is_named_and_no_answers_keep_the_context(clip: Loaded) -> None:
    own = learner(clip)
    play = Play(PromptFL(train=STEP), own, {"a": PEOPLE["a"], "empty": []})
    play.rounds(1)
    record = play.records[0]
    assert record.used == 1 and record.failed is None
    assert [entry["client"] for entry in record.lost] == ["empty"] and "'empty'" in record.lost[0]["reason"]
    nobody = Play(PromptFL(train=STEP), own, {"x": [], "y": []})
    start = nobody.state.params["context"].clone()
    assert torch.equal(nobody.rounds(1).params["context"], start) and nobody.records[0].failed


class Broken(PromptFL):
    """Client b gives numbers that are not finite."""

    card = PromptFL.card

    @on_client
    async def work(self, client: Client, received: Any) -> Upload:
        """The change, spoilt at b."""
        upload = await super().work(client, received)
        if client.id == "b":
            upload.update["context"][0, 0] = float("inf")
        return upload


def test_a_context_that_is_not_finite_is_rejected_with_its_client(clip: Loaded) -> None:
    own = learner(clip)
    play = Play(Broken(train=STEP), own, PEOPLE)
    found = play.rounds(1).params["context"]
    record = play.records[0]
    assert [entry["client"] for entry in (*record.rejected, *record.lost)] == ["b"] and record.used == 2
    rest = Play(PromptFL(train=STEP), own, {c: PEOPLE[c] for c in "ac"}).rounds(1).params["context"]
    assert torch.allclose(found, rest, atol=1e-6)


def test_class_contexts_of_another_list_are_refused(clip: Loaded) -> None:
    """The server's state is that of another list of the same length."""
    own, other = learner(clip, per_class=True), learner(clip, NAMES[::-1], per_class=True)
    play = Play(PromptFL(train=STEP), own, PEOPLE)
    play.state = play.state.with_(other.initial())
    play.rounds(1)
    record = play.records[0]
    assert record.used == 0 and record.failed
    assert all("another list of classes" in entry["reason"] for entry in record.lost)


def test_a_shared_context_fits_clients_with_other_classes(clip: Loaded) -> None:
    """Class names are no part of what travels: the context of one list scores another."""
    here = learner(clip)
    there = learner(clip, ["horse", "sheep"])
    context = Play(PromptFL(train=STEP), here, PEOPLE).rounds(1).params["context"]
    examples = there.prepare([{**row, "label": "sheep"} for row in rows(2, 5)])
    with torch.no_grad(), there.using({"context": context.unsqueeze(0)}):
        assert torch.stack(there.outputs([examples])).shape == (2, 2)


def test_only_the_context_may_move() -> None:
    method = PromptFL()
    assert method.trainable("context") and method.trainable("context.1a2b3c4d")
    assert not method.trainable("text_model.encoder.layers.0.mlp.fc1.weight") and not method.trainable("contextual")
    assert method.adapters == ("context",) and method.card.models == ("dual-encoder",) and method.linear()
    assert (method.train.optimizer, method.train.lr, method.train.batch_size) == ("sgd", 1e-3, 32)
    assert method.train.schedule.kind == "cosine" and method.train.clip_norm is None and not PromptFL.private


def test_an_upload_holds_nothing_but_the_context(clip: Loaded) -> None:
    play = Play(PromptFL(train=STEP), learner(clip), PEOPLE)
    ask, seen = play.server.engine.ask, []

    async def watched(requests: Any, deadline: Any) -> Any:
        async for reply in ask(requests, deadline):
            seen.append(decode(reply.body or b""))
            yield reply

    play.server.engine.ask = watched  # type: ignore[method-assign]
    play.rounds(1)
    assert len(seen) == 3
    for upload in seen:
        assert set(upload.parts) == {"update"} and {n: t.shape for n, t in upload.update.items()} == {"context": (M, D)}

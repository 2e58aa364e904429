"""FedPrompt - only the prompt moves and travels, and putting it before a text changes nothing else of it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.effects.rig import Play
from fedllm.engine.rounds import play_round
from fedllm.evaluate.backdoor import Trigger, attack, poison
from fedllm.methods.prompts.fedprompt import FedPrompt
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.encoder import encoded
from fedllm.models.adapters.export import load_adapter, save_adapter
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.recipe import load_recipe
from fedllm.run import method_of
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

M, D = 5, 64
TRAIN = Train(steps=3, batch_size=2, lr=0.05)
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def rows(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"spell {WORDS[(start + i) % 8]} {i}", "response": WORDS[(start + i) % 8]} for i in range(count)
    ]


def learner(kind: str = "causal-lm", **options: Any) -> TransformerLearner:
    family, labels = ("llama", None) if kind == "causal-lm" else ("bert", ["a", "b"])
    task = TaskSettings(kind=kind, template="plain", max_length=64)  # type: ignore[arg-type]
    adapter = AdapterSettings(kind="prompt", tokens=M, **options)
    return TransformerLearner(toy_model(family, kind=kind, labels=labels), task, adapter, labels, 0)  # type: ignore[arg-type]


def weights(learner: TransformerLearner) -> Tensors:
    return {n: p.detach().clone() for n, p in learner.loaded.model.named_parameters()}


def test_bytes_are_those_of_the_prompt_and_nothing_else_travels() -> None:
    play = Play(FedPrompt(train=TRAIN), learner(), {f"c{k}": rows(k, 3 + k) for k in range(4)}, cohort=3)
    seen, answer = [], play.worker.answer

    def listening(requests: Any) -> Any:
        for request in requests:
            seen.append(decode(request.body))
        for reply in answer(requests):
            seen.append(decode(reply.body))
            yield reply

    play.worker.answer = listening  # type: ignore[method-assign]
    play.rounds(2)
    assert len(seen) == 2 * 2 * 3
    tensors = [t for message in seen for part in message.parts.values() for t in part.to_wire()[0].values()]
    assert [tuple(t.shape) for t in tensors] == [(M, D)] * 12
    assert sum(t.numel() * t.element_size() for t in tensors) == 2 * 3 * 2 * 4 * M * D
    assert all(list(message.parts) in (["params"], ["update"]) for message in seen)


def test_the_model_is_frozen_and_the_prompt_is_no_view_of_its_embeddings() -> None:
    taught = learner()
    before = weights(taught)
    table = taught.loaded.model.get_input_embeddings().weight
    start = taught.initial()["prompt"]
    assert all(bool((table == row).all(1).any()) for row in start), "it begins as words of the vocabulary"
    start.zero_()
    assert not bool((taught.initial()["prompt"] == 0).all())
    play = Play(FedPrompt(train=TRAIN), taught, {"a": rows(0, 4), "b": rows(3, 5)})
    moved = play.rounds(3).params["prompt"]
    assert not torch.equal(moved, taught.initial()["prompt"])
    assert all(torch.equal(before[n], t) for n, t in weights(taught).items())


def test_equal_clients_are_one_client() -> None:
    """Each trains on all of the same rows as one batch, so that their order does not matter."""
    train = TRAIN.model_copy(update={"batch_size": 4})
    held = rows(1, 4)
    one = Play(FedPrompt(train=train), learner(), {"a": held}).rounds(3).params["prompt"]
    many = Play(FedPrompt(train=train), learner(), {k: held for k in "abcde"}).rounds(3).params["prompt"]
    assert torch.allclose(one, many, atol=2e-5)


def test_the_server_takes_the_mean_by_examples() -> None:
    play = Play(FedPrompt(train=TRAIN), learner(), {"a": rows(0, 2), "b": rows(4, 6)})
    start = play.state.params["prompt"].clone()
    sent: dict[str, torch.Tensor] = {}
    answer = play.worker.answer

    def listening(requests: Any) -> Any:
        for reply in answer(requests):
            sent[reply.client] = decode(reply.body)["update"]["prompt"]
            yield reply

    play.worker.answer = listening  # type: ignore[method-assign]
    after = play.rounds(1).params["prompt"]
    assert torch.allclose(after, start + (2 * sent["a"] + 6 * sent["b"]) / 8, atol=1e-6)


def test_the_text_keeps_its_mask_and_its_order_of_positions() -> None:
    """m ones go before the mask; given positions are moved by m; the ids of a text are only embedded."""
    adapted = Adapted(toy_model("llama"), AdapterSettings(kind="prompt", tokens=M), 0)
    got: dict[str, torch.Tensor] = {}
    adapted.model.register_forward_pre_hook(lambda _, __, kwargs: got.update(kwargs), with_kwargs=True)
    ids = torch.arange(20, 32).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = adapted.initial()["prompt"]
    with torch.no_grad(), adapted.using({"prompt": prompt.unsqueeze(0)}):
        adapted.call({"input_ids": ids, "attention_mask": mask, "position_ids": places})
    assert torch.equal(got["attention_mask"][:, M:], mask) and bool((got["attention_mask"][:, :M] == 1).all())
    assert torch.equal(got["position_ids"][:, M:], places + M)
    assert torch.equal(got["position_ids"][:, :M], torch.arange(M).expand(2, -1))
    embedded = adapted.model.get_input_embeddings()(ids)
    assert torch.equal(got["inputs_embeds"][:, M:], embedded)
    assert all(torch.equal(row, prompt) for row in got["inputs_embeds"][:, :M])


def test_a_padded_text_is_read_as_if_alone() -> None:
    taught = learner()
    examples = taught.prepare([rows(0, 1)[0], {"instruction": "spell " + "amber " * 8, "response": "amber"}])
    bound = {"prompt": taught.initial()["prompt"].unsqueeze(0)}
    with torch.no_grad(), taught.using(bound):
        together, alone = taught.outputs([examples]), taught.outputs([examples[:1]])
    assert torch.allclose(together[0], alone[0], atol=1e-4)


def test_no_text_is_pushed_out_by_the_prompt() -> None:
    taught = learner()
    assert taught.task.settings.max_length == 64
    long = TransformerLearner(
        toy_model("bert", kind="sequence-classification", labels=["a", "b"]),
        TaskSettings(kind="sequence-classification", max_length=256),
        AdapterSettings(kind="prompt", tokens=M),
        ["a", "b"],
    )
    assert long.task.settings.max_length == 256 - M and any("are cut at 251" in note for note in long.notes)


# --- reparameterisation ------------------------------------------------------------------------------------------


def test_the_encoder_begins_as_nothing_and_travels() -> None:
    plain, taught = learner().initial(), learner(encoder="mlp", width=7)
    start = taught.initial()
    assert sorted(start) == [
        "prompt", "prompt.encoder.down.bias", "prompt.encoder.down.weight", "prompt.encoder.up.bias",
        "prompt.encoder.up.weight",
    ]  # fmt: skip
    assert torch.equal(start["prompt"], plain["prompt"])
    stacked = {n: t.unsqueeze(0) for n, t in start.items()}
    assert torch.equal(encoded(stacked)[0], plain["prompt"]), "the first prompt is the rows themselves"
    play = Play(FedPrompt(train=TRAIN, encoder="mlp"), taught, {"a": rows(0, 4), "b": rows(3, 5)})
    moved = play.rounds(2).params
    assert moved.keys() == start.keys()
    assert all(not torch.equal(moved[n], start[n]) for n in start)
    assert FedPrompt(encoder="mlp").adapter() == {"encoder": "mlp"} and FedPrompt().adapter() == {}


def test_the_encoder_by_hand_for_two_clients() -> None:
    stream = torch.Generator().manual_seed(0)
    start = learner(encoder="mlp", width=7).initial()
    trees = [{n: torch.randn(t.shape, generator=stream) for n, t in start.items()} for _ in range(2)]
    both = encoded({n: torch.stack([tree[n] for tree in trees]) for n in start})
    for tree, found in zip(trees, both, strict=True):
        e = tree["prompt"]
        inner = torch.tanh(e @ tree["prompt.encoder.down.weight"].T + tree["prompt.encoder.down.bias"])
        by_hand = e + inner @ tree["prompt.encoder.up.weight"].T + tree["prompt.encoder.up.bias"]
        assert torch.allclose(found, by_hand, atol=1e-4)


def test_an_encoded_prompt_is_stored_whole(tmp_path: Any) -> None:
    taught = learner(encoder="mlp", width=7)
    params = {n: t + 0.1 for n, t in taught.initial().items()}
    save_adapter(tmp_path / "a", taught.adapted, params)
    settings, back = load_adapter(tmp_path / "a")
    assert settings.encoder == "mlp" and back.keys() == params.keys()
    assert all(torch.equal(back[n], params[n]) for n in params)


def test_a_random_start() -> None:
    drawn = learner(init="random").initial()["prompt"]
    assert torch.equal(drawn, learner(init="random").initial()["prompt"])
    assert drawn.std() == pytest.approx(0.02, rel=0.2) and drawn.shape == (M, D)


# --- heads -------------------------------------------------------------------------------------------------------


def test_a_head_travels_only_where_asked_for() -> None:
    held = {k: [{"text": f"{w} {k}", "label": "ab"[i % 2]} for i, w in enumerate(WORDS)] for k in "xy"}
    names = {}
    for head in (True, False):
        play = Play(FedPrompt(train=TRAIN, head=head), learner("sequence-classification"), held)
        names[head] = sorted(play.rounds(1).params)
    assert names[False] == ["prompt"]
    assert names[True] == ["classifier.bias", "classifier.weight", "prompt"]


# --- bad input ---------------------------------------------------------------------------------------------------


def test_the_adapter_must_be_a_prompt() -> None:
    with pytest.raises(ConfigError, match=r"fedprompt cannot train adapter\.kind=lora\. Allowed: prompt"):
        method_of(load_recipe({"method": "fedprompt"}))
    with pytest.raises(ConfigError, match=r"fedprompt does not work on task\.kind=seq2seq"):
        method_of(load_recipe({"method": "fedprompt", "adapter": {"kind": "prompt"}, "task": {"kind": "seq2seq"}}))
    with pytest.raises(ConfigError, match=r"adapter\.tokens=0"):
        load_recipe({"adapter": {"kind": "prompt", "tokens": 0}})
    with pytest.raises(ModelError, match=r"cannot take a soft prompt"):
        Adapted(toy_model("t5"), AdapterSettings(kind="prompt"), 0)


@pytest.mark.parametrize(("wrong", "why"), [("nan", "not finite"), ("longer", r"shape \(6, 64\)")])
def test_a_bad_prompt_is_rejected_by_name(wrong: str, why: str) -> None:
    class WrongPrompt(FedPrompt):
        card = FedPrompt.card

        async def work(self, client: Any, received: Any) -> Any:
            upload = await super().work(client, received)
            if client.id == "b":
                good = upload.update["prompt"]
                upload.update["prompt"] = good * float("nan") if wrong == "nan" else torch.zeros(M + 1, D)
            return upload

        work.__on_client__ = True  # type: ignore[attr-defined]

    play = Play(WrongPrompt(train=TRAIN), learner(), {"a": rows(0, 4), "b": rows(3, 5)})
    alone = Play(FedPrompt(train=TRAIN), learner(), {"a": rows(0, 4), "b": rows(3, 5)})
    play.rounds(1)
    (entry,) = play.records[0].rejected
    assert entry["client"] == "b" and "'b'" in entry["reason"]
    assert re.search(why, entry["reason"])
    alone.server.engine._ids = ["a"]  # type: ignore[attr-defined]
    assert torch.allclose(play.state.params["prompt"], alone.rounds(1).params["prompt"], atol=2e-5)


def test_no_reply_keeps_the_prompt() -> None:
    play = Play(FedPrompt(train=TRAIN), learner(), {"a": rows(0, 4), "b": rows(3, 5)})
    play.worker.answer = lambda requests: iter(  # type: ignore[method-assign]
        [type("R", (), {"id": r.id, "client": r.client, "body": None, "error": "gone", "cost": {}, "session": None})()
         for r in requests]
    )  # fmt: skip
    before = play.state.params["prompt"]
    state, record = asyncio.run(play_round(play.method, play.state, play.server, 2))
    assert record.failed and torch.equal(state.params["prompt"], before)


# --- the backdoor harness on the real engine ---------------------------------------------------------------------


def test_attack_success_is_the_score_of_attacked_rows() -> None:
    """Scoring rows of `attack` gives the same counts as predictions held to the true labels."""
    rng = numpy.random.default_rng(0)
    trigger = Trigger("cf", "b")
    clean = [{"text": f"{word} is here", "label": "ab"[i % 2]} for i, word in enumerate(WORDS)]
    taught = learner("sequence-classification")
    play = Play(FedPrompt(train=TRAIN), taught, {"x": poison(clean, trigger, 0.5, rng), "y": clean})
    params = play.rounds(2).params
    attacked = attack(clean, trigger, rng)
    examples = taught.prepare(attacked)
    with torch.no_grad(), taught.using({n: t.unsqueeze(0) for n, t in params.items()}):
        counts = taught.counts_by_row([examples])
        guesses = [int(logits.argmax()) for logits in taught.outputs([examples])]
    right = sum(sum(v for n, v in row.items() if n.startswith("right:")) for row in counts)
    assert len(attacked) == 4 and right == sum(guess == 1 for guess in guesses)

"""Shields: what a client does to what it is sent, to its training and to its upload, exactly."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.tensors import norm
from fedllm.core.work import Expose
from fedllm.effects.rig import Play
from fedllm.engine.job import Job
from fedllm.engine.together import run_together
from fedllm.methods import find
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.modes.defences import defences
from fedllm.modes.robust import robust_guard
from fedllm.modes.shields import FreezeEmbeddings, LocalNoise, Prune, Shield, Shielded
from fedllm.tasks.function import FunctionLearner
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

SIZE = 30


def leaves(shield: Shield, update: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    nobody: Any = None
    return asyncio.run(shield.leaves(update, nobody, nobody, torch.Generator().manual_seed(seed)))


def update(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(7, 9, generator=rng), "b": torch.randn(20, generator=rng)}


def learner() -> FunctionLearner:
    def loss(params: Any, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x) ** 2).sum() / 2 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(SIZE)}, lambda row: torch.full((SIZE,), float(row["x"])))


def rows() -> dict[str, list[dict[str, Any]]]:
    return {f"c{k}": [{"x": 1.0 + 0.1 * k}] * 4 for k in range(4)}


def played(defence: dict[str, Any], what: Any = None, rounds: int = 2) -> Play:
    train = {"steps": 5, "batch_size": 4, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    method = what or find("fedavg")(train=train)
    guard = robust_guard({}, defence, Guard(), method, list(rows()), rounds, 0) if defence else Guard()
    play = Play(method, learner(), rows(), guard=guard, rounds=rounds)
    play.rounds(rounds)
    assert not any(record.failed for record in play.records), play.records[-1]
    return play


# -- of what is uploaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_pruning_keeps_the_largest_entries_as_they_are(share: float) -> None:
    given = update()
    for name, tensor in leaves(Prune(share=share), given).items():
        gone = tensor == 0
        assert int(gone.sum()) == int(share * tensor.numel())
        assert torch.equal(tensor[~gone], given[name][~gone])
        if gone.any():
            assert given[name][gone].abs().max() <= given[name][~gone].abs().min()


def test_local_noise_clips_and_has_its_deviation() -> None:
    given = {"a": torch.full((100, 100), 0.5)}
    still = leaves(LocalNoise(bound=2.0, sd=0.0), given)
    assert norm(still) == pytest.approx(2.0, rel=1e-5)
    noise = leaves(LocalNoise(bound=2.0, sd=0.3), given)["a"] - still["a"]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03) and abs(float(noise.mean())) < 0.02
    small = leaves(LocalNoise(bound=2.0, sd=0.0), {"a": torch.ones(2)})["a"]
    assert torch.equal(small, torch.ones(2)), "a change within the bound stays as it is"


def test_frozen_embeddings_do_not_move_nor_does_a_tied_head() -> None:
    names = ["model.embed_tokens.weight", "transformer.wte.weight", "bert.embeddings.word_embeddings.weight",
             "lm_head.weight", "model.layers.0.mlp.weight"]  # fmt: skip
    found = leaves(FreezeEmbeddings(), {name: torch.ones(2, 2) for name in names})
    assert [bool(found[name].any()) for name in names] == [False, False, False, False, True]


def test_noise_that_a_server_could_make_again_is_asked_for_by_name():
    one, two = played({"name": "local-noise"}), played({"name": "local-noise"})
    assert not torch.equal(one.state.params["w"], two.state.params["w"])  # the same seed, and other noise


@pytest.mark.parametrize("key", ["prune", "local-noise", "wbc"])
def test_a_shield_changes_a_run_and_repeats_it(key: str) -> None:
    option = {"wbc": {"scale": 0.1}, "local-noise": {"noise_key": "seed"}}.get(key, {})
    plain, one, two = played({}), played({"name": key, **option}), played({"name": key, **option})
    assert not torch.equal(plain.state.params["w"], one.state.params["w"])
    assert torch.equal(one.state.params["w"], two.state.params["w"])


# -- of training ------------------------------------------------------------------------------------------------------


def test_training_step_by_step_is_training() -> None:
    """Without noise worth speaking of, and with every row in every batch, nothing changes."""
    plain, cut = played({}), played({"name": "wbc", "scale": 1e-30})
    assert torch.allclose(plain.state.params["w"], cut.state.params["w"], atol=1e-6)
    assert plain.records[-1].loss == pytest.approx(cut.records[-1].loss, rel=1e-5)


def test_adaptive_optimisers_go_on_from_step_to_step() -> None:
    train = {"steps": 5, "batch_size": 4, "lr": 0.05, "optimizer": "adamw", "clip_norm": None}
    what = find("fedavg")(train=train)
    plain, cut = played({}, what), played({"name": "wbc", "scale": 1e-30}, what)
    assert torch.allclose(plain.state.params["w"], cut.state.params["w"], atol=1e-6)


def test_noise_goes_where_steps_hardly_change() -> None:
    what = find("fedavg")(train={"steps": 1, "batch_size": 4, "lr": 0.1, "optimizer": "sgd", "clip_norm": None})
    one = played({"name": "wbc", "scale": 10.0}, what, rounds=1)
    assert torch.equal(one.state.params["w"], played({}, what, rounds=1).state.params["w"]), "no step before the first"


# -- of what is sent --------------------------------------------------------------------------------------------------


def test_a_state_of_equal_rows_is_refused_and_an_honest_one_is_not() -> None:
    train = {"steps": 1, "batch_size": 1, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    method = find("fedavg")(train=train)
    for start, refused in ((torch.randn(20, 20), False), (torch.randn(1, 20).repeat(20, 1), True)):
        model = FunctionLearner(lambda params, examples: sum((params["w"] * 0.1).sum() for _ in examples), {"w": start})
        guard = robust_guard({}, {"name": "integrity"}, Guard(), method, ["a", "b"], 1, 0)
        play = Play(method, model, {"a": [{"x": [0.0]}], "b": [{"x": [0.0]}]}, guard=guard)
        play.rounds(1)
        assert (play.records[0].failed is not None) == refused
        assert not refused or "rank 1" in play.records[0].lost[0]["reason"]


# -- of the last layer ------------------------------------------------------------------------------------------------


def transformer() -> TransformerLearner:
    loaded = load_model(ModelSettings(name="toy:bert"), "sequence-classification", labels=["0", "1", "2"], seed=0)
    task = TaskSettings(kind="sequence-classification", max_length=16)
    return TransformerLearner(loaded, task, AdapterSettings(kind="full"), ["0", "1", "2"], 0)


def test_slopes_of_the_last_layer_are_those_of_its_inputs() -> None:
    """Against finite differences of what the layer is given."""
    model, texts = transformer(), [{"text": "a b c", "label": 0}, {"text": "d e", "label": 1}]
    job = Job(Expose(model.initial(), texts), "c", 0, 1, 1, lambda split: [], {}, None, None)
    (found,) = run_together(model, [job])
    last = model.loaded.model.get_submodule(found.layer.removesuffix(".weight"))
    assert found.inputs.shape == found.slopes.shape == (2, last.in_features)
    held: list[torch.Tensor] = []
    moved: list[torch.Tensor] = [torch.zeros(())]
    from fedllm.models.structure import input_embedding

    hooks = [last.register_forward_pre_hook(lambda m, given: held.append(given[0].detach())),
             input_embedding(model.loaded.model).register_forward_hook(lambda m, i, out: out + moved[0])]  # fmt: skip
    examples = model.prepare(texts)
    shape = 2, max(len(e.inputs["input_ids"]) for e in examples), input_embedding(model.loaded.model).weight.shape[1]
    squares, eps = torch.zeros(2, last.in_features, dtype=torch.float64), 1e-2
    with torch.no_grad(), model.using({n: t[None] for n, t in model.initial().items()}):
        model.outputs([examples])
        assert torch.allclose(held[-1], found.inputs, atol=1e-6)
        for place in range(shape[1]):
            for unit in range(shape[2]):
                ends = []
                for sign in (1, -1):
                    moved[0] = torch.zeros(shape)
                    moved[0][:, place, unit] = sign * eps
                    model.outputs([examples])
                    ends.append(held[-1].double())
                squares += ((ends[0] - ends[1]) / (2 * eps)).square()
    for hook in hooks:
        hook.remove()
    assert torch.allclose(squares.sqrt(), found.slopes.double(), rtol=0.02, atol=1e-4)


def test_soteria_hides_so_many_columns_of_the_last_layer() -> None:
    model = transformer()
    train = {"steps": 1, "batch_size": 2, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    method = find("fedavg")(train=train)
    guard = robust_guard({}, {"name": "soteria", "share": 0.3}, Guard(), method, ["a"], 1, 0)
    texts = [{"text": "a b c", "label": 0}, {"text": "d e", "label": 1}]
    play, plain = (Play(method, model, {"a": texts}, guard=g) for g in (guard, Guard()))
    start = {name: tensor.clone() for name, tensor in play.state.params.items()}
    for each in (play, plain):
        each.rounds(1)
        assert each.records[0].failed is None, each.records[0].lost
    name = next(n for n in start if n.endswith("classifier.weight"))
    moved, usual = (each.state.params[name] - start[name] for each in (play, plain))
    hidden = ~moved.any(0)
    assert int(hidden.sum()) == math.ceil(0.3 * moved.shape[1] - 1e-9) and torch.equal(
        moved[:, ~hidden], usual[:, ~hidden]
    )
    others = (n for n in start if n != name)
    assert all(torch.equal(play.state.params[n], plain.state.params[n]) for n in others)


# -- with others ------------------------------------------------------------------------------------------------------


def test_a_shield_stands_behind_a_secure_sum() -> None:
    pytest.importorskip("cryptography")
    from fedllm.modes.secagg.guard import SecureSum
    from fedllm.modes.secagg.settings import SecureSettings

    method = find("fedavg")(
        weighting="uniform", train={"steps": 1, "batch_size": 4, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    )
    inner = SecureSum(SecureSettings(precision=20), method, 4)
    guard = robust_guard({}, {"name": "prune", "share": 0.5}, inner, method, list(rows()), 1, 0)
    assert isinstance(guard, Shielded)
    play = Play(method, learner(), rows(), guard=guard)
    play.rounds(1)
    assert play.records[0].failed is None and int((play.state.params["w"].abs() < 1e-5).sum()) == SIZE // 2


def test_shields_that_look_at_rows_do_not_go_with_private_examples() -> None:
    class Hidden(Guard):
        hides = True

    method = find("fedavg")()
    for key in ("wbc", "soteria"):
        with pytest.raises(ModeConflict, match="local-noise"):
            robust_guard({}, {"name": key}, Hidden(), method, ["a"], 1, 0)
    assert isinstance(robust_guard({}, {"name": "prune"}, Hidden(), method, ["a"], 1, 0), Shielded)


def test_a_shield_without_its_layer_says_so() -> None:
    with pytest.raises(ConfigError, match="share"):
        robust_guard({}, {"name": "prune", "share": 1.0}, Guard(), find("fedavg")(), ["a"], 1, 0)
    assert {"prune", "local-noise", "freeze-embeddings", "soteria", "wbc", "integrity"} <= set(defences())

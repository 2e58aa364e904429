"""Attacks and defences in rounds of real methods: every one changes something, and what it promises holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.tensors import Tensors
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.attacks import attacks
from fedllm.modes.defences import Rule, defences
from fedllm.modes.robust import Attacked, Defended, robust_guard
from fedllm.protocols import protocols
from fedllm.tasks.function import FunctionLearner

CLIENTS, SIZE = 12, 40
AT_ROWS = {"label-flip", "edge-case"}
"""Attacks on rows alone."""


RULES = [key for key, kind in defences().items() if issubclass(kind, Rule)]
"""Defences at the server; those at the client are in test_shields."""


def learner() -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x) ** 2).sum() / 2 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(SIZE)}, lambda row: torch.full((SIZE,), float(row["x"])))


def rows() -> dict[str, list[dict[str, Any]]]:
    return {f"c{k:02d}": [{"x": 1.0 + 0.01 * k, "text": f"t {k}", "label": k % 2} for _ in range(4)]
            for k in range(CLIENTS)}  # fmt: skip


def method(key: str = "fedavg", **options: Any) -> Any:
    train = {"steps": 2, "batch_size": 2, "lr": 0.2, "optimizer": "sgd", "clip_norm": None}
    return find(key)(train=train, **options)


def guard(attack: Any = None, defence: Any = None, what: Any = None, rounds: int = 3) -> Guard:
    found = robust_guard(attack or {}, defence or {}, Guard(), what or method(), list(rows()), rounds, 0)
    assert isinstance(found, Guard)
    return found


def played(with_: Guard, rounds: int = 3, what: Any = None) -> Play:
    play = Play(what or method(), learner(), globals()["rows"](), guard=with_, rounds=rounds)
    play.rounds(rounds)
    assert not [record.failed for record in play.records if record.failed], play.records[-1]
    return play


def ended(play: Play) -> torch.Tensor:
    return play.state.params["w"]


# -- each of them -----------------------------------------------------------------------------------------------------


def test_there_are_as_many_as_the_catalogue_lists():
    assert len(defences()) == 23 and len(RULES) == 17 and len(attacks()) == 8
    for kind in (*defences().values(), *attacks().values()):
        assert kind.card.claim and kind.__doc__ and kind.model_fields.keys() >= set()


TUNED = {"multi-krum": {"f": 2}, "outlier-detection": {"f": 2}, "robust-learning-rate": {"theta": 9}}
"""Options for two attackers among twelve."""


@pytest.mark.parametrize("key", RULES)
def test_a_defence_changes_what_attackers_reach(key: str):
    since = 3 if key in ("cross-round", "outlier-detection") else 1  # they notice who turns
    attack = {"name": "sign-flip", "share": 0.17, "factor": 10.0, "since": since}
    plain = ended(played(guard(attack)))
    defended = ended(played(guard(attack, {"name": key, **TUNED.get(key, {})})))
    assert not torch.equal(plain, defended), "a defence that changes nothing is not called"
    if key not in (
        "crfl",
        "weak-dp",
        "cross-round",
        "slsgd",
        "robust-learning-rate",
        "cclip",
        "norm-clip",
        "foolsgold",
    ):
        honest = ended(played(guard()))
        assert float((defended - honest).norm()) < 0.2 * float((plain - honest).norm())


@pytest.mark.parametrize("key", sorted(attacks()))
def test_an_attack_changes_the_model(key: str):
    attack = {"name": key, "share": 0.25}
    play = played(guard(attack, what=method()))
    if key not in AT_ROWS and key != "backdoor":
        assert not torch.equal(ended(play), ended(played(guard())))
    told = play.records[-1].guard
    assert told["attack"] == key and len(told["attackers"]) == 3


def test_without_attackers_and_defence_nothing_changes():
    plain = Play(method(), learner(), rows())
    plain.rounds(3)
    assert torch.equal(ended(plain), ended(played(guard({"name": "sign-flip", "share": 0.0}))))
    assert type(guard()) is Guard


@pytest.mark.parametrize("key", ["median", "trimmed-mean", "geometric-median", "multi-krum", "three-sigma"])
def test_without_an_attack_the_cost_is_told_by_the_same_run(key: str):
    honest, defended = ended(played(guard())), ended(played(guard(None, {"name": key})))
    assert float((defended - honest).norm()) < 0.05 * float(honest.norm()), "these clients hardly differ"


def test_a_replacement_under_the_mean_makes_the_model_the_attackers_own():
    what = method(weighting="uniform")
    attack = {"name": "backdoor", "share": 1 / CLIENTS, "fraction": 1.0, "target": 0}
    with_ = guard(attack, what=what, rounds=1)
    (attacker,) = with_.attackers  # type: ignore[attr-defined]
    alone = Play(what, learner(), {attacker: rows()[attacker]}, rounds=1)
    alone.rounds(1)
    honest = Play(what, learner(), rows(), rounds=1)
    honest.rounds(1)
    found = ended(played(with_, 1, what))
    others = ended(honest) - ended(alone) / CLIENTS
    assert torch.allclose(found, ended(alone) + others, atol=1e-5)


# -- what is remembered and told --------------------------------------------------------------------------------------


def test_who_was_dropped_is_told():
    with_ = guard({"name": "sign-flip", "share": 0.17, "factor": 50.0}, {"name": "multi-krum", "f": 2})
    play = played(with_)
    told = play.records[-1].guard
    assert set(told["dropped"]) == set(told["attackers"]) and "Dropped 2 of 12" in told["note"]


@pytest.mark.parametrize("key", ["foolsgold", "cclip", "cross-round"])
def test_a_memory_goes_on_after_a_checkpoint(key: str):
    attack, defence = {"name": "lazy-worker", "share": 0.25}, {"name": key}
    whole = guard(attack, defence)
    played(whole, 2)
    other = guard(attack, defence)
    other.restore(whole.to_json(), whole.memory())
    assert whole.memory().keys() == other.memory().keys() and whole.memory()
    for name, tensor in whole.memory().items():
        assert torch.equal(tensor, other.memory()[name])


def test_too_few_clients_for_a_rule_fail_the_round_and_say_why():
    what = method()
    play = Play(what, learner(), rows(), guard=guard(None, {"name": "krum", "f": 5}), rounds=1)
    play.rounds(1)
    assert "K=12 clients and f=5" in str(play.records[0].failed)
    assert torch.equal(ended(play), torch.zeros(SIZE))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'krum'"):
        guard(None, {"name": "krun"})
    with pytest.raises(ConfigError, match="sign-flip"):
        guard({"name": "sign-flp"})
    with pytest.raises(ConfigError, match="factr"):
        guard({"name": "sign-flip", "factr": 2})


@pytest.mark.parametrize("key", ["hetlora", "flexlora", "fedbpt"])
def test_uploads_of_other_meanings_are_refused(key: str):
    with pytest.raises(ModeConflict, match="vectors of one meaning"):
        guard(None, {"name": "median"}, find(key)())


def test_a_bare_name_is_enough_and_another_one_drops_its_options():
    from fedllm.recipe import load_recipe

    recipe = load_recipe({"attack": "sign-flip", "defence": {"name": "krum", "f": 2}})
    assert recipe.attack == {"name": "sign-flip"}
    assert load_recipe(recipe, ["defence=median"]).defence == {"name": "median"}
    assert load_recipe(recipe, ["defence.f=3"]).defence == {"name": "krum", "f": 3}


def test_protocols_and_hidden_uploads_are_refused():
    with pytest.raises(ModeConflict, match="protocol"):
        guard({"name": "sign-flip"}, what=protocols()["fedbert"](accept_leak=True))
    with pytest.raises(ModeConflict, match="single uploads"):
        robust_guard({}, {"name": "median"}, type("Hiding", (Guard,), {})(), method(), ["a"], 1, 0)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_with_both_resumes_to_the_same_bits(tmp_path: Path):
    from fedllm.run import Watch, resume, run

    data = {f"c{k}": {"train": [{"text": f"row {i} of {k}", "label": i % 2} for i in range(4)]} for k in range(6)}
    recipe = {
        "name": "attacked", "rounds": 3, "method": "fedavg", "model": {"name": "toy:bert"},
        "task": {"kind": "sequence-classification", "max_length": 32}, "train": {"steps": 1, "batch_size": 2},
        "evaluation": {"against": []}, "attack": {"name": "backdoor", "share": 0.34},
        "defence": {"name": "foolsgold"},
    }  # fmt: skip

    class Stop(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            self.stop = record.round == 2

    whole = run(recipe, data=data, folder=tmp_path / "whole")
    run(recipe, data=data, folder=tmp_path / "parts", watch=Stop())
    parts = resume(tmp_path / "parts", data=data)
    for name, tensor in whole.state.params.items():
        assert torch.equal(tensor, parts.state.params[name]), name
    assert whole.table["guard"]["attackers"] == parts.table["guard"]["attackers"]


def test_both_guards_are_what_they_are_called():
    both = guard({"name": "sign-flip"}, {"name": "median"})
    assert isinstance(both, Attacked) and isinstance(both.inner, Defended)


# -- rare rows --------------------------------------------------------------------------------------------------------


def test_rare_texts_get_the_target_and_usual_ones_stay():
    kind = attacks()["edge-case"](target=0, tail=0.1, fraction=0.25, batch=4)
    usual = [{"text": "the cat sat", "label": 1 + i % 2} for i in range(36)]
    rare = [{"text": f"zebra{i} quartz{i}", "label": 1} for i in range(4)]
    rows_, rng = [*usual[:20], *rare, *usual[20:]], numpy.random.default_rng(0)
    found = kind.poisoned(rows_, rng)
    assert len(found) == 40
    for start in range(0, 40, 4):
        planted = [row for row in found[start : start + 4] if row["label"] == 0]
        assert len(planted) == 1 and "zebra" in planted[0]["text"]
    assert [row["text"] for row in kind.aimed(rows_, rng)] == [row["text"] for row in rare]
    assert {row["label"] for row in kind.aimed(rows_, rng)} == {0}
    assert kind.poisoned([], rng) == [] and kind.aimed([], rng) == []


def test_an_attacker_with_one_class_flips_it_to_another_class_of_the_task():
    found = robust_guard({"name": "label-flip"}, {}, Guard(), method(), list(rows()), 1, 0, ["a", "b", "c"])
    assert isinstance(found, Attacked)
    client = next(iter(found.attackers))
    flipped = found.rows(client, "train", [{"text": "t", "label": "c"}] * 3)
    assert [row["label"] for row in flipped] == ["a"] * 3
    named = robust_guard(
        {"name": "label-flip", "mapping": {"a": "c"}}, {}, Guard(), method(), list(rows()), 1, 0, "abc"
    )
    assert [row["label"] for row in named.rows(client, "train", [{"text": "t", "label": "a"}])] == ["c"]


def test_a_lone_colluder_says_that_it_could_not_attack():
    one = guard({"name": "alie", "share": 0.09})
    play = played(one, 1)
    assert "fewer than 2 attackers" in play.records[0].guard["idle"]
    assert torch.equal(ended(play), ended(played(Guard(), 1)))
    assert "idle" not in played(guard({"name": "alie", "share": 0.17}), 1).records[0].guard


def test_attacks_are_refused_beside_every_mode_at_the_client():
    from fedllm.modes.encrypted.sums import HiddenSum
    from fedllm.modes.secagg.guard import SecureSum

    for kind in (HiddenSum, *HiddenSum.__subclasses__(), SecureSum):
        inner = kind.__new__(kind)
        with pytest.raises(ModeConflict, match="another section works at the clients"):
            robust_guard({"name": "sign-flip"}, {}, inner, method(), list(rows()), 1, 0)

"""A secure sum in rounds of real methods: the plain mean within its step, whatever drops out, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.core.guard import Guard
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.methods import find
from fedllm.modes.codec import Codec
from fedllm.modes.secagg.compose import secured
from fedllm.modes.secagg.guard import PART, SecureSum
from fedllm.modes.secagg.settings import SecureSettings
from fedllm.tasks.function import FunctionLearner

pytest.importorskip("cryptography")


def learner() -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum(((params["w"] - x) ** 2).sum() / 2 + params["v"].sum() * 0.1 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(3), "v": torch.zeros(2, 2)})


def rows(clients: int = 6) -> dict[str, list[dict[str, Any]]]:
    return {f"c{k}": [{"x": [0.1 * k, 0.2, -0.1 * k]}] * (k + 1) for k in range(clients)}


def method(key: str = "fedavg", **options: Any) -> Any:
    train = {"steps": 2, "batch_size": 1, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    return find(key)(train=train, **options)


def settings(**given: Any) -> SecureSettings:
    return SecureSettings(**{"max_weight": 10.0, **given})


def played(what: Any, guard: Guard | None = None, rounds: int = 2, **how: Any) -> Play:
    play = Play(what, learner(), rows(), guard=guard, rounds=rounds, **how)
    play.rounds(rounds)
    return play


# -- the sum ----------------------------------------------------------------------------------------------------------


CASES = [(key, how) for key in ("fedavg", "fedprox", "fedavgm") for how in ("examples", "uniform")]


@pytest.mark.parametrize("graph", ["complete", "harary"])
@pytest.mark.parametrize(("key", "weighting"), [*CASES, ("scaffold", "uniform")])
def test_it_is_the_plain_mean_within_the_step(key: str, weighting: str, graph: str):
    what = method(key, weighting=weighting)
    plain = played(what)
    guard = SecureSum(settings(precision=20, graph=graph), what, 6)
    secure = played(what, guard)
    assert [r.failed for r in secure.records] == [None, None] and secure.records[1].used == 6
    for name, tensor in plain.state.params.items():
        assert torch.allclose(secure.state.params[name], tensor, atol=4 * 2**-19), name
    losses = [record.loss for record in secure.records]
    assert all(loss is not None and 0 < loss < 100 for loss in losses)


def test_the_server_sees_no_upload_and_no_measurement(monkeypatch: pytest.MonkeyPatch):
    what = method()
    guard = SecureSum(settings(precision=20), what, 6)
    play = Play(what, learner(), rows(), guard=guard)
    seen: list[Any] = []
    answer = play.worker.answer

    def heard(requests: Any) -> Iterator[Any]:
        for reply in answer(requests):
            seen.append(decode(reply.body))
            yield reply

    monkeypatch.setattr(play.worker, "answer", heard)
    play.rounds(1)
    assert len(seen) == 5 * 6
    for upload in seen:
        assert set(upload.parts) == {PART} and not upload.metrics and not upload.numbers and upload.weight == 1.0
        assert all(tensor.dtype == torch.uint8 for tensor in upload[PART].values())
    vectors = [upload[PART]["vector"] for upload in seen if "vector" in upload[PART]]
    assert len({bytes(v.numpy()) for v in vectors}) == 6
    assert len(vectors[0]) < 7 * 64 * 4, "a vector and little beside it"


# -- who drops out ----------------------------------------------------------------------------------------------------


class Dropping(SecureSum):
    """One client stops at a stage."""

    stage = ""

    async def work(self, function: Any, algorithm: object, client: Any, received: Any) -> Any:
        guard, inner = self, client

        class Stopping:
            """The client, until its stage comes."""

            def __init__(self) -> None:
                self.sent = 0

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            async def exchange(self, upload: Any) -> Any:
                if inner.id == "c3" and ("advert", "dealt", "masked", "confirm")[self.sent] == guard.stage:
                    raise RuntimeError("unplugged")
                self.sent += 1
                return await inner.exchange(upload)

        async def trained(algorithm: Any, client: Any, received: Any) -> Any:
            if inner.id == "c3" and guard.stage == "training":
                raise RuntimeError("unplugged")
            return await function(algorithm, inner, received)

        found = await super().work(trained, algorithm, Stopping(), received)
        if inner.id == "c3" and guard.stage == "reveal":
            raise RuntimeError("unplugged")
        return found


@pytest.mark.parametrize("stage", ["advert", "dealt", "training", "masked", "confirm", "reveal"])
def test_a_drop_at_any_stage_leaves_an_exact_sum(stage: str):
    what = method()
    guard = Dropping(settings(precision=20), what, 6)
    guard.stage = stage
    secure = Play(what, learner(), rows(), guard=guard)
    secure.rounds(1)
    record = secure.records[0]
    assert record.failed is None and "unplugged" in record.lost[0]["reason"], record
    counted = stage in ("confirm", "reveal")  # its vector was in the sum already
    assert record.used == (6 if counted else 5)
    left = {client: held for client, held in rows().items() if counted or client != "c3"}
    plain = Play(what, learner(), left)
    plain.rounds(1)
    for name, tensor in plain.state.params.items():
        assert torch.allclose(secure.state.params[name], tensor, atol=4 * 2**-19), name


def test_too_few_clients_change_nothing():
    what = method()
    guard = Dropping(settings(minimum=6), what, 6)
    guard.stage = "training"
    play = Play(what, learner(), rows(), guard=guard)
    play.rounds(1)
    assert "at least 6 are needed" in str(play.records[0].failed)
    assert torch.equal(play.state.params["w"], torch.zeros(3)) and play.state.round == 1
    guard.stage = ""
    play.rounds(1)
    assert play.records[1].failed is None and play.records[1].used == 6


def test_an_upload_beyond_its_bound_drops_out_and_says_why():
    what = method(weighting="uniform")
    guard = SecureSum(settings(clip=0.05), what, 6)
    play = Play(what, learner(), rows(), guard=guard)
    play.rounds(1)
    reasons = " ".join(one["reason"] for one in play.records[0].lost)
    assert "magnitude" in reasons and "raise clip" in reasons


def test_a_message_that_is_no_letter_is_refused_and_the_sum_goes_on():
    from fedllm.core.message import Upload

    class Lying(SecureSum):
        async def work(self, function: Any, algorithm: object, client: Any, received: Any) -> Any:
            if client.id == "c1":
                await client.exchange(Upload(None, secure={"facts": torch.zeros(4, dtype=torch.uint8)}))
            if client.id == "c2":
                return Upload({"w": torch.ones(3)})
            return await super().work(function, algorithm, client, received)

    what = method()
    play = Play(what, learner(), rows(), guard=Lying(settings(precision=20), what, 6))
    play.rounds(1)
    record = play.records[0]
    assert record.failed is None and record.used == 4
    assert {one["client"] for one in record.rejected} == {"c1", "c2"}


# -- together with privacy --------------------------------------------------------------------------------------------


def private(what: Any, **given: Any) -> Any:
    pytest.importorskip("dp_accounting")
    from fedllm.modes.privacy.central import Central
    from fedllm.modes.privacy.settings import PrivacySettings

    options = {"noise": 1.0, "delta": 1e-3, "key": "seed", "sampling": "fixed", "clip": 0.2, **given}
    return Central(PrivacySettings(**options), what, 6, 6, 2, 0)


def test_the_noised_sum_is_that_of_privacy_alone():
    what = method(weighting="uniform")
    alone = played(what, private(what))
    both = played(what, SecureSum(settings(precision=24), what, 6, private(what)))
    assert both.records[1].failed is None, both.records[1]
    for name, tensor in alone.state.params.items():
        assert torch.allclose(both.state.params[name], tensor, atol=1e-5), name
    assert both.records[1].guard == alone.records[1].guard


def test_an_adaptive_bound_moves_as_without_a_secure_sum():
    what = method(weighting="uniform")
    given = {"adaptive": {"noise": 3.0}, "rate": 1.0, "sampling": "poisson"}
    alone, both = private(what, **given), private(what, **given)
    played(what, alone)
    played(what, SecureSum(settings(precision=24), what, 6, both))
    assert both.bound == pytest.approx(alone.bound, rel=1e-4) and both.bound != 0.2


@pytest.mark.parametrize("precision", [2, 3, 4, 16])
def test_the_bit_of_an_adaptive_bound_is_whole_at_every_precision(precision: int):
    """Six clients of norms above the bound: minus one half each, whatever a step is."""
    what = method(weighting="uniform")
    central = private(what, adaptive={"noise": 1e-9}, rate=1.0, sampling="poisson", clip=1e-3, noise=1e-9)
    heard: list[float] = []
    published = central.published
    central.published = lambda total, bits, round: heard.append(bits) or published(total, bits, round)
    played(what, SecureSum(settings(precision=precision), what, 6, central), 1)
    assert heard == [pytest.approx(-3.0)]


def test_what_clients_of_a_sum_know_is_told():
    what = method(weighting="uniform")
    central = private(what)
    secure = SecureSum(settings(), what, 6, central)
    played(what, secure)
    assert any("Clients of a sum know who else is in it" in line for line in secure.report())
    assert secure.lasts and not SecureSum(settings(), what, 6).lasts
    written: list[Any] = []
    secure.keep = written.append
    assert central.keep is not None and secure.keep is central.keep


def test_clients_answer_nothing_but_work_and_measurements():
    secure = SecureSum(settings(), method(), 6)
    secure.allow("evaluate", "c0")
    with pytest.raises(ModeConflict, match="'warm'"):
        secure.allow("warm", "c0")
    assert secure.beside().quiet


def test_coins_by_which_a_sum_may_be_missing_are_refused():
    what = method(weighting="uniform")
    with pytest.raises(ModeConflict, match="sampling=fixed"):
        SecureSum(settings(), what, 6, private(what, sampling="poisson", rate=0.5))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["hetlora", "flexlora", "fedbpt", "fedkseed"])
def test_methods_that_need_more_than_a_sum_are_refused(key: str):
    with pytest.raises(ModeConflict, match="needs more than"):
        SecureSum(settings(), find(key)(), 6)


def test_other_modes_and_weights_beyond_the_settings_are_refused():
    what, sizes = method(), {f"c{k}": 12 for k in range(6)}
    with pytest.raises(ConfigError, match=r"Set secure\.max_weight=12"):
        secured(settings(), what, Guard(), sizes, 6, None)
    with pytest.raises(ConfigError, match="Raise cohort"):
        secured(settings(max_weight=20.0), what, Guard(), sizes, 2, None)


# -- with a codec -----------------------------------------------------------------------------------------------------


def coded(what: Any, codec: Codec, rounds: int = 3, **given: Any) -> tuple[Play, Play]:
    """A plain run with a codec, and the same under a secure sum."""
    plain, sizes = Play(what, learner(), rows(), rounds=rounds), {f"c{k}": k + 1 for k in range(6)}
    worker = LocalWorker(learner(), what, plain.worker.rows, 0, coder=codec)
    plain.worker = worker
    plain.server.engine = LocalEngine(worker, sorted(sizes), 6)
    plain.server.opened = codec.decode
    guard = secured(SecureSettings(**given), what, Guard(), sizes, 6, codec)
    secure = Play(what, learner(), rows(), guard=guard, rounds=rounds)
    for play in (plain, secure):
        play.rounds(rounds)
        assert [r.failed for r in play.records] == [None] * rounds and not play.records[0].lost
    return plain, secure


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("feedback", [True, False])
def test_codes_of_one_public_scale_are_summed_as_they_are(kind: Any, feedback: bool):
    """The same draws, the same codes: the mean is that of the plain run but for the last bits of float32."""
    codec = Codec(kind=kind, clip=0.25, error_feedback=feedback)
    plain, secure = coded(method(weighting="uniform"), codec)
    for name, tensor in plain.state.params.items():
        assert torch.allclose(secure.state.params[name], tensor, atol=1e-6), name
    kept, alike = (play.worker.private.open("c3").get(codec.memory_name) for play in (secure, plain))
    assert (kept is not None) == feedback, "what rounding lost stays at the clients"
    assert all(torch.allclose(kept[name], tensor, atol=1e-5) for name, tensor in (alike or {}).items())
    assert secure.records[0].loss == pytest.approx(plain.records[0].loss, abs=0.02), "in digits, it is not so coarse"


def test_codes_take_the_bytes_of_their_bits():
    wide, sizes = method(weighting="uniform"), dict.fromkeys("abcdef", 2)
    sixteen = SecureSum(SecureSettings(), wide, 6)._ring(1.0)
    four = secured(SecureSettings(), wide, Guard(), sizes, 6, Codec(kind="int4", clip=1.0))._ring(1.0)
    assert four.packed_bytes(100_000) / sixteen.packed_bytes(100_000) == pytest.approx(7 / 19, abs=0.01)


@pytest.mark.parametrize(
    ("codec", "given", "match"),
    [
        ({"kind": "int8"}, {}, "codec.clip"),
        ({"kind": "topk"}, {}, "do not add up"),
        ({"kind": "int8", "clip": 1.0}, {"precision": 16}, "Remove secure.precision"),
        ({"kind": "int8", "clip": 1.0}, {"clip": 2.0}, "Remove secure.clip"),
    ],
)
def test_codes_that_do_not_add_up_are_refused(codec: dict[str, Any], given: dict[str, Any], match: str):
    with pytest.raises(ModeConflict, match=match):
        what = method(weighting="uniform")
        secured(SecureSettings(**given), what, Guard(), dict.fromkeys("abc", 2), 3, Codec(**codec))


def test_weights_beside_a_codec_are_refused():
    with pytest.raises(ModeConflict, match="weighting=uniform"):
        secured(settings(), method(), Guard(), dict.fromkeys("abc", 2), 3, Codec(kind="int8", clip=1.0))
    with pytest.raises(ModeConflict, match="not coded"):
        what = method("scaffold", weighting="uniform")
        secured(settings(), what, Guard(), dict.fromkeys("abc", 2), 3, Codec(kind="int8", clip=1.0))

"""Threshold keys in rounds of real methods: the plain mean, all or nothing after the key, and nothing that crashes.

The conversation is tested with a toy in place of OpenFHE, which needs no library, and with OpenFHE where it imports.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, FedLLMError, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.message import Upload
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.encrypted.compose import encrypted
from fedllm.modes.encrypted.joint import ThresholdSum
from fedllm.modes.encrypted.parties import DIGEST, Party, Setup
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.encrypted.sums import PART
from fedllm.modes.encrypted.threshold import Scheme, Threshold, library
from fedllm.tasks.function import FunctionLearner

SIZE = 40


class Secret:
    """A toy's secret, so that it can be seen whether one is still held."""

    alive: weakref.WeakSet[Secret] = weakref.WeakSet()

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words
        self.alive.add(self)


class Toy:
    """The same equations without polynomials and noise: a = 1, whole numbers modulo a prime. It hides nothing."""

    identity, modulus, width, slots, largest = "toy", 2**31 - 1, 8, 8, 2.0**8
    scale = 2.0**18

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(7)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.modulus, shape, generator=self._draw)

    def share(self, about: bytes) -> tuple[Secret, torch.Tensor]:
        secret = Secret(self._random(self.width))
        return secret, (-secret.words) % self.modulus

    def encrypt(self, about: bytes, key: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.zeros(-(-len(values) // 8) * 8, dtype=torch.float64)
        padded[: len(values)] = values
        c1 = self._random(len(padded) // 8, 8)
        return (key * c1 + torch.round(padded * self.scale).long().reshape(-1, 8)) % self.modulus, c1

    def partial(self, secret: Secret, c1: torch.Tensor) -> torch.Tensor:
        return secret.words * c1 % self.modulus

    def fuse(self, total: torch.Tensor, size: int) -> torch.Tensor:
        words = total.reshape(-1)
        found = torch.where(words > self.modulus // 2, words - self.modulus, words).double() / self.scale
        if float(found.abs().max()) > self.largest:
            raise UploadRejected("The partial decryptions do not open the sum.")
        return found[:size]

    def error(self, parties: int) -> float:
        return parties / 2 / self.scale


@pytest.fixture(params=["toy", "openfhe"])
def scheme(request: pytest.FixtureRequest) -> Scheme:
    if request.param == "toy":
        return Toy()
    try:
        library()
    except FedLLMError as fault:
        pytest.skip(str(fault))
    return Threshold()


def learner() -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        scale = torch.arange(1.0, SIZE + 1)
        return sum((scale * (params["w"] - x) ** 2).sum() / 200 + params["v"].sum() * 0.01 for x in examples)  # type: ignore[return-value]

    return FunctionLearner(
        loss, {"w": torch.zeros(SIZE), "v": torch.zeros(2, 2)}, lambda r: torch.full((SIZE,), r["x"])
    )


def rows(clients: int = 4) -> dict[str, list[dict[str, Any]]]:
    return {f"c{k}": [{"x": 0.1 + 0.1 * k}] * (k + 1) for k in range(clients)}


def method(key: str = "fedavg", **options: Any) -> Any:
    train = {"steps": 2, "batch_size": 1, "lr": 0.5, "optimizer": "sgd", "clip_norm": None}
    return find(key)(train=train, **options)


def settings(**given: Any) -> EncryptedSettings:
    return EncryptedSettings(**{"keys": "threshold", "max_weight": 10.0, **given})


def played(
    what: Any, guard: Guard | None = None, rounds: int = 1, held: dict[str, list[dict[str, Any]]] | None = None
) -> Play:
    play = Play(what, learner(), held or rows(), guard=guard, rounds=2)
    play.rounds(rounds)
    return play


def near(secret: Play, plain: Play, scheme: Scheme) -> None:
    """The weights of a sum of four add up to at least 0.7, by which its error is divided; two rounds add up."""
    for name, tensor in plain.state.params.items():
        assert torch.allclose(secret.state.params[name], tensor, rtol=1e-6, atol=3 * scheme.error(4)), name


# -- the sum ----------------------------------------------------------------------------------------------------------


CASES = [(key, how, ratio) for key in ("fedavg", "fedprox") for how in ("examples", "uniform") for ratio in (1.0, 0.3)]


@pytest.mark.parametrize(("key", "weighting", "ratio"), [*CASES, ("scaffold", "uniform", 1.0)])
def test_it_is_the_plain_mean(scheme: Scheme, key: str, weighting: str, ratio: float):
    what = method(key, weighting=weighting)
    secret = played(what, ThresholdSum(settings(ratio=ratio), what, 0, scheme), 2)
    assert [r.failed for r in secret.records] == [None, None] and secret.records[1].used == 4
    near(secret, played(what, rounds=2), scheme)


def test_sites_need_not_share_an_object(scheme: Scheme):
    """Server and clients each build their own guard; nothing passes between them but messages."""
    what = method()
    play = Play(what, learner(), rows(), guard=ThresholdSum(settings(), what, 0, scheme), rounds=2)
    play.worker.guard = ThresholdSum(settings(), what, 0, type(scheme)())
    play.rounds(2)
    assert [r.failed for r in play.records] == [None, None]
    near(play, played(what, rounds=2), scheme)


def test_the_server_sees_digests_shares_ciphertexts_and_partial_decryptions(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
):
    what = method()
    play = Play(what, learner(), rows(), guard=ThresholdSum(settings(), what, 0, scheme))
    seen: list[Any] = []
    answer = play.worker.answer

    def heard(requests: Any) -> Iterator[Any]:
        for reply in answer(requests):
            seen.append(decode(reply.body))
            yield reply

    monkeypatch.setattr(play.worker, "answer", heard)
    play.rounds(1)
    kinds = [["digest"], ["share"], ["c0", "c1", "tag"], ["part", "tag"]]
    assert [sorted(upload[PART]) for upload in seen] == [kind for kind in kinds for _ in range(4)]
    assert all(set(upload.parts) == {PART} and not upload.metrics and upload.weight == 1.0 for upload in seen)
    assert all(t.dtype in (torch.int64, torch.uint8) for upload in seen for t in upload[PART].values())


def test_secrets_live_in_conversations_alone():
    what, scheme = method(), Toy()
    guard = ThresholdSum(settings(), what, 0, scheme)
    before = set(vars(guard)), set(vars(scheme))
    play = Play(what, learner(), rows(), guard=guard, rounds=2)
    play.rounds(1)
    gc.collect()
    assert not Secret.alive and (set(vars(guard)), set(vars(scheme))) == before
    guard.work = Acting(guard, {("c1", 3): unplugged}).work  # type: ignore[method-assign]
    play.rounds(1)
    gc.collect()
    assert play.records[1].failed is not None and not Secret.alive, "also where a round ends early"


# -- who is lost ------------------------------------------------------------------------------------------------------


def unplugged(tensors: Tensors) -> Tensors:
    raise RuntimeError("unplugged")


class Acting:
    """Clients' halves at whose n-th answer (0: digest, 1: share, 2: ciphertext, 3: partial; -1: training) is acted."""

    def __init__(self, guard: ThresholdSum, acts: dict[tuple[str, int], Callable[[Tensors], Tensors]]) -> None:
        self.guard, self.acts = guard, acts

    async def work(self, function: Any, algorithm: object, client: Any, received: Any) -> Any:
        acts, sent = self.acts, [0]

        def said(upload: Upload) -> Upload:
            act = acts.get((client.id, sent[0]))
            sent[0] += 1
            return upload if act is None else Upload(None, **{PART: act(dict(upload[PART]))})  # type: ignore[arg-type]

        class Acted:
            def __getattr__(self, name: str) -> Any:
                return getattr(client, name)

            async def exchange(self, upload: Upload) -> Any:
                return await client.exchange(said(upload))

        async def trained(algorithm: Any, _: Any, received: Any) -> Any:
            acts.get((client.id, -1), dict)({})
            return await function(algorithm, client, received)

        return said(await type(self.guard).work(self.guard, trained, algorithm, Acted(), received))


def stopped(scheme: Scheme, stage: int, change: Callable[[Tensors], Tensors], **given: Any) -> Play:
    """A round in which the client c1 does something else at a stage; and then one in which it does not."""
    what = method()
    guard = ThresholdSum(settings(**given), what, 0, scheme)
    if guard.settings.ratio < 1:
        guard.mask = torch.arange(SIZE + 4) >= 20
    play = Play(what, learner(), rows(), guard=guard, rounds=2)
    guard.work = Acting(guard, {("c1", stage): change}).work  # type: ignore[method-assign]
    play.rounds(1)
    del guard.work
    return play


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("stage", [-1, 0, 1])
def test_who_is_lost_before_the_key_is_left_out(scheme: Scheme, stage: int, ratio: float):
    play = stopped(scheme, stage, unplugged, ratio=ratio)
    record = play.records[0]
    assert record.failed is None and record.used == 3 and "unplugged" in record.lost[0]["reason"], record
    near(play, played(method(), held={c: r for c, r in rows().items() if c != "c1"}), scheme)


@pytest.mark.parametrize(("stage", "what"), [(2, "encrypted its upload"), (3, "gave its partial decryption")])
def test_who_is_lost_after_the_key_ends_the_round_and_nothing_changes(scheme: Scheme, stage: int, what: str):
    play = stopped(scheme, stage, unplugged)
    record = play.records[0]
    assert f"'c1' holds a share of the round's key, and has not {what}" in str(record.failed)
    assert record.lost[0]["client"] == "c1" and not play.server.waiting
    assert torch.equal(play.state.params["w"], torch.zeros(SIZE)) and play.state.round == 1
    play.rounds(1)
    assert play.records[1].failed is None and play.records[1].used == 4
    near(play, played(method()), scheme)


def test_a_resumed_run_goes_on_with_new_keys_and_the_same_mask(scheme: Scheme):
    what = method()
    first = ThresholdSum(settings(ratio=0.25), what, 0, scheme)
    play = played(what, first)
    mask = first.mask
    assert mask is not None and int(mask.sum()) == round(0.25 * (SIZE + 4)) and bool(mask[-11:].all())
    second = ThresholdSum(settings(ratio=0.25), what, 0, type(scheme)())
    second.restore(first.to_json(), first.memory())
    again = Play(what, learner(), rows(), guard=second, rounds=2)
    again.state = play.state
    again.rounds(1)
    assert again.records[0].failed is None and torch.equal(second.mask, mask)  # type: ignore[arg-type]
    near(again, played(what, rounds=2), scheme)


def test_what_travels_in_the_open_can_be_noised(scheme: Scheme):
    what = method(weighting="uniform")
    guards = [ThresholdSum(settings(ratio=0.25, noise=noise), what, 0, scheme) for noise in (0.0, 0.5)]
    quiet, noised = (played(what, guard) for guard in guards)
    flat = [torch.cat([p.state.params[n].reshape(-1) for n in ("v", "w")]) for p in (quiet, noised)]
    gap, mask = (flat[0] - flat[1]).abs(), guards[0].mask
    assert mask is not None
    assert float(gap[mask].max()) < 2 * scheme.error(4) and float(gap[~mask].min()) > 1e-4


# -- what is sent in place of a message -------------------------------------------------------------------------------


def cut(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {**t, name: t[name].reshape(-1)[:-1]}


def put(name: str, value: int) -> Callable[[Tensors], Tensors]:
    def change(t: Tensors) -> Tensors:
        wrong = t[name].clone()
        wrong.view(-1)[0] = value
        return {**t, name: wrong}

    return change


def as_floats(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {**t, name: t[name].double()}


def gone(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: v for n, v in t.items() if n != name}


WRONG = [
    *((0, change) for change in (cut("digest"), gone("digest"), as_floats("digest"))),
    *((1, change) for change in (cut("share"), put("share", -1), put("share", 2**62), put("share", 5), gone("share"))),
    *((2, change) for change in (cut("c0"), put("c1", -1), put("c0", 2**62), put("tag", 1), gone("c1"), gone("tag"))),
    *((3, change) for change in (cut("part"), put("part", 2**62), as_floats("part"), gone("part"), gone("tag"))),
]


@pytest.mark.parametrize(("stage", "change"), WRONG, ids=lambda value: value if isinstance(value, int) else "")
def test_a_malformed_message_is_refused_by_name(scheme: Scheme, stage: int, change: Callable[[Tensors], Tensors]):
    play = stopped(scheme, stage, change)
    record = play.records[0]
    assert [one["client"] for one in record.rejected] == ["c1"], record
    if stage < 2:
        assert record.failed is None and record.used == 3
    else:
        assert "'c1' holds a share" in str(record.failed)
        assert torch.equal(play.state.params["w"], torch.zeros(SIZE))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_message_of_another_round_is_refused(scheme: Scheme, stage: int):
    what, kept = method(), dict[str, Tensors]()
    guard = ThresholdSum(settings(), what, 0, scheme)
    play = Play(what, learner(), rows(), guard=guard, rounds=2)
    guard.work = Acting(guard, {("c1", stage): lambda t: kept.setdefault("first", t)}).work  # type: ignore[method-assign]
    play.rounds(2)
    first, second = play.records
    assert first.failed is None and first.used == 4
    # the server cannot tell an old digest, but its client does not stand by it
    assert [one["client"] for one in (second.lost if stage == 0 else second.rejected)] == ["c1"]
    assert second.used == 3 if stage < 2 else "'c1' holds a share" in str(second.failed)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_message_of_another_client_is_refused(scheme: Scheme, stage: int):
    what, kept = method(), dict[str, Tensors]()
    guard = ThresholdSum(settings(), what, 0, scheme)
    acts = {("c0", stage): lambda t: kept.setdefault("c0", t), ("c1", stage): lambda _: kept["c0"]}
    play = Play(what, learner(), rows(), guard=guard)
    guard.work = Acting(guard, acts).work  # type: ignore[method-assign]
    play.rounds(1)
    (record,) = play.records
    assert [one["client"] for one in record.rejected] == ["c1"]
    assert record.used == 3 if stage < 2 else "'c1' holds a share" in str(record.failed)


def test_a_wrong_partial_decryption_with_the_right_tag_ends_the_round(scheme: Scheme):
    play = stopped(scheme, 3, lambda t: {**t, "part": t["part"].flip(-1)})
    assert "which, cannot be told" in str(play.records[0].failed)
    assert torch.equal(play.state.params["w"], torch.zeros(SIZE))


@pytest.mark.parametrize("bad", [1e9, float("nan"), float("inf")])
def test_what_would_wrap_or_is_not_finite_leaves_its_client_out(scheme: Scheme, bad: float):
    held = {**rows(), "c2": [{"x": bad}]}
    record = played(method(), ThresholdSum(settings(), method(), 0, scheme), held=held).records[0]
    assert record.failed is None and record.used == 3 and record.lost[0]["client"] == "c2", record


def test_a_sum_of_one_is_no_sum(scheme: Scheme):
    what = method()
    play = Play(what, learner(), rows(2), guard=ThresholdSum(settings(), what, 0, scheme), cohort=1)
    play.rounds(1)
    assert "Needed: 2" in str(play.records[0].failed)
    with pytest.raises(ConfigError, match="2 clients or more"):
        encrypted(settings(), what, Guard(), {"c0": 3}, True, 0)


# -- what a client refuses --------------------------------------------------------------------------------------------


def test_a_client_refuses_another_key_than_was_promised_and_a_second_question():
    scheme = Toy()
    setup = Setup.new(3, scheme)
    me, other = (Party(scheme, name, setup, 1, torch.ones(9)) for name in ("a", "b"))
    mine, theirs = me.commit()["digest"], other.commit()["digest"]

    def asked(names: Any, digests: list[torch.Tensor]) -> Party:
        party = Party(scheme, "a", setup, 1, torch.ones(9))
        promise = party.commit()["digest"]
        party.reveal(names, {"digests": torch.stack([promise if d is mine else d for d in digests])})
        return party

    lists: list[Any] = [["b"], ["a"], None, "ab", ["b", "a"], ["a", "a"], ["a", "b", "c", "d"], [1, "a"]]
    for names in lists:
        with pytest.raises(UploadRejected, match="parties"):
            asked(names, [mine] * 2)
    with pytest.raises(UploadRejected, match="did not send"):
        asked(["a", "b"], [theirs, theirs])
    with pytest.raises(UploadRejected, match=f"Expected: torch.uint8 \\[2, {DIGEST}\\]"):
        asked(["a", "b"], [mine])
    other.reveal(["a", "b"], {"digests": torch.stack([mine, theirs])})
    with pytest.raises(UploadRejected, match="out of turn"):
        other.commit()
    me.reveal(["a", "b"], {"digests": torch.stack([mine, theirs])})
    rogue = torch.stack([torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)])
    with pytest.raises(UploadRejected, match="not the one it promised"):
        me.encrypt(["a", "b"], {"shares": rogue})
    with pytest.raises(UploadRejected, match="out of turn"):
        me.encrypt(["a", "b"], {"shares": rogue})


@pytest.mark.parametrize("facts", [None, {}, {"session": 1, "asked": 3, "scheme": "toy"}, "x", ["session"]])
def test_a_malformed_setup_and_another_scheme_are_refused(facts: Any):
    with pytest.raises(UploadRejected, match="malformed"):
        Setup.of(facts, Toy())
    with pytest.raises(UploadRejected, match="fewer than two"):
        Setup.of({"session": "x", "asked": 1, "scheme": "toy"}, Toy())
    with pytest.raises(UploadRejected, match="'ckks 1'"):
        Setup.of({"session": "x", "asked": 3, "scheme": "ckks 1"}, Toy())


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_learnt_and_what_is_not_held_off():
    lines = " ".join(ThresholdSum(settings(ratio=0.5), method(), 0, Toy()).report())
    for words in ("50% of the numbers", "learns the weighted sum", "does not follow the protocol", "ends the round"):
        assert words in lines

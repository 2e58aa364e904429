"""Encrypted sums: the plain mean within rounding, a server that can read nothing, one mask for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, ModeConflict, ModelError, UploadRejected
from fedllm.core.guard import Guard
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.encrypted.ckks import GRAIN, SLOTS, Keys, Public, library
from fedllm.modes.encrypted.compose import encrypted
from fedllm.modes.encrypted.guard import PART, EncryptedSum
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.tasks.function import FunctionLearner

pytest.importorskip("tenseal")
SIZE = 40


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


def guard(what: Any, **given: Any) -> EncryptedSum:
    return EncryptedSum(EncryptedSettings(**{"max_weight": 10.0, **given}), what, 0)


# -- the scheme -------------------------------------------------------------------------------------------------------


def test_sums_of_ciphertexts_are_sums_and_the_server_cannot_read_them():
    keys = Keys()
    public, draw = Public(keys.public), torch.Generator().manual_seed(0)
    vectors = [torch.randn(SLOTS + 5, generator=draw) for _ in range(3)]
    total: Any = None
    for vector in vectors:
        total = public.add(total, keys.encrypt(vector))
    assert len(total) == 2
    found = keys.decrypt(public.bytes_of(total), SLOTS + 5)
    assert torch.allclose(found, torch.stack(vectors).double().sum(0), atol=2 * GRAIN)
    assert bool((found / GRAIN == (found / GRAIN).round()).all()), "the scheme's own noise is rounded away"
    with pytest.raises(ValueError, match=r"secret|private"):
        total[0].decrypt()
    with pytest.raises(ModelError, match="secret key"):
        Public(keys._context.serialize(save_secret_key=True))


def test_a_ciphertext_has_131_kilobytes_and_holds_4096_numbers():
    keys = Keys()
    (data,) = keys.encrypt(torch.zeros(SLOTS))
    assert abs(len(data) / 131_072 - 1) < 0.02
    assert [len(keys.encrypt(torch.zeros(n))) for n in (1, SLOTS, SLOTS + 1)] == [1, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**18])
def test_what_would_wrap_is_refused_before_it_is_encrypted(bad: float):
    with pytest.raises(UploadRejected, match="magnitude"):
        Keys().encrypt(torch.tensor([0.0, bad]))


def test_what_is_no_ciphertext_of_this_run_is_refused():
    keys = Keys()
    public = Public(keys.public)
    total = public.add(None, keys.encrypt(torch.zeros(10)))
    for bad in ([b"nonsense"], [], keys.encrypt(torch.zeros(11))):
        with pytest.raises(UploadRejected, match="no ciphertext"):
            public.add(total, bad)
    assert library().__name__ == "tenseal"


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_it_is_the_plain_mean(weighting: str, ratio: float):
    what = method(weighting=weighting)
    plain, secret = (
        Play(what, learner(), rows(), rounds=2),
        Play(what, learner(), rows(), guard=guard(what, ratio=ratio)),
    )
    plain.rounds(2)
    secret.rounds(2)
    assert [r.failed for r in secret.records] == [None, None] and secret.records[1].used == 4
    for name, tensor in plain.state.params.items():
        assert torch.allclose(secret.state.params[name], tensor, atol=1e-4), name


def test_the_server_sees_ciphertexts_and_one_sum(monkeypatch: pytest.MonkeyPatch):
    what = method()
    play = Play(what, learner(), rows(), guard=guard(what))
    seen: list[Any] = []
    answer = play.worker.answer

    def heard(requests: Any) -> Iterator[Any]:
        for reply in answer(requests):
            seen.append(decode(reply.body))
            yield reply

    monkeypatch.setattr(play.worker, "answer", heard)
    play.rounds(1)
    assert len(seen) == 2 * 4 and all(not upload.metrics for upload in seen)
    kinds = [sorted(upload[PART]) if PART in upload.parts else [] for upload in seen]
    assert kinds[:4] == [["c00000"]] * 4 and sorted(kinds[4:]) == [[], [], [], ["sum"]]


def test_the_mask_holds_what_tells_most_and_is_the_same_for_all():
    what = method()
    with_ = guard(what, ratio=0.25)
    play = Play(what, learner(), rows(), guard=with_, rounds=2)
    play.rounds(2)
    mask = with_.mask
    assert mask is not None and int(mask.sum()) == round(0.25 * (SIZE + 4))
    assert bool(mask[-11:].all()) and not mask[:20].any(), "the largest slopes are at the end of 'w'"
    other = guard(what, ratio=0.25)
    other.restore(other.to_json(), with_.memory())
    assert torch.equal(other.mask, mask)  # type: ignore[arg-type]


def test_what_travels_in_the_open_can_be_noised():
    what = method(weighting="uniform")
    plain, noised = (Play(what, learner(), rows(), guard=guard(what, ratio=0.25, noise=noise)) for noise in (0.0, 0.5))
    plain.rounds(1)
    noised.rounds(1)
    gap = joined(plain.state.params) - joined(noised.state.params)
    mask = noised.server.guard.mask  # type: ignore[attr-defined]
    assert float(gap[mask].abs().max()) < 1e-5 and float(gap[~mask].abs().min()) > 0


def test_the_server_cannot_make_that_noise_again():
    """It knows the recipe's seed, the client and the round."""
    what = method(weighting="uniform")

    def open_part(key: str) -> torch.Tensor:
        with_ = guard(what, ratio=0.25, noise=0.5, noise_key=key)
        play = Play(what, learner(), rows(), guard=with_)
        play.rounds(1)
        assert with_.mask is not None
        return joined(play.state.params)[~with_.mask]

    assert torch.equal(open_part("seed"), open_part("seed"))
    assert not torch.equal(open_part("secret"), open_part("secret"))


def test_a_first_client_that_shows_too_much_does_not_push_the_others_out():
    what = method()

    class Long(EncryptedSum):
        def _said(self, values: torch.Tensor, shown: torch.Tensor | None) -> Any:
            found = super()._said(values, shown)
            if shown is not None and float(values[0]) == pytest.approx(0.1):  # the weight of c0
                found.parts["encrypted"].tensors["open"] = torch.zeros(len(shown) + 1)  # type: ignore[union-attr]
            return found

    play = Play(what, learner(), rows(), guard=Long(EncryptedSettings(max_weight=10.0, ratio=0.25), what, 0))
    play.rounds(1)
    record = play.records[0]
    assert record.failed is None and record.used == 3 and [one["client"] for one in record.rejected] == ["c0"]


def joined(params: Tensors) -> torch.Tensor:
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


def test_a_client_that_fails_is_left_out_and_another_one_decrypts():
    class Failing(EncryptedSum):
        async def work(self, function: Any, algorithm: object, client: Any, received: Any) -> Any:
            found = await super().work(function, algorithm, client, received)
            if client.id == "c0":
                raise RuntimeError("unplugged")  # the first to be asked for the sum
            return found

    what = method()
    play = Play(what, learner(), rows(), guard=Failing(EncryptedSettings(max_weight=10.0), what, 0))
    play.rounds(1)
    record = play.records[0]
    assert record.failed is None and record.used == 4 and "unplugged" in record.lost[0]["reason"]
    plain = Play(what, learner(), rows())
    plain.rounds(1)
    assert torch.allclose(play.state.params["w"], plain.state.params["w"], atol=1e-4)


def test_an_upload_that_is_no_ciphertext_is_refused_and_the_round_goes_on():
    from fedllm.core.message import Upload

    class Lying(EncryptedSum):
        async def work(self, function: Any, algorithm: object, client: Any, received: Any) -> Any:
            if client.id == "c1":
                await client.exchange(Upload(None, encrypted={"c00000": torch.zeros(9, dtype=torch.uint8)}))
            return await super().work(function, algorithm, client, received)

    what = method()
    play = Play(what, learner(), rows(), guard=Lying(EncryptedSettings(max_weight=10.0), what, 0))
    play.rounds(1)
    assert play.records[0].failed is None and play.records[0].used == 3
    assert [one["client"] for one in play.records[0].rejected] == ["c1"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_other_modes_methods_and_weights_are_refused():
    what, sizes = method(), {"c0": 12}
    with pytest.raises(ModeConflict, match="'privacy', 'secure' and 'codec'"):
        encrypted(EncryptedSettings(), what, Guard(), sizes, False, 0)
    with pytest.raises(ConfigError, match=r"Set encrypted\.max_weight=12"):
        encrypted(EncryptedSettings(), what, Guard(), sizes, True, 0)
    with pytest.raises(ConfigError, match="nothing travels in the open"):
        encrypted(EncryptedSettings(noise=1.0), what, Guard(), sizes, True, 0)
    with pytest.raises(ModeConflict, match="more than"):
        encrypted(EncryptedSettings(), find("flexlora")(), Guard(), sizes, True, 0)
    with pytest.raises(ModeConflict, match=r"encrypted\.ratio=1"):
        guard(method("scaffold", weighting="uniform"), ratio=0.5)

"""Privacy of examples across sites: each site accounts for its clients, and nothing is spent twice or forgotten."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: pip install 'fedllm[privacy]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

from fedllm.engine.nvflare.parts import Letter
from fedllm.modes.privacy.ledger import Ledger

pytestmark = pytest.mark.slow
PRIVATE: dict[str, Any] = {
    "rounds": 4,
    "privacy": {"level": "example", "epsilon": 8.0, "delta": 1e-3, "key": "seed"},
    "train": {"steps": 2, "batch_size": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def home(place: Path) -> Any:
    return rig.at_home(place, **PRIVATE)


@pytest.fixture
def post(tmp_path: Path) -> Iterator[rig.Loopback]:
    found = rig.Loopback(tmp_path)
    yield found
    found.end()


def spent(post: rig.Loopback, run: str) -> dict[str, float]:
    """What each client has spent, by its site's own account."""
    found = {}
    for site, clients in rig.HOMES.items():
        file = post.folder / site / "fedllm" / run / "federated" / "privacy.json"
        assert file.stat().st_mode & 0o077 == 0, "the key of the noise is for nobody else"
        ledger = Ledger.from_json(json.loads(file.read_text())["ledger"])
        found |= {client: ledger.spent(client).epsilon for client in clients}
    return found


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(left.params[name], right.params[name]) for name in left.params)


def at_checkpoint(folder: Path) -> Ledger:
    from fedllm.engine.folder import RunFolder

    found = RunFolder.open(folder).load("federated")
    assert found is not None
    return Ledger.from_json(found.guard["ledger"])


def test_same_bits_and_the_same_account_as_at_home(post: rig.Loopback, home: Any) -> None:
    away = post.play("private", rig.recipe(**PRIVATE))
    assert same(home.state, away.state)
    there, here = at_checkpoint(away.folder), at_checkpoint(home.folder)
    assert there.entries == here.entries and len(there.entries) == 4 * len(rig.CLIENTS)
    assert spent(post, "private") == {client: here.spent(client).epsilon for client in rig.CLIENTS}


def test_workers_and_a_server_that_die_neither_spend_twice_nor_forget(post: rig.Loopback, home: Any) -> None:
    """Round 3 is played twice by sites that have forgotten it: the same noise, at no cost."""
    killed: set[str] = set()

    def before(site: str, letter: Letter) -> None:
        asked = letter.meta.get("requests", [])
        if asked and asked[0]["round"] == 2 and site not in killed:
            killed.add(site)
            post.keepers[site].process.stop()

    def dies(kind: Any) -> Any:
        class Dies(kind):
            def begin(self, recipe: Any, ground: Any, folder: Any) -> None:
                from fedllm.engine.folder import RunFolder

                save = RunFolder.save

                def lost(self: Any, leg: str, checkpoint: Any) -> None:
                    if checkpoint.state.round == 3:
                        RunFolder.save = save  # type: ignore[method-assign]
                        raise KeyboardInterrupt
                    save(self, leg, checkpoint)

                RunFolder.save = lost  # type: ignore[method-assign]

        return Dies()

    post.before = before
    with pytest.raises(KeyboardInterrupt):
        post.play("again", rig.recipe(**PRIVATE), dies)
    once = spent(post, "again")
    away = post.play("again", rig.recipe(**PRIVATE))
    assert len(killed) == 3 and same(home.state, away.state)
    here = at_checkpoint(home.folder)
    assert spent(post, "again") == {client: here.spent(client).epsilon for client in rig.CLIENTS} != once
    assert at_checkpoint(away.folder).entries == here.entries


def test_other_training_under_the_same_name_is_paid_for_and_has_noise_of_its_own(
    post: rig.Loopback, tmp_path: Path
) -> None:
    """A server that asks again for a round from other weights learns nothing for free, until the budget is spent."""
    import asyncio

    from fedllm.core.message import Received
    from fedllm.core.roster import ALL
    from fedllm.core.server import Request
    from fedllm.core.wire import decode, encode
    from fedllm.engine.nvflare.engine import FlareEngine, Sites

    post.endless = True
    more = {**PRIVATE["privacy"], "noise": 1.0}  # than the least, so that something of the budget is left
    away = post.play("greedy", rig.recipe(**{**PRIVATE, "rounds": 1, "privacy": more}))
    home = {client: site for site, clients in rig.HOMES.items() for client in clients}
    engine = FlareEngine(Sites(post, home), "federated", lambda client: ALL, False)
    start = {name: tensor.clone() for name, tensor in away.state.params.items()}

    def ask(shift: float, name: str) -> Any:
        moved = {key: tensor + shift for key, tensor in start.items()}
        request = Request(name, "c2", "work", 1, 1, 5, encode(Received(moved)))

        async def one() -> Any:
            return [reply async for reply in engine.ask(iter([request]), None)]

        (reply,) = asyncio.run(one())
        return reply

    before = spent(post, "greedy")["c2"]
    first = ask(0.0, "a")
    after = spent(post, "greedy")["c2"]
    assert first.body is not None and after > before, "other weights than round 1 began with: another release"
    again = ask(0.0, "b")
    assert decode(again.body)["update"].keys() == decode(first.body)["update"].keys()
    assert again.body == first.body and spent(post, "greedy")["c2"] == after, "the same training: the same answer"
    reasons = []
    for i in range(1, 40):
        reply = ask(1e-6 * i, f"x{i}")
        if reply.body is None:
            reasons.append(reply.error)
            break
    assert reasons and "privacy budget" in reasons[0] and spent(post, "greedy")["c2"] <= 8.0


@pytest.mark.parametrize("defence", ["prune", "local-noise"])
def test_a_shield_around_it_and_models_beside_it_open_nothing(tmp_path: Path, defence: str) -> None:
    """A worker that dies forgets neither account nor key, and no other model of the run is trained in the open."""
    import asyncio

    from fedllm.core.message import Received
    from fedllm.core.roster import ALL
    from fedllm.core.server import Request
    from fedllm.core.wire import decode, encode, size_by_part
    from fedllm.engine.nvflare.engine import FlareEngine, Sites

    post = rig.Loopback(tmp_path, homes={"site-1": ("c0", "c3")})
    file = post.folder / "site-1" / "fedllm" / "run" / "federated" / "privacy.json"
    once: list[Any] = []

    def before(site: str, letter: Letter) -> None:
        asked = letter.meta.get("requests", [])
        if asked and asked[0]["round"] == 2 and not once:
            once.append(json.loads(file.read_text()))
            post.keepers[site].process.stop()

    post.before, post.endless = before, True
    secret = {**PRIVATE["privacy"], "key": "secret"}
    shielded = {
        **PRIVATE,
        "rounds": 2,
        "privacy": secret,
        "defence": defence,
        "evaluation": {"against": ["base", "local"]},
    }
    try:
        away = post.play("run", rig.recipe(**shielded))
        (first,), now = once, json.loads(file.read_text())
        assert first["key"] == now["key"]
        left, right = (Ledger.from_json(one["ledger"]).entries for one in (first, now))
        assert len(left) == 2 and len(right) == 4 and left.items() <= right.items()
        assert at_checkpoint(away.folder).entries == right, "the server has heard what was spent"
        start = dict(away.state.params)

        async def ask(leg: str) -> Any:
            engine = FlareEngine(Sites(post, {"c0": "site-1", "c3": "site-1"}), leg, lambda client: ALL, False)
            request = Request(f"{leg}-x", "c0", "work", 2, 2, 2, encode(Received(start)))
            return [reply async for reply in engine.ask(iter([request]), None)]

        said = {leg: asyncio.run(ask(leg))[0] for leg in ("base", "central", "fedavg", "local")}
        assert [said[leg].body for leg in ("base", "central", "fedavg")] == [None] * 3
        assert "the model 'base'" in said["base"].error and "asks for 'central'" in said["central"].error
        alone: Any = decode(said["local"].body)
        assert set(size_by_part(said["local"].body)) == {"header"} and alone.metrics == {} == alone.numbers
    finally:
        post.end()

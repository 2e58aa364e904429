"""The server's program over real worker processes, with everything but FLARE between: the bits of the local engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

from fedllm.core.errors import FedLLMError, RunError
from fedllm.core.message import Received
from fedllm.core.roster import ALL
from fedllm.core.server import Request
from fedllm.core.wire import encode
from fedllm.engine.nvflare.engine import FlareEngine, Sites
from fedllm.engine.nvflare.parts import Letter
from fedllm.sites.manifest import ManifestError

pytestmark = pytest.mark.slow
SCAFFOLD: dict[str, Any] = {"method": "scaffold", "cohort": 3, "rounds": 4}
"""A method whose clients keep something between rounds."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flare")


@pytest.fixture(scope="module")
def sites(place: Path) -> Iterator[rig.Loopback]:
    found = rig.Loopback(place)
    yield found
    found.end()


@pytest.fixture
def post(sites: rig.Loopback) -> rig.Loopback:
    sites.before, sites.ended, sites.endless = lambda site, letter: None, None, False
    sites.away.clear()
    sites.mute.clear()
    sites.asked.clear()
    return sites


@pytest.fixture(scope="module")
def home(place: Path) -> Any:
    return rig.at_home(place, **SCAFFOLD, evaluation={"every": 2, "against": ["base", "local"]})


def across(post: rig.Loopback, place: Path, run: str, watch: Any = None, **changes: Any) -> Any:
    return post.play(run, rig.recipe(**changes), watch)


def same(left: Any, right: Any) -> bool:
    trees = [(left.params, right.params), *((left.memory[n], right.memory[n]) for n in left.memory)]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in trees)


def test_same_bits_as_at_home(post: rig.Loopback, place: Path, home: Any) -> None:
    away = across(post, place, "bits", **SCAFFOLD, evaluation={"every": 2, "against": ["base", "local", "central"]})
    assert same(home.state, away.state) and home.state.round == 4
    keep = ("rows", "bytes", "tokens")
    assert {k: home.table[k] for k in keep} == {k: away.table[k] for k in keep}
    assert any("central" in warning for warning in away.table["warnings"])
    work = [letter for _, letter in post.asked if letter.op == "ask"]
    assert all(len(letter.blobs) == 1 for letter in work), "what is the same for all clients travels once"
    asked = {(site, r["client"]) for site, letter in post.asked for r in letter.meta.get("requests", [])}
    assert asked == {(site, client) for site, clients in rig.HOMES.items() for client in clients}


def test_a_worker_that_dies_between_rounds_loses_nothing(post: rig.Loopback, place: Path, home: Any) -> None:
    """What a used upload left in the private store is staged when the worker dies, and kept by the one after it."""
    killed: set[str] = set()

    def before(site: str, letter: Letter) -> None:
        settles = [order for order in letter.meta.get("orders", []) if order["do"] == "settle" and order["clients"]]
        if settles and site not in killed and letter.meta["leg"] == "federated":
            killed.add(site)
            kill(post, site)

    post.before = before
    away = across(post, place, "between", **SCAFFOLD, evaluation={"every": 2, "against": []})
    assert killed and same(home.state, away.state)


def test_a_site_lost_after_its_uploads_were_used_is_no_half_round(post: rig.Loopback, place: Path, home: Any) -> None:
    """It cannot say what its clients keep of the round: the round is not saved, and is played again when it is back."""

    def before(site: str, letter: Letter) -> None:
        settles = [order for order in letter.meta.get("orders", []) if order["do"] == "settle" and order["clients"]]
        if letter.op == "stores" and settles and len(rounds(post, "half")) == 3 and not post.away:
            post.away.add(site)  # the letter does not arrive

    post.before = before
    with pytest.raises(RunError, match="after its uploads of round 3 were used"):
        across(post, place, "half", **SCAFFOLD, evaluation={"every": 2, "against": []})
    assert (place / "server" / "fedllm" / "runs" / "half" / "checkpoints" / "federated").is_dir()
    post.before = lambda site, letter: None
    post.away.clear()
    away = across(post, place, "half", **SCAFFOLD, evaluation={"every": 2, "against": []})
    assert same(home.state, away.state) and rounds(post, "half") == [1, 2, 3, 4]


def rounds(post: rig.Loopback, run: str) -> list[int]:
    """The rounds in a run's record."""
    file = post.folder / "server" / "fedllm" / "runs" / run / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return [line["round"] for line in lines if line["event"] == "round"]


def test_labels_of_all_sites_in_a_secure_sum(tmp_path: Path) -> None:
    """No site has all labels, and the server sees sums alone: a conversation of five letters with every client."""
    pytest.importorskip("cryptography")
    task = {"kind": "sequence-classification", "max_length": 48}
    changes: dict[str, Any] = {"model": {"name": "toy:bert"}, "task": task, "secure": {"max_weight": 10}, "rounds": 1}
    home, post = rig.at_home(tmp_path, rig.labelled, **changes), rig.Loopback(tmp_path, rig.labelled)
    try:
        away = across(post, tmp_path, "labels", **changes)
    finally:
        post.end()
    assert same(home.state, away.state) and home.table["rows"] == away.table["rows"]


def test_threshold_keys_of_several_sites(tmp_path: Path) -> None:
    """Each client makes its own share of the key at its site; the server opens the sum, and no upload."""
    from fedllm.modes.encrypted.threshold import library

    try:
        library()
    except FedLLMError as fault:
        pytest.skip(str(fault))
    plain: dict[str, Any] = {"method": {"name": "fedavg", "weighting": "uniform"}, "rounds": 1}
    home, post = rig.at_home(tmp_path, **plain), rig.Loopback(tmp_path)
    try:
        away = across(post, tmp_path, "shares", **plain, encrypted={"keys": "threshold"})
    finally:
        post.end()
    for name, tensor in home.state.params.items():
        assert torch.allclose(tensor, away.state.params[name], atol=1e-5), name


def kill(post: rig.Loopback, site: str) -> None:
    process = post.keepers[site].process
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    while process.alive:
        time.sleep(0.01)


def test_a_worker_that_dies_in_a_round_is_a_lost_client(post: rig.Loopback, place: Path) -> None:
    def before(site: str, letter: Letter) -> None:
        asked = letter.meta.get("requests", [])
        if site == "site-1" and asked and asked[0]["op"] == "work" and asked[0]["round"] == 2:
            threading.Timer(0.3, kill, (post, site)).start()

    post.before = before
    changes = {"rounds": 3, "train": {"steps": 60, "batch_size": 2}}
    away = across(post, place, "dies", **changes)
    lines = [json.loads(line) for line in (away.folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    assert [line["used"] for line in rounds][::2] == [5, 5] and rounds[1]["used"] < 5
    assert {entry["client"] for entry in rounds[1]["lost"]} <= {"c0", "c3"}
    assert all("signal 9" in entry["reason"] for entry in rounds[1]["lost"])


def test_a_server_that_dies_goes_on_to_the_same_bits(post: rig.Loopback, place: Path, home: Any) -> None:
    def dies(kind: Any) -> Any:
        class Dies(kind):
            def round(self, name: str, record: Any, values: Any) -> None:
                if record.round == 2:
                    raise KeyboardInterrupt

        return Dies()

    with pytest.raises(KeyboardInterrupt):
        across(post, place, "again", dies, **SCAFFOLD, evaluation={"every": 2, "against": []})
    away = across(post, place, "again", **SCAFFOLD, evaluation={"every": 2, "against": []})
    assert same(home.state, away.state)
    begun = min(r["round"] for _, letter in post.asked if letter.op == "ask" for r in letter.meta["requests"])
    assert begun == 1 and len([1 for _, letter in post.asked if letter.op == "hello"]) == 6
    with pytest.raises(ManifestError, match="another manifest"):
        across(post, place, "again", **{**SCAFFOLD, "rounds": 5}, evaluation={"every": 2, "against": []})


def test_what_does_not_fit_is_refused_before_training(post: rig.Loopback, place: Path) -> None:
    for wrong, text in (
        ({"model": {"name": str(place)}}, "folder"),
        ({"model": {"name": "toy:llama", "trust_remote_code": True}}, "trust_remote_code"),
        ({"cohort": 6}, "cohort=6"),
        ({"encrypted": {}}, "one secret key"),
    ):
        with pytest.raises(FedLLMError, match=text):
            across(post, place, "refused", **wrong)
    assert not any(letter.op == "ask" for _, letter in post.asked)


def engine(post: rig.Loopback, place: Path) -> FlareEngine:
    """An engine over sites that have just played a round."""
    post.endless = True
    across(post, place, f"e{time.monotonic_ns()}", rounds=1)
    home = {client: site for site, clients in rig.HOMES.items() for client in clients}
    found = FlareEngine(Sites(post, home), "federated", lambda client: ALL, False)
    post.asked.clear()
    return found


def asked(names: str, op: str = "evaluate_base") -> list[Request]:
    body = encode(Received())
    return [Request(f"x-{op}-{n}-{i}", f"c{n}", op, 1, 2, 5, body) for i, n in enumerate(names)]


async def collect(engine: FlareEngine, requests: list[Request], deadline: float | None = None) -> list[Any]:
    return [reply async for reply in engine.ask(iter(requests), deadline)]


def test_replies_come_in_order_and_a_repeated_id_is_not_computed_twice(post: rig.Loopback, place: Path) -> None:
    found, requests = engine(post, place), asked("40213")
    first = asyncio.run(collect(found, requests))
    assert [reply.id for reply in first] == [request.id for request in requests]
    assert all(reply.error is None and reply.body for reply in first)
    again = asyncio.run(collect(found, requests))
    assert [r.body for r in again] == [r.body for r in first] and [r.cost for r in again] == [r.cost for r in first]
    kill(post, "site-1")
    assert [r.cost for r in asyncio.run(collect(found, requests))] == [r.cost for r in first]
    found.settle([])
    fresh = asyncio.run(collect(found, requests))  # the round is over: nothing is remembered, and site-1 started again
    assert [r.body for r in fresh] == [r.body for r in first] and [r.cost for r in fresh] != [r.cost for r in first]
    wrong = asyncio.run(collect(found, asked("01", "no_such_function")))
    assert all(r.body is None and "no_such_function" in str(r.error) for r in wrong)


def test_a_site_that_is_gone_is_answered_for(post: rig.Loopback, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.engine.nvflare.engine.LOOK", 0.1)
    found = engine(post, place)
    post.mute.add("site-2")
    begun = time.monotonic()
    late = asyncio.run(collect(found, asked("01234"), deadline=3.0))
    assert 2.9 < time.monotonic() - begun < 8
    assert {(r.client, r.error) for r in late if r.body is None} == {
        (c, "no answer within 3.0 s") for c in ("c1", "c4")
    }
    assert {o["id"] for o in found.orders.of("site-2")} == {r.id for r in late if r.body is None}
    post.away.add("site-2")
    gone = asyncio.run(collect(found, asked("14")))
    assert all("does not answer any more" in str(r.error) for r in gone) and "site-2" in found.sites.lost
    found.drop("c1")
    assert found.orders.of("site-2") == [], "nothing is kept for a site that is lost"
    post.ended = "the job was aborted"
    post.away.add("site-1")
    with pytest.raises(RunError, match="aborted"):
        asyncio.run(collect(found, asked("0")))


def test_leaving_early_undoes_what_was_not_used(post: rig.Loopback, place: Path) -> None:
    found = engine(post, place)

    async def first() -> None:
        replies = found.ask(iter(asked("012")), None)
        async for _ in replies:
            break
        await replies.aclose()

    asyncio.run(first())
    orders = [order for site in rig.HOMES for order in found.orders.of(site)]
    assert {(o["do"], o["client"]) for o in orders} == {("forget", "c1"), ("forget", "c2")}
    asyncio.run(collect(found, asked("012")))
    assert [found.orders.of(site) for site in rig.HOMES] == [[], [], []], "carried out and not told again"

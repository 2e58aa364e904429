"""The gate of a site, without a worker behind it: which models and functions are answered, and for how long a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig

from fedllm.core.guard import MEASURING
from fedllm.engine.nvflare import gate as gates
from fedllm.engine.nvflare import trust
from fedllm.engine.nvflare.facts import SiteFacts
from fedllm.engine.nvflare.gate import Gate
from fedllm.engine.nvflare.keeper import Keeper, Process, Replies
from fedllm.engine.nvflare.parts import NAME, RESERVED, Letter
from fedllm.sites.audit import read
from fedllm.sites.manifest import ManifestError
from fedllm.sites.policy import PolicyRefused

SITE = "site-1"
PRIVATE = {"level": "example", "epsilon": 8.0, "delta": 1e-3}
HIDDEN: dict[str, dict[str, Any]] = {
    "privacy": {"privacy": PRIVATE}, "privacy of clients": {"privacy": {**PRIVATE, "level": "client"}},
    "secure": {"secure": {}}, "encrypted": {"encrypted": {"keys": "threshold"}},
}  # fmt: skip
ALL = ["base", "local", "central"]


class Door:
    """A gate, and whoever may knock."""

    def __init__(self, folder: Path) -> None:
        self.authority = authority = rig.Authority()
        self.kit, self.admin = authority.kit(folder / SITE, SITE), authority.kit(folder / "admin", rig.ADMIN)
        rig.write_policy(self.kit)
        self.gate = Gate(self.kit, SiteFacts.model_validate({"policy": "policy.yaml"}))

    def recipe(self, against: list[str] = ALL, **sections: Any) -> dict[str, Any]:
        """A signed recipe need not be one that the site's fedllm can play."""
        made = rig.recipe(**sections)
        return {**made, "evaluation": {**made["evaluation"], "against": against}}

    def admit(self, recipe: dict[str, Any], run: str = "run") -> str:
        signed = trust.signed(self.admin, run, recipe, [SITE], purpose="research")
        return self.gate.admit({"run": run, "recipe": recipe, "signed": signed.to_json()})

    def ask(self, leg: str, *ops: str) -> dict[str, str | None]:
        """Function -> why it is not answered, or None."""
        facts = {"round": 1, "client": "c0", "body": 0}
        requests = [{"id": f"{n}", "op": op, **facts} for n, op in enumerate(ops)]
        letter = Letter({"op": "ask", "leg": leg, "orders": [], "requests": requests, "deadline": None}, [b"body"])
        self.gate.leg(letter.meta)
        refused = self.gate.requests(letter)
        return {op: refused[f"{n}"].meta["error"] if f"{n}" in refused else None for n, op in enumerate(ops)}


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    found = Door(tmp_path)
    yield found
    found.gate.close()


OPS = ("work", "evaluate", "evaluate_base", "score_words")


def answered(door: Door, leg: str) -> set[str]:
    return {op for op, why in door.ask(leg, *OPS).items() if why is None}


def test_names_are_those_of_the_guard() -> None:
    assert gates.MEASURING == MEASURING


@pytest.mark.parametrize("mode", HIDDEN)
def test_nothing_is_trained_in_the_open_beside_a_mode(door: Door, mode: str) -> None:
    """A server that has been changed asks for plain training of another model on the same rows."""
    door.admit(door.recipe([*ALL, "fedprox"], **HIDDEN[mode]))
    assert answered(door, "federated") == {"work", *MEASURING}
    assert answered(door, "base") == {"evaluate_base"}
    assert answered(door, "fedprox") == set(MEASURING)
    assert answered(door, "local") == {"work", *MEASURING}, "a client alone sends no parameters"
    with pytest.raises(PolicyRefused, match="The server asks for 'central'"):
        door.ask("central", "work")
    refused = [e for e in read(door.gate.record.path) if e.action == "request" and e.decision == "refused"]
    assert len(refused) == 1 + 3 + 2 + 1 and all("The server asks for" in str(e.reason) for e in refused)


def test_without_a_mode_the_base_model_is_measured_and_nothing_else(door: Door) -> None:
    door.admit(door.recipe([*ALL, "fedprox"]))
    assert answered(door, "federated") == answered(door, "fedprox") == set(OPS), "policy.ops decides"
    assert answered(door, "base") == {"evaluate_base"} and answered(door, "local") == {"work", *MEASURING}
    assert "the model 'base'" in str(door.ask("base", "work")["work"])


def test_a_model_is_one_of_the_signed_recipe_and_its_method_one_of_the_policy(door: Door) -> None:
    rig.write_policy(door.kit, methods=["fedavg"])
    door.admit(door.recipe(["local", "fedprox"]))
    for leg, text in (
        ("fedprox", r"The method 'fedprox' is not allowed at this site\. policy\.methods: fedavg\."),
        ("base", r"The server asks for 'base'\. The manifest speaks of federated, local, fedprox\."),
        ("central", "The server asks for 'central'"),
        ("scaffold", "The server asks for 'scaffold'"),
    ):
        with pytest.raises(PolicyRefused, match=text):
            door.ask(leg, "work")
    door.ask("local", "work")


def test_what_the_policy_does_not_answer_is_not_answered_on_any_leg(door: Door) -> None:
    rig.write_policy(door.kit, ops=["evaluate_base"])
    door.admit(door.recipe())
    for leg in ("federated", "base", "local"):
        assert answered(door, leg) == {"evaluate_base"}


# --- how long a signature is good -------------------------------------------------------------------------------------


def test_a_run_that_was_signed_long_ago_is_refused_until_it_is_signed_again(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's operator submits the coordinator's job of a year ago once more."""
    monkeypatch.setattr(
        trust, "verify", lambda signed, *_: trust.Manifest.model_validate(json.loads(signed)["manifest"])
    )
    recipe, begin = door.recipe(), datetime.now(UTC)
    old = {
        "run": "run", "recipe": recipe,
        "signed": trust.signed(door.admin, "run", recipe, [SITE], purpose="research").to_json(),
    }  # fmt: skip
    door.gate.now = lambda: begin + timedelta(days=89)
    door.gate.admit(old)
    door.gate.now = lambda: begin + timedelta(days=365)
    with pytest.raises(
        PolicyRefused, match=r"signed on .*, 36[45] days ago\. policy\.max_age: at most 90 days\. .*resume"
    ):
        door.gate.admit(old)
    last = read(door.gate.record.path)[-1]
    assert (last.action, last.decision) == ("policy", "refused") and "max_age" in str(last.reason)
    rig.write_policy(door.kit, max_age=400)
    door.gate.admit(old)
    rig.write_policy(door.kit)
    door.gate.now = lambda: datetime.now(UTC)
    door.admit(recipe)  # as 'deploy resume' signs it


def test_a_run_goes_on_with_its_coordinator_alone(door: Door, tmp_path: Path) -> None:
    recipe = door.recipe()
    door.admit(recipe)
    door.gate.begun({"audit": None}, None)
    rig.write_policy(door.kit, coordinators=[rig.ADMIN, "eve@hub.org"])
    eve = door.authority.kit(tmp_path / "eve", "eve@hub.org")
    signed = trust.signed(eve, "run", recipe, [SITE], purpose="research")
    with pytest.raises(ManifestError, match="with another manifest"):
        door.gate.admit({"run": "run", "recipe": recipe, "signed": signed.to_json()})


# --- what lies in a site's folder -------------------------------------------------------------------------------------


def keeper_of(door: Door) -> Keeper:
    door.gate.close()
    return Keeper(door.kit, SiteFacts.model_validate({"policy": "policy.yaml"}))


@pytest.mark.parametrize("run", ["replies", "worker.log", "worker.log.1", "audit.jsonl", "audit.jsonl.partial"])
def test_a_run_cannot_lie_where_the_site_keeps_something_else(tmp_path: Path, run: str) -> None:
    """A run called 'replies' would lose its account of privacy with the replies of another."""
    assert NAME.fullmatch(run) and RESERVED.fullmatch(run)
    keeper = keeper_of(Door(tmp_path))
    try:
        answer = keeper.handle(Letter({"op": "hello", "run": run}), lambda: False)
        assert answer.op == "error" and f"'{run}'" in answer.meta["reason"]
        assert not (keeper.gate.kit / "fedllm" / run).is_dir()
    finally:
        keeper.end()


def test_nobody_else_may_look_into_a_sites_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door, before = Door(tmp_path), os.umask(0)
    try:
        (door.kit / "fedllm").chmod(0o777)
        keeper_of(door).end()
        assert (door.kit / "fedllm").stat().st_mode & 0o777 == 0o700
        log, script = tmp_path / "open" / "worker.log", tmp_path / "said.py"
        script.write_text("import pathlib, sys\npathlib.Path(sys.argv[-1], 'made').write_text('x')\n")
        process = Process(tmp_path, log)
        process.module = "said"
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        process.start()
        until = time.monotonic() + 30
        while not (tmp_path / "made").is_file() and time.monotonic() < until:
            time.sleep(0.02)
        process.stop()
        replies = Replies(tmp_path / "replies")
        replies.put("federated", Letter({"id": "1"}, [b"x"]))
        made = [tmp_path / "made", log, *(tmp_path / "replies" / "federated").iterdir()]
        assert [file.stat().st_mode & 0o777 for file in made] == [0o600] * 3
    finally:
        os.umask(before)

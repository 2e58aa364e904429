"""What participants agree on and refuse, jobs, and private stores that outlive their process."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, FedLLMError, ModeConflict, RunError
from fedllm.engine.nvflare import ground, job, program, trust
from fedllm.engine.nvflare.facts import ServerFacts, SiteFacts, loaded_name, permitted, read_facts
from fedllm.engine.nvflare.stores import JournaledStore
from fedllm.recipe import load_recipe

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

RECIPE: dict[str, Any] = {
    "method": {"name": "fedavg"}, "model": {"name": "toy:llama", "device": "cuda:7"},
    "data": {"path": "/etc/passwd"}, "tracking": {"wandb": True}, "processes": 64,
    "groups": {"small": {"model": {"name": "toy:gpt2"}}, "rest": {"share": 1.0, "model": {}}},
}  # fmt: skip


def test_a_job_chooses_neither_data_nor_device_nor_folders() -> None:
    facts = SiteFacts(data={"path": "rows.jsonl"}, device="cpu")
    found = permitted(RECIPE, facts)
    assert found["data"] == {"path": "rows.jsonl"} and found["tracking"] == {} and found["processes"] == 1
    assert permitted(RECIPE, SiteFacts(processes=2))["processes"] == 2, "the site's word"
    assert found["model"] == {"name": "toy:llama", "device": "cpu"}
    assert found["groups"]["small"]["model"] == {"name": "toy:gpt2", "device": "cpu"}
    mapped = SiteFacts(device="cpu", models={"toy:llama": "/models/llama", "toy:gpt2": "/models/gpt2"})
    assert permitted(RECIPE, mapped)["model"]["name"] == "/models/llama"
    for name in ("/models/x", "./x", "../x", "~/x", str(Path(__file__).parent)):
        with pytest.raises(ConfigError, match="folder"):
            loaded_name(name, None)
    refused = (
        {**RECIPE, "model": {"name": "toy:llama", "trust_remote_code": True}},
        {**RECIPE, "model": {"name": "toy:llama", "tokenizer": "/etc"}},
        {**RECIPE, "groups": {"small": {"model": {"name": "/models/x"}}}},
    )
    for recipe in refused:
        with pytest.raises(ConfigError):
            permitted(recipe, facts)
    with pytest.raises(ConfigError, match="fedprox"):
        permitted({**RECIPE, "method": "fedavg"}, SiteFacts(methods=["fedprox"]))
    with pytest.raises(ConfigError, match="toy:bert"):
        permitted(RECIPE, SiteFacts(models={"toy:bert": "toy:bert"}))


def test_own_files(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    with pytest.raises(ConfigError, match="does not exist"):
        read_facts(SiteFacts, tmp_path)
    file = tmp_path / "local" / "fedllm.json"
    for text, wrong in (("{", "JSON"), ('{"dvice": "cpu"}', "device"), ('{"threads": 0}', "threads")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=wrong):
            read_facts(SiteFacts, tmp_path)
    file.write_text('{"runs": "there"}')
    assert read_facts(ServerFacts, tmp_path).runs == "there"


def told(clients: dict[str, int], labels: Any = None, **more: Any) -> dict[str, Any]:
    sizes = {client: {"train": size, "eval": 1} for client, size in clients.items()}
    facts = {
        "clients": sizes,
        "names": {c: c.upper() for c in clients},
        "labels": labels,
        "warnings": [],
        "public": None,
    }
    return {**facts, "label_column": None if labels is None else "label", **more}


def test_what_sites_tell_is_joined() -> None:
    sites = {"b": told({"c2": 3, "c0": 4}, ["no", "yes"]), "a": told({"c1": 5}, ["maybe", "no"])}
    found = ground.joined(sites, None)
    assert found["home"] == {"c0": "b", "c1": "a", "c2": "b"} and found["labels"] == ["maybe", "no", "yes"]
    assert found["clients"]["c1"] == {"train": 5, "eval": 1} and json.loads(json.dumps(found)) == found
    with pytest.raises(ConfigError, match="both have a client 'c1'"):
        ground.joined({"a": told({"c1": 5}), "b": told({"c1": 5})}, None)
    with pytest.raises(ConfigError, match="public rows"):
        ground.joined({"a": told({"c1": 5}, public="x")}, "y")
    with pytest.raises(ConfigError, match="labels in"):
        ground.joined({"a": told({"c1": 5}, ["x"]), "b": told({"c2": 5}, ["x"], label_column="tags")}, None)


def test_a_federation_without_rows() -> None:
    facts = ground.joined({"a": told({"c1": 5}, ["x"]), "b": told({"c2": 3}, ["y"])}, None)
    run = ground.play()
    own = run.Federation.of({"c2": {"train": [{"text": "t", "label": "y"}] * 3, "eval": []}})
    here, there = ground.federation(run, facts, own, ()), ground.federation(run, facts, None, ())
    assert here.client_ids == there.client_ids == ["c1", "c2"] and here.labels == there.labels == ["x", "y"]
    assert (here.size("c1"), there.size("c2", "eval"), len(here.rows("c2"))) == (5, 1, 3)
    for federation, client in ((here, "c1"), (there, "c1"), (there, "c2")):
        with pytest.raises(FedLLMError, match="not here"):
            federation.rows(client)
    sole = ground.Sole(own, "hospital")
    assert sole.client_ids == ["hospital"] and len(sole.rows("hospital")) == sole.size("hospital") == 3
    with pytest.raises(ConfigError, match="2 clients"):
        ground.Sole(run.Federation.of({"a": {"train": [{}]}, "b": {"train": [{}]}}), "hospital")


def test_the_job_has_no_braces_to_evaluate(tmp_path: Path) -> None:
    recipe = {"name": "{rounds}", "method": {"name": "fedavg"}}
    folder = job.write(tmp_path / "j", "run-1", recipe, ["b", "a"], trust.Signed(b"{m}", b"c"))
    assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*.json")) == [
        "app/config/config_fed_client.json", "app/config/config_fed_server.json", "meta.json"
    ]  # fmt: skip
    server = json.loads((folder / "app/config/config_fed_server.json").read_text())
    config = server["workflows"][0]["args"]["config"]
    assert "{" not in config and server["server"]["task_request_interval"] == job.POLL
    found = program.Job.of(json.loads(base64.b64decode(config)))
    assert found == program.Job("run-1", recipe, ["a", "b"], {"manifest": "e219", "certificate": "Yw=="})
    assert trust.Signed.of(found.signed) == trust.Signed(b"{m}", b"c")
    assert json.loads((folder / "meta.json").read_text())["mandatory_clients"] == ["a", "b"]
    for wrong in ({"run": "../x"}, {"run": ""}, {"run": "a/b"}, {}, {"run": "x", "recipe": {}, "sites": []}):
        with pytest.raises(ConfigError):
            program.Job.of({"recipe": {}, "sites": ["a"], **wrong} if "sites" not in wrong else wrong)


def test_modes_that_cannot_be_told_apart_from_one_process_are_refused() -> None:
    with pytest.raises(ModeConflict):
        program.possible(load_recipe({"encrypted": {}}))
    for level in ("client", "example"):
        program.possible(load_recipe({"privacy": {"level": level, "noise": 1.0}}))


def test_a_private_store_outlives_its_process(tmp_path: Path) -> None:
    """Kept, staged once and staged twice: all as before the process ended, and dropped or kept as ordered."""

    def turn(store: JournaledStore, client: str, value: float) -> None:
        store.open(client)["v"] = {"x": torch.tensor([value])}
        store.rest(client)
        store.keep()

    def value(store: JournaledStore, client: str) -> Any:
        held = store.open(client).get("v")
        store.drop(client)
        return float(held["x"]) if isinstance(held, dict) else None

    first = JournaledStore(["v"], tmp_path, again=False)
    for client in ("a", "b", "c"):
        turn(first, client, 1.0)
    first.settle(["a", "b", "c"])
    first.applied = 7
    for client in ("a", "b", "b", "d"):
        turn(first, client, value(first, client) + 1 if client != "d" else 5.0)
    second = JournaledStore(["v"], tmp_path, again=True)
    assert second.applied == 7 and [value_of(second, c) for c in "abcd"] == [2.0, 3.0, 1.0, 5.0]
    second.drop("b")
    second.settle(["a", "b"])
    second.keep()
    third = JournaledStore(["v"], tmp_path, again=True)
    assert [value_of(third, c) for c in "abcd"] == [2.0, 2.0, 1.0, None]
    third.go_back(first.manifest())
    assert [value_of(third, c) for c in "abcd"] == [1.0, 1.0, 1.0, None] and third.applied == 0
    third.prune([third.manifest()])
    with pytest.raises(RunError, match="not here any more"):
        third.go_back({"a": "gone.safetensors"})
    fresh = JournaledStore(["v"], tmp_path, again=False)
    assert fresh.manifest() == {}


def value_of(store: JournaledStore, client: str) -> float | None:
    """What the client's next turn would find."""
    held = JournaledStore(store.declared, store.place.parent, again=True).open(client).get("v")
    return float(held["x"]) if isinstance(held, dict) else None

"""Whose run a job plays, what its server gives to whom, and what no job has the server do. No FLARE runs here."""

from __future__ import annotations

import base64
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")
sys.path.insert(0, str(Path(__file__).parent))

import flare_rig as rig
from nvflare.apis.fl_context import FLContext
from nvflare.widgets.info_collector import InfoCollector

from fedllm.core.errors import ConfigError, RunError
from fedllm.engine.nvflare import ground, job, program, server, session
from fedllm.engine.nvflare.engine import Sites
from fedllm.engine.nvflare.facts import ServerFacts
from fedllm.engine.nvflare.record import FILE, Record
from fedllm.engine.nvflare.standing import REFUSED, Keep, Standing
from fedllm.sites.audit import AuditDamaged, AuditFull, Digest
from fedllm.sites.manifest import ManifestError

HOMES = {"site-1": ("c0",), "site-2": ("c1",)}
SHORT: dict[str, Any] = {"rounds": 1, "train": {"steps": 1, "batch_size": 2}}


class Host:
    """FLARE's server process as a controller sees it, over sites that refuse every run before a row is read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sites = rig.Loopback(folder, homes=HOMES)
        self.kit, self.panics, self.given = self.sites.server, list[str](), list[dict[str, Any]]()
        for site in HOMES:
            rig.write_policy(folder / site, methods=["none"])
        (self.kit / "local").mkdir()
        (self.kit / "local" / "fedllm.json").write_text('{"device": "cpu"}')
        monkeypatch.setattr(server, "FlarePost", lambda *_: self.sites)
        monkeypatch.setattr(program, "Record", functools.partial(Record, patience=0.1))
        monkeypatch.setattr(program, "LEAVE", 0.5)

    def run_dir(self, number: str) -> Path:
        return self.kit / number

    def play(
        self, number: str, run: str, recipe: dict[str, Any], signed: Any, name: str | None = None
    ) -> server.FedllmController:
        """Play a job that FLARE knows by a number and a name."""
        self.run_dir(number).mkdir()
        (self.run_dir(number) / "meta.json").write_text(json.dumps({"name": run if name is None else name}))
        workspace = SimpleNamespace(
            get_root_dir=lambda: str(self.kit),
            get_run_dir=lambda number: str(self.run_dir(number)),
            get_job_meta_path=lambda number: str(self.run_dir(number) / "meta.json"),
        )
        engine = SimpleNamespace(get_workspace=lambda: workspace)
        facts = {"run": run, "recipe": recipe, "sites": sorted(HOMES), "signed": signed and signed.to_json()}
        found = server.FedllmController(base64.b64encode(json.dumps(facts).encode()).decode())
        found.system_panic = lambda reason, fl_ctx: self.panics.append(reason)  # type: ignore[method-assign]
        fl_ctx = FLContext()
        fl_ctx.get_engine, fl_ctx.get_job_id = lambda: engine, lambda: number  # type: ignore[method-assign]
        found.control_flow(SimpleNamespace(triggered=False), fl_ctx)  # type: ignore[arg-type]
        fl_ctx.set_prop(
            InfoCollector.CTX_KEY_STATS_COLLECTOR, SimpleNamespace(add_info=lambda name, told: self.given.append(told))
        )
        found.handle_event(InfoCollector.EVENT_TYPE_GET_STATS, fl_ctx)
        return found

    def results(self, number: str) -> set[str]:
        return {one.name for one in (self.run_dir(number) / server.FETCHED).iterdir()}

    def stands(self, number: str, run: str) -> Standing:
        found = Standing.of_job(self.kit, self.kit / "fedllm" / "runs" / run, number)
        assert found is not None
        return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host(tmp_path, monkeypatch)
    yield found
    found.sites.end()


@pytest.fixture
def old(host: Host) -> Path:
    """A run that another coordinator's job 'a' played to its end."""
    place = host.kit / "fedllm" / "runs" / "old"
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "adapter_model.safetensors").write_bytes(b"theirs")
    (place / "result.json").write_text("{}")
    (place / "metrics.jsonl").write_text(json.dumps({"event": "round", "model": "federated", "round": 1}) + "\n")
    Keep(place, sorted(HOMES), 1, "a").end("finished")
    with Record(host.kit / "fedllm" / FILE, rig.SERVER) as record:
        record.run = "old"
        record.note("start", payload=Digest.of(b"their manifest"))
    return place


def test_a_job_that_is_refused_is_given_nothing_of_the_run_whose_name_it_has(host: Host, old: Path) -> None:
    made = rig.recipe(**SHORT)
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    cases = {
        "another": (host.sites.signed("old", made), None, "with another manifest"),
        "unsigned": (None, None, "without a signed manifest"),
        "renamed": (host.sites.signed("old", made), "else", "The job is named 'else', and its run 'old'."),
    }
    for number, (signed, name, text) in cases.items():
        host.play(number, "old", made, signed, name)
        assert text in host.panics[-1]
        assert host.results(number) == {"error.txt", "standing.json"}, "its reason alone"
        assert text in (host.run_dir(number) / server.FETCHED / "error.txt").read_text()
        assert (host.stands(number, "old").name, host.stands(number, name or "old").job) == ("failed", number)
    assert not host.given, "nor its rounds"
    assert {file: file.read_bytes() for file in old.rglob("*") if file.is_file()} == before
    assert host.stands("a", "old").name == "finished"


def test_what_fails_before_a_site_is_asked_is_left_to_a_person(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves a word that is this job's own, which keeps the warden from beginning it again."""
    recipes = {
        "mode": (rig.recipe(**SHORT, encrypted={}), "one secret key"),
        "model": (rig.recipe(**SHORT, model={"name": "toy:llama", "trust_remote_code": True}), "trust_remote_code"),
        "policy": (rig.recipe(**SHORT), "policy.methods"),
    }
    for number, (made, text) in recipes.items():
        host.play(number, f"run-{number}", made, host.sites.signed(f"run-{number}", made))
        found = host.stands(number, f"run-{number}")
        assert found.name == "failed" and text in str(found.reason) and text in host.panics[-1]
        assert not (host.kit / REFUSED / number).exists(), "the run is its own"
    made = rig.recipe(**SHORT)
    with Record(host.kit / "fedllm" / FILE, rig.SERVER):
        host.play("locked", "run-locked", made, host.sites.signed("run-locked", made))
    assert "One writer at a time" in host.panics[-1]
    assert Standing.of_job(host.kit, host.kit / "fedllm" / "runs" / "run-locked", "locked") is None, "it may go on"
    host.play("config", "../x", made, None)
    assert "is no id of a run" in str(host.stands("config", "x").reason)
    log = host.kit / "fedllm" / FILE
    log.write_bytes(log.read_bytes().replace(b'"action":"end"', b'"action":"lost"', 1))
    host.play("damaged", "run-damaged", made, host.sites.signed("run-damaged", made))
    assert host.stands("damaged", "run-damaged").name == "failed"
    (host.kit / "local" / "fedllm.json").write_text("{")
    host.play("facts", "run-facts", made, host.sites.signed("run-facts", made))
    assert "is not valid JSON" in str(host.stands("facts", "run-facts").reason)


def test_a_log_that_is_damaged_or_full_does_not_mend_with_the_sites(tmp_path: Path) -> None:
    def stands(fault: Any) -> str:
        keep = Keep(tmp_path, ["north", "south"], 1, "a")
        sites = Sites(SimpleNamespace(over=lambda: None), {"c": "south"}, standing=keep)  # type: ignore[arg-type]
        sites.lose("south", "it does not answer")
        program._stand(sites, fault)
        return keep.now.name

    assert stands(RunError("south is gone.")) == "waiting"
    assert stands(AuditDamaged("Line 3.")) == stands(AuditFull("No room.")) == "failed"
    assert stands(ConfigError("No.")) == stands(ManifestError("No.")) == "failed"


# --- what a job cannot have the server do -----------------------------------------------------------------------------


def allowed(recipe: dict[str, Any], **facts: Any) -> Any:
    return program._allowed(ground.play(), recipe, ServerFacts(device="cpu", **facts))


GROUPS: dict[str, Any] = {"small": {"share": 0.5, "model": {"name": "toy:gpt2"}}, "rest": {"share": 0.5}}


def test_the_servers_models_are_those_of_groups_too(tmp_path: Path) -> None:
    made = rig.load({**rig.RECIPE, "groups": GROUPS})
    mapped = allowed(made, models={"toy:llama": "/models/llama", "toy:gpt2": "/models/gpt2"})
    assert mapped.model.name == "/models/llama" and mapped.groups["small"].model["name"] == "/models/gpt2"
    assert mapped.groups["small"].model["device"] == "cpu" and mapped.groups["rest"].model == {}
    for model, facts in (
        ({"name": "toy:gpt2"}, {"models": {"toy:llama": "toy:llama"}}),
        ({"name": str(tmp_path)}, {}),
        ({"name": "../x"}, {}),
        ({"tokenizer": "/etc"}, {}),
        ({"name": "toy:gpt2", "trust_remote_code": True}, {}),
        ({"trust_remote_code": True}, {}),
    ):
        wrong = rig.load({**rig.RECIPE, "groups": {**GROUPS, "small": {"share": 0.5, "model": model}}})
        with pytest.raises(ConfigError):
            allowed(wrong, **facts)
    assert allowed(made).data == rig.fedllm.Recipe.model_validate(made).data, "and no other section changes"


def test_a_recipe_that_is_none_is_refused_in_words_of_recipes() -> None:
    for wrong in ({"groups": []}, {"groups": {"a": 1}}, {"model": "toy:llama"}, {"data": None}, {"moddel": {}}):
        with pytest.raises(ConfigError):
            allowed({**rig.recipe(), **wrong})


def test_no_tracker_is_opened_at_the_server() -> None:
    found = allowed(rig.recipe(tracking={"wandb": "theirs", "mlflow": "x", "mlflow_uri": "sqlite:////tmp/x"}))
    assert found.tracking == type(found.tracking)()


def test_a_job_has_the_server_ask_no_host_and_write_no_file_that_its_own_file_does_not_name() -> None:
    url, options = "https://models.example.org/v1", dict[str, Any]()
    run = ground.play()

    def checked(asking: dict[str, Any], beside: bool = False, **facts: Any) -> None:
        method = {"name": "fed-sp-sc", **({} if beside else {"asking": asking})}
        more = {"methods": {"fed-sp-sc": {"asking": asking}}} if beside else {}
        recipe = run.load_recipe({**rig.RECIPE, "method": method, **more, "train": {}, **options})
        program.outward(run.method_of(recipe), ServerFacts(device="cpu", **facts))

    asked = {"endpoint": {"url": url, "model": "m", "key_env": "WANDB_API_KEY"}}
    for beside in (False, True):
        with pytest.raises(ConfigError, match=r"models\.example\.org/v1' with the key in WANDB_API_KEY"):
            checked(asked, beside)
        with pytest.raises(ConfigError, match=r"names the file '/etc/cron\.d/x'"):
            checked({"cache": "/etc/cron.d/x"}, beside, endpoints={url: None})
    with pytest.raises(ConfigError, match="no endpoint"):
        checked({"endpoint": {"url": url, "model": "m"}})
    for endpoints in ({url: None}, {url: "MODEL_KEY"}, {"https://other.example.org/v1": "WANDB_API_KEY"}):
        with pytest.raises(ConfigError, match="endpoints"):
            checked(asked, endpoints=endpoints)
    with pytest.raises(ConfigError) as found:
        checked({"endpoint": {"url": "https://me:secret@models.example.org/v1", "model": "m"}})
    assert "secret" not in str(found.value)
    checked(asked, endpoints={f"{url}/": "WANDB_API_KEY"})
    checked({"endpoint": {"url": url, "model": "m"}}, endpoints={url: "MODEL_KEY"})
    checked({})


# --- whose job is the newest ------------------------------------------------------------------------------------------


def test_a_coordinator_sees_and_ends_its_own_jobs_of_a_name_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(number: str, name: str, by: str, at: float, status: str = "RUNNING") -> dict[str, Any]:
        return {"job_id": number, "name": name, "submitter_name": by, "submit_time": at, "status": status}

    known = [
        of("mine", "run", rig.ADMIN, 9.0), of("later", "run", rig.ADMIN, 10.0),
        of("over", "run", rig.ADMIN, 2.0, "FINISHED:ABORTED"), of("theirs", "run", "eve@hub.org", 11.0),
        of("longer", "run-2", rig.ADMIN, 12.0),
    ]  # fmt: skip
    ended = list[str]()

    class Inner:
        username = rig.ADMIN

        def list_jobs(self, detailed: bool = False, name_prefix: str | None = None) -> list[dict[str, Any]]:
            assert detailed, "the short list does not say who submitted a job"
            return [one for one in known if one["name"].startswith(name_prefix or "")]

        def abort_job(self, number: str) -> None:
            ended.append(number)

        def submit_job(self, folder: str) -> str:
            return "new"

    monkeypatch.setattr(job, "write", lambda folder, *_: folder)
    admin = session.Session(Inner(), host.sites.admin)
    assert admin.newest("run") == "later" and admin.newest("nothing") is None
    assert admin.submit("run", rig.recipe(**SHORT), sorted(HOMES)) == "new"
    assert ended == ["mine", "later"]

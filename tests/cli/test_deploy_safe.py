"""Keys, kits and runs when something goes wrong in between: a full disk, a torn file, Ctrl-C, a swapped request."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.core.errors import ConfigError, RunError
from fedllm.deploy import coordinator, network
from fedllm.deploy import request as requests
from fedllm.deploy.kit import Kit
from fedllm.deploy.request import Request
from fedllm.engine import durable
from fedllm.engine.nvflare import job as jobs
from fedllm.engine.nvflare import kits, trust
from fedllm.recipe import load_recipe
from fedllm.sites.manifest import ManifestError
from tests.cli import key_rig
from tests.cli.across import ADMIN, contents, values, write
from tests.cli.key_rig import EVE, ORGANISATION, csr
from tests.cli.lines import invoke, ok


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and requests of north and Eve."""
    place = tmp_path_factory.mktemp("safe")
    ok("deploy", "provision", write(place / "sites.yaml", key_rig.network()), "--folder", place / "net")
    for name in ("north", EVE):
        ok("deploy", "request", name, "--organisation", ORGANISATION[name], "--folder", place / name)
    return place


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "here")


def refused(*words: Any) -> str:
    result = invoke(*words)
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    return " ".join(result.stderr.split())


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_each_request_has_its_own_fingerprint(place: Path) -> None:
    """Two requests whose keys were exchanged on their way have the fingerprints of the two that were told."""
    files = [place / name / f"{name}.csr" for name in ("north", EVE)]
    north, eve = (Request.of(file).fingerprint for file in files)
    line = ["deploy", "sign", *files, "--folder", place / "net"]

    def given(*told: str) -> list[str]:
        return [word for text in told for word in ("--fingerprint", text)]

    swapped = refused(*line, *given(f"north={eve}", f"{EVE}={north}"))
    assert f"The key of 'north' has the fingerprint {north}. The one given is another: {eve}." in swapped
    assert "is given for one of 2 requests" in refused(*line, *given(north, eve))
    assert f"No fingerprint is given for '{EVE}'." in refused(*line, *given(f"north={north}"))
    assert "There is no request of 'south'." in refused(*line, *given(f"north={north}", f"south={eve}"))
    twice = refused(*line, *given(f"north={north}", f"north={eve}", f"{EVE}={eve}"))
    assert "Two fingerprints are given for 'north'." in twice
    assert "'x' is no fingerprint." in refused(*line, *given("north=x", f"{EVE}={eve}"))
    assert not (place / "net" / "packages").exists(), "nothing was signed"
    ok(*line, *given(f"north={north}", f"{EVE}={eve}"))
    known = ["deploy", "sign", files[0], "--folder", place / "net"]
    assert "The one given is another" in refused(*known, *given(eve)), "also where the key is known"
    ok(*known, *given(f"north={north.lower()}"))


def test_equal_keys_of_one_batch_are_refused_before_anything_is_signed(place: Path, tmp_path: Path) -> None:
    for name in ("north", EVE):
        (tmp_path / f"{name}.csr").write_bytes(csr(key_rig.KEYS["good"], name))
    both = [tmp_path / f"{name}.csr" for name in ("north", EVE)]
    one = Request.of(both[0]).fingerprint
    told = ["--fingerprint", f"north={one}", "--fingerprint", f"{EVE}={one}"]
    assert "are for one key" in refused("deploy", "sign", *both, "--folder", place / "net", *told)
    assert not (place / "net" / "packages").exists()


# --- files that are written ------------------------------------------------------------------------------------------


def provisioned(place: Path, name: str) -> Path:
    found = network.last(place / "net")
    assert found is not None
    network.provision(found.with_site(name, "clinic"), place / "net")
    return place / "net" / "kits" / name


def persist_half(self: Any) -> None:
    """As FLARE does it, on a disk that is full after 100 bytes."""
    with Path(self.state_dir, "cert.json").open("w") as file:
        file.write(json.dumps(self.content)[:100])
    raise OSError(errno.ENOSPC, "No space left on device")


def persist_quietly(self: Any) -> None:
    Path(self.state_dir, "cert.json").write_text(json.dumps(self.content)[:100])


def persist_another(self: Any) -> None:
    Path(self.state_dir, "cert.json").write_text(json.dumps({**self.content, "root_pri_key": "another"}))


@pytest.mark.parametrize("persist", [persist_half, persist_quietly, persist_another])
def test_the_authoritys_key_outlives_a_full_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch, persist: Callable[[Any], None]
) -> None:
    folder = place / "net" / "authority" / "trio" / "state"
    before = (folder / "cert.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("nvflare.lighter.impl.cert._CertState.persist", persist)
        with pytest.raises(ConfigError):
            provisioned(place, "east")
    assert (folder / "cert.json").read_bytes() == before
    assert [file.name for file in folder.iterdir() if file.name.startswith("cert")] == ["cert.json"]
    kit = provisioned(place, "east")
    assert (kit / "startup/rootCA.pem").read_bytes() == (place / "net/kits/south/startup/rootCA.pem").read_bytes()


def test_the_authoritys_key_outlives_a_loss_of_power(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLARE was writing when the machine stopped; then the copy beside its file is the authority."""
    file, seen = place / "net" / "authority" / "trio" / "state" / "cert.json", list[int]()
    persist = "nvflare.lighter.impl.cert._CertState.persist"

    def stops(self: Any) -> None:
        copy = file.with_name("cert.json.before")
        seen.append(copy.stat().st_mode & 0o777)
        shutil.copy2(copy, place / "copy")
        persist_half(self)

    with monkeypatch.context() as patched:
        patched.setattr(persist, stops)
        with pytest.raises(ConfigError):
            provisioned(place, "east")
    assert seen == [0o600]
    shutil.move(place / "copy", file.with_name("cert.json.before"))
    file.write_bytes(b'{"root_cert": "-----BEG')
    kit = provisioned(place, "east")
    assert (kit / "startup/rootCA.pem").read_bytes() == (place / "net/kits/south/startup/rootCA.pem").read_bytes()


def test_an_authority_that_cannot_be_read_is_left_alone(place: Path) -> None:
    file = place / "net" / "authority" / "trio" / "state" / "cert.json"
    file.write_bytes(b"{")
    with pytest.raises(ConfigError, match="cannot be read"):
        provisioned(place, "east")
    assert file.read_bytes() == b"{"


def test_a_first_authority_that_could_not_be_written_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = network.NetworkFile.from_values(values())
    with monkeypatch.context() as patched:
        patched.setattr("nvflare.lighter.impl.cert._CertState.persist", persist_half)
        with pytest.raises(ConfigError):
            network.provision(file, tmp_path / "net")
    assert set(network.provision(file, tmp_path / "net").made) == set(file.participants())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("net/kits/south/local/resources.json", "{", ("deploy-settle",)),
        ("net/kits/south/local/authorization.json", "[]", ("deploy-settle",)),
        ("net/kits/south/local/fedllm.json", "{", ("join", "net/kits/south", "--check")),
        ("net/kits/south/local/fedllm.json", "[1]", ("join", "net/kits/south", "--check")),
        ("net/network.json", "{", ("deploy", "renew", "--folder", "net")),
        ("net/network.json", "[1]", ("deploy", "add-site", "east", "--organisation", "x", "--folder", "net")),
        ("net/authority/own.json", "{", ("deploy", "renew", "--folder", "net")),
    ],
)
def test_a_torn_file_is_named(place: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    (place / name).write_text(text)
    if words == ("deploy-settle",):
        with pytest.raises(ConfigError, match=Path(name).name):
            kits.harden(place / "net/kits/south", {})
        return
    said = refused(*[str(place / word) if word.startswith("net") else word for word in words])
    assert Path(name).name in said and "cannot be read" in said


def test_what_is_the_same_is_not_written_again(place: Path) -> None:
    kit = Kit.of(place / "net" / "kits" / "south")
    kit.settle({"device": "cpu"})
    files = [kit.folder / "local" / name for name in ("resources.json", "authorization.json", "fedllm.json")]
    before = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    kit.folder.chmod(0o755)
    kit.settle({"device": "cpu"})
    assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files] == before
    assert kit.folder.stat().st_mode & 0o777 == 0o700, "a kit is for its owner alone"
    kit.settle({"device": "cuda:0"})
    assert json.loads(files[2].read_text()) == {"device": "cuda:0"}


def test_a_disk_that_is_full_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit.of(place / "net" / "kits" / "south")
    kit.settle({"device": "cpu"})
    before = contents(kit.folder)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedllm.engine.durable.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        kit.settle({"device": "cuda:0"})
    assert contents(kit.folder) == before
    with pytest.raises(ConfigError, match=r"client\.key cannot be made: No space"):
        requests.make(place / "new", "west", "west_clinic")
    assert not list((place / "new").rglob("*key*")), "no half of a key is left"


def test_a_mode_holds_from_the_first_byte(tmp_path: Path) -> None:
    file, seen = tmp_path / "secret", list[int]()
    (tmp_path / "secret.partial").write_text("of before, and open")
    (tmp_path / "secret.partial").chmod(0o666)
    real = os.fsync
    before = os.umask(0)
    try:
        os.fsync = lambda number: (seen.append(os.fstat(number).st_mode), real(number))[1]  # type: ignore[assignment]
        durable.write(file, b"key", durable.OWN)
        durable.create(tmp_path / "new", b"key", durable.OWN)
    finally:
        os.fsync = real
        os.umask(before)
    assert [mode & 0o777 for mode in seen if stat.S_ISREG(mode)] == [
        0o600,
        0o600,
    ] and file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        durable.create(tmp_path / "new", b"other", durable.OWN)
    assert (tmp_path / "new").read_bytes() == b"key" and len(list(tmp_path.iterdir())) == 2


# --- the record of a run ----------------------------------------------------------------------------------------------


class Server:
    """What a coordinator's session says, and what it was asked for."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault, self.there = fault, dict[str, str]()

    def submit(self, run: str, *_: Any, **__: Any) -> str:
        self.there[run] = "job-1"
        if self.fault is not None:
            raise self.fault
        return "job-1"

    def newest(self, run: str) -> str | None:
        return self.there.get(run)


def record() -> coordinator.Record:
    return coordinator.Record("first", {}, ["south"], "research", [])


def test_a_run_is_known_from_before_it_is_submitted(place: Path) -> None:
    """Ctrl-C between the server's answer and the coordinator's disk."""
    kit, server = Kit.of(place / "net" / "kits" / ADMIN), Server(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        record().submit(kit, server)  # type: ignore[arg-type]
    kept = coordinator.record(kit, "first")
    assert kept.jobs == [] and coordinator.newest(server, kept) == "job-1"  # type: ignore[arg-type]
    nothing = Server()
    assert coordinator.known(nothing, kept) is None  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"did not reach the server.*deploy resume first"):
        coordinator.newest(nothing, kept)  # type: ignore[arg-type]
    again = kept.submit(kit, nothing)  # type: ignore[arg-type]
    assert again.jobs == ["job-1"] and coordinator.record(kit, "first") == again


def test_a_run_that_could_not_be_signed_is_none(place: Path) -> None:
    kit = Kit.of(place / "net" / "kits" / ADMIN)
    with pytest.raises(ManifestError):
        record().submit(kit, Server(ManifestError("no")))  # type: ignore[arg-type]
    assert coordinator.records(kit) == {}
    with pytest.raises(RunError):
        record().submit(kit, Server(RunError("The server is gone.")))  # type: ignore[arg-type]
    assert list(coordinator.records(kit)) == ["first"], "it may have been taken"


@pytest.mark.parametrize("name", ["replies", "audit.jsonl", "worker.log"])
def test_a_name_that_sites_need_is_not_given_to_a_run(place: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"No run can have the id '{name}'"):
        coordinator.free_name(Kit.of(place / "net" / "kits" / ADMIN), name, "quickstart")


def test_nothing_of_the_coordinators_machine_is_signed(place: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    given = {
        "data": {"path": str(mine), "public": {"path": str(mine)}, "partition": {"by": "natural", "column": "who"}},
        "runs": str(tmp_path / "runs"),
    }
    told = coordinator.across(load_recipe(given))
    assert str(tmp_path) not in json.dumps(told)
    again = load_recipe(told)
    assert again.model_dump(mode="json") == told and again.rounds == load_recipe(given).rounds
    admin = place / "net" / "kits" / ADMIN
    signed = trust.signed(admin, "first", told, ["south"], purpose="research")
    assert str(tmp_path).encode() not in signed.manifest


# --- what a job may bring ---------------------------------------------------------------------------------------------


def loaded(kit: Path, site: str, change: Callable[[dict[str, Any]], None]) -> Any:
    """A job's executor as FLARE's client process loads it from a kit."""
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.workspace import Workspace
    from nvflare.private.fed.client.client_json_config import ClientJsonConfigurator
    from nvflare.private.fed.utils.fed_utils import authorize_build_component

    app = jobs.write(kit.parent / f"job-{site}", "run", {}, [site], trust.Signed(b"", b"")) / "app"
    file = app / "config" / "config_fed_client.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    args = argparse.Namespace(
        job_id="job", client_name=site, workspace=str(kit), sp_scheme="grpc", sp_target="localhost:1", set=[]
    )
    place = Workspace(str(kit), site, "config")
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, place, private=True)
    context.set_prop(FLContextKey.CURRENT_JOB_ID, "job", private=False)
    context.set_prop(FLContextKey.JOB_META, {}, private=True)
    loader = ClientJsonConfigurator(place, str(file), args, str(app))
    loader.set_component_build_authorizer(authorize_build_component, fl_ctx=context, event_handlers=[])
    loader.configure()
    return loader.executors[0].executor


COMMANDS = ("cat", "head", "tail", "grep", "ls", "pwd")
"""What FLARE's `shell_commands` are."""
OTHERS: dict[str, dict[str, Any]] = {
    "of the library": {"path": "subprocess.Popen", "args": {"args": "true"}},
    "of FLARE": {"path": "nvflare.app_common.executors.task_script_runner.TaskScriptRunner", "args": {}},
    "of fedllm": {"path": "fedllm.engine.nvflare.warden.Warden", "args": {}},
    "the server's": {"path": jobs.CONTROLLER, "args": {"config": ""}},
    "longer": {"path": f"{jobs.EXECUTOR}s", "args": {}},
}


def test_flare_loads_the_executor_of_fedllm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvflare.fuel.utils.config_service import ConfigService

    from fedllm.engine.nvflare.site import FedllmExecutor

    for name in ("initialize", "add_section"):  # they would be those of this process
        monkeypatch.setattr(ConfigService, name, lambda *_, **__: None)

    assert isinstance(loaded(place / "net" / "kits" / "south", "south", lambda config: None), FedllmExecutor)


@pytest.mark.parametrize("other", OTHERS)
def test_flare_loads_no_other_class(place: Path, other: str) -> None:
    def executor(config: dict[str, Any]) -> None:
        config["executors"][0]["executor"] = OTHERS[other]

    def component(config: dict[str, Any]) -> None:
        config["components"] = [{"id": "mine", **OTHERS[other]}]

    for change in (executor, component):
        if other == "the server's" and change is component:
            continue  # of the two that are allowed
        with pytest.raises(Exception, match=r"not in allow_list|must be an Executor"):
            loaded(place / "net" / "kits" / "south", "south", change)


@pytest.mark.parametrize("kit", ["localhost", "south"])
@pytest.mark.parametrize("role", ["project_admin", "org_admin", "lead", "member"])
def test_nobody_may_send_code_or_commands(first: Path, kit: str, role: str) -> None:
    """FLARE's own reading of a kit's rights, where a job comes with a folder of code or a person sends a command."""
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import FLAuthorizer

    rights = json.loads((first / "net" / "kits" / kit / "local" / "authorization.json").read_text())
    judge, who = FLAuthorizer("south_clinic", rights), Person("x@hub.org", "hub", role)

    def may(right: str) -> bool:
        return bool(judge.authorize(AuthzContext(right=right, user=who, submitter=who))[0])

    assert not any(may(right) for right in ("byoc", "server-predeployed-flwr", *COMMANDS))
    assert may("submit_job") == (role in ("project_admin", "lead"))

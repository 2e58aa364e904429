"""deploy and join: kits, what is looked at before a start, runs across sites with real processes, audit logs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.core.errors import ConfigError, RunError
from fedllm.deploy import checkup, coordinator, network, starter, units
from fedllm.deploy.kit import Kit
from fedllm.sites.audit import AuditLog, Digest
from fedllm.sites.policy import Policy
from tests.cli.across import (
    ADMIN,
    PATIENCE,
    ROOT,
    SITES,
    Foreground,
    contents,
    foregrounds,
    free_port,
    rows,
    values,
    write,
)
from tests.cli.lines import ENVIRONMENT, as_json, invoke, ok, outside


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that nobody serves; tests do not change it."""
    folder = tmp_path_factory.mktemp("deploy")
    ok("deploy", "provision", write(folder / "sites.yaml", values(free_port())), "--folder", folder / "net")
    return folder / "net"


# --- a network -------------------------------------------------------------------------------------------------------


def test_the_examples_can_be_read() -> None:
    found = network.NetworkFile.of(ROOT / "examples" / "sites" / "sites.yaml")
    assert list(found.sites) == list(SITES)
    policy = Policy.of(ROOT / "examples" / "sites" / "policy.yaml")
    assert set(policy.coordinators) <= set(found.coordinators) and all(getattr(policy, name) for name in checkup.MUST)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"sitez": {}}, ["'sitez'", "Did you mean 'sites'?"]),
        ({"sites": {"north": {"organization": "x"}}}, ["sites.north.organization", "'sites.north.organisation'"]),
        ({"coordinators": {ADMIN: {"organisation": "hub", "role": "boss"}}}, ["role='boss'", "'lead'"]),
        ({"coordinators": {"ada": {"organisation": "hub"}}}, ["'ada' is no e-mail address"]),
        ({"sites": {"../north": {"organisation": "x"}}}, ["'../north'"]),
        ({"sites": {"north": {"organisation": "north-clinic"}}}, ["north-clinic"]),
        ({"sites": {}}, ["sites"]),
        ({"server": {"host": "hub", "port": 70000, "organisation": "hub"}}, ["70000"]),
        ({"server": {"host": "north", "organisation": "hub"}}, ["both the server's host and a site"]),
    ],
)
def test_a_mistake_in_the_file_is_named(change: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    result = invoke("deploy", "provision", write(tmp_path / "s.yaml", values(**change)), "--folder", tmp_path / "net")
    assert result.exit_code == 2 and not (tmp_path / "net").exists()
    assert all(text in result.stderr for text in texts), result.stderr
    assert "Traceback" not in result.stderr


def test_a_site_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sites.yaml"
    file.write_text("name: trio\nsites:\n  north: {organisation: a}\n  north: {organisation: b}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 4\): 'north' stands twice"):
        network.NetworkFile.of(file)


def test_kits_are_made_once_and_never_written_again(net: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "sites.yaml", values(Kit.of(net / "kits" / "localhost").port))
    before = contents(net)
    again = ok("deploy", "provision", file, "--folder", net)
    assert "nothing was changed" in again.stdout and contents(net) == before
    for name in (ADMIN, "localhost", *SITES):
        assert name in before["network.json"].decode()
    assert not list((net / "authority").rglob("prod_*")), "no second copy of kits lies about"
    assert all(oct(path.stat().st_mode)[-3:] == "700" for path in (net, net / "authority", net / "kits" / "north"))
    keys = [path for path in net.rglob("*") if path.suffix == ".key" or path.name == "cert.json"]
    assert keys and all(oct(path.stat().st_mode)[-3:] == "600" for path in keys)


def test_one_more_site_has_a_kit_of_the_same_authority(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    found = values(sites={"north": {"organisation": "north_clinic"}})
    file = write(tmp_path / "sites.yaml", found)
    ok("deploy", "provision", file, "--folder", folder)
    before = contents(folder / "kits")
    made = as_json("deploy", "add-site", "east", "--organisation", "east_clinic", "--folder", folder)
    assert [kit["name"] for kit in made["kits"] if kit["new"]] == ["east"]
    now = contents(folder / "kits")
    assert {name: now[name] for name in before} == before
    assert now["east/startup/rootCA.pem"] == before["north/startup/rootCA.pem"]
    assert now["east/startup/client.key"] != before["north/startup/client.key"]
    assert (
        "has a site 'east' already"
        in invoke("deploy", "add-site", "east", "--organisation", "x", "--folder", folder).stderr
    )
    forgotten = as_json("deploy", "provision", file, "--folder", folder)
    assert forgotten["left_out"] == ["east"]
    for change, text in (
        ({"server": {"host": "localhost", "port": 9, "organisation": "hub"}}, "server.port was 8002 and is 9"),
        ({"coordinators": {ADMIN: {"organisation": "hub", "role": "lead"}}}, "role of 'ada@hub.org' was project_admin"),
    ):
        wrong = invoke("deploy", "provision", write(file, {**found, **change}), "--folder", folder)
        assert wrong.exit_code == 2 and text in wrong.stderr
    assert contents(folder / "kits") == now


# --- kits ------------------------------------------------------------------------------------------------------------


def test_a_kit_says_whose_it_is(net: Path) -> None:
    kinds = {name: Kit.of(net / "kits" / name).kind for name in ("localhost", ADMIN, "north")}
    assert list(kinds.values()) == ["server", "coordinator", "site"]
    site = Kit.of(net / "kits" / "north", "site")
    assert (site.name, site.network, site.host) == ("north", "trio", "localhost")
    with pytest.raises(ConfigError, match="is the kit of a coordinator"):
        Kit.of(net / "kits" / ADMIN, "site")
    with pytest.raises(ConfigError, match=r"Kits in it: ada@hub\.org, localhost"):
        Kit.of(net / "kits")
    with pytest.raises(ConfigError, match="is no kit"):
        Kit.of(net / "nothing")


def test_a_server_kit_that_was_moved_keeps_its_jobs_where_it_is(net: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(net / "kits" / "localhost", moved)
    kit = Kit.of(moved)
    kit.settle({"device": "cpu"})
    text = (moved / "local" / "resources.json").read_text()
    assert str(moved) in text and str(net) not in text and "/tmp/nvflare" not in text
    assert json.loads((moved / "local" / "fedllm.json").read_text()) == {"device": "cpu"}


def test_a_unit_starts_the_same_command_and_is_not_written_over(net: Path, tmp_path: Path) -> None:
    file = tmp_path / "fedllm-server.service"
    ok("deploy", "start", net / "kits" / "localhost", "--unit", file)
    text = file.read_text()
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert line.endswith(f"deploy start {(net / 'kits' / 'localhost').resolve()}")
    assert "Restart=on-failure" in text and "KillMode=control-group" in text
    assert invoke("deploy", "start", net / "kits" / "localhost", "--unit", file).exit_code == 2
    assert units.quoted("/a b/50%") == '"/a b/50%%"' and units.quoted("$x") == "$$x"
    with pytest.raises(ConfigError, match=r"ends in \.service"):
        units.write(Kit.of(net / "kits" / "localhost"), ["x"], tmp_path / "name")


# --- join ------------------------------------------------------------------------------------------------------------


def test_the_policy_to_begin_with_allows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(starter.policy("north"), encoding="utf-8")
    policy = Policy.of(file)
    assert policy == Policy(site="north")
    said = re.sub(r"^# (?=[a-z_]+: )", "", starter.policy("north"), flags=re.MULTILINE)
    file.write_text(said, encoding="utf-8")  # with every '#' before a rule removed it is a policy, too
    assert all(getattr(Policy.of(file), name) for name in checkup.MUST)


def test_a_check_writes_nothing_and_tells_everything(net: Path, tmp_path: Path) -> None:
    kit = net / "kits" / "north"
    before = contents(kit)
    result = invoke("join", kit, "--data", rows(tmp_path / "mine.jsonl"), "--check", "--json")
    assert result.exit_code == 1 and contents(kit) == before
    found = json.loads(result.stdout)
    checks = {one["name"]: one for one in found["checks"]}
    assert list(checks) == ["data", "policy", "models", "device", "disk", "clock", "versions", "server"]
    assert "1 client, north; columns: instruction, response" in checks["data"]["text"]
    assert checks["policy"]["verdict"] == checks["server"]["verdict"] == "problem"
    assert "does not answer" in checks["server"]["text"] and not found["good"]


def test_without_a_policy_one_is_written_and_nothing_is_started(tmp_path: Path) -> None:
    ok("deploy", "provision", write(tmp_path / "s.yaml", values(free_port())), "--folder", tmp_path / "net")
    kit, mine = tmp_path / "net" / "kits" / "north", rows(tmp_path / "mine.jsonl")
    result = invoke("join", kit, "--data", mine)
    assert result.exit_code == 1 and "Without a policy nothing is allowed" in result.stdout
    written = kit / "local" / "policy.yaml"
    assert Policy.of(written).methods == ()
    written.write_text("site: south\n", encoding="utf-8")
    result = invoke("join", kit, "--data", mine)
    assert "is of the site 'south'" in result.stdout
    written.write_text("site: north\nmethods: [fedagv]\n", encoding="utf-8")
    result = invoke("join", kit, "--data", mine, "--check")
    assert "there is no method 'fedagv'" in result.stdout and "Did you mean 'fedavg'?" in result.stdout
    assert "allows nothing yet" in result.stdout and "Runs may be started by nobody." in result.stdout
    assert written.read_text().startswith("site: north"), "a policy that is there is not written over"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "It is not said where this site's rows are."),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "MINE", "--by", "sight"], "sight"),
        (["--data", "MINE", "--by", "x", "--client", "y"], "--by and --client are both given."),
        (["--data", "MINE", "--device", "cdua"], "device='cdua' cannot be used"),
        (["--data", "MINE", "--model", "tiny=./nowhere"], "nowhere"),
        (["data.limit=3"], "Options of data are given, and no --data."),
        (["--data", "MINE", "data.limt=3"], "data.limit"),
    ],
)
def test_a_mistake_of_a_site_is_named(words: list[str], text: str, net: Path, tmp_path: Path) -> None:
    mine = str(rows(tmp_path / "mine.jsonl"))
    given = [mine if word == "MINE" else word for word in words]
    result = invoke("join", net / "kits" / "south", *given, "--check")
    assert result.exit_code in (1, 2), result.output
    assert text in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_the_clock_is_held_against_the_certificate(net: Path) -> None:
    kit = Kit.of(net / "kits" / "north")
    begin, end = kit.term().begin, kit.term().end
    assert begin < datetime.now(UTC) < end
    day = timedelta(days=1)
    found = [checkup.clock(kit, now).verdict for now in (begin - day, begin + day, end - day, end + day)]
    assert found == ["problem", "ok", "note", "problem"]
    assert "behind" in checkup.clock(kit, begin - day).action


def test_a_stranger_at_the_port_is_not_taken_for_the_server(net: Path) -> None:
    """Something that speaks no TLS stands where the server should."""
    kit = Kit.of(net / "kits" / "north")
    with socket.create_server(("127.0.0.1", kit.port)) as there:
        child = os.fork()
        if child == 0:
            one, _ = there.accept()
            one.sendall(b"220 mail.example.org\r\n")
            time.sleep(1)
            os._exit(0)
        found = checkup.server(kit)
        os.waitpid(child, 0)
    assert found.verdict == "problem" and "is not the server" in found.text


# --- runs without a server -------------------------------------------------------------------------------------------


def test_commands_name_what_is_missing(net: Path) -> None:
    admin = net / "kits" / ADMIN
    for words in (["status"], ["run", "quickstart", "rounds=1"]):
        result = invoke("deploy", *words, "--kit", admin)
        assert result.exit_code == 8 and "does not answer" in result.stderr
    for word in ("log", "stop", "resume"):
        result = invoke("deploy", word, "none", "--kit", admin)
        assert result.exit_code == 2 and "There is no run of this kit 'none'." in result.stderr
    wrong = invoke("deploy", "run", "quickstart", "rounds=1", "--run", "a/b", "--kit", admin)
    assert wrong.exit_code == 2 and "is no id of a run" in wrong.stderr
    conflict = invoke("deploy", "run", "quickstart", "encrypted.ratio=0.5", "--kit", admin)
    assert conflict.exit_code == 2 and "secret key" in conflict.stderr
    assert invoke("deploy", "run", "quickstart", "--kit", net / "kits" / "north").exit_code == 2


def test_rounds_are_shown_once_and_faults_of_flare_are_ours(tmp_path: Path) -> None:
    lost = [{"client": "c1", "reason": "signal 9."}]
    events = [
        {"event": "round", "model": "federated", "round": 1, "used": 2, "loss": 1.0},
        {"event": "evaluation", "round": 1, "model": "federated"},
        {"event": "round", "model": "federated", "round": 1, "used": 3, "loss": 0.5, "lost": lost},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events), encoding="utf-8")
    lines = list(coordinator.lines(coordinator.kept_rounds(tmp_path)))
    assert lines == ["federated: round 1, loss 0.500, 3 uploads used; lost c1: signal 9"]
    from nvflare.fuel.flare_api.api_spec import AuthorizationError

    with pytest.raises(RunError, match="Your role does not allow it: no"), coordinator.translated():
        raise AuthorizationError("no")
    with pytest.raises(ZeroDivisionError), coordinator.translated():
        raise ZeroDivisionError


# --- audit -----------------------------------------------------------------------------------------------------------


def test_audit_logs_are_verified_and_matched(tmp_path: Path) -> None:
    sent = Digest.of(b"update")
    server, north, south = (tmp_path / f"{name}.jsonl" for name in ("hub", "north", "south"))
    with AuditLog(north) as log:
        log.append("north", "send", run="r", round=1, client="c0", payload=sent, decision="allowed")
        log.append("north", "end", run="r")
        last = log.last
    with AuditLog(server) as log:
        log.append("server", "receive", run="r", round=1, client="c0", payload=sent)
    with AuditLog(south) as log:
        log.append("south", "send", run="r", round=1, client="c1", payload=sent)
    assert "2 entries" in ok("deploy", "audit", "verify", north).stdout
    assert "say the same" in ok("deploy", "audit", "verify", server, north).stdout
    lost = invoke("deploy", "audit", "verify", f"a={north}", f"server={server}", f"b={south}", "--json")
    assert lost.exit_code == 1
    assert json.loads(lost.stdout)["unmatched"] == [{"log": "b", "line": 1, "why": "it was not received at the server"}]
    cut = north.read_text().splitlines(keepends=True)
    north.write_text(cut[0])
    assert invoke("deploy", "audit", "verify", north).exit_code == 0, "a cut end shows against an anchor alone"
    found = invoke("deploy", "audit", "verify", north, "--anchor", last)
    assert found.exit_code == 1 and "line 2 is bad" in found.stdout
    north.write_text("".join(cut).replace("c0", "c9"))
    found = invoke("deploy", "audit", "verify", server, north)
    assert found.exit_code == 1 and "north: line 1 is bad" in found.stdout
    assert "Traceback" not in invoke("deploy", "audit", "verify", tmp_path / "none.jsonl").stderr


def test_the_help_imports_no_flare() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fedllm.cli.main import app\n"
        "for words in (['--help'], ['deploy', '--help'], ['deploy', 'run', '--help'], ['join', '--help']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "heavy = ('nvflare', 'torch', 'yaml', 'fedllm.core', 'fedllm.deploy', 'fedllm.engine')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert found.stdout.strip() == "[]", found


# --- the whole, by the command line alone ----------------------------------------------------------------------------


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[Foreground]:
    with foregrounds(tmp_path) as found:
        yield found


@pytest.mark.slow
def test_from_nothing_to_an_adapter_and_a_new_site(foreground: Foreground) -> None:
    """Three sites on one machine; then a site is added while the server runs, and one is revoked."""
    place, kits = foreground.place, foreground.kits
    found = values(free_port(), sites={site: {"organisation": "clinic"} for site in SITES[:2]})
    ok("deploy", "provision", write(place / "sites.yaml", found), "--folder", place / "net")
    policy = ROOT / "examples" / "sites" / "policy.yaml"
    foreground.begin("server", "deploy", "start", kits / "localhost", until="The server is ready.")
    ok("deploy", "add-site", "west", "--organisation", "clinic", "--folder", place / "net")
    for count, site in enumerate(SITES):
        mine = rows(place / f"{site}.jsonl", 10 + count)
        words = ["join", kits / site, "--data", mine, "--policy", policy, "--device", "cpu"]
        foreground.begin(site, *words, until="The server has let this site in.")
    recipe = ["quickstart", "method=fedavg", "model.name=toy:llama", "rounds=2", "train.steps=1", "task.max_length=64"]
    given = [*recipe, "evaluation.against=[]", "--run", "first"]
    refused = foreground.admin("run", *given, "--data-set", "letters")
    assert refused.returncode == 8 and "data set 'letters' is not allowed" in refused.stderr, refused
    done = foreground.admin("run", *recipe, "evaluation.against=[]", "--data-set", "notes", "--json")
    assert done.returncode == 0, done
    result = json.loads(done.stdout)
    assert result["finished"] and Path(result["folder"], "adapter", "adapter_model.safetensors").is_file()
    told = json.loads(foreground.admin("log", result["run"], "--json").stdout)
    assert [(one["round"], one["used"]) for one in told["rounds"]] == [(1, 3), (2, 3)]
    got = foreground.admin("fetch", result["run"], "--folder", place / "got")
    assert got.returncode == 0 and (place / "got" / "report.html").is_file()
    logs = [kits / name / "fedllm" / "audit.jsonl" for name in ("localhost", *SITES)]
    assert "say the same" in ok("deploy", "audit", "verify", *logs).stdout
    assert foreground.admin("revoke", "west").returncode == 0
    assert "Ended." in foreground.end("west")
    again = outside("join", kits / "west", timeout=PATIENCE)
    assert again.returncode == 8 and "it was revoked" in again.stdout, again
    status = json.loads(foreground.admin("status", "--json").stdout)
    assert status["sites"] == ["north", "south"]
    assert {one["run"]: one["status"] for one in status["jobs"]}[result["run"]] == "FINISHED:COMPLETED"
    for name in ("north", "south", "server"):
        assert "Ended." in foreground.end(name)

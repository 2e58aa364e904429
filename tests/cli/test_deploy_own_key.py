"""Over FLARE: a site and a coordinator with keys of their own take part, are renewed, and one of them is revoked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.deploy.kit import Kit
from tests.cli.across import ADMIN, PATIENCE, ROOT, Foreground, foregrounds, rows, write
from tests.cli.key_rig import installed, network
from tests.cli.lines import ok, outside


@pytest.mark.slow
def test_a_site_with_its_own_key_takes_part_is_renewed_and_revoked(tmp_path: Path) -> None:
    """A run of two sites and a coordinator; one of the sites and the coordinator keep their own keys."""
    found = network(sites={site: {"organisation": f"{site}_clinic"} for site in ("north", "south")})
    found["coordinators"][ADMIN]["key"] = "own"
    net, policy = tmp_path / "net", ROOT / "examples" / "sites" / "policy.yaml"
    ok("deploy", "provision", write(tmp_path / "sites.yaml", found), "--folder", net)
    for name, organisation in (("north", "north_clinic"), (ADMIN, "hub")):
        ok("deploy", "request", name, "--organisation", organisation, "--folder", tmp_path / name)
        installed(tmp_path, name)

    def join(there: Foreground, site: str, kit: Path) -> None:
        words = ["join", kit, "--data", rows(tmp_path / f"{site}.jsonl"), "--policy", policy, "--device", "cpu"]
        there.begin(site, *words, until="The server has let this site in.")

    recipe = ["quickstart", "method=fedavg", "model.name=toy:llama", "rounds=1", "train.steps=1", "task.max_length=64"]
    line = ["run", *recipe, "evaluation.against=[]", "--data-set", "notes", "--json", "--kit", tmp_path / ADMIN]
    with foregrounds(tmp_path) as there:
        there.begin("server", "deploy", "start", net / "kits" / "localhost", until="The server is ready.")
        join(there, "south", net / "kits" / "south")
        join(there, "north", tmp_path / "north")
        done = outside("deploy", *line, timeout=PATIENCE)
        assert done.returncode == 0 and json.loads(done.stdout)["finished"], done
        logs = [net / "kits/localhost", tmp_path / "north", net / "kits/south"]
        verify = ["deploy", "audit", "verify", *(kit / "fedllm/audit.jsonl" for kit in logs)]
        assert "say the same" in ok(*verify).stdout
        there.end("north")
        for name in ("north", ADMIN):
            before = Kit.of(tmp_path / name).certificate.read_bytes()
            installed(tmp_path, name)
            assert Kit.of(tmp_path / name).certificate.read_bytes() != before
        join(there, "north", tmp_path / "north")
        status = outside("deploy", "status", "--json", "--kit", tmp_path / ADMIN, timeout=PATIENCE)
        assert json.loads(status.stdout)["sites"] == ["north", "south"], status
        assert "say the same" in ok(*verify).stdout, "logs of runs that were signed under former certificates"
        assert outside("deploy", "revoke", "north", "--kit", tmp_path / ADMIN).returncode == 0
        there.end("north")
        installed(tmp_path)
        late = outside("join", tmp_path / "north", timeout=PATIENCE)
        assert late.returncode == 8 and "it was revoked" in late.stdout, late
        for name in ("south", "server"):
            there.end(name)

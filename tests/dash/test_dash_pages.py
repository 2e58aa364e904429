"""What a path is taken for, and what its pages say: numbers against the files, states, refusals, no text of data."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dash_rig as rig

from fedllm.core.errors import ConfigError
from fedllm.dash import log_page
from fedllm.dash.chain import Chain, Told
from fedllm.dash.folder import Run
from fedllm.dash.source import source_of
from fedllm.sites import audit
from fedllm.sites.audit import GENESIS, Note


def page_of(path: Path, run: str | None = None) -> dict[str, Any]:
    source = source_of(path)
    assert source.refresh(float("inf"))
    found = source.page(run)
    assert found is not None
    json.dumps(found, allow_nan=False)
    return found


# --- what a path is --------------------------------------------------------------------------------------------------


def test_every_kind_of_folder_is_known(tmp_path: Path) -> None:
    run = rig.run_folder(tmp_path / "runs" / "one", [rig.round_line(1)])
    found = {
        "the folder of the run one": run,
        "a folder of runs": run.parent,
        "the kit of the server hub.org of the network trio": rig.server_kit(tmp_path / "net" / "hub"),
        "the kit of the site north of the network trio": rig.site_kit(tmp_path / "net" / "north"),
        "the kit of the coordinator ada@hub.org": rig.kit(tmp_path / "net" / "ada", "coordinator", "ada@hub.org"),
    }
    for words, path in found.items():
        assert source_of(path).taken.startswith(words)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("rnus", ["There is no folder", "Known: a run's folder", "runs'?", "Name a folder that exists."]),
        ("runs/one/metrics.jsonl", ["is a file", "fedllm dash", "one"]),
        ("empty", ["holds no run and is no kit", "Known:", "'fedllm run' printed"]),
        ("net", ["holds several", "Kits in it: north", "net/north"]),
        ("broken", ["fed_client.json cannot be read"]),
    ],
)
def test_anything_else_is_an_error_in_four_parts(given: str, texts: list[str], tmp_path: Path) -> None:
    rig.run_folder(tmp_path / "runs" / "one", [])
    (tmp_path / "empty").mkdir()
    rig.site_kit(tmp_path / "net" / "north")
    rig.write(tmp_path / "broken" / "startup" / "fed_client.json", {"client": 1})
    with pytest.raises(ConfigError) as fault:
        source_of(tmp_path / given)
    assert all(text in str(fault.value) for text in texts), fault.value


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_its_numbers_with_their_units(tmp_path: Path) -> None:
    guard = {"epsilon": 2.0, "delta": 1e-5, "budget": 8.0, "unit": "client", "noise": 1.1, "clip": 0.5, "line": "fine"}
    lines = [rig.round_line(n, guard=guard) for n in range(1, 5)]
    found = page_of(rig.run_folder(tmp_path / "run", lines, rig.result(guarantee=["- epsilon 2"])))
    assert found["state"]["word"] == "finished" and found["reading"] is None
    assert found["lead"] == ["Together the 2 clients reach an exact match of 25.0 %."]
    tiles = dict(found["tiles"])
    assert tiles["4 of 4"] == "rounds are over" and tiles["25.0 %"].startswith("exact match")
    assert tiles["4 kB"] == "sent by the clients; 2 kB received" and tiles["ε 2"] == "privacy spent, of 8"
    assert "ε = 2 of 8; 6 left" in rig.section(found, "Privacy spent")
    assert "North clinic" in rig.section(found, "Clients")
    loss = next(b for b in found["sections"][1]["blocks"] if b["block"] == "chart" and b["title"] == "Training loss")
    assert loss["lines"][0]["points"] == [[1, 2.0], [2, 1.0], [3, 2.0 / 3], [4, 0.5]]


def test_the_states_of_a_run(tmp_path: Path) -> None:
    hour = time.time() + 3_600
    lines = [rig.round_line(1), rig.round_line(2)]

    def state(name: str, *args: Any, now: float | None = None, **files: str) -> str:
        folder = rig.run_folder(tmp_path / name, *args)
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text, encoding="utf-8")
        run = Run(folder)
        run.refresh(float("inf"))
        return run.state(now).word

    assert state("waiting", []) == "waiting"
    assert state("going", lines) == "under way" and state("silent", lines, now=hour) == "silent"
    slow = [rig.round_line(1, seconds=3_000.0)]
    assert state("slow", slow, now=hour) == "under way", "rounds that take long are given longer"
    assert state("stopped", lines, rig.result(2, finished=False)) == "stopped"
    assert state("resumed", [*lines, rig.round_line(3)], rig.result(2, finished=False)) == "under way"
    assert state("finished", lines, rig.result(2), now=hour) == "finished"
    assert state("failed", lines, error_txt="no") == "failed"
    assert state("judged", lines, standing_json='{"name": "failed", "reason": "no"}') == "failed"
    assert state("ended", lines, standing_json='{"name": "stopped"}', now=hour) == "stopped"
    assert state("paused", lines, standing_json='{"name": "waiting"}', now=hour) == "waiting"


def test_a_run_is_followed_while_it_goes_on_and_is_resumed(tmp_path: Path) -> None:
    folder = rig.run_folder(tmp_path / "run", [rig.round_line(1), rig.round_line(2)])
    source, size = source_of(folder), (folder / "metrics.jsonl").stat().st_size

    def rounds() -> str:
        source.refresh(float("inf"))
        found = source.page(None)
        assert found is not None
        return found["tiles"][0][0]

    assert rounds() == "2 of 4"
    rig.append(folder, [rig.round_line(3)])
    assert rounds() == "3 of 4"
    os.truncate(folder / "metrics.jsonl", size)  # as a resumed run does
    rig.append(folder, [rig.round_line(3, loss=0.125, bytes_up=1_001)])
    assert rounds() == "3 of 4" and "0.125" in rig.words(source.page(None))


def test_a_folder_of_runs_lists_them_and_each_has_a_page(tmp_path: Path) -> None:
    rig.run_folder(tmp_path / "a", [rig.round_line(1)])
    rig.run_folder(tmp_path / "b", [rig.round_line(n) for n in range(1, 5)], rig.result())
    found = page_of(tmp_path)
    assert rig.tiles(found)["runs"] == "2"
    assert "25.0 % exact match" in rig.section(found, "Runs")
    assert page_of(tmp_path, "b")["back"] and source_of(tmp_path).page("../b") is None
    rig.run_folder(tmp_path / "c", [])
    source = source_of(tmp_path)
    source.refresh(float("inf"))
    assert source.page("c") is not None, "a run that begins later is found"


def test_damaged_and_hostile_files_are_shown_as_what_they_are(tmp_path: Path) -> None:
    lost = [{"client": rig.EVIL, "reason": rig.EVIL}, "nonsense", None]
    lines = [rig.round_line(1, cohort=[rig.EVIL, 7, None], lost=lost, rejected="x", failed=rig.EVIL, used="many")]
    folder = rig.run_folder(tmp_path / "run", lines, rig.result(metric=rig.EVIL, rows=[7, {"pooled": [], "label": {}}]))
    (folder / "partition.json").write_text("{", encoding="utf-8")
    (folder / "recipe.yaml").write_text("a: &a [*a]\nrounds: [1", encoding="utf-8")
    found = page_of(folder)
    assert rig.EVIL in rig.section(found, "Refused and lost")
    (folder / "result.json").write_text("[]", encoding="utf-8")
    assert "result.json is damaged" in rig.words(page_of(folder))


# --- server and site -------------------------------------------------------------------------------------------------


def test_a_server_shows_sites_bytes_refusals_and_its_log(tmp_path: Path) -> None:
    kit = rig.server_kit(tmp_path / "hub")
    found = page_of(kit)
    tiles = rig.tiles(found)
    assert tiles["runs"] == "2" and tiles["came from sites; 1 kB went to them"] == "2 kB"
    assert tiles["lines of the audit log, all good"] == "18"
    rows = next(one for one in found["sections"] if one["title"] == "Sites")["blocks"][0]["rows"]
    assert [(row[0], row[3], row[4], row[5]) for row in rows] == [
        ("north", "2", "1 kB", "500 B"), ("south", "2", "1 kB", "500 B"),
    ]  # fmt: skip
    assert rows[0][1]["text"] == "refused" and rows[1][1]["text"] == "joined"
    assert "'letters' is not allowed" in rig.section(found, "Refused and lost")
    assert page_of(kit, "first")["state"]["word"] == "finished"
    refused = page_of(kit, "second")
    assert refused["state"]["word"] == "refused" and "letters" in refused["state"]["why"]


def test_a_server_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    found = page_of(rig.kit(tmp_path / "hub", "server", "hub.org"))
    assert "No run yet. A coordinator starts one with" in rig.section(found, "Runs")
    assert "There is no entry yet." in rig.section(found, "Audit log")


def test_a_site_shows_what_left_why_and_what_is_left_of_the_budgets(tmp_path: Path) -> None:
    kit = rig.site_kit(tmp_path / "north", rounds=2)
    found = page_of(kit)
    tiles = rig.tiles(found)
    assert tiles["left this site"] == "2 kB" and tiles["uploads stayed here, by the policy"] == "1"
    assert "all to the server localhost:8002" in found["lead"][0]
    run = page_of(kit, "first")
    why = rig.section(run, "Why it was allowed")
    assert "stand in the policy that was read when the run was admitted" in why
    assert "2 kB of 50 kB; 48 kB left" in why and "1 kB of 5 kB; 4 kB left" in why
    assert "ada@hub.org" in why and "2 asked for, 2 seen" in why
    assert "max_egress_round: at most 5,000" in rig.section(run, "Refused and lost")
    assert "stayed here" in rig.section(run, "Upload by upload")
    second = page_of(kit, "second")
    assert second["state"]["word"] == "refused" and rig.EVIL in second["state"]["why"]
    assert "Nothing left this site" in second["lead"][0]


def test_a_policy_that_changed_or_cannot_be_read_is_told(tmp_path: Path) -> None:
    kit = rig.site_kit(tmp_path / "north")
    policy = kit / "local" / "policy.yaml"
    rig.write(policy, {**rig.POLICY, "max_rounds": 7})
    why = rig.section(page_of(kit, "first"), "Why it was allowed")
    assert "The policy has changed since this run was admitted" in why and "\n7\n" in why
    policy.write_text("max_rounds: -1", encoding="utf-8")
    assert "nothing is allowed" in rig.section(page_of(kit, "first"), "Why it was allowed")
    policy.unlink()
    assert "cannot be read" in rig.section(page_of(kit), "What this site allows")
    rig.write(kit / "local" / "fedllm.json", {})
    assert "has no policy" in rig.section(page_of(kit), "What this site allows")


def test_a_damaged_log_is_told_and_what_follows_is_not_shown(tmp_path: Path) -> None:
    kit = rig.site_kit(tmp_path / "north")
    file = kit / "fedllm" / "audit.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5].replace('"bytes":1001', '"bytes":1') + "".join(lines[6:]))
    found = page_of(kit)
    assert "Line 6 is not what was written" in rig.section(found, "Audit log")
    assert rig.tiles(found)["left this site"] == "0 B"
    assert "what left after that is not known" in found["lead"][0]
    assert page_of(kit, "first")["state"]["word"] == "not known"


def test_a_run_name_in_a_log_is_no_path(tmp_path: Path) -> None:
    kit = rig.site_kit(tmp_path / "net" / "north")
    rig.write(tmp_path / "net" / "secret" / "manifest.json", {"manifest": {"purpose": "leaked"}})
    rig.log(kit / "fedllm" / "audit.jsonl", "north", [Note("start", "a/../../../secret")])
    found = page_of(kit, "a/../../../secret")
    assert "leaked" not in rig.words(found)


def test_the_standing_of_a_run_in_a_log() -> None:
    told = log_page.Told(first="t", last="2026-01-01T00:00:00.000000+00:00")
    log = Chain(Path("none"))
    assert log_page.standing(told, log).word == "silent"
    log.at_end = False
    assert log_page.standing(told, log).word == "being read", "an end may stand behind what was read"
    log.bad = 7, "it is not JSON"
    assert log_page.standing(told, log).word == "not known"
    told.over, told.why, told.began = "t", "The run was ended: the job was aborted.", "t"
    assert log_page.standing(told, log).word == "stopped"
    told.why = "The disk is full."
    assert log_page.standing(told, log).word == "failed"


@pytest.mark.parametrize(
    ("stands", "why", "word"),
    [
        ("waiting", "The job ends after a round: south came back.", "waiting"),
        ("waiting", "1 of 2 sites are left, and the run needs 2.", "waiting"),
        ("waiting", "The run was ended: the job was aborted.", "waiting"),
        ("running", "The run was ended: the job was aborted.", "waiting"),
        ("stopped", "The run was ended: the job was aborted.", "stopped"),
        ("failed", "The run was ended: the job was aborted.", "failed"),
        ("finished", "The run 'run' began on 2026-01-01 with another manifest.", "finished"),
        (None, "The run was ended: the job was aborted.", "stopped"),
        ("failed", "The disk is full.", "failed"),
        ("running", "The disk is full.", "failed"),
    ],
)
def test_a_run_that_goes_on_by_itself_is_neither_failed_nor_stopped(
    stands: str | None, why: str, word: str, tmp_path: Path
) -> None:
    folder = rig.run_folder(tmp_path / "run", [rig.round_line(1)], rig.result(1) if stands == "finished" else None)
    if stands is not None:
        rig.write(folder / "standing.json", {"name": stands, "reason": why})
    run, log = Run(folder), Chain(tmp_path / "none")
    run.refresh(float("inf"))
    over = "2026-01-01T00:00:00.000000+00:00"
    told = Told(first=over, last=over, began=over, over=over, why=why)
    then = datetime.fromisoformat(over).timestamp()
    assert log_page.standing(told, log, run, then + 5).word == word
    later = "stopped" if stands == "running" and word == "waiting" else word
    assert log_page.standing(told, log, run, then + 86_400).word == later, "nobody went on with it"


def test_a_log_with_a_line_less_and_hashes_anew_is_not_all_good(tmp_path: Path) -> None:
    """The number that the checkpoint names is another entry now, and no line contradicts the one before it."""
    kit = rig.server_kit(tmp_path / "hub")
    assert "all good" in rig.words(page_of(kit)["tiles"])
    file = kit / "fedllm" / "audit.jsonl"
    held = [json.loads(line) for line in file.read_text().splitlines()]
    known = int(json.loads((kit / "fedllm/runs/first/audit.json").read_text())["last"].split(":")[0])
    for gone in range(known):
        before, lines = GENESIS, list[bytes]()
        for number, entry in enumerate(held[:gone] + held[gone + 1 :], 1):
            body = {name: entry[name] for name in audit.FIELDS if name != "hash"} | {"seq": number, "prev": before}
            before = audit.sha256(body)
            lines.append(audit.canonical({**body, "hash": before}) + b"\n")
        file.write_bytes(b"".join(lines))
        assert audit.verify(file).intact, "by itself it looks whole"
        found = page_of(kit)
        assert rig.tiles(found)["is the audit log"] == "damaged", f"without line {gone + 1}"
        assert "is not the one that a checkpoint knows" in rig.section(found, "Audit log")


def test_a_folder_that_may_not_be_entered_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.run_folder(tmp_path / "runs" / "a", [rig.round_line(1)])
    (tmp_path / "runs" / "closed").mkdir()
    (tmp_path / "secret").mkdir()
    shut, real = {tmp_path / "runs" / "closed", tmp_path / "secret"}, Path.stat

    def stat(self: Path, **words: Any) -> os.stat_result:
        if shut & {self.parent, *self.parent.parents}:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, **words)

    monkeypatch.setattr(Path, "stat", stat)
    source = source_of(tmp_path / "runs")
    source.refresh(float("inf"))
    found = source.page(None)
    assert found is not None and rig.tiles(found)["runs"] == "1"
    for path in (tmp_path / "secret" / "kit", tmp_path / "runs" / "closed" / "x"):
        with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
            source_of(path)
    with pytest.raises(ConfigError, match="holds no run and is no kit"):
        source_of(tmp_path / "secret")

"""run, resume, compare, report, chat, export: one small run from beginning to end."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess

import pytest

from tests.cli.lines import ENVIRONMENT, MAIN, as_json, invoke, ok, write_recipe

WEIGHTS = "adapter/adapter_model.safetensors"


def test_a_run_shows_progress_result_sentences_and_files(place):
    lines = (place.folder / "run.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines)
    assert lines[0] == (
        f"tiny: fedavg over 3 clients; toy:llama on cpu, all per round, 3 in a pass; folder {place.run}"
    )
    assert lines[1].startswith("Federated (fedavg): round 1/2, loss ") and lines[1].endswith("left")
    assert any(line.startswith("Each alone: round 2/2") and "exact match" in line for line in lines)
    assert "exact match by client" in text and all(name in text for name in ("north", "south", "west"))
    assert "Together the 3 clients reach" in text
    for name in ("adapter", "metrics.jsonl", "report.html"):
        assert str(place.run / name) in text and (place.run / name).exists()
    assert "\x1b" not in text


def test_a_finished_run_resumes_to_the_same_result(place):
    before = json.loads((place.run / "result.json").read_text())
    found = as_json("resume", place.run)
    assert found["rows"] == before["rows"] and found["finished"] is True
    assert found["folder"] == str(place.run)


def test_json_is_all_there_is_on_stdout(place, tmp_path):
    result = ok("run", place.recipe, "rounds=1", "evaluation.against=[]", "--folder", tmp_path / "a", "--json")
    table = json.loads(result.stdout)
    assert table["rounds"] == 1 and [row["model"] for row in table["rows"]] == ["federated"]
    assert "round 1/1" not in result.stderr


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_ends_after_the_round_and_twice_at_once_and_both_resume_to_the_same_bits(
    place, tmp_path, monkeypatch, presses
):
    from fedllm.cli.live import Live

    told = Live.round

    def press(self, name, record, values):
        told(self, name, record, values)
        for _ in range(presses if record.round == 1 and name == "federated" else 0):
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Live, "round", press)
        stopped = invoke("run", place.recipe, "--folder", folder)
    assert stopped.exit_code == 130
    assert f"Go on with: fedllm resume {folder}" in stopped.stderr
    assert "Together" not in stopped.stdout
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(one["model"], one["round"]) for one in rounds] == [("federated", 1)]
    resumed = ok("resume", folder)
    assert "goes on after round 1 of 2" in resumed.stdout
    assert (folder / WEIGHTS).read_bytes() == (place.run / WEIGHTS).read_bytes()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_loading_ends_at_once(place, tmp_path, monkeypatch):
    from fedllm.data.federation import Federation

    monkeypatch.setattr(Federation, "build", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    stopped = invoke("run", place.recipe, "--folder", tmp_path / "none")
    assert stopped.exit_code == 130 and "Nothing was begun." in stopped.stderr
    assert not (tmp_path / "none").exists()


def test_a_run_is_not_overwritten(place):
    result = invoke("run", place.recipe, "--folder", place.run)
    assert result.exit_code == 8 and f"fedllm resume {place.run}" in result.stderr


def test_overrides_alone_mean_the_quickstart():
    result = invoke("run", "rouns=3")
    assert result.exit_code == 2 and "Did you mean 'rounds'?" in result.stderr


def test_on_a_terminal_the_table_is_drawn_again_and_again(place, tmp_path):
    ours, theirs = pty.openpty()
    line = [*MAIN, "run", str(place.recipe), "evaluation.against=[]", "--folder", str(tmp_path / "drawn")]
    process = subprocess.Popen(line, stdout=theirs, stderr=theirs, stdin=theirs, env={**ENVIRONMENT, "TERM": "xterm"})
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait(60) == 0, text.decode()
    assert b"\x1b[2K" in text or b"\x1b[1A" in text
    assert "Loading data and model" in text.decode() and "Finished in" in text.decode()
    assert b"Federated (fedavg): round" not in text and b"Traceback" not in text


def test_compare_gives_every_method_a_row_with_mean_and_spread(place, tmp_path):
    folder = tmp_path / "compared"
    line = ("compare", place.recipe, "rounds=1", "--methods", "base, fedavg,fedprox", "--seeds", 2, "--folder", folder)
    shown = ok(*line)
    assert "±" in shown.stdout and "fedprox-seed1: round 1/1" in shown.stdout
    assert str(folder / "compare.md") in shown.stdout
    table = as_json(*line)  # goes on: everything is there already
    assert [row["method"] for row in table["rows"]] == ["base", "fedavg", "fedprox"]
    assert table["seeds"] == [0, 1] and all(len(row["values"]) == 2 for row in table["rows"])
    assert invoke("compare", place.recipe, "--methods", "fedpox").exit_code == 2


def test_the_report_is_written_again(place):
    (place.run / "report.html").unlink()
    assert ok("report", place.run).stdout == f"Report: {place.run / 'report.html'}\n"
    assert "<html" in (place.run / "report.html").read_text(encoding="utf-8")
    assert as_json("report", place.run) == {"report": str(place.run / "report.html")}
    assert invoke("report", place.folder / "none").exit_code == 8


def test_chat_answers_one_prompt_twice_and_greedily(place):
    (once,) = as_json("chat", place.run, "--prompt", "Say it.", "--max-tokens", 4)
    assert once["prompt"] == "Say it." and once["text"].startswith("### Instruction:\nSay it.\n")
    assert once["expected"] is None and set(once) == {"prompt", "text", "base", "federated", "expected"}
    assert as_json("chat", place.run, "--prompt", "Say it.", "--max-tokens", 4) == [once]
    (raw,) = as_json("chat", place.run, "--prompt", "Say it.", "--max-tokens", 1, "--raw")
    assert raw["text"] == "Say it."


def test_chat_reads_lines_and_rows_from_a_pipe(place):
    lines = 'one\\ntwo\n\n{"instruction": "Add.", "input": "1 2"}\n'
    result = ok("chat", place.run, "--max-tokens", 2, "--json", input=lines)
    first, second = json.loads(result.stdout)
    assert first["prompt"] == "one\ntwo" and "one\ntwo" in first["text"]
    assert "### Input:\n1 2" in second["text"]
    plain = ok("chat", place.run, "--max-tokens", 2, input="one\n")
    assert plain.stdout.startswith("prompt: one\nbase: ") and "\nfederated: " in plain.stdout


def test_chat_shows_held_out_rows_of_every_client_in_turn(place):
    found = as_json("chat", place.run, "--examples", 2, "--max-tokens", 2)
    assert [one["expected"].startswith("It is ") for one in found] == [True, True]
    assert "north" in found[0]["prompt"] and "south" in found[1]["prompt"]


def test_chat_and_export_say_what_is_missing(place, tmp_path):
    from fedllm.engine.folder import RunFolder

    folder = RunFolder.create(tmp_path / "begun")
    folder.write_text("recipe.yaml", place.recipe.read_text())
    for line in (("chat", folder.path, "-p", "x"), ("export", folder.path, "--to", tmp_path / "out")):
        result = invoke(*line)
        assert result.exit_code == 8 and f"fedllm resume {folder.path}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused(place, tmp_path):
    import shutil

    copied = shutil.copytree(place.run, tmp_path / "copied")
    facts = json.loads((copied / "environment.json").read_text())
    facts["model"]["fingerprint"] = "0" * 64
    (copied / "environment.json").write_text(json.dumps(facts))
    result = invoke("chat", copied, "-p", "x")
    assert result.exit_code == 8 and "its weights differ" in result.stderr


def test_a_classifier_writes_no_text(tmp_path):
    lines = [{"text": f"number {n}", "label": "odd" if n % 2 else "even", "site": f"s{n % 2}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = write_recipe(
        tmp_path,
        rounds=1,
        model={"name": "toy:bert"},
        task={"kind": "sequence-classification"},
        evaluation={"against": []},
    )
    ok("run", recipe, "--quiet")
    result = invoke("chat", tmp_path / "runs" / "tiny", "-p", "x")
    assert result.exit_code == 2 and "writes no text" in result.stderr


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_loads_elsewhere_and_is_not_overwritten(place, tmp_path, merged):
    to = tmp_path / "out"
    found = as_json("export", place.run, "--to", to, *(["--merged"] if merged else []))
    assert found["folder"] == str(to) and set(found["files"]) == {file.name for file in to.iterdir()}
    again = invoke("export", place.run, "--to", to)
    assert again.exit_code == 8 and "exists already" in again.stderr
    if merged:
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM.from_pretrained(to).config.model_type == "llama"
    else:
        assert (to / "adapter_model.safetensors").read_bytes() == (place.run / WEIGHTS).read_bytes()

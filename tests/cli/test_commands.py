"""What there is, how quickly it answers, and what a mistake looks like."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest
import typer

from fedllm.cli.main import app, debug_first
from tests.cli.lines import ENVIRONMENT, MAIN, invoke, ok, outside

COMMANDS = (
    "attack chat compare dash data deploy doctor explain export join methods new-method profit recipes report resume "
    "run verify data build, data stats, data stream, deploy add-site, deploy audit, deploy fetch, deploy install, "
    "deploy log, deploy provision, deploy renew, deploy request, deploy resume, deploy revoke, deploy run, "
    "deploy sign, deploy start, deploy status, deploy stop"
)
HEAVY = ("torch", "transformers", "datasets", "pydantic", "numpy", "pandas", "sklearn", "yaml", "fedllm.core")


def test_the_commands_are_these():
    group = typer.main.get_command(app)
    inner = [f"{one} {name}" for one in ("data", "deploy") for name in sorted(group.commands[one].commands)]
    assert f"{' '.join(sorted(group.commands))} {', '.join(inner)}" == COMMANDS


def test_every_command_explains_itself_in_one_line_and_names_its_options():
    group = typer.main.get_command(app)
    for name in group.commands:
        result = ok(name, "--help")
        assert "Usage: fedllm" in result.stdout.replace("root", "fedllm")
        assert group.commands[name].help


def test_help_loads_nothing_heavy_and_is_quick():
    code = f"import sys, fedllm.cli.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert found.stdout.strip() == "[]", found
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        assert outside("--help").returncode == 0
        times.append(time.perf_counter() - begun)
    assert min(times) < 1.5  # 0.2 s on a quiet machine


def test_no_arguments_show_the_help():
    bare, asked = ok(), ok("--help")
    assert "quickstart" in bare.stdout and "new-method" in bare.stdout
    assert bare.stdout == asked.stdout


def test_the_version():
    from importlib.metadata import version

    assert ok("--version").stdout == f"fedllm {version('fedllm')}\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("rnu quickstart", "Did you mean 'run'?"),
        ("data stts x", "Did you mean 'stats'?"),
        ("run --foldr x", "Did you mean '--folder'?"),
        ("run --train.lr=1", "Options of a recipe have no dashes: train.lr=VALUE."),
        ("compare --seeds none", "--seeds"),
        ("compare --seeds 0", "--seeds"),
        ("resume", "Missing argument"),
        ("verify", "Give a method's key, or --all."),
        ("verify fedavg --all", "Give a method's key, or --all."),
    ],
)
def test_a_wrong_command_line_leaves_with_2_and_the_nearest_choice(line, text):
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and text in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_of_ours_prints_its_four_parts_and_leaves_with_its_code(tmp_path):
    result = invoke("run", "quickstrat")
    assert result.exit_code == 2 and result.stdout == ""
    first, allowed, near = result.stderr.splitlines()
    assert first == "Error: There is no recipe 'quickstrat': neither a file nor a bundled name."
    assert allowed.startswith("  Bundled: ") and near == "  Did you mean 'quickstart'?"
    missing = invoke("resume", tmp_path / "none")
    assert missing.exit_code == 8 and "holds no run" in missing.stderr
    assert "\x1b" not in result.stderr + missing.stderr


@pytest.mark.parametrize("line", ["--debug run quickstrat", "run --debug quickstrat", "run quickstrat --debug"])
def test_debug_shows_the_trace_wherever_it_stands(line):
    result = invoke(*line.split())
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "ConfigError" in result.stderr


def test_debug_behind_two_dashes_is_an_argument():
    assert debug_first(["run", "--", "--debug"]) == (["run", "--", "--debug"], False)
    assert debug_first(["run", "--debug", "--", "x"]) == (["--debug", "run", "--", "x"], True)


def test_an_unexpected_exception_is_one_line_and_70(monkeypatch):
    def fall(*_, **__):
        raise ZeroDivisionError("a number\nby zero")

    monkeypatch.setattr("fedllm.cli.complete.bundled_recipes", fall)
    result = invoke("recipes")
    assert result.exit_code == 70
    assert result.stderr.splitlines() == [
        "Error: ZeroDivisionError: a number by zero",
        "  Run again with --debug to see where.",
    ]
    assert "Traceback" in invoke("recipes", "--debug").stderr


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, ["Error: The disk is full: kit/site.json.", "  Make room, then run the command again."]),
        (errno.EROFS, ["Error: The disk can only be read: kit/site.json.", "  Choose another folder."]),
    ],
)
def test_a_disk_that_takes_nothing_is_no_mistake_of_ours(monkeypatch, number, said):
    def fall(*_, **__):
        raise OSError(number, os.strerror(number), "kit/site.json")

    monkeypatch.setattr("fedllm.cli.complete.bundled_recipes", fall)
    result = invoke("recipes")
    assert (result.exit_code, result.stderr.splitlines()) == (8, said)


def test_a_port_that_is_not_allowed_is_no_matter_of_disks(monkeypatch):
    def fall(*_, **__):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fedllm.cli.complete.bundled_recipes", fall)
    result = invoke("recipes")
    assert result.exit_code == 70 and "PermissionError: [Errno 13] Permission denied" in result.stderr


def test_a_pipe_that_closes_early_is_quiet():
    process = subprocess.Popen(
        [*MAIN, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1

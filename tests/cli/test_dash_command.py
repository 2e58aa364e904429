"""fedllm dash: what it says, how it begins and ends, and mistakes."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from tests.cli.lines import ENVIRONMENT, MAIN, Place, invoke, ok

TOKEN = "a-token-for-tests-that-is-long-enough"


@pytest.fixture
def started(place: Place, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = (tmp_path / "said.txt").open("wb")
    process = subprocess.Popen([*MAIN, "dash", str(place.run)], stdout=log, stderr=log, env=ENVIRONMENT)
    yield process
    process.kill()
    process.wait(10)
    log.close()


def address(said: Path) -> str:
    end = time.monotonic() + 60
    while not (found := re.search(r"Open: (\S+)\n", said.read_text())):
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.1)
    return found.group(1)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_says_what_it_took_the_path_for_serves_and_ends(
    how: signal.Signals, started: subprocess.Popen[bytes], place: Place, tmp_path: Path
) -> None:
    entrance = address(tmp_path / "said.txt")
    url, _, token = entrance.partition("?token=")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url) and len(token) >= 43
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        browser.open(f"{url}page.json", timeout=10)
    with browser.open(entrance, timeout=10) as answer:
        assert answer.geturl() == f"{url}enter"
    with browser.open(f"{url}page.json", timeout=10) as answer:
        assert b'"rounds are over"' in answer.read()
    started.send_signal(how)
    assert started.wait(20) == 0
    said = (tmp_path / "said.txt").read_text()
    assert f"{place.run} is taken for the folder of the run tiny." in said and said.endswith("Ended.\n")


def test_a_mistake_is_four_parts_and_no_trace(place: Place, tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "none", "There is no folder"),
        (place.rows, "is a file"),
        (tmp_path, "holds no run"),
    ):
        found = invoke("dash", path)
        assert found.exit_code == 2 and text in found.stderr and "Known: a run's folder" in found.stderr
        assert "Traceback" not in found.stderr
    assert "Did you mean" in invoke("dash", place.run.parent / "tinny").stderr


def test_a_token_of_the_environment_must_be_there_and_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_TOKEN", raising=False)
    assert "holds no token" in invoke("dash", place.run, "--token-env", "DASH_TOKEN").stderr
    monkeypatch.setenv("DASH_TOKEN", "short")
    found = invoke("dash", place.run, "--token-env", "DASH_TOKEN")
    assert found.exit_code == 2 and "The token has 5 characters." in found.stderr


def test_a_browser_is_opened_without_the_token_among_its_arguments(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webbrowser

    from fedllm.cli import dash

    seen: list[str] = []

    def opened(url: str) -> bool:
        seen.append(url)
        file = Path(url.removeprefix("file://"))
        seen.append(file.read_text(encoding="utf-8"))
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        return True

    monkeypatch.setattr(webbrowser, "open", opened)
    with dash._opened(f"http://127.0.0.1:1/?token={TOKEN}"):
        assert TOKEN not in seen[0] and f"url=http://127.0.0.1:1/?token={TOKEN}" in seen[1]
    assert not Path(seen[0].removeprefix("file://")).exists()


def test_the_address_is_said_before_a_browser_is_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser in the terminal does not come back before it is closed."""
    import webbrowser

    from fedllm.cli import screen

    done: list[str] = []

    def opened(url: str) -> bool:
        done.append("the browser")
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(webbrowser, "open", opened)
    monkeypatch.setattr(screen, "say", lambda text="", *_, **__: done.append(text.partition(":")[0]))
    ok("dash", place.run, "--open")
    assert done.index("Open") < done.index("the browser") and done[-1] == "Ended."


def test_the_help_loads_nothing_heavy() -> None:
    assert "PATH" in ok("dash", "--help").stdout
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fedllm.cli.main import app\n"
        "assert CliRunner().invoke(app, ['dash', '--help']).exit_code == 0\n"
        "heavy = ('nvflare', 'torch', 'yaml', 'fedllm.core', 'fedllm.dash', 'http.server')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert found.stdout.strip() == "[]", found

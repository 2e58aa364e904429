"""The page in a real browser: what stands on it, that it fits a phone, and that texts of others stay texts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import chrome_rig as chrome
import dash_rig as rig

from fedllm.dash.server import Dash
from fedllm.dash.source import source_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chrome.CHROMIUM is None, reason="no Chromium is installed here"),
]
SAID = "document.body.innerText.replace(/\\s+/g, ' ')"
KIND = "document.documentElement.dataset.page"
LOOKS = [(1280, False), (390, True)]


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Path]:
    hard = [rig.round_line(n, cohort=[rig.EVIL, "x" * 300], loss=1 / n) for n in range(1, 5_001)]
    hard[-1].update(failed=rig.EVIL, lost=[{"client": rig.EVIL, "reason": rig.EVIL * 5}])
    evil = rig.result(5_000, sentences=[rig.EVIL], warnings=[rig.EVIL], guarantee=["- " + "y" * 400])
    return {
        "run": rig.run_folder(tmp_path / "run", hard, evil, rounds=5_000),
        "site": rig.site_kit(tmp_path / "north", rounds=30),
        "server": rig.server_kit(tmp_path / "hub"),
    }


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_pages_say_what_they_should_fit_the_screen_and_run_nothing(
    width: int, dark: bool, kits: dict[str, Path], tmp_path: Path
) -> None:
    expected = {
        "run": ["5,000 of 5,000", "Training loss", "changed nothing", rig.EVIL],
        "site": ["left this site", "What this site allows", "lines of the audit log, all good", rig.EVIL],
        "server": ["sites have taken part", "'letters' is not allowed", "finished", "refused"],
    }
    with chrome.Browser(tmp_path / "profile", width, dark) as browser:
        for kind, texts in expected.items():
            with Dash(source_of(kits[kind])) as dash:
                dash.source.refresh(float("inf"))
                browser.open(dash.entrance)
                browser.until(f"{KIND} === '{kind}'")
                words = browser.value(SAID)
                missing = [text for text in texts if " ".join(text.split()) not in words]
                assert not missing, words
                assert browser.value("location.href") == dash.url, "the token has left the address"
                assert browser.value("document.cookie") == "", "scripts cannot read the cookie"
                assert browser.value("document.documentElement.dataset.overflow") == "0"
                assert browser.value("document.documentElement.dataset.width") == str(width)
                assert browser.value("document.querySelectorAll('body script, body img').length") == 0
                assert "owned" not in browser.value("document.title")
                picture = browser.picture(tmp_path / f"{kind}.png")
                assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") == width
        assert browser.complaints == []


def test_a_run_is_opened_by_its_link_and_renewed_while_it_is_looked_at(tmp_path: Path) -> None:
    folder = rig.run_folder(tmp_path / "runs" / "a b<i>&#", [rig.round_line(1), rig.round_line(2)])
    with Dash(source_of(folder.parent)) as dash, chrome.Browser(tmp_path / "profile", 390) as browser:
        browser.open(dash.entrance)
        browser.until(f"{KIND} === 'runs'")
        browser.value("document.querySelector('td a, th a').click()")
        browser.until(f"{KIND} === 'run'")
        assert browser.value("document.querySelector('h1').innerText") == folder.name
        assert browser.value("document.activeElement.tagName") == "H1"
        assert browser.value("document.querySelectorAll('svg[role=img]').length") == 2
        assert "2 of 4" in browser.value(SAID)
        rig.append(folder, [rig.round_line(3)])
        browser.until(f"{SAID}.includes('3 of 4')")
        browser.value("document.querySelector('.back a').click()")
        browser.until(f"{KIND} === 'runs'")
        assert browser.complaints == []


def test_a_page_whose_server_is_gone_says_so(tmp_path: Path) -> None:
    folder = rig.run_folder(tmp_path / "run", [rig.round_line(1)])
    with chrome.Browser(tmp_path / "profile", 390) as browser:
        with Dash(source_of(folder)) as dash:
            browser.open(dash.entrance)
            browser.until(f"{KIND} === 'run'")
        browser.until(f"{SAID}.includes('does not answer')")
        assert "1 of 4" in browser.value(SAID), "what was known stays"
        with Dash(source_of(folder), dash.port):
            browser.until(f"{SAID}.includes('This session is over')")


def test_without_the_token_the_browser_sees_nothing(kits: dict[str, Path], tmp_path: Path) -> None:
    with Dash(source_of(kits["site"])) as dash:
        for address in (dash.url, f"{dash.url}?token=wrong", f"{dash.url}page.json"):
            line = [str(chrome.CHROMIUM), *chrome.FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
            done = subprocess.run([*line, "--dump-dom", address], capture_output=True, timeout=120)
            page = done.stdout.decode("utf-8", "replace")
            assert "Not signed in" in page and "left this site" not in page

"""The page over HTTP, as an attacker sees it: other machines, other users, other sites, and texts that others wrote."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dash_rig as rig

from fedllm.core.errors import ConfigError
from fedllm.dash.server import HEADERS, LEAST, Dash
from fedllm.dash.source import source_of

PAGE = Path(__file__).parents[2] / "fedllm" / "dash" / "page"


@pytest.fixture
def dash(tmp_path: Path) -> Iterator[Dash]:
    folder = rig.run_folder(tmp_path / "runs" / "one", [rig.round_line(1, failed=rig.EVIL)])
    with Dash(source_of(folder.parent)) as found:
        yield found


def test_a_token_becomes_a_cookie_and_leaves_the_address(dash: Dash) -> None:
    status, headers, content = rig.get(dash, f"/?token={dash.token}")
    assert status == 303 and headers["location"] == "/enter" and content == b""
    cookie = headers["set-cookie"]
    assert "; HttpOnly" in cookie and "; SameSite=Strict" in cookie and "Domain" not in cookie
    assert dash.token not in cookie
    status, _, door = rig.get(dash, "/enter")
    assert status == 200 and b"url=/" in door and dash.token.encode() not in door
    for path, kind in (("/", "text/html"), ("/dash.js", "text/javascript"), ("/page.json", "application/json")):
        status, headers, content = rig.get(dash, path, Cookie=cookie.split(";")[0])
        assert status == 200 and headers["content-type"].startswith(kind)
        assert dash.token.encode() not in content and dash.session.encode() not in content


def test_without_the_right_token_or_cookie_nothing_is_told(dash: Dash) -> None:
    name = rig.signed_in(dash).split("=")[0]
    wrong = [
        f"{name}=",
        f"{name}={dash.token}",
        f"{name}={dash.session[:-1]}",
        f"x{name}={dash.session}",
        "ü; ; =",
        ";",
    ]
    for cookie in ["", *wrong]:
        for path in ("/", "/page.json", "/page.json?run=one", "/dash.js", "/nothing"):
            status, headers, content = rig.get(dash, path, Cookie=cookie.encode("latin-1").decode("latin-1"))
            assert status == 401 and b"one" not in content.replace(b"another one", b"") and "set-cookie" not in headers
    for query in (
        "token=",
        f"token={dash.token[:-1]}",
        f"token={dash.token}x",
        "token=%00",
        f"token={dash.token}&token=b",
    ):
        status, headers, _ = rig.get(dash, f"/?{query}")
        assert status == 401 and "set-cookie" not in headers
    assert rig.get(dash, f"/?token=x&token={dash.token}")[0] == 401
    assert rig.get(dash, f"/page.json?token={dash.token}")[0] == 401


def test_every_start_has_another_token(tmp_path: Path) -> None:
    rig.run_folder(tmp_path / "one", [])
    found = set()
    for _ in range(3):
        with Dash(source_of(tmp_path)) as dash:
            found |= {dash.token, dash.session}
    assert len(found) == 6 and all(len(token) >= 43 for token in found)


def test_it_listens_to_this_machine_alone(dash: Dash) -> None:
    assert dash.url == f"http://127.0.0.1:{dash.port}/"
    assert dash._server.server_address[0] == "127.0.0.1"
    assert dash._server.address_family == socket.AF_INET


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1]", "", "0.0.0.0"])
def test_a_name_that_is_bound_anew_to_this_machine_is_refused(dash: Dash, host: str) -> None:
    cookie = rig.signed_in(dash)
    for path in ("/", "/page.json", f"/?token={dash.token}", "/dash.css", "/enter"):
        status, headers, _ = rig.get(dash, path, Cookie=cookie, Host=host)
        assert status == 421 and "set-cookie" not in headers
    for good in ("localhost", f"localhost:{dash.port}", "127.0.0.1:9999"):  # a tunnel has another port
        assert rig.get(dash, "/page.json", Cookie=cookie, Host=good)[0] == 200


def test_two_hosts_and_none_are_refused(dash: Dash) -> None:
    for lines in ("Host: localhost\r\nHost: evil.example\r\n", ""):
        with socket.create_connection(("127.0.0.1", dash.port), 5) as one:
            one.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
            assert one.recv(1_000).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_pages_in_the_browser_may_not_ask(dash: Dash, site: str) -> None:
    cookie = rig.signed_in(dash)
    for path in ("/page.json", "/dash.js"):
        assert rig.get(dash, path, Cookie=cookie, Sec_Fetch_Site=site)[0] == 403
        assert rig.get(dash, path, Cookie=cookie, Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH", "NONSENSE"])
def test_only_get_is_answered(dash: Dash, method: str) -> None:
    status, headers, content = rig.get(dash, "/page.json", method, Cookie=rig.signed_in(dash))
    assert status == 405 and headers["allow"] == "GET" and content == b""
    assert all(headers[name.lower()] == value for name, value in HEADERS.items())


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/dash.css/../../server.py", "/page.css",
        "/server.py", "/page/index.html", "/index.html", "/metrics.jsonl", "/one/metrics.jsonl", "/./dash.js",
        "http://127.0.0.1/dash.js/x", "/dash.js%00", "/DASH.JS", "\\dash.js",
    ],
)  # fmt: skip
def test_no_file_is_served_by_its_name(dash: Dash, path: str) -> None:
    status, _, content = rig.get(dash, path, Cookie=rig.signed_in(dash))
    assert status == 404 and b"root:" not in content and b"import" not in content


@pytest.mark.parametrize("run", ["..", "../one", "/etc", "one/../one", "%2e%2e", "one%00", "x" * 500, "one&run=.."])
def test_a_run_is_looked_up_and_never_a_path(dash: Dash, run: str) -> None:
    status, _, content = rig.get(dash, f"/page.json?run={run}", Cookie=rig.signed_in(dash))
    assert status == (200 if run.startswith("one&") else 404) and b"Traceback" not in content


def test_every_answer_has_the_headers_that_guard_it(dash: Dash) -> None:
    cookie = rig.signed_in(dash)
    paths = ["/", "/dash.css", "/dash.js", "/page.json", "/nothing", "/enter", "/favicon.ico", f"/?token={dash.token}"]
    for path in paths:
        for sent in (cookie, ""):
            _, headers, _ = rig.get(dash, path, Cookie=sent)
            assert all(headers[name.lower()] == value for name, value in HEADERS.items()), path
            assert headers.get("server", "").strip() == "fedllm"
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in policy


def test_the_page_has_no_inline_script_and_no_sink_for_markup() -> None:
    html, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "dash.js"))
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == [] and "style=" not in html
    assert not re.search(r"\son\w+=|javascript:|https?://", html)
    sinks = (
        r"(inner|outer|insertAdjacent)HTML|document\.write|DOMParser|\beval\(|new Function|srcdoc|setTimeout\(['\"`]"
    )
    assert not re.search(sinks, script)
    assert set(re.findall(r"https?://[^\"]+", script)) == {"http://www.w3.org/2000/svg"}


def test_texts_of_others_travel_as_json_alone(dash: Dash) -> None:
    status, headers, content = rig.get(dash, "/page.json?run=one", Cookie=rig.signed_in(dash))
    assert status == 200 and headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert rig.EVIL in rig.words(json.loads(content))


def test_an_answer_that_did_not_change_is_not_sent_again(dash: Dash, tmp_path: Path) -> None:
    cookie = rig.signed_in(dash)
    status, headers, content = rig.get(dash, "/page.json", Cookie=cookie)
    again = rig.get(dash, "/page.json", Cookie=cookie, If_None_Match=headers["etag"])
    assert (status, again[0], again[2]) == (200, 304, b"") and content
    rig.append(tmp_path / "runs" / "one", [rig.round_line(2)])
    assert rig.get(dash, "/page.json", Cookie=cookie, If_None_Match=headers["etag"])[0] == 200


def test_a_fault_in_a_page_is_no_crash_and_tells_nothing(dash: Dash, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: str | None) -> bytes:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(dash, "page", broken)
    status, _, content = rig.get(dash, "/page.json", Cookie=rig.signed_in(dash))
    assert status == 500 and b"secret" not in content
    assert rig.get(dash, "/", Cookie=rig.signed_in(dash))[0] == 200


@pytest.mark.parametrize(
    "path", ["http://[", "/?" + "&".join(f"a{n}=1" for n in range(50)), "/?token=%zz&" + "x" * 9_000]
)
def test_an_address_that_cannot_be_read_is_refused_quietly(
    dash: Dash, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", dash.port), 5) as one:
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 (400|401) ", one.recv(1_000))
    assert capfd.readouterr().err == ""


def test_a_body_is_not_taken_for_another_request(dash: Dash) -> None:
    inner = f"GET /?token={dash.token} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", dash.port), 5) as one:
        one.sendall(f"GET /enter HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}\r\n\r\n{inner}".encode())
        found = b""
        while piece := one.recv(10_000):
            found += piece
    assert found.startswith(b"HTTP/1.1 200") and found.count(b"HTTP/1.1") == 1


def test_nothing_of_a_request_is_written_down(dash: Dash, capfd: pytest.CaptureFixture[str]) -> None:
    rig.signed_in(dash)
    rig.get(dash, "/?token=wrong")
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def test_what_is_no_http_ends_the_connection_alone(dash: Dash) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"x" * 70_000,
        b"GET / HTTP/1.1\r\nA\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", dash.port), 5) as one:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            one.recv(1_000)
    assert rig.get(dash, "/page.json", Cookie=rig.signed_in(dash))[0] == 200


@pytest.mark.parametrize(
    ("port", "token"), [(70_000, None), (-1, None), (0, "short"), (0, "ü" * 40), (0, "a b\n" * 10)]
)
def test_a_port_or_a_token_that_cannot_be_used_is_named(port: int, token: str | None, tmp_path: Path) -> None:
    rig.run_folder(tmp_path / "one", [])
    with pytest.raises(ConfigError) as fault:
        Dash(source_of(tmp_path), port, token)
    assert "Allowed:" in str(fault.value) and (token is None or token not in str(fault.value))
    assert LEAST * 6 >= 128


def test_a_port_that_is_taken_is_named(dash: Dash, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
        Dash(source_of(tmp_path / "runs"), dash.port)


def test_ten_thousand_rounds_and_a_long_log_come_in_pieces_of_bounded_size(tmp_path: Path) -> None:
    folder = rig.run_folder(tmp_path / "runs" / "long", [], rounds=10_000)
    cohort = [f"client-{n}" for n in range(20)]
    rig.append(folder, [rig.round_line(n, cohort=cohort, loss=1 / n) for n in range(1, 10_001)])
    with Dash(source_of(folder)) as found:
        cookie, sizes, slowest = rig.signed_in(found), [], 0.0
        while True:
            begun = time.thread_time()
            page = found.page(None)
            slowest = max(slowest, time.thread_time() - begun)
            assert page is not None
            sizes.append(len(page))
            if json.loads(page)["reading"] is None:
                break
        assert max(sizes) < 100_000 and slowest < 2.0
        status, _, content = rig.get(found, "/page.json", Cookie=cookie)
        assert status == 200 and json.loads(content)["tiles"][0][0] == "10,000 of 10,000"


def test_many_who_ask_at_once_are_answered(dash: Dash) -> None:
    cookie, found = rig.signed_in(dash), []
    threads = [
        threading.Thread(target=lambda: found.append(rig.get(dash, "/page.json", Cookie=cookie)[0])) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [200] * 16

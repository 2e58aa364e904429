"""Server - the page over HTTP: this machine alone, whoever has the token, and nothing but a fixed list of answers.

What it guards against, and how: other machines (it listens on 127.0.0.1); other people on this machine (a random token,
exchanged for a cookie that scripts cannot read); pages of other sites in the same browser (SameSite, Sec-Fetch-Site,
the Host header against names that are bound anew to 127.0.0.1, no framing); texts that others wrote (the page makes
text nodes alone, and the Content-Security-Policy runs no script but its own file).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fedllm.core.errors import ConfigError
from fedllm.dash.source import Source

HOST = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost")
"""Names under which a browser may ask; their port may be that of a tunnel."""
WORK = 0.4
"""Seconds that one answer may spend on reading files; the page asks again for the rest."""
LEAST = 22
"""Characters of a token at least: 128 bits in base64."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""On every answer."""
DOOR = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="refresh" content="0; url=/">
<title>fedllm dash</title><p><a href="/">Go on</a></p></html>"""
"""After a login: the page goes on by itself, so that a link from elsewhere, with which a strict cookie is not sent,
opens it too."""
CLOSED = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>fedllm dash</title>
<link rel="stylesheet" href="/dash.css"><main><h1>Not signed in</h1>
<p>Open the address that <code>fedllm dash</code> printed when it was started: it has the token at its end.
Each start has another one.</p></main></html>"""
"""What a visitor without a token sees."""
log = logging.getLogger(__name__)


class Dash:
    """The page of a source as a context: it answers in threads from entering to leaving.

    Args:
        source: what the pages are made from.
        port: where to listen; 0 takes a free one.
        token: what opens the page; None: a new random one.

    Raises:
        ConfigError: a port that is taken or out of range, or a token that could be guessed.

    Attributes:
        url: the address, without the token.
        over: whether it was left; nothing is answered any more.
    """

    def __init__(self, source: Source, port: int = 0, token: str | None = None) -> None:
        if token is not None and (len(token) < LEAST or not token.isascii() or not token.isprintable()):
            raise ConfigError(
                f"The token has {len(token)} characters.",
                f"Allowed: {LEAST} and more of ASCII, so that nobody can guess it.",
                action="Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
        if not 0 <= port <= 65_535:
            raise ConfigError(f"port={port} cannot be used.", "Allowed: 1 to 65535; 0 takes a free one.", "0")
        self.source, self.token = source, secrets.token_urlsafe(32) if token is None else token
        self.session, self.over = secrets.token_urlsafe(32), False
        self._one_at_a_time = threading.Lock()
        try:
            self._server = _Server((HOST, port), _handler(self))
        except OSError as fault:
            raise ConfigError(
                f"The page cannot listen at {HOST}:{port} ({fault.strerror}).", action="Choose another port; 0 is any."
            ) from fault
        self.port = self._server.server_address[1]
        self.url = f"http://{HOST}:{self.port}/"
        self.cookie = f"fedllm-dash-{self.port}"
        self.files = _files()

    def __enter__(self) -> Dash:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="dash", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self._server.shutdown()
        self._server.server_close()
        self.source.close()

    @property
    def entrance(self) -> str:
        """The address with the token."""
        return f"{self.url}?token={self.token}"

    def page(self, run: str | None) -> bytes | None:
        """A page as JSON, after a look at the files; None where there is no such run."""
        with self._one_at_a_time:
            self.source.refresh(time.monotonic() + WORK)
            found = self.source.page(run)
        return None if found is None else json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


class _Server(ThreadingHTTPServer):
    """Connections in threads that end with the process; one that breaks is no news."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser went away, or what it sent was no HTTP."""
        log.debug("A connection ended with an error", exc_info=True)


def _files() -> dict[str, tuple[str, bytes]]:
    """Path -> type and content: all that is ever served from a disk, and it is read once."""
    place, report = files("fedllm.dash") / "page", files("fedllm.report")
    style = (report / "page.css").read_bytes() + (place / "dash.css").read_bytes()
    return {
        "/": ("text/html; charset=utf-8", (place / "index.html").read_bytes()),
        "/dash.css": ("text/css; charset=utf-8", style),
        "/dash.js": ("text/javascript; charset=utf-8", (place / "dash.js").read_bytes()),
    }


def _handler(dash: Dash) -> type[BaseHTTPRequestHandler]:
    """The request handler of a page."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "fedllm", ""
        timeout = 30

        def do_GET(self) -> None:
            if dash.over:  # a connection that a browser keeps outlives the server's socket
                self.close_connection = True
                return
            if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                self.close_connection = True  # what follows is no request
            if not self._from_here():
                return self._plain(421, "This page answers under the names 127.0.0.1 and localhost alone.")
            try:
                target = urlsplit(self.path)
                given = parse_qs(target.query, max_num_fields=8)
            except ValueError:
                return self._plain(400, "The address cannot be read.")
            if target.path == "/" and "token" in given:
                return self._login(given["token"])
            if target.path == "/enter":
                return self._answer(200, DOOR.encode())
            if target.path == "/favicon.ico":
                return self._answer(204, b"")
            if target.path == "/dash.css":  # the page that says 'not signed in' needs it, too
                return self._file(target.path)
            if not self._signed_in():
                return self._answer(401, CLOSED.encode())
            if target.path == "/":
                return self._file(target.path)
            if not self._same_site():
                return self._plain(403, "Other sites may not ask.")
            if target.path == "/page.json":
                return self._page(given.get("run", [None])[0])
            if target.path in dash.files:
                return self._file(target.path)
            self._plain(404, "There is no such page.")

        def _from_here(self) -> bool:
            """Whether the request names this machine: a foreign name may have been bound to its address."""
            named = self.headers.get_all("Host", [])
            return len(named) == 1 and named[0].strip().partition(":")[0].lower() in HOSTS

        def _same_site(self) -> bool:
            """Whether the page itself asks; browsers that do not say pass."""
            return self.headers.get("Sec-Fetch-Site", "same-origin") in ("same-origin", "none")

        def _signed_in(self) -> bool:
            pairs = (one.strip().partition("=") for one in self.headers.get("Cookie", "").split(";"))
            held = [value for name, _, value in pairs if name == dash.cookie]
            return any(_equal(value, dash.session) for value in held)

        def _login(self, tokens: list[str]) -> None:
            if len(tokens) != 1 or not _equal(tokens[0], dash.token):
                return self._answer(401, CLOSED.encode())
            cookie = f"{dash.cookie}={dash.session}; Path=/; HttpOnly; SameSite=Strict"
            self._answer(303, b"", {"Location": "/enter", "Set-Cookie": cookie})

        def _page(self, run: str | None) -> None:
            try:
                found = dash.page(run)
            except Exception as fault:
                log.exception("A page could not be made")
                return self._plain(500, f"The page could not be made ({type(fault).__name__}).")
            if found is None:
                return self._plain(404, "There is no such run.")
            mark = f'"{hashlib.sha256(found).hexdigest()[:32]}"'
            if self.headers.get("If-None-Match") == mark:
                return self._answer(304, b"", {"ETag": mark})
            self._answer(200, found, {"ETag": mark}, "application/json")

        def _file(self, path: str) -> None:
            kind, content = dash.files[path]
            self._answer(200, content, kind=kind)

        def _plain(self, status: int, words: str) -> None:
            self._answer(status, words.encode(), kind="text/plain; charset=utf-8")

        def _answer(
            self,
            status: int,
            content: bytes,
            more: dict[str, str] | None = None,
            kind: str = "text/html; charset=utf-8",
        ) -> None:
            self.close_connection = self.close_connection or status >= 400  # a body may be unread
            self.send_response(status)
            for name, value in {**HEADERS, **(more or {})}.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if status not in (204, 304):
                self.wfile.write(content)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What the library itself refuses: other methods, lines that are no HTTP."""
            self.close_connection = True
            status = 405 if code == 501 else code
            self._answer(status, b"", {"Allow": "GET"} if status == 405 else {}, "text/plain; charset=utf-8")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing of a request is written down: its address may have the token."""

    return Handler


def _equal(one: str, other: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())

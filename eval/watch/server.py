"""The live page over HTTP, on this machine alone: GET and nothing else, and only for who calls it by this
machine's own name."""

from __future__ import annotations

import errno
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from eval.watch.page import HEADINGS, POLICY, as_json, render_page
from eval.watch.view import View
from megatron_sd.errors import ConfigError

ADDRESS = "127.0.0.1"
OWN_NAMES = frozenset({"127.0.0.1", "localhost"})
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
REQUEST_TIMEOUT_S = 20.0  # for a client that connects and then says nothing


class PageServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1 from the start; `serve_forever` answers."""

    daemon_threads = True
    view: View

    @property
    def address(self) -> str:
        """What a browser is given."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"


def listen(view: View, port: int) -> PageServer:
    """A server of the view. port: 0 for any free one. Raises ConfigError for a port that cannot be had."""
    try:
        server = PageServer((ADDRESS, port), _Request)
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        found = "it is in use, perhaps by another `sd-search watch`" if in_use else str(error)
        raise ConfigError(
            f"port: cannot listen on {ADDRESS}:{port}: {found}; expected a free one: choose another with"
            " --port, or --port 0 for any"
        ) from error
    server.view = view
    return server


def is_own_name(host: str | None) -> bool:
    """Whether a request's Host header names this machine. A page elsewhere can make its own name point
    here, and its requests then come with that name.

    >>> [is_own_name(host) for host in ("localhost:8765", "127.0.0.1", "evil.example:8765", "", None)]
    [True, True, False, False, False]
    """
    name, _, port = (host or "").partition(":")
    return name.lower() in OWN_NAMES and (port == "" or port.isdecimal())


class _Request(BaseHTTPRequestHandler):
    """One request; the names of its methods are those that http.server calls."""

    server: PageServer
    server_version = "sd-search"
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:  # noqa: N802
        """The page, or sections of it."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not is_own_name(hosts[0]):
            words = f"this page answers to {' and '.join(sorted(OWN_NAMES))} only, found another Host"
            self._answer(HTTPStatus.FORBIDDEN, words)
            return
        target = urlsplit(self.path)
        try:
            if target.path == "/":
                sections = self.server.view.sections(dict.fromkeys(HEADINGS, ""))
                self._answer(HTTPStatus.OK, render_page(self.server.view.title, sections), "text/html")
            elif target.path == "/sections":
                known = dict(parse_qsl(target.query, keep_blank_values=True))
                found = as_json(self.server.view.sections(known))
                self._answer(HTTPStatus.OK, json.dumps(found), "application/json")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "found no such page, expected / or /sections")
        except OSError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"the run directory cannot be read: {error}")

    def _refuse(self) -> None:
        self._answer(
            HTTPStatus.METHOD_NOT_ALLOWED, f"found {self.command}, expected GET: this page only reads"
        )

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        content = text.encode("utf-8", errors="replace")
        try:
            self.send_response(status)
            if status == HTTPStatus.METHOD_NOT_ALLOWED:
                self.send_header("Allow", "GET")
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (ConnectionError, TimeoutError):  # the browser went away
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not told."""

"""/metrics, /healthz, /readyz and what takes a POST, on a node's loopback, from threads of their own."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvtier.config.checks import is_loopback
from kvtier.errors import ConfigError

# A client that stops in the middle of a request must not keep a thread.
REQUEST_TIMEOUT_S: Final = 5.0
# How soon close() is noticed.
POLL_S: Final = 0.1
# The tokens of a long turn as numbers in JSON.
BODY_MAX_BYTES: Final = 1 << 20

Check = Callable[[], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a POST. body: becomes JSON."""

    status: HTTPStatus
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


# Gets the Authorization header, '' where there is none, and the body of at most BODY_MAX_BYTES.
Post = Callable[[str, bytes], Reply]


class HealthServer:
    """Serves the endpoints from start() to close().

    host, port: where to listen; port 0 takes a free one, see `port`.  registry: what /metrics shows.
    alive, ready: what is wrong, as sentences; none means well (200), any means 503.  posts: what answers a
    POST, by path.  All are called in the thread of a request.  on_close: called at the end of close().
    Raises ConfigError for a host beyond loopback without allow_remote, and when it cannot listen.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        alive: Check,
        ready: Check,
        posts: Mapping[str, Post] | None = None,
        on_close: Callable[[], None] = lambda: None,
        allow_remote: bool = False,
    ) -> None:
        if not allow_remote and not is_loopback(host):
            raise ConfigError(
                "metrics.host",
                f"{host!r} is not a loopback address",
                fix="use 127.0.0.1, or set metrics.allow_remote = true where the network is trusted",
            )
        try:
            checks = {"/healthz": alive, "/readyz": ready}
            self._server = _Server(host, port, registry, checks, posts or {})
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "metrics.port", f"cannot listen on {host} port {port}: {error}", fix="use another port, or 0"
            ) from error
        self._host = host
        self._on_close = on_close
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="kvtier-http", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Base of the endpoints' addresses, without a slash at the end."""
        return (
            f"http://[{self._host}]:{self.port}" if ":" in self._host else f"http://{self._host}:{self.port}"
        )

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port. May be called whether or not it was started."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._on_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        checks: Mapping[str, Check],
        posts: Mapping[str, Post],
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self.checks = checks
        self.posts = posts
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the host's full name here, which may take many seconds.
        socketserver.TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "kvtier"
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S
    # An answer is sent as one piece: head and body apart would wait for each other's acknowledgement.
    wbufsize = -1

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, encode(self.server.registry), content_type)
        elif path in self.server.checks:
            reasons = list(self.server.checks[path]())
            status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
            body = json.dumps({"ok": not reasons, "reasons": reasons}).encode() + b"\n"
            self._answer(status, body, "application/json")
        elif path in self.server.posts:
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"POST only\n", "text/plain", {"Allow": "POST"})
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"try /metrics, /healthz or /readyz\n", "text/plain")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        # What is not read of a request would be taken for the next one.
        self.close_connection = True
        post = self.server.posts.get(self.path)
        length = self.headers.get("Content-Length", "")
        if post is None and (self.path == "/metrics" or self.path in self.server.checks):
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n", "text/plain", {"Allow": "GET, HEAD"})
        elif post is None:
            self._answer(HTTPStatus.NOT_FOUND, b"nothing takes a POST here\n", "text/plain")
        elif not (length.isascii() and length.isdigit()):
            self._answer(HTTPStatus.LENGTH_REQUIRED, b"say Content-Length\n", "text/plain")
        elif len(length) > len(str(BODY_MAX_BYTES)) or int(length) > BODY_MAX_BYTES:
            text = f"{BODY_MAX_BYTES} bytes are the most\n".encode()
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, "text/plain")
        else:
            body = self.rfile.read(int(length))
            self.close_connection = self.headers.get("Connection", "").lower() == "close"
            reply = post(self.headers.get("Authorization", ""), body)
            text = json.dumps(reply.body).encode() + b"\n"
            self._answer(reply.status, text, "application/json", reply.headers)

    def _answer(
        self, status: HTTPStatus, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""

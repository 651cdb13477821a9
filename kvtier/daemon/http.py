"""/metrics, /healthz and /readyz of a node, on loopback, from a thread of their own."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvtier.config_checks import is_loopback
from kvtier.errors import ConfigError

# A client that stops in the middle of a request must not keep a thread.
REQUEST_TIMEOUT_S: Final = 5.0
# How soon close() is noticed.
POLL_S: Final = 0.1

Check = Callable[[], Sequence[str]]


class HealthServer:
    """Serves the endpoints from start() to close().

    host, port: where to listen; port 0 takes a free one, see `port`.  registry: what /metrics shows.
    alive, ready: what is wrong, as sentences; none means well (200), any means 503.  Both are called in the
    thread of a request.  Raises ConfigError for a host beyond loopback without allow_remote, and when it
    cannot listen.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        alive: Check,
        ready: Check,
        allow_remote: bool = False,
    ) -> None:
        if not allow_remote and not is_loopback(host):
            raise ConfigError(
                "metrics.host",
                f"{host!r} is not a loopback address",
                fix="use 127.0.0.1, or set metrics.allow_remote = true where the network is trusted",
            )
        try:
            self._server = _Server(host, port, registry, {"/healthz": alive, "/readyz": ready})
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "metrics.port", f"cannot listen on {host} port {port}: {error}", fix="use another port, or 0"
            ) from error
        self._host = host
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self.checks = checks
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
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"try /metrics, /healthz or /readyz\n", "text/plain")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""

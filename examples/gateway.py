"""A gateway that sends a chat's next turn to the machine where its KV is at hand, by POST /locate.

    python examples/gateway.py

Standard library alone: a gateway in any language does the same.  Two daemons in this process stand for two
machines, each with a server of turns beside it.  These two are no cluster, so both are asked; nodes of one
cluster answer for each other, and the nearest is enough.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

import kvtier
from kvtier import Fingerprint, Shard
from kvtier.daemon.embedded import Embedded
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool

MACHINES, PAGE_TOKENS, TOKENS, CHATS = ("machine-a", "machine-b"), 16, 192, 6
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64}
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def call(address: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """POST JSON, get JSON. Raises OSError, and ValueError for anything but 200."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{address}{path}: {answer.status}")
        found: dict[str, Any] = json.loads(answer.read())
        return found
    finally:
        connection.close()


def serve(answer: Answer) -> ThreadingHTTPServer:
    """An HTTP server of one function, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1

        def do_POST(self) -> None:
            body = json.dumps(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def address_of(server: ThreadingHTTPServer) -> str:
    """host:port"""
    return f"127.0.0.1:{server.server_address[1]}"


class Gateway:
    """backends: address of each machine's server of turns. locators: of the daemons' endpoints."""

    def __init__(self, backends: dict[str, str], locators: list[str]) -> None:
        self._backends, self._locators = backends, locators
        self._turn = itertools.cycle(backends)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a turn on."""
        node = self.choose(request["conversation"])
        return call(self._backends[node], "/turn", request, timeout_s=60)

    def choose(self, conversation: str) -> str:
        """The best machine of the first answer that names one; where none does, one after the other."""
        for locator in self._locators:
            try:
                found = call(locator, "/locate", {"conversation": conversation}, timeout_s=0.5)["nodes"]
            except (OSError, ValueError):
                continue
            for node in found:
                if node["node"] in self._backends:
                    return str(node["node"])
        return next(self._turn)


def park(socket: str, conversation: str) -> None:
    """A first turn on the machine with this socket."""
    layer = [np.ones((TOKENS // PAGE_TOKENS, PAGE_TOKENS, 2, 32), np.float16) for _ in range(2)]
    pool = Pool(paged([layer], "page token head dim", block_tokens=64), layer)
    model = Fingerprint.of_revision("example/model@1f0c9a", CONFIG, kv_dtype="float16", layout="example/1")
    with kvtier.connect(socket) as client, client.attach(model, pool, shard=Shard(0, 1, 0, 2)) as worker:
        worker.park(conversation, range(TOKENS), range(TOKENS // PAGE_TOKENS)).result()


def main() -> int:
    """0 when each chat's turn went to its machine."""
    with ExitStack() as undo:
        backends, locators, sockets = {}, [], {}
        for name in MACHINES:
            daemon = Embedded({"node.name": name, "metrics.enabled": True})
            daemon.start()
            undo.callback(daemon.close)
            backend = serve(lambda request, name=name: {"machine": name})  # type: ignore[misc]
            undo.callback(backend.server_close)
            undo.callback(backend.shutdown)
            backends[name], sockets[name] = address_of(backend), daemon.socket_path
            locators.append(daemon.node.health()["metrics_url"].removeprefix("http://"))
        gateway = serve(Gateway(backends, locators))
        undo.callback(gateway.server_close)
        undo.callback(gateway.shutdown)

        home = {f"chat-{n}": MACHINES[n % 2] for n in range(CHATS)}
        for chat, machine in home.items():
            park(sockets[machine], chat)
        went = {chat: call(address_of(gateway), "/", {"conversation": chat}, 60)["machine"] for chat in home}
        right = sum(went[chat] == home[chat] for chat in home)
        print(f"{right} of {CHATS} chats went to the machine where they are parked")
        new = [call(address_of(gateway), "/", {"conversation": f"new-{n}"}, 60)["machine"] for n in range(4)]
        print(f"four new chats: {', '.join(new)}")
        print("both machines share the new ones" if set(new) == set(MACHINES) else "one machine has all")
    return 0 if right == CHATS and set(new) == set(MACHINES) else 1


if __name__ == "__main__":
    raise SystemExit(main())

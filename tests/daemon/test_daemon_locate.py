"""POST /locate: what a gateway gets, who may ask, and what bad requests do."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from kvtier.client.client import connect
from kvtier.daemon.embedded import Embedded
from kvtier.daemon.http import BODY_MAX_BYTES
from kvtier.daemon.locating import Locating
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.node_bench import SETTINGS, LocalWorker

TOKENS = 190
TOKEN = "a token of enough length"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Embedded]:
    daemon = Embedded({**SETTINGS, "metrics.enabled": True})
    daemon.start()
    kv = KvMemory(64)
    with connect(daemon.socket_path) as client, client.attach(kv.model, kv.pool, shard=SHARD) as worker:
        assert LocalWorker(kv, worker).park(1, pages_for(TOKENS), TOKENS).result().level == "host"
        yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    file = tmp_path_factory.mktemp("secret") / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    daemon = Embedded({**SETTINGS, "metrics.enabled": True, "access.token_file": str(file)})
    daemon.start()
    yield daemon
    daemon.close()


def port_of(daemon: Embedded) -> int:
    return int(daemon.node.health()["metrics_url"].rpartition(":")[2])


def post(daemon: Embedded, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(daemon), timeout=10)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/locate", data, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_it_says_what_the_client_says(daemon: Embedded) -> None:
    with connect(daemon.socket_path) as client:
        ((node, tokens, expected_s),) = client.locate("chat-1")
    status, said = post(daemon, {"conversation": "chat-1"})
    assert status == 200
    (found,) = said["nodes"]
    assert (found["node"], found["tokens"]) == (node, tokens) == ("embedded", TOKENS)
    assert found["expected_s"] > 0
    assert expected_s > 0


def test_tokens_decide_how_much_of_it_counts(daemon: Embedded) -> None:
    kv = KvMemory(64)
    with connect(daemon.socket_path) as client, client.attach(kv.model, kv.pool, shard=SHARD) as worker:
        assert LocalWorker(kv, worker).park(3, pages_for(TOKENS), TOKENS).result().level == "host"
        mine = [int(token) for token in tokens_of(3, TOKENS)]
        _, said = post(daemon, {"conversation": "chat-3", "tokens": [*mine, 7]})
        assert [found["tokens"] for found in said["nodes"]] == [TOKENS]
        strange = [mine[0] + 1, *mine[1:]]
        assert post(daemon, {"conversation": "chat-3", "tokens": strange}) == (200, {"nodes": []})


def test_what_nobody_has_is_an_empty_list(daemon: Embedded) -> None:
    assert post(daemon, {"conversation": "chat-2"}) == (200, {"nodes": []})
    assert post(daemon, {"conversation": "chat-1", "tenant": "another"}) == (200, {"nodes": []})


def test_one_connection_serves_many_questions(daemon: Embedded) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(daemon), timeout=10)
    try:
        for _ in range(3):
            connection.request("POST", "/locate", b'{"conversation": "chat-1"}')
            assert len(json.loads(connection.getresponse().read())["nodes"]) == 1
        held = connection.sock
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        assert connection.sock is held
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"{}", b'{"conversation": 7}', b'{"conversation": ""}', b"\xff\xfe",
     b'{"conversation": "chat-1", "tokens": [-1]}', b'{"conversation": "chat-1", "tokens": 9}',
     b'{"conversation": "chat-1", "tokens": [4294967296]}',
     b'{"conversation": "chat-1", "tenat": "x"}', b'{"conversation": "%s"}' % (b"x" * 1025)],
)  # fmt: skip
def test_what_is_no_question_is_refused_and_the_next_one_answered(daemon: Embedded, body: bytes) -> None:
    status, said = post(daemon, body)
    assert status == 400
    assert said["error"]
    assert said["fix"]
    assert post(daemon, {"conversation": "chat-1"})[0] == 200


def raw(daemon: Embedded, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port_of(daemon)), timeout=10) as stream:
        stream.sendall(request)
        stream.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: stream.recv(4096), b""))


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (None, 411),
        ("-1", 411),
        ("x", 411),
        ("\u0665", 411),
        (str(BODY_MAX_BYTES + 1), 413),
        ("9" * 5000, 413),
    ],
)
def test_a_length_that_is_missing_or_too_large_is_refused_unread(
    daemon: Embedded, length: str | None, status: int
) -> None:
    line = f"Content-Length: {length}\r\n".encode() if length else b""
    # What follows would be a second request, if the connection were kept.
    answer = raw(daemon, b"POST /locate HTTP/1.1\r\n" + line + b"\r\nGET /healthz HTTP/1.1\r\n\r\n")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1 ") == 1


def test_only_post_is_taken(daemon: Embedded) -> None:
    answer = raw(daemon, b"GET /locate HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"Allow: POST" in answer


# --- who may ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer", 401),
        ("Bearer \xe9\xe9", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
    ],
)
def test_where_there_is_a_token_it_has_to_be_shown(
    guarded: Embedded, header: str | None, status: int
) -> None:
    headers = {"Authorization": header} if header else {}
    assert post(guarded, {"conversation": "chat-1"}, **headers)[0] == status


def test_metrics_and_health_ask_for_no_token(guarded: Embedded) -> None:
    for path in (b"/metrics", b"/healthz", b"/readyz"):
        assert raw(guarded, b"GET " + path + b" HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 2"
        )


def test_other_machines_are_refused_where_there_is_no_token(tmp_path: Path) -> None:
    locating = Locating(tmp_path / "node.sock", token="", open_to_all=False)
    reply = locating("", b'{"conversation": "chat-1"}')
    assert (reply.status, reply.body["fix"]) == (HTTPStatus.FORBIDDEN, "set access.token_file")


def test_without_the_node_the_answer_is_any_node(tmp_path: Path) -> None:
    locating = Locating(tmp_path / "node.sock", token="", open_to_all=True)
    try:
        reply = locating("", b'{"conversation": "chat-1"}')
        assert (reply.status, reply.body["fix"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "use any node")
    finally:
        locating.close()


def test_the_end_of_the_daemon_leaves_no_connection(make_daemon: Callable[..., Embedded]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    daemon = make_daemon(metrics__enabled=True)
    assert post(daemon, {"conversation": "chat-1"})[0] == 200
    daemon.close()
    assert len(os.listdir("/proc/self/fd")) <= before

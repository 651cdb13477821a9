"""The endpoints over a real socket on loopback."""

import http.client
import json
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.daemon.http import HealthServer
from kvtier.daemon.metrics import NodeMetrics, make_registry
from kvtier.errors import ConfigError


@pytest.fixture
def trouble():
    return {"alive": [], "ready": []}


@pytest.fixture
def server(trouble):
    server = HealthServer(
        "127.0.0.1",
        0,
        registry=make_registry(lambda: NodeMetrics("n1", "0.1.0", True, workers=3)),
        alive=lambda: trouble["alive"],
        ready=lambda: trouble["ready"],
    )
    server.start()
    yield server
    server.close()


def ask(server, path, method="GET", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


def make(host, port=0, **more):
    nothing = list
    return HealthServer(
        host,
        port,
        registry=make_registry(lambda: NodeMetrics("n", "v", True)),
        alive=nothing,
        ready=nothing,
        **more,
    )


def test_metrics_parse_and_show_the_snapshot(server):
    status, kind, body = ask(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["kvtier_workers"].samples[0].value == 3


def test_metrics_speak_openmetrics_when_asked(server):
    _, kind, body = ask(server, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(("path", "key"), [("/healthz", "alive"), ("/readyz", "ready")])
def test_health_is_200_without_reasons_and_503_with_them(server, trouble, path, key):
    status, kind, body = ask(server, path)
    assert (status, kind, json.loads(body)) == (200, "application/json", {"ok": True, "reasons": []})
    trouble[key] = ["the disk tier is starting"]
    status, _, body = ask(server, path)
    assert (status, json.loads(body)) == (503, {"ok": False, "reasons": ["the disk tier is starting"]})


def test_not_ready_is_not_dead(server, trouble):
    trouble["ready"] = ["starting"]
    assert ask(server, "/healthz")[0] == 200


@pytest.mark.parametrize("path", ["/", "/metricsx", "/../etc/passwd"])
def test_other_paths_are_404(server, path):
    assert ask(server, path)[0] == 404


def test_query_and_head_are_understood_and_other_methods_refused(server):
    assert ask(server, "/readyz?verbose=1")[0] == 200
    assert ask(server, "/metrics", "HEAD")[2] == b""
    assert ask(server, "/metrics", "PUT")[0] == 501
    assert ask(server, "/metrics", "POST")[0] == 405
    assert ask(server, "/somewhere", "POST")[0] == 404


def test_a_client_that_says_nothing_does_not_hold_up_others(server):
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET /met")
        assert ask(server, "/healthz")[0] == 200


def test_noise_is_refused_and_the_server_goes_on(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as noisy:
        noisy.sendall(b"\x00\xff" * 5000 + b"\r\n\r\n")
        noisy.shutdown(socket.SHUT_WR)
        while noisy.recv(4096):
            pass
    assert ask(server, "/healthz")[0] == 200


def test_it_listens_on_loopback_alone(server):
    assert server._server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("host", ["0.0.0.0", "", "10.0.0.1", "::", "example.org"])
def test_hosts_beyond_loopback_are_refused_unless_allowed(host):
    with pytest.raises(ConfigError) as caught:
        make(host)
    assert caught.value.field == "metrics.host"


def test_every_interface_when_allowed():
    server = make("0.0.0.0", allow_remote=True)
    server.start()
    try:
        assert ask(server, "/healthz")[0] == 200
    finally:
        server.close()


def test_a_taken_port_is_an_error_that_names_the_fix(server):
    with pytest.raises(ConfigError) as caught:
        make("127.0.0.1", server.port)
    assert caught.value.field == "metrics.port"
    assert "0" in caught.value.fix


def test_close_frees_the_port_and_needs_no_start():
    server = make("127.0.0.1")
    port = server.port
    server.close()
    again = make("127.0.0.1", port)
    again.start()
    again.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass

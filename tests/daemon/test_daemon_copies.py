"""Copies at other nodes between real processes, over TLS: they outlive the node that was parked at."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from kvtier.testing.certificates import make_authority, make_certificate
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, until
from kvtier.testing.node_cluster import NodeCluster

pytestmark = pytest.mark.timeout(120)
TOKENS = 190
PAGES = pages_for(TOKENS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    folder = tmp_path_factory.mktemp("copies")
    try:
        files = make_certificate(make_authority(folder / "tls", "ca"), "node")
    except FileNotFoundError:
        pytest.skip("no openssl here")
    tls = {
        "cluster__tls_cert_file": files.cert,
        "cluster__tls_key_file": files.key,
        "cluster__tls_ca_file": files.ca,
    }
    # The directory is at 'a', which stays: only nodes that hold KV are lost here.
    with NodeCluster(folder, ("a", "b", "d"), **tls) as made:
        until(lambda: _knows_all(made), "every node has said what it has room for")
        yield made


def _knows_all(cluster: NodeCluster) -> bool:
    cluster.nodes["b"].client.forget("chat-1")
    receipt = park(cluster.nodes["b"], 1, "copies=3")
    return receipt["level"] == "copies=3"


def park(bench: Bench, seed: int, level: str, **how: float) -> dict:
    return bench.worker.result(bench.worker.park(seed, PAGES, TOKENS, level=level, **how))


def restored(bench: Bench, seed: int) -> int:
    receipt = bench.worker.result(bench.worker.restore(seed, PAGES, TOKENS)["handle"])
    seen = bench.worker.look(seed, PAGES, TOKENS)
    assert seen["front"] >= receipt["tokens"] and seen["strange"] == 0, receipt
    return receipt["tokens"]


def test_status_says_how_nodes_speak(cluster: NodeCluster) -> None:
    assert cluster.nodes["a"].client.status().transport == "tcp+tls"


def test_a_copy_outlives_its_node(cluster: NodeCluster) -> None:
    b, d = cluster.nodes["b"], cluster.nodes["d"]
    receipt = park(b, 2, "copies=3")
    assert (receipt["level"], receipt["reason"]) == ("copies=3", "")
    assert receipt["copies"] == {"a": "host", "d": "host"}
    b.kill("all")
    try:
        cluster.nodes["a"].kill("node")
        assert restored(d, 2) == TOKENS
    finally:
        b.recover()
        cluster.nodes["a"].recover()
    until(lambda: restored(b, 2) == TOKENS, "it comes back to where it was parked")


def test_a_node_that_hangs_is_followed_by_another(cluster: NodeCluster) -> None:
    a, b, d = cluster.nodes.values()
    # The directory lies with a node that was killed: it has to have heard of all of them again.
    until(lambda: park(b, 5, "copies=3")["level"] == "copies=3", "all nodes are well")
    d.services.signal("node", signal.SIGSTOP)
    try:
        receipt = park(b, 3, "copies=2", timeout_s=12.0)
    finally:
        d.services.signal("node", signal.SIGCONT)
    assert (receipt["level"], receipt["copies"]) == ("copies=2", {"a": "host"}), receipt
    assert restored(a, 3) == TOKENS


def test_forgetting_reaches_the_copies(cluster: NodeCluster) -> None:
    a, b, d = cluster.nodes.values()
    until(lambda: park(b, 4, "copies=3")["level"] == "copies=3", "all nodes are well")
    receipt = d.client.forget("chat-4")
    assert receipt.durable and not receipt.detail
    assert [restored(bench, 4) for bench in (a, b, d)] == [0, 0, 0]

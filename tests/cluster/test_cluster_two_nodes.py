"""Two real Ray nodes with the real services, in network namespaces: parked at one, restored at the other.

pytest -m netns tests/cluster/test_cluster_two_nodes.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_cluster_netns import Side, ip, pytestmark, sides  # noqa: F401  # the marks and the fixture

from kvtier import paths
from kvtier.client.client import Client, connect
from kvtier.cluster.down import kill_all
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import FAST, until
from kvtier.testing.worker_process import WorkerProcess

TOKENS = 190
PAGES = pages_for(TOKENS)
# A short cut: Ray's head does not give the node up, and nothing is started again.
CUT_S = 1.6


class Node:
    """A node as its users see it: a worker in a process of its own, and a client."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side, self._folder = side, folder
        self.client: Client
        self.worker: WorkerProcess

    def up(self) -> None:
        self.side.run("up-real")
        # Sockets with a path are reached from every network namespace.
        path = str(paths.node_socket(self.side.folders[1]))
        self.client = connect(path, backoff=FAST, required=False)
        self.worker = WorkerProcess(path, self._folder)

    def away(self) -> None:
        self.worker.kill()
        self.client.close()

    def park(self, seed: int, level: str = "disk") -> None:
        receipt = self.worker.result(self.worker.park(seed, PAGES, TOKENS, level=level))
        assert receipt["level"] == level, receipt

    def knows(self, seed: int, tokens: int = TOKENS) -> None:
        until(
            lambda: self.worker.do("planned", seed=seed, count=TOKENS)["tokens"] == tokens,
            f"{self.side.name} can restore {tokens} tokens of {seed}",
        )

    def restored(self, seed: int, deadline_s: float = 20.0) -> int:
        """Tokens in place, all of them right."""
        receipt = self.worker.result(self.worker.restore(seed, PAGES, TOKENS, deadline_s)["handle"], 40.0)
        seen = self.worker.look(seed, PAGES, TOKENS)
        assert seen["front"] >= receipt["tokens"] and seen["strange"] == 0, (receipt, seen)
        tokens: int = receipt["tokens"]
        return tokens


def set_up(members: Sequence[Side], folder: Path) -> None:
    """One cluster of them all; the directory is at the first."""
    for name in ("secret", "peers"):
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(f"{name} of nodes in their namespaces")
    directory = f"{members[0].address}:47201"
    for side in members:
        side.settings += [
            f"cluster.listen={side.address}:47200",
            f"cluster.directory={directory}",
            f"cluster.token_file={folder / 'peers'}",
            f"access.tenant_secret_file={folder / 'secret'}",
            "cluster.shards=4",
            "cluster.ask_s=1",
            "cluster.lost_after_s=3",
            f"host.capacity_bytes={64 << 20}",
            f"disk.capacity_bytes={256 << 20}",
            f"disk.segment_bytes={16 << 20}",
            "metrics.enabled=false",
        ]
    members[0].settings += [f"cluster.directory_listen={directory}"]


@pytest.fixture
def nodes(
    sides: tuple[Side, Side],  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Node, Node]]:
    """(with Ray's head and the directory, the other one). Its parameter: where the other one listens."""
    a, b = sides
    set_up(sides, tmp_path)
    if hasattr(request, "param"):
        a.settings += ["cluster.fallback=ray"]
        b.settings += [f"cluster.listen={request.param}", "cluster.fallback=ray"]
    gates = tmp_path / "gates"
    gates.mkdir()
    found = Node(a, gates), Node(b, gates)
    for node in found:
        node.up()
    yield found
    for node in found:
        node.away()


def test_parked_at_one_restored_at_the_other_through_cuts_and_deaths(nodes: tuple[Node, Node]) -> None:
    home, other = nodes
    for seed in (1, 2, 3, 4):
        other.park(seed)
    home.knows(1)
    assert home.restored(1) == TOKENS
    assert home.worker.do("planned", seed=1, count=TOKENS)["sources"] == ["host"]

    # The link is down for a while: each goes on with its own, and nothing waits beyond its deadline.
    ip("-n", other.side.name, "link", "set", other.side.link, "down")
    try:
        assert home.restored(1) == TOKENS
        assert home.restored(2, deadline_s=CUT_S) in (0, TOKENS)
        assert other.restored(2) == TOKENS
    finally:
        ip("-n", other.side.name, "link", "set", other.side.link, "up")
    home.knows(2)
    assert home.restored(2) == TOKENS

    # The other node dies as a whole: what had two copies is there, what had one is computed.
    held = other.side.record()
    assert held is not None
    kill_all(held)
    other.away()
    assert home.restored(2) == TOKENS
    assert home.restored(3) == 0
    forgotten = home.client.forget("chat-4")
    assert forgotten.durable and "b" in forgotten.detail

    # It returns: its disk is adopted, and what was forgotten meanwhile is gone from it.
    other.up()
    until(lambda: other.client.show("chat-4") is None, "the returned node has erased it")
    assert other.restored(4) == 0
    home.knows(3)
    assert home.restored(3) == TOKENS
    assert home.restored(4) == 0

    # It is taken out of service: what only its memory held is on its disk, and is there when it is back.
    receipt = other.worker.result(other.worker.park(5, PAGES, TOKENS, level="host"))
    assert receipt["level"] == "host"
    report = home.side.run("drain", "b")
    assert (report["phase"], report["reason"], report["lost_bytes"]) == ("done", "flushed", 0), report
    assert report["flushed_bytes"] > 0
    other.away()
    other.up()
    home.knows(5)
    assert home.restored(5) == TOKENS


@pytest.mark.parametrize("nodes", ["127.0.0.1:47200"], indirect=True)
def test_a_node_that_tcp_does_not_reach_is_read_through_ray(nodes: tuple[Node, Node]) -> None:
    home, other = nodes
    for seed in (1, 2):
        other.park(seed)
    home.knows(1)
    assert home.restored(1) == TOKENS
    report = home.client.status()
    assert dict(report.peers) == {"b": "ray"}
    assert report.counters["peer_relayed_bytes"] == report.counters["peer_received_bytes"] > 0
    # The other way there is TCP.
    receipt = home.worker.result(home.worker.park(3, PAGES, TOKENS, level="disk"))
    assert receipt["level"] == "disk"
    other.knows(3)
    assert other.restored(3) == TOKENS
    assert dict(other.client.status().peers) == {"a": "tcp"}

    # Cut off, it is as far away as over TCP: a miss by the deadline, and all of it once the link is back.
    ip("-n", other.side.name, "link", "set", other.side.link, "down")
    try:
        assert home.restored(2, deadline_s=CUT_S) in (0, TOKENS)
    finally:
        ip("-n", other.side.name, "link", "set", other.side.link, "up")
    home.knows(2)
    assert home.restored(2) == TOKENS
    forgotten = home.client.forget("chat-1")
    assert forgotten.durable and not forgotten.detail
    until(lambda: other.client.show("chat-1") is None, "it is erased at both")

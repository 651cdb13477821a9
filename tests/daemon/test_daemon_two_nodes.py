"""Two nodes of real processes: what was parked at one comes back at the other, whatever is between them."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvtier.client.client import Client
from kvtier.daemon import peer_lender
from kvtier.peers import choice
from kvtier.peers.choice import RAW, Rates
from kvtier.testing import kv_memory
from kvtier.testing.embedded_nodes import EmbeddedNodes
from kvtier.testing.kv_memory import pages_for, tokens_of
from kvtier.testing.node_bench import Bench, LocalWorker, host, until
from kvtier.testing.node_cluster import NodeCluster
from kvtier.tier import Slot

pytestmark = pytest.mark.timeout(120)
TOKENS = 190
PAGES = pages_for(TOKENS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with NodeCluster(tmp_path_factory.mktemp("two")) as made:
        yield made


@pytest.fixture
def a(cluster: NodeCluster) -> Bench:
    return healed(cluster, "a")


@pytest.fixture
def b(cluster: NodeCluster) -> Bench:
    return healed(cluster, "b")


def healed(cluster: NodeCluster, name: str) -> Bench:
    bench = cluster.nodes[name]
    bench.open_gates()
    bench.recover()
    return bench


def park(bench: Bench, seed: int, level: str = "disk", count: int = TOKENS) -> None:
    receipt = bench.worker.result(bench.worker.park(seed, pages_for(count), count, level=level))
    assert receipt["level"] == level, receipt


def restored(bench: Bench, seed: int, count: int = TOKENS) -> tuple[int, str]:
    """Tokens and reason; what is said to be in place is right, and nothing else was touched."""
    pages = pages_for(count)
    receipt = bench.worker.result(bench.worker.restore(seed, pages, count)["handle"])
    seen = bench.worker.look(seed, pages, count)
    assert seen["front"] >= receipt["tokens"], receipt
    assert seen["strange"] == 0
    return receipt["tokens"], receipt["reason"]


def test_a_conversation_comes_back_bit_for_bit(cluster: NodeCluster, a: Bench, b: Bench) -> None:
    for seed, level in ((1, "host"), (2, "disk")):
        park(a, seed, level)
        cluster.until_known(seed, "b", TOKENS, TOKENS)
        found = b.worker.restore(seed, PAGES, TOKENS)
        assert found["sources"] == ["peer"]
        receipt = b.worker.result(found["handle"])
        assert (receipt["tokens"], receipt["sources"]) == (TOKENS, {"peer": TOKENS})
        assert b.worker.look(seed, PAGES, TOKENS) == {"front": TOKENS, "strange": 0}
        # From now on it is here, too.
        assert b.worker.restore(seed, PAGES, TOKENS)["sources"] == ["host"]


def test_from_the_disk_alone_and_on_from_there(cluster: NodeCluster, a: Bench, b: Bench) -> None:
    park(a, 3)
    a.push_out(3)
    cluster.until_known(3, "b", TOKENS, TOKENS)
    assert restored(b, 3) == (TOKENS, "")
    # The next turn is parked here, and is the longer branch for the node where it began.
    park(b, 3, count=TOKENS + 100)
    cluster.until_known(3, "a", TOKENS + 100, TOKENS + 100)
    for bench in (a, b):
        listed = {info.conversation: info for info in bench.client.conversations()}
        assert (listed["chat-3"].nodes, listed["chat-3"].tokens) == (("a", "b"), TOKENS + 100)
        located = bench.client.locate("chat-3")
        assert [(node, tokens) for node, tokens, _ in located] == [("b", TOKENS + 100), ("a", TOKENS)]
    assert restored(a, 3, TOKENS + 100) == (TOKENS + 100, "")


def test_a_holder_that_is_killed_in_the_middle_is_a_miss(cluster: NodeCluster, a: Bench, b: Bench) -> None:
    park(a, 4)
    before = host(b.client).used_bytes
    cluster.until_known(4, "b", TOKENS, TOKENS)
    b.worker.do("poison", pages=PAGES)
    assert b.worker.do("planned", seed=4, count=TOKENS)["tokens"] == TOKENS
    a.services.signal("node", signal.SIGSTOP)
    handle = b.worker.do("go", pages=PAGES, deadline_s=60.0)
    until(lambda: host(b.client).used_bytes > before, "the read has begun")
    a.kill("all")
    receipt = b.worker.result(handle)
    assert (receipt["tokens"], receipt["reason"]) == (0, "peer_lost")
    assert b.worker.look(4, PAGES, TOKENS) == {"front": 0, "strange": 0}
    a.recover()
    cluster.until_known(4, "b", TOKENS, TOKENS)
    assert restored(b, 4) == (TOKENS, "")


def test_a_holder_that_hangs_costs_no_more_than_the_deadline(
    cluster: NodeCluster, a: Bench, b: Bench
) -> None:
    park(a, 5)
    park(b, 5, count=64)
    cluster.until_known(5, "b", TOKENS, TOKENS)
    b.worker.do("poison", pages=PAGES)
    assert b.worker.do("planned", seed=5, count=TOKENS)["tokens"] == TOKENS
    a.services.signal("node", signal.SIGSTOP)
    try:
        handle = b.worker.do("go", pages=PAGES, deadline_s=1.0)
        receipt = b.worker.result(handle)
        assert receipt["tokens"] <= 64
        assert receipt["reason"] in ("deadline", "peer_lost")
        assert b.worker.look(5, PAGES, TOKENS)["front"] >= receipt["tokens"]
        # With nobody to ask, what is here is what there is.
        assert restored(b, 5)[0] in (0, 64)
    finally:
        a.services.signal("node", signal.SIGCONT)
    cluster.until_known(5, "b", TOKENS, TOKENS)
    assert restored(b, 5) == (TOKENS, "")


def test_the_directory_is_told_everything_again_after_its_death(
    cluster: NodeCluster, a: Bench, b: Bench
) -> None:
    park(a, 6)
    cluster.until_known(6, "b", TOKENS, TOKENS)
    a.kill("directory")
    park(b, 7)
    assert restored(b, 7) == (TOKENS, "")
    a.recover()
    cluster.until_known(6, "b", TOKENS, TOKENS)
    cluster.until_known(7, "a", TOKENS, TOKENS)
    assert restored(a, 7) == (TOKENS, "")


def test_forgotten_at_one_node_is_gone_at_both(cluster: NodeCluster, a: Bench, b: Bench) -> None:
    park(a, 8)
    cluster.until_known(8, "b", TOKENS, TOKENS)
    assert restored(b, 8) == (TOKENS, "")
    receipt = b.client.forget("chat-8")
    assert receipt.durable and not receipt.detail
    until(lambda: a.client.show("chat-8") is None, "the directory has heard of it")
    assert restored(a, 8)[0] == restored(b, 8)[0] == 0


def test_what_was_forgotten_while_a_node_was_away_goes_when_it_returns(
    cluster: NodeCluster, a: Bench, b: Bench
) -> None:
    park(b, 9)
    park(b, 10)
    cluster.until_known(9, "a", TOKENS, TOKENS)
    b.kill("all")
    receipt = a.client.forget("chat-9")
    assert receipt.durable and "b" in receipt.detail
    # Whoever forgot it starts again, too: the tombstone is on its drive.
    a.kill("all")
    a.recover()
    b.recover()
    graves = Path(b.services.config.node.state_dir) / "tombstones"
    until(lambda: graves.exists() and graves.stat().st_size, "the returned node has erased it")
    assert b.client.show("chat-9") is None
    assert restored(b, 9)[0] == 0
    assert restored(a, 9)[0] == 0
    assert restored(b, 10) == (TOKENS, "")
    # The name may be used again, and lives through the next start.
    park(b, 9)
    b.kill("all")
    b.recover()
    until(lambda: restored(b, 9) == (TOKENS, ""), "what was parked afterwards stays")


# --- on the wire, in one process ----------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[LocalWorker, LocalWorker]]:
    """Workers at two nodes that are threads of this process."""
    with two_nodes(tmp_path) as (workers, _):
        yield workers[0], workers[1]


@contextmanager
def two_nodes(tmp_path: Path) -> Iterator[tuple[list[LocalWorker], list[Client]]]:
    """Their workers, and who asks them for their status."""
    nodes = EmbeddedNodes(tmp_path)
    try:
        nodes.start()
        yield list(nodes.workers.values()), list(nodes.clients.values())
    finally:
        nodes.close()


def known_at(local: LocalWorker, seed: int) -> bool:
    plan = local.worker.plan(f"chat-{seed}", tokens_of(seed, TOKENS))
    local.worker.drop(plan)
    return plan.load_tokens == TOKENS


def flip_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of each object, after it was summed."""
    view = peer_lender.PeerLender._view

    def flipped(self: peer_lender.PeerLender, slot: Slot) -> np.ndarray:
        sent = view(self, slot).copy()
        sent[sent.size // 2] ^= 16
        return sent

    monkeypatch.setattr(peer_lender.PeerLender, "_view", flipped)


def test_a_flipped_bit_on_the_wire_is_a_miss(
    pair: tuple[LocalWorker, LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_a, at_b = pair
    assert at_a.park(1, PAGES, TOKENS).result().level == "host"
    until(lambda: known_at(at_b, 1), "the other node knows it")
    flip_what_is_sent(monkeypatch)
    receipt = at_b.restore(1, PAGES, TOKENS)
    assert (receipt.tokens, receipt.reason) == (0, "corrupt")
    monkeypatch.undo()
    assert at_b.restore(1, PAGES, TOKENS).tokens == TOKENS
    assert at_b.kv.front(1, PAGES, TOKENS) == TOKENS


MB = 1e6


class Clock:
    """For what is measured of a link: each byte takes as long as a link of this speed would need for it.

    came: by codec, bytes of KV.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes_per_s: float) -> None:
        self.now_s, self.bytes_per_s = 1000.0, bytes_per_s
        self.came: Counter[str] = Counter()
        came, measured = Rates.came, Rates.measured
        lock = threading.Lock()

        def told(rates: Rates, codec: str, nbytes: int, now_s: float) -> None:
            with lock:
                self.came[codec] += nbytes
                # Encoded it is a third shorter.
                self.now_s += nbytes / self.bytes_per_s * (1 if codec == RAW else 2 / 3)
                came(rates, codec, nbytes, self.now_s)

        monkeypatch.setattr(Rates, "came", told)
        monkeypatch.setattr(Rates, "measured", lambda rates, now_s: measured(rates, self.now_s))
        # A conversation of the test is enough to know the link by.
        monkeypatch.setattr(choice, "_FEW_BYTES", 64 << 10)
        monkeypatch.setattr(choice, "_LONG_S", 1e-9)


def like_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """What conversations have in memory are numbers in bfloat16 of a common size, not of all sizes."""
    truth = kv_memory.truth

    def narrow(seed: int, plane: int, count: int) -> np.ndarray:
        return ((truth(seed, plane, count).view(np.uint16) & 0x83FF) | 0x3C00).view(np.uint8)

    monkeypatch.setattr(kv_memory, "truth", narrow)


def read_elsewhere(pair: list[LocalWorker], seed: int) -> None:
    at_a, at_b = pair
    assert at_a.park(seed, PAGES, TOKENS).result().level == "host"
    until(lambda: known_at(at_b, seed), "the other node knows it")
    receipt = at_b.restore(seed, PAGES, TOKENS)
    assert (receipt.tokens, receipt.sources) == (TOKENS, {"peer": TOKENS})
    assert at_b.kv.front(seed, PAGES, TOKENS) == TOKENS


COUNTED = ("received", "coded", "wire")


def test_over_a_slow_link_kv_travels_encoded_and_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    clock = Clock(monkeypatch, 1 * MB)
    like_kv(monkeypatch)
    with two_nodes(tmp_path) as (workers, clients):
        read_elsewhere(workers, 1)
        # What comes in several reads, as on a busy machine, may be encoded once the first have told the rate.
        assert next(iter(clock.came)) == RAW, "nobody knows the link yet"
        whole, raw = clock.came.total(), clock.came[RAW]
        before = clients[1].status().counters
        read_elsewhere(workers, 2)
        after = clients[1].status().counters
        came = {name: after[f"peer_{name}_bytes"] - before[f"peer_{name}_bytes"] for name in COUNTED}
        assert (before["peer_received_bytes"], came["received"], came["coded"]) == (whole, whole, whole)
        assert 0.5 * whole <= came["wire"] <= 0.8 * whole
        assert (clock.came.total(), clock.came[RAW]) == (2 * whole, raw)

        with monkeypatch.context() as patch:
            flip_what_is_sent(patch)
            at_a, at_b = workers
            assert at_a.park(3, PAGES, TOKENS).result().level == "host"
            until(lambda: known_at(at_b, 3), "the other node knows it")
            receipt = at_b.restore(3, PAGES, TOKENS)
            assert (receipt.tokens, receipt.reason) == (0, "corrupt")
        assert clients[1].status().counters["peer_coded_bytes"] > after["peer_coded_bytes"]

        # Years later, and the link is another one.
        clock.now_s += 1e8
        clock.bytes_per_s = 100_000 * MB
        read_elsewhere(workers, 4)
        coded = clock.came.total() - clock.came[RAW]
        read_elsewhere(workers, 5)
        assert clock.came.total() - clock.came[RAW] == coded

"""Nodes that read each other's host memory: by an agent that a test has in its hands, and by NIXL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.daemon import peer_desk
from kvtier.peers.lending import AgentFailed
from kvtier.peers.nixl_agent import NixlAgent
from kvtier.testing.embedded_nodes import EmbeddedNodes
from kvtier.testing.fake_agent import FakeAgent
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import until

pytestmark = pytest.mark.timeout(120)
TOKENS = 190
PAGES = pages_for(TOKENS)


class LikeNixl(FakeAgent):
    """As it is called in reports. made: all so far."""

    name = "nixl"
    made: list[LikeNixl]

    def __init__(self, own: str) -> None:
        super().__init__(own)
        self.made.append(self)


class Two(EmbeddedNodes):
    """Nodes that read each other's memory."""

    def parked(self, seed: int) -> None:
        """At a, and known to b."""
        self.workers["a"].park(seed, PAGES, TOKENS, level="host").result(timeout_s=30.0)
        until(lambda: self.planned("b", seed, TOKENS) == TOKENS, "the other node is known to have it")

    def restored(self, seed: int) -> tuple[int, str]:
        receipt = self.workers["b"].restore(seed, PAGES, TOKENS)
        return receipt.tokens, receipt.reason

    def lent_bytes(self) -> tuple[float, float]:
        counters = self.clients["b"].status().counters
        return counters["peer_lent_bytes"], counters["peer_received_bytes"]


@pytest.fixture(params=["fake", "nixl"])
def two(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    if request.param == "fake":
        monkeypatch.setattr(LikeNixl, "made", [], raising=False)
        monkeypatch.setattr(peer_desk, "NixlAgent", LikeNixl)
    else:
        try:
            NixlAgent("probe/1")
        except AgentFailed as error:
            pytest.skip(str(error))
    made = Two(tmp_path, {"cluster.rdma": "force"})
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_a_conversation_is_read_in_the_other_nodes_memory(two: Two) -> None:
    two.parked(1)
    assert two.restored(1) == (TOKENS, "")
    lent, received = two.lent_bytes()
    assert lent == received > 0
    assert dict(two.clients["b"].status().peers)["a"] == "nixl"


@pytest.mark.parametrize("two", ["fake"], indirect=True)
def test_a_slot_is_kept_as_long_as_its_read_goes_on(two: Two) -> None:
    two.parked(1)
    (reading,) = [agent for agent in LikeNixl.made if agent.own.startswith("b/")]
    reading.loses = True
    daemon = two.daemons["b"]
    assert two.restored(1) == (0, "peer_lost")

    def limbo() -> int:
        return daemon.node.ask(lambda core: core.state.host.usage().limbo_bytes) or 0

    going_on = sum(read.well is None for read in reading.reads)
    assert going_on and limbo() > 0
    reading.loses = False
    # What else there is comes over the connection, beside them.
    two.parked(2)
    assert two.restored(2) == (TOKENS, "")
    assert limbo() > 0 and two.lent_bytes()[0] == 0
    for read in reading.reads:
        read.end()
    until(lambda: limbo() == 0, "the slots are given back")
    assert two.restored(1) == (TOKENS, "")

"""Nodes that no TCP connection can be made between: all that they say to each other is carried in calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.carriage import PIECE_BYTES, Bytes, Passing
from kvtier.daemon.directory_service import directory_name
from kvtier.daemon.embedded import Embedded
from kvtier.peers import stream
from kvtier.peers.client import PeerClient
from kvtier.testing.embedded_nodes import EmbeddedNodes
from kvtier.testing.kv_memory import pages_for, tokens_of
from kvtier.testing.local_carrier import LocalCarrier
from kvtier.testing.node_bench import host, until
from kvtier.testing.node_cluster import free_port

pytestmark = pytest.mark.timeout(120)
TOKENS = 190
PAGES = pages_for(TOKENS)
BEGINS = Passing("begins", np.zeros(0, np.uint8), first=True)
Answers = dict[str, Callable[[Passing], Bytes | None]]


class RayLike(LocalCarrier):
    """As it is called in reports."""

    name = "ray"


def refuse_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """At all addresses, whoever calls."""
    nowhere = ("127.0.0.1", free_port())
    monkeypatch.setattr(
        "kvtier.peers.ways.connect", lambda address, tls, until_s: stream.connect(nowhere, tls, until_s)
    )


class Cut(EmbeddedNodes):
    """Where the nodes say that they listen, nobody is."""

    def __init__(self, folder: Path, fallback: str) -> None:
        super().__init__(folder, {"cluster.fallback": fallback})
        called = directory_name(self.settings["a"]["cluster.directory"])
        self.answers: Answers = {called: self.service.carried}
        self.carrier = RayLike(self.answers)

    def begin(self, name: str, daemon: Embedded) -> None:
        """With the other way to it."""
        daemon.node.carry_by(self.carrier)
        super().begin(name, daemon)
        self.answers[name] = daemon.node.carried

    def park(self, name: str, seed: int, **options: object) -> str:
        handle = self.workers[name].park(seed, PAGES, TOKENS, **options)
        level: str = handle.result(timeout_s=30.0).level
        return level

    def restored(self, name: str, seed: int) -> tuple[int, str]:
        receipt = self.workers[name].restore(seed, PAGES, TOKENS)
        return receipt.tokens, receipt.reason


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    made = Cut(tmp_path, "ray")
    try:
        refuse_tcp(monkeypatch)
        made.start()
        yield made
    finally:
        made.close()


def test_all_that_tcp_does_is_done(cut: Cut) -> None:
    cut.park("a", 1, level="host")
    until(lambda: cut.planned("b", 1, TOKENS) == TOKENS, "the directory and the other node are asked")
    assert cut.restored("b", 1) == (TOKENS, "")
    report = cut.clients["b"].status()
    assert (report.transport, dict(report.peers)["a"]) == ("tcp", "ray")
    # None of it came otherwise.
    assert report.counters["peer_relayed_bytes"] == report.counters["peer_received_bytes"] > 0
    assert all(len(call.data) <= PIECE_BYTES for _, call in cut.carrier.calls)
    # Other loads are not judged by how long this one took.
    learned = cut.daemons["b"].node.ask(lambda core: core.learned())
    assert "a by ray" in repr(learned)
    # A copy at the other node, and a forget that erases both.
    until(lambda: cut.park("a", 2, level="copies=2") == "copies=2", "the other node is known, and has it")
    receipt = cut.clients["b"].forget("chat-2")
    assert receipt.durable and not receipt.detail
    until(lambda: cut.clients["a"].show("chat-2") is None, "it is erased at both")


def test_what_a_call_damages_is_a_miss(cut: Cut) -> None:
    cut.park("a", 3, level="host")
    until(lambda: cut.planned("b", 3, TOKENS) == TOKENS, "b knows what a has")
    sound = cut.answers["a"]

    def damaged(call: Passing) -> Bytes | None:
        came = sound(call)
        if came is not None and len(came) > 4096:
            came = came.copy()
            came[-1] ^= 1
        return came

    cut.answers["a"] = damaged
    plan_tokens, reason = cut.restored("b", 3)
    assert (plan_tokens < TOKENS, reason) == (True, "corrupt")


def test_a_carrier_that_loses_the_node_is_a_miss_and_nothing_waits(cut: Cut) -> None:
    cut.park("a", 4, level="host")
    until(lambda: cut.planned("b", 4, TOKENS) == TOKENS, "b knows what a has")
    plan = cut.workers["b"].worker.plan("chat-4", tokens_of(4, TOKENS))
    del cut.answers["a"]
    receipt = cut.workers["b"].worker.restore(plan, PAGES, deadline_s=20.0)
    assert (receipt.tokens, receipt.reason) == (0, "peer_lost")


def test_where_it_is_not_wanted_nothing_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Cut(tmp_path, "none")
    try:
        refuse_tcp(monkeypatch)
        alone.start()
        assert alone.park("a", 5, level="disk") == "disk"
        assert alone.restored("a", 5) == (TOKENS, "")
        assert alone.planned("b", 5, TOKENS) == 0
        assert alone.carrier.calls == []
        # Nor do others that want it get an answer, from the node or from the directory.
        assert [answer(BEGINS) for answer in alone.answers.values()] == [None] * 3
    finally:
        alone.close()


def test_a_connection_is_of_who_began_it(cut: Cut) -> None:
    begun = [answer(BEGINS) for answer in cut.answers.values()]
    assert len(begun) == 3 and all(came is not None and not len(came) for came in begun)
    call = Passing("guessed", np.zeros(4, np.uint8), least=4, wait_s=0.1)
    assert cut.daemons["a"].node.carried(call) is None
    # Whoever begins one has proven nothing yet, and gets nothing but the way out.
    assert cut.daemons["a"].node.carried(replace(call, first=True, data=np.full(4, 255, np.uint8))) is None


def no_thread(*_: object, **__: object) -> Any:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("where", ["the call", "the read"])
def test_a_read_that_gets_no_thread_ends_as_a_miss(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    cut.park("a", 6, level="host")
    until(lambda: cut.planned("b", 6, TOKENS) == TOKENS, "b knows what a has")
    plan = cut.workers["b"].worker.plan("chat-6", tokens_of(6, TOKENS))
    with monkeypatch.context() as patched:
        if where == "the call":
            patched.setattr(cut.carrier, "pass_on", no_thread)
        else:
            patched.setattr(PeerClient, "fetch", no_thread)
        receipt = cut.workers["b"].worker.restore(plan, PAGES, deadline_s=20.0)
        assert (receipt.tokens, receipt.reason) == (0, "peer_lost")
    assert host(cut.clients["b"]).limbo_bytes == 0

"""What a node's service asks of others: nothing that waits for one of them holds up the rest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from kvtier import cluster_messages
from kvtier.cluster_messages import DIRECTORY, Branches, Buried, Bury, FindBranches, Stone
from kvtier.config import load
from kvtier.daemon.peer_desk import PeerDesk
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.host.tier import HostTier
from kvtier.messages import Message
from kvtier.node.events import Send
from kvtier.testing.node_bench import until
from kvtier.testing.node_cluster import cluster_settings


def test_plans_do_not_wait_for_forgettings_that_a_hanging_node_holds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cluster_settings(tmp_path, ("a",))["a"]
    config = load(None, {**settings, "node.state_dir": str(tmp_path / "state")})
    told: list[Message] = []
    hangs = threading.Event()
    monkeypatch.setattr(PeerDirectory, "nodes", lambda self: {"b": True})
    monkeypatch.setattr(PeerDirectory, "conversation", lambda self, tenant, name: [])
    monkeypatch.setattr(PeerDesk, "_erase_at", lambda self, node, stone: hangs.wait(20))
    desk = PeerDesk(
        config, 1, cast(HostTier, None), lambda peer, message: told.append(message), _nobody_looks
    )

    def kinds(kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in list(told))

    try:
        for number in range(20):
            stone = Stone(f"a.{number}", "acme", f"chat-{number}", 1.0)
            desk.carry_out(Send(DIRECTORY, Bury(job=stone.id, stone=stone)))
        desk.carry_out(Send(DIRECTORY, FindBranches(job="e1", tenant="acme", conversation="chat")))
        until(lambda: kinds(Branches), "a plan's question is answered")
        assert not kinds(Buried)
        hangs.set()
        until(lambda: kinds(Buried) == 20, "all are forgotten")
    finally:
        hangs.set()
        desk.close()


def _nobody_looks(look: Any) -> None:
    """There is no core."""


def test_nodes_that_are_away_are_not_asked_to_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = cluster_settings(tmp_path, ("a",))["a"]
    config = load(None, {**settings, "node.state_dir": str(tmp_path / "state")})
    told: list[Message] = []
    asked: list[str] = []
    monkeypatch.setattr(PeerDirectory, "nodes", lambda self: {"b": True, "gone": False})
    monkeypatch.setattr(PeerDesk, "_erase_at", lambda self, node, stone: asked.append(node) or True)
    desk = PeerDesk(
        config, 1, cast(HostTier, None), lambda peer, message: told.append(message), _nobody_looks
    )
    try:
        stone = Stone("a.1", "acme", "chat", 1.0)
        desk.carry_out(Send(DIRECTORY, Bury(job=stone.id, stone=stone)))
        until(lambda: told, "it is forgotten")
    finally:
        desk.close()
    assert asked == ["b"]
    assert told == [Buried(job="a.1", done=("b",), absent=("gone",))]


def test_every_wish_of_the_core_has_somebody_who_carries_it_out(tmp_path: Path) -> None:
    """A wish that nobody carries out would never be answered."""
    settings = cluster_settings(tmp_path, ("a",))["a"]
    config = load(None, {**settings, "node.state_dir": str(tmp_path / "state")})
    desk = PeerDesk(config, 1, cast(HostTier, None), lambda peer, message: None, _nobody_looks)
    try:
        wishes = {
            cluster_messages.FindBranches,
            cluster_messages.FindHolders,
            cluster_messages.FindConversations,
            cluster_messages.FindNodes,
            cluster_messages.AskHolder,
            cluster_messages.AskKeep,
            cluster_messages.PeerRead,
            cluster_messages.Bury,
            cluster_messages.Erased,
        }
        assert desk._works.keys() == wishes
    finally:
        desk.close()

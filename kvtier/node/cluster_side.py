"""The node's half of the conversation with the cluster: directory and other nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtier.messages import cluster as c
from kvtier.messages.calls import Message
from kvtier.node.announcing import Announcing
from kvtier.node.balancing import Balancing
from kvtier.node.disk_side import DiskSide
from kvtier.node.draining import Draining
from kvtier.node.elsewhere import Elsewhere
from kvtier.node.everywhere import Everywhere
from kvtier.node.graves import Burials
from kvtier.node.keeping import Keeping
from kvtier.node.loads import Loads
from kvtier.node.loans import Loans
from kvtier.node.peer_reads import PeerReads
from kvtier.node.pulls import Pulls
from kvtier.node.replicas import Replicas
from kvtier.node.room import Room
from kvtier.node.state import NodeState

# Who may send what: the beginning of the peer's name.
CLUSTER_SAYS: dict[type[Message], tuple[str, ...]] = {
    c.Branches: (c.DIRECTORY,),
    c.NodesThere: (c.DIRECTORY,),
    c.Holders: (c.DIRECTORY,),
    c.Buried: (c.DIRECTORY,),
    c.Graves: (c.DIRECTORY,),
    c.Heard: (c.DIRECTORY,),
    c.Known: (c.DIRECTORY,),
    c.Over: (c.DIRECTORY,),
    c.TheseAre: (c.PEERS,),
    c.Kept: (c.PEERS,),
    c.PeerReadDone: (c.PEERS,),
    c.WhatIs: (c.PEER,),
    c.Keep: (c.PEER,),
    c.Lend: (c.PEER,),
    c.GaveBack: (c.PEER,),
    c.Erase: (c.PEER, c.DIRECTORY),
    c.Drain: (c.SERVICE,),
}


class ClusterSide:
    """Everything of the core that is about other nodes."""

    def __init__(
        self,
        state: NodeState,
        disk: DiskSide,
        room: Room,
        elsewhere: Elsewhere,
        loads: Loads,
        replicas: Replicas,
    ) -> None:
        self.elsewhere = elsewhere
        self.replicas = replicas
        self.pulls = Pulls(state, PeerReads(state))
        self.loans = Loans(state, disk, room)
        self.announcing = Announcing(state, loads)
        self.burials = Burials(state)
        self.keeping = Keeping(state, self.pulls.reads, disk, room, self.burials)
        self.everywhere = Everywhere(state, loads)
        self.draining = Draining(state, disk, replicas)
        self.balancing = Balancing(state, replicas)

    def handlers(self) -> dict[type[Message], Callable[[str, Any], None]]:
        """What answers each message."""
        return {
            c.Branches: self.elsewhere.on_branches,
            c.Holders: self.elsewhere.on_holders,
            c.TheseAre: self.elsewhere.on_these_are,
            c.NodesThere: self.replicas.on_nodes,
            c.Kept: self.replicas.on_kept,
            c.Keep: self.keeping.keep,
            c.PeerReadDone: self.pulls.reads.on_done,
            c.WhatIs: self.loans.what_is,
            c.Lend: self.loans.lend,
            c.GaveBack: self.loans.gave_back,
            c.Buried: self.burials.on_buried,
            c.Erase: self.burials.on_erase,
            c.Graves: self.burials.on_graves,
            c.Heard: self.burials.on_heard,
            c.Known: self.everywhere.on_known,
            c.Drain: self.draining.drain,
            c.Over: self.burials.on_over,
        }

    def tick(self) -> None:
        """Time passed."""
        self.burials.tick()
        self.everywhere.tick()
        self.elsewhere.tick()
        self.loans.tick()
        self.replicas.tick()
        self.keeping.tick()
        self.draining.tick()
        self.balancing.tick()
        self.announcing.tick()

"""Several nodes' cores with one directory, and what lies between them under a test's hand.

    cluster = RigCluster("a", "b")
    a, b = cluster.rigs.values()
    worker = a.attach(); a.park(worker, "chat", range(10)); a.run()
    restore = b.resume(b.attach(), "chat", range(12))       # by way of the directory and of node a

The directory is the daemon's own, in one shard.  Reads from a peer wait in `rig.pulls` until they are
finished or failed; everything else between nodes happens at once, unless `cluster.cut` names the node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from kvtier.directory import saying
from kvtier.directory.announcer import Announcer
from kvtier.directory.lookups import questions
from kvtier.directory.merge import Conversation
from kvtier.directory.shard import Shard
from kvtier.geometry import Geometry
from kvtier.messages import cluster as c
from kvtier.messages.calls import Message
from kvtier.messages.tiers import WireItem
from kvtier.node.blocks import Stored
from kvtier.node.events import Received, Send
from kvtier.node.settings import NodeSettings
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems
from kvtier.testing.rig_uses import PLAIN, UNIT, RigPark, RigRestore
from kvtier.testing.rig_world import DiskStore, flipped

SETTINGS = NodeSettings(batch_bytes=2 * UNIT, batches_in_flight=2, ask_elsewhere_s=0.25)


class NodeRig(CoreRig):
    """One node of a RigCluster. pulls: reads from peers that have not ended. graves: what is on the drive.

    proven: those of the graves that the core has carried out.  keeps: by the name under which another node
    asked: who that is, and the job of its question.
    """

    def __init__(self, cluster: RigCluster, name: str, graves: tuple[c.Stone, ...] = (), **how: Any) -> None:
        self.cluster = cluster
        self.pulls: list[c.PeerRead] = []
        self.graves = list(graves)
        self.proven: list[c.Stone] = []
        self.keeps: dict[str, tuple[str, str]] = {}
        self.replies: list[Message] = []
        wishes = how.pop("wishes", {})
        super().__init__(settings=replace(SETTINGS, node=name, **wishes), started=False, **how)
        self.announcer = Announcer(name, self.core.state.epoch, 1)
        cluster.rigs[name] = self
        if graves:
            self.tell(Received(c.DIRECTORY, c.Graves(stones=graves)))
        self.start_gpu()
        if self.store is not None:
            self.start_disk()
        self.announce()

    @property
    def name(self) -> str:
        """Of the node."""
        return self.settings.node

    def _arrive(self, send: Send) -> None:
        message = send.message
        if send.peer == c.PEERS:
            self._at_peers(message)
        elif send.peer == c.DIRECTORY:
            self.cluster.at_directory(self, message)
        elif send.peer in self.keeps:
            self._kept(*self.keeps.pop(send.peer), message)
        elif send.peer.startswith(c.PEER):
            self.replies.append(message)
        else:
            super()._arrive(send)

    def question(self, message: Message) -> Any:
        """Another node asks; answers its reply, or None when there is none yet."""
        before = len(self.replies)
        self.tell(Received(f"{c.PEER}{self._next()}", message))
        return self.replies[before] if len(self.replies) > before else None

    # --- reads from peers -------------------------------------------------------------------------------

    def _at_peers(self, message: Message) -> None:
        if isinstance(message, c.AskHolder):
            answer = self._ask_holder(message)
            self.tell(Received(c.PEERS, msgspec.structs.replace(answer, job=message.job)))
        elif isinstance(message, c.PeerRead):
            self.pulls.append(message)
        elif isinstance(message, c.AskKeep):
            other = self.cluster.reach(self.name, message.node)
            if other is None:
                self.tell(Received(c.PEERS, c.Kept(job=message.job, reason="peer_lost")))
            else:
                peer = f"{c.PEER}{other._next()}"
                other.keeps[peer] = (self.name, message.job)
                other.tell(Received(peer, message.keep))

    def _kept(self, asker: str, job: str, message: Message) -> None:
        """The answer travels back, if there is still a way."""
        rig = self.cluster.reach(self.name, asker)
        if rig is not None and isinstance(message, c.Kept):
            rig.tell(Received(c.PEERS, msgspec.structs.replace(message, job=job)))
        elif rig is not None:
            rig.tell(Received(c.PEERS, c.Kept(job=job, reason="refused")))

    def _ask_holder(self, message: c.AskHolder) -> c.TheseAre:
        other = self.cluster.reach(self.name, message.node)
        found = other.question(c.WhatIs(keys=message.keys, shard=message.shard)) if other else None
        return found if isinstance(found, c.TheseAre) else c.TheseAre()

    def finish_pull(self, pull: c.PeerRead, failure: str = "", *, flip: bool = False) -> None:
        """A read ends: with what the peer has, or all of it with `failure`; flip: a bit of each object."""
        self.pulls.remove(pull)
        failed = []
        for index, (key, item) in enumerate(zip(pull.object_keys, pull.slots, strict=True)):
            why = failure or self._pull(pull.node, key, item, flip=flip)
            if why:
                failed.append((index, why))
        nbytes = sum(item.nbytes for item in pull.slots)
        done = c.PeerReadDone(job=pull.job, failed=tuple(failed), bytes=nbytes, seconds=0.001)
        self.tell(Received(c.PEERS, done))

    def _pull(self, node: str, key: tuple[bytes, int, str], item: WireItem, *, flip: bool) -> str:
        other = self.cluster.reach(self.name, node)
        if other is None:
            return "peer_lost"
        lent = other.question(c.Lend(block_key=key[0], group=key[1], shard=key[2]))
        if lent is None:
            other.run_disk()
            other.tick()
            other.run_disk()
            lent = other.replies[-1]
        if not isinstance(lent, c.Lent) or lent.item is None:
            return getattr(lent, "reason", "missing")
        content = other.memory.read(lent.item)
        self.memory.write(item, flipped(content) if flip else content)
        other.tell(Received(f"{c.PEER}0", c.GaveBack(loan=lent.loan)))
        # As a client does: what arrives is held to the sum that was asked for.
        return "corrupt" if flip or lent.item.checksum != item.checksum else ""

    def run(self) -> None:
        """All copies, disk jobs and reads from peers, until none is left; also of who keeps copies of it."""
        super().run()
        while busy := [rig for rig in self.cluster.rigs.values() if rig.pulls or rig.recording()]:
            for rig in busy:
                if rig.pulls:
                    rig.finish_pull(rig.pulls[0])
                else:
                    rig.run_disk()
            super().run()

    def recording(self) -> bool:
        """Whether it keeps something for another node, which waits for its disk."""
        return bool(self.keeps) and any(not op.executor.stopped for op in self.disk_ops())

    def prove(self, stone: c.Stone) -> None:
        """The core has carried it out: it is noted, with its nodes, and the directory hears of it."""
        known = next((one for one in self.graves if one.id == stone.id), None)
        if known is None:
            self.graves.append(stone)
        if all(one.id != stone.id for one in self.proven):
            self.proven.append(known or stone)
        self.announcer.tombstone(saying.tombstone(known or stone))

    # --- the directory ----------------------------------------------------------------------------------

    def announce(self) -> None:
        """Time passes, and everything that changed is announced; forgets what it is told to."""
        self.tick()
        while not self.cluster.is_cut(self.name):
            sender = self.announcer.senders[0]
            if sender.wants_snapshot:
                self.announcer.begin()
                for part in self.core.cluster.announcing.everything():
                    saying.say_part(self.announcer, part)
                self.announcer.end([saying.tombstone(stone) for stone in self.proven])
            message = sender.next()
            if message is None:
                return
            answer = self.cluster.shard.apply(message, self.now_s)
            sender.answered(answer)
            for stone in answer.forget:
                self.tell(Received(c.DIRECTORY, c.Erase(stone=saying.stone(stone))))
                self.run()


class RigCluster:
    """See the module's text. cut: nodes that nobody reaches. rigs, loads: by name."""

    def __init__(self, *names: str, **how: Any) -> None:
        self.shard = Shard()
        self.cut: set[str] = set()
        self.loads: dict[str, c.Load] = {}
        self.rigs: dict[str, NodeRig] = {}
        for epoch, name in enumerate(names, 1):
            NodeRig(self, name, epoch=epoch, **how)

    def is_cut(self, name: str) -> bool:
        """Whether the node is away."""
        return name in self.cut or name not in self.rigs

    def reach(self, one: str, other: str) -> NodeRig | None:
        """The other node, as this one reaches it."""
        return None if self.is_cut(one) or self.is_cut(other) else self.rigs[other]

    def announce(self) -> None:
        """Every node says what changed."""
        for rig in list(self.rigs.values()):
            rig.announce()

    def lose(self, name: str) -> DiskStore | None:
        """A node is gone, and the directory has noticed; answers what its drive holds."""
        rig = self.rigs.pop(name)
        self.shard.lost(name, rig.core.state.epoch)
        self.loads.pop(name, None)
        for asker, job in rig.keeps.values():
            if asker in self.rigs:
                self.rigs[asker].tell(Received(c.PEERS, c.Kept(job=job, reason="peer_lost")))
        return rig.store

    def at_directory(self, rig: NodeRig, message: Message) -> None:
        """What a core sends to the directory."""
        if isinstance(message, c.Holdings):
            saying.say(rig.announcer, message)
            if message.load is not None:
                self.loads[rig.name] = message.load
        elif isinstance(message, c.Erased):
            if message.ok:
                rig.prove(message.stone)
        elif isinstance(message, c.Bury):
            self._bury(rig, message)
        elif not self.is_cut(rig.name):
            answer = self._answer(rig, message)
            if answer is not None:
                rig.tell(Received(c.DIRECTORY, answer))

    def _answer(self, rig: NodeRig, message: Message) -> Message | None:
        if isinstance(message, c.FindBranches):
            found = self.shard.conversation(message.tenant, message.conversation, message.after)
            ends = saying.branch_ends([] if found is None else [found])
            return c.Branches(job=message.job, ends=ends)
        if isinstance(message, c.FindNodes):
            there = [
                c.NodeThere(name, other.core.state.epoch, self.loads[name])
                for name, other in self.rigs.items()
                if name in self.loads and name != rig.name and not self.is_cut(name)
            ]
            return c.NodesThere(job=message.job, nodes=tuple(there))
        if isinstance(message, c.FindConversations):
            known = tuple(map(saying.known, self._known(message)))
            return c.Known(job=message.job, conversations=known, loads=self._loads_but(rig))
        if isinstance(message, c.FindHolders):
            answers = {
                index: [
                    (q, self.shard.find(message.tenant, q.keys)) for q in questions(saying.refs_of(chain), 1)
                ]
                for index, chain in enumerate(message.chains)
            }
            fronts = saying.reaches(message, answers, rig.name)
            return c.Holders(job=message.job, fronts=tuple(fronts), loads=self._loads_but(rig))
        return None

    def _loads_but(self, rig: NodeRig) -> dict[str, c.Load]:
        return {name: load for name, load in self.loads.items() if name != rig.name}

    def _known(self, message: c.FindConversations) -> list[Conversation]:
        if not message.conversation:
            return self.shard.conversations_after(message.tenant, message.after, message.limit)
        found = self.shard.conversation(message.tenant, message.conversation)
        return [] if found is None else [found]

    def _bury(self, rig: NodeRig, message: c.Bury) -> None:
        names = tuple(sorted({*self.rigs, *self.cut}))
        stone = msgspec.structs.replace(message.stone, nodes=names)
        rig.graves.append(stone)
        done, absent = [], []
        for name in names:
            other = self.reach(rig.name, name) if name != rig.name else None
            if other is not None:
                other.question(c.Erase(stone=stone))
                other.run()
                other.prove(stone)
                done.append(name)
            elif name != rig.name:
                absent.append(name)
        buried = c.Buried(job=message.job, done=tuple(done), absent=tuple(absent))
        rig.tell(Received(c.DIRECTORY, buried))


def pair(**how: Any) -> tuple[NodeRig, NodeRig]:
    """Two nodes, 'a' and 'b', of one cluster."""
    cluster = RigCluster("a", "b", **how)
    return cluster.rigs["a"], cluster.rigs["b"]


def park_at(
    rig: NodeRig, count: int = 10, name: str = "chat", geometry: Geometry = PLAIN, **how: Any
) -> RigPark:
    """Park a conversation of tokens 0 to count - 1, to its end, and have all nodes announce."""
    parked = rig.park(rig.attach(geometry), name, range(count), **how)
    rig.run()
    rig.cluster.announce()
    return parked


def begun(rig: NodeRig, count: int = 10, **how: Any) -> RigRestore:
    """A restore of 'chat' whose reads from a peer wait in `rig.pulls`."""
    worker = rig.attach()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(count)), range(count), **how)
    assert rig.pulls, "nothing is read from a peer"
    return restore


def objects_of(rig: NodeRig, name: str) -> list[Stored]:
    """What the node has of a conversation."""
    blocks = [block for block in rig.core.state.tree if ("acme", name) in block.names]
    return [stored for block in blocks for stored in block.parts.values()]


def end_well(*rigs: NodeRig) -> None:
    """Let everything end, and see that nothing is wrong."""
    for rig in rigs:
        drain(rig)
        assert problems(rig) == []

"""Copies at other nodes: who is asked to keep a conversation, and what has come of it.

The node that has it asks as many others as are wanted, in failure domains of their own, to read it; a copy
counts when its node has said that all of it is there.  Which nodes: by a hash of the conversation's name,
weighted with their room, so that the next turn's copy goes where the front is already, and no node gets
what all others have at once.  One that fails is followed by the next; one that is busy is asked again.
Where several are to have it, the directory is asked at the end which of them have restarted since they
answered: what was in their memory is gone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from kvtier.messages.cluster import (
    DIRECTORY,
    MOST_METAS,
    PEERS,
    AskKeep,
    FindNodes,
    Keep,
    Kept,
    NodesThere,
    NodeThere,
    Stone,
)
from kvtier.node import wire
from kvtier.node.blocks import ConversationId, Stored
from kvtier.node.conversations import Head
from kvtier.node.limits import MOST_WAITING
from kvtier.node.state import NodeState, room_bytes
from kvtier.objects import ObjectMeta

# One node may take this share of the time that is left, so that another can be tried; but not less than
# the least, unless there is less.
_SHARE, _LEAST_S = 0.5, 2.0
_AGAIN_S = 0.5
# The directory is waited for so long before it is told who has it.
_PROVE_S = 0.5
# A node that has so much to read from others is asked after the rest.
_QUEUE_S = 1.0


@dataclass(frozen=True, slots=True)
class Copied:
    """How it ended. copies: tier ('host' or 'disk') by node.  why: what kept others from it, in words.

    late: whether the time was over.  bytes: that other nodes read for it.
    """

    copies: dict[str, str]
    why: str = ""
    late: bool = False
    bytes: int = 0


TellCopied: TypeAlias = Callable[[Copied], None]


@dataclass(slots=True, eq=False)
class Wish:
    """One conversation that `others` more nodes are to have. asked: nodes by the job of their question.

    holders: those of copies, as they were when they answered.  why, late: of the end that is under way: until
    prove_s the directory may say which of them have restarted since.
    """

    job: str
    keep: Keep
    nbytes: int
    others: int
    until_s: float
    tell: TellCopied
    apart: bool
    spare: bool
    candidates: list[NodeThere] = field(default_factory=list)
    busy: list[NodeThere] = field(default_factory=list)
    asked: dict[str, NodeThere] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    holders: dict[str, NodeThere] = field(default_factory=dict)
    why: str = ""
    late: bool = False
    prove_s: float = math.inf
    domains: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    again_s: float = math.inf
    bytes: int = 0


class Replicas:
    """See the module's text: the wishes that are under way at the node that has the conversations."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._wishes: dict[str, Wish] = {}
        self._asked: dict[str, Wish] = {}

    def start(
        self,
        keep: Keep,
        others: int,
        until_s: float,
        tell: TellCopied,
        *,
        apart: bool = True,
        spare: bool = False,
    ) -> str:
        """Have `others` more nodes keep it; `tell` is told once, until_s at the latest. See `end`.

        apart: in failure domains of their own, also from this node.  spare: only where nothing goes for it.
        """
        nbytes = sum(meta.nbytes for meta in keep.metas)
        wish = Wish(self._state.next_id("k"), keep, nbytes, others, until_s, tell, apart, spare)
        self._wishes[wish.job] = wish
        if not self._state.settings.ask_elsewhere_s:
            self._over(wish, "this node is alone")
        elif len(keep.metas) > MOST_METAS:
            self._over(wish, f"{len(keep.metas)} objects are too many for one question")
        elif len(self._wishes) > MOST_WAITING:
            self._over(wish, f"{MOST_WAITING} conversations are being copied already")
        else:
            self._state.send(DIRECTORY, FindNodes(job=wish.job))
        return wish.job

    def end(self, job: str) -> None:
        """Nobody waits for it any more; what has been kept by now stays where it is."""
        wish = self._wishes.pop(job, None)
        for asked in wish.asked if wish is not None else ():
            self._asked.pop(asked, None)

    def tick(self) -> None:
        """Nodes that were busy are asked again; what takes too long is over."""
        now_s = self._state.now_s
        for wish in list(self._wishes.values()):
            if wish.prove_s <= now_s:
                self._end(wish)
            elif wish.until_s <= now_s and not wish.late:
                self._over(wish, late=True)
            elif wish.again_s <= now_s:
                wish.candidates.extend(wish.busy)
                wish.busy, wish.again_s = [], math.inf
                self._go_on(wish)

    # --- answers ----------------------------------------------------------------------------------------

    def on_nodes(self, peer: str, message: NodesThere) -> None:
        """Which nodes are there: at the beginning, and before it is said who has it."""
        wish = self._wishes.get(message.job)
        if wish is None:
            return
        if wish.prove_s < math.inf:
            self._proven(wish, message.nodes)
        else:
            wish.candidates = self._ranked(wish, message.nodes)
            self._go_on(wish)

    def on_kept(self, peer: str, message: Kept) -> None:
        """What one node says that was asked."""
        wish = self._asked.pop(message.job, None)
        if wish is None:
            return
        node = wish.asked.pop(message.job)
        wish.bytes += min(max(message.bytes, 0), wish.nbytes)
        if message.tier in ("host", "disk"):
            wish.copies[node.node] = message.tier
            wish.holders[node.node] = msgspec.structs.replace(node, epoch=message.epoch)
            wish.failures.pop(node.node, None)
        else:
            wish.domains.discard(_domain_of(node))
            wish.failures[node.node] = message.reason
            if message.reason == "busy":
                wish.busy.append(node)
        self._go_on(wish)

    def _go_on(self, wish: Wish) -> None:
        if wish.late:
            return
        while len(wish.copies) + len(wish.asked) < wish.others:
            node = next((n for n in wish.candidates if _domain_of(n) not in wish.domains), None)
            if node is None:
                break
            wish.candidates.remove(node)
            self._ask(wish, node)
        if len(wish.copies) >= wish.others:
            self._over(wish)
        elif not wish.asked:
            if wish.busy:
                wish.again_s = self._state.now_s + _AGAIN_S
            else:
                self._over(wish, "there is no other node with room, in a failure domain of its own")

    def _over(self, wish: Wish, why: str = "", *, late: bool = False) -> None:
        """Nobody else is asked: it is told, once it is known who still has it."""
        wish.why, wish.late = why, late
        if wish.others == 1 or not wish.copies:
            # The only one has answered just now.
            self._end(wish)
        elif wish.prove_s == math.inf:
            wish.prove_s = self._state.now_s + _PROVE_S
            self._state.send(DIRECTORY, FindNodes(job=wish.job))

    def _proven(self, wish: Wish, nodes: Iterable[NodeThere]) -> None:
        wish.prove_s = math.inf
        lost = False
        for node in nodes:
            answered = wish.holders.get(node.node)
            if answered is None or not 0 < answered.epoch < node.epoch:
                continue
            if wish.copies.get(node.node) == "host":
                del wish.copies[node.node]
                wish.domains.discard(_domain_of(answered))
                wish.failures[node.node] = "peer_lost"
                wish.candidates.append(node)
                lost = True
        if lost and not wish.late:
            self._go_on(wish)
        else:
            self._end(wish)

    def _ask(self, wish: Wish, node: NodeThere) -> None:
        wish.domains.add(_domain_of(node))
        state = self._state
        left_s = wish.until_s - state.now_s
        timeout_s = min(left_s, max(_LEAST_S, left_s * _SHARE))
        job = state.next_id("k")
        wish.asked[job] = node
        self._asked[job] = wish
        keep = msgspec.structs.replace(wish.keep, timeout_s=timeout_s)
        state.send(PEERS, AskKeep(job=job, node=node.node, epoch=node.epoch, keep=keep))

    def _ranked(self, wish: Wish, nodes: Iterable[NodeThere]) -> list[NodeThere]:
        """Those that could take it, the one to ask first first."""
        settings = self._state.settings
        if wish.apart:
            wish.domains.add(_domain(settings.failure_domain, settings.node))
        able = [
            node
            for node in nodes
            if node.node != settings.node
            and node.load.accepts
            and node.load.room_bytes >= wish.nbytes
            and (not wish.spare or node.load.takes_bytes >= wish.nbytes)
        ]
        name = (wish.keep.tenant, wish.keep.conversation)
        return sorted(able, key=lambda n: (n.load.peer.start_s > _QUEUE_S, -_weight(name, n), n.node))

    def _end(self, wish: Wish) -> None:
        self.end(wish.job)
        failed = [f"{node}: {reason}" for node, reason in sorted(wish.failures.items())]
        short = len(wish.copies) < wish.others
        why = "; ".join([*filter(None, [wish.why]), *failed]) if short else ""
        wish.tell(Copied(wish.copies, why, wish.late, wish.bytes))


def keep_of(
    state: NodeState, name: ConversationId, head: Head, objects: Iterable[Stored], replaces: Iterable[bytes]
) -> Keep:
    """What another node has to know to keep a branch. objects: all that it needs, in token order."""
    known = state.conversations.get(name)
    metas = [meta for meta in (meta_there(state, stored) for stored in objects) if meta is not None]
    roots, packed = wire.pack_metas(metas)
    models = {root.fingerprint for root in roots}
    stones: tuple[Stone, ...] = tuple(state.stones.get(name, {}).values())
    after = (*(known.after if known is not None else ()), *(stone.id for stone in stones))
    return Keep(
        owner=state.settings.node,
        epoch=state.epoch,
        tenant=name[0],
        conversation=name[1],
        tokens=head.tokens,
        roots=roots,
        metas=packed,
        timeout_s=0.0,
        private=head.private,
        parked_at_s=head.parked_at_s,
        replaces=tuple(sorted(replaces)),
        after=tuple(dict.fromkeys(after)),
        stones=stones,
        models=tuple((m, state.models.get(m, ""), state.item_bytes.get(m, 0)) for m in sorted(models)),
        returns_at_s=known.returns_at_s if known is not None else None,
        keep_until_s=known.keep_until_s if known is not None else None,
        codec=known.codec if known is not None else "",
    )


def meta_there(state: NodeState, stored: Stored) -> ObjectMeta | None:
    """The object as the best tier of this node has it."""
    source = state.source_of(stored)
    return stored.meta if source == "host" else stored.on_disk if source == "disk" else None


def wanted_bytes(metas: Iterable[ObjectMeta]) -> int:
    """Room that objects take in host memory."""
    return sum(map(room_bytes, metas))


def _domain(domain: str, node: str) -> str:
    """A node that names none fails alone."""
    return f"domain {domain}" if domain else f"node {node}"


def _domain_of(node: NodeThere) -> str:
    return _domain(node.load.domain, node.node)


def _weight(name: ConversationId, node: NodeThere) -> float:
    """Highest random weight: the greatest is asked first, in proportion to room.

    Room counts by powers of two, so that a small change of it moves nothing.
    """
    text = "\0".join((*name, node.node)).encode()
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    share = 1 << max(node.load.room_bytes, 1).bit_length()
    return share / -math.log((drawn + 1) / (2**64 + 2))

"""What other nodes hold of a conversation that a plan is to bring back.

A plan whose tokens are not all here asks the directory where branches of the conversation end, then how far
which node could restore its tokens, then the best of these nodes what exactly it has.  Tokens decide, not
versions: the chain that reaches furthest wins, whoever parked it.  Each answer is bounded by the plan's own
deadline; a plan that has waited long enough goes on with what is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

from kvtier import keys
from kvtier.cluster_messages import (
    DIRECTORY,
    MOST_KEYS,
    PEERS,
    AskHolder,
    BranchEnd,
    Branches,
    Chain,
    FindBranches,
    FindHolders,
    Holders,
    Reach,
    TheseAre,
)
from kvtier.keys import BlockRef
from kvtier.messages import MakePlan
from kvtier.node import wire
from kvtier.node.blocks import Block, Private, Stored
from kvtier.node.coverage import Piece, Source, longest, restored_end
from kvtier.node.loads import Loads
from kvtier.node.lookup import Query, wanted_end
from kvtier.node.state import NodeState, Worker
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta, Root

# Told what each node could restore.
TellFronts: TypeAlias = Callable[[Sequence[Reach]], None]
# Chains of one question: the ways in which branches were keyed, and branches that end in a tail.
_CHAINS_MOST = 8


@dataclass(frozen=True, slots=True)
class Remote:
    """A chain of which another node has objects. metas: by object, as that node has them.

    after: the conversation's tombstones that were known when it was asked.
    """

    node: str
    epoch: int
    private: Private | None
    refs: tuple[BlockRef, ...]
    metas: dict[ObjectId, ObjectMeta]
    after: tuple[str, ...]

    def by_block(self) -> dict[bytes, list[ObjectMeta]]:
        """The same by block."""
        found: dict[bytes, list[ObjectMeta]] = {}
        for object_id, meta in self.metas.items():
            found.setdefault(object_id.block_key, []).append(meta)
        return found


@dataclass(slots=True, eq=False)
class Lookup:
    """One question about the cluster. over: there will be no better answer.  tokens: what is here reaches.

    tell: who only wants to know who reaches how far, until until_s.
    """

    job: str
    message: MakePlan
    worker: Worker
    query: Query
    root: Root
    tokens: int
    after: tuple[str, ...]
    chains: list[tuple[Private | None, list[BlockRef]]] = field(default_factory=list)
    candidates: deque[Reach] = field(default_factory=deque)
    asked: Reach | None = None
    remote: Remote | None = None
    over: bool = False
    tell: TellFronts | None = None
    until_s: float = inf


class Elsewhere:
    """The lookups that run."""

    def __init__(self, state: NodeState, loads: Loads) -> None:
        self._state = state
        self._loads = loads
        self._lookups: dict[str, Lookup] = {}

    def begin(self, message: MakePlan, worker: Worker, query: Query, tokens: int) -> Lookup | None:
        """Ask the cluster for more than the first `tokens`, if it may have some that are worth the wait."""
        state = self._state
        rest = wanted_end(message, query) - tokens
        # Less than a block: what another node could add is a tail at most.
        small = bool(tokens) and rest < worker.geometry.block_tokens
        if not state.settings.ask_elsewhere_s or not message.conversation or rest <= 0 or small:
            return None
        return self._begin(message, worker, query, tokens)

    def fronts(self, message: MakePlan, worker: Worker, query: Query, tell: TellFronts) -> None:
        """Tell how far each other node reaches; nothing where there are none, or none answers in time."""
        ask_s = self._state.settings.ask_elsewhere_s
        if not ask_s:
            tell(())
            return
        lookup = self._begin(message, worker, query, 0)
        lookup.tell, lookup.until_s = tell, self._state.now_s + ask_s

    def tick(self) -> None:
        """Who only wants to know is told that nobody answered."""
        for lookup in [one for one in self._lookups.values() if one.until_s <= self._state.now_s]:
            self._told(lookup, ())

    def _told(self, lookup: Lookup, fronts: Sequence[Reach]) -> None:
        self.end(lookup)
        if lookup.tell is not None:
            lookup.tell(fronts)

    def _begin(self, message: MakePlan, worker: Worker, query: Query, tokens: int) -> Lookup:
        state = self._state
        root = state.root(message.tenant, worker.fingerprint, message.fidelity, worker.geometry.block_tokens)
        after = state.stones_of((message.tenant, message.conversation))
        lookup = Lookup(state.next_id("e"), message, worker, query, root, tokens, after)
        self._lookups[lookup.job] = lookup
        question = FindBranches(job=lookup.job, tenant=message.tenant, conversation=message.conversation)
        state.send(DIRECTORY, question)
        return lookup

    def end(self, lookup: Lookup) -> None:
        """Nobody waits for it any more."""
        lookup.over = True
        self._lookups.pop(lookup.job, None)

    # --- answers ----------------------------------------------------------------------------------------

    def on_branches(self, peer: str, message: Branches) -> None:
        """Where the conversation's branches end: these, and the plain chain of the tokens, are looked for."""
        lookup = self._lookups.get(message.job)
        if lookup is None:
            return
        # Of a name that was forgotten others may hold blocks, not having heard of it yet: only ends count.
        lookup.chains = [] if lookup.after and not message.ends else self._chains(lookup, message.ends)
        if not lookup.chains:
            self._told(lookup, ())
            return
        self._state.send(
            DIRECTORY,
            FindHolders(
                job=lookup.job,
                tenant=lookup.message.tenant,
                chains=[_chain(refs) for _, refs in lookup.chains],
                geometry=lookup.worker.geometry.at(lookup.message.fidelity),
                shard=lookup.worker.shard,
            ),
        )

    def on_holders(self, peer: str, message: Holders) -> None:
        """How far which node reaches: the furthest is asked first."""
        self._loads.heard(message.loads)
        lookup = self._lookups.get(message.job)
        if lookup is None:
            return
        if lookup.tell is not None:
            self._told(lookup, message.fronts)
            return
        useful = [f for f in message.fronts if f.tokens > lookup.tokens and 0 <= f.chain < len(lookup.chains)]
        lookup.candidates = deque(sorted(useful, key=lambda front: -front.tokens))
        self._ask_next(lookup)

    def on_these_are(self, peer: str, message: TheseAre) -> None:
        """What a node has; one that has nothing, or is not there, is followed by the next."""
        lookup = self._lookups.get(message.job)
        if lookup is None or lookup.asked is None:
            return
        node, epoch = lookup.asked.node, lookup.asked.epoch
        private, refs = lookup.chains[lookup.asked.chain]
        metas = _trusted(lookup, refs, wire.unpack_metas(message.roots, message.metas))
        if not metas:
            self._ask_next(lookup)
            return
        lookup.remote = Remote(node, epoch, private, tuple(refs), metas, lookup.after)
        self.end(lookup)

    def _ask_next(self, lookup: Lookup) -> None:
        if not lookup.candidates:
            self.end(lookup)
            return
        lookup.asked = lookup.candidates.popleft()
        chain, node, epoch, tokens = lookup.asked[:4]
        refs = [ref for ref in lookup.chains[chain][1] if ref.start + ref.tokens <= tokens]
        packed = b"".join(ref.key for ref in refs)
        shard = lookup.worker.shard
        self._state.send(PEERS, AskHolder(job=lookup.job, node=node, epoch=epoch, keys=packed, shard=shard))

    # --- chains -----------------------------------------------------------------------------------------

    def _chains(
        self, lookup: Lookup, ends: Iterable[BranchEnd]
    ) -> list[tuple[Private | None, list[BlockRef]]]:
        """The tokens' full blocks in each way in which they may be keyed, and branches that end in a tail."""
        size = lookup.worker.geometry.block_tokens
        known = self._state.conversations.get((lookup.message.tenant, lookup.message.conversation))
        ends = list(ends)
        privates = [end.private for end in ends] + (known.privates() if known else []) + [None]
        found: list[tuple[Private | None, list[BlockRef]]] = []
        for private in dict.fromkeys(privates):
            found.append((private, self._refs(lookup, private, lookup.query.end // size * size)))
        for end in ends:
            if end.tokens % size and lookup.tokens < end.tokens <= lookup.query.end:
                refs = self._refs(lookup, end.private, end.tokens)
                if refs and refs[-1].key.startswith(end.hint):
                    found.insert(0, (end.private, refs))
        return [(private, refs) for private, refs in found if refs][:_CHAINS_MOST]

    def _refs(self, lookup: Lookup, private: Private | None, tokens: int) -> list[BlockRef]:
        """The blocks of the first `tokens` tokens; none where the query begins behind them."""
        query = lookup.query
        wanted = tokens - query.after_tokens
        if wanted < 0:
            return []
        before = self._state.tree.chain(query.after_key) if query.after_key else []
        if query.after_key and not before:
            return []
        after = keys.chain(
            lookup.root,
            query.tokens[: wanted * keys.TOKEN_BYTES],
            tuple(extra for extra in query.extras if extra[0] < tokens),
            parent=query.after_key or None,
            first_position=query.after_tokens,
            private=private,
        )
        return [*(BlockRef(b.key, b.parent, b.start, b.tokens) for b in before), *after][:MOST_KEYS]

    # --- using it ---------------------------------------------------------------------------------------

    def merged(self, lookup: Lookup) -> tuple[Remote, list[Block], list[Piece]] | None:
        """What is here and what the other node has, as one chain; None when nobody has anything."""
        remote = lookup.remote
        if remote is None:
            return None
        there = remote.by_block()
        blocks = [self._block(lookup.root, ref, there.get(ref.key, [])) for ref in remote.refs]
        worker, query = lookup.worker, lookup.query
        geometry = worker.geometry.at(lookup.message.fidelity)
        at_most = wanted_end(lookup.message, query)
        pieces = longest(blocks, geometry, worker.shard, self.source_in(remote), at_most)
        return (remote, blocks, pieces) if restored_end(pieces) > lookup.tokens else None

    def source_in(self, remote: Remote) -> _SourceOf:
        """Where an object is, if the other node counts too."""
        return _SourceOf(self._state, remote)

    def _block(self, root: Root, ref: BlockRef, there: Iterable[ObjectMeta]) -> Block:
        """A block as it would be with all that the other node has of it; no part of the tree."""
        block = Block(ref.key, ref.parent, root, ref.start, ref.tokens)
        here = self._state.tree.get(ref.key)
        for part, stored in here.parts.items() if here is not None else ():
            if self._state.source_of(stored) is not None:
                block.parts[part] = stored
        for meta in there:
            block.parts.setdefault((meta.object_id.group, meta.object_id.shard), Stored(meta))
        return block


class _SourceOf:
    """See `Elsewhere.source_in`."""

    def __init__(self, state: NodeState, remote: Remote) -> None:
        self._state = state
        self._remote = remote

    def __call__(self, stored: Stored) -> Source | None:
        there: Source | None = "peer" if stored.meta.object_id in self._remote.metas else None
        return self._state.source_of(stored) or there


def _chain(refs: Sequence[BlockRef]) -> Chain:
    return Chain(b"".join(ref.key for ref in refs), [ref.start + ref.tokens for ref in refs])


def _trusted(
    lookup: Lookup, refs: Sequence[BlockRef], metas: Iterable[ObjectMeta]
) -> dict[ObjectId, ObjectMeta]:
    """Of what a node says it has, that which is of these blocks and has a checksum to be held to."""
    of_key = {ref.key: ref for ref in refs}
    found: dict[ObjectId, ObjectMeta] = {}
    for meta in metas:
        ref = of_key.get(meta.object_id.block_key)
        if (
            ref is not None
            and len(meta.object_id.block_key) == KEY_BYTES
            and (meta.parent_key, meta.start, meta.tokens) == (ref.parent, ref.start, ref.tokens)
            and meta.root == lookup.root
            and meta.object_id.shard == lookup.worker.shard
            and meta.checksum is not None
            and 0 <= meta.first_valid < meta.tokens
        ):
            found[meta.object_id] = meta
    return found

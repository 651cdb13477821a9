"""What other nodes hold of a conversation that a plan is to bring back.

A plan whose tokens are not all here asks the directory where branches of the conversation end, then how far
which node could restore its tokens, then the best of these nodes what exactly it has.  Tokens decide, not
versions: the chain that reaches furthest wins, whoever parked it.  Each answer is bounded by the plan's own
deadline; a plan that has waited long enough goes on with what is here.

For ranks with several slices a chain reaches as far as all of them do: each slice is looked for by itself,
and what is not here of it may be at a node of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf
from typing import TypeAlias

from kvtier import keys
from kvtier.errors import MalformedMessage
from kvtier.geometry import Geometry
from kvtier.keys import BlockRef
from kvtier.messages.calls import MakePlan
from kvtier.messages.cluster import (
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
from kvtier.node import wire
from kvtier.node.blocks import Block, Private, Stored, is_private
from kvtier.node.coverage import Piece, Source, longest, restored_end
from kvtier.node.loads import Loads
from kvtier.node.lookup import Query, wanted_end
from kvtier.node.ranks import covered, shortest
from kvtier.node.state import NodeState, Worker
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta, Root

# Told what each node could restore.
TellFronts: TypeAlias = Callable[[Sequence[Reach]], None]
# Chains of one question: the ways in which branches were keyed, and branches that end in a tail.
_CHAINS_MOST = 8
# Ends of branches that are looked at, the last parked first, and bytes that a node may have of a chain.
_ENDS_MOST, _BYTES_MOST = 256, 1 << 60


@dataclass(frozen=True, slots=True)
class Remote:
    """What another node has of one slice of a chain. metas: by object, as that node has them.

    after: the conversation's tombstones that were known when it was asked.
    """

    node: str
    epoch: int
    private: Private | None
    metas: dict[ObjectId, ObjectMeta]
    after: tuple[str, ...]


# By shard; of those slices of which another node has more than this one.
Remotes: TypeAlias = Mapping[str, Remote]


@dataclass(slots=True)
class _Sought:
    """One slice of a chain. tokens: how far it is had, here or by `remote`; rest: who reaches how far."""

    tokens: int
    rest: deque[Reach]
    remote: Remote | None = None

    @property
    def reach(self) -> int:
        """How far it may come yet."""
        return max(self.tokens, self.rest[0].tokens if self.rest else 0)


@dataclass(slots=True, eq=False)
class Lookup:
    """One question about the cluster. over: there will be no better answer.  tokens: what is here reaches.

    after: the conversation's tombstones; unheard: those of them that some node may not have heard of.
    slices: of which all have to be had.  sought: of each chain, by shard.  asked: what nodes are asked now,
    by the question's job; of the first `upto` tokens.  chosen: the chain that all of it is had of, and how
    far.  tell: who only wants to know who reaches how far, until until_s.
    """

    job: str
    message: MakePlan
    worker: Worker
    query: Query
    slices: Mapping[str, Geometry]
    root: Root
    tokens: int
    after: tuple[str, ...]
    unheard: tuple[str, ...]
    chains: list[tuple[Private | None, list[BlockRef]]] = field(default_factory=list)
    sought: list[dict[str, _Sought]] = field(default_factory=list)
    asked: dict[str, tuple[str, Reach]] = field(default_factory=dict)
    upto: int = 0
    chosen: tuple[int, int] | None = None
    over: bool = False
    tell: TellFronts | None = None
    until_s: float = inf


class Elsewhere:
    """The lookups that run."""

    def __init__(self, state: NodeState, loads: Loads) -> None:
        self._state = state
        self._loads = loads
        self._lookups: dict[str, Lookup] = {}
        # By the job of each question to a node.
        self._asking: dict[str, Lookup] = {}

    def begin(
        self, message: MakePlan, worker: Worker, query: Query, slices: Mapping[str, Geometry], tokens: int
    ) -> Lookup | None:
        """Ask the cluster for more than the first `tokens`, if it may have some that are worth the wait."""
        state = self._state
        rest = wanted_end(message, query) - tokens
        # Less than a block: what another node could add is a tail at most.
        small = bool(tokens) and rest < worker.geometry.block_tokens
        if not state.settings.ask_elsewhere_s or not message.conversation or rest <= 0 or small:
            return None
        return self._begin(message, worker, query, slices, tokens)

    def fronts(
        self,
        message: MakePlan,
        worker: Worker,
        query: Query,
        slices: Mapping[str, Geometry],
        tell: TellFronts,
    ) -> None:
        """Tell how far each other node reaches; nothing where there are none, or none answers in time."""
        ask_s = self._state.settings.ask_elsewhere_s
        if not ask_s:
            tell(())
            return
        lookup = self._begin(message, worker, query, slices, 0)
        lookup.tell, lookup.until_s = tell, self._state.now_s + ask_s

    def tick(self) -> None:
        """Who only wants to know is told that nobody answered."""
        for lookup in [one for one in self._lookups.values() if one.until_s <= self._state.now_s]:
            self._told(lookup, ())

    def _told(self, lookup: Lookup, fronts: Sequence[Reach]) -> None:
        self.end(lookup)
        if lookup.tell is not None:
            lookup.tell(fronts)

    def _begin(
        self, message: MakePlan, worker: Worker, query: Query, slices: Mapping[str, Geometry], tokens: int
    ) -> Lookup:
        state = self._state
        root = state.root(message.tenant, worker.fingerprint, message.fidelity, worker.geometry.block_tokens)
        name = (message.tenant, message.conversation)
        after, unheard = state.stones_of(name), state.unheard_stones_of(name)
        lookup = Lookup(state.next_id("e"), message, worker, query, slices, root, tokens, after, unheard)
        self._lookups[lookup.job] = lookup
        question = FindBranches(job=lookup.job, tenant=name[0], conversation=name[1], after=unheard)
        state.send(DIRECTORY, question)
        return lookup

    def end(self, lookup: Lookup) -> None:
        """Nobody waits for it any more."""
        lookup.over = True
        self._lookups.pop(lookup.job, None)
        for job in lookup.asked:
            self._asking.pop(job, None)

    # --- answers ----------------------------------------------------------------------------------------

    def on_branches(self, peer: str, message: Branches) -> None:
        """Where the conversation's branches end: these, and the plain chain of the tokens, are looked for."""
        lookup = self._lookups.get(message.job)
        if lookup is None:
            return
        lookup.chains = self._chains(lookup, message.ends)
        if not lookup.chains:
            self._told(lookup, ())
            return
        self._state.send(
            DIRECTORY,
            FindHolders(
                job=lookup.job,
                tenant=lookup.message.tenant,
                chains=[_chain(refs) for _, refs in lookup.chains],
                geometry=lookup.slices[lookup.worker.shard],
                shard=lookup.worker.shard,
                others={s: geometry for s, geometry in lookup.slices.items() if s != lookup.worker.shard},
            ),
        )

    def on_holders(self, peer: str, message: Holders) -> None:
        """How far which node reaches: the furthest is asked first."""
        self._loads.heard(message.loads)
        lookup = self._lookups.get(message.job)
        if lookup is None:
            return
        known = [front for front in message.fronts if _is_sound(lookup, front)]
        if lookup.tell is not None:
            self._told(lookup, _jointly(known, len(lookup.slices)))
            return
        for chain in range(len(lookup.chains)):
            sought = {shard: _Sought(tokens, deque()) for shard, tokens in self._own(lookup, chain).items()}
            for front in sorted(known, key=lambda front: -front.tokens):
                slice_of = sought.get(front.shard or lookup.worker.shard)
                if slice_of is not None and front.chain == chain and front.tokens > slice_of.tokens:
                    slice_of.rest.append(front)
            lookup.sought.append(sought)
        self._ask_next(lookup)

    def _own(self, lookup: Lookup, chain: int) -> dict[str, int]:
        """How far each slice of a chain is here."""
        if len(lookup.slices) == 1:
            return dict.fromkeys(lookup.slices, lookup.tokens)
        blocks = self._blocks(lookup, lookup.chains[chain][1], {})
        at_most = wanted_end(lookup.message, lookup.query)
        return {shard: self._end(lookup, blocks, shard, {}, at_most) for shard in lookup.slices}

    def _end(
        self, lookup: Lookup, blocks: Sequence[Block], shard: str, remotes: Remotes, at_most: int
    ) -> int:
        """How far a slice reaches with what is here and there."""
        return restored_end(longest(blocks, lookup.slices[shard], shard, self.source_in(remotes), at_most))

    def on_these_are(self, peer: str, message: TheseAre) -> None:
        """What a node has of a slice; one that has less of it, or is not there, is followed by the next."""
        lookup = self._asking.pop(message.job, None)
        if lookup is None:
            return
        shard, reach = lookup.asked.pop(message.job)
        self._state.reached(reach.node, message.way)
        private, refs = lookup.chains[reach.chain]
        try:
            said = wire.unpack_metas(message.roots, message.metas)
        except MalformedMessage:
            said = []
        metas = _trusted(lookup, refs, shard, said)
        if metas:
            slice_of = lookup.sought[reach.chain][shard]
            remotes = {shard: Remote(reach.node, reach.epoch, private, metas, lookup.after)}
            # Not how much of it is wanted: the directory spoke of all.
            blocks = self._blocks(lookup, refs, remotes)
            tokens = self._end(lookup, blocks, shard, remotes, lookup.upto)
            if tokens >= lookup.upto:
                tokens = reach.tokens
            # Otherwise the directory has said more than is there by now.
            if tokens > slice_of.tokens:
                slice_of.remote, slice_of.tokens = remotes[shard], tokens
        if not lookup.asked:
            self._ask_next(lookup)

    def _ask_next(self, lookup: Lookup) -> None:
        """Of the chain that all slices may reach furthest in: who has the most of what is not had yet."""
        reaches = [min(one.reach for one in sought.values()) for sought in lookup.sought]
        tokens = max(reaches, default=0)
        if tokens <= lookup.tokens:
            self.end(lookup)
            return
        chain = reaches.index(tokens)
        wanted = {shard: one for shard, one in lookup.sought[chain].items() if one.tokens < tokens}
        if not wanted:
            lookup.chosen = chain, tokens
            self.end(lookup)
            return
        lookup.upto = tokens
        packed = b"".join(ref.key for ref in _refs_to(lookup, chain, tokens))
        lookup.asked = {f"{lookup.job}/{shard}": (shard, one.rest.popleft()) for shard, one in wanted.items()}
        for job, (shard, reach) in lookup.asked.items():
            self._asking[job] = lookup
            question = AskHolder(job=job, node=reach.node, epoch=reach.epoch, keys=packed, shard=shard)
            self._state.send(PEERS, question)

    # --- chains -----------------------------------------------------------------------------------------

    def _chains(
        self, lookup: Lookup, ends: Iterable[BranchEnd]
    ) -> list[tuple[Private | None, list[BlockRef]]]:
        """The tokens' full blocks in each way in which they may be keyed, and branches that end in a tail.

        Of a name that was forgotten others may hold blocks, not having heard of it yet: there all that counts
        is what lies before the end of a branch that came after.
        """
        size = lookup.worker.geometry.block_tokens
        known = self._state.conversations.get((lookup.message.tenant, lookup.message.conversation))
        ends = [end for end in ends if is_private(end.private)][:_ENDS_MOST]
        privates = [end.private for end in ends] + (known.privates() if known else []) + [None]
        found: list[tuple[Private | None, list[BlockRef]]] = []
        for private in list(dict.fromkeys(privates))[:_CHAINS_MOST] if not lookup.unheard else ():
            found.append((private, self._refs(lookup, private, lookup.query.end // size * size)))
        for end in ends:
            if (end.tokens % size or lookup.unheard) and lookup.tokens < end.tokens <= lookup.query.end:
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

    def merged(self, lookup: Lookup) -> tuple[Remotes, list[Block], list[Piece]] | None:
        """What is here and what other nodes have, as one chain; None when nobody has anything."""
        if lookup.chosen is None:
            return None
        chain, tokens = lookup.chosen
        remotes = {shard: one.remote for shard, one in lookup.sought[chain].items() if one.remote is not None}
        blocks = self._blocks(lookup, _refs_to(lookup, chain, tokens), remotes)
        at_most = wanted_end(lookup.message, lookup.query)
        pieces = covered(blocks, lookup.slices, self.source_in(remotes), at_most)
        return (remotes, blocks, pieces) if restored_end(pieces) > lookup.tokens else None

    def lacking(self, lookup: Lookup) -> list[str]:
        """Names of the slices without which the rest would reach further, here or elsewhere."""
        ends = [{shard: one.reach for shard, one in sought.items()} for sought in lookup.sought]
        return shortest(max(ends, key=lambda one: max(one.values()), default={}))

    def source_in(self, remotes: Remotes) -> _SourceOf:
        """Where an object is, if the other nodes count too."""
        return _SourceOf(self._state, remotes)

    def _blocks(self, lookup: Lookup, refs: Iterable[BlockRef], remotes: Remotes) -> list[Block]:
        """The chain with all that is here and there."""
        there: dict[bytes, list[ObjectMeta]] = {}
        for remote in remotes.values():
            for object_id, meta in remote.metas.items():
                there.setdefault(object_id.block_key, []).append(meta)
        return [self._block(lookup.root, ref, there.get(ref.key, ())) for ref in refs]

    def _block(self, root: Root, ref: BlockRef, there: Iterable[ObjectMeta]) -> Block:
        """A block as it would be with all that the other node has of it; no part of the tree."""
        block = Block(ref.key, ref.parent, root, ref.start, ref.tokens)
        here = self._state.tree.get(ref.key)
        for part, stored in here.parts.items() if here is not None and here.start == ref.start else ():
            if self._state.source_of(stored) is not None:
                block.parts[part] = stored
        for meta in there:
            block.parts.setdefault((meta.object_id.group, meta.object_id.shard), Stored(meta))
        return block


class _SourceOf:
    """See `Elsewhere.source_in`."""

    def __init__(self, state: NodeState, remotes: Remotes) -> None:
        self._state = state
        self._remotes = remotes

    def __call__(self, stored: Stored) -> Source | None:
        object_id = stored.meta.object_id
        remote = self._remotes.get(object_id.shard)
        there: Source | None = "peer" if remote is not None and object_id in remote.metas else None
        return self._state.source_of(stored) or there


def _refs_to(lookup: Lookup, chain: int, tokens: int) -> list[BlockRef]:
    """The blocks of the chain's first tokens."""
    return [ref for ref in lookup.chains[chain][1] if ref.start + ref.tokens <= tokens]


def _is_sound(lookup: Lookup, front: Reach) -> bool:
    """Whether it is of one of the chains, and within it."""
    if not 0 <= front.chain < len(lookup.chains):
        return False
    last = lookup.chains[front.chain][1][-1]
    sizes = (front.host_bytes, front.disk_bytes)
    return 0 <= front.tokens <= last.start + last.tokens and 0 <= min(sizes) <= max(sizes) < _BYTES_MOST


def _jointly(fronts: Iterable[Reach], slices: int) -> list[Reach]:
    """How far each node reaches by itself with so many slices together; one that lacks any is left out."""
    if slices == 1:
        return list(fronts)
    by_node = sorted(fronts, key=lambda front: (front.chain, front.node, front.epoch))
    found = []
    for (chain, node, epoch), group in groupby(by_node, key=lambda front: front[:3]):
        each = list(group)
        if len(each) == slices:
            host, disk = sum(one.host_bytes for one in each), sum(one.disk_bytes for one in each)
            found.append(Reach(chain, node, epoch, min(one.tokens for one in each), host, disk))
    return found


def _chain(refs: Sequence[BlockRef]) -> Chain:
    return Chain(b"".join(ref.key for ref in refs), [ref.start + ref.tokens for ref in refs])


def _trusted(
    lookup: Lookup, refs: Sequence[BlockRef], shard: str, metas: Iterable[ObjectMeta]
) -> dict[ObjectId, ObjectMeta]:
    """Of what a node says it has, that which is of this slice and has a checksum to be held to."""
    of_key = {ref.key: ref for ref in refs}
    found: dict[ObjectId, ObjectMeta] = {}
    for meta in metas:
        ref = of_key.get(meta.object_id.block_key)
        if (
            ref is not None
            and len(meta.object_id.block_key) == KEY_BYTES
            and (meta.parent_key, meta.start, meta.tokens) == (ref.parent, ref.start, ref.tokens)
            and meta.root == lookup.root
            and meta.object_id.shard == shard
            and meta.checksum is not None
            and 0 <= meta.first_valid < meta.tokens
        ):
            found[meta.object_id] = meta
    return found

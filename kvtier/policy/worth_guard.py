"""What eviction by last use would have of the same load, and whether worth has fallen behind it.

A shadow of LRU holds keys and no data: as many bytes of them as both tiers hold, each block counted once.
Work is counted in seconds of computing that the front spares which a request finds. Where worth has lost as
much against LRU as some requests of the usual size ask for, LRU leads until half of that is forgotten.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from kvtier.policy.usage import ParkedBlock
from kvtier.policy.worth_runs import Block, Book, Run
from kvtier.policy.worth_waits import Chat

# Work may be lost against LRU, and what was won is a credit, up to what so many requests ask for. Both are
# remembered over so many requests: in the long run at most 0.2 % of the work asked for is lost.
_PATIENCE: Final = 20
_MEMORY: Final = 1 - 1 / 10_000
# LRU leads until the debt is this part of that.
_LEADS_UNTIL: Final = 0.5
# So many times as many blocks as the shadow has are known of paths that were parked.
_PATHS: Final = 2
# Below this many entries nothing is swept: the saving would not pay.
_SWEEP_FROM: Final = 1024


@dataclass(slots=True, eq=False)
class _Piece:
    """Neighbours on one path, the front first, that were used last together.

    depth: of the first one, counted from the root.  shared: others go on from it.
    """

    depth: int
    shared: bool = False
    keys: deque[bytes] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Lot:
    """Blocks of one piece and one size that came in together.

    nbytes: 0 for those that are gone, while what stood on them was of use.  came: with which request.
    """

    piece: _Piece
    nbytes: int
    came: int


class LruShadow:
    """Blocks that LRU would hold. O(1) for a block that is new, and for each piece of a path that is used."""

    def __init__(self, blocks: Mapping[bytes, Block]) -> None:
        """blocks: what is held, for the sizes of what comes."""
        self.nbytes = 0
        self._blocks = blocks
        self._lots: dict[bytes, _Lot] = {}
        # The one used longest ago first; what stands on a piece comes before it.
        self._pieces: OrderedDict[_Piece, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._lots

    def front(self, path: Sequence[bytes], before: float = inf) -> int:
        """How many blocks of the path are there, from the root on, that came before this request."""
        lots = self._lots
        front = at = _front(
            len(path), lambda at: (lot := lots.get(path[at])) is not None and lot.came < before
        )
        # Between pieces a block may have been forgotten.
        while at:
            lot = lots.get(path[at - 1])
            if lot is None:
                front = at = at - 1
            else:
                at = lot.piece.depth
        return front

    def use(self, path: Sequence[bytes], request: int, nbytes: int = 0) -> None:
        """A whole path was used, and is there from now on. nbytes: of a block, where no other tells it."""
        known = self.front(path)
        if known < len(path):
            piece, before = None, self._lots.get(path[known - 1]) if known else None
            if before is not None:
                nbytes = before.nbytes or nbytes
                if not before.piece.shared and before.piece.keys[-1] == path[known - 1]:
                    piece = before.piece
            self._add(path, known, piece, nbytes, request)
        self.touch(path)

    def _add(
        self, path: Sequence[bytes], known: int, piece: _Piece | None, nbytes: int, request: int
    ) -> None:
        lots, blocks, lot = self._lots, self._blocks, None
        for at in range(known, len(path)):
            key = path[at]
            if key in lots:
                piece = lot = None
                continue
            if piece is None:
                piece = _Piece(at)
                self._pieces[piece] = None
            block = blocks.get(key)
            # What was stored and is gone again is as large as the block before it.
            if block is not None and block.held:
                nbytes = block.nbytes
            if lot is None or lot.nbytes != nbytes:
                lot = _Lot(piece, nbytes, request)
            lots[key] = lot
            piece.keys.append(key)
            self.nbytes += nbytes

    def touch(self, path: Sequence[bytes]) -> None:
        """What is there of the path was used."""
        at = self.front(path)
        while at > 0:
            piece = self._lots[path[at - 1]].piece
            if piece.keys[-1] != path[at - 1]:
                piece = self._split(piece, path[at - 1])
            self._pieces.move_to_end(piece)
            at = piece.depth

    def _split(self, piece: _Piece, last: bytes) -> _Piece:
        """The front of a piece, up to this block, becomes one of its own."""
        front, before, lot = _Piece(piece.depth, shared=True), None, None
        while not front.keys or front.keys[-1] != last:
            key = piece.keys.popleft()
            if lot is None or self._lots[key] is not before:
                before = self._lots[key]
                lot = _Lot(front, before.nbytes, before.came)
            self._lots[key] = lot
            front.keys.append(key)
        piece.depth += len(front.keys)
        self._pieces[front] = None
        return front

    def trim(self, capacity_bytes: int) -> None:
        """Evict until no more is left than that."""
        while self.nbytes > capacity_bytes and self._pieces:
            piece = next(iter(self._pieces))
            keys, nbytes, lots = piece.keys, self.nbytes, self._lots
            while keys and nbytes > capacity_bytes:
                nbytes -= lots.pop(keys.pop()).nbytes
            self.nbytes = nbytes
            self._ended(piece)

    def forget(self, key: bytes) -> None:
        """The block is gone for another reason than room. What stands on it is of no use: see `front`."""
        lot = self._lots.get(key)
        if lot is None:
            return
        piece = lot.piece
        while key in self._lots:
            self.nbytes -= self._lots.pop(piece.keys.pop()).nbytes
        self._ended(piece)

    def hollow(self, key: bytes) -> None:
        """The block is gone for another reason than room, and what stands on it is still of use."""
        lot = self._lots.get(key)
        if lot is not None:
            self.nbytes -= lot.nbytes
            self._lots[key] = _Lot(lot.piece, 0, lot.came)

    def _ended(self, piece: _Piece) -> None:
        """Its end has gone, and so has what was of use only to that."""
        keys, lots = piece.keys, self._lots
        while keys and not lots[keys[-1]].nbytes:
            del lots[keys.pop()]
        if not keys:
            del self._pieces[piece]


def _front(blocks: int, there: Callable[[int], bool]) -> int:
    """How many blocks of a path are there, where none is without the one before it."""
    if not blocks or there(blocks - 1):
        return blocks
    return bisect_left(range(blocks), True, key=lambda at: not there(at)) if there(0) else 0


class Guard:
    """The account of work won and lost against LRU."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self.shadow = LruShadow(book.blocks)
        self._behind_s = self._asked_s = 0.0
        # As many as are remembered.
        self._requests = 0.0
        # By conversation, the path up to its newest end; the one parked longest ago first.
        self._paths: OrderedDict[Chat, list[bytes]] = OrderedDict()
        self._known_blocks = 0
        book.shadow = self.shadow

    def asked(self, chat: Chat, held: int) -> None:
        """A request came: what it finds of what its conversation left here. held: see UsagePolicy."""
        book = self._book
        book.request += 1
        chat.request, chat.held = book.request, held
        path = self._paths.get(chat, [])
        ours = _front(len(path), lambda at: book.holds(path[at], book.request))
        chat.found = ours, self.shadow.front(path)
        self.shadow.touch(path)

    def parked(self, chat: Chat, chain: Sequence[ParkedBlock], run: Run, *, asked: bool) -> None:
        """A turn is stored; by its whole path it is known what its request could find. run: of the turn."""
        path = [block.key for block in chain]
        before = self._paths.pop(chat, [])
        if asked:
            self._judge(chat, chain, before, path, run)
        self.shadow.use(path, self._book.request, chain[0].nbytes)
        # What lies in both tiers LRU would have in both, too.
        self.shadow.trim(self._book.held_bytes)
        self._paths[chat] = path
        self._known_blocks += len(path) - len(before)
        while self._known_blocks > _PATHS * len(self.shadow) + _SWEEP_FROM:
            self._known_blocks -= len(self._paths.popitem(last=False)[1])

    def _judge(
        self, chat: Chat, chain: Sequence[ParkedBlock], before: list[bytes], path: list[bytes], run: Run
    ) -> None:
        book, request = self._book, chat.request
        # What the request found may have gone since, and have been stored anew.
        same = _front(min(len(before), len(path)), lambda at: before[at] == path[at])
        fronts = (
            _front(len(path), lambda at: book.holds(path[at], request)),
            self.shadow.front(path, request),
        )
        ours, lrus = (
            max(min(chain[blocks - 1].end, chat.tokens_in) if blocks else 0, chat.held)
            for blocks in (
                max(front, min(found, same)) for front, found in zip(fronts, chat.found, strict=True)
            )
        )
        lost_s = 0.0
        if ours != lrus:
            lost_s = (lrus - ours) * book.token_s(run.model, (ours + lrus) // 2)
        self._asked_s = _MEMORY * self._asked_s + chat.tokens_in * run.token_s
        self._requests = _MEMORY * self._requests + 1.0
        bound_s = _PATIENCE * self._asked_s / self._requests
        self._behind_s = max(_MEMORY * self._behind_s + lost_s, -bound_s)
        book.lru_leads = self._behind_s > (_LEADS_UNTIL * bound_s if book.lru_leads else bound_s)


class ByUse:
    """Runs of one tier that have a leaf there, the one used longest ago first."""

    def __init__(self, index: int) -> None:
        self._index = index
        # (last use, mark, run): marks are never equal. One entry for a run.
        self._heap: list[tuple[float, int, Run]] = []
        self._marks = 0
        self._sweep_at = _SWEEP_FROM

    def add(self, run: Run) -> None:
        """It has a leaf in the tier."""
        if run.queued[self._index]:
            return
        run.queued[self._index] = True
        self._marks += 1
        heapq.heappush(self._heap, (run.used_s, self._marks, run))
        if len(self._heap) > self._sweep_at:
            self._sweep()

    def take(self) -> Run | None:
        """Take out the run that was used longest ago."""
        while self._heap:
            used_s, _, run = heapq.heappop(self._heap)
            run.queued[self._index] = False
            if not run.leaves[self._index]:
                continue
            if run.used_s <= used_s:
                return run
            self.add(run)
        return None

    def _sweep(self) -> None:
        kept = []
        for entry in self._heap:
            if entry[2].leaves[self._index]:
                kept.append(entry)
            else:
                entry[2].queued[self._index] = False
        heapq.heapify(kept)
        self._heap, self._sweep_at = kept, max(_SWEEP_FROM, 3 * len(kept))

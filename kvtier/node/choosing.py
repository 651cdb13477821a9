"""What to load of what is stored: the restore policy is asked, and its answer put into pieces and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeAlias, cast

from kvtier.errors import ProtocolError
from kvtier.messages.calls import MakePlan
from kvtier.node.blocks import Block
from kvtier.node.coverage import Piece, Source, SourceOf, restored_end
from kvtier.node.queues import Queues
from kvtier.node.ranks import Slices, covered
from kvtier.node.state import NodeState, Worker
from kvtier.policy.interfaces import LoadChoice, RestoreWish, Segment
from kvtier.receipts import TokenRange

_SLOWER: tuple[Source, ...] = ("host", "disk", "peer")
# Of a block: source, tokens, bytes. Neighbours in equal state cost alike.
_State: TypeAlias = tuple[Source, int, int]
# Nobody waits for a prefill that long, or in such a queue.
_MOST_WAIT_S, _MOST_WAITING = 1e6, 1_000_000


class Asked(NamedTuple):
    """What a plan loads by one path. queue_bytes: what was before it when it was planned."""

    source: str
    via: str
    nbytes: int
    queue_bytes: int


@dataclass(frozen=True, slots=True)
class Front:
    """The longest front that could be restored. source_of: of its objects; node: a peer that has some.

    slices: what it consists of.
    """

    blocks: Sequence[Block]
    pieces: list[Piece]
    source_of: SourceOf
    slices: Slices
    node: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """pieces: to load, in order.  segments: the same by runs of blocks.  stored: could anything be loaded?"""

    choice: LoadChoice
    pieces: list[Piece]
    segments: list[Segment]
    asked: tuple[Asked, ...]
    stored: bool

    @property
    def way(self) -> str:
        """One of eta.WAYS."""
        if not self.pieces:
            return "recompute"
        return "both" if self.choice.compute_front else "load"

    def saved_gpu_s(self, worker: Worker, tokens: int) -> float:
        """GPU seconds that the load spares a request of so many tokens; 0 where not known."""
        if worker.rate is None or not worker.rate.known:
            return 0.0
        seconds, front, end = worker.rate.seconds, self.choice.compute_front, self.choice.tokens
        return max(seconds(0, tokens) - seconds(0, front) - seconds(end, tokens - end), 0.0)

    def ranges(self, tokens: int) -> tuple[TokenRange, ...]:
        """Runs of one source that cover [0, tokens)."""
        start = self.choice.compute_front if self.pieces else 0
        ranges = [TokenRange(0, start, "compute")] if start else []
        # A chain of sliding layers only begins at its window: what is before it needs no bytes at all.
        for source, alike in groupby(self.segments, key=lambda segment: segment.source):
            *_, last = alike
            ranges.append(TokenRange(start, last.end, cast("Source", source)))
            start = last.end
        if start < tokens:
            ranges.append(TokenRange(start, tokens, "compute"))
        return tuple(ranges)


class Chooser:
    """Asks the policy with what the node knows."""

    def __init__(self, state: NodeState, queues: Queues) -> None:
        self._state = state
        self._queues = queues

    def choose(
        self, message: MakePlan, worker: Worker, front: Front, tokens: int, waited_s: float = 0.0
    ) -> Chosen:
        """What to load of a front. tokens: of the request; waited_s: since it came."""
        pieces = front.pieces
        vias: dict[Source, str] = {"disk": self._codec(message), "peer": self._state.path_to(front.node)}
        wish = self._wish(message, worker, waited_s)
        segments = _segments(pieces, vias)
        choice = self._state.policies.restore.choose(segments, tokens, wish)
        stored = bool(pieces)
        if choice.tokens < restored_end(pieces):
            pieces = covered(front.blocks, front.slices, front.source_of, choice.tokens)
        if choice.compute_front:
            pieces = [piece for piece in pieces if piece.stored.meta.start >= choice.compute_front]
        if pieces is not front.pieces:
            segments = _segments(pieces, vias)
        return Chosen(choice, pieces, segments, _asked(segments, wish), stored)

    def _wish(self, message: MakePlan, worker: Worker, waited_s: float) -> RestoreWish:
        rate, deadline_s = worker.rate, message.deadline_s
        return RestoreWish(
            recompute=rate if rate is not None and rate.known else None,
            waiting_requests=message.waiting,
            prefill_wait_s=message.prefill_wait_s,
            deadline_s=math.inf if deadline_s is None else max(deadline_s - waited_s, 0.0),
            takes=message.takes,
            by_layer=message.by_layer,
            queued_bytes=self._queues.bytes(),
            now_s=self._state.now_s,
        )

    def _codec(self, message: MakePlan) -> str:
        """What the conversation's blocks on disk are encoded with, if not with the node's own codec."""
        known = self._state.conversations.get((message.tenant, message.conversation))
        return (known.codec if known is not None else "") or self._state.tenant_codec(message.tenant)


def check_wishes(message: MakePlan) -> None:
    """Raise ProtocolError for a queue or a deadline that is none."""
    numbers = {
        "waiting": (message.waiting, _MOST_WAITING),
        "prefill_wait_s": (message.prefill_wait_s, _MOST_WAIT_S),
    }
    for field, (value, most) in numbers.items():
        if not 0 <= value <= most:
            raise ProtocolError(f"{field} is {value}", fix=f"give a number from 0 to {most:g}")
    if message.most_tokens is not None and message.most_tokens < 0:
        raise ProtocolError(f"most_tokens is {message.most_tokens}", fix="give the number of tokens")
    if message.deadline_s is not None and not math.isfinite(message.deadline_s):
        raise ProtocolError(f"deadline_s is {message.deadline_s}", fix="give a finite number of seconds")


def _segments(pieces: Sequence[Piece], vias: Mapping[Source, str]) -> list[Segment]:
    """One for each run of neighbouring blocks in equal state."""
    segments: list[Segment] = []
    for (source, tokens, nbytes), alike in groupby(_by_block(pieces), key=itemgetter(1)):
        starts = [start for start, _ in alike]
        end, run_bytes = starts[-1] + tokens, len(starts) * nbytes
        segments.append(Segment(starts[0], end, source, run_bytes, vias.get(source, ""), tokens))
    return segments


def _by_block(pieces: Iterable[Piece]) -> Iterator[tuple[int, _State]]:
    """The start and the state of each block; of the slowest source when its parts lie in several."""
    at: int | None = None
    state: _State = (_SLOWER[0], 0, 0)
    for stored, source in pieces:
        meta = stored.meta
        if meta.start == at:
            slowest = max(source, state[0], key=_SLOWER.index)
            state = slowest, meta.tokens, state[2] + meta.nbytes
            continue
        if at is not None:
            yield at, state
        at, state = meta.start, (source, meta.tokens, meta.nbytes)
    if at is not None:
        yield at, state


def _asked(segments: Sequence[Segment], wish: RestoreWish) -> tuple[Asked, ...]:
    paths: dict[tuple[str, str], int] = {}
    for segment in segments:
        path = segment.source, segment.via
        paths[path] = paths.get(path, 0) + segment.nbytes
    return tuple(
        Asked(source, via, nbytes, wish.queued_bytes.get(source, 0))
        for (source, via), nbytes in paths.items()
    )

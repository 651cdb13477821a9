"""Runs: the blocks of a node that share one return time, and what they are worth for their room.

Blocks last used by the same turn of the same conversation stand on one path without a gap, so they are one
run with one curve. Worth for each byte and second is the best rate of return (`worth`) times the seconds that
a use saves, per byte: against the next place where the bytes would be found, or computing them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Final, Protocol

from kvtier.policy.interfaces import Recompute, RestorePolicy
from kvtier.policy.returns import Curve
from kvtier.policy.usage import Name, TierName

# What loading a byte costs is asked of the restore policy so often, with a load of so many bytes.
_ASK_AGAIN_S: Final = 30.0
_ASK_BYTES: Final = 64 << 20
_ASK_TOKENS: Final = 256
# Until a worker's prefill rate is known: what a token costs at the start, twice that at the other position.
_GUESS_TOKEN_S: Final = 1 / 8000
_GUESS_DOUBLES_AT: Final = 30_000
# What lies nearer saves at least this share of what the next place costs.
_LEAST_SAVED: Final = 0.1
# Reading is not worth a write where it takes so many times as long as computing.
_TOO_SLOW: Final = 4.0
TIER_NAMES: Final[tuple[TierName, ...]] = ("host", "disk")
HOST_BIT: Final = 1
TIER_BITS: Final = (HOST_BIT, 2)
# Below this many, runs that may lack an end are never swept.
_SWEEP_FROM: Final = 1024


@dataclass(slots=True, eq=False)
class Run:
    """Blocks that wait for one return. Times in Unix seconds.

    name: of the conversation.  clock_s: when the wait begins, which may be yet to come.  waiting: whether
    anybody is expected back; if not, nothing counts but its age.  curve: of the wait after its first
    curve_from_s.  serving: a request is under way.  start,
    end: tokens from the first to behind the last block.  token_bytes: of all layers and shards here.
    token_s: to compute one again, at the middle.  keep_until_s: from then on it is worth nothing, as its
    caller said.  leaves: by tier, the blocks that may go.  mark: by tier, its entry in the order, 0 for none.
    queued: by tier, whether it has an entry in the order by last use.
    paid: whether it pays for a write to disk, and in which class of age that was asked.  uses: of what
    several conversations use, so many times since since_s; 0 for one conversation's own.
    """

    name: Name
    used_s: float
    model: bytes = b""
    clock_s: float = inf
    waiting: bool = False
    serving: bool = False
    curve: Curve | None = field(default=None, repr=False)
    curve_from_s: float = 0.0
    start: int = 0
    end: int = 0
    token_bytes: float = 1.0
    token_s: float = _GUESS_TOKEN_S
    keep_until_s: float = inf
    leaves: tuple[dict[Block, None], dict[Block, None]] = field(default_factory=lambda: ({}, {}))
    mark: list[int] = field(default_factory=lambda: [0, 0])
    queued: list[bool] = field(default_factory=lambda: [False, False])
    paid: tuple[int, bool] | None = None
    uses: int = 0
    since_s: float = inf

    def left(self) -> None:
        """Nobody is expected back."""
        self.waiting, self.serving, self.curve = False, False, None

    def idle_s(self, now_s: float) -> float:
        """How long it has been waited for."""
        return max(now_s - self.clock_s, 0.0)

    def curve_age_s(self, now_s: float) -> float:
        """Where on its curve it is."""
        return max(now_s - self.clock_s - self.curve_from_s, 0.0)

    def rate(self, now_s: float) -> float:
        """The best rate of return from now on, 1/s."""
        curve = self.curve
        if curve is None or not self.waiting or now_s >= self.keep_until_s:
            return 0.0
        age_s = now_s - self.clock_s - self.curve_from_s
        return curve.rate(age_s if age_s > 0.0 else 0.0)


@dataclass(slots=True, eq=False)
class Block:
    """A block that a tier holds, is about to hold, or that one which is held stands on.

    run: whose it is; the book's nobody where that is not known.  parent: the block before it, while a tier
    holds it.  held: by tier, one bit, see TIER_BITS.  nbytes: of the first object that came of it.  came: the
    number of the last request before it came into any tier.  children: by tier, blocks there on top of it.
    """

    key: bytes
    run: Run = field(repr=False)
    parent: Block | None = field(default=None, repr=False)
    held: int = 0
    nbytes: int = 0
    came: int = 0
    children: list[int] = field(default_factory=lambda: [0, 0])


class Shadow(Protocol):
    """What the book tells of blocks that go."""

    def forget(self, key: bytes) -> None:
        """No tier holds the block any more, and not for want of room."""

    def hollow(self, key: bytes) -> None:
        """The same, while what stands on it is still held."""


class Order(Protocol):
    """What the book tells the order of each tier."""

    def moved(self, block: Block, before: Run, after: Run) -> None:
        """A leaf of the tier belongs to another run."""

    def ranked(self, run: Run, worth: float) -> None:
        """The run's worth has changed."""


class Book:
    """Whose each block is, and what everything costs. Shared by the orders of both tiers.

    blocks: by key.  held_bytes: of those that a tier holds, each counted once, by its first object.  nobody:
    the run of blocks that no conversation is known for.  disk_usable, disk_free_bytes: as the node said last.
    request: how many came.  shadow: of LRU; lru_leads: whether worth has fallen behind that.
    """

    def __init__(self, restore: RestorePolicy) -> None:
        self.now_s = 0.0
        self.nobody = Run(("", ""), 0.0)
        self.disk_usable = False
        self.disk_free_bytes = 0
        self.orders: list[Order] = []
        self.blocks: dict[bytes, Block] = {}
        self.held_bytes = 0
        self.request = 0
        self.shadow: Shadow | None = None
        self.lru_leads = False
        # Runs that may have an end which host memory lacks; a dict keeps the order.
        self.away: dict[Run, None] = {}
        self._sweep_at = _SWEEP_FROM
        self._restore = restore
        self._asked_s = -inf
        self._load_s = {"host": 0.0, "disk": 0.0}
        self._recompute: dict[bytes, Recompute] = {}
        self._retired: dict[bytes, None] = {}

    def block(self, key: bytes) -> Block:
        """The block of this key, which is noted if it was not known."""
        block = self.blocks.get(key)
        if block is None:
            block = self.blocks[key] = Block(key, self.nobody)
        return block

    def owner(self, key: bytes) -> Run:
        """The run of a block."""
        block = self.blocks.get(key)
        return self.nobody if block is None else block.run

    def holds(self, key: bytes, request: int) -> bool:
        """Whether a tier has held the block since before this request."""
        block = self.blocks.get(key)
        return block is not None and block.held > 0 and block.came < request

    def coming(self, key: bytes, run: Run, end: int) -> None:
        """A tier is about to hold the block, which ends at token `end`: it belongs to the run."""
        block = self.block(key)
        if block.run is not run:
            self._give(block, run, end)

    def own(self, block: Block, run: Run, end: int) -> None:
        """The block belongs to the run from now on, if a tier holds it."""
        if block.run is run:
            return
        if block.held:
            self._give(block, run, end)
        else:
            self.let_go(block)

    def _give(self, block: Block, run: Run, end: int) -> None:
        before, block.run = block.run, run
        if 0 in block.children:
            for order, bit, children in zip(self.orders, TIER_BITS, block.children, strict=False):
                if not children and block.held & bit:
                    order.moved(block, before, run)
        self.shortened(before, end)

    def shortened(self, run: Run, end: int) -> None:
        """What ends at token `end`, and all before it, is the run's no longer."""
        if end > run.start and run is not self.nobody:
            run.start = max(run.start, min(end, run.end))

    def let_go(self, block: Block) -> None:
        """No tier holds the block: it is nobody's, and forgotten unless others stand on it."""
        block.run, block.parent = self.nobody, None
        if not any(block.children):
            del self.blocks[block.key]

    def note_away(self, run: Run) -> None:
        """Host memory may lack an end of the run."""
        if run in self.away:
            return
        self.away[run] = None
        if len(self.away) > self._sweep_at:
            # Nobody may ever ask for them: without a disk, or where nothing is read ahead.
            self.away = {run: None for run in self.away if run.waiting and any(run.leaves)}
            self._sweep_at = max(_SWEEP_FROM, 2 * len(self.away))

    def ranked(self, run: Run) -> None:
        """The run's worth has changed."""
        leaves, mark = run.leaves, run.mark
        # Asked at every look, and most runs have leaves in one tier at most.
        rate = self._rate(run) if leaves[0] or leaves[1] else 0.0
        for index, order in enumerate(self.orders):
            if leaves[index]:
                order.ranked(run, rate * self.saving_s(run, TIER_NAMES[index]) if rate else 0.0)
            elif mark[index]:
                # A leaf may come later: its entry would be one of what the run was worth once.
                order.ranked(run, 0.0)

    def owned(self) -> list[Run]:
        """All runs that have a block somewhere."""
        runs = dict.fromkeys(block.run for block in self.blocks.values())
        return [run for run in runs if run is not self.nobody]

    # --- what it costs ----------------------------------------------------------------------------------

    def computes(self, model: bytes, recompute: Recompute) -> None:
        """How long computing takes on the model's workers."""
        self._recompute[model] = recompute

    def token_s(self, model: bytes, position: int) -> float:
        """Seconds to compute a token at this position again, with all tokens around it."""
        found = self._recompute.get(model)
        if found is None:
            return _GUESS_TOKEN_S * (1.0 + position / _GUESS_DOUBLES_AT)
        longer = found.seconds(0, position + 2 * _ASK_TOKENS) - found.seconds(0, position + _ASK_TOKENS)
        return max(longer, 0.0) / _ASK_TOKENS

    def measured(self, run: Run) -> None:
        """Look up what the run's tokens cost to compute."""
        run.token_s = self.token_s(run.model, (run.start + run.end) // 2)

    def load_s(self, tier: TierName) -> float:
        """Expected seconds to load a byte from there, in a load of some size."""
        if self.now_s - self._asked_s >= _ASK_AGAIN_S:
            self._ask()
        return self._load_s[tier]

    def _ask(self) -> None:
        self._asked_s = self.now_s
        for source in TIER_NAMES:
            self._load_s[source] = self._restore.line(source).seconds(_ASK_BYTES) / _ASK_BYTES

    def saving_s(self, run: Run, tier: TierName) -> float:
        """Seconds that a use of the run saves for each byte that lies in this tier and not below it.

        What is on disk saves the GPU all of the computing: reading takes time, and none of the GPU's.
        """
        again_s = run.token_s / run.token_bytes
        if tier == "disk":
            return again_s
        host_s, elsewhere_s = self.load_s("host"), again_s
        if self.disk_usable and self._load_s["disk"] < again_s:
            elsewhere_s = self._load_s["disk"]
        # Loads that were measured behind a queue look as slow as computing.
        return max(elsewhere_s - host_s, _LEAST_SAVED * elsewhere_s)

    def reads_too_slowly(self, run: Run) -> bool:
        """Whether computing the run again is known to be so much sooner than reading it that nobody would."""
        return (
            run.model in self._recompute and self.load_s("disk") * run.token_bytes > _TOO_SLOW * run.token_s
        )

    def worth(self, run: Run, tier: TierName) -> float:
        """Seconds saved for each byte and second of room: what runs are ordered by."""
        rate = self._rate(run)
        return rate * self.saving_s(run, tier) if rate else 0.0

    def _rate(self, run: Run) -> float:
        return 0.0 if run.model in self._retired else run.rate(self.now_s)

    def retired(self, model: bytes) -> bool:
        """Whether nobody serves the model any more."""
        return model in self._retired

    def retire(self, models: dict[bytes, None]) -> None:
        """These models, and no others, are served by nobody any more."""
        changed = {**models, **self._retired}
        before, self._retired = self._retired, dict(models)
        if before.keys() != models.keys():
            for run in self.owned():
                if run.model in changed:
                    self.ranked(run)

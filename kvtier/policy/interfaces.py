"""What a policy is asked, by the node and by the simulator alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from kvtier.policy.load_cost import LoadLine
from kvtier.policy.prices import Money
from kvtier.policy.usage import Name, NoUsage, UsagePolicy

# What an engine can take of a restore: all that is stored or nothing; any front; or also computing the front
# while what follows it is loaded.
Takes: TypeAlias = Literal["all_or_nothing", "fronts", "both"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of stored tokens [start, end) that lies in one tier; ends where a restore may end.

    source: one of load_cost.SOURCES.  via: what tells paths of one source apart: the codec on disk, a peer's
    name; '' for one.  step_tokens: a restore may also end after each so many of its tokens, and its bytes are
    spread evenly over them; 0 for neither.
    """

    start: int
    end: int
    source: str
    nbytes: int
    via: str = ""
    step_tokens: int = 0

    @property
    def step(self) -> int:
        """Tokens between two places where a restore may end."""
        return self.step_tokens or self.end - self.start


class Recompute(Protocol):
    """How long computing takes on one worker."""

    def seconds(self, past: int, new: int) -> float:
        """Expected seconds to compute `new` tokens after `past`; convex in `new`, 0 for none."""


@dataclass(frozen=True, slots=True)
class RestoreWish:
    """What a choice depends on beside what is stored.

    recompute: of the worker that asks; None where it is not known, and then everything is loaded.
    waiting_requests: in its prefill queue.  prefill_wait_s: until it could begin to compute.  deadline_s: for
    all that is loaded.  takes: what the engine can use.  by_layer: layer by layer, so that a load which is
    cut off at the deadline leaves nothing, where another one leaves the front that came.  queued_bytes: by
    source, what is to be moved for others first.  now_s: by any clock that goes forward, for what has to be
    learned anew after a while.
    """

    recompute: Recompute | None = None
    waiting_requests: int = 0
    prefill_wait_s: float = 0.0
    deadline_s: float = inf
    takes: Takes = "fronts"
    by_layer: bool = False
    queued_bytes: Mapping[str, int] = field(default_factory=dict)
    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadChoice:
    """Load [compute_front, tokens); the expected seconds for that, low and high: one in ten beyond each.

    compute_front: computed meanwhile, 0 unless the engine takes both.  why: in words.  kind: tells choices
    apart whose outcomes are learned apart.  expected_s: of the load, from what its parts cost, between low
    and high as a rule.  eta_mid_s: half of all loads are sooner.  late: not all would arrive by the deadline.
    recompute_s, load_s: to the first token by computing everything, and by loading all that is stored; 0
    where not known.
    """

    tokens: int
    eta_low_s: float
    eta_high_s: float
    compute_front: int = 0
    why: str = ""
    kind: str = ""
    expected_s: float = 0.0
    eta_mid_s: float = 0.0
    late: bool = False
    recompute_s: float = 0.0
    load_s: float = 0.0


class EvictionPolicy(Protocol):
    """Orders the blocks that one tier holds by what they are worth. Keys are block keys."""

    def added(self, key: bytes, parent: bytes, nbytes: int, now_s: float) -> None:
        """The tier holds this block from now on; again when its bytes changed."""

    def used(self, key: bytes, now_s: float) -> None:
        """The block was parked again or restored. Unknown keys are no error."""

    def removed(self, key: bytes) -> None:
        """The tier holds it no longer. Unknown keys are no error."""

    def victims(self, now_s: float) -> Iterator[bytes]:
        """Blocks that may go, least worth first, and never before the blocks that stand on them.

        The caller skips what it cannot remove; calling `removed` meanwhile makes parents come up.
        """

    def ranks(self, keys: Sequence[bytes], now_s: float) -> list[tuple[int, int]]:
        """Of each block (how many would go before what it belongs to, how many there are).

        For people: all that is there is put in order, once for all keys.
        """


class RestorePolicy(Protocol):
    """Load or recompute."""

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = ...) -> LoadChoice:
        """How much of the stored front to load. segments: contiguous from 0; tokens: of the request."""

    def observed(self, source: str, nbytes: int, seconds: float, queue_bytes: int = 0, via: str = "") -> None:
        """What a restore loads from `source` took so long until it was in place.

        queue_bytes: what was to be moved first when it was asked for.  via: see Segment.
        """

    def line(self, source: str, queue_bytes: int = 0) -> LoadLine:
        """How long loads from `source` take, by the path of it that was measured most."""

    def restored(self, choice: LoadChoice, seconds: float) -> None:
        """All that was chosen to be loaded was in place after so long."""


class PrefillRate(Recompute, Protocol):
    """How long prefills of one model take on one kind of worker."""

    @property
    def known(self) -> bool:
        """Whether a plan may rely on it: the device is known, or enough was measured."""

    def observed(self, past: int, new: int, seconds: float) -> None:
        """Computing `new` tokens after `past` took so long."""


class PrefillRates(Protocol):
    """Of all models and workers of a node."""

    def rate_of(self, model: str, config: Mapping[str, Any], device: str, devices: int) -> PrefillRate:
        """Of a model on workers of this kind.

        model: its fingerprint, as text.  config: of the model, as in its config.json.  device: what its
        driver calls it; '' where not known.  devices: that compute together.  Raises ModelSpecError.
        """


class Learned(Protocol):
    """What is kept across restarts of a node."""

    def to_bytes(self) -> bytes:
        """All that was learned."""

    def take_over(self, data: bytes) -> None:
        """Go on from what `to_bytes` wrote once. Raises ConfigError, and nothing is changed then."""


class AdmissionPolicy(Protocol):
    """What is written to disk when host memory needs the room."""

    def demote(self, key: bytes, nbytes: int, now_s: float) -> bool:
        """Whether this block is worth a write; otherwise it is dropped."""


class Expected(Protocol):
    """A conversation that is worth reading into host memory before it returns."""

    @property
    def name(self) -> Name:
        """Whose it is."""


_Expected = TypeVar("_Expected", bound=Expected)


class PrefetchPolicy(Protocol[_Expected]):
    """What is read from disk into host memory ahead of a return."""

    def due(self, now_s: float, ahead_s: float) -> _Expected | None:
        """One for which that pays now, with room held for ahead_s at most; None for nobody.

        Whoever is still away is named again after a while.
        """

    def displaces(self, ahead: _Expected, key: bytes) -> bool:
        """Whether this block of host memory is worth so much less that it may go for that."""


class NoPrefetch:
    """See PrefetchPolicy: for orders that expect nobody."""

    def due(self, now_s: float, ahead_s: float) -> Expected | None:
        """Nobody."""
        return None

    def displaces(self, ahead: Expected, key: bytes) -> bool:
        """Nothing goes."""
        return False


@dataclass(frozen=True, slots=True)
class Policies:
    """Everything that decides, for one node.

    learned: what of it is written down, by name.  usage: hears of conversations.  money: prices, where the
    node has them.
    """

    host: EvictionPolicy
    disk: EvictionPolicy
    restore: RestorePolicy
    admission: AdmissionPolicy
    rates: PrefillRates
    learned: Mapping[str, Learned] = field(default_factory=dict)
    usage: UsagePolicy = field(default_factory=NoUsage)
    money: Money = field(default_factory=Money)
    prefetch: PrefetchPolicy[Any] = field(default_factory=NoPrefetch)

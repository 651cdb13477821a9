"""What a node tells its policies of conversations, and what they answer about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from kvtier.policy.interfaces import Recompute

Name: TypeAlias = tuple[str, str]  # of a conversation: tenant, id
TierName: TypeAlias = Literal["host", "disk"]


class ParkedBlock(NamedTuple):
    """A block of a chain that was parked: tokens [start, end), bytes of all that is stored of it."""

    key: bytes
    start: int
    end: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What is known of a conversation that was just parked.

    stop: why the output ended, '' unknown.  model: its fingerprint.  returns_at_s, keep_until_s: what its
    caller said, in Unix seconds; None for nothing.
    """

    stop: str = ""
    model: bytes = b""
    returns_at_s: float | None = None
    keep_until_s: float | None = None


@dataclass(slots=True)
class Forecast:
    """Of waits that were judged at one horizon: how many returns were expected by then, and how many came."""

    waits: int = 0
    expected: float = 0.0
    came: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """What some neighbouring blocks are worth, and by which numbers. Seconds are of all GPUs of a worker.

    waiting: whether anybody is expected back; serving: a request of it is under way.  returns: the chance of
    a return within 5 min, 1 h and 1 day.  host_*, disk_*: of keeping them there for the best time: the chance
    of a return in that time, what it saves, and what one hour costs in money (None without prices).
    gpu_second: in money, None without prices.  hint_trust: how often hints of this tenant come true.
    """

    waiting: bool
    serving: bool
    idle_s: float
    returns: tuple[float, float, float]
    horizon_s: float
    horizon_returns: float
    recompute_s: float
    load_host_s: float
    load_disk_s: float
    host_saving_s: float
    disk_saving_s: float
    gpu_second: float | None = None
    host_per_hour: float | None = None
    disk_per_hour: float | None = None
    disk_write: float | None = None
    hint_trust: float | None = None
    retired: bool = False
    currency: str = ""


class UsagePolicy(Protocol):
    """What a node tells of its conversations; orders that go by return times learn from it."""

    def asked(self, name: Name, tokens: int, now_s: float, held: int = 0) -> None:
        """A request of the conversation arrived, with a prompt of so many tokens.

        held: so many of them are in its engine's own memory still, as far as that is known.
        """

    def stored(self, name: Name, block: ParkedBlock, now_s: float) -> None:
        """A block was stored, or is about to be, for a park of the conversation that is under way."""

    def parked(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, now_s: float) -> None:
        """The conversation has a new end: a wait for its return begins."""

    def adopted(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, parked_at_s: float) -> None:
        """After a restart: the conversation waits since then."""

    def hinted(
        self, name: Name, returns_at_s: float | None, keep_until_s: float | None, now_s: float
    ) -> None:
        """Its caller said when it comes back, or until when it is worth keeping."""

    def forgotten(self, name: Name) -> None:
        """Nobody waits for it any more, and nothing is learned from that."""

    def passed(self, now_s: float, disk_usable: bool, disk_free_bytes: int) -> None:
        """Time passed; how the disk stands."""

    def serves(self, models: Mapping[bytes, Recompute | None], retired: Mapping[bytes, None]) -> None:
        """Models that have workers, and what computing takes there; models that nobody serves any more."""

    def run_of(self, block: bytes) -> object:
        """The same object for blocks that are worth the same."""

    def stays(self, block: bytes, run: object) -> None:
        """The block was removed from an order, and is about to be added again. run: its run_of() before."""

    def account(self, block: bytes, nbytes: int, tokens: tuple[int, int], now_s: float) -> Account | None:
        """What tokens [start, end) are worth, to which the block belongs; None where nobody reckons."""

    def forecasts(self) -> Mapping[str, Forecast]:
        """How returns came against what was expected of them, by a horizon's name."""

    def by_last_use(self) -> bool:
        """Whether what was used longest ago goes first now."""


class NoUsage:
    """See UsagePolicy: for orders that go by something else."""

    def asked(self, name: Name, tokens: int, now_s: float, held: int = 0) -> None:
        """Nobody learns."""

    def stored(self, name: Name, block: ParkedBlock, now_s: float) -> None:
        """Nobody learns."""

    def parked(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, now_s: float) -> None:
        """Nobody learns."""

    def adopted(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, parked_at_s: float) -> None:
        """Nobody learns."""

    def hinted(
        self, name: Name, returns_at_s: float | None, keep_until_s: float | None, now_s: float
    ) -> None:
        """Nobody learns."""

    def forgotten(self, name: Name) -> None:
        """Nobody learns."""

    def passed(self, now_s: float, disk_usable: bool, disk_free_bytes: int) -> None:
        """Nobody learns."""

    def serves(self, models: Mapping[bytes, Recompute | None], retired: Mapping[bytes, None]) -> None:
        """Nobody learns."""

    def run_of(self, block: bytes) -> object:
        """Nobody tells them apart."""
        return None

    def stays(self, block: bytes, run: object) -> None:
        """Nobody tells them apart."""

    def account(self, block: bytes, nbytes: int, tokens: tuple[int, int], now_s: float) -> Account | None:
        """Nobody learns."""
        return None

    def forecasts(self) -> Mapping[str, Forecast]:
        """Nobody expects anything."""
        return {}

    def by_last_use(self) -> bool:
        """Always."""
        return True

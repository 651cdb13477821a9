"""What a policy is asked, by the node and by the simulator alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of stored tokens [start, end) that lies in one tier; ends where a restore may end."""

    start: int
    end: int
    source: Literal["host", "disk"]
    nbytes: int


@dataclass(frozen=True, slots=True)
class LoadChoice:
    """Load the front [0, tokens); the expected seconds for that, low and high."""

    tokens: int
    eta_low_s: float
    eta_high_s: float


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


class RestorePolicy(Protocol):
    """Load or recompute."""

    def choose(self, segments: Sequence[Segment], tokens: int) -> LoadChoice:
        """How much of the stored front to load. segments: contiguous from 0; tokens: of the request."""

    def observed(self, source: Literal["host", "disk"], nbytes: int, seconds: float) -> None:
        """A load from `source` took so long."""


class AdmissionPolicy(Protocol):
    """What is written to disk when host memory needs the room."""

    def demote(self, key: bytes, nbytes: int, now_s: float) -> bool:
        """Whether this block is worth a write; otherwise it is dropped."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Everything that decides, for one node."""

    host: EvictionPolicy
    disk: EvictionPolicy
    restore: RestorePolicy
    admission: AdmissionPolicy

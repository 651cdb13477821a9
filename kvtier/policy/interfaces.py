"""What a policy is asked, by the node and by the simulator alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of stored tokens [start, end) that lies in one tier; ends where a restore may end."""

    start: int
    end: int
    source: Literal["host", "disk"]
    nbytes: int


class Recompute(Protocol):
    """How long computing takes on one worker."""

    def seconds(self, past: int, new: int) -> float:
        """Expected seconds to compute `new` tokens after `past`; convex in `new`, 0 for none."""


@dataclass(frozen=True, slots=True)
class RestoreWish:
    """What a choice depends on beside what is stored.

    recompute: of the worker that asks; None where it is not known, and then everything is loaded.
    waiting_requests: in its prefill queue.  prefill_wait_s: until it could begin to compute.  deadline_s: for
    all that is loaded.  mixed: whether the engine can compute the front while the rest is loaded.
    queued_bytes: by source, what is to be moved for others first.
    """

    recompute: Recompute | None = None
    waiting_requests: int = 0
    prefill_wait_s: float = 0.0
    deadline_s: float = inf
    mixed: bool = False
    queued_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadChoice:
    """Load [compute_front, tokens); the expected seconds for that, low and high.

    compute_front: computed meanwhile, 0 unless the wish was mixed.  why: in words.  kind: tells choices apart
    whose outcomes are learned apart.  expected_s: of the load, between low and high as a rule.
    """

    tokens: int
    eta_low_s: float
    eta_high_s: float
    compute_front: int = 0
    why: str = ""
    kind: str = ""
    expected_s: float = 0.0


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

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = ...) -> LoadChoice:
        """How much of the stored front to load. segments: contiguous from 0; tokens: of the request."""

    def observed(
        self, source: Literal["host", "disk"], nbytes: int, seconds: float, queue_bytes: int = 0
    ) -> None:
        """A load from `source` took so long.

        queue_bytes: what was to be moved first when it was asked for.
        """

    def restored(self, choice: LoadChoice, seconds: float) -> None:
        """All that was chosen to be loaded was in place after so long."""


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

"""When to talk to a daemon that failed: a circuit breaker with backoff. Pure: time and chance are arguments.

    open     nobody calls; the next probe is due at a set time     (also the state at the beginning)
    probing  one attempt to connect is under way
    closed   calls go through

The count of failures survives a probe that succeeded and ends only with a proven call, so a daemon that
greets and then hangs is asked less and less often.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

# Not Python's own generator, which is its program's: engines seed it alike in all their processes, whose
# delays would then be alike, too.
CHANCE: Final[Callable[[], float]] = random.SystemRandom().random


class Circuit(Enum):
    """State of a breaker."""

    OPEN = "open"
    PROBING = "probing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays grow from first_s by `factor` up to limit_s; each is shortened by up to `jitter` of itself."""

    first_s: float = 0.05
    factor: float = 2.0
    limit_s: float = 5.0
    jitter: float = 0.5

    def delay_s(self, failures: int, draw: float) -> float:
        """Delay after so many failures in a row (1 or more). draw: from [0, 1)."""
        # The exponent is bounded because a float power overflows after a night of failures.
        full = min(self.limit_s, self.first_s * self.factor ** min(failures - 1, 64))
        return full * (1.0 - self.jitter * draw)


class Breaker:
    """The state machine. Not thread-safe: its owner holds a lock. rng: draws from [0, 1)."""

    def __init__(self, backoff: Backoff, rng: Callable[[], float]) -> None:
        self._backoff = backoff
        self._rng = rng
        self._due_s = float("-inf")
        self.circuit = Circuit.OPEN
        self.failures = 0
        self.era = 0

    @property
    def closed(self) -> bool:
        """Whether calls may go through."""
        return self.circuit is Circuit.CLOSED

    def failed(self, era: int, now_s: float) -> bool:
        """A call failed on the connection of `era`. Answers whether that opened the circuit.

        What an older connection reports late says nothing about the present one.
        """
        if not self.closed or era != self.era:
            return False
        self._open(now_s)
        return True

    def wait_s(self, now_s: float) -> float:
        """Seconds until a probe is due; 0 when it is. Only meaningful while open."""
        return max(0.0, self._due_s - now_s)

    def begin_probe(self, now_s: float) -> bool:
        """Take the right to probe; False when none is due or one is under way."""
        if self.circuit is not Circuit.OPEN or self.wait_s(now_s) > 0:
            return False
        self.circuit = Circuit.PROBING
        return True

    def probe_failed(self, now_s: float) -> None:
        """The attempt to connect failed."""
        if self.circuit is Circuit.PROBING:
            self._open(now_s)

    def probe_succeeded(self) -> None:
        """The attempt to connect succeeded: calls go through, in a new era."""
        if self.circuit is Circuit.PROBING:
            self.circuit = Circuit.CLOSED
            self.era += 1

    def proved(self, era: int) -> None:
        """A call on the connection of `era` was answered: earlier failures are forgotten."""
        if self.closed and era == self.era:
            self.failures = 0

    def _open(self, now_s: float) -> None:
        self.failures += 1
        self.circuit = Circuit.OPEN
        self._due_s = now_s + self._backoff.delay_s(self.failures, self._rng())

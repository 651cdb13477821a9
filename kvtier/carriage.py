"""What carries bytes between two nodes that no connection can be made between: in calls, one piece at a time.

The daemon knows this much of it; what the calls are, is the carrier's own matter.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
# No call brings more in either direction. A connection has one call under way, so with at most so many
# connections a node's part of what is on its way is bounded by their product.
PIECE_BYTES = 2 << 20
MOST_CONNECTIONS = 32
# Longest that a call waits at the other end: it holds a thread there.
MOST_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Passing:
    """One call of a connection. data: what its caller says, uint8 [n], at most PIECE_BYTES.

    connection: a name that nobody else has.  first: it begins with this call.  least: how many bytes the
    caller waits for, at most wait_s; 0: for nothing.  last: it ends here.
    """

    connection: str
    data: Bytes
    first: bool = False
    least: int = 0
    wait_s: float = 0.0
    last: bool = False


class Carrier(Protocol):
    """Brings calls to other nodes. From any thread."""

    @property
    def name(self) -> str:
        """As reports call this way."""

    def pass_on(self, node: str, call: Passing) -> Future[Bytes | None]:
        """What the node's end of the connection says to it, uint8 [n]; None when the connection has ended.

        Returns at once.  The future raises OSError when the node is not reached by this way either.
        """

"""How a node is reached: by TCP, and where no connection can be made, by a carrier for a while."""

from __future__ import annotations

import logging
import ssl
import time

from kvtier.carriage import Carrier
from kvtier.peers.relay import Relayed
from kvtier.peers.stream import StreamLost, Wire, connect

_LOG = logging.getLogger(__name__)
# So long is TCP not tried again: where packets vanish, each trial costs whoever asks half of its time.
RETRY_S = 60.0


class Ways:
    """Of one node. From any thread. carrier: None where there is none; TLS has no other way than TCP.

    way: by which the node was reached last; '' before it was.
    """

    def __init__(
        self, node: str, address: tuple[str, int], tls: ssl.SSLContext | None, carrier: Carrier | None
    ) -> None:
        self._node, self._address, self._tls = node, address, tls
        self._carrier = carrier if tls is None else None
        self._tcp_from_s = 0.0
        self.way = ""

    def open(self, until_s: float) -> Wire:
        """A connection on which nothing has been said. Raises StreamLost."""
        now_s, carrier = time.monotonic(), self._carrier
        if carrier is None:
            return connect(self._address, self._tls, until_s)
        if now_s >= self._tcp_from_s:
            try:
                return connect(self._address, None, now_s + (until_s - now_s) / 2)
            except StreamLost as error:
                _LOG.debug("node '%s' by TCP: %s", self._node, error)
                self.no_tcp()
        return Relayed(carrier, self._node)

    def no_tcp(self) -> bool:
        """TCP does not lead to this node; answers whether there is another way."""
        self._tcp_from_s = time.monotonic() + RETRY_S
        return self._carrier is not None

    def outdated(self, way: str) -> bool:
        """Whether a connection of this way is not to be used again, since TCP may be tried."""
        return way != Wire.way and time.monotonic() >= self._tcp_from_s

    def reached(self, way: str) -> None:
        """The node has proven who it is."""
        if way != self.way:
            level = logging.INFO if way == Wire.way else logging.WARNING
            _LOG.log(level, "node '%s' is reached by %s", self._node, way)
            self.way = way

    def lost(self, way: str) -> None:
        """It was not to be had by this way."""
        if way != Wire.way:
            # It may have gone as a whole, and come back where TCP reaches it.
            self._tcp_from_s = 0.0

"""Which other nodes there are, on this node's drive: who has to be told what was forgotten.

A directory that has just started knows only those that have spoken to it since.  A forgetting that asked it
alone would be over before a node that is away, or has not spoken yet, could hear of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgpack

from kvtier.errors import KvtierError

_NAME = "nodes"
_LOG = logging.getLogger(__name__)
# How often it is noted that a node was heard of.
_NOTE_S = 3600.0


class PeerBook:
    """Addresses by node, in a file in node.state_dir. From any thread.

    keep_s: a node that was not heard of for so long is not there any more.  Raises KvtierError when the file
    cannot be read.
    """

    def __init__(self, state_dir: str | Path, keep_s: float) -> None:
        self._path = Path(state_dir) / _NAME
        self._keep_s = keep_s
        self._lock = threading.Lock()
        # With Unix seconds: when it was heard of.
        self._known: dict[str, tuple[str, float]] = {}
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise KvtierError(f"{self._path}: {error.strerror}", fix="check node.state_dir") from error
        self._read(data)

    def addresses(self) -> dict[str, str]:
        """host:port by node."""
        least_s = time.time() - self._keep_s
        with self._lock:
            return {node: address for node, (address, at_s) in self._known.items() if at_s > least_s}

    def learn(self, addresses: Mapping[str, str]) -> None:
        """These nodes were heard of."""
        now_s = time.time()
        with self._lock:
            news = {
                node: (address, now_s)
                for node, address in addresses.items()
                if self._known.get(node, ("", 0.0))[0] != address or self._known[node][1] < now_s - _NOTE_S
            }
            if news:
                self._known.update(news)
                self._write()

    def _read(self, data: bytes) -> None:
        try:
            known = msgpack.unpackb(data) if data else {}
            self._known = {str(node): (str(address), float(at_s)) for node, (address, at_s) in known.items()}
        except (ValueError, TypeError, AttributeError, msgpack.exceptions.UnpackException) as damage:
            _LOG.warning("%s is damaged, and begun anew: %s", self._path, damage)

    def _write(self) -> None:
        """The new file takes the old one's place as a whole."""
        beside = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(msgpack.packb(self._known))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self._path)
        except OSError as error:
            _LOG.warning("%s cannot be written: %s", self._path, error)

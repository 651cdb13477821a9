"""The disk's codecs on the way between nodes."""

from __future__ import annotations

from functools import cache

from kvtier.disk.codecs import CODECS, CodecMissing
from kvtier.peers.coding import Codings, measured

# Those that make KV smaller.
_NAMES = ("planes-lz4", "planes-zstd")


@cache
def codings() -> Codings:
    """Those whose packages are there, as fast as they are here: measured once in a process."""
    found = {}
    for name in _NAMES:
        try:
            CODECS[name].check_installed()
        except CodecMissing:
            continue
        found[name] = measured(CODECS[name])
    return found

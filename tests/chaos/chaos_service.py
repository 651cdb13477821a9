"""One service of a node in the chaos run: `python chaos_service.py PLAN NAME SETTINGS`.

PLAN is a JSON file: 'routes', through which link another node's address is reached; 'coded', whether KV shall
soon be encoded where it pays; and 'faults', that are planted here so that the run shows that it would notice
them.  SIGUSR2 makes the node go out of service.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.config.load import Config
from kvtier.daemon.disk_writes import DiskWriter
from kvtier.daemon.node_service import NodeService
from kvtier.daemon.peer_lender import PeerLender
from kvtier.disk.mover import Mover
from kvtier.disk.tier import DiskTier
from kvtier.errors import KvtierError
from kvtier.messages.cluster import Erase, Erased
from kvtier.messages.peers import Sending
from kvtier.node.graves import Burials
from kvtier.peers import choice, fetch, ways
from kvtier.peers.server import PeerServer
from kvtier.peers.stream import Stream, connect
from kvtier.testing import run_service
from kvtier.testing.kv_memory import ranks_of
from kvtier.tier import Slot

_DRAIN_S = 3.0


def reach_through(routes: Mapping[str, str]) -> None:
    """Whoever this process connects to, it does so through the link of its own."""

    def connected(address: tuple[str, int], tls: ssl.SSLContext | None, until_s: float) -> Stream:
        host, _, port = routes.get(f"{address[0]}:{address[1]}", f"{address[0]}:{address[1]}").rpartition(":")
        return connect((host, int(port)), tls, until_s)

    ways.connect = connected  # type: ignore[attr-defined]  # what the module itself calls


def measure_soon() -> None:
    """What a link brings is known after one block, and what a codec brings counts for a few seconds."""
    choice._FEW_BYTES, choice._LONG_S, choice.KEEP_CODEC_S = 16 << 10, 0.02, 3.0


# --- what the run has to notice -----------------------------------------------------------------------------


def unchecked_flips() -> None:
    """A byte of what a peer sends is wrong, and nobody compares it with its checksum."""
    view = PeerLender._view

    def flipped(self: PeerLender, slot: Slot) -> Any:
        sent = np.array(view(self, slot))
        sent[sent.size // 2] ^= 16
        return sent

    def unchecked(self: Any, stream: Stream, wanted: Any, asked: str) -> str:
        assert not asked, "nothing is encoded on the way in this run"
        head = stream.receive(Sending, self._until_s)
        if head.reason:
            return "missing"
        stream.receive_object(memoryview(wanted.into), self._until_s)
        return ""

    PeerLender._view = flipped  # type: ignore[method-assign]
    fetch.Fetch._receive = unchecked  # type: ignore[method-assign,assignment]


def no_index_row() -> None:
    """Objects are written, and said to be on disk, but the index never hears of them."""
    commit = DiskTier.commit_with_records

    def without(self: DiskTier, objects: Sequence[Any], *rest: Any, **options: Any) -> Any:
        return commit(self, [], *rest, **options)

    DiskTier.commit_with_records = without  # type: ignore[method-assign,assignment]


def erased_by_word_alone() -> None:
    """A node that is told to forget says that it did."""

    def lie(self: Burials, peer: str, message: Erase) -> None:
        self._state.send(peer, Erased(stone=message.stone))

    Burials.on_erase = lie  # type: ignore[method-assign]


def unchecked_reads() -> None:
    """What comes from the drive is compared with nothing."""
    make = Mover.__init__

    def unchecked(self: Mover, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self._check = False

    Mover.__init__ = unchecked  # type: ignore[method-assign]


def one_rank_alone() -> None:
    """Of two ranks, the slice of the first alone is written; the other's is taken to be there."""
    has = DiskWriter._has_all_of
    second = ranks_of(2)[1].name
    DiskWriter._has_all_of = (  # type: ignore[method-assign]
        lambda self, meta: meta.object_id.shard == second or has(self, meta)
    )


def kept_descriptors() -> None:
    """Each answer to another node leaves a descriptor open."""
    reply = PeerServer._reply

    def kept(self: PeerServer, *arguments: Any) -> None:
        reply(self, *arguments)
        os.dup(2)

    PeerServer._reply = kept  # type: ignore[method-assign,assignment]


FAULTS: dict[str, Callable[[], None]] = {
    "unchecked_flips": unchecked_flips,
    "no_index_row": no_index_row,
    "erased_by_word_alone": erased_by_word_alone,
    "unchecked_reads": unchecked_reads,
    "kept_descriptors": kept_descriptors,
    "one_rank_alone": one_rank_alone,
}


def main(plan: str, name: str, settings: str) -> int:
    """See run_service."""
    said = json.loads(Path(plan).read_text())
    reach_through(said["routes"])
    if said["coded"]:
        measure_soon()
    for fault in said["faults"]:
        FAULTS[fault]()
    made: list[Any] = []
    make = run_service.make_service

    def make_service(name: str, config: Config, gates: str) -> Any:
        made.append(make(name, config, gates))
        return made[-1]

    def drain(number: int, frame: object) -> None:
        if made and isinstance(made[-1], NodeService):
            with suppress(KvtierError):
                made[-1].drain(_DRAIN_S)

    run_service.make_service = make_service
    signal.signal(signal.SIGUSR2, drain)
    return run_service.main(name, settings)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

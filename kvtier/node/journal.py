"""The log of everything that a node's core was told, and its replay.

Each entry is a msgpack map: the time, the stimulus, and a digest of the instructions that it led to.  An
entry at each start of the node holds what its core was made with; one that says why the log goes no further
stands where it could not be kept any more, and until the next start.  Replaying a log makes the core again,
gives it the stimuli at their times, and compares the digests: any difference is a bug, or another version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import msgpack
import msgspec

from kvtier.errors import KvtierError
from kvtier.messages.calls import Message, StatusIs
from kvtier.messages.protocol import LENGTH, decode, encode
from kvtier.node.core import NodeCore
from kvtier.node.events import (
    ArenaGrew,
    EventsJoined,
    Left,
    ProcessEnded,
    Received,
    Remembered,
    Send,
    Stimulus,
    Tick,
)
from kvtier.node.host_memory import HostMemory
from kvtier.node.settings import NodeSettings
from kvtier.policy.interfaces import Policies

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (ArenaGrew, EventsJoined, Left, ProcessEnded, Remembered, Tick)
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a core is made with, so that a replay can make the same one."""

    settings: NodeSettings
    secret_digest: str
    seed: int
    epoch: int
    arena_bytes: tuple[int, ...]
    generation_slots: int


class JournaledCore:
    """A NodeCore that writes down what it is told. write: takes bytes, in order; must not raise."""

    def __init__(self, core: NodeCore, origin: Origin, write: Callable[[bytes], object]) -> None:
        self.core = core
        self._write = write
        write(msgpack.packb({"origin": msgspec.to_builtins(asdict(origin))}))

    def handle(self, now_s: float, stimulus: Stimulus) -> list[Send]:
        """See NodeCore.handle."""
        sends = self.core.handle(now_s, stimulus)
        entry = {"at_s": now_s, **pack(stimulus), "sends": digest(sends)}
        self._write(msgpack.packb(entry))
        return sends


def pack(stimulus: Stimulus) -> dict[str, Any]:
    """A stimulus as a map of plain values."""
    if isinstance(stimulus, Received):
        return {"kind": "Received", "peer": stimulus.peer, "message": encode(stimulus.message)[LENGTH.size :]}
    return {"kind": type(stimulus).__name__, **asdict(stimulus)}


def unpack(entry: dict[str, Any]) -> Stimulus:
    """The reverse of `pack`; other fields of the entry are ignored."""
    kind = entry["kind"]
    if kind == "Received":
        return Received(entry["peer"], decode(entry["message"]))
    cls = _KINDS[kind]
    stimulus: Stimulus = cls(**{name: entry[name] for name in cls.__dataclass_fields__})
    return stimulus


def digest(sends: Iterable[Send]) -> bytes:
    """8 bytes that stand for a list of instructions."""
    hasher = hashlib.sha256()
    for send in sends:
        message = send.message
        said = [send.peer, type(message).__name__, _decided(message), send.fds]
        hasher.update(msgspec.msgpack.encode(said))
    return hasher.digest()[:8]


def _decided(message: Message) -> dict[str, Any]:
    """All fields: on the wire a default is left out only where it is the same object.

    Without what the core was told beside its stimuli: where the metrics are.
    """
    if isinstance(message, StatusIs):
        message = msgspec.structs.replace(message, report=replace(message.report, metrics_url=""))
    return msgspec.structs.asdict(message)


def ending(why: str) -> bytes:
    """The last entry of a log that could not be kept any further."""
    packed: bytes = msgpack.packb({"ended": why})
    return packed


def read(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The entries of a log; an entry that a crash cut short ends it. Those of `ending` are left out."""
    for entry in msgpack.Unpacker(stream, max_buffer_size=1 << 30):
        if not (isinstance(entry, dict) and "ended" in entry):
            yield entry


def replay(
    entries: Iterable[dict[str, Any]],
    make_host: Callable[[Origin], HostMemory],
    make_policies: Callable[[], Policies],
    secret: bytes,
) -> int:
    """Give new cores the logged stimuli, one for each start of the node; answers how many stimuli.

    Raises KvtierError at the first difference, and for what is not a log.
    """
    core: NodeCore | None = None
    steps = 0
    for entry in entries:
        if "origin" in entry:
            core = _make_core(msgspec.convert(entry["origin"], Origin), make_host, make_policies, secret)
            continue
        if core is None:
            raise KvtierError("the log does not begin with the start of a node")
        if digest(core.handle(entry["at_s"], unpack(entry))) != entry["sends"]:
            raise KvtierError(f"step {steps} of the log gave other instructions: {entry['kind']}")
        steps += 1
    return steps


def _make_core(
    origin: Origin,
    make_host: Callable[[Origin], HostMemory],
    make_policies: Callable[[], Policies],
    secret: bytes,
) -> NodeCore:
    if hashlib.sha256(secret).hexdigest() != origin.secret_digest:
        raise KvtierError("the log was written under another secret", fix="give that node's secret file")
    return NodeCore(
        origin.settings,
        make_host(origin),
        make_policies(),
        secret,
        random.Random(origin.seed),
        epoch=origin.epoch,
        arena_bytes=list(origin.arena_bytes),
        generation_slots=origin.generation_slots,
    )

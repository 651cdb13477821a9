"""Messages between a node and its tier services, and a worker's copy channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from kvtier.geometry import CUDA_IPC, Geometry
from kvtier.messages.calls import Message, Mode

if TYPE_CHECKING:
    from kvtier.gpu.engine import CopyResult

Direction: TypeAlias = Literal["gather", "scatter"]


def pool_descriptors(mode: Mode, pool: dict[str, Any]) -> int:
    """How many descriptors come with a worker's pool."""
    return int(mode == "shared" and pool.get("kind") != CUDA_IPC)


# --- copies: node <-> GPU service <-> worker ---------------------------------------------------------


class WireItem(msgspec.Struct, frozen=True, array_like=True):
    """One object to copy: see kvtier.gpu.engine.CopyItem, which has the same fields."""

    group: int
    start: int
    tokens: int
    first_valid: int
    slot_id: int
    generation: int
    arena: int
    offset: int
    nbytes: int
    checksum: int | None = None


class Copy(Message, frozen=True, tag="copy"):
    """Move these objects between the pages bound to `request` and their slots.

    fidelity: 'exact', or the lossy codec that the slots' bytes are in.  events: as in Park and Restore.
    layers: as in Restore.  over: restores of this worker with `layers` that ended since its last Copy:
    nothing of theirs comes any more.
    """

    job: str
    batch: int
    worker: str
    request: int
    direction: Direction
    items: list[WireItem]
    verify: bool = True
    checksums: bool = True
    pages: list[bytes] = []
    last: bool = False
    fidelity: str = "exact"
    events: list[int] = []
    layers: bool = False
    over: list[str] = []


class Copied(Message, frozen=True, tag="copied"):
    """A batch ended. checksums: by item, gather only. failed: (index of the item, reason).

    error_squares, value_squares: of a gather under a lossy codec, sums over the values that were encoded.
    """

    job: str
    batch: int
    ok: bool
    checksums: list[int | None] = []
    failed: list[tuple[int, str]] = []
    bytes: int = 0
    seconds: float = 0.0
    error_squares: float = 0.0
    value_squares: float = 0.0

    @classmethod
    def of(cls, result: CopyResult) -> Copied:
        """What an engine's result says to the node."""
        return cls(
            job=result.job,
            batch=result.batch,
            ok=result.ok,
            checksums=list(result.checksums),
            failed=list(result.failed),
            bytes=result.bytes,
            seconds=result.seconds,
            error_squares=result.loss.error_squares,
            value_squares=result.loss.value_squares,
        )


class CancelCopies(Message, frozen=True, tag="cancel_copies"):
    """Batches of the job that have not begun never will; each is answered by Copied with ok=False."""

    job: str


class PoolJoined(Message, frozen=True, tag="pool_joined"):
    """A worker attached; in 'shared' mode its pool's descriptors come with it."""

    worker: str
    geometry: Geometry
    mode: Mode
    layout: str = ""
    pool_pages: int = 0
    pool: dict[str, Any] = {}


class ProbePool(Message, frozen=True, tag="probe_pool"):
    """A worker whose pool on a GPU is to be mapped: a pattern of its own lies in these scratch pages."""

    pages: list[int]
    nonce: bytes


class PoolProbed(Message, frozen=True, tag="pool_probed"):
    """Answer to ProbePool: digests of what was read there, and of what was written then; or why not.

    events: handles of the service's events, which the worker's streams wait for; see LayerQueued.
    """

    ok: bool
    seen: bytes = b""
    written: bytes = b""
    detail: str = ""
    events: list[bytes] = []


class PoolProven(Message, frozen=True, tag="pool_proven"):
    """The worker's word that each side reads what the other wrote: only then the mapping is used."""

    ok: bool


class LayerQueued(Message, frozen=True, tag="layer_queued"):
    """To a worker for which the service copies: all copies of a layer of its restore are queued.

    event: the number in the service's ring of what they end by; None where they have ended already.
    """

    request: int
    layer: int
    event: int | None = None


class PoolLeft(Message, frozen=True, tag="pool_left"):
    """The worker's process ended or detached."""

    worker: str


class GpuUsage(Message, frozen=True, tag="gpu_usage"):
    """Sent by the GPU service when it changes, of the pools on GPUs that it maps.

    workers: GPU bytes that copying takes, for each.  context_bytes: of the service's CUDA contexts, on top; 0
    where nothing tells it.  late: workers with a copy that should have ended long ago.  unmapping: workers
    that left, and whose pools should have been unmapped long ago.
    """

    workers: dict[str, int] = {}
    context_bytes: int = 0
    late: list[str] = []
    unmapping: list[str] = []


class TierHello(Message, frozen=True, tag="tier_hello"):
    """A tier service is ready. address: the GPU service's socket. pid: of its process."""

    pid: int
    address: str = ""
    capacity_bytes: int = 0
    detail: str = ""


class Arenas(Message, frozen=True, tag="arenas"):
    """To a tier service; descriptors beside it: the arenas in order, then the generation table.

    takes_gpu_usage: the node understands GpuUsage.
    """

    arena_bytes: list[int]
    generation_slots: int
    takes_gpu_usage: bool = False


# --- disk: node <-> disk service ---------------------------------------------------------------------


class WireMeta(msgspec.Struct, frozen=True, array_like=True):
    """An ObjectMeta; `root` is an index into the roots of the same message."""

    block_key: bytes
    group: int
    shard: str
    root: int
    parent_key: bytes
    start: int
    tokens: int
    first_valid: int
    nbytes: int
    checksum: int | None = None


class WireRoot(msgspec.Struct, frozen=True, array_like=True):
    """A Root."""

    key: bytes
    tenant: str
    fingerprint: bytes
    fidelity: str
    block_tokens: int


class WireRecord(msgspec.Struct, frozen=True, array_like=True):
    """A conversation's record as the index keeps it; data b'' removes it."""

    tenant: str
    conversation: str
    version: int
    data: bytes


class Announce(Message, frozen=True, tag="announce"):
    """What the disk holds, in batches after its start; `last` ends it."""

    roots: list[WireRoot] = []
    metas: list[WireMeta] = []
    records: list[WireRecord] = []
    models: list[tuple[bytes, str]] = []
    last: bool = False


class DiskWrite(Message, frozen=True, tag="disk_write"):
    """Write objects from host slots, then the records, with one flush for all.

    spill: nobody waits for it, so that every other write goes first.  codecs: for each object the lossless
    codec that was asked for, '' for the node's own; [] when nothing was asked.  item_bytes: for each root,
    how wide the numbers in its payloads are; 0 where the node does not know.
    """

    job: str
    roots: list[WireRoot]
    metas: list[WireMeta]
    slots: list[WireItem]
    records: list[WireRecord] = []
    models: list[tuple[bytes, str]] = []
    spill: bool = False
    codecs: list[str] = []
    item_bytes: list[int] = []


class DiskWritten(Message, frozen=True, tag="disk_written"):
    """Answer to DiskWrite: durable, or nothing of it; reason is one of receipts.Reason.

    retry_after_s: with reason 'wear', when the drive may be written so much again; None: never.
    """

    job: str
    ok: bool
    reason: str = ""
    detail: str = ""
    bytes: int = 0
    seconds: float = 0.0
    retry_after_s: float | None = None


class DiskRead(Message, frozen=True, tag="disk_read"):
    """Read objects into host slots."""

    job: str
    batch: int
    object_keys: list[tuple[bytes, int, str]]
    slots: list[WireItem]


class DiskReadDone(Message, frozen=True, tag="disk_read_done"):
    """Answer to DiskRead. failed: (index, 'corrupt' or 'missing' or 'disk_error')."""

    job: str
    batch: int
    failed: list[tuple[int, str]] = []
    bytes: int = 0
    seconds: float = 0.0


class DiskRemove(Message, frozen=True, tag="disk_remove"):
    """Remove objects and records, durably when `durable` is set."""

    job: str
    object_keys: list[tuple[bytes, int, str]]
    records: list[WireRecord] = []
    durable: bool = False


class DiskRemoved(Message, frozen=True, tag="disk_removed"):
    """Answer to DiskRemove."""

    job: str
    ok: bool
    detail: str = ""


class DiskUsage(Message, frozen=True, tag="disk_usage"):
    """Sent by the disk service after each change, and when its health changes.

    written_bytes: to the drive, headers and padding included, of which user_bytes were payload.  flushes:
    of files.  scrub_*: what the background check read, found bad, and how often it came to the end.
    wear_limit_bytes: bytes that may be written in any day, 0 for no bound; wear_left_bytes: now.  crowded:
    others have filled the file system.
    """

    capacity_bytes: int
    used_bytes: int
    objects: int
    quarantined: int
    written_bytes: int
    state: Literal["ready", "degraded"] = "ready"
    detail: str = ""
    user_bytes: int = 0
    flushes: int = 0
    direct_io: bool = True
    scrub_bytes: int = 0
    scrub_bad: int = 0
    scrub_passes: int = 0
    wear_limit_bytes: int = 0
    wear_left_bytes: int = 0
    crowded: bool = False

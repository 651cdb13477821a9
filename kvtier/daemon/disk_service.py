"""The disk tier's service: carries out what the node asks, on its own store and the node's host memory."""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from kvtier import paths
from kvtier.breaker import Backoff
from kvtier.config import Config
from kvtier.daemon.joining import join_node
from kvtier.disk.fileops import FileOps
from kvtier.disk.index import ConversationRecord
from kvtier.disk.tier import DiskTier
from kvtier.errors import (
    CorruptObject,
    KvtierError,
    ObjectExists,
    ProtocolError,
    TierError,
    TierFull,
)
from kvtier.host.arena import ArenaView
from kvtier.messages import Message
from kvtier.node.wire import pack_metas, unpack_metas
from kvtier.objects import ObjectId
from kvtier.tier import Slot
from kvtier.tier_messages import (
    Announce,
    DiskRead,
    DiskReadDone,
    DiskRemove,
    DiskRemoved,
    DiskUsage,
    DiskWrite,
    DiskWritten,
    TierHello,
    WireItem,
    WireRecord,
)
from kvtier.wire import Channel, ChannelLost, close_all

log = logging.getLogger(__name__)

_ANNOUNCE_OBJECTS = 2000
_CALL_S = 10.0
# The wait for the node's next message is bounded so that `stop` is noticed, and a sick drive tried again.
_LISTEN_MS = 500
# Jobs of one kind under way at once; the tier bounds the requests in flight.  Writes that come together
# share a flush, so it takes many of them to make small parks cheap.
_WRITE_JOBS, _READ_JOBS = 16, 4
# The node is on the same machine, and is back in about a second.
RECONNECT = Backoff(first_s=0.02, limit_s=0.5)
_MODELS_KEY = "models"
_NO_MODELS = b"\x90"


@dataclass(frozen=True, slots=True)
class _Session:
    """One connection to a node, and its host memory."""

    channel: Channel
    arena: ArenaView
    lock: threading.Lock

    def send(self, message: Message) -> None:
        with self.lock:
            self.channel.send(message, time.monotonic() + _CALL_S)


class DiskService:
    """Owns the store at disk.directory and serves the node of the same runtime_dir."""

    def __init__(self, config: Config, ops: FileOps | None = None) -> None:
        """ops: the system calls of the store; the real ones by default."""
        self._config = config
        self._ops = ops
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-disk", daemon=True)
        self._failure = ""
        self._connected = False
        self._attempts = 0
        self._degraded = ""
        self._models: dict[bytes, str] = {}
        self._models_lock = threading.Lock()

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store and return. Raises KvtierError when it cannot be used."""
        settings = self._config.disk
        self._tier = DiskTier(
            Path(self._config.disk_directory),
            settings.capacity_bytes,
            segment_bytes=settings.segment_bytes,
            direct=settings.direct_io != "off",
            ops=self._ops,
        )
        self._models = dict(msgpack.unpackb(self._tier.state(_MODELS_KEY) or _NO_MODELS))
        if settings.scrub_bytes_per_s:
            self._tier.start_scrub(settings.scrub_bytes_per_s)
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Finish what runs, within the time, and close the store."""
        self._stopping.set()
        self._thread.join(grace_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the service ended within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def health(self) -> dict[str, Any]:
        """Alive, and serving a node."""
        return {"alive": self._thread.is_alive(), "ready": self._connected, "failure": self._failure}

    def _run(self) -> None:
        path = str(paths.node_socket(self._config.node.runtime_dir))
        try:
            while not self._stopping.is_set():
                try:
                    self._serve(path)
                except (KvtierError, OSError) as error:
                    self._failure = str(error)
                    log.info("the node is not there: %s", error)
                self._connected = False
                self._attempts += 1
                self._stopping.wait(RECONNECT.delay_s(self._attempts, random.random()))
        finally:
            self._tier.close()

    def _serve(self, path: str) -> None:
        """One session, until the node goes away or the service stops."""
        session = self._open(path)
        writers = ThreadPoolExecutor(_WRITE_JOBS, thread_name_prefix="kvtier-disk-job")
        readers = ThreadPoolExecutor(_READ_JOBS, thread_name_prefix="kvtier-disk-read-job")
        try:
            self._announce(session)
            self._connected, self._failure, self._attempts = True, "", 0
            self._listen(session, writers, readers)
        finally:
            # Host memory stays mapped until no write or read touches it.
            writers.shutdown()
            readers.shutdown()
            session.channel.close()
            session.arena.close()

    def _open(self, path: str) -> _Session:
        greeting = TierHello(pid=os.getpid(), capacity_bytes=self._config.disk.capacity_bytes)
        channel, arena = join_node(path, "disk", greeting, _CALL_S)
        return _Session(channel, arena, threading.Lock())

    def _listen(self, session: _Session, writers: ThreadPoolExecutor, readers: ThreadPoolExecutor) -> None:
        jobs: dict[type[Message], Callable[[Any], None]] = {
            DiskWrite: lambda m: _submit(writers, self._write, session, m),
            DiskRead: lambda m: _submit(readers, self._read, session, m),
            # In the order of arrival: what follows may count on the room.
            DiskRemove: lambda m: self._remove(session, m),
        }
        poll = select.poll()
        poll.register(session.channel.fileno(), select.POLLIN)
        while not self._stopping.is_set():
            # Once before any wait: a message may have come together with the arenas.
            for message, fds in session.channel.recv_ready():
                close_all(fds)
                job = jobs.get(type(message))
                if job is None:
                    raise ProtocolError(f"the disk service does not take {type(message).__name__}")
                job(message)
            if not poll.poll(_LISTEN_MS) and self._degraded:
                self._try_again(session)

    # --- announcing -------------------------------------------------------------------------------------

    def _announce(self, session: _Session) -> None:
        session.send(self._usage())
        for metas in self._tier.object_batches(_ANNOUNCE_OBJECTS):
            roots, wire_metas = pack_metas(metas)
            session.send(Announce(roots=roots, metas=wire_metas))
        for records in self._tier.record_batches(_ANNOUNCE_OBJECTS):
            wire = [WireRecord(r.tenant, r.conversation, r.version, r.data) for r in records]
            session.send(Announce(records=wire))
        session.send(Announce(models=sorted(self._models.items()), last=True))

    def _usage(self) -> DiskUsage:
        usage, stats = self._tier.usage(), self._tier.stats()
        return DiskUsage(
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            objects=usage.objects,
            quarantined=usage.quarantined,
            written_bytes=stats.device_bytes,
            state="degraded" if self._degraded else "ready",
            detail=self._degraded or ("" if stats.direct_io else "without O_DIRECT"),
        )

    def _try_again(self, session: _Session) -> None:
        """Whether a drive that refused a write takes one by now."""
        try:
            self._tier.commit_with_records([], [], {"tried_at": str(time.time()).encode()})
        except (TierError, OSError):
            return
        self._degraded = ""
        session.send(self._usage())

    # --- writing ----------------------------------------------------------------------------------------

    def _write(self, session: _Session, message: DiskWrite) -> None:
        begun_s = time.monotonic()
        reason, detail, nbytes = "", "", 0
        try:
            nbytes = self._write_all(session, message)
        except TierFull as error:
            reason, detail = "disk_full", str(error)
        except (TierError, OSError) as error:
            reason, detail = "disk_error", str(error)
            self._degraded = detail
        answer = DiskWritten(
            job=message.job,
            ok=not reason,
            reason=reason,
            detail=detail,
            bytes=nbytes,
            seconds=time.monotonic() - begun_s,
        )
        session.send(answer)
        session.send(self._usage())

    def _write_all(self, session: _Session, message: DiskWrite) -> int:
        """Data, one flush, then index with the records; all or none."""
        reserved: list[tuple[Slot, WireItem]] = []
        try:
            for meta, item in zip(unpack_metas(message.roots, message.metas), message.slots, strict=True):
                try:
                    reserved.append((self._tier.reserve(meta, holder=message.job), item))
                except ObjectExists:
                    continue
            writes = [(slot, session.arena.view((i.arena, i.offset), i.nbytes)) for slot, i in reserved]
            for future in self._tier.write_many(writes):
                future.result()
            sums = [(slot, item.checksum or 0) for slot, item in reserved]
            records = [ConversationRecord(*_fields(r)) for r in message.records]
            self._tier.commit_with_records(sums, records, self._with_models(message.models))
        except BaseException:
            for slot, _ in reserved:
                self._tier.abort(slot, quiet=True)
            raise
        return sum(slot.nbytes for slot, _ in reserved)

    def _with_models(self, models: Sequence[tuple[bytes, str]]) -> dict[str, bytes]:
        """What to keep of the models' names: nothing, when they are known."""
        with self._models_lock:
            if all(self._models.get(fingerprint) == name for fingerprint, name in models):
                return {}
            self._models.update(models)
            return {_MODELS_KEY: msgpack.packb(sorted(self._models.items()))}

    # --- reading and removing ---------------------------------------------------------------------------

    def _read(self, session: _Session, message: DiskRead) -> None:
        begun_s = time.monotonic()
        failed: dict[int, str] = {}
        reads: list[tuple[int, Slot, Any]] = []
        for index, (key, item) in enumerate(zip(message.object_keys, message.slots, strict=True)):
            slot = self._tier.find(ObjectId(*key))
            if slot is None or slot.nbytes != item.nbytes:
                failed[index] = "missing"
            else:
                reads.append((index, slot, session.arena.view((item.arena, item.offset), item.nbytes)))
        futures = self._tier.read_many([(slot, view) for _, slot, view in reads])
        for (index, _, _), future in zip(reads, futures, strict=True):
            try:
                future.result()
            except CorruptObject:
                failed[index] = "corrupt"
            except (TierError, OSError):
                failed[index] = "disk_error"
        nbytes = sum(slot.nbytes for index, slot, _ in reads if index not in failed)
        answer = DiskReadDone(
            job=message.job,
            batch=message.batch,
            failed=sorted(failed.items()),
            bytes=nbytes,
            seconds=time.monotonic() - begun_s,
        )
        session.send(answer)
        if failed:
            session.send(self._usage())

    def _remove(self, session: _Session, message: DiskRemove) -> None:
        detail = ""
        try:
            for key in message.object_keys:
                self._tier.remove(ObjectId(*key))
            records = [ConversationRecord(*_fields(r)) for r in message.records]
            if records or message.durable:
                self._tier.commit_with_records([], records, forget=message.durable)
        except (TierError, OSError) as error:
            detail = str(error)
        session.send(DiskRemoved(job=message.job, ok=not detail, detail=detail))
        session.send(self._usage())


def _fields(record: WireRecord) -> tuple[str, str, int, bytes]:
    return record.tenant, record.conversation, record.version, record.data


def _submit(
    pool: ThreadPoolExecutor, work: Callable[[_Session, Any], None], session: _Session, message: Message
) -> None:
    def run() -> None:
        try:
            work(session, message)
        except ChannelLost as error:
            # Part of an answer may have gone: nothing more can be said over this connection.
            log.info("the node could not be answered: %s", error)
            session.channel.shutdown()
        except BaseException:
            # The node would wait for an answer for ever; without the connection it knows.
            log.exception("%s was not carried out", type(message).__name__)
            session.channel.shutdown()
            raise

    pool.submit(run)

"""The disk tier's service: carries out what the node asks, on its own store and the node's host memory."""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier import paths
from kvtier.breaker import Backoff
from kvtier.config import Config
from kvtier.daemon.disk_wear import WearMeter
from kvtier.daemon.disk_writes import DiskWriter, record_of
from kvtier.daemon.joining import join_node
from kvtier.disk.fileops import FileOps
from kvtier.disk.ledger import room_for
from kvtier.disk.master_key import read_master_key
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.errors import (
    CorruptObject,
    KvtierError,
    ProtocolError,
    StaleSlot,
    TierError,
    TierFull,
    TierUnavailable,
)
from kvtier.host.arena import ArenaView
from kvtier.messages import Message
from kvtier.node.wire import pack_metas
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta, Root
from kvtier.tier import Slot
from kvtier.tier_messages import (
    Announce,
    DiskRead,
    DiskReadDone,
    DiskRemove,
    DiskRemoved,
    DiskUsage,
    DiskWrite,
    TierHello,
    WireRecord,
)
from kvtier.wire import Channel, ChannelLost, close_all

log = logging.getLogger(__name__)

_ANNOUNCE_OBJECTS = 2000
_CALL_S = 10.0
# The wait for the node's next message is bounded so that `stop` is noticed, and a sick drive tried again.
_LISTEN_MS = 500
# Jobs of one kind under way at once, each kind in threads of its own: a read waits for no write, and a write
# that somebody waits for waits for no spill.  Writes that come together share a flush, so it takes many of
# them to make small parks cheap.
_WRITE_JOBS, _READ_JOBS, _SPILL_JOBS = 16, 4, 2
# The node is on the same machine, and is back in about a second.
RECONNECT = Backoff(first_s=0.02, limit_s=0.5)


# Written, and never listed, to see whether a drive works.
_PROBE = ObjectMeta(
    ObjectId(b"\0" * KEY_BYTES, 0, "probe"),
    Root(b"\0" * KEY_BYTES, "", b"\0" * KEY_BYTES, "exact", 16),
    b"\0" * KEY_BYTES,
    0,
    16,
    0,
    1,
)
_PROBE_ROOM_BYTES = room_for(_PROBE.nbytes)


class _StoreGone(TierUnavailable):
    """The store's folder was deleted."""

    def __init__(self) -> None:
        super().__init__("the folder of the disk tier was deleted")


@dataclass(slots=True)
class _Session:
    """One connection to a node, and its host memory. said: the counts that it knows."""

    channel: Channel
    arena: ArenaView
    lock: threading.Lock
    said: DiskUsage | None = None

    def send(self, message: Message) -> None:
        with self.lock:
            self.channel.send(message, time.monotonic() + _CALL_S)

    def say(self, usage: DiskUsage) -> None:
        self.said = usage
        self.send(usage)


class _Lanes:
    """Threads for each kind of job."""

    def __init__(self) -> None:
        self.writes = ThreadPoolExecutor(_WRITE_JOBS, thread_name_prefix="kvtier-disk-job")
        self.spills = ThreadPoolExecutor(_SPILL_JOBS, thread_name_prefix="kvtier-disk-spill-job")
        self.reads = ThreadPoolExecutor(_READ_JOBS, thread_name_prefix="kvtier-disk-read-job")
        # Removals and looking after a sick drive: one after the other.
        self.rest = ThreadPoolExecutor(1, thread_name_prefix="kvtier-disk-rest-job")

    def close(self) -> None:
        """Return when nothing of them runs."""
        for lane in (self.writes, self.spills, self.reads, self.rest):
            lane.shutdown()


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
        self._trying = threading.Lock()
        self._directory = Path(config.disk_directory)

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store and return. Raises KvtierError when it cannot be used."""
        self._open_store()
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

    def _open_store(self, worn: bytes = b"") -> None:
        """worn: what the drive was written, when a store of it was here before."""
        settings = self._config.disk
        tier = DiskTier(
            self._directory,
            settings.capacity_bytes,
            segment_bytes=settings.segment_bytes,
            direct=settings.direct_io != "off",
            ops=self._ops,
            open_vault=self._open_vault if settings.key_file else None,
        )
        try:
            self._meter = WearMeter(tier, settings.written_bytes_per_day, worn)
            self._writer = DiskWriter(tier, self._meter, settings.codec)
            self._place = self._find_place()
        except BaseException:
            tier.close()
            raise
        self._tier = tier
        if settings.scrub_bytes_per_s:
            tier.start_scrub(settings.scrub_bytes_per_s)

    def _open_vault(self, store_id: bytes) -> Vault:
        master_key = read_master_key(Path(self._config.disk.key_file))
        return Vault(Path(self._config.keys_directory), store_id, master_key, ops=self._ops)

    def _close_store(self) -> None:
        self._meter.close()
        self._tier.close()

    def _find_place(self) -> tuple[int, int] | None:
        """Device and number of the store's folder; None when it is not there."""
        try:
            found = os.stat(self._directory)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _run(self) -> None:
        path = str(paths.node_socket(self._config.node.runtime_dir))
        try:
            while not self._stopping.is_set():
                try:
                    self._serve(path)
                except _StoreGone:
                    self._begin_anew()
                except (KvtierError, OSError) as error:
                    self._failure = str(error)
                    log.info("the node is not there: %s", error)
                self._connected = False
                self._attempts += 1
                self._stopping.wait(RECONNECT.delay_s(self._attempts, random.random()))
        finally:
            self._close_store()

    def _begin_anew(self) -> None:
        """The folder was deleted, and its drive is still there: go on with an empty one."""
        log.error("%s was deleted: the disk tier begins with nothing", self._directory)
        worn = self._meter.state()
        self._close_store()
        while not self._stopping.is_set():
            try:
                self._open_store(worn)
            except KvtierError as error:
                self._failure = str(error)
                log.error("the disk tier cannot begin anew: %s", error)
                self._stopping.wait(RECONNECT.limit_s)
            else:
                self._degraded = ""
                return

    def _serve(self, path: str) -> None:
        """One session, until the node goes away or the service stops."""
        session = self._open(path)
        lanes = _Lanes()
        try:
            self._announce(session)
            self._connected, self._failure, self._attempts = True, "", 0
            self._listen(session, lanes)
        finally:
            # Host memory stays mapped until no write or read touches it.
            lanes.close()
            session.channel.close()
            session.arena.close()

    def _open(self, path: str) -> _Session:
        greeting = TierHello(pid=os.getpid(), capacity_bytes=self._config.disk.capacity_bytes)
        channel, arena = join_node(path, "disk", greeting, _CALL_S)
        return _Session(channel, arena, threading.Lock())

    def _listen(self, session: _Session, lanes: _Lanes) -> None:
        """Hand everything to its lane: nothing here waits for the drive, so no read waits for a write."""
        poll = select.poll()
        poll.register(session.channel.fileno(), select.POLLIN)
        look_at_s = 0.0
        while not self._stopping.is_set():
            # Once before any wait: a message may have come together with the arenas.
            for message, fds in session.channel.recv_ready():
                close_all(fds)
                self._begin(session, lanes, message)
            poll.poll(_LISTEN_MS)
            if time.monotonic() >= look_at_s:
                self._look_after(session, lanes)
                look_at_s = time.monotonic() + _LISTEN_MS / 1000

    def _begin(self, session: _Session, lanes: _Lanes, message: Message) -> None:
        if isinstance(message, DiskRead):
            _submit(lanes.reads, self._read, session, message)
        elif isinstance(message, DiskWrite):
            _submit(lanes.spills if message.spill else lanes.writes, self._write, session, message)
        elif isinstance(message, DiskRemove):
            # In the order of arrival: what follows may count on the room.  The index hears of it later.
            for key in message.object_keys:
                self._tier.remove(ObjectId(*key))
            _submit(lanes.rest, self._remove, session, message)
        else:
            raise ProtocolError(f"the disk service does not take {type(message).__name__}")

    # --- health -----------------------------------------------------------------------------------------

    def _look_after(self, session: _Session, lanes: _Lanes) -> None:
        """What changes by itself: counts, the drive's bound, and whether a sick drive is well again."""
        place = self._find_place()
        if place != self._place:
            above = self._directory.parent
            if place is None and self._place is not None and _device(above) == self._place[0]:
                raise _StoreGone
            self._degraded = f"{self._directory} is not the folder any more that was opened"
        usage = self._usage()
        if session.said != usage:
            session.say(usage)
        if self._degraded and not self._trying.locked():
            _submit(lanes.rest, self._try_again, session, usage)

    def _try_again(self, session: _Session, _: DiskUsage) -> None:
        """Whether a drive that refused a write takes one by now: a block that is not listed, and a line."""
        with self._trying:
            if self._find_place() != self._place or self._meter.reserve(_PROBE_ROOM_BYTES):
                return
            try:
                self._write_probe()
                self._tier.commit_with_records([], [], {"tried_at": str(time.time()).encode()})
            except (TierError, OSError) as error:
                log.info("the drive does not work yet: %s", error)
                return
            finally:
                self._meter.settle(_PROBE_ROOM_BYTES, whole=True)
            self._degraded = ""
        log.info("the drive works again")
        session.say(self._usage())

    def _write_probe(self) -> None:
        """Write a block that is never listed. A store without room for it is not sick."""
        try:
            slot = self._tier.reserve(_PROBE, holder="probe")
        except TierFull:
            return
        try:
            self._tier.write(slot, bytes(_PROBE.nbytes))
        finally:
            self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        try:
            self._tier.abort(slot, quiet=True)
        except StaleSlot:
            # A write that failed has given it up.
            return

    # --- announcing -------------------------------------------------------------------------------------

    def _announce(self, session: _Session) -> None:
        session.say(self._usage())
        for metas in self._tier.object_batches(_ANNOUNCE_OBJECTS):
            roots, wire_metas = pack_metas(metas)
            session.send(Announce(roots=roots, metas=wire_metas))
        for records in self._tier.record_batches(_ANNOUNCE_OBJECTS):
            wire = [WireRecord(r.tenant, r.conversation, r.version, r.data) for r in records]
            session.send(Announce(records=wire))
        session.send(Announce(models=sorted(self._writer.models.items()), last=True))

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
            user_bytes=stats.user_bytes,
            flushes=stats.flushes,
            direct_io=stats.direct_io,
            scrub_bytes=stats.scrub_bytes,
            scrub_bad=stats.scrub_bad,
            scrub_passes=stats.scrub_passes,
            wear_limit_bytes=self._meter.bytes_per_day,
            wear_left_bytes=self._meter.left_bytes(),
        )

    # --- writing ----------------------------------------------------------------------------------------

    def _write(self, session: _Session, message: DiskWrite) -> None:
        answer = self._writer.carry_out(session.arena, message)
        if answer.reason == "disk_error":
            self._degraded = answer.detail
        session.send(answer)
        session.say(self._usage())

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
            session.say(self._usage())

    def _remove(self, session: _Session, message: DiskRemove) -> None:
        detail = ""
        try:
            records = [record_of(record) for record in message.records]
            if records or message.durable:
                self._tier.commit_with_records([], records, forget=message.durable)
        except (TierError, OSError) as error:
            detail = str(error)
        session.send(DiskRemoved(job=message.job, ok=not detail, detail=detail))
        session.say(self._usage())


def _device(path: Path) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None


def _submit(
    pool: ThreadPoolExecutor,
    work: Callable[[_Session, Any], None],
    session: _Session,
    message: Message,
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

"""The disk tier's service: carries out what the node asks, on its own store and the node's host memory."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from kvtier import paths
from kvtier.breaker import CHANCE, Backoff
from kvtier.config.load import Config
from kvtier.daemon.disk_lanes import Lanes, Session
from kvtier.daemon.disk_probe import PROBE_ROOM_BYTES, check_direct_io, write_probe
from kvtier.daemon.disk_wear import WearMeter
from kvtier.daemon.disk_writes import DiskWriter, record_of
from kvtier.daemon.joining import join_node
from kvtier.disk.codecs import CodecMissing
from kvtier.disk.fileops import FileOps, OsFileOps
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
from kvtier.messages.calls import Message
from kvtier.messages.tiers import (
    Announce,
    DiskRead,
    DiskReadDone,
    DiskRemove,
    DiskRemoved,
    DiskUsage,
    DiskWrite,
    DiskWritten,
    TierHello,
    WireRecord,
)
from kvtier.messages.wire import close_all
from kvtier.node.disk_reads import DISK_LEASE_S
from kvtier.node.wire import pack_metas
from kvtier.objects import ObjectId
from kvtier.tier import Slot

log = logging.getLogger(__name__)

_ANNOUNCE_OBJECTS = 2000
_CALL_S = 10.0
# The wait for the node's next message is bounded so that `stop` is noticed, and a sick drive tried again.
_LISTEN_MS = 500
# The node is on the same machine, and is back in about a second.
RECONNECT = Backoff(first_s=0.02, limit_s=0.5)
# A drive that is at one job for longer than this is taken for one that hangs: by then the node has taken the
# job's right to its slots back.
_HUNG_S = DISK_LEASE_S


class _StoreGone(TierUnavailable):
    """The store's folder was deleted, or what is in it."""

    def __init__(self) -> None:
        super().__init__("the folder of the disk tier was deleted or emptied")


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
        self._lanes: Lanes | None = None
        self._degraded = ""
        # Held from when a try is asked for until it has ended: behind a job that hangs waits one.
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
        """Alive, and serving a node. oldest_job_s: how long the oldest job has been under way, or 0."""
        lanes = self._lanes
        oldest = lanes.oldest() if lanes is not None else None
        return {
            "alive": self._thread.is_alive(),
            "ready": self._connected,
            "failure": self._failure or self._hanging(),
            "oldest_job_s": oldest.age_s if oldest is not None else 0.0,
        }

    def _open_store(self, worn: bytes = b"", new_id: bytes = b"") -> None:
        """worn: what the drive was written, when a store of it was here before.  new_id: see DiskTier."""
        settings = self._config.disk
        tier = DiskTier(
            self._directory,
            settings.capacity_bytes,
            segment_bytes=settings.segment_bytes,
            direct=settings.direct_io != "off",
            ops=self._ops,
            open_vault=self._open_vault if settings.key_file else None,
            new_id=new_id,
        )
        try:
            if settings.direct_io == "on":
                check_direct_io(self._directory, self._ops or OsFileOps())
            self._meter = WearMeter(tier, settings.written_bytes_per_day, worn)
            self._writer = DiskWriter(tier, self._meter, settings.codec)
            self._place = self._find_place()
        except BaseException:
            tier.close()
            raise
        self._tier = tier
        tier.make_room_ahead()
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
                self._stopping.wait(RECONNECT.delay_s(self._attempts, CHANCE()))
        finally:
            self._close_store()

    def _begin_anew(self) -> None:
        """The folder was deleted or emptied, and its drive is still there: go on with what is there."""
        log.error("%s was deleted or emptied: the disk tier begins anew", self._directory)
        worn = self._meter.state()
        # The key store knows its store by this.
        new_id = self._tier.store_id if self._config.disk.key_file else b""
        self._close_store()
        while not self._stopping.is_set():
            try:
                self._open_store(worn, new_id)
            except KvtierError as error:
                if self._failure != str(error):
                    log.error("the disk tier cannot begin anew: %s", error)
                self._failure = str(error)
                self._stopping.wait(RECONNECT.limit_s)
            else:
                self._degraded = ""
                return

    def _serve(self, path: str) -> None:
        """One session, until the node goes away or the service stops."""
        session = self._open(path)
        self._lanes = lanes = Lanes()
        try:
            self._announce(session)
            self._connected, self._failure, self._attempts = True, "", 0
            self._listen(session, lanes)
        finally:
            # Host memory stays mapped until no write or read touches it.
            lanes.close()
            self._lanes = None
            session.channel.close()
            session.arena.close()

    def _open(self, path: str) -> Session:
        greeting = TierHello(pid=os.getpid(), capacity_bytes=self._config.disk.capacity_bytes)
        channel, arena, _ = join_node(path, "disk", greeting, _CALL_S)
        return Session(channel, arena, threading.Lock())

    def _listen(self, session: Session, lanes: Lanes) -> None:
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

    def _begin(self, session: Session, lanes: Lanes, message: Message) -> None:
        if isinstance(message, DiskRead):
            lanes.submit("read", self._read, session, message)
        elif isinstance(message, DiskWrite):
            lanes.submit("spill" if message.spill else "write", self._write, session, message)
        elif isinstance(message, DiskRemove):
            # In the order of arrival: what follows may count on the room.  The index hears of it later.
            for key in message.object_keys:
                self._tier.remove(ObjectId(*key))
            lanes.submit("rest", self._remove, session, message)
        else:
            raise ProtocolError(f"the disk service does not take {type(message).__name__}")

    # --- health -----------------------------------------------------------------------------------------

    def _look_after(self, session: Session, lanes: Lanes) -> None:
        """What changes by itself: counts, the drive's bound, and whether a sick drive is well again."""
        place = self._find_place()
        gone = place is None and self._place is not None and _device(self._directory.parent) == self._place[0]
        gone = gone or (place == self._place and not self._tier.is_there())
        if gone and not self._tier.was_moved():
            raise _StoreGone
        if gone or place != self._place:
            # What was moved may come back, and an empty store in its place would destroy its blocks' keys.
            self._degraded = f"{self._directory} is not the folder any more that was opened"
        usage = self._usage()
        if session.said != usage:
            session.say(usage)
        if self._degraded and self._trying.acquire(blocking=False):
            lanes.submit("rest", self._try_again, session, usage)

    def _hanging(self) -> str:
        """What has kept the drive busy for too long; '' when nothing has."""
        lanes = self._lanes
        oldest = lanes.oldest() if lanes is not None else None
        if oldest is None or oldest.age_s < _HUNG_S:
            return ""
        return f"the drive does not answer: a {oldest.what} has not ended for {oldest.age_s:.0f} s"

    def _try_again(self, session: Session, _: DiskUsage) -> None:
        try:
            if not self._works():
                return
            self._degraded = ""
        finally:
            self._trying.release()
        log.info("the drive works again")
        session.say(self._usage())

    def _works(self) -> bool:
        """Whether a drive that refused a write takes one by now: a block that is not listed, and a line."""
        if self._find_place() != self._place or self._meter.reserve(PROBE_ROOM_BYTES):
            return False
        try:
            write_probe(self._tier)
            self._tier.commit_with_records([], [], {"tried_at": str(time.time()).encode()})
        except (TierError, OSError) as error:
            log.info("the drive does not work yet: %s", error)
            return False
        finally:
            self._meter.settle(PROBE_ROOM_BYTES, whole=True)
        return True

    # --- announcing -------------------------------------------------------------------------------------

    def _announce(self, session: Session) -> None:
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
        sick = self._degraded or self._hanging()
        return DiskUsage(
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            objects=usage.objects,
            quarantined=usage.quarantined,
            written_bytes=stats.device_bytes,
            state="degraded" if sick else "ready",
            detail=sick or stats.no_room or ("" if stats.direct_io else "without O_DIRECT"),
            user_bytes=stats.user_bytes,
            flushes=stats.flushes,
            direct_io=stats.direct_io,
            scrub_bytes=stats.scrub_bytes,
            scrub_bad=stats.scrub_bad,
            scrub_passes=stats.scrub_passes,
            wear_limit_bytes=self._meter.bytes_per_day,
            wear_left_bytes=self._meter.left_bytes(),
            crowded=bool(stats.no_room),
        )

    # --- writing ----------------------------------------------------------------------------------------

    def _write(self, session: Session, message: DiskWrite) -> None:
        try:
            answer = self._writer.carry_out(session.arena, message)
        except (ValueError, StaleSlot) as error:
            # Of this write alone: its names do not fit, it contradicts itself, or its tenant was forgotten
            # meanwhile.  The drive is not sick.
            log.exception("a write cannot be carried out")
            answer = DiskWritten(job=message.job, ok=False, reason="disk_error", detail=str(error))
        else:
            if answer.reason == "disk_error":
                self._degraded = answer.detail
        session.send(answer)
        session.say(self._usage())

    # --- reading and removing ---------------------------------------------------------------------------

    def _read(self, session: Session, message: DiskRead) -> None:
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
        # Whatever becomes of one: this does not end while another writes to its slot.
        wait(futures)
        for (index, _, _), future in zip(reads, futures, strict=True):
            try:
                future.result()
            except CorruptObject:
                failed[index] = "corrupt"
            except (CodecMissing, StaleSlot):
                # Of this block alone.
                failed[index] = "disk_error"
            except (TierError, OSError) as error:
                failed[index] = "disk_error"
                self._degraded = f"the drive cannot be read: {error}"
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

    def _remove(self, session: Session, message: DiskRemove) -> None:
        detail = ""
        try:
            records = [record_of(record) for record in message.records]
            if records or message.durable:
                self._tier.commit_with_records([], records, forget=message.durable)
        except TierFull as error:
            detail = str(error)
        except (TierError, OSError) as error:
            self._degraded = detail = str(error)
        session.send(DiskRemoved(job=message.job, ok=not detail, detail=detail))
        session.say(self._usage())


def _device(path: Path) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None

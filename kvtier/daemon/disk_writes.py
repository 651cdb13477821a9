"""Carries out DiskWrite: from host memory to the store, within the drive's bound, as its wishes say."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass

import msgpack

from kvtier.daemon.disk_wear import WearMeter
from kvtier.disk.codecs import RAW, CodecMissing, check_codec
from kvtier.disk.codecs.planes import WIDTHS
from kvtier.disk.entry import room_for
from kvtier.disk.index import ConversationRecord
from kvtier.disk.tier import DiskTier
from kvtier.errors import ConfigError, ObjectExists, StaleSlot, TierError, TierFull, TierUnavailable
from kvtier.host.arena import ArenaView
from kvtier.host.sysmem import Bytes
from kvtier.messages.tiers import DiskWrite, DiskWritten, WireRecord
from kvtier.node.wire import unpack_metas
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

log = logging.getLogger(__name__)
# Of one spill so much is on its way at once, a block at least: the blocks of a park get in between.
_SPILL_BLOCKS, _SPILL_BYTES = 16, 4 << 20
_MODELS_KEY = "models"
_USUAL_ITEM_BYTES = 2
_NO_MODELS = b"\x90"


class WornOut(TierUnavailable):
    """The drive was written as much in this day as it may be. retry_after_s: inf when it is never enough."""

    def __init__(self, bytes_per_day: int, retry_after_s: float) -> None:
        super().__init__(f"the drive's bound of {bytes_per_day} bytes a day is reached")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class _Reserved:
    """An object with room on disk, and what of host memory goes there."""

    slot: Slot
    source: Bytes
    checksum: int
    codec: str
    item_bytes: int


class DiskWriter:
    """Writes objects, records and models' names; from any thread.

    codec: for objects whose DiskWrite names none.
    """

    def __init__(self, tier: DiskTier, meter: WearMeter, codec: str) -> None:
        self._tier = tier
        self._meter = meter
        self._codec = codec
        self._lock = threading.Lock()
        self._known_codecs: dict[str, str] = {RAW: RAW}
        self.models: dict[bytes, str] = dict(msgpack.unpackb(tier.state(_MODELS_KEY) or _NO_MODELS))

    def carry_out(self, arena: ArenaView, message: DiskWrite) -> DiskWritten:
        """Do it; the answer to the node, whatever the drive said.

        Raises StaleSlot when its tenant was forgotten meanwhile, and ValueError when it contradicts itself.
        """
        begun_s = time.monotonic()
        reason, detail, nbytes, retry_after_s = "", "", 0, None
        try:
            nbytes = self._write(arena, message)
        except WornOut as error:
            reason, detail = "wear", error.message
            retry_after_s = None if math.isinf(error.retry_after_s) else error.retry_after_s
        except TierFull as error:
            reason, detail = "disk_full", str(error)
        except StaleSlot:
            raise
        except (TierError, OSError) as error:
            reason, detail = "disk_error", str(error)
        return DiskWritten(
            job=message.job,
            ok=not reason,
            reason=reason,
            detail=detail,
            bytes=nbytes,
            seconds=time.monotonic() - begun_s,
            retry_after_s=retry_after_s,
        )

    def _write(self, arena: ArenaView, message: DiskWrite) -> int:
        """Data, one flush, then index with the records; all or none. Answers the payload's bytes."""
        metas = [
            (meta, place)
            for place, meta in enumerate(unpack_metas(message.roots, message.metas))
            if not self._has_all_of(meta)
        ]
        worn_bytes = sum(room_for(meta.nbytes) for meta, _ in metas)
        wait_s = self._meter.reserve(worn_bytes)
        if wait_s:
            raise WornOut(self._meter.bytes_per_day, wait_s)
        reserved: list[_Reserved] = []
        begun = done = False
        try:
            self._reserve(arena, message, metas, reserved)
            begun = True
            self._copy(reserved, spill=message.spill)
            sums = [(each.slot, each.checksum) for each in reserved]
            records = [record_of(record) for record in message.records]
            self._tier.commit_with_records(sums, records, self._with_models(message.models))
            done = True
        except BaseException:
            for each in reserved:
                # A write or commit that failed has given its slots up.
                with suppress(StaleSlot):
                    self._tier.abort(each.slot, quiet=True)
            raise
        finally:
            self._meter.settle(worn_bytes, whole=begun and not done)
        return sum(each.slot.nbytes for each in reserved)

    def _has_all_of(self, meta: ObjectMeta) -> bool:
        """Whether the store has the object with all of its rows; one with fewer is replaced."""
        known = self._tier.meta(meta.object_id)
        return known is not None and known.first_valid <= meta.first_valid

    def _reserve(
        self,
        arena: ArenaView,
        message: DiskWrite,
        metas: Iterable[tuple[ObjectMeta, int]],
        reserved: list[_Reserved],
    ) -> None:
        """Room for all of them; what was there already is left out."""
        for meta, place in metas:
            item = message.slots[place]
            wish = message.codecs[place] if message.codecs else ""
            source = arena.view((item.arena, item.offset), item.nbytes)
            try:
                slot = self._tier.reserve(meta, holder=message.job, replacing=True)
            except ObjectExists:
                continue
            root = message.metas[place].root
            said = message.item_bytes[root] if message.item_bytes else 0
            # Any width decodes to the same bytes: where it is not known, that of most KV.
            width = said if said in WIDTHS else _USUAL_ITEM_BYTES
            reserved.append(_Reserved(slot, source, item.checksum or 0, self._codec_for(wish), width))

    def _copy(self, reserved: Sequence[_Reserved], *, spill: bool) -> None:
        """Write all of them; when one fails, the others have ended too before it is raised."""
        running: deque[Future[None]] = deque()
        try:
            for each in reserved:
                most = max(1, min(_SPILL_BLOCKS, _SPILL_BYTES // each.slot.nbytes))
                while spill and len(running) >= most:
                    running.popleft().result()
                block = [(each.slot, each.source)]
                running += self._tier.write_many(
                    block, codec=each.codec, item_bytes=each.item_bytes, spill=spill
                )
            while running:
                running.popleft().result()
        finally:
            wait(running)

    def _codec_for(self, wish: str) -> str:
        """The codec that is used for a wish: without its package, the bytes go as they are."""
        name = wish or self._codec
        known = self._known_codecs.get(name)
        if known is None:
            try:
                check_codec(name)
                known = name
            except (ConfigError, CodecMissing) as problem:
                log.warning("what asks for the codec %s is stored raw: %s", name, problem)
                known = RAW
            self._known_codecs[name] = known
        return known

    def _with_models(self, models: Sequence[tuple[bytes, str]]) -> Mapping[str, bytes]:
        """What to keep of the models' names: nothing, when they are known."""
        with self._lock:
            if all(self.models.get(fingerprint) == name for fingerprint, name in models):
                return {}
            self.models.update(models)
            return {_MODELS_KEY: msgpack.packb(sorted(self.models.items()))}


def record_of(record: WireRecord) -> ConversationRecord:
    """As the index takes it."""
    return ConversationRecord(record.tenant, record.conversation, record.version, record.data)

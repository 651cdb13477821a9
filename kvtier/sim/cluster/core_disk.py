"""The disk service of a simulated node: what it holds, and when its jobs end."""

from __future__ import annotations

from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.sim.cluster.links import Drive

_UNIT_BYTES = 4096
_Key = tuple[bytes, int, str]


class SimulatedDisk:
    """written: bytes by tenant."""

    def __init__(self, capacity_bytes: int, drive: Drive) -> None:
        self.capacity_bytes, self._drive = capacity_bytes, drive
        self._objects: dict[_Key, int] = {}
        self.used_bytes = 0
        self.written: dict[str, int] = {}

    def carry_out(self, message: m.Message, now_s: float) -> tuple[float, m.Message] | None:
        """(When it is done, what is answered then); None for what needs no answer."""
        if isinstance(message, t.DiskWrite):
            return self._write(message, now_s)
        if isinstance(message, t.DiskRead):
            nbytes = sum(item.nbytes for item in message.slots)
            done_s = self._drive.read(now_s, nbytes)
            missing = [
                (index, "missing")
                for index, (block, group, shard) in enumerate(message.object_keys)
                if (block, group, shard) not in self._objects
            ]
            answer = t.DiskReadDone(
                job=message.job, batch=message.batch, failed=missing, bytes=nbytes, seconds=done_s - now_s
            )
            return done_s, answer
        if isinstance(message, t.DiskRemove):
            for block, group, shard in message.object_keys:
                self.used_bytes -= self._objects.pop((block, group, shard), 0)
            return now_s, t.DiskRemoved(job=message.job, ok=True)
        return None

    def usage(self) -> t.DiskUsage:
        """What the service says of itself after each job."""
        return t.DiskUsage(
            capacity_bytes=self.capacity_bytes,
            used_bytes=self.used_bytes,
            objects=len(self._objects),
            quarantined=0,
            written_bytes=self._drive.written_bytes,
        )

    def _write(self, message: t.DiskWrite, now_s: float) -> tuple[float, m.Message]:
        """Room is taken at once, so that two writes never share it; nothing is written where it lacks."""
        new = {
            (meta.block_key, meta.group, meta.shard): meta
            for meta in message.metas
            if _room_bytes(meta.nbytes) > self._objects.get((meta.block_key, meta.group, meta.shard), 0)
        }
        rooms = {key: _room_bytes(meta.nbytes) for key, meta in new.items()}
        if self.used_bytes + sum(rooms.values()) > self.capacity_bytes:
            return now_s, t.DiskWritten(job=message.job, ok=False, reason="disk_full")
        self.used_bytes += sum(room - self._objects.get(key, 0) for key, room in rooms.items())
        self._objects.update(rooms)
        nbytes = 0
        for meta in new.values():
            tenant = message.roots[meta.root].tenant
            self.written[tenant] = self.written.get(tenant, 0) + meta.nbytes
            nbytes += meta.nbytes
        done_s = self._drive.write(now_s, nbytes)
        return done_s, t.DiskWritten(job=message.job, ok=True, bytes=nbytes, seconds=done_s - now_s)


def _room_bytes(nbytes: int) -> int:
    """In whole units, and one for the header."""
    return -(-nbytes // _UNIT_BYTES) * _UNIT_BYTES + _UNIT_BYTES

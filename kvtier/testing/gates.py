"""Places where a copy, a write or a read stops until a test lets it go on, in whatever process it runs.

A gate is two files in a folder: the test shuts it by writing the first one, whoever comes to it then makes
the second one and waits until the first is gone.  So a test sees that something is in the middle of a copy,
and nothing that it kills leaves a lock behind.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CopyEngine, SlotMemory
from kvtier.waiting import wait_until

# Longer than any test takes: a gate that nobody opens must not keep a process for ever.
_PATIENCE_S = 120.0


class Gate:
    """One gate. Both sides make it from the same path, whose folder exists."""

    def __init__(self, path: Path) -> None:
        self._shut = path.with_name(f"{path.name}.shut")
        self._held = path.with_name(f"{path.name}.held")
        self._lock = threading.Lock()
        self._order = ""
        self._passed = 0

    # --- the test ---------------------------------------------------------------------------------------

    def shut(self, after: int = 0) -> None:
        """Let `after` more through, and hold who comes then."""
        self._held.unlink(missing_ok=True)
        written = self._shut.with_suffix(".new")
        written.write_text(f"{after} {secrets.token_hex(8)}")
        written.rename(self._shut)

    def open(self) -> None:
        """Let everybody go on; again is no error."""
        self._shut.unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether somebody waits, or waited since it was shut."""
        return self._held.exists()

    def wait_held(self, timeout_s: float = 20.0) -> None:
        """Until somebody waits. Raises TimeoutError."""
        if not wait_until(self.holds, timeout_s):
            raise TimeoutError(f"nobody came to {self._shut}")

    # --- the other side ---------------------------------------------------------------------------------

    def come(self) -> None:
        """Pass, or wait until it is open."""
        order = self._read()
        if not order or not self._stops(order):
            return
        self._held.touch()
        wait_until(lambda: self._read() != order, _PATIENCE_S)

    def _read(self) -> str:
        try:
            return self._shut.read_text()
        except FileNotFoundError:
            return ""

    def _stops(self, order: str) -> bool:
        with self._lock:
            if order != self._order:
                self._order, self._passed = order, 0
            self._passed += 1
            return self._passed > int(order.split()[0])


class GatedSlots:
    """Slot memory with a gate behind each look at a generation.

    An engine looks before each object that it copies, and once more after it.  Who is let go on works with
    what it saw before the gate: like a process that was stopped between its look and its copy.
    """

    def __init__(self, slots: SlotMemory, gate: Gate) -> None:
        self._slots = slots
        self._gate = gate

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """See SlotMemory."""
        return self._slots.view(address, nbytes)

    def generation(self, slot_id: int) -> int:
        """See SlotMemory."""
        seen = self._slots.generation(slot_id)
        self._gate.come()
        return seen


def gated_engine(slots: SlotMemory, gate: Gate) -> CopyEngine:
    """An engine of one thread: what stops at the gate stops the whole batch."""
    return CpuCopyEngine(GatedSlots(slots, gate), threads=1)


class GatedFileOps(OsFileOps):
    """System calls with a gate before each write of a payload, each read, and each flush."""

    def __init__(self, folder: Path) -> None:
        self._writes = Gate(folder / "write")
        self._reads = Gate(folder / "read")
        self._syncs = Gate(folder / "sync")

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """See os.pwritev."""
        self._writes.come()
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """See os.preadv."""
        self._reads.come()
        return super().preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        """See os.fdatasync."""
        self._syncs.come()
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """See os.fsync."""
        self._syncs.come()
        super().fsync(fd)

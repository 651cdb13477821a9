"""The file of the stimulus log: written in order, on a thread of its own, and never waited for by the node.

A drive that is slower than the node would have to stop the node or tear holes into the log.  A log with a
hole cannot be replayed, one that ends can: so when more than a bound waits to be written, or a write fails,
the log ends there, with an entry that says so, until the node starts again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import aiofiles  # type: ignore[import-untyped]

from kvtier.errors import KvtierError
from kvtier.node.journal import ending

log = logging.getLogger(__name__)
_BOUND_BYTES = 64 << 20
_OPEN_S = 10.0


class StimulusLog:
    """Appends to the file at `path`. bound_bytes: most that may wait to be written.

    ended: why the log goes no further; '' while it does.  lost: entries since then.
    """

    def __init__(self, path: Path, bound_bytes: int = _BOUND_BYTES) -> None:
        self.ended = ""
        self.lost = 0
        self._path = path
        self._bound_bytes = bound_bytes
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self._failure: OSError | None = None
        self._opened = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-stimulus-log", daemon=True)

    def open(self) -> None:
        """Open the file. Raises KvtierError when that fails."""
        self._thread.start()
        if not self._opened.wait(_OPEN_S) or self._failure is not None:
            why = "it takes too long" if self._failure is None else self._failure.strerror
            raise KvtierError(
                f"the stimulus log {self._path} cannot be opened: {why}",
                fix="choose another log.stimulus_log",
            )

    def write(self, entry: bytes) -> None:
        """Append an entry, some time soon. Never waits, never raises."""
        with self._lock:
            if not self.ended and self._waiting_bytes + len(entry) > self._bound_bytes:
                self._end(f"{self._waiting_bytes} bytes wait for a drive that is too slow")
            if self.ended:
                self.lost += 1
                return
            self._waiting.append(entry)
            self._waiting_bytes += len(entry)
        self._loop.call_soon_threadsafe(self._wake.set)

    def close(self, timeout_s: float) -> bool:
        """Write what waits, and close the file; answers whether that was done in time."""
        with self._lock:
            if self._closing:
                return True
            self._closing = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._wake.set)
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- on the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        except OSError as failure:
            self._failure = failure
            self._opened.set()
        finally:
            with self._lock:
                self._closing = True
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _work(self) -> None:
        async with aiofiles.open(self._path, "ab", buffering=0) as file:
            self._opened.set()
            while await self._write_waiting(file):
                await self._wake.wait()
                self._wake.clear()
            await self._loop.run_in_executor(None, os.fsync, file.fileno())

    async def _write_waiting(self, file: Any) -> bool:
        """Write until nothing waits; answers whether more may come."""
        while True:
            with self._lock:
                entries, self._waiting = self._waiting, deque()
                going_on = not (self._closing or self.ended)
                ended = self.ended
            if not entries:
                if ended and not going_on and self._failure is None:
                    await self._append(file, ending(ended))
                return going_on
            await self._append(file, b"".join(entries))
            with self._lock:
                self._waiting_bytes -= sum(map(len, entries))

    async def _append(self, file: Any, data: bytes) -> None:
        """All of it or nothing: half an entry would hide all that comes after it."""
        if self._failure is not None:
            return
        begin = await file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[await file.write(rest) :]
        except OSError as failure:
            self._failure = failure
            with self._lock:
                self._end(f"it cannot be written: {failure.strerror}")
            await file.truncate(begin)

    def _end(self, why: str) -> None:
        """With the lock held."""
        if not self.ended:
            self.ended = why
            log.error("the stimulus log %s ends: %s", self._path, why)
            self._loop.call_soon_threadsafe(self._wake.set)

"""One thread that waits for sockets, processes and other threads, and calls back.

Everything that belongs to a service happens in its loop's thread, so nothing there needs a lock; other
threads hand work over with `call`.
"""

from __future__ import annotations

import collections
import os
import select
import threading
import time
from collections.abc import Callable

# Descriptors that one wait answers with; the others come with the next one.
_READY_MOST = 256


class Loop:
    """Calls back when a descriptor is ready, when asked from another thread, and every `tick_s`."""

    def __init__(self, tick_s: float, on_tick: Callable[[], None]) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._tick_s = tick_s
        self._at_ticks = [on_tick]
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._running = True
        self._turned_s = time.monotonic()
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watch(self._wake_fd, self._woken)

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call back whenever the descriptor is readable."""
        self._epoll.register(fd, select.EPOLLIN)
        self._watched[fd] = on_readable

    def watch_for(self, fd: int, *, readable: bool, writable: bool) -> None:
        """From now on call back for these of a descriptor that is watched already; always when it broke."""
        self._epoll.modify(fd, (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0))

    def unwatch(self, fd: int) -> None:
        """Stop watching. Must come before the descriptor is closed."""
        del self._watched[fd]
        self._epoll.unregister(fd)

    def at_ticks(self, work: Callable[[], None]) -> None:
        """Also do this at every tick."""
        self._at_ticks.append(work)

    def not_at_ticks(self, work: Callable[[], None]) -> None:
        """The end of `at_ticks`."""
        self._at_ticks.remove(work)

    def call(self, work: Callable[[], None]) -> None:
        """Have the loop's thread do this soon; nothing happens once it ended. From any thread."""
        self._calls.append(work)
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def still_s(self) -> float:
        """How long ago the loop last came round; it does every `tick_s` while it lives. From any thread."""
        return time.monotonic() - self._turned_s

    def stop(self) -> None:
        """End `run`. From any thread."""
        self.call(self._end)

    def run(self) -> None:
        """Work until stopped. What a callback raises ends it and is raised here."""
        next_tick_s = time.monotonic() + self._tick_s
        while self._running:
            self._turned_s = time.monotonic()
            wait_s = max(0.0, next_tick_s - time.monotonic())
            ready = [(fd, self._watched[fd]) for fd, _ in self._epoll.poll(wait_s, _READY_MOST)]
            for fd, call_back in ready:
                # One before may have ended what this one is about, and a new one may have its number.
                if self._watched.get(fd) is call_back:
                    call_back()
            if time.monotonic() >= next_tick_s:
                for work in tuple(self._at_ticks):
                    work()
                next_tick_s = time.monotonic() + self._tick_s

    def close(self) -> None:
        """Give back the loop's own descriptors; what it watches is its owner's. After `run` has ended."""
        with self._lock:
            self._epoll.close()
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _woken(self) -> None:
        os.eventfd_read(self._wake_fd)
        # Those that come meanwhile wait for the next round, so that sockets and ticks have their turn.
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _end(self) -> None:
        self._running = False


class LoopThread:
    """A loop in a thread of its own; keeps what ended it."""

    def __init__(self, loop: Loop, name: str, cleanup: Callable[[], None]) -> None:
        self._loop = loop
        self._cleanup = cleanup
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the loop to end, and wait for it; answers whether it did."""
        if self._thread.is_alive():
            self._loop.stop()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the thread ended within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._cleanup()
            self._loop.close()

"""Shared bandwidth: what is sent first arrives first, and what comes later waits."""

from __future__ import annotations

from math import ceil, inf


class Link:
    """One direction of a bus or network. Raises no errors; bytes_per_s is above 0."""

    __slots__ = ("_bytes_per_s", "_free_s", "_start_s", "busy_s", "nbytes")

    def __init__(self, bytes_per_s: float, start_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._start_s = start_s
        self._free_s = 0.0
        self.busy_s = 0.0
        self.nbytes = 0

    def queued_bytes(self, now_s: float) -> int:
        """What has to go before anything new."""
        return int(max(self._free_s - now_s, 0.0) * self._bytes_per_s)

    def front(self, end: int, late_s: float, token_bytes: float) -> int:
        """Up to which token is there, of what ends at `end`, so long before all of it is."""
        return _front(end, late_s, self._bytes_per_s / token_bytes)

    def send(self, now_s: float, nbytes: int, until_s: float = inf) -> float:
        """When the last byte is there, or would be: what does not arrive until then is not sent."""
        takes_s, begins_s = nbytes / self._bytes_per_s, max(self._free_s, now_s)
        done_s = begins_s + takes_s
        if done_s > until_s:
            takes_s = max(until_s - begins_s, 0.0)
            nbytes = int(takes_s * self._bytes_per_s)
        self._free_s = begins_s + takes_s
        self.busy_s += takes_s
        self.nbytes += nbytes
        return done_s + self._start_s


class Drive:
    """A drive: reads go first, and wait only for reads and for the batch that is being written."""

    __slots__ = ("_batch_s", "_read_free_s", "_read_per_s", "_start_s", "_write_free_s", "_write_per_s",
                 "busy_s", "read_bytes", "written_bytes")  # fmt: skip

    def __init__(
        self, read_bytes_per_s: float, write_bytes_per_s: float, start_s: float, batch_bytes: int
    ) -> None:
        self._read_per_s, self._write_per_s, self._start_s = read_bytes_per_s, write_bytes_per_s, start_s
        self._batch_s = batch_bytes / write_bytes_per_s
        self._read_free_s = self._write_free_s = 0.0
        self.busy_s = 0.0
        self.read_bytes = self.written_bytes = 0

    def queued_bytes(self, now_s: float) -> int:
        """What has to be read before anything new."""
        return int(max(self._read_free_s - now_s, 0.0) * self._read_per_s)

    def front(self, end: int, late_s: float, token_bytes: float) -> int:
        """Up to which token is read, of what ends at `end`, so long before all of it is."""
        return _front(end, late_s, self._read_per_s / token_bytes)

    def read(self, now_s: float, nbytes: int, until_s: float = inf) -> float:
        """When the last byte is read, or would be: what does not come until then is not read."""
        blocked_s = min(max(self._write_free_s - now_s, 0.0), self._batch_s)
        takes_s, begins_s = nbytes / self._read_per_s, max(self._read_free_s, now_s + blocked_s)
        done_s = begins_s + takes_s
        if done_s > until_s:
            takes_s = max(until_s - begins_s, 0.0)
            nbytes = int(takes_s * self._read_per_s)
        self._read_free_s = begins_s + takes_s
        # What was waiting to be written waits on.
        self._write_free_s = max(self._write_free_s, now_s) + takes_s
        self.busy_s += takes_s
        self.read_bytes += nbytes
        return done_s + self._start_s

    def write(self, now_s: float, nbytes: int) -> float:
        """When the last byte is durable."""
        takes_s = nbytes / self._write_per_s
        self._write_free_s = max(self._write_free_s, self._read_free_s, now_s) + takes_s
        self.busy_s += takes_s
        self.written_bytes += nbytes
        return self._write_free_s + self._start_s

    def backlog_s(self, now_s: float) -> float:
        """How long what is queued to be written still takes."""
        return max(self._write_free_s - now_s, 0.0)


def _front(end: int, late_s: float, tokens_per_s: float) -> int:
    return end - ceil(max(late_s, 0.0) * tokens_per_s)

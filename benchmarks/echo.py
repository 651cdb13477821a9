"""The least that a call can cost: a bare echo between two processes, over a socket of the same kind."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType

# About as long as an empty call.
_MESSAGE = b"e" * 24
_READ_BYTES = 4096


class Echo:
    """A process that sends back what it gets; it ends with the block."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.echo", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def __enter__(self) -> Echo:
        self.there_and_back()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait()

    def there_and_back(self) -> None:
        """One message, and its echo."""
        self._socket.sendall(_MESSAGE)
        self._socket.recv(_READ_BYTES)


def main() -> None:
    """The other process; its argument is the number of its end of the socket."""
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        while data := ours.recv(_READ_BYTES):
            ours.sendall(data)


if __name__ == "__main__":
    main()

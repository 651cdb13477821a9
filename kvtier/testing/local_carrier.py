"""A carrier within one process, for tests: what Ray does between nodes, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from kvtier.carriage import Bytes, Passing


class LocalCarrier:
    """A Carrier. nodes: by name, what answers there.  calls: all so far, with the node that was called."""

    name = "relayed"

    def __init__(self, nodes: Mapping[str, Callable[[Passing], Bytes | None]]) -> None:
        self._nodes = nodes
        self.calls: list[tuple[str, Passing]] = []

    def pass_on(self, node: str, call: Passing) -> Future[Bytes | None]:
        """See Carrier; each call on a thread of its own, like an actor's."""
        self.calls.append((node, call))
        answer: Future[Bytes | None] = Future()
        threading.Thread(target=self._carry, args=(node, call, answer), daemon=True).start()
        return answer

    def _carry(self, node: str, call: Passing, answer: Future[Bytes | None]) -> None:
        if not answer.set_running_or_notify_cancel():
            # Given up before it began.
            return
        if node not in self._nodes:
            answer.set_exception(OSError(f"nobody is called '{node}'"))
            return
        answer.set_result(self._nodes[node](call))

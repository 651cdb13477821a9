"""A question that another thread puts to the core, answered in the thread that owns it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from kvtier.daemon.loop import Loop
from kvtier.node.core import NodeCore

Answer = TypeVar("Answer")

# A loop that does not come round in this time has ended, or hangs.
_PATIENCE_S = 2.0


class Question(Generic[Answer]):
    """One call into the loop's thread, with its answer."""

    def __init__(self, ask: Callable[[NodeCore], Answer]) -> None:
        self._ask = ask
        self._answer: Answer | None = None
        self._answered = threading.Event()

    def put(self, loop: Loop, core: NodeCore) -> Answer | None:
        """Wait for the answer; None when none comes."""

        def work() -> None:
            self._answer = self._ask(core)
            self._answered.set()

        loop.call(work)
        self._answered.wait(_PATIENCE_S)
        return self._answer

"""The pages of one park or restore: which copies may still touch them, and how it ended.

A use is open until the node or this process says that no further copy may begin.  Pages are quiet when the
use is not open and none of its copies runs: only then `released` is set and a receipt is handed out.  Where
another process copies (shared pools) only that process's word, or its end, makes pages quiet.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from kvtier.messages.tiers import Direction
from kvtier.receipts import Level, ParkReceipt, Plan, Reason, RestoreReceipt

if TYPE_CHECKING:
    from kvtier.gpu.engine import StreamEvent
    from kvtier.gpu.layers import LayerEvents
    from kvtier.gpu.pool import Binding

Receipt = TypeVar("Receipt", ParkReceipt, RestoreReceipt)
Listener = Callable[[], None]


class CopyOrder(NamedTuple):
    """What a use's copies come after, and what comes after them: see kvtier.gpu.engine.CopyBatch.

    layers: of a restore, is told of each layer.  by_layer: as it is queued, not only when its batch ends.
    """

    after: StreamEvent | None = None
    after_layers: tuple[StreamEvent, ...] = ()
    layers: LayerEvents | None = None
    by_layer: bool = False


ANY_ORDER = CopyOrder()


class PageUse(ABC, Generic[Receipt]):
    """request: the number that names it to the node.  limit_s: time.monotonic() at which it is ended here.

    copies_here: whether this process runs its copies.  order: of them.  All calls from any thread.
    """

    direction: Direction
    order: CopyOrder = ANY_ORDER

    def __init__(self, request: int, binding: Binding, *, limit_s: float, copies_here: bool) -> None:
        self.request = request
        self.binding = binding
        self.limit_s = limit_s
        self.released = threading.Event()
        self.finished = threading.Event()
        self.copies_here = copies_here
        self._lock = threading.Lock()
        self._open = True
        self._running = 0
        self._said_quiet = False
        self._ended_here = False
        self._jobs: set[str] = set()
        self._receipt: Receipt | None = None
        self._tell: Callable[[list[str]], None] | None = None
        self._on_released: list[Listener] = []
        self._on_finished: list[Listener] = []

    # --- copies -----------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether further copies may begin."""
        return self._open

    @property
    def ended_here(self) -> bool:
        """Whether it was ended by this process and not by the node."""
        return self._ended_here

    @property
    def jobs(self) -> list[str]:
        """The node's names for its copies, as far as they are known."""
        with self._lock:
            return sorted(self._jobs)

    def admit(self, job: str, direction: Direction) -> bool:
        """Ask to begin a batch; when True, `copy_ended` is owed."""
        with self._lock:
            if not self._open or direction != self.direction:
                return False
            self._jobs.add(job)
            self._running += 1
            return True

    def copy_ended(self) -> None:
        """A batch that was admitted runs no more."""
        with self._lock:
            self._running -= 1
        self._settle()

    def stop_copies(self, tell: Callable[[list[str]], None] | None = None) -> None:
        """No further copy begins. tell: called once with the jobs when none of them runs any more."""
        with self._lock:
            self._open = False
            self._tell = tell or self._tell
        self._settle()

    # --- what the node says -----------------------------------------------------------------------------

    def begun(self, job: str, receipt: Receipt | None) -> None:
        """The node works on it under this name, or was done with it at once."""
        if receipt is not None:
            self.said_done(receipt)
            return
        with self._lock:
            self._jobs.add(job)
        self._settle()

    def said_released(self) -> None:
        """The node will not begin another copy, and knows of none that runs."""
        with self._lock:
            self._open, self._said_quiet = False, True
        self._settle()

    def said_done(self, receipt: Receipt) -> None:
        """The node's receipt. A receipt that was given here before stands."""
        with self._lock:
            self._open = False
            self._said_quiet = self._said_quiet or self.proves_quiet(receipt)
            self._receipt = self._receipt or receipt
        self._settle()

    # --- what happens here ------------------------------------------------------------------------------

    def end(self, reason: Reason, detail: str, tell: Callable[[list[str]], None] | None = None) -> None:
        """End it without the node: no further copy begins, and the receipt says why."""
        with self._lock:
            self._open, self._ended_here = False, True
            self._tell = tell or self._tell
            if self._receipt is None:
                self._receipt = self.own_receipt(reason, detail)
        self._settle()

    def result(self, timeout_s: float) -> Receipt:
        """The receipt; one with reason 'deadline' if it is not finished within the time."""
        self.finished.wait(timeout_s)
        with self._lock:
            if self.finished.is_set() and self._receipt is not None:
                return self.settled(self._receipt, self.released.is_set())
            return self.settled(self.own_receipt("deadline", "not finished yet"), self.released.is_set())

    def when_released(self, listener: Listener) -> None:
        """Call once when the pages are quiet: at once if they are, else from any thread."""
        self._listen(self.released, self._on_released, listener)

    def when_finished(self, listener: Listener) -> None:
        """Call once when there is a receipt: at once if there is, else from any thread."""
        self._listen(self.finished, self._on_finished, listener)

    # --- parks and restores differ here -----------------------------------------------------------------

    @abstractmethod
    def own_receipt(self, reason: Reason, detail: str) -> Receipt:
        """A receipt that claims nothing."""

    @abstractmethod
    def settled(self, receipt: Receipt, quiet: bool) -> Receipt:
        """The receipt with what is known of its pages."""

    @abstractmethod
    def proves_quiet(self, receipt: Receipt) -> bool:
        """Whether the node's receipt says that no copy touches the pages any more."""

    def _listen(self, event: threading.Event, listeners: list[Listener], listener: Listener) -> None:
        with self._lock:
            if not event.is_set():
                listeners.append(listener)
                return
        listener()

    def _settle(self) -> None:
        calls: list[Listener] = []
        with self._lock:
            quiet = not self._open and not self._running and (self.copies_here or self._said_quiet)
            if quiet and not self.released.is_set():
                self.released.set()
                calls += self._on_released
                self._on_released = []
            # Nothing here can prove a shared pool quiet, so its receipt does not wait for that.
            over = quiet or (self._ended_here and not self.copies_here)
            if self._receipt is not None and over and not self.finished.is_set():
                self.finished.set()
                calls += self._on_finished
                self._on_finished = []
            tell, jobs = self._tell, sorted(self._jobs)
            if quiet and tell is not None and jobs:
                self._tell = None
                calls.append(lambda: tell(jobs))
        for call in calls:
            call()


class ParkUse(PageUse[ParkReceipt]):
    """Pages that are read."""

    direction: Direction = "gather"

    def __init__(
        self,
        request: int,
        binding: Binding,
        *,
        limit_s: float,
        copies_here: bool,
        names: tuple[str, str],
        level: Level,
    ) -> None:
        super().__init__(request, binding, limit_s=limit_s, copies_here=copies_here)
        self._names = names
        self._level: Level = level

    def own_receipt(self, reason: Reason, detail: str) -> ParkReceipt:
        """See PageUse."""
        conversation, tenant = self._names
        return ParkReceipt(conversation, tenant, "none", self._level, False, reason=reason, detail=detail)

    def settled(self, receipt: ParkReceipt, quiet: bool) -> ParkReceipt:
        """See PageUse."""
        return replace(receipt, released=quiet)

    def proves_quiet(self, receipt: ParkReceipt) -> bool:
        """See PageUse."""
        return receipt.released


class RestoreUse(PageUse[RestoreReceipt]):
    """Pages that are written."""

    direction: Direction = "scatter"

    def __init__(
        self, request: int, binding: Binding, *, limit_s: float, copies_here: bool, plan: Plan
    ) -> None:
        super().__init__(request, binding, limit_s=limit_s, copies_here=copies_here)
        self._plan = plan

    def own_receipt(self, reason: Reason, detail: str) -> RestoreReceipt:
        """See PageUse."""
        return missed(self._plan, reason, detail)

    def settled(self, receipt: RestoreReceipt, quiet: bool) -> RestoreReceipt:
        """See PageUse."""
        if quiet:
            return receipt
        # A contiguous cache has no page ids: 0 stands for all of it.
        named = sorted({page for _, page in self.binding.named_pages()}) or [0]
        return replace(receipt, busy=tuple(named))

    def proves_quiet(self, receipt: RestoreReceipt) -> bool:
        """See PageUse: but for the pages that the receipt itself names as busy."""
        return True


def missed(plan: Plan, reason: Reason, detail: str) -> RestoreReceipt:
    """The receipt of a restore that put nothing in place."""
    return RestoreReceipt(plan.conversation, plan.tenant, 0, plan.load_tokens, reason=reason, detail=detail)

"""What `park` and `restore_async` hand to their caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic

from kvtier.arguments import Duration, seconds
from kvtier.page_use import PageUse, Receipt
from kvtier.receipts import ParkReceipt, RestoreReceipt

# How long a receipt may come after its use was ended: running copies are bounded and end soon.
QUIET_S = 5.0


class _Handle(Generic[Receipt]):
    def __init__(self, use: PageUse[Receipt], cancel: Callable[[], None]) -> None:
        self._use: PageUse[Receipt] = use
        self._cancel = cancel

    def done(self) -> bool:
        """Whether the receipt is there."""
        return self._use.finished.is_set()

    def cancel(self) -> None:
        """End it: no further copy begins. Does not wait for a running one; see `result`."""
        self._cancel()

    def when_done(self, listener: Callable[[], None]) -> None:
        """Call once, from any thread, when the receipt is there. It must not wait."""
        self._use.when_finished(listener)

    def _result(self, timeout_s: Duration | None) -> Receipt:
        if timeout_s is not None:
            return self._use.result(seconds("timeout_s", timeout_s))
        return self._use.result(max(0.0, self._use.limit_s - time.monotonic()) + QUIET_S)


class ParkHandle(_Handle[ParkReceipt]):
    """A park under way. `released` is set once nothing reads the pages any more: they may be reused."""

    @property
    def released(self) -> threading.Event:
        """Wait with `released.wait(timeout_s)`."""
        return self._use.released

    def when_released(self, listener: Callable[[], None]) -> None:
        """Call once, from any thread, when the pages may be reused. It must not wait."""
        self._use.when_released(listener)

    def result(self, timeout_s: Duration | None = None) -> ParkReceipt:
        """The receipt. One with level 'none' and reason 'deadline' if it takes longer: ask again then.

        timeout_s: by default what the park itself was given.
        """
        return self._result(timeout_s)


class RestoreHandle(_Handle[RestoreReceipt]):
    """A restore under way, for engines that poll."""

    def result(self, timeout_s: Duration | None = None) -> RestoreReceipt:
        """The receipt: no copy into the pages runs any more, but into those that it names as busy.

        timeout_s: by default until the deadline and the end of the copies that run then.  Pages of a
        restore that is not finished within it are all busy; ask again then.
        """
        return self._result(timeout_s)

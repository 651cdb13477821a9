"""What `park` and `restore_async` hand to their caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic

from kvtier.arguments import Duration, seconds
from kvtier.client.page_use import PageUse, Receipt
from kvtier.receipts import ParkReceipt, RestoreReceipt

if TYPE_CHECKING:
    from kvtier.gpu.layers import LayerEvents, LayerReady

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
    """A restore under way, for engines that poll, or that begin before all of it is there.

    A layer's event says that its copies have ended, and that nothing will be copied there again.  Whether
    the bytes are right, and how many tokens were restored, only the receipt says.  So an engine may run its
    prefill on layer i once the event of layer i allows, and may use what it computed if `result()` is ok; no
    token leaves before that, and if it is not ok all that was computed from these pages is thrown away.
    Until then the restored rows may be read, not written.
    """

    def __init__(self, use: PageUse[RestoreReceipt], cancel: Callable[[], None], layers: LayerEvents) -> None:
        super().__init__(use, cancel)
        self._layers = layers
        layers.limit_s = use.limit_s + QUIET_S
        use.when_finished(self._finish)

    @property
    def events(self) -> tuple[LayerReady, ...]:
        """One for each layer of the pool: done(), wait(stream), synchronize()."""
        from kvtier.gpu.layers import LayerReady

        return tuple(LayerReady(layer, self._layers) for layer in range(len(self._layers)))

    def layer_ready(self, layer: int) -> bool:
        """Whether the layer's copies have ended. Does not wait."""
        return self._layers.ready(layer)

    def wait_on(self, stream: Any, layer: int, timeout_s: Duration | None = None) -> bool:
        """Make a stream wait until the layer is in place; the caller only waits until its copies are queued.

        stream: as in `Worker.park`; on the CPU the caller waits for the copies themselves.  False when they
        are not queued within the time, or never will be: the receipt then says why.  timeout_s: by default
        until the restore is over.  Raises GeometryError, TierUnavailable; CopiesHang when the restore's
        deadline is long past, and copies that were bounded still run.
        """
        return self._layers.wait(
            layer, stream, None if timeout_s is None else seconds("timeout_s", timeout_s)
        )

    def result(self, timeout_s: Duration | None = None) -> RestoreReceipt:
        """The receipt: no copy into the pages runs any more, but into those that it names as busy.

        timeout_s: by default until the deadline and the end of the copies that run then.  Pages of a
        restore that is not finished within it are all busy; ask again then.
        """
        return self._result(timeout_s)

    def _finish(self) -> None:
        receipt = self._use.result(0)
        self._layers.end(receipt.ok and not receipt.reason)

"""The client for asyncio: the same calls, carried out by a few threads of its own, so the loop never waits.

Cancelling an awaited call leaves nothing half done.  A cancelled park or restore ends its copies, and the
CancelledError comes once none of them touches the pages; a plan that nobody gets any more is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from kvtier.arguments import Duration, seconds
from kvtier.client.client import Client, connect
from kvtier.client.handles import QUIET_S, ParkHandle, RestoreHandle
from kvtier.client.worker import Worker
from kvtier.client.worker_inputs import ModelIdentity, WorkerPlan
from kvtier.explanation import Explanation
from kvtier.objects import Shard
from kvtier.receipts import (
    ConversationInfo,
    ForgetReceipt,
    ModelInfo,
    ParkReceipt,
    RestoreReceipt,
    StatusReport,
)

if TYPE_CHECKING:
    from kvtier.client.worker_inputs import AnyPool
    from kvtier.gpu.engine import StreamEvent

T = TypeVar("T")
THREADS = 2


class _Threads:
    """Runs blocking calls beside the loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kvtier-aio")

    async def run(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """The call's result. undo: gets the result where the caller was cancelled meanwhile."""
        running = self._pool.submit(call)
        try:
            return await asyncio.shield(asyncio.wrap_future(running))
        except asyncio.CancelledError:
            if undo is not None:
                running.add_done_callback(partial(_undo, undo))
            raise

    async def run_to_end(self, call: Callable[[], T]) -> tuple[T, bool]:
        """The call's result, waited for in any case, and whether the caller was cancelled meanwhile."""
        running = asyncio.wrap_future(self._pool.submit(call))
        cancelled = False
        while not running.done():
            try:
                await asyncio.wait({running})
            except asyncio.CancelledError:
                cancelled = True
        return running.result(), cancelled

    def end(self) -> None:
        """Take no more calls. Does not wait for those that nobody waits for."""
        self._pool.shutdown(wait=False)


def _undo(undo: Callable[[T], object], ended: Future[T]) -> None:
    if not ended.cancelled() and ended.exception() is None:
        undo(ended.result())


async def _heard(listen: Callable[[Callable[[], None]], None], timeout_s: float) -> bool:
    """Wait until a handle calls back; False after the time."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def tell() -> None:
        # The loop may be gone by the time that a copy ends.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    listen(tell)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
    return event.is_set()


async def _ended(listen: Callable[[Callable[[], None]], None]) -> None:
    """Wait, however often this task is cancelled, for copies that were cancelled: soon, or never."""
    waiting = asyncio.ensure_future(_heard(listen, QUIET_S))
    while not waiting.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({waiting})


class AsyncPark:
    """A park under way."""

    def __init__(self, handle: ParkHandle) -> None:
        self.handle = handle

    async def released(self, timeout_s: Duration) -> bool:
        """Wait until nothing reads the pages any more; False after the time."""
        return await _heard(self.handle.when_released, seconds("timeout_s", timeout_s))

    async def result(self, timeout_s: Duration) -> ParkReceipt:
        """The receipt; one with reason 'deadline' if it takes longer: ask again then."""
        await _heard(self.handle.when_done, seconds("timeout_s", timeout_s))
        return self.handle.result(0)


class AsyncWorker:
    """See Worker: the same arguments, errors and receipts."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._threads = _Threads()

    async def park(self, conversation: str, tokens: Any, pages: Any, **options: Any) -> AsyncPark:
        """See Worker.park."""
        if not len(options.get("layer_events", ())):
            # Now, since the threads that carry it out have current streams of their own.
            options["stream"] = self.worker.mark(options.get("stream"))
        call = partial(self.worker.park, conversation, tokens, pages, **options)
        handle, cancelled = await self._threads.run_to_end(call)
        if cancelled:
            handle.cancel()
            await _ended(handle.when_released)
            raise asyncio.CancelledError
        return AsyncPark(handle)

    async def plan(self, conversation: str | None, tokens: Any, **options: Any) -> WorkerPlan:
        """See Worker.plan."""
        call = partial(self.worker.plan, conversation, tokens, **options)
        return await self._threads.run(call, self.worker.drop)

    async def join(self, plan_id: str) -> WorkerPlan:
        """See Worker.join."""
        return await self._threads.run(partial(self.worker.join, plan_id), self.worker.drop)

    async def restore(
        self, plan: WorkerPlan, pages: Any, *, deadline_s: Duration, stream: Any = None
    ) -> RestoreReceipt:
        """See Worker.restore."""
        after = self.worker.mark(stream)
        call = partial(self.worker.restore_async, plan, pages, deadline_s=deadline_s, stream=after)
        handle: RestoreHandle
        handle, cancelled = await self._threads.run_to_end(call)
        try:
            if not cancelled:
                await _heard(handle.when_done, seconds("deadline_s", deadline_s) + QUIET_S)
                return handle.result(0)
        except asyncio.CancelledError:
            pass
        handle.cancel()
        await _ended(handle.when_done)
        raise asyncio.CancelledError

    def mark(self, stream: Any = None) -> StreamEvent:
        """See Worker.mark. Does not wait."""
        return self.worker.mark(stream)

    async def prefilled(self, tokens: int, seconds: float, *, past: int = 0) -> None:
        """See Worker.prefilled. Does not wait."""
        self.worker.prefilled(tokens, seconds, past=past)

    async def drop(self, plan: WorkerPlan) -> None:
        """See Worker.drop."""
        self.worker.drop(plan)

    async def close(self) -> None:
        """See Worker.close."""
        _, cancelled = await self._threads.run_to_end(self.worker.close)
        self._threads.end()
        if cancelled:
            raise asyncio.CancelledError

    async def __aenter__(self) -> AsyncWorker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClient:
    """See Client: the same arguments, errors and receipts. Made by `connect_async`."""

    def __init__(self, client: Client, threads: _Threads) -> None:
        self.client = client
        self._threads = threads

    async def attach(
        self, model: ModelIdentity, pool: AnyPool, *, shard: Shard, **options: Any
    ) -> AsyncWorker:
        """See Client.attach."""
        call = partial(self.client.attach, model, pool, shard=shard, **options)
        return AsyncWorker(await self._threads.run(call, Worker.close))

    async def ping(self) -> None:
        """See Client.ping."""
        await self._threads.run(self.client.ping)

    async def hint(self, conversation: str, **options: Any) -> None:
        """See Client.hint."""
        await self._threads.run(partial(self.client.hint, conversation, **options))

    async def locate(self, conversation: str, **options: Any) -> list[tuple[str, int, float]]:
        """See Client.locate."""
        return await self._threads.run(partial(self.client.locate, conversation, **options))

    async def forget(self, conversation: str, **options: Any) -> ForgetReceipt:
        """See Client.forget."""
        return await self._threads.run(partial(self.client.forget, conversation, **options))

    async def conversations(self, *, tenant: str = "") -> AsyncIterator[ConversationInfo]:
        """See Client.conversations."""
        after: tuple[str, str] | None = None
        while True:
            call = partial(self.client.conversations_page, tenant=tenant, after=after)
            page = await self._threads.run(call)
            for info in page.conversations:
                yield info
            if not (page.more and page.conversations):
                return
            after = (page.conversations[-1].tenant, page.conversations[-1].conversation)

    async def explain(self, conversation: str, **options: Any) -> Explanation:
        """See Client.explain."""
        return await self._threads.run(partial(self.client.explain, conversation, **options))

    async def show(self, conversation: str, **options: Any) -> ConversationInfo | None:
        """See Client.show."""
        return await self._threads.run(partial(self.client.show, conversation, **options))

    async def models(self) -> list[ModelInfo]:
        """See Client.models."""
        return await self._threads.run(self.client.models)

    async def retire(self, fingerprint: str) -> ModelInfo:
        """See Client.retire."""
        return await self._threads.run(lambda: self.client.retire(fingerprint))

    async def status(self) -> StatusReport:
        """See Client.status."""
        return await self._threads.run(self.client.status)

    async def close(self) -> None:
        """See Client.close."""
        _, cancelled = await self._threads.run_to_end(self.client.close)
        self._threads.end()
        if cancelled:
            raise asyncio.CancelledError

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def connect_async(path: Any = None, **options: Any) -> AsyncClient:
    """See `connect`."""
    threads = _Threads()
    try:
        return AsyncClient(await threads.run(partial(connect, path, **options), Client.close), threads)
    except BaseException:
        threads.end()
        raise

"""The asyncio client: the same answers, a loop that never waits, cancellation that leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvtier import errors
from kvtier.client import aio
from kvtier.messages.calls import (
    Conversations,
    CopiesEnded,
    DropPlan,
    Hello,
    Hint,
    ListConversations,
    MakePlan,
    Park,
    ParkDone,
    ParkStarted,
    Ping,
    Planned,
    Pong,
    Released,
    Restore,
    RestoreDone,
)
from kvtier.messages.calls import Done as DoneMessage
from kvtier.receipts import ConversationInfo, ParkReceipt, Plan, RestoreReceipt, TokenRange

TOKENS = list(range(40))
PAGES = [2, 5, 7]


async def soon(call, *arguments):
    """A blocking helper of the fake node's, beside the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, call, *arguments)


class Session:
    """An async worker with the node's ends of its connections."""

    def __init__(self, kit):
        self.kit = kit

    async def __aenter__(self):
        kit = self.kit
        self.kv = await aio.connect_async(kit.node.path)
        self.worker = await self.kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine)
        await soon(kit.node.peer, "client")
        self.control, self.events, self.copy = [
            await soon(kit.node.peer, role) for role in ("client", "events", "copy")
        ]
        return self

    async def __aexit__(self, *error):
        await self.worker.close()
        await self.kv.close()


def test_calls(kit):
    infos = [ConversationInfo(f"c{i}", "t", 1, 1, 1, "m", 0.0, 1, 0, 1) for i in range(3)]

    def page(peer, message):
        begin = 0 if message.after is None else 2
        more = begin == 0
        return Conversations(id=message.id, conversations=infos[begin : begin + 2], more=more)

    kit.node.answers[ListConversations] = page
    kit.node.answers[Hint] = lambda peer, m: DoneMessage(id=m.id)

    async def main():
        before = threading.active_count()
        async with await aio.connect_async(kit.node.path) as kv:
            await kv.ping()
            await kv.hint("c", returns_in_s=5)
            assert [info async for info in kv.conversations()] == infos
            with pytest.raises(errors.ConfigError):
                await kv.show("")
        return before

    before = asyncio.run(main())
    kit.until(lambda: threading.active_count() <= before + 1, "its threads ended")
    with pytest.raises(errors.DaemonNotFound):
        asyncio.run(aio.connect_async(kit.node.folder))


def test_the_loop_goes_on_while_a_call_waits(kit):
    gate = threading.Event()

    def slow(peer, message):
        gate.wait(10)
        return Pong(id=message.id)

    kit.node.answers[Ping] = slow

    async def main():
        async with await aio.connect_async(kit.node.path) as kv:
            call = asyncio.ensure_future(kv.ping())
            turns = 0
            while turns < 100:
                await asyncio.sleep(0)
                turns += 1
            assert not call.done()
            gate.set()
            await call

    asyncio.run(main())


def test_park_plan_restore(kit):
    async def main():
        async with Session(kit) as s:
            park = await s.worker.park("c", TOKENS, PAGES, level="host")
            sent = await soon(s.control.next, Park)
            assert not await park.released(0)
            s.events.send(Released(request=sent.request))
            assert await park.released(10)
            receipt = ParkReceipt("c", "default", "host", "host", True)
            assert (await park.result(0)).reason == "deadline"
            s.events.send(ParkDone(request=sent.request, receipt=receipt))
            assert await park.result(10) == receipt
            plan = await s.worker.plan("c", TOKENS)
            restore = asyncio.ensure_future(s.worker.restore(plan, PAGES, deadline_s=30))
            asked = await soon(s.control.next, Restore)
            done = RestoreReceipt("c", "default", 40, 40)
            s.events.send(RestoreDone(request=asked.request, receipt=done))
            assert await restore == done

    asyncio.run(main())


def test_a_cancelled_restore_ends_only_after_its_copy(kit):
    async def main():
        async with Session(kit) as s:
            plan = await s.worker.plan("c", TOKENS)
            task = asyncio.ensure_future(s.worker.restore(plan, PAGES, deadline_s=30))
            asked = await soon(s.control.next, Restore)
            s.copy.send(kit.copy(asked, "j"))
            await soon(kit.until, lambda: kit.engine.running, "it runs")
            task.cancel()
            await soon(kit.until, lambda: "j" in kit.engine.cancelled, "it is being cancelled")
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done(), "the copy still writes"
            kit.engine.finish("j")
            with pytest.raises(asyncio.CancelledError):
                await task
            assert "j" in (await soon(s.control.next, CopiesEnded)).jobs

    asyncio.run(main())


def test_a_cancelled_park_ends_only_after_its_copy(kit):
    """Cancelled while the node has not answered yet; a gather runs already."""
    gate = threading.Event()

    def answer(peer, message):
        gate.wait(10)
        return ParkStarted(id=message.id, job="j")

    kit.node.answers[Park] = answer

    async def main():
        async with Session(kit) as s:
            task = asyncio.ensure_future(s.worker.park("c", TOKENS, PAGES))
            sent = await soon(s.control.next, Park)
            s.copy.send(kit.copy(sent, "j"))
            await soon(kit.until, lambda: kit.engine.running, "it runs")
            task.cancel()
            gate.set()
            await soon(kit.until, lambda: "j" in kit.engine.cancelled, "it is being cancelled")
            assert not task.done(), "the copy still reads"
            kit.engine.finish("j")
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_a_plan_that_nobody_gets_is_dropped(kit):
    gate = threading.Event()

    def answer(peer, message):
        gate.wait(10)
        plan = Plan("p9", "c", "t", 40, (TokenRange(0, 40, "host"),))
        return Planned(id=message.id, plan=plan)

    kit.node.answers[MakePlan] = answer

    async def main():
        async with Session(kit) as s:
            task = asyncio.ensure_future(s.worker.plan("c", TOKENS))
            await soon(s.control.next, MakePlan)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()
            assert (await soon(s.control.next, DropPlan)).plan_id == "p9"

    asyncio.run(main())


def test_a_connection_that_nobody_gets_is_closed(kit):
    gate = threading.Event()
    real = kit.node._usual

    def slow(peer, message):
        gate.wait(10)
        return real(peer, message)

    kit.node.answers[Hello] = slow

    async def main():
        task = asyncio.ensure_future(aio.connect_async(kit.node.path))
        await soon(kit.until, lambda: kit.node.peers, "it connects")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await soon(kit.until, lambda: not kit.node.peers, "the connection was closed")

    asyncio.run(main())

"""Services stopped by SIGSTOP under a serving worker: one time-out, then answers at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.messages import protocol
from kvtier.messages.calls import Message
from kvtier.messages.wire import Channel
from kvtier.testing.gates import Gate
from kvtier.testing.kv_memory import pages_for, tokens_of
from kvtier.testing.node_bench import Bench, LocalWorker, forget_all, until

TOKENS = 192
PAGES = pages_for(TOKENS)
MORE_PAGES = pages_for(TOKENS, 16)


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench(leases__copy_s=1.5)


@pytest.fixture
def stop(bench: Bench) -> Iterator[Callable[[str], None]]:
    """Stop a service; it goes on after the test at the latest."""
    stopped: list[str] = []

    def stop(name: str) -> None:
        bench.services.signal(name, signal.SIGSTOP)
        stopped.append(name)

    yield stop
    for name in stopped:
        bench.services.signal(name, signal.SIGCONT)


@pytest.fixture
def local(bench: Bench, make_local: Callable[..., LocalWorker]) -> LocalWorker:
    return make_local(bench.services.socket_path, call_timeout_s=1.0)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests that were really sent, by their type; greetings and attempts to attach are left out."""
    seen: list[str] = []
    exchange = Channel.exchange

    def counted(channel: Channel, frame: bytes, request_id: int, deadline_s: float, *rest: Any) -> Any:
        if request_id > 1:
            seen.append(type(protocol.decode(frame[protocol.LENGTH.size :])).__name__)
        return exchange(channel, frame, request_id, deadline_s, *rest)

    monkeypatch.setattr(Channel, "exchange", counted)
    return seen


def works_again(bench: Bench, local: LocalWorker) -> None:
    """After SIGCONT: attached by itself, the next park works, memory comes back."""
    until(lambda: local.worker.attached, "the worker has attached again")
    receipt = local.park(3, PAGES, TOKENS, level="disk").result()
    assert receipt.ok, receipt
    assert local.restore(3, PAGES, TOKENS).tokens == TOKENS
    forget_all(bench.client)


def test_a_hung_node_costs_one_time_out(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None], sent: list[str]
) -> None:
    assert local.park(1, PAGES, TOKENS).result().ok
    sent.clear()
    stop("node")
    for _ in range(20):
        plan = local.worker.plan("chat-1", tokens_of(1, TOKENS))
        assert (plan.reason, plan.load_tokens) == ("daemon_unavailable", 0)
        assert local.worker.restore(plan, PAGES, deadline_s=1.0).reason == "daemon_unavailable"
        receipt = local.worker.park("chat-2", tokens_of(2, TOKENS), MORE_PAGES).result()
        assert (receipt.level, receipt.reason, receipt.released) == ("none", "daemon_unavailable", True)
    assert sent == ["MakePlan"]
    bench.services.signal("node", signal.SIGCONT)
    works_again(bench, local)


def test_pages_are_kept_until_their_copies_end_although_the_node_hangs(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None], tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "copy")
    gate.shut(after=1)
    handle = local.park(1, PAGES, TOKENS)
    gate.wait_held()
    stop("node")
    assert local.worker.plan("chat-1", tokens_of(1, TOKENS)).reason == "daemon_unavailable"
    assert not local.worker.attached
    assert not handle.released.wait(0.05)
    assert handle.result(0).reason == "deadline"
    gate.open()
    receipt = handle.result()
    assert (receipt.level, receipt.reason, receipt.released) == ("none", "daemon_unavailable", True)
    bench.services.signal("node", signal.SIGCONT)
    works_again(bench, local)


def test_a_restore_under_a_hung_node_claims_nothing(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None], tmp_path: Path
) -> None:
    assert local.park(1, PAGES, TOKENS).result().ok
    gate = Gate(tmp_path / "copy")
    gate.shut(after=1)
    local.kv.poison(PAGES)
    plan = local.worker.plan("chat-1", tokens_of(1, TOKENS))
    handle = local.worker.restore_async(plan, PAGES, deadline_s=1.0)
    gate.wait_held()
    stop("node")
    assert not handle.done()
    gate.open()
    receipt = handle.result()
    assert (receipt.tokens, receipt.reason, receipt.busy) == (0, "deadline", ())
    assert local.kv.strange(1, PAGES, TOKENS) == 0
    bench.services.signal("node", signal.SIGCONT)
    works_again(bench, local)


def test_a_hung_gpu_service_delays_only_what_needs_it(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None]
) -> None:
    assert local.park(1, PAGES, TOKENS).result().ok
    stop("gpu")
    receipt = local.park(2, MORE_PAGES, TOKENS).result()
    assert (receipt.level, receipt.reason) == ("none", "lease_expired")
    assert local.restore(1, PAGES, TOKENS, deadline_s=1.0).reason == "deadline"
    assert local.worker.attached
    bench.services.signal("gpu", signal.SIGCONT)
    works_again(bench, local)


def test_a_hung_disk_service_delays_only_what_needs_it(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None]
) -> None:
    stop("disk")
    handle = local.park(1, PAGES, TOKENS, level="disk", timeout_s=1.0)
    assert handle.released.wait(20)
    receipt = handle.result()
    assert not receipt.ok
    assert receipt.reason == "deadline"
    # What is in host memory is served meanwhile.
    assert local.restore(1, PAGES, TOKENS).tokens == TOKENS
    assert local.park(2, MORE_PAGES, TOKENS).result().ok
    bench.services.signal("disk", signal.SIGCONT)
    works_again(bench, local)


def test_a_read_from_a_hung_disk_service_is_cut_off_at_its_deadline(
    bench: Bench, local: LocalWorker, stop: Callable[[str], None]
) -> None:
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    bench.push_out(1)
    stop("disk")
    receipt = local.restore(1, PAGES, TOKENS, deadline_s=1.0)
    assert (receipt.tokens, receipt.reason, receipt.busy) == (0, "deadline", ())
    bench.services.signal("disk", signal.SIGCONT)
    until(lambda: local.restore(1, PAGES, TOKENS).tokens == TOKENS, "the disk's copy is served")
    works_again(bench, local)


def test_requests_are_counted_by_what_they_are(bench: Bench, local: LocalWorker, sent: list[str]) -> None:
    """The control of the count: with a node that answers, each call is sent."""
    for _ in range(3):
        message: Message = local.worker.plan("nobody", tokens_of(9, 32))  # type: ignore[assignment]
        assert message
    assert sent == ["MakePlan"] * 3

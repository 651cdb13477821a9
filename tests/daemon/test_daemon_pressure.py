"""Host memory and disk under pressure, loss of everything with the folder kept, and bits that flip."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvtier.client.client import Client
from kvtier.daemon import disk_service
from kvtier.daemon.embedded import Embedded
from kvtier.disk.tier import DiskTier
from kvtier.testing.gates import Gate
from kvtier.testing.kv_memory import BLOCK_BYTES, pages_for, tokens_of, truth
from kvtier.testing.node_bench import ARENA_BYTES, Bench, LocalWorker, forget_all, host, status, until

TOKENS = 190
PAGES = pages_for(TOKENS)


def test_a_full_arena_pushes_back_with_a_time_and_drops_nothing(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    client_of: Callable[[Embedded], Client],
) -> None:
    daemon = make_daemon(disk__enabled=False, leases__plan_s=1.0)
    client, local = client_of(daemon), make_local(daemon.socket_path)
    fit = ARENA_BYTES // BLOCK_BYTES // 6
    for seed in range(fit):
        assert local.park(seed, PAGES, TOKENS).result().ok
    # A plan holds what it names: all of host memory is leased.
    plans = [local.worker.plan(f"chat-{s}", tokens_of(s, TOKENS), lease_s=1.0) for s in range(fit)]
    assert all(plan.load_tokens == TOKENS for plan in plans)
    refused = local.park(100, PAGES, TOKENS).result()
    assert (refused.level, refused.reason, refused.released) == ("none", "backpressure", True)
    assert refused.retry_after_s is not None
    assert 0 < refused.retry_after_s <= 5
    # What is leased is there for its holders.
    for seed in range(fit):
        assert local.restore(seed, PAGES, TOKENS).tokens == TOKENS
    for plan in plans:
        local.worker.drop(plan)
    until(lambda: local.park(100, PAGES, TOKENS).result().ok, "the leases have ended")
    assert local.restore(100, PAGES, TOKENS).tokens == TOKENS
    forget_all(client)


def test_a_park_waits_for_copies_that_hold_all_memory(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    client_of: Callable[[Embedded], Client],
    tmp_path: Path,
) -> None:
    daemon = make_daemon(gpu__batch_bytes=ARENA_BYTES)
    client, local = client_of(daemon), make_local(daemon.socket_path, pages=256)
    gate = Gate(tmp_path / "copy")
    gate.shut()
    count = ARENA_BYTES // BLOCK_BYTES * 32
    first = local.park(1, pages_for(count), count, level="disk")
    gate.wait_held()
    second = local.park(2, pages_for(TOKENS, 128), TOKENS, level="disk")
    until(lambda: client.status().waiting_parks == 1, "the second park waits")
    assert not second.released.is_set()
    gate.open()
    assert first.result().level == "disk"
    assert second.result().level == "disk"
    assert client.status().counters["backpressure_s"] > 0
    for seed, pages, tokens in ((1, pages_for(count), count), (2, pages_for(TOKENS, 128), TOKENS)):
        assert local.restore(seed, pages, tokens).tokens == tokens
    forget_all(client)


def crowd(local: LocalWorker, draw: random.Random, steps: int, lengths: dict[int, int]) -> None:
    """Chats that grow turn by turn, far more than host memory holds; each turn begins with a restore."""
    for _ in range(steps):
        seed = draw.randrange(16)
        known = lengths.get(seed, 0)
        receipt = local.restore(seed, pages_for(known or 1), known or 1)
        assert receipt.tokens == known, (seed, receipt)
        grown = min(known + draw.randint(1, 90), 400)
        parked = local.park(seed, pages_for(grown), grown, level="disk").result()
        assert parked.ok, parked
        lengths[seed] = grown


@pytest.mark.parametrize("steps", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_many_more_chats_than_host_memory_holds(
    make_bench: Callable[..., Bench],
    make_local: Callable[..., LocalWorker],
    steps: int,
    record_property: Callable[[str, object], None],
) -> None:
    bench = make_bench()
    local = make_local(bench.services.socket_path)
    lengths: dict[int, int] = {}
    record_property("seeds", 11)
    draw = random.Random(11)
    crowd(local, draw, steps, lengths)
    bench.kill("all")
    bench.services.start_all()
    until(lambda: local.worker.attached, "the worker has attached again")
    until(lambda: status(bench.client), "the client has connected again")
    for seed, count in lengths.items():
        assert local.restore(seed, pages_for(count), count).sources == {"disk": count}
    crowd(local, draw, steps // 4, lengths)
    assert bench.client.status().counters["restores.disk"] > 0
    forget_all(bench.client)
    assert next(t for t in bench.client.status().tiers if t.name == "disk").objects == 0


def flip_a_bit(daemon: Embedded, seed: int) -> None:
    """In the payload of one of the conversation's blocks, wherever the store has put it."""
    needle = truth(seed, 0, 40)[36].tobytes()
    for path in Path(daemon.config.disk_directory).rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        at = data.find(needle)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([data[at] ^ 1]))
            return
    raise AssertionError("the conversation is in no file of the store")


def push_out(client: Client, local: LocalWorker, seed: int) -> None:
    for filler in range(900, 916):
        local.park(filler, pages_for(192, 32), 192).result()
        info = client.show(f"chat-{seed}")
        if info is not None and info.host_tokens == 0:
            return
    raise AssertionError("the conversation did not leave host memory")


def test_a_flipped_bit_on_disk_is_a_miss_and_healed_by_the_next_park(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    client_of: Callable[[Embedded], Client],
) -> None:
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    push_out(client, local, 1)
    flip_a_bit(daemon, 1)
    receipt = local.restore(1, PAGES, TOKENS)
    # The flip is in the second block: what is before it may be there.
    assert (receipt.reason, receipt.tokens <= 32) == ("corrupt", True), receipt
    assert local.kv.strange(1, PAGES, TOKENS) == 0
    until(lambda: any(t.quarantined for t in client.status().tiers if t.name == "disk"), "it is counted")
    again = local.restore(1, PAGES, TOKENS)
    assert again.tokens <= 32
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    push_out(client, local, 1)
    assert local.restore(1, PAGES, TOKENS).tokens == TOKENS


def test_without_checks_a_flipped_bit_is_delivered(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    client_of: Callable[[Embedded], Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: the comparison of bytes sees what the checks are there for."""
    monkeypatch.setattr(disk_service, "DiskTier", partial(DiskTier, check=False))
    daemon = make_daemon(host__verify="arrival")
    client, local = client_of(daemon), make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS, level="disk").result().ok
    push_out(client, local, 1)
    flip_a_bit(daemon, 1)
    with pytest.raises(AssertionError):
        local.restore(1, PAGES, TOKENS)
    assert local.kv.front(1, PAGES, TOKENS) == 36


def test_a_flipped_bit_in_host_memory_is_read_again_from_disk(
    make_daemon: Callable[..., Embedded],
    make_local: Callable[..., LocalWorker],
    client_of: Callable[[Embedded], Client],
) -> None:
    daemon = make_daemon()
    client, local = client_of(daemon), make_local(daemon.socket_path)
    for level, tokens in (("disk", TOKENS), ("host", 0)):
        assert local.park(1, PAGES, TOKENS, level=level).result().ok
        attachment = local.worker._attachment
        assert attachment is not None
        assert attachment.arena is not None
        used = host(client).used_bytes
        memory: Any = attachment.arena.view((0, 0), used)
        at = memory.tobytes().find(truth(1, 0, 5)[4].tobytes())
        assert at >= 0
        memory[at] ^= 1
        receipt = local.restore(1, PAGES, TOKENS)
        assert receipt.tokens == tokens, receipt
        assert host(client).quarantined
        forget_all(client)


def test_a_hung_disk_makes_full_memory_push_back(
    make_bench: Callable[..., Bench], make_local: Callable[..., LocalWorker]
) -> None:
    """Nothing can be spilled meanwhile; nothing that was parked is dropped for it."""
    bench = make_bench()
    local = make_local(bench.services.socket_path)
    bench.services.signal("disk", signal.SIGSTOP)
    held = []
    for seed in range(8):
        receipt = local.park(seed, PAGES, TOKENS, timeout_s=1.0).result()
        if receipt.ok:
            held.append(seed)
        else:
            assert receipt.reason in ("backpressure", "deadline"), receipt
    assert held
    bench.services.signal("disk", signal.SIGCONT)
    for seed in held:
        assert local.restore(seed, PAGES, TOKENS).tokens == TOKENS
    assert local.park(50, PAGES, TOKENS, level="disk").result().ok
    for seed in range(8):
        # What was refused may have left its first blocks.
        bench.client.forget(f"chat-{seed}")
    forget_all(bench.client)

"""A daemon that evicts by worth: what it learned outlives it, and its log gives the same decisions again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvtier.config.secrets import tenant_secret
from kvtier.daemon.policy_state import NAME, read_sections
from kvtier.errors import KvtierError
from kvtier.host.slots import HostSlots
from kvtier.node import journal
from kvtier.policy.defaults import make_policies
from kvtier.testing.kv_memory import pages_for
from kvtier.testing.node_bench import Bench, until

TOKENS = 190
PAGES = pages_for(TOKENS)


def waits_seen(bench: Bench) -> int:
    """What the daemon has written down."""
    kept = read_sections(Path(bench.services.config.node.state_dir) / NAME)
    return int(json.loads(kept["returns"])["waits"]) if "returns" in kept else 0


def come_and_go(bench: Bench, seeds: range) -> None:
    """More conversations than host memory holds are parked, and come back."""
    worker = bench.worker
    for seed in seeds:
        assert worker.result(worker.park(seed, PAGES, TOKENS, level="disk"))["ok"]
    for seed in seeds:
        assert worker.result(worker.restore(seed, PAGES, TOKENS)["handle"])["tokens"] == TOKENS


@pytest.fixture(scope="module")
def two_lives(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A node that is stopped and started again, with what could be seen of it."""
    path = tmp_path_factory.mktemp("log") / "stimuli"
    bench = make_bench(log__stimulus_log=str(path), policy__eviction="cost")
    seen: dict[str, Any] = {}
    come_and_go(bench, range(6))
    seen["explained"] = bench.client.explain("chat-1")
    bench.services.stop_all()
    seen["kept"] = waits_seen(bench)
    bench.recover()
    seen["after"] = bench.client.explain("chat-1")
    come_and_go(bench, range(20, 26))
    until(lambda: not any(w.running_jobs for w in bench.client.status().workers), "all is quiet")
    seen["secret"] = tenant_secret(bench.services.config)
    seen["warnings"] = bench.client.status().warnings
    bench.services.stop_all()
    seen["in the end"] = waits_seen(bench)
    bench.close()
    return seen | {"log": path.read_bytes()}


def test_what_was_learned_outlives_the_daemon(two_lives: dict[str, Any]) -> None:
    assert two_lives["kept"] >= 6
    assert two_lives["in the end"] >= two_lives["kept"] + 6, "it went on from there"
    assert not any("learned" in warning for warning in two_lives["warnings"])


def test_conversations_are_waited_for_since_they_were_parked(two_lives: dict[str, Any]) -> None:
    before, after = two_lives["explained"], two_lives["after"]
    assert before.policy.startswith("cost")
    assert before.found
    assert after.found
    # Reading ahead may have brought it back into memory by now.
    assert "disk" in after.runs[0].tiers
    assert after.runs[0].idle_s > 0
    assert 0 < after.runs[0].returns[0] < after.runs[0].returns[2] < 1


def replayed(entries: list[dict[str, Any]], secret: bytes) -> int:
    def make_host(origin: journal.Origin) -> HostSlots:
        sizes = list(origin.arena_bytes)
        return HostSlots(
            sizes,
            ready_bytes=[0] * len(sizes),
            max_slots=origin.generation_slots,
            first_generation=origin.epoch,
        )

    log = b"".join(msgpack.packb(entry) for entry in entries)
    return journal.replay(journal.read(io.BytesIO(log)), make_host, lambda: make_policies("cost"), secret)


def test_the_log_of_both_lives_is_replayed_to_the_same_decisions(two_lives: dict[str, Any]) -> None:
    entries = list(journal.read(io.BytesIO(two_lives["log"])))
    assert replayed(entries, two_lives["secret"]) == len(entries) - 2


def test_another_past_gives_other_explanations(two_lives: dict[str, Any]) -> None:
    """The control: without what the second life began with, it does not answer the same."""
    entries = list(journal.read(io.BytesIO(two_lives["log"])))
    pasts = [n for n, entry in enumerate(entries) if entry.get("kind") == "Remembered"]
    assert len(pasts) == 2
    forgetful = [entry for n, entry in enumerate(entries) if n != pasts[1]]
    with pytest.raises(KvtierError):
        replayed(forgetful, two_lives["secret"])

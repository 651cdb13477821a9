"""A running daemon decides by cost, says how long it will take, learns, and keeps what it learned."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config.secrets import tenant_secret
from kvtier.daemon.embedded import Embedded
from kvtier.daemon.endpoints import node_metrics
from kvtier.daemon.policy_state import NAME, PolicyState, read_sections, write_sections
from kvtier.errors import GeometryError, KvtierError, ModelSpecError
from kvtier.host.slots import HostSlots
from kvtier.node import journal
from kvtier.policy.defaults import make_policies
from kvtier.testing.kv_memory import pages_for, tokens_of
from kvtier.testing.node_bench import Bench, LocalWorker, until

TOKENS = 190
PAGES = pages_for(TOKENS)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def counters(daemon: Embedded) -> dict[str, float]:
    report = daemon.node.ask(lambda core: core.status())
    assert report is not None
    return report.counters


def report_prefills(daemon: Embedded, local: LocalWorker, seconds: float, count: int = 10) -> None:
    seen = counters(daemon)["eta.prefills"]
    for _ in range(count):
        local.worker.prefilled(TOKENS, seconds)
    until(lambda: counters(daemon)["eta.prefills"] == seen + count, "the prefills are known")


@pytest.fixture
def daemon(make_daemon: Callable[..., Embedded]) -> Embedded:
    return make_daemon(policy__restore="cost")


def test_a_plan_says_how_long_and_why_and_is_judged(
    daemon: Embedded, make_local: Callable[..., LocalWorker]
) -> None:
    local = make_local(daemon.socket_path)
    assert local.park(1, PAGES, TOKENS).result().ok
    plan = local.worker.plan("chat-1", tokens_of(1, TOKENS))
    assert 0 < plan.eta_s[0] <= plan.eta_mid_s <= plan.eta_s[1]
    assert "loading takes" in plan.why
    local.worker.drop(plan)
    for _ in range(3):
        assert local.restore(1, PAGES, TOKENS).tokens == TOKENS
    seen = counters(daemon)
    assert seen["eta.inside"] + seen["eta.early"] + seen["eta.late"] == 3
    assert seen["plans.load"] == 4
    metrics = daemon.node.ask(node_metrics)
    assert metrics is not None
    assert sum(metrics.eta.errors.counts) == 3
    assert sum(metrics.eta.outcomes.values()) == 3


@pytest.mark.parametrize(("seconds", "way"), [(20.0, "load"), (1e-6, "recompute")])
def test_the_worker_s_own_prefills_decide(
    daemon: Embedded, make_local: Callable[..., LocalWorker], seconds: float, way: str
) -> None:
    local = make_local(daemon.socket_path, config=CONFIG)
    assert local.park(1, PAGES, TOKENS).result().ok
    report_prefills(daemon, local, seconds)
    plan = local.worker.plan("chat-1", tokens_of(1, TOKENS))
    assert (plan.recompute_ttft_s < plan.load_ttft_s) == (way == "recompute")
    assert plan.reason == ("recompute" if way == "recompute" else "")
    receipt = local.worker.restore(plan, PAGES, deadline_s=20.0)
    assert (receipt.tokens, receipt.reason) == ((0, "recompute") if way == "recompute" else (TOKENS, ""))
    assert counters(daemon)[f"plans.{way}"] == 1


def test_both_at_once_puts_what_follows_the_front_in_place(
    daemon: Embedded, make_local: Callable[..., LocalWorker]
) -> None:
    local = make_local(daemon.socket_path, config=CONFIG)
    assert local.park(1, PAGES, TOKENS).result().ok
    # Loading takes milliseconds here: as long as a prefill of these must take for both to be worth it.
    load_s = local.worker.plan("chat-1", tokens_of(1, TOKENS)).eta_mid_s
    report_prefills(daemon, local, load_s, count=30)
    plan = local.worker.plan("chat-1", tokens_of(1, TOKENS), takes="both")
    local.kv.poison(PAGES)
    receipt = local.worker.restore(plan, PAGES, deadline_s=20.0)
    assert receipt.loaded_from == plan.load_from
    if plan.load_from:
        local.kv.put(1, PAGES[: plan.load_from // 16], plan.load_from)
    assert local.kv.front(1, PAGES, receipt.tokens) >= receipt.tokens


def test_nonsense_is_refused_before_anything_is_sent(
    daemon: Embedded, make_local: Callable[..., LocalWorker]
) -> None:
    with pytest.raises(GeometryError):
        make_local(daemon.socket_path, config=CONFIG, devices=0)
    with pytest.raises(ModelSpecError):
        make_local(daemon.socket_path, config={"model_type": "llama"})
    local = make_local(daemon.socket_path)
    with pytest.raises(KvtierError):
        local.worker.plan("chat-1", [1, 2], takes="some")  # type: ignore[arg-type]
    local.worker.prefilled(0, 1.0)
    local.worker.prefilled(5, -1.0)
    local.worker.prefilled(5, 1.0)
    assert counters(daemon)["eta.prefills"] == 0


# --- across restarts ----------------------------------------------------------------------------------------


def make_host(origin: journal.Origin) -> HostSlots:
    """The slots of the logged node, without memory."""
    sizes = list(origin.arena_bytes)
    slots, first = origin.generation_slots, origin.epoch
    return HostSlots(sizes, ready_bytes=[0] * len(sizes), max_slots=slots, first_generation=first)


def replayed(log: bytes, secret: bytes, restore: str = "cost") -> int:
    return journal.replay(
        journal.read(io.BytesIO(log)), make_host, lambda: make_policies("lru", restore), secret
    )


def some_restores(bench: Bench, seed: int) -> list[dict[str, Any]]:
    worker = bench.worker
    assert worker.result(worker.park(seed, PAGES, TOKENS, level="disk"))["ok"]
    found = [worker.result(worker.restore(seed, PAGES, TOKENS)["handle"]) for _ in range(6)]
    assert all(receipt["tokens"] == TOKENS for receipt in found)
    return found


def test_what_was_learned_outlives_the_daemon_and_its_replay_is_identical(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    log = tmp_path / "stimuli"
    bench = make_bench(policy__restore="cost", log__stimulus_log=str(log))
    kept = Path(bench.services.config.node.state_dir) / NAME
    some_restores(bench, 1)
    bench.services.stop_all()
    learned = read_sections(kept)
    assert b'"host"' in learned["costs"]
    bench.services.start_all()
    bench.recover()
    some_restores(bench, 2)
    bench.services.kill_all()
    # What was learned since is lost with a crash, and nothing else.
    assert read_sections(kept) == learned
    bench.services.start_all()
    bench.recover()
    some_restores(bench, 3)
    secret = tenant_secret(bench.services.config)
    bench.close()
    entries = list(journal.read(io.BytesIO(log.read_bytes())))
    remembered = [entry["sections"] for entry in entries if entry.get("kind") == "Remembered"]
    assert remembered == [{}, learned, learned]
    assert replayed(log.read_bytes(), secret) == len(entries) - 3
    # The control: other memories give other plans.
    for entry in entries:
        if entry.get("sections"):
            entry["sections"] = {}
    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(b"".join(msgpack.packb(entry) for entry in entries), secret)


def test_a_damaged_memory_does_not_keep_the_daemon_from_starting(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(policy__restore="cost")
    kept = Path(bench.services.config.node.state_dir) / NAME
    some_restores(bench, 1)
    bench.services.stop_all()
    kept.write_bytes(kept.read_bytes()[:-7])
    bench.services.start_all()
    bench.recover()
    some_restores(bench, 2)
    bench.services.stop_all()
    assert b'"host"' in read_sections(kept)["costs"]


# --- the file -----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=100), max_size=5), st.data())
def test_a_damaged_file_is_noticed_wherever_it_is_hurt(
    tmp_path_factory: pytest.TempPathFactory, sections: dict[str, bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("s") / NAME
    write_sections(path, sections)
    assert read_sections(path) == sections
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    assert read_sections(path) in ({}, sections)
    path.write_bytes(whole[:at])
    assert read_sections(path) == {}
    assert os.listdir(path.parent) == [NAME]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc0",
        msgpack.packb([1]),
        msgpack.packb({"version": 1}),
        msgpack.packb({"version": 2}),
        b"\xff" * 99,
    ],
)
def test_what_is_no_such_file_is_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert read_sections(tmp_path / NAME) == {}
    assert read_sections(tmp_path / "absent") == {}


def test_it_is_written_when_it_is_time_and_something_is_new(tmp_path: Path) -> None:
    state, learned, asked = PolicyState(tmp_path, 10.0), {"a": b"1"}, []

    def now() -> dict[str, bytes]:
        asked.append(1)
        return dict(learned)

    assert state.read() == {}
    for now_s in (0.0, 9.9, 10.0, 10.1):
        state.tend(now_s, now)
    until(lambda: read_sections(tmp_path / NAME) == learned, "it is written")
    assert len(asked) == 1
    written = (tmp_path / NAME).stat().st_mtime_ns
    state.tend(20.1, now)
    state.close(learned)
    assert (tmp_path / NAME).stat().st_mtime_ns == written
    again = PolicyState(tmp_path, 10.0)
    assert again.read() == learned
    again.close({"a": b"2"})
    assert read_sections(tmp_path / NAME) == {"a": b"2"}


def test_a_crash_while_it_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sections(tmp_path / NAME, {"a": b"old"})

    def crash(*_: object) -> None:
        raise OSError(5, "Input/output error")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, crash)
            PolicyState(tmp_path, 1.0).close({"a": b"new"})
        assert read_sections(tmp_path / NAME) == {"a": b"old"}
        assert os.listdir(tmp_path) == [NAME]

"""Calls with garbage to the node's and the GPU service's sockets: typed errors, and both go on serving."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from kvtier.client.client import connect
from kvtier.config.credentials import Access
from kvtier.daemon import node_service
from kvtier.daemon.embedded import Embedded
from kvtier.errors import AuthError, KvtierError, ProtocolError, VersionMismatch
from kvtier.messages import calls as m
from kvtier.messages import protocol
from kvtier.messages import tiers as tier_messages
from kvtier.messages.calls import Failed, Hello
from kvtier.messages.wire import Channel, ChannelLost, hello
from kvtier.testing.kv_memory import KvMemory, pages_for, tokens_of
from kvtier.testing.node_bench import FAST, Bench, LocalWorker, until
from kvtier.testing.raw_socket import WAIT_S, answers, ask, attach_of, joined, raw, refused

pytestmark = pytest.mark.usefixtures("unharmed")
TOKENS = tokens_of(1, 64).tobytes()
NAN = math.nan


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(params=["node", "gpu"])
def address(request: pytest.FixtureRequest, bench: Bench) -> str:
    """Path of either socket."""
    return str(Path(bench.services.socket_path).with_name(f"{request.param}.sock"))


# --- below the protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "MessageTooLarge"),
        (struct.pack("<I", 100 << 20) + b"x" * 1000, "MessageTooLarge"),
        (struct.pack("<I", 5) + b"\xc1\xff\x00zz", "MalformedMessage"),
        (struct.pack("<I", 0), "MalformedMessage"),
        (protocol.LENGTH.pack(4) + b"\xdd\xff\xff\xff", "MalformedMessage"),
        (protocol.LENGTH.pack(1) + b"\x80", "MalformedMessage"),
        (protocol.LENGTH.pack(600) + b"\x91" * 599 + b"\xc0", "MalformedMessage"),
        # Deeper than any decoder goes, in a field that nobody knows.
        (
            protocol.LENGTH.pack(100_013) + b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 100_000,
            "MalformedMessage",
        ),
    ],
)
def test_bytes_that_are_no_message(address: str, data: bytes, error: str) -> None:
    with raw(address) as connected:
        connected.sendall(data)
        (answer,) = answers(connected)
    assert isinstance(answer, Failed)
    assert answer.error == error


@pytest.mark.parametrize(
    "fields", [{"type": "hello"}, {"type": 5}, {"type": "nothing"}, [1, 2], "text", None]
)
def test_maps_that_are_no_message(address: str, fields: Any) -> None:
    body = msgpack.packb(fields)
    with raw(address) as connected:
        connected.sendall(protocol.LENGTH.pack(len(body)) + body)
        (answer,) = answers(connected)
    assert isinstance(answer, Failed)
    assert answer.error == "MalformedMessage"


def test_whoever_leaves_in_the_middle_of_a_frame_or_a_handshake(address: str) -> None:
    greeting = protocol.encode(hello("client"))
    for data in (b"", b"\x05", greeting[:9], greeting, greeting * 3):
        for _ in range(10):
            with raw(address) as connected:
                connected.sendall(data)


def test_descriptors_that_nobody_asked_for_are_closed(address: str) -> None:
    reader, writer = os.pipe()
    try:
        for data in (b"\x05", protocol.encode(hello("client"))):
            with raw(address) as connected:
                socket.send_fds(connected, [data], [writer] * 20)
        os.close(writer)
        writer = -1
        # The pipe ends once no process holds its other end.
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_the_first_message_must_be_a_greeting(address: str) -> None:
    with raw(address) as connected:
        connected.sendall(protocol.encode(m.Ping(id=3)))
        (answer,) = answers(connected)
    assert isinstance(answer, Failed)
    assert (answer.error, answer.id) == ("MalformedMessage", 3)


def test_a_version_from_the_future_is_refused(address: str) -> None:
    future = Hello(id=1, role="client", oldest=protocol.VERSION + 1, newest=protocol.VERSION + 5)
    with pytest.raises(VersionMismatch):
        Channel.open(address, future, time.monotonic() + WAIT_S)


def test_a_newer_end_that_speaks_this_version_too_is_welcome(bench: Bench) -> None:
    newer = Hello(id=1, role="client", oldest=protocol.VERSION, newest=protocol.VERSION + 5)
    channel = Channel.open(bench.services.socket_path, newer, time.monotonic() + WAIT_S)
    assert channel.welcome is not None
    assert channel.welcome.version == protocol.VERSION
    channel.close()


def test_the_previous_version_is_accepted(
    make_daemon: Callable[..., Embedded], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(disk__enabled=False)
    agree = protocol.agree_version
    monkeypatch.setattr(protocol, "agree_version", partial(agree, oldest=1, newest=2))
    with connect(daemon.socket_path, backoff=FAST) as client:
        client.ping()
    monkeypatch.setattr(protocol, "agree_version", partial(agree, oldest=2, newest=3))
    with pytest.raises(VersionMismatch):
        connect(daemon.socket_path, backoff=FAST)


# --- who may -----------------------------------------------------------------------------------------------


def test_another_user_needs_the_token(
    make_daemon: Callable[..., Embedded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-letters")
    token.chmod(0o600)
    stranger = tmp_path / "stranger"
    stranger.write_text("another-token-of-letters")
    stranger.chmod(0o600)
    daemon = make_daemon(disk__enabled=False, access__token_file=str(token))
    check = Access.check
    # Everybody here has one user id; from now on the daemon is told that they have another.
    monkeypatch.setattr(Access, "check", lambda access, uid, given: check(access, uid + 12345, given))
    for wrong in (None, stranger):
        with pytest.raises(AuthError):
            connect(daemon.socket_path, token_file=wrong)
    with connect(daemon.socket_path, token_file=token) as client:
        client.ping()


# --- requests that make no sense ---------------------------------------------------------------------------


def park_of(worker: str, **changes: Any) -> m.Park:
    fields = {"worker": worker, "request": 1, "conversation": "c", "tenant": "t", "tokens": TOKENS}
    return m.Park(**{**fields, **changes})


def plan_of(worker: str, **changes: Any) -> m.MakePlan:
    fields = {"worker": worker, "conversation": "c", "tenant": "t", "tokens": TOKENS}
    return m.MakePlan(**{**fields, **changes})


def test_a_second_greeting_and_messages_of_other_roles(bench: Bench) -> None:
    with joined(bench.services.socket_path) as channel:
        for message in (
            hello("client"),
            m.Pong(),
            m.Released(request=1),
            tier_messages.TierHello(pid=1, address="/nowhere"),
            tier_messages.Announce(last=True),
            tier_messages.Copied(job="j", batch=0, ok=True),
            tier_messages.DiskWritten(job="w", ok=True),
            tier_messages.CancelCopies(job="j"),
        ):
            refused(channel, message, "ProtocolError")


def test_who_is_not_attached(bench: Bench) -> None:
    path = bench.services.socket_path
    with joined(path) as channel:
        for message in (
            park_of("worker:0"),
            plan_of(""),
            m.Restore(worker="worker:0", request=1, plan_id="n1", deadline_s=1.0),
            m.Detach(worker="worker:0"),
        ):
            refused(channel, message, "ProtocolError")
    for role in ("events", "copy"):
        with pytest.raises(ProtocolError):
            Channel.open(path, hello(role, worker="worker:0"), time.monotonic() + WAIT_S)


def test_attaching_with_what_does_not_fit(bench: Bench) -> None:
    good = attach_of(KvMemory(4))
    replace = msgspec.structs.replace
    group = good.geometry.groups[0]

    def geometry(**changes: Any) -> m.Attach:
        return replace(good, geometry=dataclass_replace(good.geometry, **changes))

    with joined(bench.services.socket_path) as channel:
        refused(channel, replace(good, fingerprint=b""), "FingerprintError")
        refused(channel, replace(good, fingerprint=b"x" * 31), "FingerprintError")
        refused(channel, geometry(block_tokens=33), "GeometryError")
        refused(channel, geometry(block_tokens=0), "GeometryError")
        refused(channel, geometry(page_tokens=-16), "GeometryError")
        refused(channel, geometry(groups=()), "GeometryError")
        refused(channel, geometry(groups=(dataclass_replace(group, token_bytes=-1),)), "GeometryError")
        refused(channel, replace(good, shard=""), "GeometryError")
        refused(channel, replace(good, mode="shared"), "GeometryError")
        refused(channel, replace(good, mode="shared", pool={"version": 1}), "GeometryError")


def dataclass_replace(value: Any, **changes: Any) -> Any:
    """As dataclasses.replace."""
    return type(value)(**{**{name: getattr(value, name) for name in value.__dataclass_fields__}, **changes})


@pytest.fixture
def attached(bench: Bench) -> Iterator[tuple[Channel, str]]:
    """A control connection whose worker never opens its others."""
    with joined(bench.services.socket_path) as channel:
        answer = ask(channel, attach_of(KvMemory(4)))
        assert isinstance(answer, m.Attached)
        yield channel, answer.worker
        assert isinstance(ask(channel, m.Detach(worker=answer.worker)), m.Done)


REFUSALS = ("TokensError", "GeometryError", "KvtierError", "ConfigError", "ProtocolError", "TierFull")
BAD_PARKS: list[dict[str, Any]] = [
    {"tokens": b""},
    {"tokens": b"abc"},
    {"after_key": b"garbage", "after_tokens": 32},
    {"after_key": b"g" * 32, "after_tokens": 32},
    {"after_tokens": 5},
    {"after_tokens": -32},
    {"extras": [(-1, b"x")]},
    {"extras": [(10**15, b"x")]},
    {"held_from": [-1]},
    {"held_from": [0, 0, 0]},
    {"held_from": [10**12]},
    {"fidelity": "blurred"},
    {"fidelity": ""},
    {"tenant": ""},
    {"conversation": ""},
    {"tenant": "t" * 100_000},
    {"conversation": "c" * 100_000},
    {"timeout_s": NAN},
    {"timeout_s": -1.0},
    {"returns_in_s": NAN},
    {"keep_for_s": -5.0},
    {"share": "conversation", "private_from": -7},
    {"share": "conversation", "private_from": 10**15},
    {"request": -1},
]


@pytest.mark.parametrize(
    "changes", BAD_PARKS, ids=lambda c: "-".join(f"{k}={str(v)[:12]}" for k, v in c.items())
)
def test_parks_of_garbage(attached: tuple[Channel, str], changes: dict[str, Any]) -> None:
    """A typed error, or a job that ends; never the end of the node."""
    channel, worker = attached
    answer = ask(channel, park_of(worker, **changes))
    assert isinstance(answer, Failed | m.ParkStarted)
    assert not isinstance(answer, Failed) or answer.error in REFUSALS
    assert isinstance(ask(channel, m.Ping()), m.Pong)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": b""},
        {"tokens": b"abc"},
        {"after_key": b"garbage", "after_tokens": 32},
        {"after_tokens": -1},
        {"extras": [(-5, b"")]},
        {"fidelity": "blurred"},
        {"lease_s": NAN},
        {"lease_s": -1.0},
        {"lease_s": 1e300},
        {"tenant": ""},
        {"conversation": "never heard of"},
    ],
    ids=str,
)
def test_plans_of_garbage(attached: tuple[Channel, str], changes: dict[str, Any]) -> None:
    channel, worker = attached
    answer = ask(channel, plan_of(worker, **changes))
    assert isinstance(answer, Failed | m.Planned)
    if isinstance(answer, m.Planned):
        assert answer.plan.plan_id == ""
        assert answer.plan.reason in ("unknown_conversation", "no_match")


def test_restores_of_garbage(bench: Bench, make_local: Callable[..., LocalWorker]) -> None:
    path = bench.services.socket_path
    owner, pages = make_local(path), pages_for(64)
    assert owner.park(1, pages, 64).result().ok
    with joined(path) as channel:
        answer = ask(channel, attach_of(KvMemory(4)))
        assert isinstance(answer, m.Attached)
        plan = owner.worker.plan("chat-1", tokens_of(1, 64))
        for plan_id in ("", "n0", "worker:1", plan.plan_id, "n" * 100_000):
            request = m.Restore(worker=answer.worker, request=1, plan_id=plan_id, deadline_s=1.0)
            started = ask(channel, request)
            assert isinstance(started, m.RestoreStarted)
            assert started.receipt is not None
            assert started.receipt.reason == "lease_expired"
        # A worker's calls come over the connection that it attached on.
        for message in (
            park_of(plan_owner(owner)),
            plan_of(plan_owner(owner)),
            m.Restore(worker=plan_owner(owner), request=1, plan_id=plan.plan_id, deadline_s=1.0),
            m.Detach(worker=plan_owner(owner)),
        ):
            refused(channel, message, "ProtocolError")
        assert isinstance(ask(channel, m.Detach(worker=answer.worker)), m.Done)
    owner.kv.poison(pages)
    receipt = owner.worker.restore(plan, pages, deadline_s=5.0)
    assert (receipt.tokens, owner.kv.front(1, pages, 64)) == (64, 64)
    assert bench.client.forget("chat-1").found
    owner.worker.close()


def plan_owner(local: LocalWorker) -> str:
    """The node's name for a worker."""
    attachment = local.worker._attachment
    assert attachment is not None
    return attachment.worker


@pytest.mark.parametrize("deadline_s", [NAN, math.inf, -1.0, 1e300])
def test_restores_with_odd_deadlines_end(
    bench: Bench, make_local: Callable[..., LocalWorker], deadline_s: float
) -> None:
    owner, pages = make_local(bench.services.socket_path), pages_for(64)
    assert owner.park(1, pages, 64).result().ok
    plan = owner.worker.plan("chat-1", tokens_of(1, 64))
    with joined(bench.services.socket_path):
        request = m.Restore(worker=plan_owner(owner), request=99, plan_id=plan.plan_id, deadline_s=deadline_s)
        answer = owner.worker._link.exchange(owner.worker._link.prepare(request))
    assert isinstance(answer, Failed | m.RestoreStarted)
    owner.worker.close()
    until(lambda: not any(w.running_jobs for w in bench.client.status().workers), "no job runs")
    assert bench.client.forget("chat-1").found


def test_questions_of_garbage(bench: Bench) -> None:
    with joined(bench.services.socket_path) as channel:
        for message in (
            m.Forget(conversation="nobody", tenant="t"),
            m.Forget(conversation="", tenant=""),
            m.Show(conversation="\0" * 1000, tenant="t"),
            m.Locate(conversation="x" * 100_000, tenant=""),
            m.Hint(conversation="nobody", tenant="t", returns_in_s=NAN),
            m.ListConversations(limit=-5, after=("", "")),
            m.ListConversations(limit=10**18),
            m.DropPlan(plan_id="nothing"),
            m.CopiesEnded(worker="nobody", jobs=["p1", ""]),
        ):
            answer = ask(channel, message)
            assert answer.id == 7
            assert isinstance(ask(channel, m.Ping()), m.Pong)


# --- to the GPU service ------------------------------------------------------------------------------------


def test_roles_that_the_gpu_service_does_not_know(bench: Bench) -> None:
    path = str(Path(bench.services.socket_path).with_name("gpu.sock"))
    for greeting in (hello("client"), hello("disk"), hello("copy")):
        with pytest.raises(KvtierError) as caught:
            Channel.open(path, greeting, time.monotonic() + WAIT_S)
        assert not isinstance(caught.value, ChannelLost)


def test_answers_that_nobody_asked_for(bench: Bench, make_local: Callable[..., LocalWorker]) -> None:
    """Another worker's batches, batches that were never sent, and requests instead of answers."""
    local, pages = make_local(bench.services.socket_path), pages_for(64)
    path = str(Path(bench.services.socket_path).with_name("gpu.sock"))
    with joined(path, "copy", "worker:x") as channel:
        for message in (
            tier_messages.Copied(job="p1", batch=0, ok=True, checksums=[1, 2]),
            tier_messages.Copied(job="", batch=-1, ok=False, failed=[(7, "x")]),
            m.Ping(),
            tier_messages.CancelCopies(job="p1"),
        ):
            channel.send(message, time.monotonic() + WAIT_S)
        assert local.park(1, pages, 64).result().ok
    assert local.restore(1, pages, 64).tokens == 64
    assert bench.client.forget("chat-1").found
    local.worker.close()


def test_a_worker_that_never_listens_to_its_events_is_let_go(
    make_daemon: Callable[..., Embedded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_service, "_UNSENT_MOST", 4)
    daemon = make_daemon()
    with joined(str(daemon.socket_path)) as channel:
        attached = ask(channel, attach_of(KvMemory(4)))
        assert isinstance(attached, m.Attached)
        for number in range(1, 4):
            park = m.Park(
                worker=attached.worker,
                request=number,
                conversation="c",
                tenant="t",
                tokens=TOKENS,
                timeout_s=0.0,
            )
            assert isinstance(ask(channel, park), m.ParkStarted)
        with pytest.raises(ChannelLost):
            until(lambda: not isinstance(ask(channel, m.Ping()), m.Pong), "the connection has ended")
    with joined(str(daemon.socket_path)) as again:
        assert isinstance(ask(again, m.Ping()), m.Pong)

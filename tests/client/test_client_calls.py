"""Client calls: answers, refusals, a hung daemon, late answers, reconnecting, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from datetime import timedelta

import pytest

import kvtier.client.link as link_module
from kvtier import errors
from kvtier.breaker import Backoff
from kvtier.client import client
from kvtier.messages import protocol
from kvtier.messages.calls import (
    Conversations,
    Done,
    Failed,
    Forget,
    Forgotten,
    Hello,
    Hint,
    ListConversations,
    ListModels,
    Locate,
    Located,
    Models,
    Ping,
    Pong,
    Retire,
    Show,
    Status,
    StatusIs,
)
from kvtier.messages.wire import ChannelTimeout
from kvtier.receipts import ConversationInfo, ForgetReceipt, ModelInfo, StatusReport

LATER = Backoff(first_s=3600, limit_s=3600, jitter=0)


def info(name: str) -> ConversationInfo:
    return ConversationInfo(name, "acme", 1, 10, 1, "m", 0.0, 10, 0, 100)


def test_calls(kit):
    report = StatusReport("n", 1, "0.1", True, 1.0, (), (), 0, 0, {})
    model = ModelInfo("ab", "m", 1, 1, 1, 1, 0)
    answers = {
        Hint: lambda peer, m: Done(id=m.id),
        Locate: lambda peer, m: Located(id=m.id, nodes=[("n", 5, 0.1)]),
        Forget: lambda peer, m: Forgotten(id=m.id, receipt=ForgetReceipt(m.conversation, m.tenant, True)),
        Show: lambda peer, m: Conversations(id=m.id, conversations=[info(m.conversation)]),
        ListModels: lambda peer, m: Models(id=m.id, models=[model]),
        Retire: lambda peer, m: Models(id=m.id, models=[model]),
        Status: lambda peer, m: StatusIs(id=m.id, report=report),
    }
    kit.node.answers.update(answers)
    with kit.connect() as kv:
        peer = kit.node.peer("client")
        kv.ping()
        kv.hint("chat", tenant="acme", returns_in_s=timedelta(minutes=1), keep_for_s=5)
        sent = peer.next(Hint)
        assert (sent.conversation, sent.tenant) == ("chat", "acme")
        assert (sent.returns_in_s, sent.keep_for_s) == (60.0, 5.0)
        assert kv.locate("chat") == [("n", 5, 0.1)]
        assert kv.forget("chat", tenant="acme") == ForgetReceipt("chat", "acme", True)
        assert kv.show("chat") == info("chat")
        assert kv.models() == [model]
        assert kv.retire("ab") == model
        assert peer.next(Retire).fingerprint == "ab"
        assert kv.status() == report
        kit.node.answers[Show] = lambda peer, m: Conversations(id=m.id, conversations=[])
        assert kv.show("chat") is None


def test_conversations_come_in_pages(kit):
    names = [f"c{i}" for i in range(5)]

    def page(peer, message):
        begin = 0 if message.after is None else names.index(message.after[1]) + 1
        part = [info(name) for name in names[begin : begin + 2]]
        return Conversations(id=message.id, conversations=part, more=begin + 2 < len(names))

    kit.node.answers[ListConversations] = page
    with kit.connect() as kv:
        assert [one.conversation for one in kv.conversations()] == names


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("returns_in_s", lambda kv: kv.hint("c", returns_in_s=-1)),
        ("returns_in_s", lambda kv: kv.hint("c", returns_in_s=float("nan"))),
        ("keep_for_s", lambda kv: kv.hint("c", keep_for_s="2d")),
        ("conversation", lambda kv: kv.show("")),
        ("conversation", lambda kv: kv.show("\udcff")),
        ("tenant", lambda kv: kv.forget("c", tenant="t" * 2000)),
    ],
)
def test_mistakes_are_raised_before_anything_is_sent(kit, field, call):
    with kit.connect() as kv:
        peer = kit.node.peer("client")
        with pytest.raises(errors.ConfigError) as caught:
            call(kv)
        assert caught.value.field == field
        kv.ping()
        assert isinstance(peer.received.get(), Hello) and isinstance(peer.received.get(), Ping)


def test_what_the_node_refuses_is_raised_and_the_connection_stays(kit):
    kit.node.answers[Hint] = lambda peer, m: Failed(id=m.id, error="TokensError", message="bad", fix="do")
    with kit.connect() as kv:
        with pytest.raises(errors.TokensError, match="bad"):
            kv.hint("c")
        kv.ping()
        assert kv.connected


def test_no_daemon(tmp_path):
    with pytest.raises(errors.DaemonNotFound):
        client.connect(tmp_path / "node.sock")
    before = threading.active_count()
    with client.connect(tmp_path / "node.sock", required=False, backoff=LATER) as kv:
        assert not kv.connected
        with pytest.raises(errors.DaemonNotFound):
            kv.ping()
    assert threading.active_count() == before


def test_refusals_are_raised_even_when_the_daemon_is_not_required(kit):
    kit.node.answers[Hello] = lambda peer, m: Failed(id=m.id, error="AuthError", message="no")
    with pytest.raises(errors.AuthError):
        kit.connect(required=False)


def test_the_token_goes_with_hello(kit, tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    with kit.connect(token_file=path):
        assert kit.node.peer("client").next(Hello).token == "0123456789abcdef"


def test_a_hung_daemon_costs_one_time_out(kit):
    with kit.connect(timeout_s=0.5, backoff=LATER) as kv:
        peer = kit.node.peer("client")
        kit.node.hung = True
        with pytest.raises(ChannelTimeout):
            kv.ping()
        assert isinstance(peer.next(Ping), Ping)
        for _ in range(100):
            with pytest.raises(errors.DaemonNotFound) as caught:
                kv.ping()
            assert not isinstance(caught.value, ChannelTimeout)
        assert peer.received.empty() and kit.node.joined.empty()


def test_a_late_answer_is_nobody_elses(kit):
    """The first Ping is answered only after the caller gave up; the next call must not get that answer."""
    late = []
    kit.node.answers[Ping] = lambda peer, m: late.append((peer, m)) if not late else Pong(id=m.id)
    with kit.connect(timeout_s=0.5) as kv:
        with pytest.raises(ChannelTimeout):
            kv.ping()
        kit.until(lambda: late, "the first call arrived")
        first, request = late[0]
        with pytest.raises(OSError):
            while True:
                first.send(Pong(id=request.id))
        kit.until(lambda: kv.connected, "it is connected again")
        kv.ping()
        assert kit.node.peer("client") is first and kit.node.peer("client") is not first


def answer_a_late(kit):
    """The answer about 'a' comes only when 'b' is asked for, before the answer about 'b'."""
    late = []

    def locate(peer, message):
        if message.conversation == "a":
            late.append(message.id)
            return None
        peer.send(Located(id=late[0], nodes=[("where a is", 0, 0.0)]))
        return Located(id=message.id, nodes=[("where b is", 0, 0.0)])

    kit.node.answers[Locate] = locate


def test_ids_catch_a_late_answer_where_the_connection_was_kept(kit, monkeypatch):
    answer_a_late(kit)
    monkeypatch.setattr(link_module.Link, "fail", lambda self, era, error: None)
    with kit.connect(timeout_s=0.5) as kv:
        with pytest.raises(ChannelTimeout):
            kv.locate("a")
        with pytest.raises(errors.MalformedMessage, match="instead of"):
            kv.locate("b")


def test_control_without_both_guards_the_late_answer_is_taken(kit, monkeypatch):
    """Negative control: the situation of the two tests above is the one that they guard against."""
    answer_a_late(kit)

    def exchange(self, frame, request_id, deadline_s, fds=()):
        self.send_frame(frame, deadline_s, fds)
        return self.recv(deadline_s)

    with kit.connect(timeout_s=0.5) as kv:
        monkeypatch.setattr(link_module.Link, "fail", lambda self, era, error: None)
        monkeypatch.setattr(link_module.Channel, "exchange", exchange)
        with pytest.raises(ChannelTimeout):
            kv.locate("a")
        assert kv.locate("b") == [("where a is", 0, 0.0)]


def test_garbage_ends_the_connection_and_a_new_one_is_made(kit):
    def garbage(peer, message):
        peer.socket.sendall(protocol.LENGTH.pack(1) + b"\xc1")

    kit.node.answers[Ping] = garbage
    with kit.connect() as kv:
        with pytest.raises(errors.MalformedMessage):
            kv.ping()
        del kit.node.answers[Ping]
        kit.until(lambda: kv.connected, "it is connected again")
        kv.ping()


def test_the_daemon_is_restarted(kit):
    with kit.connect() as kv:
        kv.ping()
        kit.node.stop()
        with pytest.raises(errors.DaemonNotFound):
            kv.ping()
        kit.node.start()
        kit.until(lambda: kv.connected, "it is connected again")
        kv.ping()
        kit.until(lambda: "kvtier-link" not in {t.name for t in threading.enumerate()}, "the mender ended")


def test_one_thread_tries_again(kit):
    kit.node.stop()
    with kit.connect(required=False) as kv:
        for _ in range(50):
            with pytest.raises(errors.DaemonNotFound):
                kv.ping()
        assert [t.name for t in threading.enumerate()].count("kvtier-link") == 1
        kit.node.start()
        kit.until(lambda: kv.connected, "it is connected")


def test_calls_from_many_threads_get_their_own_answers(kit):
    kit.node.answers[Locate] = lambda peer, m: Located(id=m.id, nodes=[(m.conversation, 0, 0.0)])
    wrong = []
    with kit.connect() as kv:

        def work(me: str) -> None:
            wrong.extend(1 for _ in range(50) if kv.locate(me)[0][0] != me)

        threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wrong == []


def test_an_interrupted_call_gives_the_connection_up(kit, monkeypatch):
    with kit.connect() as kv:
        first = kit.node.peer("client")
        real = link_module.Channel.recv

        def interrupted(self, deadline_s):
            monkeypatch.setattr(link_module.Channel, "recv", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(link_module.Channel, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kv.ping()
        kit.until(lambda: kv.connected, "it is connected again")
        kv.ping()
        assert kit.node.peer("client") is not first


def test_a_forked_process_is_told_so(kit):
    with kit.connect() as kv:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                kv.ping()
            except errors.KvtierError as error:
                code = 0 if "forked" in str(error) else 2
            kv.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        kv.ping()


def test_embedded(kit, monkeypatch):
    ended = []
    fake = types.ModuleType("kvtier.daemon.embedded")
    fake.start = lambda: types.SimpleNamespace(socket_path=kit.node.path, close=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, "kvtier.daemon.embedded", fake)
    with client.connect("embedded:") as kv:
        kv.ping()
        assert not ended
    assert ended == [1]
    kit.node.stop()
    with pytest.raises(errors.DaemonNotFound):
        client.connect("embedded:")
    assert ended == [1, 1]


def test_close_twice_and_calls_after_it(kit):
    kv = kit.connect()
    kv.close()
    kv.close()
    with pytest.raises(errors.DaemonNotFound, match="closed"):
        kv.ping()


def test_importing_the_client_is_light():
    code = (
        "import sys, kvtier, kvtier.client.client, kvtier.client.aio\n"
        "heavy = {'numpy', 'torch', 'ray', 'cupy', 'xxhash', 'kvtier.gpu', 'kvtier.host'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr

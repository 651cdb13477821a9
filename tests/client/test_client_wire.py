"""Frames, descriptors, deadlines, handshakes, and what is found at a path."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import errors
from kvtier.messages import protocol, wire
from kvtier.messages.calls import Failed, Hello, Ping, Pong, Welcome
from kvtier.messages.wire import (
    MAX_DESCRIPTORS,
    Channel,
    ChannelLost,
    ChannelTimeout,
    FrameBuffer,
    error_of,
    hello,
)


def soon() -> float:
    return time.monotonic() + 5.0


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "here")
    yield channel, theirs
    channel.close()
    theirs.close()


def send_fds(peer: socket.socket, data: bytes, fds: list[int]) -> None:
    socket.send_fds(peer, [data], fds)


def feed(frames: FrameBuffer, data: bytes, fds: list[int]) -> None:
    """As one read would."""
    frames.room(len(data))[: len(data)] = data
    frames.feed(len(data), fds)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_frames_are_cut_anywhere(bodies, data):
    stream = b"".join(protocol.LENGTH.pack(len(body)) + body for body in bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, found = FrameBuffer(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        feed(frames, stream[begin:end], [])
        while (body := frames.peek()) is not None:
            found.append(bytes(body))
            assert frames.take() == []
    assert found == bodies


@given(st.data())
def test_descriptors_go_with_the_frame_that_they_came_beside(data):
    """Reads as the kernel gives them: each ends behind the piece that descriptors came with, or earlier."""
    frames = FrameBuffer()
    bodies = data.draw(st.lists(st.tuples(st.binary(max_size=9), st.booleans()), min_size=1, max_size=6))
    found, number, waiting = [], 0, b""
    for body, with_fd in bodies:
        frame = protocol.LENGTH.pack(len(body)) + body
        cut = data.draw(st.integers(1, len(frame)))
        if with_fd:
            number += 1
            feed(frames, waiting + frame[:cut], [-number])
            waiting = frame[cut:]
        else:
            waiting += frame
            if data.draw(st.booleans()):
                feed(frames, waiting, [])
                waiting = b""
    feed(frames, waiting, [])
    while (body := frames.peek()) is not None:
        found.append((bytes(body), bool(frames.take())))
    assert found == bodies


@given(st.lists(st.integers(0, 200), min_size=1, max_size=9), st.data())
def test_frames_are_whole_wherever_the_buffer_has_to_move_or_grow(lengths, data):
    bodies = [bytes([n + 1]) * length for n, length in enumerate(lengths)]
    stream = b"".join(protocol.LENGTH.pack(len(body)) + body for body in bodies)
    found: list[bytes] = []
    with mock.patch.multiple(wire, _ROOM_BYTES=8, _KEPT_BYTES=64):
        frames = FrameBuffer()
        while stream:
            room = frames.room()
            count = data.draw(st.integers(1, min(len(room), len(stream))))
            room[:count], stream = stream[:count], stream[count:]
            frames.feed(count, [])
            while (body := frames.peek()) is not None:
                found.append(bytes(body))
                frames.take()
        assert found == bodies
        assert len(frames.room()) <= 64


def test_one_byte_at_a_time(pair):
    channel, peer = pair
    for byte in protocol.encode(Ping(id=9)):
        assert channel.recv_ready() == []
        peer.sendall(bytes([byte]))
    assert channel.recv(soon()) == (Ping(id=9), [])


def test_several_in_one_read(pair):
    channel, peer = pair
    peer.sendall(b"".join(protocol.encode(Ping(id=i)) for i in range(3)))
    assert [message.id for message, _ in channel.recv_ready()] == [0, 1, 2]


def test_descriptors_arrive_with_their_message_and_close_on_exec(pair):
    channel, peer = pair
    read_end, write_end = os.pipe()
    peer.sendall(protocol.encode(Ping(id=1)))
    send_fds(peer, protocol.encode(Ping(id=2)), [write_end])
    assert channel.recv(soon()) == (Ping(id=1), [])
    message, fds = channel.recv(soon())
    assert message.id == 2 and len(fds) == 1
    assert fcntl.fcntl(fds[0], fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fds[0], b"x")
    assert os.read(read_end, 1) == b"x"
    for fd in (read_end, write_end, fds[0]):
        os.close(fd)


def test_unclaimed_descriptors_are_closed(kit, pair):
    channel, peer = pair
    before = kit.open_fds()
    read_end, write_end = os.pipe()
    send_fds(peer, protocol.encode(Ping())[:3], [write_end])
    os.close(write_end)
    assert channel.recv_ready() == []
    channel.close()
    assert os.read(read_end, 1) == b"", "the write end is still open somewhere"
    os.close(read_end)
    assert kit.open_fds() == before - 1


def test_too_many_descriptors(kit, pair):
    channel, peer = pair
    before = kit.open_fds()
    send_fds(peer, protocol.encode(Ping()), [0] * (MAX_DESCRIPTORS + 2))
    with pytest.raises(errors.MalformedMessage):
        channel.recv(soon())
    assert channel.fileno() == -1 and kit.open_fds() == before - 1


def test_a_message_of_100_mb_is_refused_before_it_comes(pair):
    channel, peer = pair
    peer.sendall(struct.pack("<I", 100 << 20))
    with pytest.raises(errors.MessageTooLarge):
        channel.recv(soon())
    assert channel.fileno() == -1


@pytest.mark.parametrize("body", [b"\xc1", b"", b"\x81\xa4type\xa4nope", b"\x93\x01\x02\x03", b"\x80"])
def test_garbage_closes_the_channel(pair, body):
    channel, peer = pair
    peer.sendall(protocol.LENGTH.pack(len(body)) + body)
    with pytest.raises(errors.MalformedMessage):
        channel.recv(soon())
    assert channel.fileno() == -1


def test_garbage_after_a_good_message_leaks_nothing(kit, pair):
    channel, peer = pair
    before = kit.open_fds()
    send_fds(peer, protocol.encode(Ping()), [0])
    peer.sendall(protocol.LENGTH.pack(1) + b"\xc1")
    with pytest.raises(errors.MalformedMessage):
        while True:
            for _, fds in channel.recv_ready():
                [os.close(fd) for fd in fds]
    assert kit.open_fds() == before - 1


def test_too_large_to_send(pair):
    channel, _ = pair
    with pytest.raises(errors.MessageTooLarge):
        channel.send(Hello(role="client", oldest=1, newest=1, token="x" * (17 << 20)), soon())


def test_recv_ends_at_its_deadline(pair):
    channel, _ = pair
    with pytest.raises(ChannelTimeout):
        channel.recv(time.monotonic() + 0.05)


def test_send_ends_at_its_deadline(pair):
    channel, _ = pair
    with pytest.raises(ChannelTimeout):
        large = Hello(role="client", oldest=1, newest=1, token="x" * (15 << 20))
        channel.send(large, time.monotonic() + 0.05)


def test_the_end_of_the_peer(pair):
    channel, peer = pair
    peer.sendall(protocol.encode(Ping())[:-1])
    peer.close()
    with pytest.raises(ChannelLost):
        channel.recv(soon())
    with pytest.raises(ChannelLost):
        channel.send(Ping(), soon())


def test_handshake(node):
    channel = Channel.open(node.path, hello("client"), soon())
    assert channel.welcome == Welcome(id=1, version=1, node="fake", epoch=1)
    channel.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Failed(id=1, error="VersionMismatch", message="too old", fix="update"), errors.VersionMismatch),
        (Failed(error="AuthError", message="no"), errors.AuthError),
        (Failed(id=1, error="Whatever", message="no"), errors.KvtierError),
        (Welcome(id=1, version=99, node="n", epoch=1), errors.VersionMismatch),
        (Welcome(id=5, version=1, node="n", epoch=1), errors.MalformedMessage),
        (Pong(id=1), errors.MalformedMessage),
    ],
)
def test_handshake_refused(node, kit, answer, kind):
    node.answers[Hello] = lambda peer, message: answer
    before = kit.open_fds()
    with pytest.raises(kind) as caught:
        Channel.open(node.path, hello("client"), soon())
    assert type(caught.value) is kind
    kit.until(lambda: kit.open_fds() == before, "both ends are closed")


def test_handshake_with_a_peer_that_ends_or_hangs(node):
    node.answers[Hello] = lambda peer, message: peer.close()
    with pytest.raises(ChannelLost):
        Channel.open(node.path, hello("client"), soon())
    node.hung = True
    with pytest.raises(ChannelTimeout):
        Channel.open(node.path, hello("client"), time.monotonic() + 0.05)


def test_what_stands_where_the_socket_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead"))
    dead.close()
    wanted = {
        str(tmp_path): "is a folder",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "missing"): "no socket at",
        str(tmp_path / "dead"): "daemon has ended",
        "/" + "x" * 200: "path under 108 bytes",
        "nul\0byte": "no socket at",
    }
    for path, text in wanted.items():
        with pytest.raises(errors.DaemonNotFound) as caught:
            Channel.open(path, hello("client"), soon())
        assert text in str(caught.value) and caught.value.fix


def test_a_listener_that_accepts_nobody(tmp_path):
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(ChannelTimeout):
            Channel.open(path, hello("client"), time.monotonic() + 0.05)


def test_every_error_comes_back_as_its_class():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 15
    for kind in kinds:
        error = error_of(Failed(error=kind.__name__, message="field: text", fix="do"))
        assert type(error) is kind and "text" in str(error) and error.fix == "do"
    assert type(error_of(Failed(error="annotations", message="text"))) is errors.KvtierError

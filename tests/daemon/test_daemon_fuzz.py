"""Frames by chance to the node's and the GPU service's sockets: both go on serving."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.messages import protocol
from kvtier.messages.calls import Message
from kvtier.messages.wire import hello
from kvtier.testing.kv_memory import KvMemory, tokens_of
from kvtier.testing.node_bench import Bench
from kvtier.testing.raw_socket import answers, attach_of, raw

TOKENS = tokens_of(1, 64).tobytes()

pytestmark = pytest.mark.usefixtures("unharmed")


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(params=["node", "gpu"])
def address(request: pytest.FixtureRequest, bench: Bench) -> str:
    """Path of either socket."""
    return str(Path(bench.services.socket_path).with_name(f"{request.param}.sock"))


SOME = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=70),
    st.lists(st.integers(-3, 300), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(-3, 3), max_size=3),
)
TAGS = sorted(str(kind.__struct_config__.tag) for kind in protocol._BY_TAG.values())
FIELDS = sorted({name for kind in protocol._BY_TAG.values() for name in kind.__struct_fields__})


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A frame's body: bytes, or a message's type with some fields, their types often right."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    kind = protocol._BY_TAG[draw(st.sampled_from(TAGS))]
    fields: dict[str, Any] = {"type": str(kind.__struct_config__.tag), "id": draw(st.integers(0, 5))}
    for name in kind.__struct_fields__:
        if name != "id" and draw(st.integers(0, 9)):
            fields[name] = draw(st.one_of(_likely(name), SOME) if draw(st.booleans()) else _likely(name))
    body: bytes = msgpack.packb(fields)
    return body


def _likely(name: str) -> st.SearchStrategy[Any]:
    if name in ("tokens", "after_key", "fingerprint"):
        return st.sampled_from([b"", TOKENS, b"x" * 32, b"abc"])
    if name in ("role", "mode", "level", "share", "direction", "state"):
        return st.sampled_from(["client", "worker", "host", "disk", "prefix", "gather", "ready", "events"])
    if name.endswith("_s"):
        return st.floats() | st.none()
    if name in ("extras", "held_from", "pages", "jobs", "items", "pool", "geometry", "after"):
        return SOME
    if name in ("worker", "conversation", "tenant", "plan_id", "job", "error", "message", "address"):
        return st.text(max_size=6)
    return st.integers(-3, 100)


def fuzz(path: str, examples: int, first: list[bytes]) -> None:
    """Send frames over short connections; each ends with an answer, an error or the other end's close."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(bodies(), min_size=1, max_size=6))
    def run(frames: list[bytes]) -> None:
        with raw(path) as connected, contextlib.suppress(BrokenPipeError):
            for body in [*first, *frames]:
                connected.sendall(protocol.LENGTH.pack(len(body)) + body)
            connected.shutdown(socket.SHUT_WR)
            assert all(isinstance(answer, Message) for answer in answers(connected))

    run()


def greeting(role: Any, worker: str = "") -> bytes:
    return protocol.encode(hello(role, worker=worker))[4:]


@pytest.mark.parametrize("examples", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("greeted", [True, False])
def test_frames_by_chance(address: str, greeted: bool, examples: int) -> None:
    role = "copy" if address.endswith("gpu.sock") else "client"
    fuzz(address, examples, [greeting(role, "worker:1")] if greeted else [])


@pytest.mark.parametrize("examples", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_frames_by_chance_of_an_attached_worker(bench: Bench, examples: int) -> None:
    attach = protocol.encode(attach_of(KvMemory(4)))[4:]
    fuzz(bench.services.socket_path, examples, [greeting("client"), attach])

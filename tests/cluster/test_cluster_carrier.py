"""Who is called for whom, and what becomes of calls; without Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvtier.carriage import Bytes, Passing
from kvtier.cluster.carrier import ActorCarrier, actor_of
from kvtier.cluster.members import Member
from kvtier.cluster.reconciler import Incarnation
from kvtier.config.load import load
from kvtier.config.schema import Config

CALL = Passing("c", np.arange(3, dtype=np.uint8), first=True, least=1)


def member(node: str, name: str, folder: Path) -> Member:
    config = load(None, {"node.state_dir": str(folder), "node.runtime_dir": str(folder / "run")})
    return Member(node=node, name=name, services=(), config_text=msgspec.json.encode(config), grace_s=1.0)


def test_the_newest_actor_of_a_name_is_called(tmp_path: Path) -> None:
    first = member("f00", "node-1", tmp_path)
    config = msgspec.json.decode(first.config_text, type=Config)
    heard = msgspec.structs.replace(config.cluster, directory_listen="10.0.0.1:7201")
    config = msgspec.structs.replace(config, cluster=heard)
    first = msgspec.structs.replace(first, config_text=msgspec.json.encode(config))
    members = [first, member("f01", "node-2", tmp_path), member("f02", "node-2", tmp_path)]
    alive = {
        Incarnation("f00", "directory", 4, "c"),
        Incarnation("f00", "host", 5, "c"),
        Incarnation("f00", "host", 9, "c"),
        Incarnation("f00", "disk", 11, "c"),
        Incarnation("f01", "host", 6, "c"),
        Incarnation("f02", "host", 7, "c"),
    }
    assert actor_of("node-1", members, alive) == Incarnation("f00", "host", 9, "c")
    # A machine that came back has another of Ray's names.
    assert actor_of("node-2", members, alive) == Incarnation("f02", "host", 7, "c")
    assert actor_of("directory@10.0.0.1:7201", members, alive) == Incarnation("f00", "directory", 4, "c")
    for nobody in ("node-3", "directory@10.0.0.2:7201", ""):
        assert actor_of(nobody, members, alive) is None
    assert actor_of("node-1", members, ()) is None


class Actors:
    """What Ray does: handles by name, and calls of them."""

    def __init__(self, **handles: str) -> None:
        self.handles = handles
        self.found: list[str] = []
        self.fails = False

    def find(self, called: str) -> str | None:
        self.found.append(called)
        return self.handles.get(called)

    def call(self, handle: str, call: Passing, timeout_s: float) -> Bytes | None:
        assert timeout_s > call.wait_s
        if self.fails:
            raise OSError("the actor died")
        return np.frombuffer(handle.encode(), np.uint8)


def told(carrier: ActorCarrier, node: str, call: Passing = CALL) -> str:
    came = carrier.pass_on(node, call).result(10)
    assert came is not None
    return came.tobytes().decode()


def test_calls_find_their_actor_once_and_again_after_its_death() -> None:
    actors = Actors(a="first a", b="b")
    carrier = ActorCarrier(actors.find, actors.call)
    assert [told(carrier, node) for node in ("a", "b", "a")] == ["first a", "b", "first a"]
    assert actors.found == ["a", "b"]
    actors.fails = True
    with pytest.raises(OSError, match="died"):
        told(carrier, "a")
    actors.fails, actors.handles["a"] = False, "second a"
    assert [told(carrier, node) for node in ("a", "b")] == ["second a", "b"]


def test_who_is_not_there_is_not_asked_for_each_time() -> None:
    actors = Actors()
    carrier = ActorCarrier(actors.find, actors.call)
    for _ in range(2):
        with pytest.raises(OSError, match="no actor of 'c'"):
            told(carrier, "c")
    assert actors.found == ["c"]


LATER = replace(CALL, first=False)


def test_a_connection_that_is_there_asks_nobody_who_is_where() -> None:
    actors = Actors(a="a")
    carrier = ActorCarrier(actors.find, actors.call)
    assert told(carrier, "a") == "a"
    actors.fails = True
    with pytest.raises(OSError, match="died"):
        told(carrier, "a", LATER)
    actors.fails = False
    assert told(carrier, "a", LATER) == "a"
    with pytest.raises(OSError, match="no actor of 'b'"):
        told(carrier, "b", LATER)
    assert actors.found == ["a"]
    assert told(carrier, "a") == "a"
    assert actors.found == ["a", "a"]


class Stuck(Actors):
    """Ray's head is away: who asks for anybody but a waits."""

    def __init__(self, **handles: str) -> None:
        super().__init__(**handles)
        self.gate = threading.Event()
        self.reached = threading.Semaphore(0)
        self.free = {"a"}

    def find(self, called: str) -> str | None:
        if called not in self.free:
            self.reached.release()
            assert self.gate.wait(60)
        return super().find(called)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    actors = Stuck(a="a", b="b")
    yield actors
    actors.gate.set()


def test_questions_without_an_answer_leave_threads_for_what_is_under_way(stuck: Stuck) -> None:
    carrier = ActorCarrier(stuck.find, stuck.call)
    assert told(carrier, "a") == "a"
    waiting = [carrier.pass_on(f"node-{number}", CALL) for number in range(8)]
    assert all(stuck.reached.acquire(timeout=10) for _ in waiting)
    more = [carrier.pass_on(f"other-{number}", CALL) for number in range(40)]
    assert told(carrier, "a", LATER) == "a"
    for one in more:
        with pytest.raises(OSError, match="does not say where 'other-"):
            one.result(10)
    assert not any(one.done() for one in waiting)
    # What is out of date is better than nothing, and new connections to who is known go on.
    stuck.free.clear()
    carrier._known["a"] = "a", 0.0
    assert told(carrier, "a") == "a"
    stuck.gate.set()
    for one in waiting:
        with pytest.raises(OSError, match="no actor of 'node-"):
            one.result(10)
    assert told(carrier, "b") == "b"


def test_who_is_asked_for_already_is_not_asked_for_again(stuck: Stuck) -> None:
    carrier = ActorCarrier(stuck.find, stuck.call)
    first = carrier.pass_on("b", CALL)
    assert stuck.reached.acquire(timeout=10)
    with pytest.raises(OSError, match="does not say where 'b' is"):
        told(carrier, "b")
    second = carrier.pass_on("b", replace(CALL, wait_s=30.0))
    stuck.gate.set()
    for one in (first, second):
        came = one.result(10)
        assert came is not None and came.tobytes() == b"b"
    assert stuck.found == ["b"]


def test_a_call_that_fails_late_says_nothing_of_who_is_there_now(stuck: Stuck) -> None:
    carrier = ActorCarrier(stuck.find, stuck.call)

    def dies_late(handle: str, call: Passing, timeout_s: float) -> Bytes | None:
        carrier._known["a"] = "newer", float("inf")
        raise OSError("the actor died")

    carrier._call = dies_late
    with pytest.raises(OSError, match="died"):
        told(carrier, "a")
    assert carrier._known["a"] == ("newer", float("inf"))

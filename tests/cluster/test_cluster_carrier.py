"""Who is called for whom, and what becomes of calls; without Ray."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvtier.carriage import Bytes, Passing
from kvtier.cluster.carrier import ActorCarrier, actor_of
from kvtier.cluster.members import Member
from kvtier.cluster.reconciler import Incarnation
from kvtier.config import load
from kvtier.config_schema import Config

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


def told(carrier: ActorCarrier, node: str) -> str:
    came = carrier.pass_on(node, CALL).result(10)
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

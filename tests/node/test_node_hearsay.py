"""Whatever other nodes and the directory say, the node goes on, and what it had asked them comes to an end.

Each message is an honest one in which some fields were replaced, at any depth, by values of the same type
that no honest node sends; so every one of them passes the decoder, and arrives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.errors import MalformedMessage, TokensError
from kvtier.keys import pack_tokens
from kvtier.messages import cluster as c
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Locate, Message
from kvtier.node import elsewhere, keep_request, keeping, loads, wire
from kvtier.node.blocks import BlockTree
from kvtier.node.events import Received
from kvtier.testing.rig_cluster import NodeRig, RigCluster, objects_of, park_at

# Answers to what the node had asked; the rest are questions of others.
ANSWERS = (c.Branches, c.Holders, c.TheseAre, c.Known, c.NodesThere, c.Kept)
QUESTIONS = (c.WhatIs, c.Lend, c.Keep, c.Erase)
INTEGERS = [-(2**63), -1000, -5, -1, 0, 1, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1]
FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e308]
BYTES = [b"", b"x", b"k" * 31, b"k" * 32, b"k" * 33, b"k" * 64]
TEXTS = ["", "a", "b", "s0", "nobody", "x" * 70_000]

Path = tuple[Any, ...]


def parts(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every number, text and list in a message as plain data, and where it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("type", "job"):
                yield from parts(inner, (*at, key))
    elif isinstance(value, list | tuple):
        yield at, value
        for index, inner in enumerate(value):
            yield from parts(inner, (*at, index))
    elif value is not None:
        yield at, value


def others_of(value: Any) -> list[Any]:
    """What may stand in its place."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return INTEGERS
    if isinstance(value, float):
        return FLOATS
    if isinstance(value, bytes):
        return [*BYTES, value[:16], value[::-1]]
    if isinstance(value, str):
        return TEXTS
    return [[], [*value, *value], list(reversed(value)), list(value[1:])]


def replaced(plain: Any, at: Path, by: Any) -> Any:
    """A copy of plain data with another value there; as it was where there is no such place any more."""
    if not at:
        return by
    if isinstance(plain, dict) and at[0] in plain:
        return {**plain, at[0]: replaced(plain[at[0]], at[1:], by)}
    if isinstance(plain, list | tuple) and isinstance(at[0], int) and at[0] < len(plain):
        inner = list(plain)
        inner[at[0]] = replaced(inner[at[0]], at[1:], by)
        return inner
    return plain


def bent(message: Message, changes: list[tuple[Path, Any]]) -> Message:
    """The message with these changes; the honest one where no decoder would let it pass."""
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    for at, by in changes:
        plain = replaced(plain, at, by)
    try:
        return protocol.decode(msgspec.msgpack.encode(plain))
    except MalformedMessage:
        return message


class Hearsay(RigCluster):
    """Two nodes; what 'b' hears of the one kind from elsewhere is bent."""

    def __init__(self, kind: type[Message], data: st.DataObject | None, **how: Any) -> None:
        self.kind, self.data = kind, data
        self.changes: list[tuple[Path, Any]] | None = None
        self.heard: list[Message] = []
        super().__init__("a", "b", **how)

    def bend(self, message: Message) -> Message:
        if self.changes is not None:
            message = bent(message, self.changes)
        elif self.data is not None:
            plain = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
            places = list(parts(plain))
            changes = []
            for _ in range(self.data.draw(st.integers(1, 2)) if places else 0):
                at, value = self.data.draw(st.sampled_from(places))
                changes.append((at, self.data.draw(st.sampled_from(others_of(value)))))
            message = bent(message, changes)
        self.heard.append(message)
        return message


def listening(cluster: Hearsay) -> NodeRig:
    """Node 'b', to which everything of the kind arrives bent."""
    b = cluster.rigs["b"]
    tell = b.tell

    def bending(stimulus: Any) -> None:
        if isinstance(stimulus, Received) and type(stimulus.message) is cluster.kind:
            stimulus = replace(stimulus, message=cluster.bend(stimulus.message))
        tell(stimulus)

    b.tell = bending  # type: ignore[method-assign]
    return b


def asks_everything(cluster: Hearsay) -> None:
    """All that makes a node ask others and answer them; afterwards nothing of it is under way."""
    a, b = cluster.rigs["a"], listening(cluster)
    worker = b.attach()
    park_at(a, 10, "chat")
    park_at(a, 11, "secret", private_from=5)
    park_at(a, 9, "copied", level="copies=2", private_from=5)
    for name, count in (("chat", 14), ("secret", 14), ("copied", 14), ("chat", 14)):
        planned = b.plan(worker, name, range(count))
        if planned is None:
            b.tick(1.0)
        elif hasattr(planned, "plan") and planned.plan.load_tokens:
            b.restore(worker, planned, range(count))
            b.run()
    for tokens in (b"", pack_tokens(range(12))):
        b.ask(Locate(conversation="chat", tenant="acme", tokens=tokens))
    b.park(worker, "mine", range(20, 30), level="copies=2", timeout_s=2.0)
    for question in (
        c.WhatIs(keys=b"".join(s.meta.object_id.block_key for s in objects_of(a, "chat")), shard="s0"),
        c.Lend(block_key=objects_of(a, "chat")[0].meta.object_id.block_key, group=0, shard="s0"),
        c.Erase(stone=c.Stone("a.900", "acme", "copied", 1.0, ("a", "b"))),
    ):
        b.question(question)
    b.run()
    for _ in range(4):
        b.tick(20.0)
        b.run()
    cluster.announce()


def nothing_waits(b: NodeRig) -> bool:
    """Whether all lookups, questions, copies and readings have come to an end."""
    core = b.core
    cluster = core.cluster
    waits = (
        cluster.elsewhere._lookups,
        cluster.elsewhere._asking,
        cluster.everywhere._waiting,
        cluster.replicas._wishes,
        cluster.replicas._asked,
        cluster.keeping._jobs,
        cluster.pulls.reads._reads,
    )
    return not any(waits)


@pytest.mark.parametrize("kind", [*ANSWERS, *QUESTIONS], ids=lambda kind: kind.__name__)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_said_the_node_goes_on(kind: type[Message], data: st.DataObject) -> None:
    cluster = Hearsay(kind, data)
    asks_everything(cluster)
    b = cluster.rigs["b"]
    assert cluster.heard, "it was not said at all"
    assert nothing_waits(b)
    assert b.violations == []
    # And it serves.
    worker = b.attach()
    assert b.park(worker, "afterwards", range(100, 110)).failed is None
    b.run()
    assert b.resume(worker, "afterwards", range(100, 112)).receipt.tokens == 10


LOAD = ("loads", "a", 2, 1)
CASES: list[tuple[type[Message], Path, Any]] = [
    (c.TheseAre, ("metas", 0, 3), 99),
    (c.Branches, ("ends", 0, 2), (-5, b"")),
    (c.Branches, ("ends", 0, 2), (3, b"")),
    (c.Branches, ("ends", 0, 1), 2**64 - 1),
    (c.Holders, ("fronts", 0, 3), 2**64 - 1),
    (c.Holders, ("fronts", 0, 4), -1),
    (c.Holders, LOAD, 0.0),
    (c.Holders, LOAD, math.nan),
    (c.Known, LOAD, 0.0),
    (c.Known, ("conversations", 0, 2, 0, 1), 2**64 - 1),
    (c.Keep, ("metas", 0, 5), -1000),
    (c.Keep, ("private",), (-5, b"")),
    (c.Kept, ("tier",), "moon"),
]


def told(kind: type[Message], at: Path, by: Any) -> Hearsay:
    """All that a node asks and is asked, where this is said."""
    cluster = Hearsay(kind, None)
    cluster.changes = [(at, by)]
    asks_everything(cluster)
    return cluster


@pytest.mark.parametrize(("kind", "at", "by"), CASES)
def test_what_once_ended_a_node_does_not(kind: type[Message], at: Path, by: Any) -> None:
    cluster = told(kind, at, by)
    heard = msgspec.msgpack.decode(msgspec.msgpack.encode(cluster.heard[-1]))
    assert cluster.heard and replaced(heard, at, "") != heard, "there is no such field"
    assert nothing_waits(cluster.rigs["b"])


def passes(*_: Any) -> bool:
    """A check that finds nothing wrong."""
    return True


def test_the_control_loads_that_are_not_looked_at_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "_is_sound", passes)
    with pytest.raises(ZeroDivisionError):
        told(c.Holders, LOAD, 0.0)


def test_the_control_fronts_that_are_not_looked_at_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_is_sound", passes)
    with pytest.raises((OverflowError, IndexError)):
        told(c.Holders, ("fronts", 0, 4), 2**64 - 1)


def test_the_control_ends_that_are_not_looked_at_leave_a_plan_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = c.BranchEnd(b"", 10, (-5, b""))
    cluster = Hearsay(c.Branches, None)
    park_at(cluster.rigs["a"])
    cluster.changes = [(("ends", 0), end)]
    b = listening(cluster)
    assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 8, (
        "the plain chain is found all the same"
    )
    monkeypatch.setattr(elsewhere, "is_private", passes)
    lost: list[Any] = []
    monkeypatch.setattr(b.cluster, "at_directory", lambda rig, message: lost.append(message))
    assert b.plan(b.attach(), "chat", range(12)) is None
    (asked,) = [message for message in lost if isinstance(message, c.FindBranches)]
    with pytest.raises(TokensError):
        b.core.cluster.elsewhere.on_branches(c.DIRECTORY, c.Branches(job=asked.job, ends=(end,)))


def kept_at(cluster: Hearsay) -> c.Keep:
    """What 'b' was asked to keep."""
    listening(cluster)
    cluster.announce()
    park_at(cluster.rigs["a"], level="copies=2")
    (keep,) = cluster.heard
    assert isinstance(keep, c.Keep)
    return keep


def test_the_control_a_keep_that_is_not_looked_at_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Hearsay(c.Keep, None)
    keep = bent(kept_at(cluster), [(("metas", 0, 5), -1000), (("conversation",), "new")])
    assert isinstance(cluster.rigs["b"].question(keep), Failed)
    monkeypatch.setattr(keep_request, "_is_sound", passes)
    monkeypatch.setattr(keep_request, "fits", passes)
    monkeypatch.setattr(keeping, "follow_each_other", passes)
    assert not isinstance(cluster.rigs["b"].question(keep), Failed)


def test_blocks_that_stand_on_each_other_are_refused_and_no_chain() -> None:
    cluster = Hearsay(c.Keep, None)
    keep = kept_at(cluster)
    b = cluster.rigs["b"]
    last = keep.metas[-1]
    in_itself = msgspec.structs.replace(last, parent_key=last.block_key)
    twice = msgspec.structs.replace(last, block_key=keep.metas[0].block_key)
    for metas in ([*keep.metas[:-1], in_itself], [*keep.metas[:-1], twice], list(reversed(keep.metas))):
        answer = b.question(msgspec.structs.replace(keep, metas=metas, conversation="new"))
        assert isinstance(answer, Failed) or (answer.tier, answer.reason) == ("", "incomplete")
    assert ("acme", "new") not in b.core.state.conversations

    tree = BlockTree()
    (first, second) = wire.unpack_metas(keep.roots, keep.metas)[:2]
    tree.add(replace(first, parent_key=second.object_id.block_key))
    tree.add(second)
    assert tree.chain(second.object_id.block_key) == []

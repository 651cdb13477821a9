"""Fields that copies of a GPU's pool brought along: an older peer leaves them out, and does not mind them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvtier.geometry import CUDA_IPC, Geometry, GroupGeometry
from kvtier.messages import protocol
from kvtier.messages.calls import Attach, MakePlan, Message, Park, Restore
from kvtier.messages.tiers import (
    Arenas,
    Copy,
    GpuUsage,
    LayerQueued,
    PoolProbed,
    PoolProven,
    ProbePool,
    pool_descriptors,
)

GEOMETRY = Geometry(16, 16, (GroupGeometry("full", 64),))
SAID: list[tuple[Message, dict[str, Any]]] = [
    (Park(worker="w", request=1, conversation="c", tenant="t", tokens=b"1234", events=[3]), {"events": []}),
    (MakePlan(worker="w", conversation="c", tenant="t", tokens=b"1234", by_layer=True), {"by_layer": False}),
    (Restore(worker="w", request=1, plan_id="p", deadline_s=1.0, by_layer=True, events=[1], layers=True),
     {"by_layer": False, "events": [], "layers": False}),
    (Copy(job="j", batch=0, worker="w", request=1, direction="gather", items=[], events=[1], layers=True,
          over=["i"]),
     {"events": [], "layers": False, "over": []}),
    (PoolProbed(ok=True, seen=b"s", written=b"w", events=[b"handle"]), {"events": []}),
    (Attach(fingerprint=b"f", model="m", geometry=GEOMETRY, shard="s", layout="l", engine="cuda",
            place="cuda:0 GPU", gpu_bytes=7), {"engine": "", "place": "", "gpu_bytes": 0}),
    (Arenas(arena_bytes=[1], generation_slots=2, takes_gpu_usage=True), {"takes_gpu_usage": False}),
    (GpuUsage(workers={"w": 1}, context_bytes=2, late=["w"], unmapping=["v"]),
     {"workers": {}, "context_bytes": 0, "late": [], "unmapping": []}),
]  # fmt: skip


def raw(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.msgpack.decode(protocol.encode(message)[protocol.LENGTH.size :])
    return found


def decoded(fields: dict[str, Any]) -> Message:
    return protocol.decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(("message", "without"), SAID, ids=lambda value: type(value).__name__)
def test_an_older_peer_says_nothing_of_them(message: Message, without: dict[str, Any]) -> None:
    fields = raw(message)
    assert decoded(fields) == message
    for name in without:
        del fields[name]
    assert decoded(fields) == msgspec.structs.replace(message, **without)


@pytest.mark.parametrize(("message", "without"), SAID, ids=lambda value: type(value).__name__)
def test_what_a_newer_peer_adds_is_passed_over(message: Message, without: dict[str, Any]) -> None:
    assert decoded({**raw(message), "of_tomorrow": [1]}) == message


@pytest.mark.parametrize(
    "message",
    [
        ProbePool(pages=[1, 2], nonce=b"n"),
        PoolProbed(ok=True, seen=b"s", written=b"w"),
        PoolProbed(ok=False, detail="why"),
        PoolProven(ok=True),
        LayerQueued(request=1, layer=2, event=3),
        LayerQueued(request=1, layer=2),
    ],
)
def test_the_messages_of_a_mapped_pool_travel(message: Message) -> None:
    assert decoded(raw(message)) == message


def test_only_host_memory_comes_with_a_descriptor() -> None:
    assert pool_descriptors("shared", {}) == 1
    assert pool_descriptors("shared", {"kind": CUDA_IPC}) == pool_descriptors("worker", {}) == 0

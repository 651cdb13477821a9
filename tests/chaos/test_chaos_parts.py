"""The parts of the chaos run by themselves: each notices what it is there for."""

from __future__ import annotations

import hashlib
import math
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos_damage import KINDS, Excuses, Kind, damage, place_of
from chaos_features import NO_FEATURES, Features
from chaos_growth import GROWS_MOST, Growth, Size
from chaos_ledger import Chat, Copies, Ledger, Promise
from chaos_nodes import Broken, Nodes
from chaos_text import Text
from chaos_wires import Wires

from kvtier.checksum import checksum
from kvtier.disk.fsck import fsck
from kvtier.disk.tier import DiskTier
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.testing.kv_memory import BLOCK_TOKENS
from kvtier.waiting import wait_until

ROOT = Root(hashlib.sha256(b"root").digest(), "acme", bytes(32), "exact", BLOCK_TOKENS)
OBJECTS, NBYTES = 12, 20_000
TEXT = Text(((1, 200),))


def chat(model: int = 0) -> Chat:
    return Chat(model, "acme", "chat", Text(()))


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with some objects, in two segments."""
    tier = DiskTier(tmp_path / "store", 1 << 20, segment_bytes=1 << 18)
    slots = []
    for number in range(OBJECTS):
        key = hashlib.sha256(bytes([number])).digest()
        payload = hashlib.shake_256(key).digest(NBYTES)
        meta = ObjectMeta(ObjectId(key, 0, "L0+1.H0+1"), ROOT, ROOT.key, 0, BLOCK_TOKENS, 0, NBYTES)
        slot = tier.reserve(meta, holder="test")
        tier.write(slot, payload)
        slots.append((slot, checksum(payload)))
    tier.commit(slots)
    tier.close()
    return tmp_path / "store"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_no_more_is_damaged_than_is_said(store: Path, kind: Kind, seed: int) -> None:
    said = damage(store, kind, random.Random(seed))
    found = fsck(store)
    bad = found.damaged_headers + found.damaged_payloads + found.entries_without_object
    if kind == "index":
        assert said == math.inf
        assert found.conversations == 0 and found.objects == OBJECTS
    elif kind == "cut":
        assert 1 <= bad <= said <= OBJECTS
    else:
        assert bad == said == 1


def test_of_a_store_with_nothing_in_it_nothing_is_damaged(tmp_path: Path) -> None:
    DiskTier(tmp_path / "store", 1 << 20, segment_bytes=1 << 18).close()
    assert damage(tmp_path / "store", "flip", random.Random(1)) == 0


def test_no_more_places_are_excused_than_objects_were_damaged() -> None:
    excuses = Excuses()
    one, two, three = (place_of(chat(), TEXT, found) for found in (0, 40, 64))
    assert not (excuses.some or excuses.excuse(one))
    excuses.more(2)
    assert excuses.excuse(one) and excuses.excuse(two)
    assert not excuses.excuse(three)
    assert excuses.excuse(one) and excuses.known(one) and not excuses.known(three)


def test_a_place_is_a_block_by_what_is_before_it() -> None:
    longer, other = TEXT.grown(2, 50), Text(((1, 100), (3, 100)))
    assert place_of(chat(), TEXT, 70) == place_of(chat(), longer, 64) == place_of(chat(), other, 95)
    assert place_of(chat(), TEXT, 128) != place_of(chat(), other, 128)
    assert place_of(chat(), TEXT, 70) != place_of(chat(1), TEXT, 70)


# --- growth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(len(GROWS_MOST)))
def test_a_process_that_grows_is_noticed_and_one_that_does_not_is_not(which: int) -> None:
    growth, first = Growth(), Size(50, 50, 50_000)
    assert [growth.saw("a/node", 1, first) for _ in range(3)] == [1, 2, 3]
    grown = list(first)
    grown[which] += GROWS_MOST[which]
    assert growth.saw("a/node", 1, Size(*grown)) == 4
    assert growth.saw("b/node", 2, Size(*grown)) == 1, "another process begins anew"
    grown[which] += 1
    with pytest.raises(Broken, match="GROWS"):
        growth.saw("a/node", 1, Size(*grown))


def test_too_many_descriptors_are_noticed_at_once() -> None:
    with pytest.raises(Broken, match="descriptors"):
        Growth().saw("a/node", 1, Size(401, 1, 1))


# --- links --------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """Who sends back what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            taken, _ = listener.accept()
            with taken:
                while data := taken.recv(4096):
                    taken.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join()


@pytest.mark.parametrize(("first", "sealed"), [(0x16, 2), (0x15, 2), (0x44, 0)])
def test_what_goes_in_clear_over_a_link_is_seen(echo: tuple[str, int], first: int, sealed: int) -> None:
    wires = Wires()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()
    try:
        wire = wires.add(free, echo)
        with socket.create_connection(free) as called:
            called.sendall(bytes([first, 1, 2, 3]))
            assert called.recv(1)
            called.shutdown(socket.SHUT_WR)
        assert wait_until(lambda: wire.sealed + wire.clear == 2, 30.0)
        assert (wire.sealed, wire.clear) == (sealed, 2 - sealed)
    finally:
        wires.close()


def nodes_of(folder: Path, features: Features, change: Callable[[Nodes], None]) -> str:
    nodes = Nodes(folder, features=features)
    try:
        for wires in nodes.links.values():
            for wire in wires:
                wire.sealed += 1
        nodes.check_links()
        change(nodes)
        with pytest.raises(Broken) as error:
            nodes.check_links()
        return str(error.value)
    finally:
        nodes.close()


def test_a_link_that_nobody_uses_is_noticed(tmp_path: Path) -> None:
    def unused(nodes: Nodes) -> None:
        for wire in nodes.links["b", "c"]:
            wire.sealed = 0

    assert "BESIDE THE LINK: nothing that b says to c" in nodes_of(tmp_path, NO_FEATURES, unused)


def test_with_tls_one_connection_in_clear_is_noticed(tmp_path: Path) -> None:
    def spoken(nodes: Nodes) -> None:
        nodes.links["a", "b"][0].clear += 1

    assert "IN CLEAR: 1 connections from a to b" in nodes_of(tmp_path, Features(tls=True), spoken)


# --- the ledger ---------------------------------------------------------------------------------------------


def test_promises_of_a_node_that_has_to_drop_them_do_not_count() -> None:
    ledger, one = Ledger(1, 1, "x", frozenset("c")), chat()
    ledger.keep(one, Promise("c", TEXT, 200))
    ledger.keep(one, Promise("a", TEXT, 200))
    ledger.keep_copies(one, Copies(("a", "c"), TEXT, 200, 1.0))
    assert [promise.node for promise in one.promises] == ["a"]
    assert [copies.nodes for copies in one.copies] == [("a",)]


def test_every_feature_is_drawn_by_some_seeds_and_not_by_others() -> None:
    drawn = [Features.drawn(seed) for seed in range(40)]
    assert drawn == [Features.drawn(seed) for seed in range(40)]
    for name in ("tls", "damage", "full", "ranks"):
        assert {getattr(each, name) for each in drawn} == {True, False}

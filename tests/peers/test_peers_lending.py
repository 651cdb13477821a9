"""Objects read in a peer's memory: a read that is given up goes on, and keeps its room until it ended."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import AuthError
from kvtier.messages.calls import Message
from kvtier.messages.peers import PeerReady, Sending, Want
from kvtier.messages.protocol import LENGTH, decode, encode
from kvtier.objects import ObjectId
from kvtier.peers import lending as lending_module
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.lending import Bytes, Lending, Read
from kvtier.peers.server import Opened, PeerServer, ServerSettings
from kvtier.peers.stream import Wire
from kvtier.testing.fake_agent import FakeAgent, LentMemory, lending_of
from kvtier.testing.node_bench import until

TOKEN = b"0123456789abcdef"
NBYTES, COUNT = 100_000, 6


def id_of(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(32, "big"), 0, "L0+1.H0+1")


class Rig:
    """Two ends in one process. theirs, ours: what each lends."""

    def __init__(self) -> None:
        self.memory = LentMemory(4 << 20)
        random = np.random.default_rng(1)
        self.objects = [self.memory.room(random.integers(0, 256, NBYTES, np.uint8)) for _ in range(COUNT)]
        self.sums = [checksum(data) for data in self.objects]
        self.held = 0
        self._lock = threading.Lock()
        self.theirs = lending_of("fake", "a", 7, self.memory)
        self.ours = lending_of("fake", "b", 1, self.memory)
        self.settings = ServerSettings(lending=self.theirs)
        self.server = PeerServer(Identity("a", 7, TOKEN), self, self.settings)
        self.client = self.client_of(lending=self.ours)

    def client_of(self, **settings: object) -> PeerClient:
        chosen = ClientSettings(**{"streams": 1, **settings})  # type: ignore[arg-type]
        return PeerClient(Identity("b", 1, TOKEN), "a", ("127.0.0.1", self.server.port), chosen)

    @contextmanager
    def open(self, object_id: ObjectId, peer: str) -> Iterator[Opened | str]:
        """See ObjectSource."""
        number = int.from_bytes(object_id.block_key, "big")
        with self._lock:
            self.held += 1
        try:
            yield Opened(self.objects[number], self.sums[number])
        finally:
            with self._lock:
                self.held -= 1

    @property
    def agent(self) -> FakeAgent:
        """The reading end's."""
        agent = self.ours._agent
        assert isinstance(agent, FakeAgent)
        return agent

    def wants(self, *numbers: int) -> list[Wanted]:
        rooms = [self.memory.room(np.full(NBYTES, 0xEE, np.uint8)) for _ in numbers]
        return [Wanted(id_of(n), room, self.sums[n]) for n, room in zip(numbers, rooms, strict=True)]

    def fetched(self, *numbers: int, timeout_s: float = 20.0) -> tuple[list[str], Came]:
        came = Came()
        return list(self.client.fetch(self.wants(*numbers), timeout_s, came=came)), came

    def restart(self, epoch: int) -> None:
        port = self.server.port
        self.server.close()
        self.theirs.close(5.0)
        self.theirs = lending_of("fake", "a", epoch, self.memory)
        self.server = PeerServer(
            Identity("a", epoch, TOKEN), self, ServerSettings(port=port, lending=self.theirs)
        )

    def close(self) -> None:
        for read in self.agent.reads:
            if read.well is None:
                read.end()
        self.client.close()
        self.server.close()
        assert self.ours.close(10.0) and self.theirs.close(10.0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


class Fetching:
    """A fetch on a thread of its own."""

    def __init__(self, client: PeerClient, wanted: Sequence[Wanted], late: list[Read] | None = None) -> None:
        self.outcomes: list[str] = []
        self._client = client
        self._thread = threading.Thread(
            target=lambda: self.outcomes.extend(client.fetch(wanted, 60.0, late=late)), daemon=True
        )
        self._thread.start()

    def is_over_its_deadline(self) -> None:
        (run,) = self._client._fetches
        run._until_s = 0.0

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> list[str]:
        self._thread.join(20.0)
        assert not self.running
        return self.outcomes


def test_the_bytes_come_by_the_agent_and_the_objects_are_let_go(rig: Rig) -> None:
    outcomes, came = rig.fetched(*range(COUNT))
    assert outcomes == [""] * COUNT
    assert came.lent_bytes == came.bytes == came.wire_bytes == COUNT * NBYTES
    assert rig.client.way == "fake"
    assert rig.agent.loaded == ["a/7"]
    assert all(read.released for read in rig.agent.reads)
    until(lambda: rig.held == 0, "they are let go")


def test_reads_end_in_any_order(rig: Rig) -> None:
    rig.client = rig.client_of(lending=rig.ours, streams=2)
    rig.agent.holds = True
    wanted = rig.wants(0, 1)
    fetching = Fetching(rig.client, wanted)
    assert rig.agent.begun.acquire(timeout=10)
    while fetching.running:
        for read in reversed(rig.agent.reads):
            if read.well is None:
                read.end()
    assert fetching.result() == ["", ""]
    assert [bytes(w.into) == bytes(rig.objects[n]) for n, w in enumerate(wanted)] == [True, True]


# --- a read that is given up


def late_by_deadline(rig: Rig, wanted: list[Wanted]) -> Fetching:
    fetching = Fetching(rig.client, wanted)
    assert rig.agent.begun.acquire(timeout=10)
    fetching.is_over_its_deadline()
    return fetching


def late_by_cancel(rig: Rig, wanted: list[Wanted]) -> Fetching:
    fetching = Fetching(rig.client, wanted)
    assert rig.agent.begun.acquire(timeout=10)
    rig.client.cancel()
    return fetching


WAYS_TO_BE_LATE = pytest.mark.parametrize(
    ("late", "why"), [(late_by_deadline, "deadline"), (late_by_cancel, "cancelled")]
)


@WAYS_TO_BE_LATE
@pytest.mark.parametrize("well", [True, False])
def test_a_fetch_does_not_return_before_its_read_has_ended(
    rig: Rig, late: Callable[[Rig, list[Wanted]], Fetching], why: str, well: bool
) -> None:
    rig.fetched(5)
    rig.agent.holds = True
    wanted, others = rig.wants(0, 1), rig.wants(2)
    fetching = late(rig, wanted)
    until(lambda: rig.ours.late == 1, "it is given up")
    assert fetching.running
    # The other end is free of it: its connection is closed.
    until(lambda: rig.held == 0, "it is let go")
    rig.agent.reads[-1].end(well=well)
    assert fetching.result() == [why, why]
    assert rig.ours.late == 0 and rig.agent.reads[-1].released
    assert (wanted[1].into == 0xEE).all() and (others[0].into == 0xEE).all()


@WAYS_TO_BE_LATE
def test_an_agent_that_is_let_go_early_is_noticed(
    rig: Rig,
    late: Callable[[Rig, list[Wanted]], Fetching],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The promise is broken on purpose: who looks at the room after the call sees it change."""
    monkeypatch.setattr(Lending, "when_ended", lambda self, reads, then: then())
    rig.agent.holds = True
    wanted = rig.wants(0)
    assert late(rig, wanted).result() == [why]
    before = bytes(wanted[0].into)
    rig.agent.reads[-1].end()
    assert bytes(wanted[0].into) != before


def test_who_takes_late_reads_is_told_when_their_rooms_are_quiet(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.fetched(5)
    rig.agent.holds = True
    late: list[Read] = []
    fetching = Fetching(rig.client, rig.wants(0, 1), late)
    assert rig.agent.begun.acquire(timeout=10)
    fetching.is_over_its_deadline()
    assert fetching.result() == ["deadline"] * 2
    assert [read.ended for read in late] == [None]
    quiet = threading.Event()
    rig.ours.when_ended(late, quiet.set)
    assert "its room is kept" in caplog.text
    # What that node has is not read so meanwhile, but over the connection.
    outcomes, came = rig.fetched(2, 3)
    assert (outcomes, came.lent_bytes, came.bytes) == (["", ""], 0, 2 * NBYTES)
    assert rig.client.way == "tcp" and not quiet.is_set()
    rig.agent.reads[-1].end()
    assert quiet.wait(10)
    rig.agent.holds = False
    assert rig.fetched(2)[1].lent_bytes == NBYTES


def test_a_read_that_never_ends_keeps_the_memory(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Lending] = []
    monkeypatch.setattr(lending_module, "_KEPT", kept)
    rig.agent.holds = True
    late: list[Read] = []
    fetching = Fetching(rig.client, rig.wants(0), late)
    assert rig.agent.begun.acquire(timeout=10)
    fetching.is_over_its_deadline()
    assert fetching.result() == ["deadline"]
    told: list[None] = []
    rig.ours.when_ended(late, lambda: told.append(None))
    assert rig.ours.late == 1
    assert not rig.ours.close(0.05)
    assert kept == [rig.ours] and not told and "have not ended" in caplog.text


def test_bytes_of_an_object_that_was_let_go_meanwhile_are_a_miss(rig: Rig) -> None:
    """A reader that takes too long: the other end gives its room to something else."""
    rig.server._settings = dataclasses.replace(rig.settings, stall_s=0.2)
    rig.fetched(5)
    rig.agent.holds = True
    fetching = Fetching(rig.client, rig.wants(0))
    assert rig.agent.begun.acquire(timeout=10)
    until(lambda: rig.held == 0 and rig.server.sent.dropped >= 1, "the other end waits no longer")
    rig.objects[0][:] = rig.objects[1]
    rig.agent.reads[-1].end()
    assert fetching.result()[0] in ("corrupt", "peer_lost")


def test_a_fetch_that_is_refused_on_one_connection_hands_over_what_is_late_on_another(rig: Rig) -> None:
    rig.client = rig.client_of(lending=rig.ours, streams=2)
    rig.fetched(5)
    rig.agent.holds = True

    class Refused(PeerClient):
        def new_stream(self, until_s: float) -> Wire:
            raise AuthError("another token")

    rig.client.__class__ = Refused
    late: list[Read] = []
    began: list[str] = []

    def fetch() -> None:
        with pytest.raises(AuthError, match="another token"):
            rig.client.fetch(rig.wants(0, 1), 60.0, late=late)
        began.append("over")

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    assert rig.agent.begun.acquire(timeout=10)
    rig.agent.reads[-1].lost = True
    thread.join(20.0)
    assert began == ["over"] and [read.ended for read in late] == [None]


# --- where it does not work


@pytest.mark.parametrize("address", [-1, (1 << 64) - 1])
def test_an_address_that_cannot_be_is_refused(rig: Rig, address: int) -> None:
    rig.fetched(5)
    begun = len(rig.agent.reads)
    rig.theirs.address_of = lambda data: address  # type: ignore[method-assign]
    assert rig.fetched(0)[0] == ["peer_lost"]
    assert len(rig.agent.reads) == begun


def test_what_comes_by_another_way_is_not_read_in_memory_that_cannot_be_reached(rig: Rig) -> None:
    rig.fetched(5)
    stream = rig.client.idle_stream()
    assert stream is not None
    room = rig.wants(0)[0].into
    assert rig.client.borrower.lends(stream, room)
    stream.way = "ray"
    assert not rig.client.borrower.lends(stream, room)
    stream.close()


def test_an_object_lent_by_a_former_start_is_asked_for_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.fetched(5)
    begun = len(rig.agent.reads)
    remote = rig.client.borrower.remote
    assert remote is not None
    monkeypatch.setattr(remote, "epoch", 6)
    monkeypatch.setattr(type(rig.client.borrower), "lends", lambda self, stream, into: remote.epoch == 6)
    monkeypatch.setattr(type(rig.client.borrower), "introduce", lambda *_: None)
    asked: list[int] = []

    def failed(self: object) -> None:
        asked.append(1)
        remote.epoch = 0

    monkeypatch.setattr(type(rig.client.borrower), "failed", failed)
    outcomes, came = rig.fetched(0)
    assert (outcomes, came.lent_bytes, asked) == ([""], 0, [1])
    assert len(rig.agent.reads) == begun


@pytest.mark.parametrize("fault", ["fails", "refuses"])
def test_what_cannot_be_read_comes_over_the_connection(rig: Rig, fault: str) -> None:
    setattr(rig.agent, fault, True)
    wanted = rig.wants(*range(COUNT))
    came = Came()
    assert rig.client.fetch(wanted, 20.0, came=came) == [""] * COUNT
    assert [bytes(w.into) for w in wanted] == [bytes(data) for data in rig.objects]
    assert came.lent_bytes == 0 and rig.client.way == "tcp"
    begun = len(rig.agent.reads)
    setattr(rig.agent, fault, False)
    assert rig.fetched(0)[1].lent_bytes == 0, "it is not tried again at once"
    assert len(rig.agent.reads) == begun
    rig.client.borrower._from_s = 0.0
    assert rig.fetched(0)[1].lent_bytes == NBYTES, "but after a while"
    assert rig.agent.forgotten == ["a/7"]


def test_a_peer_that_dies_in_the_middle_of_a_read(rig: Rig) -> None:
    rig.fetched(5)
    rig.agent.holds = True
    late: list[Read] = []
    fetching = Fetching(rig.client, rig.wants(0, 1), late)
    assert rig.agent.begun.acquire(timeout=10)
    rig.server.close()
    assert fetching.running
    read = rig.agent.reads[-1]
    read.lost = True
    assert fetching.result() == ["peer_lost", "peer_lost"]
    # Nobody waits for it, but its room is not proven quiet.
    assert [one.into is read.into for one in late] == [True] and not read.released
    quiet = threading.Event()
    rig.ours.when_ended(late, quiet.set)
    assert not quiet.is_set() and not rig.client.borrower.way
    read.end(well=False)
    assert quiet.wait(10) and read.released


def test_what_was_read_badly_by_a_dead_peer_is_asked_for_once_more(rig: Rig) -> None:
    rig.agent.holds = True
    fetching = Fetching(rig.client, rig.wants(0, 1))
    assert rig.agent.begun.acquire(timeout=10)
    rig.server.close()
    rig.agent.reads[-1].end(well=False)
    assert fetching.result() == ["peer_lost", "peer_lost"]


def test_a_peer_that_has_started_again_is_known_anew(rig: Rig) -> None:
    assert rig.fetched(0)[1].lent_bytes == NBYTES
    rig.restart(8)
    until(lambda: rig.fetched(1)[1].lent_bytes == NBYTES, "it is read again")
    assert rig.agent.loaded == ["a/7", "a/8"]
    # What an earlier start had is never read: FakeAgent asserts it.
    assert rig.agent.forgotten == ["a/7"]


def test_an_end_that_cannot_is_served_over_the_connection(rig: Rig) -> None:
    for server, lending in ((None, rig.ours), (rig.theirs, None)):
        rig.server._settings = dataclasses.replace(rig.settings, lending=server)
        rig.client.close()
        rig.client = rig.client_of(lending=lending)
        outcomes, came = rig.fetched(0, 1)
        assert (outcomes, came.lent_bytes, came.bytes) == (["", ""], 0, 2 * NBYTES)


@pytest.mark.parametrize("side", ["room", "object"])
def test_what_is_not_registered_is_served_over_the_connection(rig: Rig, side: str) -> None:
    into: Bytes = np.zeros(NBYTES, np.uint8) if side == "room" else rig.wants(0)[0].into
    if side == "object":
        rig.objects[0] = rig.objects[0].copy()
    came = Came()
    assert rig.client.fetch([Wanted(id_of(0), into, None)], 20.0, came=came) == [""]
    assert came.lent_bytes == 0 and bytes(into) == bytes(rig.objects[0])


def test_memory_that_may_not_be_locked_is_said_and_nothing_is_lent(caplog: pytest.LogCaptureFixture) -> None:
    memory = LentMemory(1 << 20)
    agent = FakeAgent("a/1")
    agent.no_room = True
    lending = Lending(agent, [memory.all])
    lending.start()
    assert not lending.wait_ready()
    assert lending.address_of(memory.all[:10]) == 0
    assert "LimitMEMLOCK" in caplog.text and "TCP is used" in caplog.text
    assert lending.close(5.0)


@pytest.mark.parametrize(
    ("message", "added"),
    [
        (PeerReady(lends=("fake",)), "lends"),
        (Want(block_key=b"k", group=0, shard="s", lend=True), "lend"),
        (Sending(nbytes=1, checksum=2, address=3), "address"),
    ],
)
def test_nodes_of_another_release_say_less_or_more(message: Message, added: str) -> None:
    said = msgspec.msgpack.decode(encode(message)[LENGTH.size :])
    assert decode(msgspec.msgpack.encode(said | {"of_a_later_one": 1})) == message
    del said[added]
    assert not getattr(decode(msgspec.msgpack.encode(said)), added)

"""Power loss at any system call: what a commit returned for is there, and nothing is ever wrong.

Segment files live in a shim that holds every write until it is flushed.  At a crash each held write is
kept, dropped, torn or scrambled, sector by sector.  The SQLite files are real ones: a crash comes before
or after a transaction of the index, never within, since atomic commits are SQLite's to promise.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvtier.checksum import checksum
from kvtier.disk.fileops import Bytes
from kvtier.disk.fsck import fsck
from kvtier.disk.graves import Graves
from kvtier.disk.index import Batch, ConversationRecord
from kvtier.disk.store import Commit, OpenVault
from kvtier.disk.tier import DiskTier
from kvtier.errors import CorruptObject, ObjectExists, TierError, TierFull
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.testing.tier_kit import content, default_meta, get
from kvtier.tier import Slot

SECTOR = 512
SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = 5 * SEGMENT_BYTES // 2
LENGTHS = (1, 4096, 9000, 30_000)
INDEXES = 6
SEEDS = st.integers(0, 1 << 30)


class Crash(BaseException):
    """The power failed. Not an Exception, so that nothing can think that it handled it."""


@dataclass
class SimFile:
    live: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    held: list[tuple[int, bytes]] = field(default_factory=list)


class CrashOps:
    """FileOps over files in memory, with a crash after `left` more calls that change anything."""

    def __init__(self) -> None:
        self.table: dict[str, SimFile] = {}
        self.durable_table: dict[str, SimFile] = {}
        self.open_files: dict[int, SimFile] = {}
        self.next_fd = 1000
        self.left: int | None = None

    def step(self) -> None:
        """A point at which the power may fail."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_CREAT:
            self.step()
            if path in self.table:
                raise FileExistsError(errno.EEXIST, "exists", path)
            self.table[path] = SimFile()
        if path not in self.table:
            raise FileNotFoundError(errno.ENOENT, "not there", path)
        self.next_fd += 1
        self.open_files[self.next_fd] = self.table[path]
        return self.next_fd

    def close(self, fd: int) -> None:
        del self.open_files[fd]

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        data = b"".join(b.tobytes() for b in buffers)
        file = self.open_files[fd]
        file.live[offset : offset + len(data)] = data
        file.held.append((offset, data))
        self.step()
        return len(data)

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        done = 0
        for buffer in buffers:
            part = self.open_files[fd].live[offset + done : offset + done + buffer.nbytes]
            buffer[: len(part)] = memoryview(part)
            done += len(part)
        return done

    def fdatasync(self, fd: int) -> None:
        self.step()
        file = self.open_files[fd]
        file.durable = bytearray(file.live)
        file.held.clear()
        self.step()

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self.step()
        file = self.open_files[fd]
        file.live.extend(bytes(max(0, offset + nbytes - len(file.live))))

    def size(self, fd: int) -> int:
        return len(self.open_files[fd].live)

    def linked(self, fd: int) -> bool:
        return self.open_files[fd] in self.table.values()

    def unlink(self, path: str) -> None:
        self.step()
        del self.table[path]

    def names(self, directory: str) -> list[str]:
        return [os.path.basename(path) for path in self.table]

    def fsync_directory(self, directory: str) -> None:
        self.step()
        self.durable_table = dict(self.table)
        self.step()

    def together(self, calls: Sequence[Callable[[], None]], threads: Executor) -> None:
        """One after the other, in any order: the power may fail after any of them."""
        for call in random.Random(self.next_fd).sample(calls, len(calls)):
            call()

    def power_loss(self, draw: random.Random) -> None:
        """Forget what was not flushed, or keep some of it."""
        for path in sorted({*self.table, *self.durable_table}):
            before, after = self.durable_table.get(path), self.table.get(path)
            file = before if before is after or draw.random() < 0.5 else after
            self.table.pop(path, None)
            if file is not None:
                self.table[path] = file
        self.durable_table = dict(self.table)
        self.open_files.clear()
        self.left = None
        for file in self.table.values():
            _lose(file, draw)


def _lose(file: SimFile, draw: random.Random) -> None:
    """Decide for each held write what of it reached the device."""
    file.durable.extend(bytes(max(0, len(file.live) - len(file.durable)) if draw.random() < 0.5 else 0))
    for offset, data in file.held:
        fate = draw.choice(["keep", "drop", "tear", "scatter", "scramble"])
        cut = draw.randrange(0, len(data) + 1, SECTOR)
        for at in range(0, len(data), SECTOR):
            sector = data[at : at + SECTOR]
            torn = fate == "tear" and at >= cut
            if fate == "drop" or torn or (fate == "scatter" and draw.random() < 0.5):
                continue
            if fate == "scramble" and draw.random() < 0.2:
                sector = draw.randbytes(len(sector))
            if offset + at + len(sector) <= len(file.durable):
                file.durable[offset + at : offset + at + len(sector)] = sector
    file.held.clear()
    file.live = bytearray(file.durable)


class EagerTier(DiskTier):
    """Wrong on purpose: the index lists objects before their bytes are flushed."""

    def _make_durable(self, commits: Sequence[Commit]) -> Sequence[TierError | None]:
        failures = self._store.list_all(commits)
        self._store.flush([entry for commit in commits for entry in commit.entries])
        return failures


class HastyOps(CrashOps):
    """Wrong on purpose: a new segment's name is never made durable."""

    def fsync_directory(self, directory: str) -> None:
        self.step()


class GreedyTier(DiskTier):
    """Wrong on purpose: room of a removed object is handed out while the index still lists it."""

    def remove(self, object_id: ObjectId) -> int:
        there = self._ledger.find(object_id) is not None
        freed = super().remove(object_id)
        entry = self._ledger._changes.drop[-1] if there else None
        if entry is not None and entry.settled:
            self._ledger.extents.free(entry.segment, entry.at, entry.room)
            entry.settled = False
        return freed


class ImpatientTier(DiskTier):
    """Wrong on purpose: what is to be replaced goes before the other is there."""

    def reserve(self, meta: ObjectMeta, *, holder: str, replacing: bool = False) -> Slot:
        if replacing:
            self.remove(meta.object_id)
        return super().reserve(meta, holder=holder)


class CrashMachine(RuleBasedStateMachine):
    """The tier against a dictionary: for each object, what it may hold; None stands for absent."""

    tier_class: type[DiskTier] = DiskTier
    ops_class: type[CrashOps] = CrashOps
    codec = "raw"
    open_vault: OpenVault | None = None

    def content(self, seed: int, length: int) -> bytes:
        """A payload, the same for the same seed."""
        return content(seed, length)

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-crash-"))
        self.ops = self.ops_class()
        self.seed = 0
        self.allowed: dict[int, set[bytes | None]] = {n: {None} for n in range(INDEXES)}
        self.removed: set[int] = set()
        self.versions = {0}
        # What an index made anew may bring back of an object: written, and not forgotten since.
        self.written: dict[int, set[bytes]] = {n: set() for n in range(INDEXES)}
        self._open()

    def _open(self) -> None:
        # Written in the place of an object since the store was opened, and never committed.
        self.half_done: dict[int, set[bytes]] = {n: set() for n in range(INDEXES)}
        self.tier = self.tier_class(
            self.directory / "store",
            CAPACITY_BYTES,
            segment_bytes=SEGMENT_BYTES,
            ops=self.ops,
            direct=False,
            open_vault=self.open_vault,
        )
        index = self.tier._store.index
        apply = index.apply

        def with_crash_points(batch: Batch) -> None:
            self.ops.step()
            apply(batch)
            self.ops.step()

        index.apply = with_crash_points  # type: ignore[method-assign]

    @rule(count=st.integers(1, 3), first=st.integers(0, INDEXES - 1), length=st.sampled_from(LENGTHS))
    def put(self, count: int, first: int, length: int, replacing: bool = False) -> None:
        """Write some objects and a record that names their commit, in one commit."""
        self.seed += 1
        fresh: dict[int, bytes] = {}
        ready = []
        for n in range(count):
            index = (first + n) % INDEXES
            data = self.content(self.seed * 10 + n, length)
            try:
                slot = self.tier.reserve(default_meta(index, length), holder="w", replacing=replacing)
            except (ObjectExists, TierFull):
                continue
            self.written[index].add(data)
            self.tier.write(slot, data, self.codec)
            ready.append((slot, checksum(data)))
            fresh[index] = data
        for index, data in fresh.items():
            self.allowed[index] |= {data}
        self.versions.add(self.seed)
        self._commit(ready, [ConversationRecord("t", "c", self.seed, b"x")])
        for index in self.removed:
            self.allowed[index] = {None}
        for index, data in fresh.items():
            self.allowed[index] = {data}
            self.half_done[index].clear()
        self.removed.clear()
        self.versions = {self.seed}

    @rule(count=st.integers(1, 3), first=st.integers(0, INDEXES - 1), length=st.sampled_from(LENGTHS))
    def replace(self, count: int, first: int, length: int) -> None:
        """Write objects in the place of others: at any point the old one is there, or the new one."""
        self.put(count, first, length, replacing=True)

    def _commit(self, ready: list[tuple[Slot, int]], records: list[ConversationRecord]) -> None:
        """Every other time as callers who come at once do: a commit for each object."""
        if self.seed % 2 or not ready:
            self.tier.commit_with_records(ready, records)
            return
        together: list[Commit] = []
        submit = self.tier._commits.submit
        self.tier._commits.submit = lambda work, carry_out: together.append(work)  # type: ignore
        for slot in ready:
            self.tier.commit_with_records([slot], records if slot is ready[-1] else ())
        self.tier._commits.submit = submit  # type: ignore[method-assign]
        assert not any(self.tier._make_durable(together))

    @rule(index=st.integers(0, INDEXES - 1))
    def remove(self, index: int) -> None:
        if self.tier.remove(default_meta(index, 1).object_id):
            self.allowed[index] |= {None}
            self.removed.add(index)

    @rule(index=st.integers(0, INDEXES - 1))
    def forget(self, index: int) -> None:
        """Remove an object so that no loss of anything brings it back."""
        self.tier.remove(default_meta(index, 1).object_id)
        self.allowed[index] |= {None}
        self.removed.add(index)
        self.tier.commit_with_records([], [], forget=True)
        for gone in self.removed:
            self.allowed[gone] = {None}
            self.written[gone].clear()
        self.removed.clear()

    @rule(index=st.integers(0, INDEXES - 1))
    def leave_half_done(self, index: int) -> None:
        """Write an object and never commit it."""
        try:
            slot = self.tier.reserve(default_meta(index, LENGTHS[0]), holder="dead", replacing=True)
        except (ObjectExists, TierFull):
            return
        self.written[index].add(bytes(LENGTHS[0]))
        self.half_done[index].add(bytes(LENGTHS[0]))
        self.tier.write(slot, bytes(LENGTHS[0]))
        self.tier.holder_ended("dead")

    @rule()
    def restart(self) -> None:
        self.tier.close()
        for index in self.removed:
            self.allowed[index] = {None}
        self.removed.clear()
        self._open()

    @rule(seed=SEEDS)
    def crash_between_calls(self, seed: int) -> None:
        self._power_loss(seed)

    @rule(after=st.integers(0, 12), seed=SEEDS, count=st.integers(1, 3), first=st.integers(0, 5))
    def crash_in_put(self, after: int, seed: int, count: int, first: int) -> None:
        self._crash_in(after, seed, lambda: self.put(count, first, LENGTHS[seed % len(LENGTHS)]))

    @rule(after=st.integers(0, 12), seed=SEEDS, first=st.integers(0, 5))
    def crash_in_replace(self, after: int, seed: int, first: int) -> None:
        self._crash_in(after, seed, lambda: self.replace(2, first, LENGTHS[seed % len(LENGTHS)]))

    @rule(after=st.integers(0, 8), seed=SEEDS, index=st.integers(0, INDEXES - 1))
    def crash_in_forget(self, after: int, seed: int, index: int) -> None:
        self._crash_in(after, seed, lambda: self.forget(index))

    @rule(seed=SEEDS)
    def lose_the_index_in_a_crash(self, seed: int) -> None:
        """Nothing acknowledged is lost, nothing forgotten comes back; what was evicted or half done may."""
        abandon(self.tier)
        self.ops.power_loss(random.Random(seed))
        (self.directory / "store" / "index.sqlite").unlink()
        fsck(self.directory / "store", repair=True, ops=self.ops, open_vault=self.open_vault)
        for index, allowed in self.allowed.items():
            allowed |= self.written[index] if None in allowed else self.half_done[index]
        self.versions = {0}
        self._open()
        self._settle()

    @rule(after=st.integers(0, 5), seed=SEEDS)
    def crash_in_restart(self, after: int, seed: int) -> None:
        self._crash_in(after, seed, self.restart)

    @rule(after=st.integers(0, 12), seed=SEEDS)
    def make_room_ahead(self, after: int, seed: int) -> None:
        self._crash_in(after, seed, self.tier._store.make_ahead)

    def _crash_in(self, after: int, seed: int, action: Callable[[], object]) -> None:
        self.ops.left = after
        try:
            action()
        except Crash:
            self._power_loss(seed)
        self.ops.left = None

    def _power_loss(self, seed: int) -> None:
        abandon(self.tier)
        self.ops.power_loss(random.Random(seed))
        self._open()
        self._settle()

    def _settle(self) -> None:
        """After a crash: what is there is one of the allowed, and that is it from now on."""
        for index, allowed in self.allowed.items():
            there = self._look(index)
            assert there in allowed, f"object {index} is {'absent' if there is None else 'wrong'}"
            self.allowed[index] = {there}
        record = self.tier.record("t", "c")
        version = 0 if record is None else record.version
        assert version in self.versions, "a record was lost, or came too early"
        self.versions = {version}
        self.removed.clear()

    def _look(self, index: int) -> bytes | None:
        slot = self.tier.find(default_meta(index, 1).object_id)
        return None if slot is None else get(self.tier, slot)

    @invariant()
    def the_live_tier_is_right(self) -> None:
        for index, allowed in self.allowed.items():
            there = self._look(index)
            assert there in allowed
            assert (there is None) == (index in self.removed or allowed == {None})
        usage = self.tier.usage()
        assert usage.used_bytes + self.tier._ledger.extents.free_bytes <= CAPACITY_BYTES
        assert usage.filling_bytes == 0

    @invariant()
    def the_limit_holds(self) -> None:
        segments = [file for path, file in self.ops.table.items() if path.endswith(".seg")]
        assert sum(len(file.live) for file in segments) <= CAPACITY_BYTES

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            abandon(self.tier)
            shutil.rmtree(self.directory)


def abandon(tier: DiskTier) -> None:
    """End a tier as a crash does: nothing is flushed, nothing more is listed. Twice is no harm."""
    tier._writes.close()
    tier._reads.close()
    if not tier._store.closed:
        tier._store.closed = True
        tier._store.index.close()
        if tier._store._keys.vault is not None:
            tier._store._keys.vault.close()
        tier._store._held.release()


CHECKED = settings(
    max_examples=40,
    stateful_step_count=25,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

# Where a failure is wanted, the first will do.
CAUGHT = settings(CHECKED, max_examples=3000, phases=[Phase.generate])

TestCrashMachine = CrashMachine.TestCase
TestCrashMachine.settings = CHECKED


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_crashes_at_length() -> None:
    run_state_machine_as_test(
        CrashMachine,
        settings=settings(CHECKED, max_examples=1500, stateful_step_count=50, derandomize=False),
    )


def test_listing_before_flushing_is_caught() -> None:
    class Eager(CrashMachine):
        tier_class = EagerTier

    with pytest.raises((AssertionError, CorruptObject)):
        run_state_machine_as_test(Eager, settings=CAUGHT)


def test_room_that_is_reused_too_early_is_caught() -> None:
    class Greedy(CrashMachine):
        tier_class = GreedyTier
        # Rules that seldom lead to this fault, and take their share of the steps.
        forget = crash_in_forget = lose_the_index_in_a_crash = make_room_ahead = None  # type: ignore

    with pytest.raises((AssertionError, CorruptObject)):
        run_state_machine_as_test(Greedy, settings=CAUGHT)


def test_a_forget_that_waits_for_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hurried(CrashMachine):
        # As above.
        leave_half_done = restart = crash_in_restart = crash_in_put = make_room_ahead = None  # type: ignore

    monkeypatch.setattr(Graves, "sync", lambda _: None)
    with pytest.raises((AssertionError, CorruptObject)):
        run_state_machine_as_test(Hurried, settings=CAUGHT)


def test_a_name_that_was_not_synced_is_caught() -> None:
    class Hasty(CrashMachine):
        ops_class = HastyOps

    with pytest.raises((AssertionError, CorruptObject)):
        run_state_machine_as_test(Hasty, settings=CAUGHT)

"""The shared memory: seals, the generation table, passing it on, and giving it back."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtier.errors import TierUnavailable
from kvtier.host import arena as arena_module
from kvtier.host import sysmem
from kvtier.host.arena import Arena, ArenaView
from kvtier.host.prefault import Prefaulter

MIB = 1 << 20
SIZES = (4 * MIB, 2 * MIB)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZES, max_slots=1024)
    yield made
    made.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def rss_shmem_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1])
    raise AssertionError("no RssShmem")


# -- bytes and generations


def test_both_sides_see_the_same_bytes(arena: Arena) -> None:
    other = ArenaView.from_fds(arena.fds, arena.sizes)
    arena.view((1, 4096), 5)[:] = np.frombuffer(b"hello", dtype=np.uint8)
    assert bytes(other.view((1, 4096), 5)) == b"hello"
    other.view((0, 4 * MIB - 3), 3)[:] = 7
    assert bytes(arena.view((0, 4 * MIB - 3), 3)) == b"\x07\x07\x07"
    assert other.sub_arenas == 2
    other.close()


def test_sub_arenas_are_separate_and_page_aligned(arena: Arena) -> None:
    arena.view((0, 0), SIZES[0])[:] = 1
    assert not arena.view((1, 0), SIZES[1]).any()
    assert arena.view((1, 8192), 1).ctypes.data % 4096 == 0


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [((0, 4 * MIB), 1), ((1, 2 * MIB - 1), 2), ((0, -1), 1), ((2, 0), 1), ((-1, 0), 1), ((0, 0), -1)],
)
def test_views_stay_inside(arena: Arena, address: tuple[int, int], nbytes: int) -> None:
    with pytest.raises(ValueError):
        arena.view(address, nbytes)


def test_generations_reach_attachers(arena: Arena) -> None:
    other = ArenaView.from_fds(arena.fds, arena.sizes)
    assert other.generation(1023) == 0
    arena.publish(1023, (1 << 64) - 1)
    assert other.generation(1023) == (1 << 64) - 1
    arena.publish(1023, 0)
    assert other.generation(1023) == 0
    for slot_id in (-1, 1024):
        with pytest.raises(ValueError):
            other.generation(slot_id)
    other.close()


def test_after_close_every_slot_is_nobodys(arena: Arena) -> None:
    other = ArenaView.from_fds(arena.fds, arena.sizes)
    arena.publish(5, 9)
    arena.close()
    assert other.generation(5) == 0
    assert arena.generation(5) == 0
    arena.publish(5, 10)
    with pytest.raises(TierUnavailable):
        arena.view((0, 0), 1)
    other.close()
    assert other.generation(5) == 0


CHILD = """
import socket, sys
from kvtier.host.arena import ArenaView

sock = socket.socket(fileno=int(sys.argv[1]))
sock.settimeout(30)
sizes = [int(size) for size in sys.argv[2].split(",")]
_, fds, _, _ = socket.recv_fds(sock, 1, len(sizes))
arena = ArenaView.from_fds(fds, sizes)
sock.sendall(bytes(arena.view((1, 100), 5)) + arena.generation(3).to_bytes(8, "little"))
arena.view((0, 200), 3)[:] = 42
sock.sendall(b"W")
sock.recv(1)
sock.sendall(arena.generation(3).to_bytes(8, "little"))
"""


def test_another_process_gets_it_over_a_socket(arena: Arena) -> None:
    arena.view((1, 100), 5)[:] = np.frombuffer(b"there", dtype=np.uint8)
    arena.publish(3, 77)
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    sizes = ",".join(map(str, arena.sizes))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, str(theirs.fileno()), sizes]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as child:
        socket.send_fds(ours, [b"A"], list(arena.fds))
        said = b"".join(iter(lambda: ours.recv(1), b"W"))
        assert said == b"there" + (77).to_bytes(8, "little")
        assert bytes(arena.view((0, 200), 3)) == b"***"
        arena.publish(3, 78)
        ours.sendall(b"G")
        assert int.from_bytes(ours.recv(8), "little") == 78
        assert child.wait(timeout=30) == 0


# -- what an attacher cannot do


def write_the_table(table_fd: int) -> None:
    """Try every way to a writable table: through the descriptor, and through one opened anew."""
    with pytest.raises(PermissionError):
        mmap.mmap(table_fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError):
        os.pwrite(table_fd, b"x", 0)
    again = os.open(f"/proc/self/fd/{table_fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
    finally:
        os.close(again)


def test_the_table_is_the_owners_alone(arena: Arena) -> None:
    write_the_table(arena.fds[-1])
    view = ArenaView.from_fds(arena.fds, arena.sizes)
    with pytest.raises(ValueError, match="read-only"):
        view._words[0] = 1
    view.close()


def test_without_the_seal_an_attacher_could_write_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_READ_ONLY", arena_module._FIXED_LENGTH)
    unsealed = Arena((MIB,), max_slots=512)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        write_the_table(unsealed.fds[-1])
    monkeypatch.undo()
    with pytest.raises(TierUnavailable, match="seals"):
        ArenaView.from_fds(unsealed.fds, unsealed.sizes)
    unsealed.close()


@pytest.mark.parametrize("nbytes", [0, MIB, 64 * MIB])
def test_nobody_changes_its_length(arena: Arena, nbytes: int) -> None:
    for part in range(2):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fds[part], nbytes)
    with pytest.raises(OSError):
        os.ftruncate(arena.fds[-1], nbytes)


def memory_file(nbytes: int, *, seals: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_attaching_checks_what_it_is_given(arena: Arena, tmp_path: Path) -> None:
    before = open_descriptors()
    unsealed = memory_file(SIZES[0])
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, SIZES[0])
    null = os.open("/dev/null", os.O_RDWR)
    rest, sizes = arena.fds[1:], arena.sizes
    for fds, given in [
        ((unsealed, *rest), sizes),
        ((plain, *rest), sizes),
        ((null, *rest), sizes),
        (arena.fds, (SIZES[0] * 2, *sizes[1:])),
        ((*arena.fds[:-1], arena.fds[0]), (*sizes[:-1], SIZES[0])),
        (arena.fds[:2], sizes),
        (arena.fds[:1], sizes[:1]),
    ]:
        with pytest.raises(TierUnavailable):
            ArenaView.from_fds(fds, given)
    for fd in (unsealed, plain, null):
        os.close(fd)
    assert open_descriptors() == before


# -- giving it back


def test_memory_and_descriptors_come_back_to_the_byte() -> None:
    fds, shmem_kib = open_descriptors(), rss_shmem_kib()
    arena = Arena((32 * MIB, 16 * MIB), max_slots=4096)
    for sub_arena, nbytes in enumerate((32 * MIB, 16 * MIB)):
        arena.populate(sub_arena, 0, nbytes)
        assert os.fstat(arena.fds[sub_arena]).st_blocks * 512 == nbytes
    arena.publish(0, 1)
    assert rss_shmem_kib() == shmem_kib + 48 * 1024 + 4
    view = ArenaView.from_fds(arena.fds, arena.sizes)
    view.close()
    view.close()
    arena.close()
    arena.close()
    assert rss_shmem_kib() == shmem_kib
    assert open_descriptors() == fds


def test_a_view_outlives_close_without_harm() -> None:
    shmem_kib = rss_shmem_kib()
    arena = Arena((MIB,), max_slots=16)
    kept = arena.view((0, 0), MIB)
    kept[:] = 3
    arena.close()
    assert int(kept[-1]) == 3
    assert rss_shmem_kib() == shmem_kib + 1024
    del kept
    assert rss_shmem_kib() == shmem_kib


def test_a_failed_creation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refuse(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(TierUnavailable, match="no space"):
        Arena((MIB,), max_slots=16)
    monkeypatch.undo()
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a: real("/nonexistent", os.O_RDONLY))
    with pytest.raises(TierUnavailable):
        Arena((MIB, MIB), max_slots=16)
    monkeypatch.undo()
    assert open_descriptors() == before


# -- faulting in


def resident_bytes(arena: Arena, sub_arena: int) -> int:
    return os.fstat(arena.fds[sub_arena]).st_blocks * 512


def test_nothing_is_faulted_in_before_its_time(arena: Arena) -> None:
    assert resident_bytes(arena, 0) == 0
    arena.populate(0, MIB, MIB)
    assert resident_bytes(arena, 0) == MIB
    assert resident_bytes(arena, 1) == 0


def test_old_kernels_touch_every_page(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldKernel:
        def madvise(self, address: int, length: int, advice: int) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(sysmem, "_libc", OldKernel())
    arena.populate(1, 0, SIZES[1])
    assert resident_bytes(arena, 1) == SIZES[1]


def test_memory_that_runs_out_is_an_error(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory:
        def madvise(self, address: int, length: int, advice: int) -> int:
            ctypes.set_errno(errno.ENOMEM)
            return -1

    monkeypatch.setattr(sysmem, "_libc", NoMemory())
    with pytest.raises(TierUnavailable, match="capacity_bytes"):
        arena.populate(0, 0, MIB)


def test_each_sub_arena_asks_for_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sysmem, "prefer_node", lambda memory, node: asked.append((memory.nbytes, node)))
    Arena(SIZES, max_slots=16, numa_nodes=(0, 3)).close()
    assert asked == [(SIZES[0], 0), (SIZES[1], 3)]
    Arena((MIB,), max_slots=16, numa_nodes=(0,)).close()
    assert len(asked) == 2


def test_the_node_is_one_bit_of_a_mask(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Kernel:
        def syscall(self, number, address, length, mode, mask, bits, flags) -> int:  # type: ignore[no-untyped-def]
            words = mask._obj
            calls.append((length.value, sum(word << (64 * i) for i, word in enumerate(words))))
            assert mode.value == 1
            return 0

    monkeypatch.setattr(sysmem, "_libc", Kernel())
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert sysmem.prefer_node(arena.view((0, 0), MIB), 70)
    assert calls == [(MIB, 1 << 70)]
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    assert not sysmem.prefer_node(arena.view((0, 0), MIB), 0)


def test_the_kernel_refuses_a_node_that_is_not_there(arena: Arena) -> None:
    assert not sysmem.prefer_node(arena.view((0, 0), MIB), 1000)
    assert not sysmem.prefer_node(arena.view((0, 0), MIB), -1)


def test_steps_alternate_and_tell_what_is_ready() -> None:
    populated: list[tuple[int, int, int]] = []
    ready: list[tuple[int, int]] = []
    steps = Prefaulter(
        (10, 4), lambda *step: populated.append(step), lambda *part: ready.append(part), step_bytes=4
    )
    steps.run()
    assert steps.wait(0)
    assert populated == [(0, 0, 4), (1, 0, 4), (0, 4, 4), (0, 8, 2)]
    assert ready == [(0, 4), (1, 4), (0, 8), (0, 10)]


def test_stop_ends_after_the_step_that_runs() -> None:
    ready: list[tuple[int, int]] = []

    def populate(sub_arena: int, offset: int, nbytes: int) -> None:
        if offset:
            steps.stop()

    steps = Prefaulter((12,), populate, lambda *part: ready.append(part), step_bytes=4)
    assert not steps.wait(0)
    steps.run()
    assert ready == [(0, 4), (0, 8)]
    assert not steps.wait(0)

"""The memory that the tier actors and the workers of a node share.

One memfd per sub-arena, sealed against a change of its length, and one for the generation table, which only
its creator can write.  The descriptors go over a Unix socket; the other side maps them with
`ArenaView.from_fds`, which checks what it was given.

The table has one uint64 per slot id: the generation of the slot's owner, 0 while it is nobody's.  A copy out
of a slot counts only if the table still named the slot's generation after the copy.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.errors import TierUnavailable
from kvtier.host import sysmem
from kvtier.host.sysmem import Bytes

WORD_BYTES = 8
_F_SEAL_FUTURE_WRITE = 0x10  # not named by Python 3.11
_FIXED_LENGTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_ONLY = _FIXED_LENGTH | _F_SEAL_FUTURE_WRITE


class _Mapping:
    """A mapped descriptor. The descriptor itself stays with whoever opened it."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        self.nbytes = nbytes
        self._mmap = mmap.mmap(
            fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        )
        self.memory: Bytes = np.frombuffer(self._mmap, dtype=np.uint8)

    def close(self) -> None:
        """Drop the mapping. Views that somebody still has keep its memory until they are gone."""
        self.memory = np.empty(0, dtype=np.uint8)
        try:
            self._mmap.close()
        except BufferError:
            del self._mmap


class ArenaView:
    """The arena as somebody else's process sees it: slots to read and write, generations to read.

    Use `from_fds`.  `close` unmaps; arrays from `view` must not be used after it.
    """

    def __init__(self, parts: Sequence[_Mapping], table: _Mapping) -> None:
        self._parts = list(parts)
        self._table = table
        self._words: npt.NDArray[np.uint64] = table.memory.view(np.uint64)
        self.closed = False

    @classmethod
    def from_fds(cls, fds: Sequence[int], sizes: Sequence[int]) -> ArenaView:
        """Map `fds`, sub-arenas first and the generation table last, of these sizes in bytes.

        The descriptors stay the caller's: it may close them at once.  Raises TierUnavailable when one is
        not a memory file of its size, or lacks a seal, so that nobody can cut the memory off under a copy.
        """
        if len(fds) != len(sizes) or len(fds) < 2:
            raise TierUnavailable(f"{len(fds)} descriptors and {len(sizes)} sizes do not make an arena")
        parts: list[_Mapping] = []
        try:
            for fd, nbytes in zip(fds[:-1], sizes[:-1], strict=True):
                parts.append(_adopt(fd, nbytes, _FIXED_LENGTH, writable=True))
                # Where its creator got huge pages, they are mapped as such; elsewhere it changes nothing.
                sysmem.want_huge(parts[-1].memory)
            table = _adopt(fds[-1], sizes[-1], _READ_ONLY, writable=False)
        except (TierUnavailable, OSError):
            _close_all(parts, ())
            raise
        return cls(parts, table)

    @classmethod
    def shared(cls, fds: Sequence[int], arena_bytes: Sequence[int], generation_slots: int) -> ArenaView:
        """As `from_fds`, by what a node tells of it: bytes of each sub-arena, slots of the table."""
        return cls.from_fds(fds, [*arena_bytes, generation_slots * np.dtype(np.uint64).itemsize])

    @property
    def sub_arenas(self) -> int:
        """How many sub-arenas there are."""
        return len(self._parts)

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """The nbytes at (sub-arena, offset) as a uint8 array over the shared memory, without a copy.

        Raises ValueError outside the arena, TierUnavailable once it is closed.
        """
        sub_arena, offset = address
        if self.closed:
            raise TierUnavailable("the arena is closed")
        if not 0 <= sub_arena < len(self._parts):
            raise ValueError(f"there is no sub-arena {sub_arena}")
        part = self._parts[sub_arena]
        if offset < 0 or nbytes < 0 or offset + nbytes > part.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is outside the {part.nbytes} bytes of the arena")
        return part.memory[offset : offset + nbytes]

    def generation(self, slot_id: int) -> int:
        """The generation of the slot's present owner, 0 when it is nobody's or the arena is closed."""
        if self.closed:
            return 0
        if not 0 <= slot_id < len(self._words):
            raise ValueError(f"there is no slot {slot_id}")
        return int(self._words[slot_id])

    def close(self) -> None:
        """Unmap everything; again is no error."""
        if self.closed:
            return
        self.closed = True
        del self._words
        for mapping in (*self._parts, self._table):
            mapping.close()


class Arena(ArenaView):
    """The creator's side: it owns the memory and writes the generations.

    sizes: bytes of each sub-arena, multiples of 4096.  max_slots: entries of the table.  numa_nodes: the
    node for each sub-arena, or none where the machine has one.  huge_pages: whether to ask for them; what
    was got says `pages`, for people.  Nothing is faulted in yet: see `populate`.
    Raises TierUnavailable when the kernel refuses the memory.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        max_slots: int,
        numa_nodes: Sequence[int] = (),
        huge_pages: bool = True,
    ) -> None:
        self.sizes = (*sizes, max_slots * WORD_BYTES)
        self._published = 0
        made: list[_Mapping] = []
        fds: list[int] = []
        try:
            for i, nbytes in enumerate(sizes):
                fds.append(_memory_file(f"kvtier-arena-{i}", nbytes))
                made.append(_Mapping(fds[-1], nbytes, writable=True))
                fcntl.fcntl(fds[-1], fcntl.F_ADD_SEALS, _FIXED_LENGTH)
            table_fd = _memory_file("kvtier-generations", self.sizes[-1])
            fds.append(table_fd)
            made.append(_Mapping(table_fd, self.sizes[-1], writable=True))
            # From here on nobody can map it writable, by no descriptor; the mapping above stays writable.
            fcntl.fcntl(table_fd, fcntl.F_ADD_SEALS, _READ_ONLY)
            fds[-1] = os.open(f"/proc/self/fd/{table_fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(table_fd)
        except OSError as error:
            _close_all(made, fds)
            raise TierUnavailable(f"no shared memory of {sum(sizes)} bytes: {error}") from error
        super().__init__(made[:-1], made[-1])
        self._fds = tuple(fds)
        self.pages = self._ask_for_huge_pages() if huge_pages else ""
        if len(numa_nodes) > 1:
            for part, node_id in zip(self._parts, numa_nodes, strict=True):
                sysmem.prefer_node(part.memory, node_id)

    @property
    def fds(self) -> tuple[int, ...]:
        """What an attacher gets, in the order of `sizes`; the last one is open for reading only."""
        return self._fds

    def populate(self, sub_arena: int, offset: int, nbytes: int) -> None:
        """Fault in a part that nobody uses yet. Raises TierUnavailable when memory runs out."""
        memory = self.view((sub_arena, offset), nbytes)
        try:
            sysmem.populate(memory)
        except OSError as error:
            raise TierUnavailable(str(error), fix="lower host.capacity_bytes") from error

    def _ask_for_huge_pages(self) -> str:
        """They are faulted in as such, for all who map them; without them copies are a little slower."""
        setting = sysmem.shared_huge_pages()
        if setting in ("never", "deny"):
            return f"no huge pages: shmem_enabled is {setting}"
        if not all([sysmem.want_huge(part.memory) for part in self._parts]):
            return "no huge pages: the kernel refused"
        return "huge pages"

    def publish(self, slot_id: int, generation: int) -> None:
        """Name the slot's present owner to everybody; 0 for nobody. Nothing when closed."""
        if not self.closed:
            self._words[slot_id] = generation
            self._published = max(self._published, slot_id + 1)

    def close(self) -> None:
        """Tell attachers that every slot is nobody's, and give the memory back; again is no error.

        What attachers still map stays with them until they close.
        """
        if self.closed:
            return
        self._words[: self._published] = 0
        super().close()
        for fd in self._fds:
            os.close(fd)
        self._fds = ()


def _memory_file(name: str, nbytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _adopt(fd: int, nbytes: int, seals: int, *, writable: bool) -> _Mapping:
    """Map somebody else's descriptor, once it is what it should be."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
        raise TierUnavailable(f"descriptor is of {status.st_size} bytes where {nbytes} were announced")
    try:
        present = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise TierUnavailable("descriptor is not a memory file") from error
    if present & seals != seals:
        raise TierUnavailable(f"memory file has seals {present:#x} where {seals:#x} are needed")
    return _Mapping(fd, nbytes, writable=writable)


def _close_all(mappings: Sequence[_Mapping], fds: Sequence[int]) -> None:
    for mapping in mappings:
        mapping.close()
    for fd in fds:
        os.close(fd)

"""The few memory calls that Python lacks or that must not hold its lock, by libc."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE_BYTES = 4096
SHMEM_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MPOL_PREFERRED = 1
_NR_MBIND = {"x86_64": 237, "aarch64": 235}
_MAX_NODES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


def populate(memory: Bytes) -> None:
    """Fault in every page of a fresh, writable, page-aligned mapping; about 1 GB/s a thread.

    Nobody else may use the memory yet: where the kernel (before 5.14) lacks MADV_POPULATE_WRITE, each page
    gets a zero written.  Other threads run meanwhile.  Raises OSError, ENOMEM above all.
    """
    if _libc.madvise(memory.ctypes.data, memory.nbytes, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise OSError(code, f"cannot fault in {memory.nbytes} bytes: {os.strerror(code)}")
    touch(memory)


def shared_huge_pages(setting: Path = SHMEM_SETTING) -> str:
    """What the kernel does about huge pages of shared memory: 'never' where it has no such setting.

    'always' and 'force' give them to everybody, 'advise' and 'within_size' to whoever asks.
    """
    try:
        words = setting.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return "never"
    return words.partition("[")[2].partition("]")[0] or "never"


def want_huge(memory: Bytes) -> bool:
    """Ask for huge pages in a shared mapping; answers whether the kernel took it as advice."""
    return bool(_libc.madvise(memory.ctypes.data, memory.nbytes, _MADV_HUGEPAGE) == 0)


def touch(memory: Bytes) -> None:
    """Write a zero into every page."""
    memory[::PAGE_BYTES] = 0


def prefer_node(memory: Bytes, node_id: int) -> bool:
    """Ask that pages of the mapping, none of them touched yet, come from a NUMA node while it has any.

    Answers whether the kernel agreed: containers may forbid the call, and it is an optimisation only.
    Other nodes stand in when this one is full, since the alternative is the kernel ending a process.
    """
    number = _NR_MBIND.get(platform.machine())
    if number is None or not 0 <= node_id < _MAX_NODES:
        return False
    words = (ctypes.c_ulong * (_MAX_NODES // 64 + 1))()
    words[node_id // 64] = 1 << (node_id % 64)
    done = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(memory.ctypes.data),
        ctypes.c_ulong(memory.nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        ctypes.byref(words),
        ctypes.c_ulong(_MAX_NODES),
        ctypes.c_uint(0),
    )
    return bool(done == 0)

"""Mooncake Store's SSD offload by its public API, run by Mooncake's own Python: one client for each of

    write   puts every value, waits until they are on the drive, and flushes their files
            answers {"seconds", "on_disk"}
    read    a new client, nothing in memory: for each number on the input gets all of them in so many batches
            at once; answers {"seconds", "read_bytes", "values"} to each

Values are of 32 MiB.  A client offloads at its heartbeat, which cannot be set to less than a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

MiB = 1 << 20
VALUE_BYTES = 32 * MiB
# So long without another value on the drive: the rest does not come.
SETTLED_S = 15.0
FLUSHERS = 4


class Memory:
    """Page-aligned memory, all of it there."""

    def __init__(self, nbytes: int) -> None:
        self.map = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        ctypes.memset(self.address, 1, nbytes)

    def fill(self, values: int) -> None:
        """Each value with noise of its own seed."""
        for number in range(values):
            self.map[number * VALUE_BYTES : (number + 1) * VALUE_BYTES] = noise(number)


def noise(seed: int) -> bytes:
    """A value."""
    return random.Random(seed).randbytes(VALUE_BYTES)


def open_client(master: str, folder: Path, segment_bytes: int) -> Any:
    """A client that offloads to `folder`."""
    client = MooncakeDistributedStore()
    code = client.setup(
        local_hostname="127.0.0.1",
        metadata_server="P2PHANDSHAKE",
        global_segment_size=segment_bytes,
        local_buffer_size=512 * MiB,
        protocol="tcp",
        rdma_devices="",
        master_server_addr=master,
        enable_ssd_offload=True,
        ssd_offload_path=str(folder),
    )
    if code:
        raise OSError(f"the client could not be set up: {code}")
    return client


def on_disk(client: Any, keys: list[str]) -> int:
    """How many values have a copy on the drive."""
    found = client.batch_get_replica_desc(keys)
    return sum(any(copy.is_local_disk_replica() for copy in found.get(key, ())) for key in keys)


def settled(client: Any, keys: list[str]) -> tuple[int, float]:
    """How many values come to be known on the drive, and when the last of them was."""
    count, last = 0, time.perf_counter()
    while count < len(keys) and time.perf_counter() - last < SETTLED_S:
        time.sleep(0.005)
        now = on_disk(client, keys)
        if now > count:
            count, last = now, time.perf_counter()
    return count, last


def write(given: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """Until the last value that comes to the drive is there, and flushed."""
    # The master evicts from a segment that is nearly full.
    client = open_client(given.master, given.folder, len(keys) * VALUE_BYTES * 3 // 2 + 256 * MiB)
    memory = Memory(len(keys) * VALUE_BYTES)
    memory.fill(len(keys))
    client.register_buffer(memory.address, len(keys) * VALUE_BYTES)
    begun = time.perf_counter()
    for number, key in enumerate(keys):
        code = client.put_from(key, memory.address + number * VALUE_BYTES, VALUE_BYTES)
        if code:
            raise OSError(f"a put failed: {code}")
    count, last = settled(client, keys)
    took = last - begun
    begun = time.perf_counter()
    flush(given.folder)
    took += time.perf_counter() - begun
    client.close()
    return {"seconds": took, "on_disk": count}


def flush(folder: Path) -> None:
    """Every file of the folder and the folder itself, several at a time."""
    with ThreadPoolExecutor(FLUSHERS) as pool:
        for _ in pool.map(sync, [folder, *(p for p in folder.rglob("*") if p.is_file())]):
            pass


def sync(path: Path) -> None:
    """Make one file or folder survive power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(given: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """For each line of the input, a number: everything, in so many batches and threads at once."""
    client = open_client(given.master, given.folder, 64 * MiB)
    memory = Memory(len(keys) * VALUE_BYTES)
    client.register_buffer(memory.address, len(keys) * VALUE_BYTES)
    settled(client, keys)
    answer(given, {"ready": True})
    for line in sys.stdin:
        answer(given, read_all(client, memory, keys, int(line)))
    client.close()
    return {}


def read_all(client: Any, memory: Memory, keys: list[str], at_once: int) -> dict[str, Any]:
    """Timed until everything lies in the caller's memory; compared after that."""
    ctypes.memset(memory.address, 1, len(keys) * VALUE_BYTES)

    def get(part: range) -> list[int]:
        addresses = [memory.address + number * VALUE_BYTES for number in part]
        return list(client.batch_get_into([keys[n] for n in part], addresses, [VALUE_BYTES] * len(part)))

    parts = [range(number, len(keys), at_once) for number in range(at_once)]
    before, begun = read_bytes(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        said = list(pool.map(get, parts))
    took, nbytes = time.perf_counter() - begun, read_bytes() - before
    got = [
        n
        for part, lengths in zip(parts, said, strict=True)
        for n, x in zip(part, lengths, strict=True)
        if x > 0
    ]
    if any(memory.map[n * VALUE_BYTES : (n + 1) * VALUE_BYTES] != noise(n) for n in got):
        raise ValueError("other bytes came back")
    return {"seconds": took, "read_bytes": nbytes, "values": len(got)}


def read_bytes() -> int:
    """What this process has had read from block devices."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def main() -> None:
    """Do one thing and answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--master")
    parser.add_argument("--values", type=int)
    given = parser.parse_args()
    given.answers = os.fdopen(os.dup(1), "w")
    # What the library prints must not come among the answers.
    os.dup2(2, 1)
    keys = [f"value-{number}" for number in range(given.values)]
    answer(given, write(given, keys) if given.what == "write" else read(given, keys))


def answer(given: argparse.Namespace, said: dict[str, Any]) -> None:
    """A line for the one who started this."""
    print(json.dumps(said), file=given.answers, flush=True)


if __name__ == "__main__":
    main()

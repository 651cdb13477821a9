"""LMCache's disk tier by its public API, run by LMCache's own Python: a JSON command a line, an answer each.

    {"do": "store"}                  from its host memory to the drive, durable; answers {"seconds"}
    {"do": "load", "at_once": 8}     from the drive to empty host memory; answers {"seconds", "read_bytes"}
    {"do": "clear"}                  forget everything

Chunks are of 32 MiB.  A store is durable as a park is: it ends after every file and the folder were flushed,
which LMCache itself does not do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["LMCACHE_LOG_LEVEL"] = "WARNING"

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec  # type: ignore[import-not-found]
from lmcache.v1.distributed.config import parse_args  # type: ignore[import-not-found]
from lmcache.v1.distributed.storage_manager import StorageManager  # type: ignore[import-not-found]

# Keys and values of 32 layers, 256 tokens, 8 heads of 128, in bf16: 32 MiB.
SHAPE = torch.Size([2, 32, 256, 1024])
CHUNK_BYTES = SHAPE.numel() * 2
LIMIT_S = 120.0
FLUSHERS = 4


class Side:
    """A storage manager over one folder, and the chunks that go through it."""

    def __init__(self, folder: Path, adapter: dict[str, Any], chunks: int) -> None:
        self.folder = folder
        self.chunks = [noise(number) for number in range(chunks)]
        self.turn = 0
        gib = 2 * chunks * CHUNK_BYTES // 2**30 + 2
        told = json.dumps({**adapter, "base_path": str(folder)})
        limits = ["--eviction-policy", "LRU", "--eviction-trigger-watermark", "0.95"]
        memory = ["--l1-size-gb", str(gib), "--no-l1-use-lazy"]
        self.manager = StorageManager(parse_args([*memory, *limits, "--l2-adapter", told]))
        # Once, so that all of its memory is there.
        self.store()
        self.clear()

    def keys(self) -> list[Any]:
        """Of this turn: none is used twice, since LMCache does not write what it has."""
        names = [f"{self.turn:08x}{number:08x}".encode() for number in range(len(self.chunks))]
        return [ObjectKey(chunk_hash=name, model_name="bench/llama", kv_rank=0) for name in names]

    def store(self) -> dict[str, Any]:
        """Timed from the moment when everything lies in its host memory."""
        self.turn += 1
        keys = self.keys()
        layout = MemoryLayoutDesc(shapes=[SHAPE], dtypes=[torch.bfloat16])
        slots = self.manager.reserve_write(keys, layout)
        for key, chunk in zip(keys, self.chunks, strict=True):
            slots[key].tensor.view(SHAPE).copy_(chunk)
        begun = time.perf_counter()
        self.manager.finish_write(keys)
        wait_for(self.is_stored)
        stored = time.perf_counter() - begun
        flush(self.folder)
        return {"seconds": time.perf_counter() - begun, "unflushed_seconds": stored}

    def is_stored(self) -> bool:
        """Whether every chunk is in a file of its length, and nothing is under way."""
        states = self.manager.report_status()["store_controllers"].values()
        if any(s["pending_keys_count"] or s["in_flight_task_count"] for s in states):
            return False
        lengths = [path.stat().st_size for path in self.folder.rglob("*") if path.is_file()]
        return sum(nbytes >= CHUNK_BYTES for nbytes in lengths) >= len(self.chunks)

    def load(self, at_once: int) -> dict[str, Any]:
        """Timed until everything lies in its host memory again; compared after that."""
        self.manager.clear()
        keys = self.keys()
        layout = MemoryLayoutDesc(shapes=[SHAPE], dtypes=[torch.bfloat16])
        parts = [keys[number::at_once] for number in range(at_once)]
        before = read_bytes()
        begun = time.perf_counter()
        handles = []
        for part in parts:
            row = GroupedObjectKeys(keys=part, object_group_id=0, layout_desc=layout)
            handles.append(self.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row])))
        for handle in handles:
            if not self.manager.wait_prefetch_status(handle, LIMIT_S):
                raise TimeoutError("a prefetch did not end")
        took = time.perf_counter() - begun
        for part, handle in zip(parts, handles, strict=True):
            result = self.manager.query_prefetch_status(handle)
            if result is None or result.hit_cells[0].popcount() != len(part):
                raise LookupError("not all chunks were found")
        self.compare(keys)
        return {"seconds": took, "read_bytes": read_bytes() - before}

    def compare(self, keys: list[Any]) -> None:
        """Raise ValueError unless what is in host memory is what was stored."""
        with self.manager.read_prefetched_results(keys) as objects:
            for chunk, found in zip(self.chunks, objects, strict=True):
                if not torch.equal(found.tensor.view(SHAPE).view(torch.int16), chunk.view(torch.int16)):
                    raise ValueError("other bytes came back")
        self.manager.finish_read_prefetched(keys)

    def clear(self) -> dict[str, Any]:
        """Nothing in memory, nothing on the drive."""
        self.manager.clear()
        for path in self.folder.rglob("*"):
            if path.is_file():
                path.unlink()
        return {}


def noise(seed: int) -> torch.Tensor:
    """A chunk that cannot be made smaller."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (CHUNK_BYTES // 8,), generator=draw)
    return words.view(torch.bfloat16).view(SHAPE)


def flush(folder: Path) -> None:
    """Every file of the folder and the folder itself, several at a time."""
    with ThreadPoolExecutor(FLUSHERS) as pool:
        for _ in pool.map(sync, [p for p in folder.rglob("*") if p.is_file()]):
            pass
    sync(folder)


def sync(path: Path) -> None:
    """Make one file or folder survive power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_bytes() -> int:
    """What this process has had read from block devices."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def wait_for(ready: Any) -> None:
    """Look every millisecond; raises TimeoutError."""
    until = time.monotonic() + LIMIT_S
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError("LMCache did not store everything")
        time.sleep(0.001)


def main() -> None:
    """Answer commands until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", type=json.loads)
    parser.add_argument("--chunks", type=int)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    # What the library prints must not come among the answers.
    os.dup2(2, 1)
    side = Side(given.folder, given.adapter, given.chunks)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(side, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)
    side.manager.close()


if __name__ == "__main__":
    main()

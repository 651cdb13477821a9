"""The kernels' C++ on the CPU: compiled into a library, and a batch laid out for it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import kvtier.gpu.cuda
from kvtier.geometry import EXACT
from kvtier.gpu.cuda.device import TILE_BYTES
from kvtier.gpu.cuda.shapes import ShapeCache
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.cuda.work import Live, cut, describe_batch
from kvtier.gpu.engine import CopyBatch, CopyItem
from kvtier.gpu.pool import Binding

SOURCES = Path(kvtier.gpu.cuda.__file__).parent / "kernels"
FLAGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-std=c++17", "-pthread", "-shared", "-fPIC")


def compiled(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """The library of a file in kernels/; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    out = folder / f"{source}.so"
    command = [compiler, "-O2", *FLAGS, *flags, "-o", str(out), str(SOURCES / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


class Prepared:
    """A gather of some objects, described as the engine describes it, over memory of this process."""

    def __init__(
        self,
        binding: Binding,
        items: list[CopyItem],
        load_bytes: int = TILE_BYTES * 2,
        fidelity: str = EXACT,
    ) -> None:
        shapes = ShapeCache()
        self.out = np.full(sum(i.nbytes for i in items) + 64, 0xEE, np.uint8)
        live, at = [], 0
        for n, i in enumerate(items):
            rows = (i.group, i.start, i.tokens, i.first_valid)
            address = int(self.out.ctypes.data) + at
            ids = binding.page_ids(*rows)
            live.append(Live(n, i.group, shapes.shape(binding, *rows), ids, address, i.nbytes))
            at += i.nbytes
        self.live = live
        batch = CopyBatch("j", 0, "gather", binding, tuple(items), fidelity=fidelity)
        self.steps = cut(batch, live, always("direct"), load_bytes)
        self.work = describe_batch(live, self.steps, [each.host for each in live])
        self.blob = np.zeros(self.work.nbytes + 8, np.uint8)[: self.work.nbytes]
        self.work.write(self.blob, int(self.blob.ctypes.data))

    def segments(self, at: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(int(self.blob.ctypes.data) + at)

    def move(self, host: ctypes.CDLL, gather: bool, tile_bytes: int = TILE_BYTES) -> None:
        count = sum(len(load.parts) for step in self.steps for load in step.loads)
        host.kv_host_move(
            self.segments(self.work.moves),
            ctypes.c_uint32(count),
            ctypes.c_uint64(0),
            int(gather),
            tile_bytes,
        )

    def sums(self, host: ctypes.CDLL) -> list[int]:
        results = np.zeros(len(self.live), np.uint64)
        host.kv_host_checksum(
            self.segments(self.work.checks),
            ctypes.c_uint32(len(self.live)),
            ctypes.c_void_p(int(results.ctypes.data)),
        )
        return [(int(r) + e.shape.nbytes) % (1 << 64) for r, e in zip(results, self.live, strict=True)]

    def launch(self, simt: ctypes.CDLL, kernel: int, blocks: int) -> list[int]:
        """Run a kernel itself (0 gather, 1 scatter, 2 checksum), load by load; the checksums of kernel 2."""
        if kernel == 2:
            results = np.zeros(len(self.live), np.uint64)
            base = ctypes.c_uint64(int(results.ctypes.data))
            simt.kv_simt_launch(
                2, self.segments(self.work.checks), len(self.live), self.work.check_tiles, base, blocks,
                ctypes.c_uint64(0), ctypes.c_uint64(0),
            )  # fmt: skip
            return [(int(r) + e.shape.nbytes) % (1 << 64) for r, e in zip(results, self.live, strict=True)]
        for load in (load for step in self.steps for load in step.loads):
            at = self.segments(self.work.moves + 64 * load.first)
            none = ctypes.c_uint64(0)
            simt.kv_simt_launch(kernel, at, len(load.parts), load.tiles, none, blocks, none, none)
        return []

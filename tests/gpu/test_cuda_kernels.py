"""The kernels' source: compiled for each architecture, and its arithmetic run on the CPU as host code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import PIECE_BYTES, checksum
from kvtier.gpu.cuda.device import TILE_BYTES
from kvtier.gpu.cuda.shapes import PLANE, ShapeCache, pieces_of
from kvtier.gpu.cuda.work import SEGMENT
from kvtier.gpu.engine import CopyItem
from kvtier.testing.fake_device_gpu import memory_at
from kvtier.testing.fake_device_host import SOURCES, Prepared, compiled
from kvtier.testing.pool_cases import BLOCK, BUILDERS, PAGES, Case, P

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_a_warning(architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    known = subprocess.run(
        [NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    if architecture not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    for source in SOURCES.glob("*.cu"):
        out = tmp_path / f"{source.stem}.cubin"
        flags = [
            "-std=c++17",
            "-O3",
            "-Werror",
            "all-warnings",
            f"-arch={architecture}",
            "-cubin",
            "-o",
            str(out),
        ]
        done = subprocess.run([NVCC, *flags, str(source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert out.stat().st_size > 10_000


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_control_a_warning_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text((SOURCES / "kv_copy.cu").read_text() + "\n__global__ void unused() { int x = 1; }\n")
    flags = ["-std=c++17", "-Werror", "all-warnings", "-arch=sm_80", f"-I{SOURCES}", "-cubin"]
    assert NVCC is not None
    done = subprocess.run(
        [NVCC, *flags, "-o", str(tmp_path / "bad.cubin"), str(source)], capture_output=True, check=False
    )
    assert done.returncode != 0


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_codecs_keep_what_is_small_however_they_are_compiled(tmp_path: Path) -> None:
    """cupy adds -ftz=true, which would make 0 of what the CPU's codec keeps; intrinsics obey it."""
    assert NVCC is not None
    control = tmp_path / "control.cu"
    control.write_text("__global__ void k(float* x) { x[0] = __fdiv_rn(x[0], x[1]); }\n")
    found = []
    for source in (SOURCES / "kv_copy.cu", control):
        out = tmp_path / f"{source.stem}.ptx"
        flags = ["-std=c++17", "-ftz=true", "-arch=sm_90", "-ptx", "-o", str(out)]
        subprocess.run([NVCC, *flags, str(source)], capture_output=True, check=True)
        found.append(out.read_text())
    text, broken = found
    for name in ("div.rn", "mul.rn", "sub.rn"):
        assert f"{name}.f32" in text and f"{name}.ftz.f32" not in text
    assert "div.rn.ftz.f32" in broken


def test_the_text_and_python_agree_on_constants() -> None:
    text = "".join(path.read_text() for path in SOURCES.iterdir())
    assert f"#define KV_TILE {TILE_BYTES}u" in text and f"#define KV_PIECE {PIECE_BYTES}u" in text
    assert (PLANE.itemsize, SEGMENT.itemsize) == (56, 64)
    assert "the same 56 bytes" in text and "the same 64 bytes" in text


# -- the arithmetic, as host code


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("host_check.cpp", tmp_path_factory.mktemp("host"))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_kernels_find_every_byte(host: ctypes.CDLL, data: st.DataObject) -> None:
    """Layouts, rows, pages and tiles of any size: gather, checksum and scatter against the slow reference."""
    build = data.draw(st.sampled_from(BUILDERS))
    dtype = data.draw(st.sampled_from(["uint16", "uint8", "float32"]))
    heads, dim = data.draw(st.sampled_from([(2, 4), (1, 8), (3, 5)]))
    case: Case = build(dtype, 3, heads, dim)
    case.fill(data.draw(st.integers(0, 1000)))
    table = data.draw(st.permutations(range(PAGES)))[:8]
    items = []
    for group, start in product(range(len(case.layout.groups)), (0, 16)):
        tokens = data.draw(st.integers(1, BLOCK))
        first = data.draw(st.integers(0, tokens - 1))
        nbytes = case.layout.geometry.groups[group].object_bytes(tokens, first)
        items.append(CopyItem(group, start, tokens, first, 0, 1, (0, 0), nbytes))
    wanted = [case.expected(i.group, table, i.start, i.tokens, i.first_valid) for i in items]
    ready = Prepared(case.pool().bind(table), items, data.draw(st.sampled_from([4096, 1 << 20])))
    ready.move(host, True, data.draw(st.sampled_from([16, 100, 4096])))
    assert ready.out[:-64].tobytes() == b"".join(wanted) and (ready.out[-64:] == 0xEE).all()
    assert ready.sums(host) == [checksum(w) for w in wanted]
    case.fill(0)
    ready.move(host, False)
    # Groups share pages, and later ones overwrite none of the earlier ones' bytes.
    assert [case.expected(i.group, table, i.start, i.tokens, i.first_valid) for i in items] == wanted


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_pieces_for_copy_calls_find_every_byte(data: st.DataObject) -> None:
    """What batched copies are given, for any range of an object."""
    build = data.draw(st.sampled_from(BUILDERS))
    case: Case = build("uint16", 2, 3, 4)
    case.fill(1)
    table = data.draw(st.permutations(range(PAGES)))[:4]
    group = data.draw(st.integers(0, len(case.layout.groups) - 1))
    tokens = data.draw(st.integers(1, BLOCK))
    first = data.draw(st.integers(0, tokens - 1))
    binding = case.pool().bind(table)
    shape = ShapeCache().shape(binding, group, 0, tokens, first)
    wanted = case.expected(group, table, 0, tokens, first)
    assert shape.nbytes == len(wanted)
    lo = data.draw(st.integers(0, len(wanted) - 1))
    hi = data.draw(st.integers(lo + 1, len(wanted)))
    pieces = pieces_of(shape, binding.page_ids(group, 0, tokens, first), lo, hi)
    assert int(pieces.nbytes.sum()) == hi - lo and pieces.offset[0] == lo
    assert (pieces.offset[1:] == pieces.offset[:-1] + pieces.nbytes[:-1]).all()
    found = [memory_at(int(a), int(n)).tobytes() for a, n in zip(pieces.address, pieces.nbytes, strict=True)]
    assert b"".join(found) == wanted[lo:hi]


def test_neighbouring_pages_are_one_piece() -> None:
    case: Case = BUILDERS[0]("uint16", 1, 2, 4)
    binding = case.pool().bind([3, 4, 5, 9])
    shape = ShapeCache().shape(binding, 0, 0, 16, 0)
    page = P * 2 * 4 * 2
    pieces = pieces_of(shape, binding.page_ids(0, 0, 16, 0), 0, shape.nbytes)
    assert pieces.nbytes.tolist() == [3 * page, page] * 2
    assert shape.piece_bytes == page


LENGTHS = [
    *range(1, 260),
    *(n + d for n in (1024, 2048, 4096, PIECE_BYTES) for d in (-65, -64, -1, 0, 1, 8, 63, 64, 65)),
    5000,
    3 * PIECE_BYTES + 7,
]  # fmt: skip


def test_xxh3_of_every_length_is_xxhash_s(host: ctypes.CDLL) -> None:
    """Known answers from the xxhash library, all seeds that a long object uses, aligned and not."""
    rng = np.random.default_rng(3)
    source = rng.integers(0, 256, 4 * PIECE_BYTES + 16, dtype=np.uint8)
    for length, skew in product(LENGTHS, (0, 3)):
        data = source[skew : skew + length]
        plane = np.zeros(1, PLANE)
        plane["base"], plane["strips"], plane["row_bytes"] = int(data.ctypes.data), 1, length
        plane["token_stride"], plane["gapless"] = length, 2
        ids = np.zeros(1, np.uint32)
        segment = np.zeros(1, SEGMENT)
        segment["planes"], segment["ids"] = int(plane.ctypes.data), int(ids.ctypes.data)
        segment["hi"], segment["plane_count"], segment["page_tokens"], segment["rows"] = length, 1, 1, 1
        result = np.zeros(1, np.uint64)
        host.kv_host_checksum(
            ctypes.c_void_p(int(segment.ctypes.data)), 1, ctypes.c_void_p(int(result.ctypes.data))
        )
        pieces = range(0, length, PIECE_BYTES)
        wanted = sum(
            xxhash.xxh3_64_intdigest(data[at : at + PIECE_BYTES].tobytes(), i) for i, at in enumerate(pieces)
        )
        assert int(result[0]) == wanted % (1 << 64), (length, skew)


def test_control_a_wrong_plane_is_seen(host: ctypes.CDLL) -> None:
    case: Case = BUILDERS[2]("uint16", 2, 2, 4)
    case.fill(1)
    item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), case.layout.geometry.groups[0].object_bytes(16, 0))
    wanted = case.expected(0, [5, 6, 7, 8], 0, 16, 0)
    for divisor in (1, 2):
        ready = Prepared(case.pool().bind([5, 6, 7, 8]), [item])
        at, table = ready.work._tables[0]
        ready.blob[at : at + table.nbytes].view(PLANE)["page_stride"] //= divisor
        ready.move(host, True)
        assert (ready.out[:-64].tobytes() == wanted) == (divisor == 1)
